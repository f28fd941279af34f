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

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lossledger.errors import InputError, UnknownNameError
from lossledger.weighting import Weighting


@dataclass(frozen=True, slots=True)
class Reduction:
    """How a loss is divided: an additive statistic of masks and weights, in units of elements.

    Args:
        name: what `get_config` and the ledger call it.
        statistic: from the weighting of a part to what the part adds to the divisor (a scalar, additive over parts);
            `None` for a divisor that does not depend on the data (a sum).
        rescale: optional factor on each entry, `[B, 1…]`, that must depend on the sample alone.

    Example:
        A mean over the samples of a batch, whatever the length of each:

        >>> per_sample = Reduction("per_sample", lambda w: w.shape[0])
        >>> import lossledger as ll
        >>> float(ll.losses.MeanSquaredError(reduction=per_sample)([[0.0, 0.0]], [[1.0, 3.0]]))
        10.0
    """

    name: str
    statistic: Callable[[Weighting], Tensor | int] | None
    rescale: Callable[[Weighting], Tensor] | None = None


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
        Reduction("sum_over_all_entries", lambda weighting: weighting.total_of(None)),
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
        raise UnknownNameError("reduction", reduction, NAMES)
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
