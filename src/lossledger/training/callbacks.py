"""Callbacks with Keras's names."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from lossledger.distributed import as_part
from lossledger.errors import CheckpointError, InputError, InputTypeError, UnknownNameError
from lossledger.forward import renamed
from lossledger.ledger.rows import ROW_COLUMNS
from lossledger.training.callback import Callback, Logs, awaited, monitored
from lossledger.training.gap import Gap
from lossledger.training.schedule import LearningRateScheduler, is_scheduler
from lossledger.training.series import epoch_rows
from lossledger.training.sinks import MLflow, TensorBoard

__all__ = [
    "BackupAndRestore",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "Gap",
    "LambdaCallback",
    "LearningRateScheduler",
    "MLflow",
    "ModelCheckpoint",
    "TensorBoard",
]


# How names end of numbers that get better when they fall: losses, errors, and metrics that are losses.
_FALLING = re.compile(
    r"(loss|error|mae|r?mse|mape|msle|cross_?entropy|bce|divergence|kld|hinge|poisson|log_?cosh)(_\d+)?$"
)


class LambdaCallback(Callback):
    """A callback from functions.

    Args:
        on_epoch_begin: `fn(epoch, logs)`.
        on_epoch_end: `fn(epoch, logs)`.
        on_train_begin: `fn(logs)`.
        on_train_end: `fn(logs)`.
        on_train_batch_begin: `fn(batch, logs)`.
        on_train_batch_end: `fn(batch, logs)`.
    """

    def __init__(
        self,
        on_epoch_begin: Callable[[int, Logs], Any] | None = None,
        on_epoch_end: Callable[[int, Logs], Any] | None = None,
        on_train_begin: Callable[[Logs], Any] | None = None,
        on_train_end: Callable[[Logs], Any] | None = None,
        on_train_batch_begin: Callable[[int, Logs], Any] | None = None,
        on_train_batch_end: Callable[[int, Logs], Any] | None = None,
    ) -> None:
        hooks = {
            "on_epoch_begin": on_epoch_begin,
            "on_epoch_end": on_epoch_end,
            "on_train_begin": on_train_begin,
            "on_train_end": on_train_end,
            "on_train_batch_begin": on_train_batch_begin,
            "on_train_batch_end": on_train_batch_end,
        }
        vars(self).update({name: fn for name, fn in hooks.items() if fn is not None})


class _Monitor:
    """Watches a number of the logs and says when it got better."""

    def __init__(self, monitor: str, mode: str, min_delta: float, who: str) -> None:
        if mode not in ("auto", "min", "max"):
            raise UnknownNameError(f"mode of {who}", mode, ("auto", "min", "max"))
        self.name, self.who = monitor, who
        falls = _FALLING.search(monitor.lower()) is not None
        self.sign = 1.0 if mode == "min" or (mode == "auto" and falls) else -1.0
        self.min_delta = abs(min_delta)
        self.best = math.inf

    def read(self, logs: Logs, params: Mapping[str, Any]) -> float | None:
        """The number, or `None` in an epoch without the validation that makes it."""
        return monitored(self.name, logs, params, self.who)

    def improved(self, value: float) -> bool:
        if self.beats(value, self.best):
            self.best = self.sign * value
            return True
        return False

    def beats(self, value: float, other: float) -> bool:
        """Whether a number is better than another, which is given with its sign."""
        return self.sign * value < other - self.min_delta


class EarlyStopping(Callback):
    """Stop when a number has not got better for some epochs.

    Args:
        monitor: name of the number; epochs without the validation that makes it are passed over.
        min_delta: smallest change that counts.
        patience: epochs (that have the number) without an improvement before training stops.
        mode: `"min"`, `"max"`, or `"auto"` (losses, errors and the metrics of losses fall, everything else rises).
        baseline: a value to beat: an epoch that is the best so far, but no better than this, goes on and counts as one
            without an improvement.
        restore_best_weights: end with the weights of the best epoch.
        start_from_epoch: epochs to wait before watching.

    Raises:
        UnknownNameError: nothing of that name is logged.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ) -> None:
        self._arguments = (monitor, mode, min_delta, type(self).__name__)
        self.patience = patience
        self.baseline = baseline
        self.restore_best_weights = restore_best_weights
        self.start_from_epoch = start_from_epoch
        self.stopped_epoch: int | None = None
        self.best_epoch: int | None = None
        self._monitor = _Monitor(*self._arguments)

    def on_train_begin(self, logs: Logs) -> None:
        """Start over."""
        self._monitor = _Monitor(*self._arguments)
        self.stopped_epoch = self.best_epoch = None
        self._wait = 0
        self._best_weights: dict[str, torch.Tensor] | None = None

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Compare with the best so far."""
        value = self._monitor.read(logs, self.params)
        if value is None or epoch < self.start_from_epoch:
            return
        self._wait += 1
        if self._monitor.improved(value):
            self.best_epoch = epoch
            if self.restore_best_weights:
                self._best_weights = {k: v.detach().clone() for k, v in self.model.net.state_dict().items()}
            if self.baseline is None or self._monitor.beats(value, self._monitor.sign * self.baseline):
                self._wait = 0
            return
        if self._wait >= self.patience:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def state_dict(self) -> dict[str, Any]:
        """The best epoch, and how long ago it was."""
        return {
            "best": self._monitor.best,
            "wait": self._wait,
            "best_epoch": self.best_epoch,
            "stopped_epoch": self.stopped_epoch,
            "best_weights": self._best_weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting."""
        self._monitor.best, self._wait = state["best"], state["wait"]
        self.best_epoch, self.stopped_epoch = state["best_epoch"], state["stopped_epoch"]
        self._best_weights = state["best_weights"]

    def on_train_end(self, logs: Logs) -> None:
        """Put the best weights back, if asked to."""
        if self._best_weights is not None:
            known = self.model.net.state_dict()
            # Those of a checkpoint are whole, and may be of a network without torch.compile, or with it.
            best = renamed(self._best_weights, known)
            best = {name: as_part(value, known.get(name)) for name, value in best.items()}
            self.model.net.load_state_dict(best)


class ModelCheckpoint(Callback):
    """Save the weights after epochs.

    Args:
        filepath: path of the safetensors file; may use `{epoch:02d}` (from 1) and numbers of the logs. Epochs without
            a validation are passed over where its numbers are needed.
        monitor: number that decides what is best.
        save_best_only: keep a file only when the number got better.
        mode: as for `EarlyStopping`.
    """

    def __init__(
        self,
        filepath: str | Path,
        monitor: str = "val_loss",
        save_best_only: bool = False,
        mode: str = "auto",
    ) -> None:
        self.filepath = str(filepath)
        self.save_best_only = save_best_only
        self._monitor = _Monitor(monitor, mode, 0.0, type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        """The best number so far."""
        return {"best": self._monitor.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the best number."""
        self._monitor.best = state["best"]

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Save, if due."""
        if self.save_best_only:
            value = self._monitor.read(logs, self.params)
            if value is None or not self._monitor.improved(value):
                return
        try:
            path = self.filepath.format(epoch=epoch + 1, **logs)
        except KeyError as error:
            later = awaited(logs, self.params)
            if error.args[0] in later:
                return
            known = ["epoch", *logs, *later]
            raise UnknownNameError("number in filepath of ModelCheckpoint", error.args[0], known) from None
        self.model.save_weights(path)


class CSVLogger(Callback):
    """Write the numbers of each epoch to a CSV file; those of the validation are empty in epochs without one.

    Args:
        filename: path.
        separator: between columns.
        append: continue an existing file; its columns must be the same.
        rows: write the rows of the ledger instead, a line each: terms and groups of epochs, and of steps if it has
            them, with their sums, counts and non-finite counts. Their epochs are counted from 1.
    """

    def __init__(self, filename: str | Path, separator: str = ",", append: bool = False, rows: bool = False) -> None:
        self.filename = Path(filename)
        self.separator = separator
        self.append = append
        self.rows = rows
        self._file: TextIO | None = None
        self._columns: list[str] | None = None

    def on_train_begin(self, logs: Logs) -> None:
        """Open the file, on one rank."""
        self._columns = None
        # Kept: an evaluation in another callback leaves its own in the model.
        self._ledger = self.model.ledger
        if not self.model.writes:
            return
        if self.append and self.filename.exists():
            with self.filename.open(newline="") as existing:
                self._columns = next(csv.reader(existing, delimiter=self.separator), None)
        self._file = self.filename.open("a" if self.append or self.params.get("resumed") else "w", newline="")

    def state_dict(self) -> dict[str, Any]:
        """The columns, and how much of the file is on the disk."""
        if self._file is None:
            return {"columns": None, "bytes": 0}
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"columns": self._columns, "bytes": os.fstat(self._file.fileno()).st_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut off the lines of epochs that will run again.

        Raises:
            CheckpointError: the file is shorter than it was.
        """
        if self._file is None:
            return
        found = os.fstat(self._file.fileno()).st_size
        if found < state["bytes"]:
            raise CheckpointError(
                f"resume: {self.filename} has {found} bytes; the run had written {state['bytes']}. Put the file back, "
                "or start in another run_dir."
            )
        self._file.truncate(state["bytes"])
        self._columns = state["columns"]

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Write one line, or the epoch's rows."""
        if not self.model.writes:
            return
        assert self._file is not None
        writer = csv.writer(self._file, delimiter=self.separator)
        columns = list(ROW_COLUMNS) if self.rows else ["epoch", *logs]
        if self._columns is None:
            self._columns = columns if self.rows else [*columns, *awaited(logs, self.params)]
            writer.writerow(self._columns)
        unknown = [c for c in columns if c not in self._columns]
        if unknown:
            raise UnknownNameError(f"column of {self.filename}", unknown[0], self._columns)
        found = map(asdict, epoch_rows(self._ledger, epoch + 1)[0]) if self.rows else [{"epoch": epoch, **logs}]
        # A row of an epoch has no step: csv writes nothing for None.
        writer.writerows([values.get(column, "") for column in self._columns] for values in found)
        self._file.flush()

    def on_train_end(self, logs: Logs) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class BackupAndRestore(Callback):
    """Set when `fit(run_dir=…)` writes a checkpoint; `fit(…, resume=True)` goes on from the newest one.

    Without it checkpoints are written as often as costs a hundredth of the time.

    Args:
        save_freq: `"epoch"`, or every so many steps of the run (batches, or windows of them); and always at the end.
    """

    def __init__(self, save_freq: str | int = "epoch") -> None:
        number = isinstance(save_freq, int) and not isinstance(save_freq, bool)
        if not number and save_freq != "epoch":
            raise InputTypeError(
                f"save_freq of BackupAndRestore: expected 'epoch' or a number of batches, received {save_freq!r}."
            )
        if isinstance(save_freq, int) and save_freq < 1:
            raise InputError(f"save_freq of BackupAndRestore: expected at least 1 batch, received {save_freq}.")
        self.save_freq = save_freq


def as_callbacks(given: Any) -> list[Callback]:
    """Callbacks from one or several callbacks or torch schedulers.

    Raises:
        InputTypeError: something else.
    """
    if given is None:
        return []
    return [as_callback(one) for one in (given if isinstance(given, list | tuple) else [given])]


def as_callback(value: Any) -> Callback:
    """A callback, or a torch scheduler as one.

    Raises:
        InputTypeError: something else.
    """
    if isinstance(value, Callback):
        return value
    if is_scheduler(value):
        return LearningRateScheduler(value)
    raise InputTypeError(
        f"callbacks: expected callbacks of lossledger or torch schedulers; received {type(value).__name__}. "
        "Subclass lossledger.callbacks.Callback."
    )
