"""Accuracies: the share of elements, or of entries, whose decision is that of the target. `w` weight, `m` mask."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from lossledger import losses
from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.metrics.metric import LayoutMetric, mean_sums
from lossledger.values import shape_of


def cut(threshold: float, from_logits: bool, where: str) -> float:
    """The threshold of probabilities, in the space of the output.

    Raises:
        InputError: a threshold outside (0, 1).

    Example:
        >>> cut(0.5, True, "accuracy")
        0.0
    """
    if not 0 < threshold < 1:
        raise InputError(
            f"{where}: threshold must be between 0 and 1, it is compared with probabilities; received {threshold!r}."
        )
    return math.log(threshold) - math.log1p(-threshold) if from_logits else threshold


def undefined(batch: Aligned) -> Tensor:
    """Where a NaN of the output, or of a floating target, leaves a decision open, `[B, d…, C]`."""
    nan = batch.prediction.raw.isnan()
    return nan | batch.y_true.isnan() if batch.y_true.shape == nan.shape else nan


def decision(batch: Aligned) -> tuple[Tensor, Tensor]:
    """The class of the largest output, `[B, d…]`, and where a NaN leaves it open.

    Raises:
        InputError: a single class, of which every prediction would be right.
    """
    raw = batch.prediction.raw
    if raw.shape[-1] < 2:
        raise InputError(
            f"{batch.where}: expected an output with at least 2 classes, received shape {shape_of(raw)}. For one "
            "column use a threshold: BinaryAccuracy, or IoU(from_logits='sigmoid')."
        )
    return raw.argmax(-1), undefined(batch).any(-1)


def outside(labels: Tensor, classes: int) -> Tensor:
    """Where a label is no class."""
    return (labels < 0) | (labels >= classes)


@final
class BinaryAccuracy(LayoutMetric):
    """Share of elements on the right side of the threshold: `Σ w·m·[(p > t) = (y > ½)] / Σ w·m`.

    Args:
        name: name of the metric.
        threshold: `t` in (0, 1), compared with probabilities.
        from_logits: `True` when the output is logits: they are compared with `log(t / (1 − t))`.
        axis: class axis of the output; it only says where the axes of weights and masks belong.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`. Statistics `[2]`.

    Returns of a call: a float; NaN when nothing counted.

    Divides by: Σ w·m over the elements.

    Raises:
        InputError: shapes that differ, a threshold outside (0, 1); in a call also targets or probabilities
            outside [0, 1].

    Example:
        >>> BinaryAccuracy()([[1.0], [0.0], [1.0]], [[0.75], [0.25], [0.5]], sample_weight=[1.0, 1.0, 2.0])
        0.5

    Source: keras.metrics.BinaryAccuracy 3.15, where a soft target is never met: it is compared without a threshold.
    """

    def __init__(
        self, name: str = "binary_accuracy", threshold: float = 0.5, from_logits: bool = False, axis: int = -1
    ) -> None:
        super().__init__(name, losses.BinaryCrossentropy(from_logits, axis=axis))
        self.axis = axis
        self.threshold = threshold
        self.from_logits = from_logits
        self._cut = cut(threshold, from_logits, name)

    def _sums(self, batch: Aligned) -> Tensor:
        raw = batch.prediction.raw
        right = (raw > self._cut) == (batch.y_true > 0.5)
        return mean_sums(torch.where(undefined(batch), math.nan, right.to(raw.dtype)), batch.weighting)


@final
class CategoricalAccuracy(LayoutMetric):
    """Share of entries whose largest output is the class of a one-hot target: `Σ w·m·[argmax p = argmax y] / Σ w·m`.

    Logits and probabilities give the same value.

    Args:
        name: name of the metric.
        axis: class axis of the output and the target; all but the batch axis are possible.

    Shapes: targets and output `[B, d…, K]`; weights and masks `[B, d…]`. Statistics `[2]`.

    Returns of a call: a float; NaN when nothing counted.

    Divides by: Σ w·m over the entries.

    Raises:
        InputError: shapes that differ, a single class; in a call also targets outside [0, 1].

    Example:
        >>> CategoricalAccuracy()([[0, 1], [1, 0]], [[0.1, 0.9], [0.3, 0.7]])
        0.5

    Source: keras.metrics.CategoricalAccuracy 3.15.
    """

    def __init__(self, name: str = "categorical_accuracy", axis: int = -1) -> None:
        super().__init__(name, losses.CategoricalCrossentropy(from_logits=True, axis=axis))
        self.axis = axis

    def _sums(self, batch: Aligned) -> Tensor:
        chosen, undecided = decision(batch)
        right = (chosen == batch.y_true.argmax(-1)).to(batch.prediction.raw.dtype)
        return mean_sums(torch.where(undecided, math.nan, right).unsqueeze(-1), batch.weighting)


@final
class SparseCategoricalAccuracy(LayoutMetric):
    """Share of entries whose largest output is the integer label: `Σ w·m·[argmax p = y] / Σ w·m`.

    Logits and probabilities give the same value.

    Args:
        name: name of the metric.
        ignore_class: a label whose entries do not count, in the divisor either.
        axis: class axis of the output.

    Shapes: labels `[B, d…]` or `[B, d…, 1]`, output `[B, d…, K]`; weights and masks `[B, d…]`. Statistics `[2]`.

    Returns of a call: a float; NaN when nothing counted.

    Divides by: Σ w·m over the entries whose label is not `ignore_class`.

    Raises:
        InputError: shapes that do not fit, a single class; in a call also labels outside 0 … K−1.

    Example:
        >>> SparseCategoricalAccuracy(ignore_class=-1)([1, 1, -1], [[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]])
        0.5

    Source: keras.metrics.SparseCategoricalAccuracy 3.15, which has no `ignore_class`.
    """

    def __init__(
        self, name: str = "sparse_categorical_accuracy", ignore_class: int | None = None, axis: int = -1
    ) -> None:
        super().__init__(name, losses.SparseCategoricalCrossentropy(True, ignore_class, axis=axis))
        self.ignore_class = ignore_class
        self.axis = axis

    def _sums(self, batch: Aligned) -> Tensor:
        chosen, undecided = decision(batch)
        raw = batch.prediction.raw
        right = (chosen == batch.y_true).to(raw.dtype)
        bad = undecided | outside(batch.y_true, raw.shape[-1])
        return mean_sums(torch.where(bad, math.nan, right).unsqueeze(-1), batch.weighting)
