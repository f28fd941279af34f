"""What does the ledger cost in a training step? Without groups, by class, and with every sample.

The demo's U-Net on its scenes, binary cross-entropy and Dice over the batch. Contenders run in one process, in turn,
several times; the table shows medians and the ratio pair by pair. Goals: by class at most 1.03 of a step without
groups, with samples at most 1.05 of a step by class.

    python benchmarks/samples.py [--repeats 9] [--batches 12] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import pages
import torch
from interleaved import compared, interleaved, spread

import lossledger as ll
from lossledger.demo.scenes import make_scenes
from lossledger.demo.unet import UNet
from lossledger.training import loop

BATCH = 16
OFF, CLASS, SAMPLES = "no groups", "ledger by class", "ledger by class and samples"


def contender(x: torch.Tensor, y: torch.Tensor, groups: bool, samples: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = ll.Model(UNet().to(x.device))
    loss = ll.losses.BinaryCrossentropy(from_logits=True) + ll.losses.Dice(axis=(0, 1, 2), from_logits="sigmoid")
    model.compile(lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), loss)
    whole = loop.train_epoch

    def without(plan, windows, data, options, *rest):
        return whole(plan, windows, data, replace(options, by=None), *rest)

    def run() -> None:
        # The one way to train without groups: `fit` itself always keeps them, and knows best how.
        loop.train_epoch = whole if groups else without
        try:
            model.fit(x, y, batch_size=BATCH, verbose=0, samples=samples, checks="off", seed=0)
        finally:
            loop.train_epoch = whole

    return run


def measure(repeats: int, batches: int, device: str) -> dict[str, list[float]]:
    """Seconds of a step, by contender and repeat."""
    scenes = make_scenes(BATCH * batches, 64)
    x, y = torch.from_numpy(scenes.images).to(device), torch.from_numpy(scenes.masks).to(device)
    contenders = {
        OFF: contender(x, y, False, False),
        CLASS: contender(x, y, True, False),
        SAMPLES: contender(x, y, True, True),
    }
    return interleaved(contenders, repeats, batches, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    times = measure(given.repeats, given.batches, given.device)
    rows = []
    for name, against, goal in ((OFF, OFF, None), (CLASS, OFF, 1.03), (SAMPLES, CLASS, 1.05), (SAMPLES, OFF, None)):
        rows.append({"contender": name, "against": against, **compared(times, name, against), "goal": goal})
    about = pages.about(given.repeats, device=given.device) | {"steps": given.batches}
    lines = [
        "# Cost of the ledger in a step",
        "",
        f"U-Net, {BATCH} × 64 × 64. " + pages.said(about),
        "",
        "| contender | against | ms a step (median) | ratio (lowest to highest) | goal |",
        "|---|---|---:|---:|---|",
    ]
    for row in rows:
        goal = "" if row["goal"] is None else f"≤ {row['goal']}"
        lines.append(f"| {row['contender']} | {row['against']} | {row['median_ms']:.2f} | {spread(row, 3)} | {goal} |")
    print("\n".join(lines))
    if not given.dry:
        pages.keep("samples", lines, {"about": about, "rows": rows}, given.device)


if __name__ == "__main__":
    main()
