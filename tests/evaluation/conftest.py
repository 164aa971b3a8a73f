from __future__ import annotations

import pytest
import torch
from stories import TEXTS

from modalora.models.multimodal import Multimodal
from modalora.models.sizes import tiny
from modalora.processing.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """A thousand ids, so that it has whole words."""
    return TextTokenizer.train([*TEXTS, "1234567890 " * 50], 1000)


@pytest.fixture(scope="session")
def letters() -> TextTokenizer:
    """So few ids that the tiny model has a word for each."""
    return TextTokenizer.train(TEXTS[:1], 320)


@pytest.fixture(scope="session")
def model() -> Multimodal:
    """Weights so large that positions and rotary tables matter."""
    torch.manual_seed(0)
    made = Multimodal(tiny()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made
