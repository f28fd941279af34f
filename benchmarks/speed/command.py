"""What the two benchmarks share: the command line, the estimate, the machine, files of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from interleaved import spread

from speed.race import BENCHMARKS, run
from speed.workloads import WORKLOADS

ROOT = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"
# Seconds until a process is ready, of two that start at the same time.
STARTING = 4
PRECISIONS = ("float32", "bfloat16")


def options(text: str, workloads: Sequence[str], contenders: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--workloads", nargs="+", choices=workloads, default=list(workloads))
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=list(contenders))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a run, instead of what is usual for the workload")
    parser.add_argument("--threads", type=int, default=cores(), help="of each contender; all cores if not given")
    parser.add_argument("--jax", default=str(ROOT / ".venv-jax/bin/python"), help="an interpreter with JAX and Keras")
    parser.add_argument("--tensorflow", default=str(ROOT / ".venv-tensorflow/bin/python"), help="one with TensorFlow")
    parser.add_argument("--dry", action="store_true", help="print, and leave the results as they are")
    return parser.parse_args()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pythons(given: argparse.Namespace) -> dict[str, str]:
    """By place; where there is none, this interpreter says what it lacks."""
    found = {"here": sys.executable}
    for place in ("jax", "tensorflow"):
        path = getattr(given, place)
        found[place] = path if Path(path).exists() else sys.executable
    return found


def machine() -> str:
    """The processor, its cores for us, and the extensions that matter to bfloat16."""
    name, flags, total = platform.machine(), set(), 0
    about, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if about.exists():
        lines = dict(line.split(":", 1) for line in about.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        name, flags = fields.get("model name", name), set(fields.get("flags", "").split())
    if memory.exists():
        total = int(memory.read_text().split("MemTotal:")[1].split()[0]) // 2**20
    fast = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name}, {cores()} cores, {total} GiB, {' '.join(fast) or 'no wide vectors'}; {platform.system()}"


def estimate(given: argparse.Namespace, whats: int, usual: dict[str, int]) -> float:
    """Minutes, before anything was measured."""
    seconds = 0.0
    for name in given.workloads:
        workload = WORKLOADS[name]
        rows = len(given.contenders) * len(set(given.precisions) & set(workload.precisions))
        step = workload.milliseconds / 1e3 * (given.steps or usual.get(name, workload.steps))
        seconds += rows * (STARTING + whats * (1 + given.repeats) * step)
    return seconds / 60


def measure(
    given: argparse.Namespace, whats: Sequence[str], file: str, page: Callable[[dict], list[str]], usual: dict[str, int]
) -> None:
    """Run, print, and put what was measured in the place of what was known of these workloads.

    Args:
        usual: steps of a run, where they are not those of the workload.
    """
    print(f"about {estimate(given, len(whats), usual):.0f} minutes", file=sys.stderr, flush=True)
    results, known = RESULTS / f"{file}.json", {}
    if results.exists() and not given.dry:
        known = json.loads(results.read_text())
    for name in given.workloads:
        workload = WORKLOADS[name]
        found: dict[str, Any] = {"title": workload.title, "machine": machine(), "threads": given.threads}
        found |= run(
            workload,
            given.contenders,
            given.precisions,
            whats,
            given.repeats,
            given.steps or usual.get(name),
            given.threads,
            pythons(given),
        )
        print("\n".join(page({name: found})), flush=True)
        known[name] = found
        if not given.dry:
            known = {name: known[name] for name in WORKLOADS if name in known}
            RESULTS.mkdir(exist_ok=True)
            results.write_text(json.dumps(known, indent=1) + "\n")
            (RESULTS / f"{file}.md").write_text("\n".join(page(known)) + "\n")


def ratio(row: dict[str, Any], against: str) -> str:
    """With its spread; empty where the other did not take part."""
    return spread(row[against]) if against in row else ""


def ending(found: dict[str, Any]) -> list[str]:
    """How often, with what, on what, and who was left out."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    work = f"{found['repeats']} repeats of {found['steps']} steps, {found['threads']} threads"
    lines = [f"{work}. {versions}; {found['machine']}.", ""]
    for name, why in found["left_out"].items():
        lines += [f"Left out: {name}: {why}.", ""]
    return lines
