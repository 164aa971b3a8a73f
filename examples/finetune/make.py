"""Make the rows of this example: flags of two colours, beeps to be counted, and a few words.

python examples/finetune/make.py examples/finetune
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

FLAGS = (
    ("red", "white"),
    ("blue", "yellow"),
    ("green", "black"),
    ("white", "blue"),
    ("yellow", "red"),
    ("black", "green"),
)
NUMBERS = ("one", "two", "three", "four")
RATE = 8000


def main(folder: Path) -> None:
    """Write rows.jsonl with its pictures and sounds."""
    rows = []
    for left, right in FLAGS:
        name = f"flag-{left}-{right}.png"
        flag = Image.new("RGB", (96, 64), right)
        flag.paste(left, (0, 0, 48, 64))
        flag.save(folder / name, optimize=True)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": "<image>What color is the left half of the flag?"},
                    {"role": "assistant", "content": left},
                    {"role": "user", "content": "And the right half?"},
                    {"role": "assistant", "content": right},
                ],
                "images": [name],
            }
        )
    for count, word in enumerate(NUMBERS, start=1):
        time = np.arange(RATE // 8) / RATE
        beep = 0.3 * np.sin(2 * np.pi * 660 * time) * np.sin(np.pi * time / time[-1])
        wave = np.concatenate([np.concatenate((beep, np.zeros(RATE // 10))) for _ in range(count)])
        soundfile.write(folder / f"beeps-{count}.wav", wave.astype(np.float32), RATE, subtype="PCM_16")
        said = [{"role": "user", "content": "<audio>How many beeps are there?"}, {"role": "assistant", "content": word}]
        rows.append({"messages": said, "audios": [f"beeps-{count}.wav"]})
    for left, right in FLAGS[:2]:
        asked = f"The left half of a flag is {left}, the right half is {right}. What color is the right half?"
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": right}]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
