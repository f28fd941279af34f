"""Plain torch as its quickstart writes it: DataLoader, `zero_grad`, the loss read every 100 batches; autocast of the
recipe of automatic mixed precision."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from speed import nets
from speed.racer import Racer, Task

PACKAGES = ("torch",)


def autocast(precision: str):
    return torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def tensors(task: Task) -> TensorDataset:
    return TensorDataset(torch.from_numpy(task.x), torch.from_numpy(task.y))


def first_loss(task: Task, net) -> float:
    """As all contenders on torch are checked."""
    x, y = tensors(task)[: task.batch]
    was = net.training
    net.eval()
    with torch.no_grad(), autocast(task.precision):
        found = float(nets.LOSSES[task.net](net(x), y))
    net.train(was)
    return found


def make(task: Task) -> Racer:
    net, loss_fn, data = nets.make(task.net), nets.LOSSES[task.net], tensors(task)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    said = []

    def train() -> None:
        net.train()
        for batch, (x, y) in enumerate(DataLoader(data, batch_size=task.batch, shuffle=True)):
            with autocast(task.precision):
                pred = net(x)
                loss = loss_fn(pred, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if batch % 100 == 0:
                said.append(loss.item())

    def evaluate() -> float:
        loader, total = DataLoader(data, batch_size=task.batch), 0.0
        net.eval()
        with torch.no_grad(), autocast(task.precision):
            for x, y in loader:
                total += loss_fn(net(x), y).item()
        return total / len(loader)

    def predict() -> np.ndarray:
        net.eval()
        with torch.no_grad(), autocast(task.precision):
            return torch.cat([net(x) for x, _ in DataLoader(data, batch_size=task.batch)]).float().numpy()

    return Racer(lambda: first_loss(task, net), lambda: train, evaluate, predict)
