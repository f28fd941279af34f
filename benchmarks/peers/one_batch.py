"""What float32 itself costs: the whole steps and the whole data as one batch, in plain torch."""

from __future__ import annotations

import torch

from peers.common import ACCUMULATE, SIZE, Recorder, Reported, Task, steps

PACKAGES = ("torch",)
TASKS = ("tokens", "dice")


def run(task: Task, ranks: int) -> Reported:
    optimizer = Recorder(task.net.parameters())
    for ids in steps(SIZE * (ACCUMULATE if ranks == 1 else ranks)):
        optimizer.zero_grad()
        task.loss(task.net, task.collate([task.items[i] for i in ids])).backward()
        optimizer.step()
    with torch.no_grad():
        whole = float(task.loss(task.net, task.collate(task.items)))
    return Reported(whole, whole, optimizer.seen)
