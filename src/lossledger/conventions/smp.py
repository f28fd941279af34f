"""segmentation_models_pytorch: overlap over batch and space, an absent class costs nothing but stays in the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions.common import FrameworkError, NotSupported, call, key, optional, plain_mean, tensor
from lossledger.conventions.images import channels_first, one_hot

MODES = ("binary", "multiclass", "multilabel")


def _flat(y_true: Any, p: Tensor, mode: str, from_logits: bool, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Targets and probabilities `(N, C, pixels)`; ignored pixels are 0 in both."""
    if from_logits:
        p = p.softmax(1) if mode == "multiclass" else p.sigmoid()
    y = one_hot(y_true, p)
    if ignore_index is not None:
        raw = torch.as_tensor(y_true)
        kept = (raw != ignore_index).reshape(p.shape[0], -1, *p.shape[2:]).to(p.dtype)
        y, p = y * kept, p * kept
    channels = 1 if mode == "binary" else p.shape[1]
    return y.reshape(len(p), channels, -1), p.reshape(len(p), channels, -1)


def _over_classes(
    losses: Tensor, y: Tensor, weight: Tensor | None, classes: Sequence[int] | None = None, gamma: float = 1.0
) -> Tensor:
    """The mean over classes, in which absent classes are 0; class weights divide too."""
    losses = losses * (y.sum((0, 2)) > 0)
    if classes is not None:
        losses = losses[list(classes)]
    mean = losses.mean() if weight is None else (losses * weight).sum() / weight.sum()
    return mean**gamma


def _scored(score: Tensor, log_loss: bool, eps: float) -> Tensor:
    return -score.clamp(min=eps).log() if log_loss else 1 - score


def dice(
    y_true: Any,
    p: Tensor,
    weight: Tensor | None,
    *,
    mode: str,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    ignore_index: int | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """`DiceLoss`."""
    y, p = _flat(y_true, p, mode, from_logits, ignore_index)
    score = (2 * (y * p).sum((0, 2)) + smooth) / ((y + p).sum((0, 2)) + smooth).clamp(min=eps)
    return _over_classes(_scored(score, log_loss, eps), y, weight, classes)


def jaccard(
    y_true: Any,
    p: Tensor,
    weight: Tensor | None,
    *,
    mode: str,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    eps: float = 1e-7,
) -> Tensor:
    """`JaccardLoss`."""
    y, p = _flat(y_true, p, mode, from_logits, None)
    both = (y * p).sum((0, 2))
    score = (both + smooth) / ((y + p).sum((0, 2)) - both + smooth).clamp(min=eps)
    return _over_classes(_scored(score, log_loss, eps), y, weight, classes)


def tversky(
    y_true: Any,
    p: Tensor,
    weight: Tensor | None,
    *,
    mode: str,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    ignore_index: int | None = None,
    eps: float = 1e-7,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
) -> Tensor:
    """`TverskyLoss`: α multiplies false positives; γ is the power of the mean over classes."""
    y, p = _flat(y_true, p, mode, from_logits, ignore_index)
    true, extra, missed = (y * p).sum((0, 2)), ((1 - y) * p).sum((0, 2)), (y * (1 - p)).sum((0, 2))
    score = (true + smooth) / (true + alpha * extra + beta * missed + smooth).clamp(min=eps)
    return _over_classes(_scored(score, log_loss, eps), y, weight, classes, gamma)


def _focal(
    p: Tensor, y: Tensor, gamma: float, alpha: float | None, normalized: bool, threshold: float | None
) -> Tensor:
    cross = F.binary_cross_entropy_with_logits(p, y, reduction="none")
    pt = (-cross).exp()
    term = (1 - pt) ** gamma
    if threshold is not None:
        term = torch.where(pt < threshold, torch.ones_like(pt), ((1 - pt) / threshold) ** gamma)
    losses = term * cross
    if alpha is not None:
        losses = losses * (alpha * y + (1 - alpha) * (1 - y))
    return losses / term.sum().clamp(min=1e-6) if normalized else losses


def focal(
    y_true: Any,
    p: Tensor,
    weight: Tensor | None,
    *,
    mode: str,
    alpha: float | None = None,
    gamma: float = 2.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
    normalized: bool = False,
    reduced_threshold: float | None = None,
) -> Tensor:
    """`FocalLoss`: several classes are one sigmoid against the rest each, averaged; ignored pixels are left out."""
    raw = torch.as_tensor(y_true)
    hot = one_hot(raw, p)
    if mode == "multiclass":
        pairs = [(p[:, c], hot[:, c], raw) for c in range(p.shape[1])]
    else:
        pairs = [(p, hot, raw.reshape(p.shape))]
    losses = []
    for logits, target, labels in pairs:
        kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
        kept = kept.reshape(logits.shape)
        found = _focal(logits[kept], target[kept], gamma, alpha, normalized, reduced_threshold)
        losses.append(plain_mean(found, reduction))
    return torch.stack(losses).mean(0)


def _lovasz_gradient(truth: Tensor) -> Tensor:
    total = truth.sum()
    jaccard_index = 1 - (total - truth.cumsum(0)) / (total + (1 - truth).cumsum(0))
    return torch.cat([jaccard_index[:1], jaccard_index[1:] - jaccard_index[:-1]])


def _lovasz_hinge(p: Tensor, y: Tensor) -> Tensor:
    errors, order = (1 - p * (2 * y - 1)).sort(descending=True)
    return (errors.clamp(min=0) * _lovasz_gradient(y[order])).sum() if len(y) else p.sum() * 0


def _lovasz_softmax(p: Tensor, y: Tensor) -> Tensor:
    losses = []
    for c in range(p.shape[0]):
        truth = (y == c).to(p.dtype)
        if truth.sum() > 0:
            errors, order = (truth - p[c]).abs().sort(descending=True)
            losses.append((errors * _lovasz_gradient(truth[order])).sum())
    return torch.stack(losses).mean() if losses else p.sum() * 0


def lovasz(
    y_true: Any,
    p: Tensor,
    weight: Tensor | None,
    *,
    mode: str,
    per_image: bool = False,
    ignore_index: int | None = None,
    from_logits: bool = True,
) -> Tensor:
    """`LovaszLoss`: hinge for binary masks, softmax over the present classes for exclusive ones."""
    y = torch.as_tensor(y_true).reshape(p.shape[0], *(p.shape[1:] if mode != "multiclass" else p.shape[2:]))
    p = p.softmax(1) if mode == "multiclass" and from_logits else p
    parts = [slice(i, i + 1) for i in range(len(p))] if per_image else [slice(None)]
    losses = []
    for part in parts:
        labels = y[part].flatten()
        kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
        if mode == "multiclass":
            losses.append(_lovasz_softmax(p[part].movedim(1, 0).flatten(1)[:, kept], labels[kept]))
        else:
            losses.append(_lovasz_hinge(p[part].flatten()[kept], labels[kept].to(p.dtype)))
    return torch.stack(losses).mean()


def soft_bce(
    y_true: Any,
    p: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    smooth_factor: float | None = None,
    pos_weight: Any = None,
) -> Tensor:
    """`SoftBCEWithLogitsLoss`: ignored pixels stay in the divisor."""
    y = tensor(y_true).reshape(p.shape)
    soft = y if smooth_factor is None else (1 - y) * smooth_factor + y * (1 - smooth_factor)
    losses = F.binary_cross_entropy_with_logits(p, soft, weight, reduction="none", pos_weight=optional(pos_weight))
    losses = losses if ignore_index is None else losses * (y != ignore_index)
    return plain_mean(losses, reduction)


def soft_cross_entropy(
    y_true: Any,
    p: Tensor,
    weight: Tensor | None,
    *,
    smooth_factor: float | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    dim: int = 1,
) -> Tensor:
    """`SoftCrossEntropyLoss`: ignored pixels stay in the divisor; without `smooth_factor` it raises."""
    if smooth_factor is None:
        raise FrameworkError("TypeError", "smooth_factor is None")
    logs, labels = F.log_softmax(p, dim), torch.as_tensor(y_true).long()
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    right = -logs.gather(dim, (labels * kept).unsqueeze(dim)).squeeze(dim) * kept
    every = -logs.sum(dim) * kept
    share = smooth_factor / p.shape[dim]
    return (1 - smooth_factor) * plain_mean(right, reduction) + share * plain_mean(every, reduction)


def mcc(y_true: Any, p: Tensor, weight: Tensor | None, *, eps: float = 1e-5) -> Tensor:
    """`MCCLoss` of probabilities: 1 − Matthews correlation of the whole batch."""
    y = tensor(y_true).reshape(p.shape)
    tp, tn = (y * p).sum() + eps, ((1 - y) * (1 - p)).sum() + eps
    fp, fn = ((1 - y) * p).sum() + eps, (y * (1 - p)).sum() + eps
    return 1 - (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "diceloss": dice,
    "jaccardloss": jaccard,
    "tverskyloss": tversky,
    "focalloss": focal,
    "lovaszloss": lovasz,
    "softbcewithlogitsloss": soft_bce,
    "softcrossentropyloss": soft_cross_entropy,
    "mccloss": mcc,
}


def loss(name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any, class_weight: Any = None) -> Tensor:
    """A loss of segmentation_models_pytorch.

    Example:
        >>> options = {"mode": "binary", "from_logits": False}
        >>> round(float(loss("DiceLoss", options, [[0.0, 0.0]], [[0.5, 0.5]])), 4)
        0.0
    """
    if key(name) not in FUNCTIONS:
        raise NotSupported(f"smp: no loss {name!r}")
    given = dict(options)
    weight = optional(given.pop("class_weights", given.pop("weight", class_weight)))
    if given.get("mode", "binary") not in MODES:
        raise FrameworkError("AssertionError", f"no mode {given['mode']!r}")
    p = channels_first(y_pred)
    result: Tensor = call(FUNCTIONS[key(name)], y_true, p, weight, options=given, where=f"smp {name}")
    return result
