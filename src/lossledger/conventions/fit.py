"""One epoch of `fit` in the Keras family: batches, class weights, regularizers, and what the epoch reports."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossledger.conventions.common import FrameworkError, NotSupported, Reduced, key, tensor

BatchLoss = Callable[..., Reduced]
_OWN = {
    "batch_size",
    "loss_weights",
    "reg",
    "regularization",
    "kernel_regularizer",
    "activity_regularizer",
    "activation",
}


@dataclass(frozen=True, slots=True)
class Rules:
    """How a branch of Keras runs an epoch.

    Args:
        name: of the branch.
        loss: the loss of a batch.
        by_size: batch losses count by the size of their batch; otherwise each counts once.
        class_weight: from targets, class weights and sample weights to the weights of samples.
        sees_logits: the loss recovers the logits behind a sigmoid or softmax layer.
        loss_weight_error: what a missing output in `loss_weights` raises; `None`: it has the weight 1.
        extra_metric: a metric that a superfluous loss leaves behind.
        expands_targets: targets (N,) become (N, 1) against outputs (N, C), weights with them.
    """

    name: str
    loss: BatchLoss
    by_size: bool = True
    class_weight: Callable[[Any, Mapping[str, float], Any], Any] | None = None
    sees_logits: bool = False
    loss_weight_error: str | None = None
    extra_metric: str | None = None
    expands_targets: bool = False


@dataclass(slots=True)
class _Epoch:
    """Losses of batches by output, with their sizes."""

    sizes: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, name: str, by_size: bool) -> float:
        return float(np.average(self.values[name], weights=self.sizes if by_size else None))


def _labels(y: Tensor) -> Tensor:
    if y.ndim > 1:
        y = y.argmax(-1) if y.shape[-1] != 1 else y.squeeze(-1)
    return y.round().long()


def keras3_class_weight(y_true: Any, class_weight: Mapping[str, float], sample_weight: Any) -> Any:
    """Class weights as sample weights; a missing class has the weight 1.

    Raises:
        FrameworkError: ValueError together with sample weights, TypeError for more than one label a sample.
    """
    if sample_weight is not None:
        raise FrameworkError("ValueError", "You cannot pass class_weight and sample_weight together.")
    labels = _labels(tensor(y_true))
    if labels.ndim != 1:
        raise FrameworkError("TypeError", "one label a sample is needed")
    return [float({int(k): v for k, v in class_weight.items()}.get(int(label), 1.0)) for label in labels]


def tf_keras_class_weight(y_true: Any, class_weight: Mapping[str, float], sample_weight: Any) -> Any:
    """Class weights times sample weights; the classes must be 0 to K − 1.

    Raises:
        FrameworkError: ValueError for other classes, InvalidArgumentError for a label without a weight.
    """
    weights = {int(k): float(v) for k, v in class_weight.items()}
    if sorted(weights) != list(range(len(weights))):
        raise FrameworkError("ValueError", "class_weight must have the keys 0 to the number of classes - 1")
    y = tensor(y_true)
    if y.ndim > 2:
        raise FrameworkError("ValueError", "class_weight needs targets of at most two axes")
    labels = _labels(y)
    if bool(((labels < 0) | (labels >= len(weights))).any()):
        raise FrameworkError("InvalidArgumentError", "a label has no class weight")
    found = torch.tensor([weights[int(label)] for label in labels])
    return found if sample_weight is None else found * tensor(sample_weight)


def classic_class_weight(y_true: Any, class_weight: Mapping[str, float], sample_weight: Any) -> Any:
    """Class weights where there are no sample weights.

    Raises:
        FrameworkError: ValueError for a label without a weight.
    """
    if sample_weight is not None:
        return sample_weight
    weights = {int(k): float(v) for k, v in class_weight.items()}
    labels = _labels(tensor(y_true))
    if any(int(label) not in weights for label in labels):
        raise FrameworkError("ValueError", "class_weight must contain all classes in the data")
    return [weights[int(label)] for label in labels]


def _numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"(?<![\w*])\d+(?:\.\d*)?(?:e-?\d+)?|(?<![\w*])\.\d+", text)]


def _penalty(text: str, values: Sequence[float] | Tensor) -> float:
    """A regularizer written `L2(0.1)` of some values."""
    match = re.match(r"\s*(l1l2|l1|l2)\s*\(([^)]*)\)", text.lower())
    if match is None:
        raise NotSupported(f"no regularizer {text!r}")
    x, factors = torch.as_tensor(values, dtype=torch.float64), _numbers(match[2])
    if match[1] == "l1l2":
        l1, l2 = (*factors, 0.0, 0.0)[:2]
    else:
        l1, l2 = (factors[0], 0.0) if match[1] == "l1" else (0.0, factors[0])
    return float(l1 * x.abs().sum() + l2 * x.square().sum())


def _constant_penalty(options: Mapping[str, Any]) -> float:
    """Penalties that do not depend on the data: of a kernel, of a product, or given numbers."""
    total = float(np.sum(options.get("regularization", 0.0)))
    if "kernel_regularizer" in options:
        text = options["kernel_regularizer"]
        total += _penalty(text, _numbers(text.split("kernel=", 1)[1] if "kernel=" in text else "1"))
    if "reg" in options:
        text = str(options["reg"]).split(" on ")[0]
        match = re.fullmatch(r"\s*([\d.eE+-]+)(?:\s*\*\s*([\d.]+)(?:\s*\*\*\s*(\d+))?)?\s*", text)
        if match is None:
            raise NotSupported(f"no regularizer {text!r}")
        total += float(match[1]) * float(match[2] or 1) ** int(match[3] or 1)
    return total


def _activity(options: Mapping[str, Any], outputs: Any) -> float:
    if "activity_regularizer" not in options:
        return 0.0
    values = tensor(outputs)
    return _penalty(options["activity_regularizer"], values) / len(values)


def _depth(value: Any) -> int:
    return int(np.ndim(value))


def outputs_of(case: Mapping[str, Any]) -> list[str] | None:
    """Names of the outputs of a case with several, `None` for one output."""
    loss, y_pred = case["loss"], case["y_pred"]
    for part in (loss, y_pred, case["y_true"]):
        if isinstance(part, Mapping):
            return list(part)
    if not isinstance(loss, list) or len(loss) != len(y_pred):
        return None
    several = "loss_weights" in case["kwargs"] or _depth(y_pred[0]) > 1
    return [chr(ord("a") + i) for i in range(len(loss))] if several else None


def part_of(value: Any, name: str, index: int, names: Sequence[str], nested: bool = True) -> Any:
    """What belongs to one of several outputs."""
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, list) and nested and len(value) == len(names):
        return value[index]
    return value


def loss_weight(options: Mapping[str, Any], name: str, index: int, error: str | None) -> float:
    """λ of an output."""
    weights = options.get("loss_weights")
    if weights is None or isinstance(weights, int | float):
        return 1.0 if weights is None else float(weights)
    if isinstance(weights, Mapping):
        if name not in weights and error is not None:
            raise FrameworkError(error, f"loss_weights has no {name!r}")
        return float(weights.get(name, 1.0))
    return float(weights[index])


def _prepared(case: Mapping[str, Any], rules: Rules, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Targets and predictions of one output as the loss sees them, and its options."""
    y_pred, y_true = tensor(case["y_pred"]), tensor(case["y_true"])
    activation = options.get("activation")
    rest = {k: v for k, v in options.items() if k not in _OWN}
    if activation is not None:
        if activation not in ("softmax", "sigmoid"):
            raise NotSupported(f"no activation {activation!r}")
        if rules.sees_logits and "crossentropy" in key(str(case["loss"])):
            rest["from_logits"] = True
        else:
            y_pred = y_pred.softmax(-1) if activation == "softmax" else y_pred.sigmoid()
    if rules.expands_targets and y_true.ndim == 1 and y_pred.ndim == 2:
        y_true = y_true.unsqueeze(-1)
    return y_true, y_pred, rest


def _batches(case: Mapping[str, Any], rules: Rules) -> list[tuple[int, float, float]]:
    """Size, loss and activity penalty of each batch of one output."""
    options = dict(case["kwargs"])
    weight = case.get("sample_weight")
    if case.get("class_weight") is not None:
        if rules.class_weight is None:
            raise NotSupported(f"{rules.name}: class_weight")
        weight = rules.class_weight(case["y_true"], case["class_weight"], weight)
    y_true, y_pred, rest = _prepared(case, rules, options)
    size = int(options.get("batch_size", 32))
    found = []
    for start in range(0, len(y_pred), size):
        part = slice(start, start + size)
        w = None if weight is None else tensor(weight)[part]
        m = None if case.get("mask") is None else torch.as_tensor(case["mask"])[part]
        value = rules.loss(case["loss"], rest, y_true[part], y_pred[part], w, m).value
        if value.numel() != 1:
            raise FrameworkError("RuntimeError", "fit needs a loss of one number")
        found.append((len(y_pred[part]), float(value), _activity(options, y_pred[part])))
    return found


def fit(case: Mapping[str, Any], rules: Rules) -> dict[str, float]:
    """What an epoch reports: `loss`, and the loss of each of several outputs."""
    names = outputs_of(case)
    constant = _constant_penalty(case["kwargs"])
    if names is not None:
        return _fit_several(case, rules, names, constant)
    loss, extra = case["loss"], {}
    if isinstance(loss, list):
        if len(loss) > 1 and rules.extra_metric:
            extra = {rules.extra_metric: 0.0}
        loss = loss[0]
    epoch = _Epoch(values={"loss": []})
    factor = loss_weight(case["kwargs"], "", 0, None)
    for size, value, activity in _batches({**case, "loss": loss}, rules):
        epoch.sizes.append(size)
        epoch.values["loss"].append(factor * value + constant + activity)
    return {**extra, "loss": epoch.mean("loss", rules.by_size)}


def _fit_several(case: Mapping[str, Any], rules: Rules, names: list[str], constant: float) -> dict[str, float]:
    if case.get("class_weight") is not None:
        raise FrameworkError("ValueError", "class_weight needs one output")
    epoch = _Epoch()
    totals: list[float] = []
    for index, name in enumerate(names):
        one = {k: part_of(case.get(k), name, index, names) for k in ("loss", "y_pred", "sample_weight", "mask")}
        shared = _depth(case["y_true"]) == _depth(one["y_pred"]) if not isinstance(case["y_true"], Mapping) else False
        one["y_true"] = part_of(case["y_true"], name, index, names, nested=not shared)
        if one["loss"] is None:
            continue
        factor = loss_weight(case["kwargs"], name, index, rules.loss_weight_error)
        batches = _batches({**case, **one, "class_weight": None}, rules)
        epoch.sizes = [size for size, _, _ in batches]
        epoch.values[f"{name}_loss"] = [value for _, value, _ in batches]
        totals = totals or [constant] * len(batches)
        totals = [t + factor * value + activity for t, (_, value, activity) in zip(totals, batches, strict=True)]
    epoch.values["loss"] = totals
    return {name: epoch.mean(name, rules.by_size) for name in epoch.values}


def total(case: Mapping[str, Any], rules: Rules) -> float:
    """The number whose gradient a step takes: Σ λ·loss over outputs, plus the penalties."""
    reported = fit({**case, "kwargs": {**case["kwargs"], "batch_size": 2**31}}, rules)
    return reported["loss"]
