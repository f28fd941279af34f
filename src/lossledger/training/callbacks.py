"""Callbacks with Keras's names and hooks. Epochs and batches are counted from 0 here, as in Keras."""

from __future__ import annotations

import csv
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from lossledger.errors import InputError, InputTypeError, UnknownNameError

if TYPE_CHECKING:
    from lossledger.training.model import Model

Logs = Mapping[str, float]


class Callback:
    """Base of the callbacks; override the hooks you need.

    `logs` are numbers by name. In batch hooks they are read from the device only when you look at them.
    Set `self.model.stop_training = True` to end training after the epoch.
    """

    model: Model

    def set_model(self, model: Model) -> None:
        """Called before training with the model that trains."""
        self.model = model

    def on_train_begin(self, logs: Logs) -> None:
        """Before the first epoch."""

    def on_train_end(self, logs: Logs) -> None:
        """After the last epoch."""

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        """Before an epoch."""

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """After an epoch, with its numbers and those of the validation."""

    def on_train_batch_begin(self, batch: int, logs: Logs) -> None:
        """Before a step."""

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """After a step, with the epoch so far."""


def overrides(callback: Callback, hook: str) -> bool:
    """Whether a callback has its own version of a hook: steps dispatch to nobody else."""
    return hook in vars(callback) or getattr(type(callback), hook) is not getattr(Callback, hook)


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
        # A loss or an error gets better when it falls; anything else when it rises.
        falls = monitor.endswith(("loss", "error", "mae", "mse", "rmse"))
        self.sign = 1.0 if mode == "min" or (mode == "auto" and falls) else -1.0
        self.min_delta = abs(min_delta)
        self.best = math.inf

    def read(self, logs: Logs) -> float:
        if self.name not in logs:
            raise UnknownNameError(f"number to monitor in {self.who}", self.name, logs)
        return logs[self.name]

    def improved(self, value: float) -> bool:
        if self.sign * value < self.best - self.min_delta:
            self.best = self.sign * value
            return True
        return False


class EarlyStopping(Callback):
    """Stop when a number has not got better for some epochs.

    Args:
        monitor: name of the number.
        min_delta: smallest change that counts.
        patience: epochs without an improvement before training stops.
        mode: `"min"`, `"max"`, or `"auto"` (losses and errors fall, everything else rises).
        baseline: a value to beat from the start.
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
        if self.baseline is not None:
            self._monitor.best = self._monitor.sign * self.baseline
        self.stopped_epoch = self.best_epoch = None
        self._wait = 0
        self._best_weights: dict[str, torch.Tensor] | None = None

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Compare with the best so far."""
        value = self._monitor.read(logs)
        if epoch < self.start_from_epoch:
            return
        if self._monitor.improved(value):
            self._wait, self.best_epoch = 0, epoch
            if self.restore_best_weights:
                self._best_weights = {k: v.detach().clone() for k, v in self.model.net.state_dict().items()}
            return
        self._wait += 1
        if self._wait >= self.patience:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def on_train_end(self, logs: Logs) -> None:
        """Put the best weights back, if asked to."""
        if self._best_weights is not None:
            self.model.net.load_state_dict(self._best_weights)


class ModelCheckpoint(Callback):
    """Save the weights after epochs.

    Args:
        filepath: path of the safetensors file; may use `{epoch:02d}` (from 1) and numbers of the logs.
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

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Save, if due."""
        if self.save_best_only and not self._monitor.improved(self._monitor.read(logs)):
            return
        try:
            path = self.filepath.format(epoch=epoch + 1, **logs)
        except KeyError as error:
            raise UnknownNameError("number in filepath of ModelCheckpoint", error.args[0], ["epoch", *logs]) from None
        self.model.save_weights(path)


class LearningRateScheduler(Callback):
    """Set the learning rate from a function or a torch scheduler.

    Args:
        schedule: `fn(epoch, lr) -> lr`, called before each epoch; or a torch scheduler (or a function of the
            optimizer that makes one), stepped after each epoch. A plateau scheduler is stepped with `monitor`.
        monitor: number that a plateau scheduler watches.
    """

    def __init__(self, schedule: Any, monitor: str = "val_loss") -> None:
        self.schedule = schedule
        self.monitor = monitor
        self._scheduler: Any = schedule if is_scheduler(schedule) else None
        if self._scheduler is None and not callable(schedule):
            raise InputTypeError(
                f"LearningRateScheduler: expected fn(epoch, lr) or a torch scheduler; received {schedule!r}."
            )

    def on_train_begin(self, logs: Logs) -> None:
        """Make the scheduler, when a function of the optimizer was given."""
        if self._scheduler is None and _arguments(self.schedule) == 1:
            self._scheduler = self.schedule(self.model.optimizer)
            if not is_scheduler(self._scheduler):
                raise InputTypeError("LearningRateScheduler: a function of one argument must return a torch scheduler.")

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        """Set the rate of the epoch."""
        if self._scheduler is not None:
            return
        for group in self.model.optimizer.param_groups:
            rate = self.schedule(epoch, float(group["lr"]))
            if not isinstance(rate, int | float) or not rate >= 0:
                raise InputError(f"LearningRateScheduler: the schedule must return a rate >= 0; received {rate!r}.")
            group["lr"] = float(rate)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Step the torch scheduler."""
        if self._scheduler is None:
            return
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if self.monitor not in logs:
                raise UnknownNameError("number to monitor in LearningRateScheduler", self.monitor, logs)
            self._scheduler.step(logs[self.monitor])
        else:
            self._scheduler.step()


def is_scheduler(value: Any) -> bool:
    """Whether the value is a scheduler of torch."""
    return isinstance(value, torch.optim.lr_scheduler.LRScheduler)


def _arguments(fn: Any) -> int:
    """Number of positional arguments that must be given."""
    kinds = inspect.signature(fn).parameters.values()
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in kinds)


class CSVLogger(Callback):
    """Write the numbers of each epoch to a CSV file.

    Args:
        filename: path.
        separator: between columns.
        append: continue an existing file; its columns must be the same.
    """

    def __init__(self, filename: str | Path, separator: str = ",", append: bool = False) -> None:
        self.filename = Path(filename)
        self.separator = separator
        self.append = append
        self._file: TextIO | None = None
        self._columns: list[str] | None = None

    def on_train_begin(self, logs: Logs) -> None:
        """Open the file."""
        self._columns = None
        if self.append and self.filename.exists():
            with self.filename.open(newline="") as existing:
                self._columns = next(csv.reader(existing, delimiter=self.separator), None)
        self._file = self.filename.open("a" if self.append else "w", newline="")

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Write one line."""
        assert self._file is not None
        writer = csv.writer(self._file, delimiter=self.separator)
        columns = ["epoch", *logs]
        if self._columns is None:
            self._columns = columns
            writer.writerow(columns)
        unknown = [c for c in columns if c not in self._columns]
        if unknown:
            raise UnknownNameError(f"column of {self.filename}", unknown[0], self._columns)
        values = {"epoch": epoch, **logs}
        writer.writerow([values.get(column, "") for column in self._columns])
        self._file.flush()

    def on_train_end(self, logs: Logs) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


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
