"""Torch tuned by hand: no DataLoader, one permutation an epoch, index_select, images held with the channels last, fused
Adam, no host read, the loss of the epoch summed on the device."""

from __future__ import annotations

import numpy as np
import torch

from speed import nets
from speed.racer import Racer, Task
from speed.torch_plain import autocast, first_loss

PACKAGES = ("torch",)


def make(task: Task) -> Racer:
    net, loss_fn = nets.make(task.net), nets.LOSSES[task.net]
    x, y = torch.from_numpy(task.x), torch.from_numpy(task.y)
    images = x.ndim == 4
    if images:
        x = x.permute(0, 2, 3, 1).contiguous()
        net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    half = task.precision == "bfloat16"

    def shown(batch: torch.Tensor) -> torch.Tensor:
        return batch.permute(0, 3, 1, 2) if images else batch

    def train() -> float:
        net.train()
        total, order = torch.zeros(()), torch.randperm(len(x))
        for ids in order.split(task.batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_fn(net(shown(x.index_select(0, ids))), y.index_select(0, ids))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total.add_(loss.detach(), alpha=len(ids))
        return float(total) / len(x)

    def evaluate() -> float:
        net.eval()
        total = torch.zeros(())
        with torch.inference_mode(), autocast(task.precision):
            for batch, target in zip(x.split(task.batch), y.split(task.batch), strict=True):
                total.add_(loss_fn(net(shown(batch)), target), alpha=len(batch))
        return float(total) / len(x)

    def predict() -> np.ndarray:
        net.eval()
        found = None
        with torch.inference_mode(), autocast(task.precision):
            for start in range(0, len(x), task.batch):
                batch = net(shown(x[start : start + task.batch]))
                if found is None:
                    found = torch.empty((len(x), *batch.shape[1:]))
                found[start : start + task.batch] = batch
        return found.numpy()

    return Racer(lambda: first_loss(task, net), lambda: train, evaluate, predict)
