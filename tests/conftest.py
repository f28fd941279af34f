"""Fixed seeds, two threads, and a Hypothesis profile that prints how to repeat a failure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "lossledger", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow], max_examples=30
)
settings.load_profile("lossledger")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
