"""The parity tests' own fixtures. The reference warns of its own settings; a warning of ours still fails a test."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's id: each case is its own, and the same in every run."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
