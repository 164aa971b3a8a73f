from __future__ import annotations

import pytest
from stories import TEXTS

from modalora.models.multimodal import Multimodal
from modalora.processing.tokenizer import TextTokenizer
from small import shaken


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
    return shaken()
