"""accelerate: `accumulate` of its page on gradient accumulation; `gather_for_metrics` as in its examples.

The page has a recipe for samples of several sizes, written by hand around the loop; it is not used here.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from peers.common import ACCUMULATE, SIZE, Recorder, Reported, Task

PACKAGES = ("accelerate", "torch")
TASKS = ("tokens", "dice")


def run(task: Task, ranks: int) -> Reported:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE if ranks == 1 else 1)
    recorder = Recorder(task.net.parameters())
    loader = DataLoader(task.items, batch_size=SIZE, collate_fn=task.collate)
    net, optimizer, training = accelerator.prepare(task.net, recorder, loader)
    evaluation = accelerator.prepare(DataLoader(task.items, batch_size=SIZE, collate_fn=task.collate))
    total = torch.zeros(())
    for batch in training:
        with accelerator.accumulate(net):
            loss = task.loss(net, batch)
            total += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    net.eval()
    losses = []
    with torch.no_grad():
        for batch in evaluation:
            loss = task.loss(net, batch)
            losses.append(accelerator.gather_for_metrics(loss.repeat(SIZE)))
    return Reported(float(total) / len(training), float(torch.cat(losses).mean()), recorder.seen)
