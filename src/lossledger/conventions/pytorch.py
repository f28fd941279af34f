"""PyTorch's own losses, called through torch: what divides depends on the loss.

Integer targets of cross-entropy divide by the class weights of the labels, probability targets by their number;
`F.mse_loss(weight=)` and `F.l1_loss(weight=)` by the weights, `F.huber_loss(weight=)` by the number of elements.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossledger.conventions.common import NotSupported, Reduced, optional, scalar, tensor

_CLASS_WEIGHTED = ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss", "MultiLabelSoftMarginLoss")
_LABELLED = ("CrossEntropyLoss", "NLLLoss", "NLLLoss2d", "MultiMarginLoss", "MultiLabelMarginLoss")
_LOG_INPUT = ("KLDivLoss", "NLLLoss", "NLLLoss2d")
_SAMPLE_WEIGHTED = ("BCELoss", "BCEWithLogitsLoss")
_TWO_ARGUMENTS = (
    *_CLASS_WEIGHTED,
    *_SAMPLE_WEIGHTED,
    "NLLLoss2d",
    "MultiLabelMarginLoss",
    "L1Loss",
    "MSELoss",
    "SmoothL1Loss",
    "HuberLoss",
    "SoftMarginLoss",
    "HingeEmbeddingLoss",
    "PoissonNLLLoss",
    "KLDivLoss",
)
_FUNCTIONAL: dict[str, Callable[..., Tensor]] = {
    "mse_loss": F.mse_loss,
    "l1_loss": F.l1_loss,
    "huber_loss": F.huber_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "kl_div": F.kl_div,
    "soft_margin_loss": F.soft_margin_loss,
    "poisson_nll_loss": F.poisson_nll_loss,
}


def target(name: str, y_true: Any, y_pred: Tensor) -> Tensor:
    """Labels as integers where the loss wants classes, other targets as floats."""
    y = torch.as_tensor(y_true)
    whole = not y.is_floating_point() or (y.ndim < y_pred.ndim and bool((y == y.round()).all()))
    if any(word in name for word in (*_LABELLED, "cross_entropy")) and "binary" not in name and whole:
        return y.long()
    return y.to(y_pred.dtype)


def _ctc(options: Mapping[str, Any], y_true: Any, y_pred: Any) -> Tensor:
    logs = F.log_softmax(tensor(y_pred), -1).transpose(0, 1)
    rest = {k: v for k, v in options.items() if k not in ("input_lengths", "target_lengths")}
    y = torch.as_tensor(y_true).long()
    inputs = options.get("input_lengths", [logs.shape[0]] * logs.shape[1])
    lengths = options.get("target_lengths", [y.shape[-1]] * logs.shape[1])
    loss: Tensor = torch.nn.CTCLoss(**rest)(logs, y, torch.as_tensor(inputs), torch.as_tensor(lengths))
    return loss


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: torch.tensor(v) if isinstance(v, list) and k != "weight" else v for k, v in options.items()}


def loss(
    name: str,
    options: Mapping[str, Any],
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    class_weight: Any = None,
) -> Tensor:
    """A loss of `torch.nn`, or of `torch.nn.functional` as `F.name`.

    Example:
        >>> float(loss("F.mse_loss", {}, [0.0, 0.0], [1.0, 3.0], sample_weight=[1.0, 3.0]))
        7.0
        >>> float(loss("F.huber_loss", {}, [0.0, 0.0], [1.0, 3.0], sample_weight=[1.0, 3.0]))
        4.0
    """
    weight = optional(sample_weight)
    classes = optional(list(class_weight.values()) if isinstance(class_weight, Mapping) else class_weight)
    if name == "CTCLoss":
        return _ctc(options, y_true, y_pred)
    p = tensor(y_pred)
    p = F.log_softmax(p, 1 if p.ndim > 1 else 0) if name in _LOG_INPUT else p
    y = target(name, y_true, p)
    given = _options(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.removeprefix("F.") in _FUNCTIONAL:
            any_weight = weight if weight is not None else classes
            function = _FUNCTIONAL[name.removeprefix("F.")]
            return function(p, y, **given) if any_weight is None else function(p, y, weight=any_weight, **given)
        return _module(name, given, weight, classes)(p, y)


def _module(name: str, options: dict[str, Any], weight: Tensor | None, classes: Tensor | None) -> Callable[..., Tensor]:
    if name not in _TWO_ARGUMENTS:
        raise NotSupported(f"torch: no loss {name!r}")
    if weight is not None and name not in _SAMPLE_WEIGHTED:
        raise NotSupported(f"torch.nn.{name} takes no weight a sample")
    if classes is not None and name not in (*_CLASS_WEIGHTED, *_SAMPLE_WEIGHTED):
        raise NotSupported(f"torch.nn.{name} takes no weight a class")
    used = weight if weight is not None else classes
    if used is not None:
        options["weight"] = used
    module: Callable[..., Tensor] = getattr(torch.nn, name)(**options)
    return module


def cross_entropy(
    log_p: Tensor, labels: Tensor, class_weight: Tensor | None = None, ignore_index: int = -100
) -> Reduced:
    """Integer targets: Σ c_y·l / Σ c_y over the labels that are not ignored; 0/0 is NaN.

    Args:
        log_p: log-probabilities, `[N, K]`.
        labels: `[N]`.
        class_weight: `[K]`.
        ignore_index: the label that counts nothing.
    """
    valid = labels != ignore_index
    total = F.nll_loss(log_p, labels, class_weight, ignore_index=ignore_index, reduction="sum")
    weights = torch.ones(log_p.shape[-1], dtype=log_p.dtype) if class_weight is None else class_weight
    divisor = weights[labels[valid]].sum()
    return Reduced(total / divisor, total, divisor)


def weighted(elements: Tensor, weight: Tensor | None, by_weight: bool) -> Reduced:
    """Losses of elements with weights: divided by the weights, or by the number of elements."""
    total = (elements if weight is None else elements * weight).sum()
    divisor = weight.sum() if by_weight and weight is not None else scalar(elements.numel(), total)
    return Reduced(total / divisor, total, divisor)
