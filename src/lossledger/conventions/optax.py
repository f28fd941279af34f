"""optax: losses are not reduced; the user divides, usually Σ l·m / Σ m, which is NaN where nothing counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions.common import FrameworkError, NotSupported, Reduced, call, key, optional, tensor


def squared_error(y: Tensor, p: Tensor) -> Tensor:
    """Squared error."""
    return (p - y).square()


def absolute_error(y: Tensor, p: Tensor) -> Tensor:
    """Absolute error."""
    return (p - y).abs()


def l2_loss(y: Tensor, p: Tensor) -> Tensor:
    """Half of the squared error."""
    return (p - y).square() / 2


def huber_loss(y: Tensor, p: Tensor, *, delta: float = 1.0) -> Tensor:
    """Squared for small errors, linear for large ones."""
    return F.huber_loss(p, y, reduction="none", delta=delta)


def log_cosh(y: Tensor, p: Tensor) -> Tensor:
    """Logarithm of the hyperbolic cosine of the error."""
    error = p - y
    return torch.logaddexp(error, -error) - torch.log(torch.tensor(2.0))


def _unit(x: Tensor, epsilon: float) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=epsilon)


def cosine_similarity(y: Tensor, p: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """The cosine, with its own sign."""
    return (_unit(p, epsilon) * _unit(y, epsilon)).sum(-1)


def cosine_distance(y: Tensor, p: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """1 − cosine."""
    return 1 - cosine_similarity(y, p, epsilon=epsilon)


def hinge_loss(y: Tensor, p: Tensor) -> Tensor:
    """max(1 − y p, 0); labels 0 are not made −1."""
    return (1 - y * p).clamp(min=0)


def perceptron_loss(y: Tensor, p: Tensor) -> Tensor:
    """max(−y p, 0)."""
    return (-y * p).clamp(min=0)


def sigmoid_binary_cross_entropy(y: Tensor, p: Tensor) -> Tensor:
    """Binary cross-entropy of logits."""
    return -y * F.logsigmoid(p) - (1 - y) * F.logsigmoid(-p)


def softmax_cross_entropy(y: Tensor, p: Tensor, *, axis: int = -1) -> Tensor:
    """Cross-entropy of logits with probabilities."""
    return -(y * F.log_softmax(p, axis)).sum(axis)


def safe_softmax_cross_entropy(y: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy in which a target of 0 gives 0, whatever the logit."""
    return -torch.where(y == 0, torch.zeros_like(p), y * F.log_softmax(p, -1)).sum(-1)


def softmax_cross_entropy_with_integer_labels(y: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy with labels: −1 is the last class, further out is NaN."""
    labels, classes = y.long(), p.shape[-1]
    labels = torch.where(labels < 0, labels + classes, labels)
    outside = (labels < 0) | (labels >= classes)
    chosen = F.log_softmax(p, -1).gather(-1, labels.masked_fill(outside, 0).unsqueeze(-1)).squeeze(-1)
    return (-chosen).masked_fill(outside, float("nan"))


def smooth_labels(y: Tensor, p: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Cross-entropy with labels smoothed by α, `softmax_cross_entropy(logits, smooth_labels(…))`."""
    hot = F.one_hot(y.long(), p.shape[-1]).to(p.dtype) if y.ndim < p.ndim else y
    return softmax_cross_entropy(hot * (1 - alpha) + alpha / p.shape[-1], p)


def poly_loss_cross_entropy(y: Tensor, p: Tensor, *, epsilon: float = 2.0) -> Tensor:
    """Cross-entropy plus ε (1 − p_y)."""
    return softmax_cross_entropy(y, p) + epsilon * (1 - (y * p.softmax(-1)).sum(-1))


def kl_divergence(y: Tensor, p: Tensor) -> Tensor:
    """Kullback-Leibler divergence; predictions are log-probabilities."""
    return (torch.xlogy(y, y) - y * p).sum(-1)


def sigmoid_focal_loss(y: Tensor, p: Tensor, *, alpha: float | None = None, gamma: float = 2.0) -> Tensor:
    """Focal loss of logits; α only where it is given."""
    q = p.sigmoid()
    loss = sigmoid_binary_cross_entropy(y, p) * (1 - (q * y + (1 - q) * (1 - y))) ** gamma
    return loss if alpha is None else loss * (alpha * y + (1 - alpha) * (1 - y))


def _overlap(y: Tensor, q: Tensor, axes: list[int], alpha: float, beta: float, smooth: float) -> Tensor:
    true, extra, missed = (q * y).sum(axes), (q * (1 - y)).sum(axes), ((1 - q) * y).sum(axes)
    return 1 - (true + smooth) / (true + alpha * extra + beta * missed + smooth)


def dice_loss(
    y: Tensor, p: Tensor, *, apply_softmax: bool = True, alpha: float = 0.5, beta: float = 0.5, smooth: float = 1.0
) -> Tensor:
    """Dice loss of each sample, the mean over its classes."""
    q = p.softmax(-1) if apply_softmax else p
    return _overlap(y, q, list(range(1, p.ndim - 1)), alpha, beta, smooth).mean(-1)


def binary_dice_loss(y: Tensor, p: Tensor, *, smooth: float = 1.0, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """Dice loss of each sample, with 1 added to the overlap and to the divisor of half sums."""
    return _overlap(y, p.sigmoid(), list(range(1, p.ndim)), alpha, beta, smooth)


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
    sigmoid_focal_loss,
    dice_loss,
    binary_dice_loss,
)
FUNCTIONS = {key(f.__name__): f for f in _ALL}
FUNCTIONS["softmaxcrossentropy+smoothlabels"] = smooth_labels


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
    rest = {k: v for k, v in options.items() if k not in ("user_reduction", "where")}
    losses: Tensor = call(FUNCTIONS[key(name)], tensor(y_true), tensor(y_pred), options=rest, where=name)
    where = options.get("where")
    if where is not None:
        losses = torch.where(torch.as_tensor(where).bool(), losses, torch.zeros_like(losses))
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
