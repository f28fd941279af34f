"""Losses of real-valued outputs: squared, absolute and Huber error. `e = y_pred − y_true`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.elementwise import ElementLoss
from lossledger.reduction import Reduction
from lossledger.weighting import ClassWeight


class _ErrorLoss(ElementLoss):
    """Losses of the difference, column by column."""

    classes_are: ClassVar[str | None] = "output"

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        raise InputError(
            f"{where}: class_weight needs classes, and a regression loss has none; received class_weight="
            f"{class_weight!r}. Pass a sample_weight, [B] or per element, instead."
        )


class MeanSquaredError(_ErrorLoss):
    """Mean over the last axis of `e²`.

    Args:
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`.

    Divides by: unmasked entries × C.

    Raises:
        InputError: shapes that differ.

    Example:
        >>> import lossledger as ll
        >>> float(ll.losses.MeanSquaredError()([[0.0, 0.0]], [[1.0, 3.0]]))
        5.0

    Source: keras.losses.MeanSquaredError 3.15.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "mean_squared_error",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _elements(self, batch: Aligned) -> Tensor:
        return (batch.prediction.raw - batch.y_true).square()

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        error = batch.prediction.raw - batch.y_true
        return error.square(), error * 2


class MeanAbsoluteError(_ErrorLoss):
    """Mean over the last axis of `|e|`; the derivative at 0 is 0.

    Args:
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`.

    Divides by: unmasked entries × C.

    Raises:
        InputError: shapes that differ.

    Example:
        >>> import lossledger as ll
        >>> float(ll.losses.MeanAbsoluteError()([[0.0, 0.0]], [[1.0, 3.0]]))
        2.0

    Source: keras.losses.MeanAbsoluteError 3.15.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "mean_absolute_error",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _elements(self, batch: Aligned) -> Tensor:
        return (batch.prediction.raw - batch.y_true).abs()

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        error = batch.prediction.raw - batch.y_true
        return error.abs(), error.sign()


class Huber(_ErrorLoss):
    """Squared for small errors, linear for large ones: `½e²` where `|e| ≤ δ`, else `δ|e| − ½δ²`.

    Args:
        delta: δ > 0, where the two forms meet.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`.

    Divides by: unmasked entries × C.

    Raises:
        InputError: shapes that differ, δ that is not positive.

    Example:
        >>> import lossledger as ll
        >>> float(ll.losses.Huber(delta=1.0)([[0.0, 0.0]], [[1.0, 3.0]]))
        1.5

    Source: Huber 1964; keras.losses.Huber 3.15 (whose `get_config` loses delta, ours keeps it).
    """

    def __init__(
        self,
        delta: float = 1.0,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "huber_loss",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        if not delta > 0:
            raise InputError(f"{self.name}: delta must be positive, received {delta!r}.")
        self.delta = delta

    def _elements(self, batch: Aligned) -> Tensor:
        size = (batch.prediction.raw - batch.y_true).abs()
        return torch.where(size <= self.delta, 0.5 * size * size, self.delta * size - 0.5 * self.delta**2)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        error = batch.prediction.raw - batch.y_true
        return self._elements(batch), error.clamp(-self.delta, self.delta)
