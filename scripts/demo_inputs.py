"""Make the inputs of `modalora demo`: a rendered scene, and espeak-ng speech. Needs espeak-ng.

python scripts/demo_inputs.py src/modalora/bundled/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile

from modalora.data.numbers import DIGITS
from modalora.data.scenes import nlvr_like
from modalora.data.variation import resample
from modalora.data.voices import espeak, trim

RATE = 16_000


def main(folder: Path) -> None:
    """Write scene.png, digits.wav, number.wav and question.wav."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    kinds: list[str] = []
    while (kinds.count("circle"), kinds.count("triangle")) != (3, 1):
        scene = nlvr_like(rng, towers=0)
        kinds = [shape.kind for shape in scene.shapes]
    scene.image.save(folder / "scene.png", optimize=True)
    gap = np.zeros(RATE // 5, dtype=np.float32)
    words = [said(word) for word in ("three", "seven", "one")]
    write(folder / "digits.wav", np.concatenate([words[0], gap, words[1], gap, words[2]]))
    write(folder / "number.wav", said(DIGITS[kinds.count("circle")]))
    write(folder / "question.wav", said("how many circles are there"))


def said(text: str) -> np.ndarray:
    """Return the text as espeak-ng says it, at RATE."""
    clip = espeak(text, voice="en-us", speed=150, pitch=50)
    return trim(resample(clip.wave, clip.rate, RATE), RATE)


def write(path: Path, wave: np.ndarray) -> None:
    """Write 16-bit mono."""
    soundfile.write(path, wave, RATE, subtype="PCM_16")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
