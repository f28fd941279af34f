"""lossledger: `fit`, `evaluate` and `predict` on arrays, with a mask for the padding; the ledger by class is always on.

Options of `compile` and `fit` that this version does not have are said, and the contender left out.
"""

from __future__ import annotations

import inspect

import numpy as np

import lossledger as ll
from speed import nets
from speed.racer import NotOfferedError, Racer, Task
from speed.workloads import PADDING

PACKAGES = ("lossledger", "torch")
LOSSES = {
    "dense": lambda: "mse",
    "mlp": lambda: ll.losses.SparseCategoricalCrossentropy(from_logits=True),
    "unet": lambda: ll.losses.BinaryCrossentropy(from_logits=True),
    "language": lambda: ll.losses.SparseCategoricalCrossentropy(from_logits=True),
}


def known(function, options):
    missing = [name for name in options if name not in inspect.signature(function).parameters]
    if missing:
        raise NotOfferedError(f"Model.{function.__name__} has no {', '.join(missing)}")
    return options


def make(task: Task) -> Racer:
    net, x, y = nets.make(task.net), task.x, task.y
    model = ll.Model(net)
    compiling = known(ll.Model.compile, {"precision": task.precision, **task.options.get("compile", {})})
    fitting = known(ll.Model.fit, task.options.get("fit", {}))
    model.compile("adam", LOSSES[task.net](), **compiling)
    given = {"mask": y != PADDING} if task.net == "language" else {}
    first = {name: mask[: task.batch] for name, mask in given.items()}

    def train() -> None:
        model.fit(x, y, batch_size=task.batch, verbose=0, **given, **fitting)

    def evaluate() -> float:
        return model.evaluate(x, y, batch_size=task.batch, verbose=0, **given)

    def predict() -> np.ndarray:
        return model.predict(x, batch_size=task.batch)

    def loss() -> float:
        return float(model.evaluate(x[: task.batch], y[: task.batch], batch_size=task.batch, verbose=0, **first))

    return Racer(loss, lambda: train, evaluate, predict)
