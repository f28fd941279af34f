"""Losses of margins: an output is right when it is on the right side by at least 1.

`y` targets, `p` outputs (scores without a sigmoid or softmax).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.classification import column_weight
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.prediction import Space
from lossledger.reduction import Reduction
from lossledger.values import check_targets, unwrapped
from lossledger.weighting import ClassWeight, class_vector


class _Margin(ElementLoss):
    """Independent columns with a label each, 0 or 1, or −1 or 1."""

    classes_are: ClassVar[str | None] = "column"
    space: Space = "logits"

    def class_count(self, y_pred: Tensor, class_weight: ClassWeight) -> int:
        """One class weight a column of the output; of a single column, one for each label."""
        columns = y_pred.shape[-1] if y_pred.ndim > 1 else 1
        return 2 if columns == 1 else columns

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        return column_weight(y_true, class_weight, where)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        y_true = unwrapped(y_true.detach())
        bad = ~(y_true.abs() <= 1)
        if bool(bad.any()):
            raise InputError(
                f"{where}: expected labels 0 and 1, or -1 and 1; received {float(y_true[bad][0]):g} "
                f"({int(bad.sum())} such in all). For class indices use SparseCategoricalCrossentropy."
            )

    def _missing(self, batch: Aligned) -> tuple[Tensor, Tensor]:
        """What is missing to the margin, `max(1 − ±y·p, 0)`, and its derivative."""
        sign = torch.where(batch.y_true == 0, -1.0, batch.y_true)
        missing = (1 - sign * batch.prediction.raw).clamp(min=0)
        return missing, -sign * (missing > 0)


class Hinge(_Margin):
    """Mean over the last axis of `max(1 − ±y·p, 0)`.

    `±y` is the label as −1 or 1: a label 0 is read as −1, each by itself. A batch of 0 and 1, and one of −1 and 1, give
    what Keras gives; Keras decides on the whole batch, where a single −1 leaves all zeros as they are, and the loss of
    a sample then depends on the samples beside it.

    Args:
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`. `by="class"` gives each column twice, where its
    label is 1 and where it is not; `class_weight` is per column, with a single column by label.

    Divides by: unmasked entries × C.

    Raises:
        InputError: shapes that differ, labels outside [−1, 1].

    Example:
        >>> import lossledger as ll
        >>> float(ll.losses.Hinge()([[0.0, 1.0]], [[-2.0, 0.5]]))
        0.25

    Source: keras.losses.Hinge 3.15.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "hinge",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _elements(self, batch: Aligned) -> Tensor:
        return self._missing(batch)[0]

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        return self._missing(batch)


class SquaredHinge(_Margin):
    """Mean over the last axis of `max(1 − ±y·p, 0)²`; a label 0 is read as −1, as `Hinge` does.

    Args:
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`. `by="class"` gives each column twice, where its
    label is 1 and where it is not; `class_weight` is per column, with a single column by label.

    Divides by: unmasked entries × C.

    Raises:
        InputError: shapes that differ, labels outside [−1, 1].

    Example:
        >>> import lossledger as ll
        >>> float(ll.losses.SquaredHinge()([[0.0, 1.0]], [[-2.0, 0.5]]))
        0.125

    Source: keras.losses.SquaredHinge 3.15.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "squared_hinge",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _elements(self, batch: Aligned) -> Tensor:
        return self._missing(batch)[0].square()

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        missing, slope = self._missing(batch)
        return missing.square(), 2 * missing * slope


class CategoricalHinge(ElementLoss):
    """By how much the true class does not lead: `max(max_k (1 − y_k)p_k − Σ_k y_k p_k + 1, 0)`.

    The true class takes part in the maximum with 0, so negative scores of all other classes count as 0.

    Args:
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: one-hot targets and output `[B, d…, K]`; entries, weights and masks `[B, d…]`. `by="class"` and
    `class_weight` go by the argmax of the target.

    Divides by: unmasked entries.

    Raises:
        InputError: shapes that differ, targets outside [0, 1].

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.CategoricalHinge()([[0.0, 1.0]], [[0.25, 0.5]])), 4)
        0.75

    Source: keras.losses.CategoricalHinge 3.15.
    """

    classes_are: ClassVar[str | None] = "label"

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "categorical_hinge",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def class_count(self, y_pred: Tensor, class_weight: ClassWeight) -> int:
        """One class weight a column of the output."""
        return y_pred.shape[-1]

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return (*y_pred.shape[:-1], 1)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        check_targets(y_true, where)

    def _elements(self, batch: Aligned) -> Tensor:
        y, p = batch.y_true, batch.prediction.raw
        other = ((1 - y) * p).amax(-1, keepdim=True)
        return (other - (y * p).sum(-1, keepdim=True) + 1).clamp(min=0)

    def _labels(self, batch: Aligned) -> tuple[int, Tensor]:
        return batch.y_true.shape[-1], batch.y_true.argmax(-1)

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        vector = class_vector(class_weight, y_true.shape[-1], where=where).to(y_true.device, non_blocking=True)
        return vector[y_true.argmax(-1)].unsqueeze(-1)
