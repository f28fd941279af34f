"""Fixed seeds, one thread, and a Hypothesis profile that prints how to repeat a failure."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before any test imports Keras.
os.environ["KERAS_BACKEND"] = "torch"

settings.register_profile(
    "lossledger", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow], max_examples=30
)
settings.load_profile("lossledger")
# One thread: the arrays of the tests are small, and a busy machine must not slow them down.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs that a test interrupts: the process lives on, so nothing need reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
