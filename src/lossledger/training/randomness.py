"""The states of the random generators that a training step or the data may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """The states of torch (processor and device), NumPy and Python, as values that a checkpoint can hold."""
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(legacy=False),
        "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss},
    }


def apart(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch with numbers that no other rank draws, nor this one when it began at another step."""
    # Far from the small numbers that scripts seed with: rank 1 must not draw what rank 0 draws.
    torch.manual_seed((seed * 1_000_003 + rank * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63)


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back to where they were."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    np.random.set_state(state["numpy"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
