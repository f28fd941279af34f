"""What does a training step cost with lossledger, with raw torch and with other trainers?

Every contender runs in a process of its own (`benchmarks/speed`), kept warm and as its documentation recommends; one
runs at a time, in turn, several times. A run is one call of `fit` for one epoch. The table shows medians and the ratio
pair by pair, to torch tuned by hand and to lossledger in float32. A contender that computes another loss from the
same weights is left out.

    python benchmarks/trainers.py [--workloads dense unet-64 …] [--contenders tuned ours …] [--precisions float32]
        [--repeats 5] [--steps N] [--jax PYTHON] [--tensorflow PYTHON] [--dry]
"""

from __future__ import annotations

from typing import Any

from speed import command
from speed.contenders import CONTENDERS, OURS, TUNED
from speed.workloads import WORKLOADS


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| contender | precision | ms a step (median) | ratio to torch tuned by hand | ratio to lossledger | peak MiB "
        "| of these before the model |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {CONTENDERS[row['contender']].title} | {row['precision']} | {row['median_ms']:.3f} "
            f"| {command.ratio(row, TUNED)} | {command.ratio(row, OURS)} "
            f"| {mebibytes(row['peak'])} | {mebibytes(row['before'])} |"
        )
    return lines


def page(workloads: dict[str, Any]) -> list[str]:
    lines = [
        "# Cost of a training step, beside other trainers",
        "",
        "Every contender in a process of its own, one running at a time, in turn; a run is one call of `fit` (or its "
        "like) for one epoch, after one that is not measured. What Keras, Lightning and the HF Trainer do before their "
        "`on_train_begin` and after their `on_train_end` is left out, except for the cost of a call; raw loops, "
        "accelerate and lossledger are measured whole. Adam, the same weights and arrays; how each was run, is "
        "said at the top of each file in `benchmarks/speed`. Ratios are medians of those of the repeats, lowest to "
        "highest; a ratio to lossledger says how many times as long a step took as with `fit` of lossledger in float32 "
        "and its ledger by class. `make bench-trainers` makes this page.",
        "",
    ]
    for found in workloads.values():
        lines += [f"## {found['title']}", "", *table(found), "", *command.ending(found)]
    return lines[:-1]


def main() -> None:
    given = command.options((__doc__ or "").splitlines()[0], list(WORKLOADS), list(CONTENDERS))
    command.measure(given, ("train",), "trainers", page, {})


if __name__ == "__main__":
    main()
