"""The parity tests' own fixtures. The reference warns of its own settings; a warning of ours still fails a test."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # oracle.py


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's id: each case is its own, and the same in every run."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
