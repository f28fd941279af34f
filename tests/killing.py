"""Runs that are killed: `python killing.py FOLDER KILLS SEED` kills runs at random moments, `… FOLDER calls N` at each
N-th call of the system that makes something durable. Prints one JSON line; each run is a forked process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

import lossledger as ll

DURABLE = ("fsync", "replace", "unlink", "mkdir", "open")


class Noisy(torch.utils.data.Dataset):
    """Samples with noise of torch's and NumPy's generators."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(3) + 0.1 * np.random.rand() + 0.1 * random.random(), self.y[index]


def run(folder: Path, kind: str, save_freq: str | int | None, epochs: int, outcome: Path) -> None:
    """One run from where it is to its end, then what it came to, as text."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    x, y = torch.randn(50, 3), (torch.randn(50, 2) > 0).float()
    layers = [torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)]
    model = ll.Model(torch.nn.Sequential(*layers))
    loss = ll.losses.BinaryCrossentropy(from_logits=True) + ll.losses.Dice(axis=0, from_logits="sigmoid")
    model.compile("adam", loss, metrics=["binary_accuracy"], ema=0.9, regularizers={"0.weight": "l2"})
    if kind == "arrays":
        data = {"x": x, "y": y, "batch_size": 8}
    else:
        data = {"x": torch.utils.data.DataLoader(Noisy(x, y), 8, shuffle=True)}
    stop = ll.callbacks.EarlyStopping("loss", patience=epochs, restore_best_weights=True)
    callbacks = [stop, ll.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9)]
    callbacks += [ll.callbacks.CSVLogger(folder.with_suffix(".csv"))]
    if save_freq is not None:
        callbacks.append(ll.callbacks.BackupAndRestore(save_freq))
    history = model.fit(
        **data, epochs=epochs, validation_data=(x[:9], y[:9]), verbose=0, seed=3, callbacks=callbacks,
        run_dir=folder, resume=True,
    )  # fmt: skip
    book = ll.Ledger.open(folder)
    assert book.rows == history.ledger.rows and book.metrics == history.ledger.metrics and not book.balance()
    counted = {row.count for row in book.rows if row.split == "training" and row.kind == "term" and row.role == "data"}
    found = {
        "weights": {name: value.double().tolist() for name, value in model.net.state_dict().items()},
        "optimizer": repr(model.optimizer.state_dict()),
        "history": history.history,
        "epochs": history.epoch,
        "rows": [repr(row) for row in book.rows],
        "metrics": [repr(row) for row in book.metrics],
        "csv": folder.with_suffix(".csv").read_text(),
        "next": [float(torch.rand(())), float(np.random.rand()), random.random()],
        "counted": sorted(counted),
    }
    outcome.write_text(json.dumps(found))


def forked(job) -> int:
    """The process of a job."""
    child = os.fork()
    if child == 0:
        try:
            job()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def finished(child: int) -> bool:
    """Whether a process ended by itself; one that failed ends everything."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "a run failed"
    return True


def warm(folder: Path) -> None:
    """Import here what a run imports, so that no fork has to; the run itself is another process's."""
    before = set(sys.modules)

    def job():
        run(folder / "warm", "loader", "epoch", 1, folder / "warm.json")
        (folder / "modules.json").write_text(json.dumps(sorted(set(sys.modules) - before)))

    finished(forked(job))
    for name in json.loads((folder / "modules.json").read_text()):
        # Some are made while others are imported.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def killed_until_done(job, rng: random.Random, longest: float) -> int:
    """Start a job, kill it after a random time, and again, until it ends; how often it was killed."""
    kills = 0
    while True:
        child = forked(job)
        # Each attempt may take longer, so that the slowest machine comes to the end.
        time.sleep(rng.random() * longest * (1 + kills / 50))
        os.kill(child, signal.SIGKILL)
        if finished(child):
            return kills
        kills += 1


def at_random(folder: Path, kills: int, seed: int) -> dict:
    warm(folder)
    rng = random.Random(seed)
    done, runs, wrong, duration = 0, 0, [], {}
    for kind, save_freq in [("arrays", 3), ("loader", 5), ("arrays", "epoch"), ("arrays", None)] * kills:
        if done >= kills:
            break
        runs += 1
        epochs = 8 if save_freq else 40

        def job(name, kind=kind, save_freq=save_freq, epochs=epochs):
            run(folder / name, kind, save_freq, epochs, folder / f"{name}.json")

        want = f"whole-{kind}-{epochs}"
        if want not in duration:
            started = time.perf_counter()
            finished(forked(functools.partial(job, want)))
            duration[want] = time.perf_counter() - started
        done += killed_until_done(functools.partial(job, f"killed-{runs}"), rng, 0.7 * duration[want])
        wrong += different(folder, want, f"killed-{runs}")
    return {"kills": done, "runs": runs, "wrong": wrong}


def different(folder: Path, one: str, two: str) -> list[str]:
    a, b = (json.loads((folder / f"{name}.json").read_text()) for name in (one, two))
    return [f"{two}: {key}" for key in a if a[key] != b[key]]


def dies_at(call: int, job):
    """The job, in a process that ends before its `call`-th durable call."""
    made = 0

    def counted(function):
        def wrapper(*arguments, **options):
            nonlocal made
            made += 1
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for name in DURABLE:
        setattr(os, name, counted(getattr(os, name)))
    job()


def at_each_call(folder: Path, stride: int) -> dict:
    warm(folder)
    rng = random.Random(0)

    def job(name):
        run(folder / name, "arrays", 4, 2, folder / f"{name}.json")

    finished(forked(lambda: job("whole")))
    kills, wrong = 0, []
    for call in range(1, 10_000, stride):
        name = f"call-{call:04d}"
        if finished(forked(lambda call=call, name=name: dies_at(call, lambda: job(name)))):
            break
        # The resumed run is killed at a call too, now and then; then it comes to its end.
        again = rng.randrange(1, 40)
        kills += 1 + (not finished(forked(lambda again=again, name=name: dies_at(again, lambda: job(name)))))
        finished(forked(lambda name=name: job(name)))
        wrong += different(folder, "whole", name)
    return {"kills": kills, "calls": call - 1, "wrong": wrong}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    what, number = sys.argv[2], int(sys.argv[3])
    result = at_each_call(place, number) if what == "calls" else at_random(place, int(what), number)
    print(json.dumps(result))
