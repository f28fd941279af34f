"""Keras up to 2.2: the mask and the weights each divide by their own share, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossledger.conventions import elements
from lossledger.conventions.common import NotSupported, Reduced, call, find, key, optional, tensor

DTYPE = torch.float64
_MISSING = ("huber", "focal", "generalized")


def reduce(
    losses: Tensor, weight: Tensor | None = None, mask: Tensor | None = None, mask_epsilon: float = 0.0
) -> Reduced:
    """One number from the losses of entries.

    Args:
        losses: the loss of each entry.
        weight: one a sample, or one a time step; ones if not given.
        mask: which entries count.
        mask_epsilon: what Keras 2.2.5 adds to the mean of the mask.

    Example:
        A sample of weight 0 leaves the divisor:

        >>> import torch
        >>> float(reduce(torch.tensor([1.0, 25.0]), torch.tensor([0.0, 10.0])).value)
        250.0
    """
    weight = torch.ones(losses.shape[:1], dtype=losses.dtype) if weight is None else weight
    total = losses if mask is None else losses * mask
    kept = torch.ones((), dtype=losses.dtype) if mask is None else mask.to(losses.dtype).mean() + mask_epsilon
    total = total.flatten(weight.ndim).mean(-1) if total.ndim > weight.ndim else total
    total = total * weight
    share = (weight != 0).to(losses.dtype).mean()
    numerator = total.mean() * losses.numel()
    return Reduced(((total / kept) / share).mean(), numerator, losses.numel() * kept * share)


def entries(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any) -> Tensor:
    """The losses of entries; the classic has functions only, without options."""
    function = find(elements.FUNCTIONS, name, "keras_classic")
    if key(name) in elements.ONLY_KERAS3 or any(word in key(name) for word in _MISSING):
        raise NotSupported(f"Keras 2.2 has no loss {name!r}")
    found = call(function, tensor(y_true, DTYPE), tensor(y_pred, DTYPE), elements.CLASSIC, options=options, where=name)
    if isinstance(found, tuple):
        raise NotSupported("Keras 2.2 has no ignore_class")
    losses: Tensor = found
    return losses


def loss(
    name: str,
    options: Mapping[str, Any],
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    mask: Any = None,
    mask_epsilon: float = 0.0,
) -> Reduced:
    """A loss of Keras up to 2.2.4 on a batch, or of 2.2.5 with `mask_epsilon=1e-7`.

    Example:
        >>> float(loss("mse", {}, [[0.0], [0.0]], [[1.0], [5.0]], [0.0, 10.0]).value)
        250.0
    """
    losses = entries(name, options, y_true, y_pred)
    return reduce(losses, optional(sample_weight, DTYPE), optional(mask, DTYPE), mask_epsilon)
