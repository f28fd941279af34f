"""The process of one contender: makes it, then does what it is told, one line of JSON at a time.

python -m speed.worker '{"module": …, "net": …, "batch": …, "precision": …, "data": …, "folder": …, "options": …}'
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import platform
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from speed.racer import CLOCK, NotOfferedError, Racer, Task

PARENT_DIED = 1


def limit(threads: int) -> None:
    """Fewer cores, where fewer threads are asked for than there are."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def die_with_parent() -> None:
    """A stopped process would stay for ever."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)


def memory(name: str) -> int | None:
    """A line of this process's memory in bytes; `VmHWM` is the peak. On Linux.

    `ru_maxrss` would not do: there it starts with the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def task_of(given: dict[str, Any]) -> Task:
    folder = Path(given["data"])
    weights: dict[str, list[np.ndarray]] = {}
    if given["module"] == "keras_fit":
        with np.load(folder / "weights.npz") as arrays:
            for name in arrays.files:
                weights.setdefault(name.rpartition("/")[0], []).append(arrays[name])
    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    kept = ("net", "batch", "precision", "folder", "options")
    return Task(x=x, y=y, weights=weights, **{name: given[name] for name in kept})


def timed(racer: Racer, what: str) -> dict[str, Any]:
    run = racer.prepare(what)
    gc.collect()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    CLOCK.reset()
    began = time.perf_counter()
    run()
    ended = time.perf_counter()
    steps = (CLOCK.last or ended) - (CLOCK.first or began)
    return {
        "seconds": ended - began,
        "steps": steps,
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {name: str(importlib.import_module(name).__version__) for name in packages} | {
        "numpy": np.__version__,
        "Python": platform.python_version(),
    }


def serve(given: dict[str, Any], answer: Any) -> None:
    limit(given["threads"])
    try:
        module = importlib.import_module(f"speed.{given['module']}")
    except ModuleNotFoundError as error:
        print(sys.executable, file=sys.stderr)
        raise NotOfferedError(f"{error.name} is not installed") from error
    task = task_of(given)
    before = memory("VmRSS")
    racer = module.make(task)
    answer({"ready": versions(module.PACKAGES), "before": before})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "loss":
            answer({"loss": racer.loss()})
        elif order["do"] == "time":
            answer(timed(racer, order["what"]))
        else:
            answer({"peak": memory("VmHWM")})


def main() -> None:
    die_with_parent()
    # What libraries print goes to the log; the pipe is ours alone.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        pipe.write(json.dumps(content) + "\n")
        pipe.flush()

    try:
        serve(json.loads(sys.argv[1]), answer)
    except NotOfferedError as error:
        answer({"skipped": str(error)})
    except Exception as error:
        traceback.print_exc()
        answer({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
