"""What do more rows of the ledger cost a step: rows of steps, named groups, the spread of the elements?

The same `fit` with and without each of them, in one process, in turn, several times; the table shows medians and the
ratio pair by pair.

    python benchmarks/rows.py [--repeats 7] [--scenes 192]
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from interleaved import compared, interleaved

import lossledger as ll
from lossledger.demo.scenes import make_scenes
from lossledger.demo.unet import UNet

RESULTS = Path(__file__).parent / "results"
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


def measure(repeats: int, scenes: int) -> list[str]:
    """The lines of the table."""
    runs = contenders(scenes)
    times = interleaved(runs, repeats, -(-scenes // BATCH))
    lines = ["| contender | ms a step (median) | ratio (median) | lowest to highest |", "|---|---|---|---|"]
    for name in times:
        row = compared(times, name, "ledger by class")
        lines.append(
            f"| {name} | {row['median_ms']:.3f} | {row['ratio']:.3f} "
            f"| {row['ratio_low']:.3f} to {row['ratio_high']:.3f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scenes", type=int, default=192)
    given = parser.parse_args()
    torch.manual_seed(0)
    about = f"torch {torch.__version__}, lossledger {ll.__version__}, Python {platform.python_version()}"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {given.repeats} repeats, {given.scenes} scenes"
    lines = ["# Cost of more rows", "", f"Made by `python benchmarks/rows.py`. {about}; {machine}.", ""]
    lines += measure(given.repeats, given.scenes)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rows.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
