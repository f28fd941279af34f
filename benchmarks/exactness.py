"""How far are the reported loss and the gradient of a training from those of its data as one batch in float64?

Sequences of unequal lengths and pictures with objects of unequal sizes, under gradient accumulation and on two ranks,
with lossledger and with other trainers as their documentation shows them (each in a file of `benchmarks/peers`). Every
contender runs in processes of its own; nothing is timed.

    python benchmarks/exactness.py [--only NAME …]
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pages
import torch
import torch.distributed as dist

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from peers import common  # noqa: E402

# By file: the name in the tables, and whether it divides data over ranks.
CONTENDERS = {
    "one_batch": ("one batch in float32", True),
    "ours": ("lossledger", True),
    "torch_loop": ("plain torch loop", True),
    "lightning_trainer": ("Lightning", True),
    "accelerate_loop": ("accelerate", True),
    "hf_trainer": ("HF Trainer", True),
    "keras_fit": ("Keras 3 (torch)", False),
}
NAMES = {"labels": "HF Trainer, labels of words", "language": "HF Trainer, language model"}
TABLES = {
    "Cross-entropy of words, sequences of 2 to 30 words": ("tokens", "labels", "language"),
    "Dice over the batch, pictures of 16 × 16": ("dice",),
}
COLUMNS = ("epoch", "evaluation", "steps", "last")


def run_one(name: str, task: str, ranks: int) -> list[dict[str, Any]]:
    """The errors of a contender, by seed; in each of its processes."""
    peer = importlib.import_module(f"peers.{name}")
    torch.set_num_threads(1)
    size = common.SIZE * (common.ACCUMULATE if ranks == 1 else ranks)
    found = []
    for seed in common.SEEDS:
        if name == "keras_fit":
            said, true = peer.report(task, seed)
        else:
            make = getattr(peer, task, None) or common.TASKS[task]
            true, said = common.right(make(seed), size), peer.run(make(seed), ranks)
        found.append(common.errors(said, true))
    return found


def worker(name: str, task: str, ranks: int, out: str) -> None:
    # Lightning, accelerate and lossledger join the other processes by themselves.
    if ranks > 1 and name == "torch_loop":
        dist.init_process_group("gloo")
    found = run_one(name, task, ranks)
    if int(os.environ.get("RANK", 0)) == 0:
        Path(out).write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def launched(name: str, task: str, ranks: int) -> list[dict[str, Any]]:
    """The same in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable]
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += [__file__, "--worker", name, task, str(ranks), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise SystemExit(f"{name} {task} on {ranks}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return json.loads(out.read_text())


def worst(found: list[dict[str, Any]]) -> dict[str, float | str | None]:
    """Over the seeds; what was not said or not done stays so."""

    def of(column: str) -> float | str | None:
        values = [one[column] for one in found]
        words = [value for value in values if not isinstance(value, float)]
        return words[0] if words else max(values)

    return {column: of(column) for column in COLUMNS}


def said(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "none reported" if value is None else f"{value:.1e}"


def versions(names: list[str]) -> str:
    packages = {package for name in names for package in importlib.import_module(f"peers.{name}").PACKAGES}
    return ", ".join(f"{package} {importlib.import_module(package).__version__}" for package in sorted(packages))


def measure(names: list[str]) -> list[dict[str, Any]]:
    """A row for each contender, task and number of ranks; without errors where it is not offered."""
    rows: list[dict[str, Any]] = []
    for ranks, name in itertools.product((1, 2), names):
        label, many = CONTENDERS[name]
        for task in importlib.import_module(f"peers.{name}").TASKS:
            found = launched(name, task, ranks) if ranks == 1 or many else None
            row = {"contender": NAMES.get(task, label), "task": task, "ranks": ranks}
            rows.append({**row, "worst": None if found is None else worst(found), "seeds": found})
            print({name: value for name, value in rows[-1].items() if name != "seeds"}, file=sys.stderr)
    return rows


def page(about: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "# Exactness under accumulation and on ranks",
        "",
        f"Relative errors against the same data as one batch in float64, the worst of {len(common.SEEDS)} data sets of "
        f"{common.COUNT} samples. Every contender runs as its documentation shows it, in float32 on a CPU, without "
        "shuffling and clipping, at learning rate 0, so that all steps start from the same weights; how, is said at "
        "the top of each file in `benchmarks/peers`. The last step of the epoch has fewer samples than the others; "
        "*no step*: it was not taken. *Gradient*: that which the optimizer is called with, ‖g − g₀‖ / ‖g₀‖. On two "
        "ranks the processes talk over gloo. *One batch in float32* is what rounding alone costs.",
        "",
        f"{about}. `make exactness` makes this page.",
        "",
    ]
    for (title, tasks), ranks in itertools.product(TABLES.items(), (1, 2)):
        way = (
            f"batches of {common.SIZE}, {common.ACCUMULATE} a step"
            if ranks == 1
            else f"{ranks} ranks, {common.SIZE} each"
        )
        lines += [
            f"## {title}: {way}",
            "",
            "| | loss of the epoch | loss of the evaluation | gradient of a step | gradient of the last step |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in rows:
            if row["task"] in tasks and row["ranks"] == ranks:
                cells = ["not offered" if row["worst"] is None else said(row["worst"][column]) for column in COLUMNS]
                lines.append(f"| {row['contender']} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="print these, and leave the results as they are")
    parser.add_argument("--worker", nargs=4, metavar=("NAME", "TASK", "RANKS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, task, ranks, out = options.worker
        return worker(name, task, int(ranks), out)
    names = options.only or list(CONTENDERS)
    about, rows = f"{versions(names)}; Python {platform.python_version()}", measure(names)
    lines = page(about, rows)
    print("\n".join(lines))
    if not options.only:
        pages.keep("exactness", lines, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
