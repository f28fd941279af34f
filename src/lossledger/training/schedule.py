"""Learning rates over the epochs: functions and torch schedulers, as a callback."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch

from lossledger.errors import InputError, InputTypeError
from lossledger.training.callback import Callback, Logs, monitored
from lossledger.values import is_number


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
        optimizer = getattr(self._scheduler, "optimizer", self.model.optimizer)
        if optimizer is not self.model.optimizer:
            raise InputError(
                f"callbacks: {type(self._scheduler).__name__} has another optimizer than this model, and would not "
                f"change its rates; expected the {type(self.model.optimizer).__name__} of compile. Make the scheduler "
                "of model.optimizer after compile, or pass its class to LearningRateScheduler."
            )

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

    def state_dict(self) -> dict[str, Any]:
        """The state of the torch scheduler; a function has none, since the optimizer keeps the rate."""
        return {"scheduler": None if self._scheduler is None else self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the torch scheduler."""
        if state["scheduler"] is None:
            return
        if self._scheduler is None:
            self._scheduler = self.schedule(self.model.optimizer)
        # Steps were taken before the scheduler's first one, by the process that was interrupted; torch would warn.
        self.model.optimizer._opt_called = True  # type: ignore[attr-defined]
        self._scheduler.load_state_dict(state["scheduler"])

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Step the torch scheduler."""
        if self._scheduler is None:
            return
        if not isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step()
            return
        value = monitored(self.monitor, logs, self.params, type(self).__name__)
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
