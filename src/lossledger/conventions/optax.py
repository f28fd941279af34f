"""optax: losses are not reduced; the user divides, usually Σ l·m / Σ m, which is NaN where nothing counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions.common import FrameworkError, NotSupported, Reduced, call, key, optional, tensor

Axes = int | list[int] | None


def _same_shape(y: Tensor, p: Tensor) -> None:
    if y.shape != p.shape:
        raise FrameworkError("ValueError", f"Shape mismatch: got {tuple(p.shape)} and {tuple(y.shape)}.")


def _where(where: Any, p: Tensor, axis: Axes) -> Tensor | None:
    """What counts, in the rank of the logits."""
    if where is None:
        return None
    chosen = torch.as_tensor(where).bool()
    return chosen.unsqueeze(axis) if chosen.ndim != p.ndim and isinstance(axis, int) else chosen


def _sum(values: Tensor, axis: Axes, where: Tensor | None = None, keepdim: bool = False) -> Tensor:
    if where is not None:
        values = torch.where(where, values, torch.zeros_like(values))
    return values.sum(list(range(values.ndim)) if axis is None else axis, keepdim=keepdim)


def _log_softmax(p: Tensor, axis: Axes, where: Tensor | None) -> Tensor:
    if where is None:
        where = torch.ones_like(p, dtype=torch.bool)
    axes = [axis] if isinstance(axis, int) else list(range(p.ndim)) if axis is None else axis
    return p - p.masked_fill(~where, float("-inf")).logsumexp(axes, keepdim=True)


def squared_error(y: Tensor, p: Tensor) -> Tensor:
    """Squared error."""
    _same_shape(y, p)
    return (p - y).square()


def absolute_error(y: Tensor, p: Tensor) -> Tensor:
    """Absolute error."""
    return (p - y).abs()


def l2_loss(y: Tensor, p: Tensor) -> Tensor:
    """Half of the squared error."""
    return squared_error(y, p) / 2


def huber_loss(y: Tensor, p: Tensor, *, delta: float = 1.0) -> Tensor:
    """Squared for small errors, linear for large ones."""
    error = (p - y).abs()
    near = error.clamp(max=delta)
    return near.square() / 2 + delta * (error - near)


def log_cosh(y: Tensor, p: Tensor) -> Tensor:
    """Logarithm of the hyperbolic cosine of the error."""
    error = p - y
    return torch.logaddexp(error, -error) - torch.log(torch.tensor(2.0))


def cosine_similarity(y: Tensor, p: Tensor, *, epsilon: float = 0.0, axis: Axes = -1, where: Any = None) -> Tensor:
    """The cosine, with its own sign; squared lengths are at least ε."""
    chosen = _where(where, p, axis)

    def unit(x: Tensor) -> Tensor:
        return x / _sum(x.square(), axis, chosen, keepdim=True).clamp(min=epsilon).sqrt()

    if y.ndim == 0 or p.ndim == 0:
        raise FrameworkError("ValueError", "a number has no axis")
    return _sum(unit(p) * unit(y), axis, chosen)


def cosine_distance(y: Tensor, p: Tensor, *, epsilon: float = 0.0, axis: Axes = -1, where: Any = None) -> Tensor:
    """1 − cosine."""
    return 1 - cosine_similarity(y, p, epsilon=epsilon, axis=axis, where=where)


def hinge_loss(y: Tensor, p: Tensor) -> Tensor:
    """max(1 − y p, 0); labels 0 are not made −1."""
    return (1 - y * p).clamp(min=0)


def perceptron_loss(y: Tensor, p: Tensor) -> Tensor:
    """max(−y p, 0)."""
    _same_shape(y, p)
    return (-y * p).clamp(min=0)


def sigmoid_binary_cross_entropy(y: Tensor, p: Tensor) -> Tensor:
    """Binary cross-entropy of logits."""
    return -y * F.logsigmoid(p) - (1 - y) * F.logsigmoid(-p)


def softmax_cross_entropy(y: Tensor, p: Tensor, *, axis: Axes = -1, where: Any = None) -> Tensor:
    """Cross-entropy of logits with probabilities; what `where` leaves out is no class."""
    chosen = _where(where, p, axis)
    return -_sum(y * _log_softmax(p, axis, chosen), axis, chosen)


def safe_softmax_cross_entropy(y: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy in which a target of 0 gives 0, whatever the logit."""
    return -torch.where(y == 0, torch.zeros_like(p), y * F.log_softmax(p, -1)).sum(-1)


def softmax_cross_entropy_with_integer_labels(y: Tensor, p: Tensor, *, axis: int = -1, where: Any = None) -> Tensor:
    """Cross-entropy with labels: −1 is the last class, further out is NaN; an entry without a class is 0."""
    chosen = _where(where, p, axis)
    labels, classes = y.long().unsqueeze(axis), p.shape[axis]
    labels = torch.where(labels < 0, labels + classes, labels)
    outside = (labels < 0) | (labels >= classes)
    index, scores = labels.masked_fill(outside, 0).movedim(axis, -1), p.movedim(axis, -1)
    # Labels and logits broadcast against each other.
    entries = (index[..., 0] + scores[..., 0]).shape
    label = scores.expand(*entries, -1).gather(-1, index.expand(*entries, 1)).squeeze(-1)
    label = label.masked_fill(outside.movedim(axis, -1).squeeze(-1), float("nan"))
    kept = p if chosen is None else torch.where(chosen, p, float("-inf"))
    losses = kept.logsumexp(axis) - label
    return losses if chosen is None else torch.where(chosen.any(axis), losses, 0.0)


def _one_hot(y: Tensor, p: Tensor) -> Tensor:
    return (y.long().unsqueeze(-1) == torch.arange(p.shape[-1])).to(p.dtype)


def multiclass_hinge_loss(y: Tensor, p: Tensor) -> Tensor:
    """The best class against the labelled one, with a margin of 1."""
    hot = _one_hot(y, p)
    return (p + 1 - hot).amax(-1) - (p * hot).sum(-1)


def multiclass_perceptron_loss(y: Tensor, p: Tensor) -> Tensor:
    """The best class against the labelled one."""
    return p.amax(-1) - (p * _one_hot(y, p)).sum(-1)


def sparsemax_loss(y: Tensor, p: Tensor) -> Tensor:
    """Binary sparsemax: 0 below −1, the logit above 1, a parabola between."""
    x = torch.where(y != 0, -p, p)
    return torch.where(x <= -1, torch.zeros_like(x), torch.where(x >= 1, x, (x + 1).square() / 4))


def smooth_labels(y: Tensor, p: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Cross-entropy with labels smoothed by α, `softmax_cross_entropy(logits, smooth_labels(…))`."""
    hot = F.one_hot(y.long(), p.shape[-1]).to(p.dtype) if y.ndim < p.ndim else y
    return softmax_cross_entropy(hot * (1 - alpha) + alpha / p.shape[-1], p)


def poly_loss_cross_entropy(
    y: Tensor, p: Tensor, *, epsilon: float = 2.0, axis: Axes = -1, where: Any = None
) -> Tensor:
    """Cross-entropy plus ε Σ y (1 − p)."""
    chosen = _where(where, p, axis)
    wrong = _sum(y * (1 - _log_softmax(p, axis, chosen).exp()), axis, chosen)
    return softmax_cross_entropy(y, p, axis=axis, where=where) + epsilon * wrong


def kl_divergence(y: Tensor, p: Tensor, *, axis: Axes = -1, where: Any = None) -> Tensor:
    """Kullback-Leibler divergence; predictions are log-probabilities."""
    logs = torch.where(y == 0, torch.zeros_like(y), y.log())
    return _sum(y * (logs - p), axis, _where(where, p, axis))


def kl_divergence_with_log_targets(y: Tensor, p: Tensor, *, axis: Axes = -1, where: Any = None) -> Tensor:
    """Kullback-Leibler divergence; predictions and targets are log-probabilities."""
    return _sum(y.exp() * (y - p), axis, _where(where, p, axis))


def generalized_kl_divergence(y: Tensor, p: Tensor, *, axis: Axes = -1, where: Any = None) -> Tensor:
    """Kullback-Leibler divergence plus Σ p − Σ y, for what does not sum to 1."""
    return kl_divergence(y, p, axis=axis, where=where) + _sum(p.exp() - y, axis, _where(where, p, axis))


def sigmoid_focal_loss(y: Tensor, p: Tensor, *, alpha: float | None = None, gamma: float = 2.0) -> Tensor:
    """Focal loss of logits; α only where it is given."""
    q = p.sigmoid()
    loss = sigmoid_binary_cross_entropy(y, p) * (1 - (q * y + (1 - q) * (1 - y))) ** gamma
    return loss if alpha is None else loss * (alpha * y + (1 - alpha) * (1 - y))


def dice_loss(
    y: Tensor,
    p: Tensor,
    *,
    class_weights: Any = None,
    smooth: float = 1.0,
    alpha: float = 0.5,
    beta: float = 0.5,
    apply_softmax: bool = True,
    reduction: str = "mean",
    ignore_background: bool = False,
    axis: Axes = None,
) -> Tensor:
    """Dice loss of each sample, the mean over its classes; one channel is read by a sigmoid."""
    if p.ndim == y.ndim - 1:
        p = p.unsqueeze(-1)
    if y.ndim == p.ndim - 1:
        y = y.unsqueeze(-1)
    _same_shape(y, p)
    if not apply_softmax and not bool(((p.sum(-1) - 1).abs() <= 1e-8 + 1e-5).all()):
        raise FrameworkError("ValueError", "without a softmax predictions must sum to 1")
    q = p if not apply_softmax else p.sigmoid() if p.shape[-1] == 1 else p.softmax(-1)
    axes = list(range(1, q.ndim - 1)) if axis is None else axis

    def total(x: Tensor) -> Tensor:
        return x if axes == [] else x.sum(axes)

    true, found, wanted = total(q * y), total(q), total(y)
    losses = 1 - (true + smooth) / (true + alpha * (found - true) + beta * (wanted - true) + smooth)
    if class_weights is not None:
        losses = losses * tensor(class_weights)
    if ignore_background and q.shape[-1] > 1:
        losses = losses[..., 1:]
    if reduction not in ("mean", "sum", "none"):
        raise FrameworkError("ValueError", f"Unsupported reduction: {reduction}")
    return losses.mean(-1) if reduction == "mean" else losses.sum(-1) if reduction == "sum" else losses


def binary_dice_loss(y: Tensor, p: Tensor, *, smooth: float = 1.0, apply_sigmoid: bool = True) -> Tensor:
    """Dice loss of each sample; the last axis is space, unless its length is 1."""
    if p.ndim == y.ndim and p.shape[-1] != 1:
        y, p = y.unsqueeze(-1), p.unsqueeze(-1)
    return dice_loss(y, p, smooth=smooth, apply_softmax=apply_sigmoid)


_ALL = (
    squared_error,
    absolute_error,
    l2_loss,
    huber_loss,
    log_cosh,
    cosine_similarity,
    cosine_distance,
    hinge_loss,
    perceptron_loss,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    safe_softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    smooth_labels,
    poly_loss_cross_entropy,
    kl_divergence,
    kl_divergence_with_log_targets,
    generalized_kl_divergence,
    multiclass_hinge_loss,
    multiclass_perceptron_loss,
    sparsemax_loss,
    sigmoid_focal_loss,
    dice_loss,
    binary_dice_loss,
)
FUNCTIONS = {key(f.__name__): f for f in _ALL}
FUNCTIONS["softmaxcrossentropy+smoothlabels"] = smooth_labels
FUNCTIONS["convexkldivergence"] = generalized_kl_divergence


def loss(
    name: str, options: Mapping[str, Any], y_true: Any, y_pred: Any, mask: Any = None, weight: Any = None
) -> Tensor:
    """A loss of optax, with the reduction that the user wrote in `user_reduction`.

    Example:
        >>> loss("l2_loss", {}, [0.0, 0.0], [1.0, 2.0])
        tensor([0.5000, 2.0000])
    """
    if key(name) not in FUNCTIONS:
        raise NotSupported(f"optax: no loss {name!r}")
    rest = {k: v for k, v in options.items() if k != "user_reduction"}
    try:
        losses: Tensor = call(FUNCTIONS[key(name)], tensor(y_true), tensor(y_pred), options=rest, where=name)
    except RuntimeError as error:
        # Shapes that do not broadcast.
        raise FrameworkError("TypeError", str(error)) from None
    reduction = options.get("user_reduction")
    if reduction is None:
        return losses
    return _reduced(str(reduction).replace(" ", ""), losses, optional(mask), optional(weight))


def _reduced(text: str, losses: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    m = torch.ones_like(losses) if mask is None else mask
    w = torch.ones_like(losses) if weight is None else weight
    known = {
        "mean(l)": lambda: losses.mean(),
        "mean": lambda: losses.mean(),
        "sum(l)": lambda: losses.sum(),
        "sum": lambda: losses.sum(),
        "mean(l*m)": lambda: (losses * m).mean(),
        "sum(l*m)": lambda: (losses * m).sum(),
        "mean(l*w)": lambda: (losses * w).mean(),
        "sum(l*m)/sum(m)": lambda: (losses * m).sum() / m.sum(),
        "sum(l*w)/sum(w)": lambda: (losses * w).sum() / w.sum(),
        "sum(l*w*m)/sum(w*m)": lambda: (losses * w * m).sum() / (w * m).sum(),
    }
    if text not in known:
        raise NotSupported(f"optax: no reduction {text!r}")
    return known[text]()


def idiom(losses: Tensor, weight: Tensor | None) -> Reduced:
    """The usual division by the user: Σ l·w / Σ w, weights and mask in one, and the mean without them."""
    weight = torch.ones_like(losses) if weight is None else weight
    try:
        weight = weight.expand_as(losses)
    except RuntimeError as error:
        raise FrameworkError("TypeError", str(error)) from None
    total = (losses * weight).sum()
    return Reduced(total / weight.sum(), total, weight.sum())
