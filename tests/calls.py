"""Counts the Python calls of a training step, in a process of its own: what other tests import must not count."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

import lossledger as ll
from lossledger.training import checking, sums


def counted(run: Callable[[], object]) -> int:
    """Python function calls."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def python_calls(steps: int, jit: bool) -> int:
    """Python function calls of one epoch of so many steps. Array path, binary cross-entropy, ledger by class, Adam."""
    x, y = torch.randn(steps * 4, 3), (torch.rand(steps * 4, 1) < 0.5).float()
    model = ll.Model(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))
    model.compile("adam", ll.losses.BinaryCrossentropy(from_logits=True), jit=jit)
    if jit:
        model.fit(x[:12], y[:12], batch_size=4, verbose=0)
    return counted(lambda: model.fit(x, y, batch_size=4, seed=0, verbose=0))


if __name__ == "__main__":
    sums.LOG_SECONDS = 1e9
    # What the checks of the first batch call depends on its values; they run once, not in each step.
    checking.Checking._batch = lambda self, *arguments: None
    jit = "jit" in sys.argv
    python_calls(5, jit)
    print((python_calls(120, jit) - python_calls(20, jit)) / 100)
