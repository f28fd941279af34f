"""Keras 3: a mask becomes weights that keep the mean over valid entries, weights never divide.

The default backend is torch, whose weights are scaled in place; `jax` and `tensorflow` differ where it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossledger.conventions import elements
from lossledger.conventions.common import FrameworkError, NotSupported, Reduced, call, find, optional, scalar, tensor

MEANS = ("mean", "sum_over_batch_size")
REDUCTIONS = (*MEANS, "sum", "mean_with_sample_weight", "none", None)
DIALECTS = {"torch": elements.KERAS3, "jax": elements.KERAS3_JAX, "tensorflow": elements.KERAS3_TENSORFLOW}
_ALIGN_THEMSELVES = ("squared", "absolute", "huber", "cosh", "cosine", "mse", "mae", "mape", "msle")


def align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Brings ranks that differ by one together, where the longer shape ends in 1."""
    if a.ndim == b.ndim + 1 and a.shape[-1] == 1:
        return (a, b.unsqueeze(-1)) if b.ndim == 1 else (a.squeeze(-1), b)
    if b.ndim == a.ndim + 1:
        b, a = align(b, a)
    return a, b


def _no_nan(total: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, torch.zeros_like(total), total / divisor)


def _masked_weight(weight: Tensor | None, factor: Tensor, in_place: bool) -> Tensor:
    if weight is None:
        return factor
    factor, weight = align(factor, weight)
    product = weight * factor
    if in_place and product.shape != weight.shape:
        raise FrameworkError("RuntimeError", f"output with shape {list(weight.shape)} does not match the broadcast")
    return product


def reduce(
    losses: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str | None = "sum_over_batch_size",
    mask_epsilon: float | None = None,
    in_place: bool = True,
) -> Reduced:
    """One number from the losses of entries.

    Args:
        losses: the loss of each entry.
        weight: sample weights as given, not expanded to the losses.
        mask: which entries count.
        reduction: one of `REDUCTIONS`.
        mask_epsilon: Keras 3.0 to 3.12 add 1e-7 to the number of valid entries; later versions guard 0/0.
        in_place: the torch backend multiplies the weights in place, so that they cannot grow.

    Example:
        >>> float(reduce(torch.tensor([1.0, 4.0, 25.0]), mask=torch.tensor([1, 1, 0])).value)
        2.5
    """
    if reduction not in REDUCTIONS:
        raise FrameworkError("ValueError", f"no reduction {reduction!r}")
    scale = torch.ones((), dtype=losses.dtype)
    if mask is not None:
        factor = mask.to(losses.dtype)
        if reduction in MEANS:
            total, valid = scalar(mask.numel(), losses), factor.sum()
            scale = _no_nan(total, valid) if mask_epsilon is None else total / (valid + mask_epsilon)
        weight = _masked_weight(weight, factor * scale, in_place)
    if weight is not None:
        losses, weight = align(losses, weight)
        losses = losses * weight
    return _divided(losses, weight, reduction, scale)


def _divided(losses: Tensor, weight: Tensor | None, reduction: str | None, scale: Tensor) -> Reduced:
    """The reduction of weighted losses, whose mask made them `scale` times too large."""
    if reduction in ("none", None) or tuple(losses.shape) in ((), (0,)):
        return Reduced(losses)
    total = losses.sum()
    if reduction == "sum":
        return Reduced(total, total, scalar(1.0, total))
    weighted = reduction == "mean_with_sample_weight" and weight is not None
    divisor = weight.sum() if weighted and weight is not None else scalar(losses.numel(), total)
    return Reduced(_no_nan(total, divisor), _no_nan(total, scale), _no_nan(divisor, scale))


def _custom(name: str, y: Tensor, p: Tensor) -> Tensor:
    """Functions that users write: squared errors, averaged over the batch to a scalar or not at all."""
    if "**2" not in name.replace(" ", ""):
        raise NotSupported(f"keras3: no custom loss {name!r}")
    squares = (y - p) ** 2
    return squares.mean() if "scalar" in name or "mean(" in name else squares


def entries(
    name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any, dialect: elements.Dialect = elements.KERAS3
) -> tuple[Tensor, Tensor | None]:
    """The losses of entries as the classes give them, and the mask that the loss itself makes."""
    y, p = align(tensor(y_true), tensor(y_pred))
    if name.startswith("custom"):
        return _custom(name, y, p), None
    function = find(elements.FUNCTIONS, name, "keras3")
    found = call(function, y, p, dialect, options=options, where=name)
    return found if isinstance(found, tuple) else (found, None)


def function(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any, backend: str = "torch") -> Tensor:
    """A bare function: no reduction, and only some align their arguments."""
    y, p = tensor(y_true), tensor(y_pred)
    if any(word in name for word in _ALIGN_THEMSELVES) and "hinge" not in name:
        y, p = align(y, p)
    found = call(find(elements.FUNCTIONS, name, "keras3"), y, p, DIALECTS[backend], options=options, where=name)
    losses: Tensor = found[0] if isinstance(found, tuple) else found
    return losses


def loss(
    name: str,
    options: Mapping[str, Any],
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    mask: Any = None,
    mask_epsilon: float | None = None,
    backend: str = "torch",
) -> Reduced:
    """A loss of Keras 3 on a batch.

    Example:
        >>> float(loss("MeanSquaredError", {}, [[0.0], [0.0]], [[1.0], [3.0]], [1.0, 3.0]).value)
        14.0
    """
    rest = {k: v for k, v in options.items() if k not in ("reduction", "name", "dtype")}
    losses, own = entries(name, rest, y_true, y_pred, DIALECTS[backend])
    given = None if mask is None else torch.as_tensor(mask).bool()
    both = own if given is None else given if own is None else given & own
    reduction = options.get("reduction", "sum_over_batch_size")
    return reduce(losses, optional(sample_weight), both, reduction, mask_epsilon, backend == "torch")
