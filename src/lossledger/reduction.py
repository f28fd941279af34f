"""Which additive statistic divides: the named reductions, and your own.

With `l` the loss of each entry (the mean of the elements over the class axis), `w` its weight and `m` its mask:

| name | value |
|---|---|
| `sum_over_batch_size`, `mean` | Σ l·w·m / Σ m (Keras 3: weights never divide) |
| `sum` | Σ l·w·m |
| `mean_with_sample_weight` | Σ l·w·m / Σ w·m |
| `none`, `None` | l·w·m, one value an entry |
| `sum_over_all_entries` | Σ l·w·m / number of entries, masked or not (tf.keras 2.0 to 2.9) |
| `sum_over_nonzero_weights` | Σ l·w·m / number of entries with w·m ≠ 0 (TensorFlow 1) |
| `mean_per_sample` | each sample over its own valid entries, then the mean over samples that have any |
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from lossledger.errors import InputError, InputTypeError, UnknownNameError
from lossledger.weighting import Weighting


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """How a loss is divided: an additive statistic of masks, weights and targets, in units of elements.

    It equals its name, so that `loss.reduction == "sum"` reads as in Keras.

    Args:
        name: what `get_config` and the ledger call it.
        statistic: from the weighting of a part, or from its weighting and targets, to what the part adds to the
            divisor: a scalar that adds up over parts, so no `max(1, n)` and no mean. Targets come in the layout of
            the loss, class axis last, and are 0 where they are masked. `None` for a divisor that does not depend on
            the data (a sum). Where the divisor is 0, value and gradient are 0.
        rescale: optional factor on each entry, `[B, 1…]`, that must depend on the sample alone.

    Example:
        A mean over the samples of a batch, whatever the length of each:

        >>> per_sample = Reduction("per_sample", lambda w: w.shape[0])
        >>> import lossledger as ll
        >>> float(ll.losses.MeanSquaredError(reduction=per_sample)([[0.0, 0.0]], [[1.0, 3.0]]))
        10.0

        The sum over the elements, divided by the number of entries that have an object:

        >>> per_object = Reduction("per_object", lambda w, y_true: y_true.amax(-1).sum())
        >>> boxes, found = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 2.0], [0.0, 1.0]]
        >>> float(ll.losses.MeanSquaredError(reduction=per_object)(boxes, found))          # (1 + 4 + 0) / 2
        2.5
    """

    name: str
    statistic: Callable[[Weighting], Tensor | int] | Callable[[Weighting, Tensor], Tensor | int] | None
    rescale: Callable[[Weighting], Tensor] | None = None
    reads_targets: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once, not in each step.
        object.__setattr__(self, "reads_targets", self.statistic is not None and _takes_two(self.statistic, self.name))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Reduction):
            return (self.name, self.statistic, self.rescale) == (other.name, other.statistic, other.rescale)
        return self.name == other

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        # A named reduction is one object: a copy must be recognised as it, in another process too.
        if _REDUCTIONS.get(self.name) is self:
            return get, (self.name,)
        return Reduction, (self.name, self.statistic, self.rescale)

    def divisor(self, weighting: Weighting, y_true: Tensor | None) -> Tensor | int | None:
        """What a part of the data adds to the divisor; `None` for a divisor that does not depend on the data.

        Args:
            weighting: masks and weights of the part.
            y_true: its targets, in the layout of the loss, for a statistic that `reads_targets`.
        """
        statistic: Any = self.statistic
        if statistic is None:
            return None
        added: Tensor | int = statistic(weighting, y_true) if self.reads_targets else statistic(weighting)
        return added


def _takes_two(statistic: Any, name: str) -> bool:
    """Whether a statistic reads weighting and targets, or the weighting alone.

    Raises:
        InputTypeError: no function of one argument or two.
    """
    if callable(statistic):
        parameters = inspect.signature(statistic)
        for arguments in (2, 1):
            with contextlib.suppress(TypeError):
                parameters.bind(*range(arguments))
                return arguments == 2
    raise InputTypeError(
        f"Reduction {name!r}: statistic must be a function of the weighting, or of the weighting and the targets; "
        f"received {statistic!r}. Write lambda weighting, y_true: …"
    )


def _valid_entries(weighting: Weighting) -> Tensor:
    """Number of unmasked elements of each sample, `[B]`."""
    assert weighting.mask is not None
    per_sample = weighting.mask.flatten(1).sum(1)
    size = weighting.mask[0].numel() if weighting.mask.shape[0] else 1
    return per_sample * (prod(weighting.shape[1:]) // size)


def _samples(weighting: Weighting) -> Tensor | int:
    if weighting.mask is None:
        return weighting.shape[0]
    return (_valid_entries(weighting) > 0).sum()


def _inverse_valid(weighting: Weighting) -> Tensor:
    """1 / number of valid elements of the sample, `[B, 1…]`; 0 for a sample without any."""
    shape = (-1, *(1,) * (len(weighting.shape) - 1))
    if weighting.mask is None:
        return torch.full((1,), 1.0 / prod(weighting.shape[1:]), dtype=torch.float64).reshape(shape)
    valid = _valid_entries(weighting).double()
    return (valid > 0).double().div(valid.clamp(min=1)).reshape(shape)


def _all_entries(weighting: Weighting) -> Tensor | int:
    return weighting.total_of(None)


def _nonzero(weighting: Weighting) -> Tensor | int:
    product = weighting.product
    return weighting.total_of(None if product is None else product != 0)


MEAN = Reduction("sum_over_batch_size", Weighting.count)
NONE = Reduction("none", None)

_REDUCTIONS = {
    r.name: r
    for r in (
        MEAN,
        Reduction("sum", None),
        Reduction("mean_with_sample_weight", Weighting.total_weight),
        NONE,
        Reduction("sum_over_all_entries", _all_entries),
        Reduction("sum_over_nonzero_weights", _nonzero),
        Reduction("mean_per_sample", _samples, _inverse_valid),
    )
}

NAMES = ("mean", *_REDUCTIONS)


def get(reduction: str | Reduction | None) -> Reduction:
    """The reduction of a name; a `Reduction` is returned as it is.

    Raises:
        UnknownNameError: a name that is no reduction.

    Example:
        >>> get("mean").name
        'sum_over_batch_size'
    """
    if isinstance(reduction, Reduction):
        return reduction
    if reduction is None:
        return NONE
    name = "sum_over_batch_size" if reduction == "mean" else reduction
    if not isinstance(name, str) or name not in _REDUCTIONS:
        raise UnknownNameError("reduction", reduction, NAMES, keras="Invalid value for argument `reduction`")
    return _REDUCTIONS[name]


def divides(reduction: Reduction, where: str) -> Reduction:
    """The reduction, if it gives one number.

    Raises:
        InputError: `none` keeps one value an entry, and nothing can be summed or trained with it.
    """
    if reduction is NONE:
        raise InputError(
            f"{where}: reduction 'none' gives one value per entry; a tally, an objective or fit needs one number. "
            "Choose 'sum_over_batch_size', 'sum' or another reduction that divides."
        )
    return reduction
