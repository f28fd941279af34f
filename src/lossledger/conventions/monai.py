"""MONAI: overlap of each sample and channel with 1e-5 above and below, then the mean over both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions.common import NotSupported, call, key, optional, plain_mean
from lossledger.conventions.images import channels_first, one_hot, space


def _activated(p: Tensor, sigmoid: bool, softmax: bool) -> Tensor:
    if sigmoid:
        p = p.sigmoid()
    return p.softmax(1) if softmax and p.shape[1] > 1 else p


def _foreground(y: Tensor, p: Tensor, include_background: bool) -> tuple[Tensor, Tensor]:
    return (y, p) if include_background or p.shape[1] == 1 else (y[:, 1:], p[:, 1:])


def _weighed(losses: Tensor, weight: Tensor | None) -> Tensor:
    """Class weights multiply; they do not divide."""
    return losses if weight is None else losses * weight


def dice(
    y: Tensor,
    p: Tensor,
    weight: Tensor | None,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
) -> Tensor:
    """`DiceLoss`; `jaccard=True` puts the union into the divisor."""
    y, p = _foreground(y, _activated(p, sigmoid, softmax), include_background)
    axes = [0, *space(p)] if batch else space(p)
    both = (y * p).sum(axes)
    size = (y.square() + p.square()).sum(axes) if squared_pred else (y + p).sum(axes)
    size = 2 * (size - both) if jaccard else size
    losses = 1 - (2 * both + smooth_nr) / (size + smooth_dr)
    return plain_mean(_weighed(losses, weight), reduction)


def tversky(
    y: Tensor,
    p: Tensor,
    weight: Tensor | None,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    alpha: float = 0.5,
    beta: float = 0.5,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
) -> Tensor:
    """`TverskyLoss`: α multiplies false positives, β false negatives."""
    y, p = _foreground(y, _activated(p, sigmoid, softmax), include_background)
    axes = [0, *space(p)] if batch else space(p)
    true, extra, missed = (y * p).sum(axes), ((1 - y) * p).sum(axes), (y * (1 - p)).sum(axes)
    losses = 1 - (true + smooth_nr) / (true + alpha * extra + beta * missed + smooth_dr)
    return plain_mean(_weighed(losses, weight), reduction)


def generalized_dice(
    y: Tensor,
    p: Tensor,
    weight: Tensor | None,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    w_type: str = "square",
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
) -> Tensor:
    """`GeneralizedDiceLoss`: a class weighs 1 / volume², an absent one as much as the largest finite weight."""
    y, p = _foreground(y, _activated(p, sigmoid, softmax), include_background)
    axes = [0, *space(p)] if batch else space(p)
    truth, both = y.sum(axes), (y * p).sum(axes)
    power = {"square": 2, "simple": 1, "uniform": 0}[w_type]
    w = truth.pow(-power)
    finite = torch.where(w.isinf(), torch.zeros_like(w), w)
    w = torch.where(w.isinf(), finite.amax(-1, keepdim=True).expand_as(w), w)
    losses = 1 - (2 * (both * w).sum(-1) + smooth_nr) / (((truth + p.sum(axes)) * w).sum(-1) + smooth_dr)
    return plain_mean(losses, reduction)


def focal(
    y: Tensor,
    p: Tensor,
    weight: Tensor | None,
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    gamma: float = 2.0,
    alpha: float | None = None,
    use_softmax: bool = False,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> Tensor:
    """`FocalLoss` of logits: `sum` averages over space first; with `ignore_index` pixels divide, not elements."""
    kept = None if ignore_index is None else (y.sum(1, keepdim=True) > 0 if y.shape[1] > 1 else y != ignore_index)
    y, p = _foreground(y if kept is None else y * kept, p, include_background)
    if use_softmax and p.shape[1] > 1:
        losses = _focal_softmax(y, p, gamma, alpha, include_background)
    else:
        cross = F.binary_cross_entropy_with_logits(p, y, reduction="none")
        losses = (1 - (p.sigmoid() * y + (1 - p.sigmoid()) * (1 - y))) ** gamma * cross
        losses = losses if alpha is None else losses * (y * alpha + (1 - y) * (1 - alpha))
    if weight is not None:
        losses = losses * weight.reshape(-1, *(1,) * (losses.ndim - 2))
    losses = losses if kept is None else losses * kept
    if reduction == "sum":
        return losses.mean(space(losses)).sum()
    if reduction == "mean" and kept is not None:
        return losses.sum() / kept.sum().clamp(min=1)
    return plain_mean(losses, reduction)


def _focal_softmax(y: Tensor, p: Tensor, gamma: float, alpha: float | None, background: bool) -> Tensor:
    logs = F.log_softmax(p, 1)
    losses = -((1 - logs.exp()) ** gamma) * logs * y
    if alpha is None:
        return losses
    factors = torch.full((p.shape[1],), alpha)
    if background:
        factors[0] = 1 - alpha
    return losses * factors.reshape(-1, *(1,) * (p.ndim - 2))


def dice_ce(
    y: Tensor,
    p: Tensor,
    weight: Tensor | None,
    *,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """`DiceCELoss`: the sum of both on logits."""
    if p.shape[1] == 1:
        cross = F.binary_cross_entropy_with_logits(p, y)
    elif options.get("to_onehot_y"):
        cross = F.cross_entropy(p, y.argmax(1), weight=weight, label_smoothing=label_smoothing)
    else:
        cross = F.cross_entropy(p, y, weight=weight, label_smoothing=label_smoothing)
    return lambda_dice * dice(y, p, weight, **options) + lambda_ce * cross


def dice_focal(
    y: Tensor,
    p: Tensor,
    weight: Tensor | None,
    *,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    gamma: float = 2.0,
    alpha: float | None = None,
    **options: Any,
) -> Tensor:
    """`DiceFocalLoss`: the sum of both on logits."""
    both = {k: v for k, v in options.items() if k in ("include_background", "reduction")}
    part = focal(y, p, weight, gamma=gamma, alpha=alpha, use_softmax=bool(options.get("softmax")), **both)
    return lambda_dice * dice(y, p, weight, **options) + lambda_focal * part


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "diceloss": dice,
    "tverskyloss": tversky,
    "generalizeddiceloss": generalized_dice,
    "focalloss": focal,
    "diceceloss": dice_ce,
    "dicefocalloss": dice_focal,
}


def loss(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any, class_weight: Any = None) -> Tensor:
    """A loss of MONAI.

    Example:
        >>> round(float(loss("DiceLoss", {}, [[1.0, 0.0]], [[0.8, 0.4]])), 4)
        0.2727
    """
    if key(name) not in FUNCTIONS:
        raise NotSupported(f"monai: no loss {name!r}")
    function, p = FUNCTIONS[key(name)], channels_first(y_pred)
    y, weight = one_hot(y_true, p), optional(options.get("weight", class_weight))
    rest = {k: v for k, v in options.items() if k != "weight"}
    if "Dice" in name and key(name) in ("diceceloss", "dicefocalloss"):
        result: Tensor = function(y, p, weight, **rest)
    else:
        result = call(function, y, p, weight, options=rest, where=f"monai {name}")
    return result
