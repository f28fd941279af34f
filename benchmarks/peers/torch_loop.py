"""Plain torch as its documentation writes it.

Accumulation: "Gradient accumulation" of the examples of automatic mixed precision, without the scaler: the loss of a
batch divided by the number of batches, a step when the number of the batch divides by it. Loss of the epoch and of the
evaluation: the mean over batches, as in the quickstart. Ranks: DistributedDataParallel and DistributedSampler; the
evaluation of the ImageNet example: batches weighted by their samples, summed over the ranks, the rest evaluated by all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

from peers.common import ACCUMULATE, COUNT, SIZE, Recorder, Reported, Task

PACKAGES = ("torch",)
TASKS = ("tokens", "dice")


def run(task: Task, ranks: int) -> Reported:
    return alone(task) if ranks == 1 else together(task)


def alone(task: Task) -> Reported:
    loader = DataLoader(task.items, batch_size=SIZE, collate_fn=task.collate)
    net, optimizer = task.net, Recorder(task.net.parameters())
    total = 0.0
    for i, batch in enumerate(loader):
        loss = task.loss(net, batch)
        total += loss.item()
        (loss / ACCUMULATE).backward()
        if (i + 1) % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        evaluated = sum(task.loss(net, batch).item() for batch in loader) / len(loader)
    return Reported(total / len(loader), evaluated, optimizer.seen)


def together(task: Task) -> Reported:
    net = DistributedDataParallel(task.net)
    optimizer = Recorder(net.parameters())
    sampler = DistributedSampler(task.items, shuffle=False)
    total, batches = 0.0, 0
    for batch in DataLoader(task.items, batch_size=SIZE, collate_fn=task.collate, sampler=sampler):
        loss = task.loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, batches = total + loss.item(), batches + 1
    net.eval()
    return Reported(total / batches, evaluated(task), optimizer.seen)


def evaluated(task: Task) -> float:
    sums = torch.zeros(2, dtype=torch.float64)

    def add(items, sampler) -> None:
        for batch in DataLoader(items, batch_size=SIZE, collate_fn=task.collate, sampler=sampler):
            size = len(batch["labels"] if isinstance(batch, dict) else batch[0])
            sums.add_(torch.tensor([size * task.loss(task.net, batch).item(), size]))

    with torch.no_grad():
        sampler = DistributedSampler(task.items, shuffle=False, drop_last=True)
        add(task.items, sampler)
        dist.all_reduce(sums)
        rest = range(len(sampler) * dist.get_world_size(), COUNT)
        if len(rest):
            add(Subset(task.items, rest), None)
    return float(sums[0] / sums[1])
