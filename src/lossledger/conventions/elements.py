"""The element losses of the Keras family, with what differs between its branches as parameters.

Each function returns the loss of each entry, or that and a mask that the loss itself makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions.common import FrameworkError, key

Axis = int | Sequence[int] | None
Elements = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a branch of Keras does in its own way.

    Args:
        epsilon: probabilities are clipped to [ε, 1 − ε].
        log_epsilon: what binary cross-entropy adds inside its logarithms.
        sparse_softmax: sparse cross-entropy takes the softmax of log clip(p), instead of dividing by Σ p.
        strict_shapes: cross-entropies refuse shapes that differ.
        converts_hinge: labels 0 and 1 become −1 and 1.
        label_error: what an out-of-range label raises; `None`: such an entry has the loss 0.
        torch_kernels: the cross-entropies of torch, which compute log(1 − q) as log1p(−q), refuse NaN where
            probabilities are expected, and ignore the label −100.
        focal_sigmoid: the focal loss of logits is that of their sigmoid, clipped.
        smoothing_axis: smoothing counts the classes on the axis of the loss, not on the last.
        flattens_labels: labels of any shape meet the output when both are flattened.
        norm_epsilon: the least length of a vector that a cosine divides by.
    """

    epsilon: float = 1e-7
    log_epsilon: float = 0.0
    sparse_softmax: bool = False
    strict_shapes: bool = True
    converts_hinge: bool = True
    label_error: str | None = "IndexError"
    torch_kernels: bool = False
    focal_sigmoid: bool = True
    smoothing_axis: bool = False
    flattens_labels: bool = False
    norm_epsilon: float = 1e-7


KERAS3 = Dialect(torch_kernels=True)
KERAS3_JAX = Dialect(label_error=None)
KERAS3_TENSORFLOW = Dialect(sparse_softmax=True, label_error="InvalidArgumentError")
CLASSIC = Dialect(
    sparse_softmax=True,
    strict_shapes=False,
    converts_hinge=False,
    label_error="InvalidArgumentError",
    flattens_labels=True,
    norm_epsilon=1e-6,
)
TF_KERAS = replace(CLASSIC, log_epsilon=1e-7, converts_hinge=True, focal_sigmoid=False, smoothing_axis=True)


def _clip(p: Tensor, d: Dialect) -> Tensor:
    return p.clamp(d.epsilon, 1 - d.epsilon)


def mean_squared_error(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Mean of the squared error."""
    return (y - p).square().mean(-1)


def mean_absolute_error(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Mean of the absolute error."""
    return (y - p).abs().mean(-1)


def mean_absolute_percentage_error(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Mean of the error as a percentage of the target."""
    return 100 * ((y - p) / y.abs().clamp(min=d.epsilon)).abs().mean(-1)


def mean_squared_logarithmic_error(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Mean of the squared difference of log(1 + x)."""
    return ((p.clamp(min=d.epsilon) + 1).log() - (y.clamp(min=d.epsilon) + 1).log()).square().mean(-1)


def huber(y: Tensor, p: Tensor, d: Dialect, *, delta: float = 1.0) -> Tensor:
    """Squared for small errors, linear for large ones."""
    error = (y - p).abs()
    return torch.where(error <= delta, error.square() / 2, delta * error - delta**2 / 2).mean(-1)


def log_cosh(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Mean of the logarithm of the hyperbolic cosine of the error."""
    error = p - y
    return (error + F.softplus(-2 * error) - math.log(2)).mean(-1)


def poisson(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Mean of `p − y log(p + ε)`."""
    return (p - y * (p + d.epsilon).log()).mean(-1)


def kl_divergence(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Kullback-Leibler divergence of distributions clipped to [ε, 1]."""
    y, p = y.clamp(d.epsilon, 1), p.clamp(d.epsilon, 1)
    return (y * (y / p).log()).sum(-1)


def cosine_similarity(y: Tensor, p: Tensor, d: Dialect, *, axis: int = -1) -> Tensor:
    """The cosine with its sign turned; a vector of zeros has the similarity 0."""
    return -(_direction(y, axis, d) * _direction(p, axis, d)).sum(axis)


def _direction(x: Tensor, axis: int, d: Dialect) -> Tensor:
    return x * x.square().sum(axis, keepdim=True).rsqrt().clamp(max=1 / d.norm_epsilon)


def _plus_minus(y: Tensor, d: Dialect) -> Tensor:
    binary = bool(((y == 0) | (y == 1)).all())
    return 2 * y - 1 if d.converts_hinge and binary else y


def hinge(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Mean of max(1 − y p, 0)."""
    return (1 - _plus_minus(y, d) * p).clamp(min=0).mean(-1)


def squared_hinge(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """Mean of max(1 − y p, 0)²."""
    return (1 - _plus_minus(y, d) * p).clamp(min=0).square().mean(-1)


def categorical_hinge(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """The best wrong class against the right one, with a margin of 1."""
    return (((1 - y) * p).amax(-1) - (y * p).sum(-1) + 1).clamp(min=0)


def _class_axis(p: Tensor) -> None:
    if p.ndim == 0:
        raise FrameworkError("IndexError", "an output without axes has no classes")


def _same_shape(y: Tensor, p: Tensor, strict: bool) -> None:
    if strict and y.shape != p.shape:
        raise FrameworkError("ValueError", f"shapes differ: target {tuple(y.shape)}, output {tuple(p.shape)}")


def _binary(y: Tensor, p: Tensor, d: Dialect, from_logits: bool) -> Tensor:
    _same_shape(y, p, d.strict_shapes or from_logits)
    if from_logits and d.torch_kernels:
        return F.binary_cross_entropy_with_logits(p, y, reduction="none")
    if from_logits:
        return p.clamp(min=0) - p * y + torch.log1p((-p.abs()).exp())
    q = _clip(p, d)
    if d.torch_kernels:
        return F.binary_cross_entropy(q, y, reduction="none")
    return -(y * (q + d.log_epsilon).log() + (1 - y) * (1 - q + d.log_epsilon).log())


def binary_crossentropy(
    y: Tensor, p: Tensor, d: Dialect, *, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Tensor:
    """Cross-entropy of independent columns."""
    y = y * (1 - label_smoothing) + label_smoothing / 2
    return _binary(y, p, d, from_logits).mean(axis)


def binary_focal_crossentropy(
    y: Tensor,
    p: Tensor,
    d: Dialect,
    *,
    apply_class_balancing: bool = False,
    alpha: float = 0.25,
    gamma: float = 2.0,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """Binary cross-entropy times (1 − p_t)^γ; α only with class balancing."""
    y = y * (1 - label_smoothing) + label_smoothing / 2
    q = p.sigmoid() if from_logits else p
    _same_shape(y, p, d.strict_shapes)
    factor = (1 - (y * q + (1 - y) * (1 - q))) ** gamma
    focal = factor * (_binary(y, q, d, False) if d.focal_sigmoid else _binary(y, p, d, from_logits))
    if apply_class_balancing:
        focal = focal * (y * alpha + (1 - y) * (1 - alpha))
    return focal.mean(axis)


def _smoothed(y: Tensor, smoothing: float, axis: int = -1) -> Tensor:
    return y * (1 - smoothing) + smoothing / y.shape[axis] if smoothing else y


def categorical_crossentropy(
    y: Tensor, p: Tensor, d: Dialect, *, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Tensor:
    """Cross-entropy of exclusive classes; probabilities are divided by their sum, then clipped."""
    _class_axis(p)
    y = _smoothed(y, label_smoothing, axis if d.smoothing_axis else -1)
    _same_shape(y, p, True)
    if from_logits and d.flattens_labels and axis < -1:
        raise FrameworkError("InvalidArgumentError", "the logits of TensorFlow take no negative axis but the last")
    logs = F.log_softmax(p, axis) if from_logits else _clip(p / p.sum(axis, keepdim=True), d).log()
    return -(y * logs).sum(axis)


def categorical_focal_crossentropy(
    y: Tensor,
    p: Tensor,
    d: Dialect,
    *,
    alpha: float | Sequence[float] = 0.25,
    gamma: float = 2.0,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """Categorical cross-entropy times α (1 − q)^γ."""
    _class_axis(p)
    y = _smoothed(y, label_smoothing)
    _same_shape(y, p, not d.strict_shapes)
    q = p.softmax(axis) if from_logits else p
    q = _clip(q / q.sum(axis, keepdim=True), d)
    factor = torch.as_tensor(alpha, dtype=p.dtype)
    return (factor * (1 - q) ** gamma * -y * q.log()).sum(axis)


def _checked_labels(y: Tensor, classes: int, d: Dialect) -> tuple[Tensor, Tensor]:
    """Labels as integers, and which of them are out of range."""
    labels = y.long()
    outside = (labels < 0) | (labels >= classes)
    wrong = outside & (labels != -100) if d.torch_kernels else outside
    if d.label_error is not None and bool(wrong.any()):
        raise FrameworkError(d.label_error, f"a label is outside 0 to {classes - 1}")
    return labels.masked_fill(outside, 0), outside


def _sparse(y: Tensor, p: Tensor, d: Dialect, from_logits: bool) -> Tensor:
    """The losses of labels; the classes are last."""
    if y.shape != p.shape[:-1]:
        raise FrameworkError("ValueError", f"shapes differ: target {tuple(y.shape)}, output {tuple(p.shape)}")
    labels, outside = _checked_labels(y, p.shape[-1], d)
    if from_logits:
        logs = F.log_softmax(p, -1)
    elif d.sparse_softmax:
        logs = F.log_softmax(_clip(p, d).log(), -1)
    else:
        logs = _clip(p / p.sum(-1, keepdim=True), d).log()
    return -logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).masked_fill(outside, 0.0)


def _sparse_flat(y: Tensor, p: Tensor, d: Dialect, from_logits: bool, ignore_class: int | None) -> Elements:
    """TensorFlow's Keras: labels whose shape is not that of the entries are flattened, and the output with them."""
    entries, rank = p.shape[:-1], p.ndim
    if ignore_class is not None and y.ndim == 0:
        raise FrameworkError("ValueError", "mask cannot be scalar")
    if y.ndim != rank - 1:
        y, p = y.flatten(), p.reshape(-1, p.shape[-1])
    valid = torch.ones_like(y, dtype=torch.bool) if ignore_class is None else y != ignore_class
    losses = _sparse(y * valid, p, d, from_logits)
    if ignore_class is None:
        return losses.reshape(entries) if rank > 2 else losses
    if rank < 2:
        raise FrameworkError("InvalidArgumentError", "an ignored class needs an axis of entries")
    return torch.where(valid, losses, 0.0).reshape(entries), valid.reshape(entries)


def sparse_categorical_crossentropy(
    y: Tensor, p: Tensor, d: Dialect, *, from_logits: bool = False, ignore_class: int | None = None, axis: int = -1
) -> Elements:
    """Cross-entropy of exclusive classes with integer labels; an ignored class makes a mask."""
    if d.flattens_labels:
        return _sparse_flat(y, p.movedim(axis, -1), d, from_logits, ignore_class)
    if y.ndim == p.ndim and y.shape[axis] == 1:
        y = y.squeeze(axis)
    if ignore_class is None:
        return _sparse(y, p.movedim(axis, -1), d, from_logits)
    entries = p.movedim(axis, -1).shape[:-1]
    valid = y != ignore_class
    # Before the shapes are compared: labels of another shape are broadcast against the output here.
    y, p = torch.where(valid, y, 0.0), torch.where(valid.unsqueeze(axis), p, 0.0)
    losses, valid = _sparse(y, p.movedim(axis, -1), d, from_logits), valid.reshape(entries)
    return torch.where(valid, losses, 0.0), valid


def generalized_crossentropy(y: Tensor, p: Tensor, d: Dialect, *, q: float = 0.5) -> Tensor:
    """(1 − p_y^q) / q, neither clipped nor divided by the sum; labels that no class has are the probability 0."""
    labels, classes = y.long(), p.shape[-1]
    if d.torch_kernels and bool((labels >= classes).any()):
        raise FrameworkError("RuntimeError", f"a label is above {classes - 1}")
    if not 0 < q < 1:
        raise FrameworkError("ValueError", f"q must be between 0 and 1, received {q!r}")
    hot = (labels.unsqueeze(-1) == torch.arange(classes)).to(p.dtype)
    # A tensor as the exponent: with a number torch takes the square root for ½, which has no value at −∞.
    return (1 - (p * hot).sum(-1) ** torch.tensor(q)) / q


def _sum(values: Tensor, axis: Axis) -> Tensor:
    return values.sum() if axis is None else values.sum([axis] if isinstance(axis, int) else list(axis))


def dice(y: Tensor, p: Tensor, d: Dialect, *, axis: Axis = None) -> Tensor:
    """Dice loss with ε in the divisor; without an axis over the batch too."""
    return 1 - 2 * _sum(y * p, axis) / (_sum(y, axis) + _sum(p, axis) + d.epsilon)


def tversky(y: Tensor, p: Tensor, d: Dialect, *, alpha: float = 0.5, beta: float = 0.5, axis: Axis = None) -> Tensor:
    """Tversky loss; up to Keras 3.15.1 α multiplies false negatives and β false positives."""
    true, missed, extra = _sum(y * p, axis), _sum(y * (1 - p), axis), _sum((1 - y) * p, axis)
    return 1 - true / (true + alpha * missed + beta * extra + d.epsilon)


def circle(
    y: Tensor, p: Tensor, d: Dialect, *, gamma: float = 80.0, margin: float = 0.4, remove_diagonal: bool = True
) -> Elements:
    """Circle loss of embeddings of length 1; only positive losses count in the mean."""
    distance = (1 - p @ p.T).clamp(min=0)
    same = y.reshape(-1, 1) == y.reshape(1, -1)
    other = ~same
    if remove_diagonal:
        same = same & ~torch.eye(len(y), dtype=torch.bool)
    near = -gamma * (distance + margin).clamp(min=0) * (margin - distance)
    far = gamma * (1 + margin - distance).clamp(min=0) * (1 - margin - distance)
    pull = near.masked_fill(~same, -math.inf).logsumexp(1)
    push = far.masked_fill(~other, -math.inf).logsumexp(1)
    losses = F.softplus(pull + push)
    return losses, losses > 0


def ctc(y: Tensor, p: Tensor, d: Dialect) -> Tensor:
    """CTC from logits: blank 0, which also pads the labels; every input has the full length."""
    labels = y.long()
    lengths = (labels != 0).sum(-1)
    steps = torch.full((p.shape[0],), p.shape[1])
    logs = F.log_softmax(p, -1).transpose(0, 1)
    return F.ctc_loss(logs, labels, steps, lengths, blank=0, reduction="none")


Function = Callable[..., Any]

FUNCTIONS: dict[str, Function] = {
    key(f.__name__): f
    for f in (
        mean_squared_error,
        mean_absolute_error,
        mean_absolute_percentage_error,
        mean_squared_logarithmic_error,
        huber,
        log_cosh,
        poisson,
        kl_divergence,
        cosine_similarity,
        hinge,
        squared_hinge,
        categorical_hinge,
        binary_crossentropy,
        binary_focal_crossentropy,
        categorical_crossentropy,
        categorical_focal_crossentropy,
        sparse_categorical_crossentropy,
        dice,
        tversky,
        circle,
        ctc,
    )
}
FUNCTIONS["categoricalgeneralizedcrossentropy"] = generalized_crossentropy
_SHORT = {
    "mse": "meansquarederror",
    "mae": "meanabsoluteerror",
    "mape": "meanabsolutepercentageerror",
    "msle": "meansquaredlogarithmicerror",
    "bce": "binarycrossentropy",
    "kld": "kldivergence",
    "kullbackleiblerdivergence": "kldivergence",
    "huberloss": "huber",
    "cosineproximity": "cosinesimilarity",
}
FUNCTIONS.update({short: FUNCTIONS[long] for short, long in _SHORT.items()})

# What tf_keras and Keras 2 do not have.
ONLY_KERAS3 = frozenset({"ctc", "dice", "tversky", "circle", "categoricalgeneralizedcrossentropy"})
