"""Counts the Python calls of a second call of fit, evaluate and predict beyond those of its steps; see calls.py."""

from __future__ import annotations

import torch
from torch import nn

import lossledger as ll
from calls import counted
from lossledger.training import sums

BATCH = 4


def fixed(method: str) -> float:
    """The calls of one step less those that one more step makes."""
    x, y = torch.randn(41 * BATCH, 3), (torch.rand(41 * BATCH, 1) < 0.5).float()
    model = ll.Model(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))
    model.compile("adam", ll.losses.BinaryCrossentropy(from_logits=True))

    def calls(steps: int) -> int:
        data = (x[: steps * BATCH],) if method == "predict" else (x[: steps * BATCH], y[: steps * BATCH])
        return counted(lambda: getattr(model, method)(*data, batch_size=BATCH, verbose=0))

    calls(41)
    one = calls(1)
    return one - (calls(41) - one) / 40


if __name__ == "__main__":
    sums.LOG_SECONDS = 1e9
    torch.manual_seed(0)
    print(*map(fixed, ("fit", "evaluate", "predict")))
