"""What does a call of fit, evaluate or predict cost, and what a pass, beside the same calls of Keras 3 on torch?

*One step*: a further call on one batch, after calls that have compiled and built everything: what is fixed, and a step.
*A step of many*: a call on many batches, divided by their number. Both libraries have the same layers in one process,
in turn, several times; the table shows medians, and how many times as fast the call of many steps is, pair by pair.

    python benchmarks/calls.py [--repeats 15] [--steps 100]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import pages
import torch
from interleaved import compared, interleaved, spread
from torch import nn

import lossledger as ll

OURS, KERAS = "lossledger", "Keras 3 (torch)"
METHODS = ("fit", "evaluate", "predict")


def dense() -> tuple[nn.Module, keras.Model, np.ndarray, np.ndarray, int]:
    random = np.random.default_rng(0)
    x = random.random((1, 3), "float32")
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    theirs = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)])
    return net, theirs, x, x.sum(1, keepdims=True), 32


def perceptron() -> tuple[nn.Module, keras.Model, np.ndarray, np.ndarray, int]:
    random = np.random.default_rng(0)
    x = random.random((1, 784), "float32")
    net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    layers = [keras.Input((784,)), keras.layers.Dense(256, "relu"), keras.layers.Dense(10)]
    return net, keras.Sequential(layers), x, x[:, :10], 128


def pictures() -> tuple[nn.Module, keras.Model, np.ndarray, np.ndarray, int]:
    random = np.random.default_rng(0)
    x = random.random((1, 32, 32, 3), "float32")

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x.movedim(-1, 1)).movedim(1, -1)

    layers = [
        keras.Input((32, 32, 3)),
        keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
        keras.layers.Conv2D(3, 3, padding="same"),
    ]
    return Last(), keras.Sequential(layers), x, x, 16


WORKLOADS = {
    "dense 32 × 3 → 5 → 1": dense,
    "MLP 128 × 784 → 256 → 10": perceptron,
    "two convolutions, 16 × 32 × 32 × 3": pictures,
}


def runs(make: Callable[[], tuple], steps: int) -> dict[tuple[str, str, int], Callable[[], object]]:
    """By library, method and number of steps."""
    net, theirs, x, y, batch = make()
    model = ll.Model(net)
    model.compile(lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), "mse")
    theirs.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse")
    found: dict[tuple[str, str, int], Callable[[], object]] = {}
    for count in (1, steps):
        inputs, targets = (np.repeat(a, batch * count, 0) for a in (x, y))
        for name, owner in ((OURS, model), (KERAS, theirs)):
            for method in METHODS:
                given = (inputs,) if method == "predict" else (inputs, targets)

                def run(owner=owner, method=method, given=given):
                    return getattr(owner, method)(*given, batch_size=batch, verbose=0)

                found[name, method, count] = run
    return found


def measure(repeats: int, steps: int) -> list[dict[str, object]]:
    """One row a workload and method."""
    rows = []
    for workload, make in WORKLOADS.items():
        times = interleaved(runs(make, steps), repeats)
        for method in METHODS:
            one = {name: statistics.median(times[name, method, 1]) * 1e3 for name in (OURS, KERAS)}
            row = compared({name: times[name, method, steps] for name in (OURS, KERAS)}, KERAS, OURS)
            many = {name: statistics.median(times[name, method, steps]) * 1e3 / steps for name in (OURS, KERAS)}
            rows.append({"workload": workload, "method": method, "one_ms": one, "step_ms": many, **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    rows = measure(given.repeats, given.steps)
    about = pages.about(given.repeats, keras=keras.__version__) | {"steps": given.steps}
    lines = [
        "# Fixed cost of a call, and a step of it, beside Keras",
        "",
        "Made by `python benchmarks/calls.py`, which says what is measured. " + pages.said(about),
        "",
        f"| workload | call | one step, {OURS}, ms | one step, {KERAS}, ms | a step of many, {OURS}, ms "
        f"| a step of many, {KERAS}, ms | times as fast (lowest to highest) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        one, step = row["one_ms"], row["step_ms"]
        lines.append(
            f"| {row['workload']} | {row['method']} | {one[OURS]:.2f} | {one[KERAS]:.2f} | {step[OURS]:.3f} "
            f"| {step[KERAS]:.3f} | {spread(row)} |"
        )
    pages.keep("calls", lines, {"about": about, "rows": rows})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
