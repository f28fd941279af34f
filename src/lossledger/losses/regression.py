"""Losses of real-valued outputs: errors, their relative, logarithmic and robust forms, counts, and directions.

`e = y_pred − y_true`, `y` targets, `p` predictions, ε = 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.elementwise import ElementLoss
from lossledger.reduction import Reduction
from lossledger.values import is_number, shape_of
from lossledger.weighting import ClassWeight, split_shape

EPSILON = 1e-7


def refuse_class_weight(kind: str, class_weight: ClassWeight, where: str) -> NoReturn:
    """The error of class weights given to a loss that has no classes.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"{where}: class_weight needs classes, and {kind} has none; received class_weight="
        f"{class_weight!r}. Pass a sample_weight, [B] or per element, instead."
    )


class ErrorLoss(ElementLoss):
    """Losses of the difference, column by column."""

    classes_are: ClassVar[str | None] = "output"

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        refuse_class_weight("a regression loss", class_weight, where)


class MeanSquaredError(ErrorLoss):
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


class MeanAbsoluteError(ErrorLoss):
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


class Huber(ErrorLoss):
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


class MeanAbsolutePercentageError(ErrorLoss):
    """Mean over the last axis of `100 · |e| / max(|y|, ε)`; the derivative at 0 is 0.

    A target of 0 makes an error of 1 count 10⁹ percent.

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
        >>> float(ll.losses.MeanAbsolutePercentageError()([[2.0, 4.0]], [[1.0, 5.0]]))
        37.5

    Source: keras.losses.MeanAbsolutePercentageError 3.15.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "mean_absolute_percentage_error",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _elements(self, batch: Aligned) -> Tensor:
        return 100 * (batch.prediction.raw - batch.y_true).abs() / batch.y_true.abs().clamp(min=EPSILON)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        error = batch.prediction.raw - batch.y_true
        return self._elements(batch), 100 * error.sign() / batch.y_true.abs().clamp(min=EPSILON)


class MeanSquaredLogarithmicError(ErrorLoss):
    """Mean over the last axis of `(log(1 + max(p, ε)) − log(1 + max(y, ε)))²`.

    Values below ε are read as ε, so a negative prediction has no gradient.

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
        >>> round(float(ll.losses.MeanSquaredLogarithmicError()([[0.0, 3.0]], [[1.0, 3.0]])), 4)
        0.2402

    Source: keras.losses.MeanSquaredLogarithmicError 3.15.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "mean_squared_logarithmic_error",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _difference(self, batch: Aligned) -> Tensor:
        return batch.prediction.raw.clamp(min=EPSILON).log1p() - batch.y_true.clamp(min=EPSILON).log1p()

    def _elements(self, batch: Aligned) -> Tensor:
        return self._difference(batch).square()

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        difference, p = self._difference(batch), batch.prediction.raw
        inside = p >= EPSILON
        return difference.square(), 2 * difference * inside / (1 + p).where(inside, 1.0)


class LogCosh(ErrorLoss):
    """Mean over the last axis of `log cosh e = e + softplus(−2e) − log 2`: about `½e²`, then about `|e| − log 2`.

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
        >>> round(float(ll.losses.LogCosh()([[0.0, 0.0]], [[1.0, -2.0]])), 4)
        0.8794

    Source: keras.losses.LogCosh 3.15.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "log_cosh",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _elements(self, batch: Aligned) -> Tensor:
        error = batch.prediction.raw - batch.y_true
        # Above the threshold softplus is the identity; torch's own, 20, is too early for float64.
        return error + F.softplus(-2 * error, threshold=40.0) - math.log(2)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        return self._elements(batch), (batch.prediction.raw - batch.y_true).tanh()


class Poisson(ErrorLoss):
    """Negative log-likelihood of counts, up to a constant: mean over the last axis of `p − y·log(p + ε)`.

    The output is the rate, so it must be positive: NaN below −ε. `torch.nn.PoissonNLLLoss` reads its logarithm by
    default.

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
        >>> round(float(ll.losses.Poisson()([[1.0, 2.0]], [[1.0, 3.0]])), 4)
        0.9014

    Source: keras.losses.Poisson 3.15.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "poisson",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)

    def _elements(self, batch: Aligned) -> Tensor:
        p = batch.prediction.raw
        return p - batch.y_true * (p + EPSILON).log()

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        return self._elements(batch), 1 - batch.y_true / (batch.prediction.raw + EPSILON)


class Quantile(ErrorLoss):
    """Pinball loss, whose minimum is a quantile of the target: `max(q·(y − p), (q − 1)·(y − p))`.

    An output below the target costs q a unit, above it 1 − q; q = ½ is half the absolute error. The derivative at 0
    is 0.

    Args:
        quantile: q in (0, 1). One number: every column of the output is that quantile of its target. A sequence of Q
            numbers: the output has Q columns, one a quantile, of one target.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: with one number targets and output `[B, d…, C]`, `(N,)` is read as `(N, 1)`; with a sequence targets
    `[B, d…]` or `[B, d…, 1]` and output `[B, d…, Q]`. Several targets of several quantiles are one loss a target.

    Divides by: unmasked entries × C, or × Q.

    Raises:
        InputError: shapes that do not fit, q outside (0, 1).

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.Quantile(0.9)([[1.0, 1.0]], [[0.0, 2.0]])), 4)     # (0.9 + 0.1) / 2
        0.5
        >>> float(ll.losses.Quantile([0.25, 0.75])([2.0], [[1.0, 3.0]]))
        0.25

    Source: Koenker and Bassett 1978.
    """

    def __init__(
        self,
        quantile: float | Sequence[float] = 0.5,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "quantile",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        several = not is_number(quantile)
        numbers = tuple(quantile) if isinstance(quantile, Sequence) and not isinstance(quantile, str) else (quantile,)
        if not numbers or not all(is_number(q) and 0 < q < 1 for q in numbers):
            raise InputError(
                f"{self.name}: quantile must be a number in the open interval (0, 1) or a sequence of such numbers, "
                f"received {quantile!r}."
            )
        self.quantile: Any = numbers if several else quantile

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        if not isinstance(self.quantile, tuple):
            return super()._align(y_true, y_pred, where)
        entries, columns = split_shape(y_pred, where), len(self.quantile)
        if y_pred.shape[-1:] != (columns,) or tuple(y_true.shape) not in (entries, (*entries, 1)):
            raise InputError(
                f"{where}: expected an output [B, …, {columns}], one column a quantile, and targets [B, …] or "
                f"[B, …, 1]; received y_true {shape_of(y_true)} and y_pred {shape_of(y_pred)}. Give each target of "
                "several a loss of its own."
            )
        # Every column has the same target, so a mask or weight of a single column is possible.
        return y_true.reshape(*entries, 1).to(y_pred.dtype).expand(y_pred.shape), y_pred

    def _elements(self, batch: Aligned) -> Tensor:
        return (batch.y_true - batch.prediction.raw) * self._share(batch)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        return self._elements(batch), -self._share(batch)

    def _share(self, batch: Aligned) -> Tensor:
        """What a unit of `y − p` costs: q where the output is too low, q − 1 where it is too high."""
        p = batch.prediction.raw.detach()
        q = torch.as_tensor(self.quantile, dtype=p.dtype).to(p.device, non_blocking=True)
        return q * (batch.y_true > p) - (1 - q) * (batch.y_true < p)


class CosineSimilarity(ErrorLoss):
    """Minus the cosine of the angle between target and output: `−Σ ŷ·p̂` with `v̂ = v / max(‖v‖, ε)`, in [−1, 1].

    A zero vector has no direction: its value and its gradient are 0.

    Args:
        axis: axis of the vectors; all but the batch axis are possible.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; entries, weights and masks are those without `axis`.

    Divides by: unmasked entries.

    Raises:
        InputError: shapes that differ, an axis that is the batch.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.CosineSimilarity()([[1.0, 0.0]], [[3.0, 4.0]])), 4)
        -0.6

    Source: keras.losses.CosineSimilarity 3.15 (whose `get_config` loses axis, ours keeps it, and whose gradient is NaN
        at a zero vector).
    """

    classes_are: ClassVar[str | None] = None

    def __init__(
        self,
        axis: int = -1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "cosine_similarity",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.axis = self.class_axis = axis

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return (*y_pred.shape[:-1], 1)

    def _elements(self, batch: Aligned) -> Tensor:
        return -(direction(batch.y_true) * direction(batch.prediction.raw)).sum(-1, keepdim=True)


def direction(vectors: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis; a zero vector stays zero, with gradient 0."""
    square = vectors.square().sum(-1, keepdim=True)
    return vectors * torch.where(square > 0, square.clamp(min=EPSILON**2).rsqrt(), 0.0)
