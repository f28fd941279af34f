"""Callbacks with Keras's names and hooks. Epochs and batches are counted from 0 here, as in Keras."""

from __future__ import annotations

import csv
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

import torch

from lossledger.errors import InputError, InputTypeError, UnknownNameError
from lossledger.weighting import is_number

if TYPE_CHECKING:
    from lossledger.training.model import Model

Logs = Mapping[str, float]


class Callback:
    """Base of the callbacks; override the hooks you need.

    `logs` are numbers by name. In batch hooks they are read from the device only when you look at them.
    Set `self.model.stop_training = True` to end training after the epoch.
    """

    model: Model
    params: Mapping[str, Any] = MappingProxyType({})

    def set_model(self, model: Model) -> None:
        """Called before training with the model that trains."""
        self.model = model

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Called before training with `epochs`, `steps`, `seed`, and `validation`: whether some epochs end with one."""
        self.params = params

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


def awaited(logs: Logs, params: Mapping[str, Any]) -> list[str]:
    """The numbers of the validation that the logs of an epoch lack because it had none (`validation_freq`)."""
    if not params.get("validation") or any(name.startswith("val_") for name in logs):
        return []
    return [f"val_{name}" for name in logs]


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

    def read(self, logs: Logs, params: Mapping[str, Any]) -> float | None:
        """The number, or `None` in an epoch without the validation that makes it."""
        return _monitored(self.name, logs, params, self.who)

    def improved(self, value: float) -> bool:
        if self.sign * value < self.best - self.min_delta:
            self.best = self.sign * value
            return True
        return False


def _monitored(name: str, logs: Logs, params: Mapping[str, Any], who: str) -> float | None:
    if name in logs:
        return logs[name]
    later = awaited(logs, params)
    if name in later:
        return None
    raise UnknownNameError(f"number to monitor in {who}", name, [*logs, *later])


class EarlyStopping(Callback):
    """Stop when a number has not got better for some epochs.

    Args:
        monitor: name of the number; epochs without the validation that makes it are passed over.
        min_delta: smallest change that counts.
        patience: epochs (that have the number) without an improvement before training stops.
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
        value = self._monitor.read(logs, self.params)
        if value is None or epoch < self.start_from_epoch:
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


class LearningRateScheduler(Callback):
    """Set the learning rate from a function or a torch scheduler.

    Args:
        schedule: `fn(epoch, lr) -> lr` or `fn(epoch) -> lr`, called before each epoch; or a torch scheduler (its
            class, or a function of the optimizer that makes one), stepped after each epoch. A plateau scheduler is
            stepped with `monitor`, after the epochs that have it.
        monitor: number that a plateau scheduler watches.
    """

    def __init__(self, schedule: Any, monitor: str = "val_loss") -> None:
        self.schedule = schedule
        self.monitor = monitor
        self._scheduler: Any = schedule if is_scheduler(schedule) else None
        usable = isinstance(schedule, type) or (callable(schedule) and (_takes(schedule, 1) or _takes(schedule, 2)))
        if self._scheduler is None and not usable:
            raise InputTypeError(
                f"LearningRateScheduler: expected fn(epoch, lr), fn(epoch) or a torch scheduler; received {schedule!r}."
            )

    def on_train_begin(self, logs: Logs) -> None:
        """Make the scheduler, when its class was given."""
        made_of = self.schedule.func if isinstance(self.schedule, functools.partial) else self.schedule
        if self._scheduler is None and isinstance(made_of, type) and issubclass(made_of, _SCHEDULER):
            self._scheduler = self.schedule(self.model.optimizer)

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        """Set the rate of the epoch."""
        if self._scheduler is not None:
            return
        groups = self.model.optimizer.param_groups
        try:
            rates = [self._rate(epoch, float(group["lr"])) for group in groups]
        except Exception as error:
            # A function of the optimizer looks like one of the epoch: what it returns tells them apart.
            self._scheduler = self._made(error)
            return
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def _rate(self, epoch: int, before: float) -> float:
        rate = self.schedule(epoch, before) if _takes(self.schedule, 2) else self.schedule(epoch)
        if not is_number(rate) or not 0 <= rate < math.inf:
            raise InputError(f"LearningRateScheduler: the schedule must return a rate >= 0; received {rate!r}.")
        return float(rate)

    def _made(self, error: Exception) -> Any:
        """The scheduler that the function makes of the optimizer; if it makes none, the error of the schedule."""
        try:
            made = self.schedule(self.model.optimizer)
        except Exception:
            raise error from None
        if not is_scheduler(made):
            raise error
        return made

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Step the torch scheduler."""
        if self._scheduler is None:
            return
        if not isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step()
            return
        value = _monitored(self.monitor, logs, self.params, type(self).__name__)
        if value is not None:
            self._scheduler.step(value)


_SCHEDULER = torch.optim.lr_scheduler.LRScheduler


def is_scheduler(value: Any) -> bool:
    """Whether the value is a scheduler of torch."""
    return isinstance(value, _SCHEDULER)


def _takes(fn: Any, count: int) -> bool:
    """Whether so many positional arguments can be passed."""
    try:
        inspect.signature(fn).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        # Functions of C may not tell: Keras's plain form is the one argument.
        return count == 1
    return True


class CSVLogger(Callback):
    """Write the numbers of each epoch to a CSV file; those of the validation are empty in epochs without one.

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
            self._columns = [*columns, *awaited(logs, self.params)]
            writer.writerow(self._columns)
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
