"""How many wrong set-ups of public bug reports are told before the fifth step?

python benchmarks/wrong_setups.py
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))

import torch

from modalora.errors import ModaloraError
from wrong_setups import WRONG, mixed_data


def main() -> None:
    torch.set_num_threads(1)
    caught = 0
    for name, wrong in WRONG.items():
        data = mixed_data()
        told = "not told"
        with tempfile.TemporaryDirectory() as folder:
            try:
                wrong.work(Path(folder), data)
            except ModaloraError as error:
                told = str(error)
        right = data.taken < 5 and bool(re.search(wrong.told, told, re.DOTALL))
        caught += right
        print(f"{'caught' if right else 'MISSED'} after {data.taken} steps  {name}: {told:.140}")
    print(f"caught {caught} of {len(WRONG)}")


if __name__ == "__main__":
    main()
