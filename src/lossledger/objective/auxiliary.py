"""Losses that the model brings itself: returned beside its outputs, or added from inside a forward."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lossledger.errors import InputError
from lossledger.tally import Tally
from lossledger.values import not_finite


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model returns when it has losses of its own beside its outputs.

    Args:
        outputs: the outputs, as the model would return them alone.
        losses: auxiliary losses by name, a scalar or one value a sample, `[B]`, each; `loss_weights` may weigh them.

    Example:
        >>> import torch
        >>> sorted(Outputs(torch.zeros(2, 1), {"kl": torch.ones(2)}).losses)
        ['kl']
    """

    outputs: Any
    losses: Mapping[str, Tensor] = field(default_factory=dict)


def unpacked(outputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """The outputs of a model, and the auxiliary losses that it returned with them."""
    return (outputs.outputs, dict(outputs.losses)) if isinstance(outputs, Outputs) else (outputs, {})


def with_added(outputs: Any, added: Mapping[str, Tensor]) -> Outputs:
    """The outputs of a model together with the losses that its modules added."""
    alone, returned = unpacked(outputs)
    return Outputs(alone, {**returned, **added})


_collector: contextvars.ContextVar[dict[str, Tensor] | None] = contextvars.ContextVar("auxiliary", default=None)


def add_loss(name: str, value: Tensor) -> None:
    """Add an auxiliary loss from inside a module's forward; it becomes a term of that name.

    Outside of lossledger's training and evaluation the call does nothing, so the module works anywhere.

    Args:
        name: name of the term.
        value: a scalar, or one value a sample, `[B]` (then its mean is exact for every split of the data).

    Raises:
        InputError: the name was already used in this forward.
    """
    found = _collector.get()
    if found is None:
        return
    if name in found:
        raise InputError(f"add_loss: the name {name!r} was already used in this forward; each term needs its own.")
    found[name] = value


class collecting:
    """Collects what `add_loss` is given while a model runs."""

    __slots__ = ("_token",)

    def __enter__(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        self._token = _collector.set(found)
        return found

    def __exit__(self, *error: object) -> None:
        _collector.reset(self._token)


def auxiliary_tally(name: str, value: Tensor, samples: int) -> Tally:
    """The tally of an auxiliary loss: the mean of one value a sample, or a scalar that counts for its samples.

    Raises:
        InputError: another shape.
    """
    if not isinstance(value, Tensor) or value.ndim > 1 or (value.ndim == 1 and value.shape[0] != samples):
        received = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"auxiliary loss {name!r}: expected a scalar tensor or one value a sample, ({samples},); received "
            f"{received}. Reduce it over all axes but the batch."
        )
    numerator = value.sum() if value.ndim else value * samples
    return Tally(numerator, samples, samples, samples, nonfinite=not_finite(value.detach()).sum(), shown=samples)
