"""How does the cost of training grow with the batch, the classes, the terms of the loss and the samples?

Each point is an epoch of `fit` with the ledger by class, against a loop by hand in plain torch on the same data: one
permutation, index_select, fused Adam, no host read. The two run in turn in a process of their own, several times; the
table shows medians a step, the ratio pair by pair and its spread. Memory is the most that one contender alone, in one
more process, holds beside what it began with: libraries, data and model.

    python benchmarks/sizes.py [--repeats 7] [--axes batch classes terms samples] [--most 10000000]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pages
import torch
import torch.nn.functional as F
from interleaved import compared, interleaved, spread
from torch import Tensor, nn

import lossledger as ll

OURS, RAW = "lossledger, ledger by class", "raw torch"
AXES = {
    "batch": (1, 32, 1024, 32768),
    "classes": (2, 10, 100, 1000, 10_000),
    "terms": (1, 3, 10, 30, 100),
    "samples": (1000, 10_000, 100_000, 1_000_000, 10_000_000),
}
WHAT = {
    "batch": "64 → 64 → 10, cross-entropy of labels, by samples of a batch; 200 steps, 10 of the largest",
    "classes": "64 → C, cross-entropy of labels, batches of 128, by classes; 200 steps, 50 of the largest",
    "terms": "64 → 64 → 10, batches of 128, by terms of the loss, squared, absolute and Huber in turn; 50 steps",
    "samples": "3 → 1, squared error, batches of 1,024, by samples of the epoch; the smallest is a single step",
}
# What one point takes on two cores, imports of three processes included.
SECONDS = 20

Task = tuple[nn.Module, Tensor, Tensor, ll.losses.Loss, Callable[[Tensor, Tensor], Tensor], int]


def task(axis: str, size: int) -> Task:
    """Net, inputs, targets, our loss, torch's loss, batch."""
    torch.manual_seed(0)
    if axis == "samples":
        x = torch.rand(size, 3)
        return nn.Linear(3, 1), x, x.sum(1, keepdim=True), ll.losses.MeanSquaredError(), F.mse_loss, 1024
    batch = size if axis == "batch" else 128
    steps = 10 if batch > 10_000 else 50 if axis == "terms" or size >= 10_000 else 200
    x = torch.rand(batch * steps, 64)
    if axis == "terms":
        ours, theirs = terms(size)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        return net, x, torch.rand(len(x), 10), ours, theirs, batch
    classes = size if axis == "classes" else 10
    layers = [nn.Linear(64, classes)] if axis == "classes" else [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)]
    loss = ll.losses.SparseCategoricalCrossentropy(from_logits=True)
    return nn.Sequential(*layers), x, torch.randint(classes, (len(x),)), loss, F.cross_entropy, batch


def terms(number: int) -> tuple[ll.losses.Loss, Callable[[Tensor, Tensor], Tensor]]:
    """A loss of so many terms, and the same in plain torch."""
    ours = [ll.losses.MeanSquaredError, ll.losses.MeanAbsoluteError, ll.losses.Huber]
    theirs = [F.mse_loss, F.l1_loss, F.huber_loss]
    whole = 1 / number * ours[0](name="term_0")
    for index in range(1, number):
        whole = whole + 1 / number * ours[index % 3](name=f"term_{index}")

    def plain(prediction: Tensor, target: Tensor) -> Tensor:
        found = 1 / number * F.mse_loss(prediction, target)
        for index in range(1, number):
            found = found + 1 / number * theirs[index % 3](prediction, target)
        return found

    return whole, plain


def contender(name: str, given: Task) -> Callable[[], None]:
    """An epoch."""
    net, x, y, ours, theirs, batch = given
    if name == OURS:
        model = ll.Model(net)
        model.compile(lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), ours)

        def fit() -> None:
            model.fit(x, y, batch_size=batch, verbose=0)

        return fit
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)

    def run() -> None:
        order = torch.randperm(len(x))
        for start in range(0, len(x), batch):
            ids = order[start : start + batch]
            theirs(net(x.index_select(0, ids)), y.index_select(0, ids)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


# --- one point, in a process of its own ------------------------------------------------------------------------------


def timed(axis: str, size: int, repeats: int) -> dict[str, object]:
    given = task(axis, size)
    steps = -(-len(given[1]) // given[-1])
    times = interleaved({name: contender(name, task(axis, size)) for name in (RAW, OURS)}, repeats, steps)
    raw, ours = (compared(times, name, RAW) for name in (RAW, OURS))
    return {**ours, "raw_ms": raw["median_ms"], "steps": steps}


def held(axis: str, size: int, name: str) -> float:
    """MiB beside what was held before the first epoch, in two epochs."""
    run = contender(name, task(axis, size))
    before = _peak(reset=True)
    run()
    run()
    return max(0.0, _peak() - before)


def _peak(reset: bool = False) -> float:
    """The most MiB of this process so far; on Linux since the last reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def child(*arguments: object) -> str:
    command = [sys.executable, __file__, "--point", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout


def measure(axes: list[str], repeats: int, most: int) -> list[dict[str, object]]:
    """One row a point."""
    points = [(axis, size) for axis in axes for size in AXES[axis] if size <= most]
    print(f"{len(points)} points, about {len(points) * SECONDS / 60:.0f} minutes with 7 repeats", flush=True)
    began, rows = time.perf_counter(), []
    for axis, size in points:
        found = json.loads(child(axis, size, repeats))
        for key, name in (("raw_mib", RAW), ("mib", OURS)):
            found[key] = float(child(axis, size, name))
        rows.append({"axis": axis, "size": size, **found})
        print(f"{axis} {size:,}: {found['ratio']:.2f} ({time.perf_counter() - began:.0f} s)", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--axes", nargs="+", choices=tuple(AXES), default=list(AXES))
    parser.add_argument("--most", type=int, default=10_000_000, help="leave out larger sizes")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point is not None:
        axis, size, what = given.point
        told = timed(axis, int(size), int(what)) if what.isdigit() else held(axis, int(size), what)
        print(json.dumps(told))
        return
    rows = measure(given.axes, given.repeats, given.most)
    about = pages.about(given.repeats)
    lines = [
        "# Cost against size",
        "",
        "Made by `python benchmarks/sizes.py`, which says what is measured. " + pages.said(about),
    ]
    for axis in given.axes:
        lines += [
            "",
            f"## {axis.capitalize()}",
            "",
            f"{WHAT[axis]}.",
            "",
            "| size | raw torch, ms a step | ours, ms a step | ratio (lowest to highest) | raw torch, MiB "
            "| ours, MiB |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row['size']:,} | {row['raw_ms']:.3f} | {row['median_ms']:.3f} | {spread(row)} "
            f"| {row['raw_mib']:.1f} | {row['mib']:.1f} |"
            for row in rows
            if row["axis"] == axis
        ]
    pages.keep("sizes", lines, {"about": about, "rows": rows})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
