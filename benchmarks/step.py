"""What does a training step cost with the ledger by class on, against the same loop written by hand in plain torch?

Contenders run in one process, in turn, several times; the table shows medians and the ratio pair by pair. The raw loop
is tuned: one permutation an epoch, index_select, fused Adam, no host read.

    python benchmarks/step.py [--repeats 7] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pages
import torch
import torch.nn.functional as F
from interleaved import compared, interleaved, spread

import lossledger as ll
from lossledger.demo.scenes import make_scenes
from lossledger.demo.unet import UNet


def raw_loop(net, x, y, loss, batch_size, epochs):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    net.train()

    def run() -> None:
        for _ in range(epochs):
            order = torch.randperm(len(x), device=x.device)
            for start in range(0, len(x), batch_size):
                ids = order[start : start + batch_size]
                value = loss(net(x.index_select(0, ids)), y.index_select(0, ids))
                value.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


def our_loop(net, x, y, loss, batch_size, epochs, jit=False):
    model = ll.Model(net)
    model.compile(lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), loss, jit=jit)

    def run() -> None:
        model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0)

    return run


def workloads(device: str) -> dict[str, tuple[int, Callable[[], dict[str, Callable[[], None]]]]]:
    """Steps of a run, and the contenders."""

    def dense() -> dict[str, Callable[[], None]]:
        x = torch.rand(32 * 200, 3, device=device)
        y = 10 * x + 2.5
        return {
            "raw torch": raw_loop(torch.nn.Linear(3, 3, device=device), x, y, F.mse_loss, 32, 2),
            "lossledger, ledger by class": our_loop(torch.nn.Linear(3, 3, device=device), x, y, "mse", 32, 2),
            "the same, jit=True": our_loop(torch.nn.Linear(3, 3, device=device), x, y, "mse", 32, 2, jit=True),
        }

    def unet() -> dict[str, Callable[[], None]]:
        scenes = make_scenes(16 * 12, 64)
        x, y = torch.from_numpy(scenes.images).to(device), torch.from_numpy(scenes.masks).to(device)
        bce = ll.losses.BinaryCrossentropy(from_logits=True)
        return {
            "raw torch": raw_loop(UNet().to(device), x, y, F.binary_cross_entropy_with_logits, 16, 1),
            "lossledger, ledger by class": our_loop(UNet().to(device), x, y, bce, 16, 1),
        }

    return {"dense 32 × 3 → 3, mse": (400, dense), "U-Net 16 × 64 × 64, binary cross-entropy": (12, unet)}


def measure(repeats: int, device: str) -> list[dict[str, object]]:
    rows = []
    for name, (steps, make) in workloads(device).items():
        contenders = make()
        times = interleaved(contenders, repeats, steps, device)
        rows += [
            {"workload": name, "contender": contender, **compared(times, contender, "raw torch")}
            for contender in contenders
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(given.repeats, given.device)
    about = pages.about(given.repeats, numpy=np.__version__, device=given.device)
    lines = [
        "# Cost of a step",
        "",
        "Made by `make bench`. " + pages.said(about),
        "",
        "| workload | contender | ms a step (median) | ratio (lowest to highest) |",
        "|---|---|---:|---:|",
    ]
    for row in rows:
        lines.append(f"| {row['workload']} | {row['contender']} | {row['median_ms']:.3f} | {spread(row)} |")
    pages.keep("step", lines, {"about": about, "rows": rows}, given.device)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
