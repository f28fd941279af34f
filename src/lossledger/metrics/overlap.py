"""Overlap of hard decisions by class: intersection over union, and Dice (F1).

With the weighted sums over all entries of a class, `I` where target and prediction agree on it, `T` of the target and
`P` of the prediction:

    IoU = I / (T + P − I)        Dice = 2·I / (T + P)

The sums are of the whole data set: never a mean of values per batch or per image.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from math import prod
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossledger import losses
from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.loss import Loss
from lossledger.metrics.accuracy import cut, decision, outside, undefined
from lossledger.metrics.metric import LayoutMetric, Result, Statistics

Activation = Literal[False, "sigmoid", "softmax"]
"""How the output becomes a decision: probabilities or logits with a threshold, or the largest of exclusive classes."""

Absent = Literal["skip", "zero", "one", "nan"]
"""What a class counts that is in neither target nor prediction."""

_ABSENT: dict[str, float] = {"skip": math.nan, "zero": 0.0, "one": 1.0, "nan": math.nan}


class _OverlapMetric(LayoutMetric):
    """Statistics `[4, K]`: I, T, P and the weight that was looked at, which tells an empty class from no data."""

    def __init__(
        self,
        from_logits: Activation,
        threshold: float,
        axis: int,
        sparse_labels: bool,
        ignore_class: int | None,
        absent: Absent,
        name: str,
    ) -> None:
        if from_logits not in (False, "sigmoid", "softmax"):
            raise InputError(
                f"{name}: from_logits must be False, 'sigmoid' (independent masks) or 'softmax' (exclusive classes); "
                f"received {from_logits!r}."
            )
        if sparse_labels and from_logits == "sigmoid":
            raise InputError(
                f"{name}: expected exclusive classes with sparse_labels=True, received from_logits='sigmoid'. Use "
                "'softmax', or give the target as one mask a class."
            )
        if ignore_class is not None and not sparse_labels:
            raise InputError(
                f"{name}: ignore_class={ignore_class!r} is a label; expected sparse_labels=True with it. For masks, "
                "pass mask."
            )
        if absent not in _ABSENT:
            raise InputError(f"{name}: absent must be one of {', '.join(_ABSENT)}; received {absent!r}.")
        self._cut = cut(threshold, from_logits == "sigmoid", name)
        super().__init__(name, _layout(from_logits, axis, sparse_labels, ignore_class))
        self.from_logits = from_logits
        self.threshold = threshold
        self.axis = axis
        self.sparse_labels = sparse_labels
        self.ignore_class = ignore_class
        self.absent = absent

    def _sums(self, batch: Aligned) -> Tensor:
        if self.sparse_labels:
            return _exclusive_sums(batch, batch.y_true.long())
        if self.from_logits == "softmax":
            return _exclusive_sums(batch, batch.y_true.argmax(-1))
        return _column_sums(batch, self._cut)

    @abstractmethod
    def _ratio(self, both: Any, true: Any, predicted: Any) -> tuple[Any, Any]:
        """Numerator and divisor by class; the divisor is 0 only for an absent class."""

    def result(self, statistics: Statistics) -> Result:
        """The mean over the classes and the value of each class of a whole."""
        both, true, predicted, weight = np.asarray(statistics, dtype=np.float64)
        numerator, divisor = self._ratio(both, true, predicted)
        absent = divisor == 0
        values: NDArray[np.float64] = np.where(absent, _ABSENT[self.absent], numerator / np.where(absent, 1.0, divisor))
        if not weight.any():
            values = np.full_like(values, math.nan)
        counted = values[~absent] if self.absent == "skip" else values
        return Result(float(counted.mean()) if counted.size else math.nan, tuple(values.tolist()))


def _layout(from_logits: Activation, axis: int, sparse_labels: bool, ignore_class: int | None) -> Loss:
    """The loss that reads the same targets and output."""
    if sparse_labels:
        return losses.SparseCategoricalCrossentropy(True, ignore_class, axis=axis)
    if from_logits == "softmax":
        return losses.CategoricalCrossentropy(True, axis=axis)
    return losses.BinaryCrossentropy(bool(from_logits), axis=axis)


def _column_sums(batch: Aligned, threshold: float) -> Tensor:
    """The statistics of independent columns, each with a threshold."""
    raw, product, shape = batch.prediction.raw, batch.weighting.product, batch.weighting.shape
    true, predicted = batch.y_true > 0.5, raw > threshold
    axes = tuple(range(raw.ndim - 1))
    addends = [true & predicted, true, predicted]
    if product is not None:
        addends = [*(addend * product for addend in addends), product.expand(shape)]
    rows = [addend.sum(axes, dtype=torch.float64) for addend in addends]
    if product is None:
        rows.append(rows[0].new_full(shape[-1:], prod(shape[:-1])))
    sums = torch.stack(rows)
    return torch.where(undefined(batch).any(axes), math.nan, sums)


def _exclusive_sums(batch: Aligned, labels: Tensor) -> Tensor:
    """The statistics of exclusive classes, of which each entry has one."""
    classes = batch.prediction.raw.shape[-1]
    chosen, undecided = decision(batch)
    bad = undecided | outside(labels, classes)
    # An index out of range would stop the device; the sums become NaN instead.
    labels = labels.clamp(0, classes - 1)
    weight = torch.ones(labels.shape, dtype=torch.float64, device=labels.device)
    if batch.weighting.product is not None:
        weight = weight * batch.weighting.product.squeeze(-1)
    sums = weight.new_zeros(4, classes)
    for row, index, addend in ((0, labels, weight * (labels == chosen)), (1, labels, weight), (2, chosen, weight)):
        sums[row].index_add_(0, index.reshape(-1), addend.reshape(-1))
    sums[3] = weight.sum()
    return torch.where(bad.any(), math.nan, sums)


@final
class IoU(_OverlapMetric):
    """Intersection over union (Jaccard index) of each class, and its mean: `I / (T + P − I)`.

    Args:
        from_logits: `False` for probabilities and `"sigmoid"` for logits: each column against the threshold;
            `"softmax"`: the largest output, of logits or probabilities alike, against the largest target.
        threshold: in (0, 1), compared with probabilities; has no part in exclusive classes.
        axis: class axis of the output; all but the batch axis are possible.
        sparse_labels: the target holds one integer label an entry; classes are then exclusive.
        absent: a class in neither target nor prediction is left out of the mean (`"skip"`), counts 0 or 1 (`"zero"`,
            `"one"`), or makes the mean NaN (`"nan"`).
        name: name of the metric.
        ignore_class: a label whose entries do not count.

    Shapes: targets and output `[B, d…, K]`, or labels `[B, d…]`; weights and masks `[B, d…]`. Statistics `[4, K]`.

    Returns of a call: the mean as a float; `result` has `by_class`. NaN for a skipped class and when nothing counted.

    Divides by: the union of each class over the whole data, then the number of classes in the mean.

    Raises:
        InputError: shapes or options that do not fit; in a call also targets, labels or probabilities out of range.

    Example:
        >>> iou = IoU(sparse_labels=True)
        >>> output = torch.eye(3)[[0, 1, 1]]
        >>> iou.result(iou.statistics(torch.tensor([0, 0, 1]), output))
        Result(value=0.5, by_class=(0.5, 0.5, nan))

    Source: Jaccard 1912; keras.metrics.MeanIoU 3.15 skips absent classes too.
    """

    def __init__(
        self,
        from_logits: Activation = False,
        threshold: float = 0.5,
        axis: int = -1,
        sparse_labels: bool = False,
        absent: Absent = "skip",
        name: str = "iou",
        ignore_class: int | None = None,
    ) -> None:
        super().__init__(from_logits, threshold, axis, sparse_labels, ignore_class, absent, name)

    def _ratio(self, both: Any, true: Any, predicted: Any) -> tuple[Any, Any]:
        return both, true + predicted - both


@final
class DiceScore(_OverlapMetric):
    """Dice score (F1) of the hard decisions of each class, and its mean: `2·I / (T + P)`.

    Not the Dice loss, which compares probabilities: `1 − loss` is close to this score only for sure predictions.

    Args:
        from_logits: as for `IoU`.
        threshold: as for `IoU`.
        axis: class axis of the output.
        sparse_labels: the target holds one integer label an entry.
        absent: what a class counts that is in neither target nor prediction, as for `IoU`.
        name: name of the metric.
        ignore_class: a label whose entries do not count.

    Shapes: targets and output `[B, d…, K]`, or labels `[B, d…]`; weights and masks `[B, d…]`. Statistics `[4, K]`.

    Returns of a call: the mean as a float; `result` has `by_class`. NaN for a skipped class and when nothing counted.

    Divides by: T + P of each class over the whole data, then the number of classes in the mean.

    Raises:
        InputError: as `IoU`.

    Example:
        >>> round(DiceScore()([[1.0], [1.0], [0.0]], [[0.9], [0.2], [0.1]]), 4)
        0.6667

    Source: Dice 1945; F1 by class with macro average.
    """

    def __init__(
        self,
        from_logits: Activation = False,
        threshold: float = 0.5,
        axis: int = -1,
        sparse_labels: bool = False,
        absent: Absent = "skip",
        name: str = "dice",
        ignore_class: int | None = None,
    ) -> None:
        super().__init__(from_logits, threshold, axis, sparse_labels, ignore_class, absent, name)

    def _ratio(self, both: Any, true: Any, predicted: Any) -> tuple[Any, Any]:
        return 2 * both, true + predicted
