"""tf_keras and tf.keras: weights are expanded to the losses, and nothing guards a mask without valid entries.

`loss` is tf.keras 2.10 and later; with `divide_by_all` it is tf.keras 2.0 to 2.9 (and Keras 2.3), where masked entries
stay in the divisor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossledger.conventions import elements
from lossledger.conventions.common import (
    FrameworkError,
    NotSupported,
    Reduced,
    call,
    find,
    key,
    optional,
    scalar,
    tensor,
)

MEANS = ("auto", "sum_over_batch_size")
REDUCTIONS = (*MEANS, "sum", "none")


def align_targets(y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Drops a last axis of length 1 that only one of them has."""
    if p.ndim == y.ndim + 1 and p.shape[-1] == 1:
        return y, p.squeeze(-1)
    if y.ndim == p.ndim + 1 and y.shape[-1] == 1:
        return y.squeeze(-1), p
    return y, p


def align_weight(weight: Tensor, values: Tensor) -> Tensor:
    """A weight of one axis less is expanded, of one axis more squeezed."""
    if weight.ndim == 0:
        return weight
    if weight.ndim == values.ndim - 1:
        return weight.unsqueeze(-1)
    if weight.ndim == values.ndim + 1:
        if weight.shape[-1] != 1:
            raise FrameworkError("InvalidArgumentError", f"cannot squeeze an axis of length {weight.shape[-1]}")
        return weight.squeeze(-1)
    return weight


def _times(a: Tensor, b: Tensor) -> Tensor:
    try:
        return a * b
    except RuntimeError as error:
        raise FrameworkError("InvalidArgumentError", str(error)) from None


def reduce(
    losses: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "auto",
    divide_by_all: bool = False,
) -> Reduced:
    """One number from the losses of entries.

    Args:
        losses: the loss of each entry.
        weight: sample weights, aligned by their number of axes.
        mask: which entries count.
        reduction: one of `REDUCTIONS`.
        divide_by_all: tf.keras 2.0 to 2.9, where masked entries stay in the divisor.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[1.0, 4.0, 9.0], [16.0, 25.0, 36.0]])
        >>> float(reduce(losses, torch.tensor([1.0, 10.0])).value * 6)
        784.0
    """
    if reduction not in REDUCTIONS:
        raise FrameworkError("ValueError", f"no reduction {reduction!r}")
    scale = scalar(1.0, losses)
    if mask is not None:
        factor = mask.to(losses.dtype)
        if reduction in MEANS and not divide_by_all:
            scale = scalar(mask.numel(), losses) / factor.sum()
        factor = factor * scale
        weight = factor if weight is None else _times(align_weight(weight, factor), factor)
    if weight is not None:
        losses = _times(losses, align_weight(weight, losses))
    return _divided(losses, reduction, scale)


def _divided(losses: Tensor, reduction: str, scale: Tensor) -> Reduced:
    """The reduction of weighted losses, whose mask made them `scale` times too large."""
    if reduction == "none":
        return Reduced(losses)
    total = losses.sum()
    if reduction == "sum":
        return Reduced(total, total, scalar(1.0, total))
    count = scalar(losses.numel(), total)
    value = total / count if losses.numel() else torch.zeros_like(total)
    return Reduced(value, torch.nan_to_num(total / scale, nan=0.0), count / scale)


def entries(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any) -> tuple[Tensor, Tensor | None]:
    """The losses of entries, and the mask that the loss itself makes."""
    y, p = align_targets(tensor(y_true), tensor(y_pred))
    function = find(elements.FUNCTIONS, name, "tf_keras")
    if key(name) in elements.ONLY_KERAS3:
        raise NotSupported(f"tf_keras has no loss {name!r}")
    if "axis" in options and name == "SparseCategoricalCrossentropy":
        raise FrameworkError("TypeError", "the class takes no axis")
    if p.ndim == 0:
        raise FrameworkError("InvalidArgumentError", "an output without axes")
    try:
        found = call(function, y, p, elements.TF_KERAS, options=options, where=name)
    except RuntimeError as error:
        raise FrameworkError("InvalidArgumentError", str(error)) from None
    return found if isinstance(found, tuple) else (found, None)


def loss(
    name: str,
    options: Mapping[str, Any],
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    mask: Any = None,
    divide_by_all: bool = False,
) -> Reduced:
    """A loss of tf_keras on a batch.

    Example:
        >>> mask = [[1, 1, 0]]
        >>> y_true, y_pred = [[[0.0]] * 3], [[[1.0], [3.0], [9.0]]]
        >>> float(loss("mse", {}, y_true, y_pred, mask=mask).value)
        5.0
        >>> round(float(loss("mse", {}, y_true, y_pred, mask=mask, divide_by_all=True).value), 4)
        3.3333
    """
    rest = {k: v for k, v in options.items() if k not in ("reduction", "name")}
    losses, own = entries(name, rest, y_true, y_pred)
    given = None if mask is None else torch.as_tensor(mask).bool()
    both = own if given is None else given if own is None else _times(given, own)
    return reduce(losses, optional(sample_weight), both, options.get("reduction", "auto"), divide_by_all)
