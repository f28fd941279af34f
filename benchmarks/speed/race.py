"""Contenders in processes of their own, kept warm, one of them running at a time, in turn, several times.

All others are stopped by a signal meanwhile, so that no pool of waiting threads takes time from the one that runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import compared

from speed import nets
from speed.contenders import CONTENDERS, OURS, TUNED, Contender
from speed.workloads import Workload

BENCHMARKS = Path(__file__).parents[1]
# Of losses of the first batch, against the first contender, from the same weights.
CLOSE = {"float32": 1e-3, "bfloat16": 3e-2}


class LeftOutError(Exception):
    """A contender that cannot take part, and why."""


class Worker:
    """The process of a contender; stopped unless it is asked something."""

    def __init__(
        self, contender: Contender, precision: str, workload: Workload, data: Path, threads: int, python: str
    ) -> None:
        self.contender, self.precision = contender, precision
        self.folder = data / f"{contender.name}-{precision}"
        self.folder.mkdir()
        given = {
            "module": contender.module,
            "net": workload.net,
            "batch": workload.batch,
            "precision": precision,
            "data": str(data),
            "folder": str(self.folder),
            "options": dict(contender.options),
            "threads": threads,
        }
        # As many threads for each; JAX has as many as it may use cores.
        count = str(threads)
        pools = {name: count for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")}
        paths = [str(BENCHMARKS), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""} | pools
        self._log = (data / f"{self.folder.name}.log").open("w+")
        self.process = subprocess.Popen(
            [python, "-m", "speed.worker", json.dumps(given)],
            env=environment | dict(contender.environment),
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    @property
    def name(self) -> str:
        return self.contender.name if self.precision == "float32" else f"{self.contender.name} {self.precision}"

    def started(self) -> dict[str, Any]:
        found = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        return found

    def ask(self, do: str, **rest: str) -> dict[str, Any]:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"do": do, **rest}) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        return found

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"failed": f"its process ended with {self.process.wait()}"}
        if "failed" in found:
            self._log.seek(0)
            print(self._log.read()[-3000:], file=sys.stderr)
        if "failed" in found or "skipped" in found:
            raise LeftOutError(found.get("skipped") or f"failed: {found['failed']}")
        return found

    def end(self) -> None:
        # Also of a stopped process.
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._log):
            stream.close()


class Race:
    """The contenders of one workload that take part."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self.left_out: dict[str, str] = {}

    def all(self, do: str, **rest: str) -> dict[str, dict[str, Any]]:
        """The answer of each, one after the other; who fails leaves."""
        found = {}
        for name, worker in list(self.workers.items()):
            try:
                found[name] = worker.started() if do == "start" else worker.ask(do, **rest)
            except (LeftOutError, BrokenPipeError) as error:
                self.leave(name, str(error))
        return found

    def leave(self, name: str, why: str) -> None:
        self.left_out[name] = why
        print(f"{name} is left out: {why}", file=sys.stderr, flush=True)
        self.workers.pop(name).end()

    def end(self) -> None:
        for worker in self.workers.values():
            worker.end()


def prepare(workload: Workload, steps: int | None, data: Path) -> int:
    """Write samples and weights; the number of samples of a run."""
    arrays = workload.arrays(steps)
    for name, array in arrays.items():
        np.save(data / f"{name}.npy", array)
    weights = nets.keras_weights(nets.make(workload.net))
    flat = {f"{layer}/{i}": tensor.numpy() for layer, tensors in weights.items() for i, tensor in enumerate(tensors)}
    np.savez(data / "weights.npz", **flat)
    return len(arrays["x"])


def disagreeing(losses: dict[str, float], precisions: dict[str, str]) -> dict[str, str]:
    """Contenders whose loss of the first batch is not that of the first contender."""
    first = next(iter(losses.values()))
    return {
        name: f"the loss of its first batch is {loss:.6g}, of the first contender {first:.6g}"
        for name, loss in losses.items()
        if not abs(loss - first) <= CLOSE[precisions[name]] * abs(first)
    }


def run(
    workload: Workload,
    contenders: Sequence[str],
    precisions: Sequence[str],
    whats: Sequence[str],
    repeats: int,
    steps: int | None,
    threads: int,
    pythons: dict[str, str],
) -> dict[str, Any]:
    """Everything measured of a workload: rows, versions, and who was left out, such as one with another loss."""
    with tempfile.TemporaryDirectory() as folder:
        count = prepare(workload, steps, Path(folder))
        chosen = [
            (CONTENDERS[name], precision)
            for precision in precisions
            if precision in workload.precisions
            for name in contenders
        ]
        race = Race([Worker(one, p, workload, Path(folder), threads, pythons[one.place]) for one, p in chosen])
        try:
            return _run(race, workload, whats, repeats, count)
        finally:
            race.end()


def _run(race: Race, workload: Workload, whats: Sequence[str], repeats: int, samples: int) -> dict[str, Any]:
    steps = -(-samples // workload.batch)
    made = race.all("start")
    precisions = {name: worker.precision for name, worker in race.workers.items()}
    losses = {name: found["loss"] for name, found in race.all("loss").items()}
    for name, why in disagreeing(losses, precisions).items():
        race.leave(name, why)
    times: dict[str, dict[str, list[float]]] = {what: {} for what in whats}
    faults: dict[str, dict[str, int]] = {what: {} for what in whats}
    for what in whats:
        part = "steps" if what == "train" and not workload.whole else "seconds"
        warm = race.all("time", what=what)
        minutes = repeats * sum(found["seconds"] for found in warm.values()) / 60
        print(
            f"{workload.name}, {what}: about {minutes:.1f} minutes for {repeats} repeats", file=sys.stderr, flush=True
        )
        for _ in range(repeats):
            for name, found in race.all("time", what=what).items():
                times[what].setdefault(name, []).append(found[part] / steps)
                faults[what][name] = found["faults"]
    after = {name: found["loss"] for name, found in race.all("loss").items()}
    peaks = {name: found["peak"] for name, found in race.all("peak").items()}
    staying = list(race.workers)
    rows = []
    for what in whats:
        timed = {name: times[what][name] for name in staying}
        for name in staying:
            row = {
                "what": what,
                "contender": race.workers[name].contender.name,
                "precision": precisions[name],
                "seconds": timed[name],
                "faults": faults[what][name] / steps,
                "first_loss": losses[name],
                "last_loss": after[name],
                "peak": peaks[name],
                "before": made[name]["before"],
            }
            for against in (TUNED, OURS):
                if against in timed:
                    row[against] = compared(timed, name, against)
            row["median_ms"] = float(np.median(timed[name])) * 1e3
            rows.append(row)
    versions: dict[str, str] = {}
    for name in staying:
        versions |= made[name]["ready"]
    return {
        "steps": steps,
        "samples": samples,
        "repeats": repeats,
        "versions": versions,
        "rows": rows,
        "left_out": race.left_out,
    }
