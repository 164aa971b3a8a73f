"""The state of every random generator of a process, as tensors: of Python, of numpy, of torch on CPU and CUDA."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int, *more: int) -> None:
    """Set every generator to a start that follows from whole numbers alone."""
    sequence = np.random.SeedSequence([seed, *more])
    own = [int(word) for word in sequence.generate_state(3)]
    random.seed(own[0])
    np.random.seed(own[1])  # noqa: NPY002 - code of others may draw from it
    torch.manual_seed(own[2])  # CUDA too


def seed_dropout(*numbers: int) -> None:
    """Set torch's generators alone to a start that follows from whole numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def random_state() -> dict[str, Tensor]:
    """Return the state of every generator."""
    _, words, spare = random.getstate()
    _, key, place, has_spare, numpy_spare = np.random.get_state(legacy=True)  # noqa: NPY002
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python.spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.from_numpy(np.array(key, dtype=np.int64)),
        "numpy.spare": torch.tensor([place, has_spare, numpy_spare], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Set every generator back to what `random_state` returned."""
    spare = state["python.spare"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), spare[0] if spare else None))
    place, has_spare, numpy_spare = state["numpy.spare"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(place), int(has_spare), numpy_spare))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
