"""Contenders timed in turn, several times: what the machine does meanwhile meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def settled(device: str) -> None:
    """Wait until a device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, parts: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each contender and repeat, divided by the `parts` of a run; a run of each goes before, unmeasured.

    A run ends when the device has ended it.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            settled(device)
            began = time.perf_counter()
            run()
            settled(device)
            times[name].append((time.perf_counter() - began) / parts)
    return times


def compared(times: Mapping[str, list[float]], name: str, against: str) -> dict[str, float]:
    """Median in milliseconds, and the ratio to another contender, repeat by repeat."""
    ratios = [a / b for a, b in zip(times[name], times[against], strict=True)]
    return {
        "median_ms": statistics.median(times[name]) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def spread(row: Mapping[str, Any], digits: int = 2) -> str:
    """The ratio that `compared` found, from the lowest to the highest of the repeats."""
    return f"{row['ratio']:.{digits}f} ({row['ratio_low']:.{digits}f} to {row['ratio_high']:.{digits}f})"
