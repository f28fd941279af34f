"""Metrics by name; what a name leaves open (logits, class axis, labels) is read from the loss of the same output."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lossledger import losses
from lossledger.errors import InputError, InputTypeError, UnknownNameError
from lossledger.frameworks import refuse_tensorflow
from lossledger.losses.arguments import arguments, check_made
from lossledger.losses.expression import Expression
from lossledger.losses.loss import Loss
from lossledger.losses.ratio import Overlap
from lossledger.losses.registry import NAMES as LOSSES
from lossledger.metrics.accuracy import BinaryAccuracy, CategoricalAccuracy, SparseCategoricalAccuracy
from lossledger.metrics.metric import Metric
from lossledger.metrics.overlap import Activation, DiceScore, IoU
from lossledger.metrics.regression import (
    MeanAbsoluteError,
    MeanMetric,
    MeanOfLoss,
    MeanSquaredError,
    RootMeanSquaredError,
)
from lossledger.metrics.stateful import KerasMetric, Stateful, TorchMetric, is_keras_metric, is_torchmetrics


@dataclass(frozen=True, slots=True)
class Output:
    """What a loss says of the output that it reads.

    Args:
        target: `"columns"` (a mask a class), `"one_hot"` or `"labels"` (exclusive classes).
        logits: whether columns are logits.
        axis: class axis.
        ignore_class: the label that does not count.
    """

    target: Literal["columns", "one_hot", "labels"]
    logits: bool = False
    axis: int = -1
    ignore_class: int | None = None


def read_output(loss: Loss | Expression | None) -> Output | None:
    """What the loss says of its output; `None` when it does not say, or when its terms disagree.

    Cross-entropies are asked before overlap losses: a Dice loss of probabilities does not know if classes exclude
    each other.

    Example:
        >>> read_output(losses.BinaryCrossentropy(from_logits=True) + losses.Dice(from_logits="sigmoid"))
        Output(target='columns', logits=True, axis=-1, ignore_class=None)
    """
    terms = _terms_of(loss)
    overlaps = [part for part in terms if _is_overlap(part)]
    others = [part for part in terms if not _is_overlap(part)]
    for parts in (others, overlaps):
        found = {output for output in map(_read_term, parts) if output is not None}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _terms_of(loss: Loss | Expression | None) -> list[Loss]:
    if loss is None:
        return []
    return [part for _, part in loss] if isinstance(loss, Expression) else [loss]


def _is_overlap(loss: Loss) -> bool:
    return isinstance(loss, Overlap)


def _read_term(loss: Loss) -> Output | None:
    if isinstance(loss, losses.TorchLoss):
        return _read_torch(loss.module)
    if getattr(loss, "from_logits", None) == "softmax" or isinstance(loss, losses.LovaszSoftmax):
        return Output("one_hot")
    axis = getattr(loss, "axis", -1)
    axis = axis if isinstance(axis, int) and not _is_overlap(loss) else -1
    if loss.classes_are == "column":
        return Output("columns", loss.space == "logits", axis)
    if isinstance(loss, losses.SparseCategoricalCrossentropy):
        return Output("labels", axis=axis, ignore_class=loss.ignore_class)
    if isinstance(loss, losses.CategoricalCrossentropy):
        return Output("one_hot", axis=axis)
    return None


def _read_torch(module: nn.Module) -> Output | None:
    """The same of torch's losses, whose class axis is 1."""
    if isinstance(module, nn.BCEWithLogitsLoss | nn.MultiLabelSoftMarginLoss):
        return Output("columns", logits=True, axis=1)
    if isinstance(module, nn.BCELoss):
        return Output("columns", axis=1)
    if isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss):
        return Output("labels", axis=1, ignore_class=module.ignore_index)
    return Output("labels", axis=1) if isinstance(module, nn.MultiMarginLoss) else None


def _accuracy(name: str, loss: Loss | Expression | None) -> Metric:
    output = read_output(loss)
    # Probabilities under a Dice loss may come from a sigmoid or a softmax.
    if output is None or (output == Output("columns") and _only_overlaps(loss)):
        raise InputError(
            f"{name!r} can mean several metrics, and the loss {loss!r} does not tell which. Name one: "
            "'binary_accuracy' (a threshold for each column), 'categorical_accuracy' (one-hot targets) or "
            "'sparse_categorical_accuracy' (integer labels)."
        )
    kinds = {"columns": _binary, "one_hot": _categorical, "labels": _sparse}
    return kinds[output.target](name, output)


def _only_overlaps(loss: Loss | Expression | None) -> bool:
    """Whether nothing but an overlap loss tells of the output."""
    return all(_is_overlap(part) or _read_term(part) is None for part in _terms_of(loss))


def _binary(name: str, output: Output | None) -> Metric:
    if output is None or output.target != "columns":
        return BinaryAccuracy(name)
    return BinaryAccuracy(name, from_logits=output.logits, axis=output.axis)


def _categorical(name: str, output: Output | None) -> Metric:
    return CategoricalAccuracy(name, -1 if output is None else output.axis)


def _sparse(name: str, output: Output | None) -> Metric:
    if output is None:
        return SparseCategoricalAccuracy(name)
    return SparseCategoricalAccuracy(name, output.ignore_class, output.axis)


def _overlap(kind: type[IoU] | type[DiceScore]) -> Callable[[str, Output | None], Metric]:
    def build(name: str, output: Output | None) -> Metric:
        if output is None:
            return kind(name=name)
        activation: Activation = "softmax"
        if output.target == "columns":
            activation = "sigmoid" if output.logits else False
        sparse = output.target == "labels"
        return kind(activation, axis=output.axis, sparse_labels=sparse, name=name, ignore_class=output.ignore_class)

    return build


def _plain(kind: Callable[[str], Metric]) -> Callable[[str, Output | None], Metric]:
    return lambda name, output: kind(name)


_KINDS: dict[tuple[str, ...], Callable[[str, Output | None], Metric]] = {
    ("binary_accuracy", "BinaryAccuracy"): _binary,
    ("categorical_accuracy", "CategoricalAccuracy"): _categorical,
    ("sparse_categorical_accuracy", "SparseCategoricalAccuracy"): _sparse,
    ("iou", "IoU"): _overlap(IoU),
    ("dice", "DiceScore"): _overlap(DiceScore),
    ("mae", "MAE", "mean_absolute_error", "MeanAbsoluteError"): _plain(MeanAbsoluteError),
    ("mse", "MSE", "mean_squared_error", "MeanSquaredError"): _plain(MeanSquaredError),
    ("rmse", "RMSE", "root_mean_squared_error", "RootMeanSquaredError"): _plain(RootMeanSquaredError),
}
_NAMES = {name: build for names, build in _KINDS.items() for name in names}
_ACCURACY = ("accuracy", "acc", "Accuracy")
# Losses whose entries Keras takes the mean of under the same names.
_OF_LOSSES = (
    losses.BinaryCrossentropy,
    losses.CategoricalCrossentropy,
    losses.SparseCategoricalCrossentropy,
    losses.KLDivergence,
    losses.Poisson,
    losses.MeanAbsolutePercentageError,
    losses.MeanSquaredLogarithmicError,
    losses.LogCosh,
    losses.Hinge,
    losses.SquaredHinge,
    losses.CategoricalHinge,
)
_LOSSES = {name: kind for name, kind in LOSSES.items() if kind in _OF_LOSSES}
# What Keras calls by a name, in small letters and without signs; torchmetrics has the like.
_OF_KERAS = {
    kind.lower(): kind
    for kind in (
        "AUC",
        "Precision",
        "Recall",
        "F1Score",
        "FBetaScore",
        "R2Score",
        "CosineSimilarity",
        "TopKCategoricalAccuracy",
        "SparseTopKCategoricalAccuracy",
        "TruePositives",
        "TrueNegatives",
        "FalsePositives",
        "FalseNegatives",
        "PrecisionAtRecall",
        "RecallAtPrecision",
        "SensitivityAtSpecificity",
        "SpecificityAtSensitivity",
    )
} | {"f1": "F1Score", "r2": "R2Score"}


def _of_loss(name: str, kind: type[Loss], loss: Loss | Expression | None) -> Metric:
    """The mean of the entries of a loss, of the output as the given loss reads it."""
    output, takes = read_output(loss), arguments(kind.__init__)
    known: dict[str, Any] = {}
    if "from_logits" in takes:
        known["from_logits"] = any(map(_reads_logits, _terms_of(loss)))
    if output is not None:
        known |= {n: getattr(output, n) for n in ("axis", "ignore_class") if n in takes}
    return MeanOfLoss(kind(**known), name)


def _reads_logits(loss: Loss) -> bool:
    # Logarithms of probabilities, which NLLLoss takes, are logits too.
    kinds = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, nn.CrossEntropyLoss, nn.NLLLoss)
    return isinstance(loss.module, kinds) if isinstance(loss, losses.TorchLoss) else loss.space == "logits"


def _meant(name: str) -> str:
    """What a name that is no metric here may mean, in a sentence; "" where nobody knows."""
    plain = re.sub("[^a-z0-9]", "", name.lower())
    if plain in ("meaniou", "binaryiou", "onehotiou", "onehotmeaniou", "jaccard"):
        return "Did you mean 'iou', by class, whose mean is that of the classes?"
    kind = _OF_KERAS.get(plain)
    return f"Metrics of Keras and of torchmetrics are taken as objects: keras.metrics.{kind}(…)." if kind else ""


def known(name: str) -> bool:
    """Whether `get` knows a metric of that name.

    Example:
        >>> known("mae"), known("median")
        (True, False)
    """
    return name in _NAMES or name in _ACCURACY or name in _LOSSES


def get(identifier: Any, loss: Any = None) -> Metric | Stateful:
    """A metric from a name, a function, an object of torchmetrics or Keras, or a metric itself.

    Args:
        identifier: for example `"accuracy"`, `"iou"`, `IoU(absent="one")`, `torchmetrics.F1Score("binary")`,
            `keras.metrics.AUC()`, a function of `(y_true, y_pred)`, a loss (the mean of its entries).
        loss: the loss of the same output, anything `losses.get` takes. `"accuracy"` needs it to choose among binary,
            categorical and sparse; other names read logits, class axis and `ignore_class` from it, and keep their
            defaults where it does not say. torch's `CrossEntropyLoss` is taken to have integer labels.

    Returns:
        the metric; one made from a name has that name, as Keras's history keys have.

    Raises:
        UnknownNameError: a name that is no metric, with a suggestion.
        InputError: `"accuracy"` with a loss that does not tell which one is meant.
        InputTypeError: something that cannot be a metric.

    Example:
        >>> get("accuracy", losses.BinaryCrossentropy(from_logits=True))
        BinaryAccuracy(name='accuracy', axis=-1, threshold=0.5, from_logits=True)
    """
    if isinstance(identifier, Metric | Stateful):
        check_made(identifier, "Metric", "name")
        return identifier
    if isinstance(identifier, str):
        chosen = None if loss is None else losses.get(loss)
        if identifier in _ACCURACY:
            return _accuracy(identifier, chosen)
        if identifier in _LOSSES:
            return _of_loss(identifier, _LOSSES[identifier], chosen)
        if identifier not in _NAMES:
            raise UnknownNameError("metric", identifier, [*_NAMES, *_ACCURACY, *_LOSSES], meant=_meant(identifier))
        return _NAMES[identifier](identifier, read_output(chosen))
    if is_torchmetrics(identifier):
        return TorchMetric(identifier)
    refuse_tensorflow(identifier, "metric")
    if is_keras_metric(identifier):
        return KerasMetric(identifier)
    if isinstance(identifier, type):
        raise InputTypeError(
            f"Expected a metric, received the class {identifier.__name__}. Make an instance: {identifier.__name__}()."
        )
    return _from_callable(identifier)


def _from_callable(fn: Any) -> Metric:
    if hasattr(fn, "update_state"):
        raise InputTypeError(
            f"Expected a metric, received {type(fn).__name__}, which has an update_state as metrics of Keras have, but "
            "does not inherit from keras.metrics.Metric. Let it, or subclass lossledger.metrics.Metric."
        )
    if isinstance(fn, Loss):
        return MeanMetric(fn.call, fn.name)
    if not callable(fn):
        raise InputTypeError(
            f"A metric must be a name, a Metric, a torchmetrics object or a function; received {type(fn).__name__}."
        )
    return MeanMetric(fn)
