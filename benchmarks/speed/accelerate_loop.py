"""accelerate: the loop of its quick tour, `prepare` and `backward`."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from speed import nets
from speed.racer import Racer, Task
from speed.torch_plain import first_loss, tensors

PACKAGES = ("accelerate", "torch")


def make(task: Task) -> Racer:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if task.precision == "bfloat16" else "no")
    net, loss_fn = nets.make(task.net), nets.LOSSES[task.net]
    model, optimizer, loader = accelerator.prepare(
        net,
        torch.optim.Adam(net.parameters(), lr=1e-3),
        DataLoader(tensors(task), batch_size=task.batch, shuffle=True),
    )

    def train() -> None:
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            accelerator.backward(loss)
            optimizer.step()

    return Racer(lambda: first_loss(task, net), lambda: train)
