"""How many samples a second do `evaluate` and `predict` of lossledger, of Keras 3 and of raw torch take?

The processes and the turns are those of `benchmarks/trainers.py`. The tables show the median speed, and the time as a
ratio pair by pair, to torch written by hand with inference mode and outputs made once, and to lossledger in float32.

    python benchmarks/inference.py [--workloads unet-64 mlp] [--contenders tuned ours …] [--precisions float32]
        [--repeats 5] [--steps N] [--jax PYTHON] [--tensorflow PYTHON] [--dry]
"""

from __future__ import annotations

from typing import Any

from speed import command
from speed.contenders import CONTENDERS, OURS, TUNED

WORKLOADS = ("unet-64", "mlp")
TAKE_PART = ("torch", TUNED, OURS, "keras-torch", "keras-jax", "keras-tensorflow")
# As many scenes as the demo has.
STEPS = {"unet-64": 96}
WHATS = ("evaluate", "predict")


def table(found: dict[str, Any], what: str) -> list[str]:
    lines = [
        f"| {what} | precision | samples a second (median) | time as a ratio to torch tuned by hand "
        "| ratio to lossledger |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found["rows"]:
        if row["what"] == what:
            speed = found["samples"] / found["steps"] / row["median_ms"] * 1e3
            lines.append(
                f"| {CONTENDERS[row['contender']].title} | {row['precision']} | {speed:,.0f} "
                f"| {command.ratio(row, TUNED)} | {command.ratio(row, OURS)} |"
            )
    return lines


def page(workloads: dict[str, Any]) -> list[str]:
    lines = [
        "# Speed of evaluate and predict",
        "",
        "Every contender in a process of its own, one running at a time, in turn; the same weights and arrays; how "
        "each was run, is said at the top of each file in `benchmarks/speed`. Evaluate computes the loss of all "
        "samples, that of lossledger with its ledger by class; predict gives all outputs as NumPy arrays. Ratios are "
        "medians of those of the repeats, lowest to highest.",
        "",
    ]
    for found in workloads.values():
        lines += [f"## {found['title']}", ""]
        for what in WHATS:
            lines += [*table(found, what), ""]
        lines += command.ending(found)
    return lines[:-1]


def main() -> None:
    given = command.options((__doc__ or "").splitlines()[0], WORKLOADS, TAKE_PART)
    command.measure(given, WHATS, "inference", page, STEPS)


if __name__ == "__main__":
    main()
