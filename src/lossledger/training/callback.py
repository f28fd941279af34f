"""What every callback is: hooks with Keras's names. Epochs and batches are counted from 0 here, as in Keras."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lossledger.errors import UnknownNameError

if TYPE_CHECKING:
    from lossledger.training.model import Model

Logs = Mapping[str, float]


class LazyLogs(Mapping[str, float]):
    """The numbers so far, read from the device when somebody looks."""

    def __init__(self, read: Callable[[], dict[str, float]]) -> None:
        self._read = read
        self._values: dict[str, float] | None = None

    def _now(self) -> dict[str, float]:
        if self._values is None:
            self._values = self._read()
        return self._values

    def __getitem__(self, name: str) -> float:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())


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
        """Called before training.

        Args:
            params: `epochs`, `steps`, `seed`; `validation`: whether some epochs end with one; `resumed`: whether a run
                goes on, so that what it wrote must stay.
        """
        self.params = params

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep for a run to go on as if it had not stopped: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called in a resumed run, after `on_train_begin`, with what `state_dict` told."""

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


def monitored(name: str, logs: Logs, params: Mapping[str, Any], who: str) -> float | None:
    """A number of the logs, or `None` in an epoch without the validation that makes it.

    Raises:
        UnknownNameError: nothing of that name is logged.
    """
    if name in logs:
        return logs[name]
    later = awaited(logs, params)
    if name in later:
        return None
    raise UnknownNameError(f"number to monitor in {who}", name, [*logs, *later])
