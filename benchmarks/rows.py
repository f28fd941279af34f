"""What do more rows of the ledger cost a step: rows of steps, named groups, the spread of the elements?

The same `fit` with and without each of them, in one process, in turn, several times; the table shows medians and the
ratio pair by pair.

    python benchmarks/rows.py [--repeats 7] [--scenes 192]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pages
import torch
from interleaved import compared, interleaved, spread

import lossledger as ll
from lossledger.demo.scenes import make_scenes
from lossledger.demo.unet import UNet

BATCH = 16


def contenders(scenes: int) -> dict[str, Callable[[], None]]:
    """One `fit` of an epoch each."""
    made = make_scenes(scenes, 64)
    x, y = torch.from_numpy(made.images), torch.from_numpy(made.masks)
    ids = np.arange(scenes)
    groups = {"site": ids % 5, "language": np.array(["de", "en", "fr", "it"])[ids % 4]}
    options = {
        "ledger by class": {},
        "rows of every step": {"ledger_steps": 1},
        "rows of every 10th step": {"ledger_steps": 10},
        "groups of two kinds": {"groups": groups},
        "samples": {"samples": True},
        "samples and groups of two kinds": {"samples": True, "groups": groups},
        "spread": {"spread": True},
    }

    def loop(given: dict[str, object]) -> Callable[[], None]:
        model = ll.Model(UNet())
        loss = ll.losses.BinaryCrossentropy(from_logits=True)
        model.compile(lambda p: torch.optim.Adam(p, lr=1e-3, fused=True), loss)
        return lambda: model.fit(x, y, batch_size=BATCH, verbose=0, checks="off", seed=0, **given)

    return {name: loop(given) for name, given in options.items()}


def measure(repeats: int, scenes: int) -> list[dict[str, object]]:
    """One row a contender."""
    runs = contenders(scenes)
    times = interleaved(runs, repeats, -(-scenes // BATCH))
    return [{"contender": name, **compared(times, name, "ledger by class")} for name in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scenes", type=int, default=192)
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(given.repeats, given.scenes)
    about = pages.about(given.repeats) | {"scenes": given.scenes}
    lines = [
        "# Cost of more rows",
        "",
        "Made by `python benchmarks/rows.py`. " + pages.said(about),
        "",
        "| contender | ms a step (median) | ratio (lowest to highest) |",
        "|---|---:|---:|",
        *(f"| {row['contender']} | {row['median_ms']:.3f} | {spread(row, 3)} |" for row in rows),
    ]
    pages.keep("rows", lines, {"about": about, "rows": rows})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
