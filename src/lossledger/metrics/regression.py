"""Errors of real-valued outputs, and means of any function. `e = y_pred − y_true`, `w` weight, `m` mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from lossledger import losses
from lossledger.errors import InputError, InputTypeError
from lossledger.losses.aligned import Aligned
from lossledger.metrics.metric import LayoutMetric, Result, Statistics, mean, mean_sums, with_weight
from lossledger.values import shape_of
from lossledger.weighting import as_tensor, weighting


class _ErrorMetric(LayoutMetric):
    """Metrics of the difference, element by element."""

    def __init__(self, name: str) -> None:
        super().__init__(name, losses.MeanSquaredError())

    def _error(self, batch: Aligned) -> Tensor:
        return batch.prediction.raw - batch.y_true


@final
class MeanAbsoluteError(_ErrorMetric):
    """Mean absolute error: `Σ w·m·|e| / Σ w·m`.

    Args:
        name: name of the metric.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`. Statistics `[2]`.

    Returns of a call: a float; NaN when nothing counted.

    Divides by: Σ w·m over the elements.

    Raises:
        InputError: shapes, weights or masks that do not fit.

    Example:
        >>> MeanAbsoluteError()([[0.0], [1.0]], [[1.0], [4.0]])
        2.0

    Source: keras.metrics.MeanAbsoluteError 3.15.
    """

    def __init__(self, name: str = "mean_absolute_error") -> None:
        super().__init__(name)

    def _sums(self, batch: Aligned) -> Tensor:
        return mean_sums(self._error(batch).abs(), batch.weighting)


@final
class MeanSquaredError(_ErrorMetric):
    """Mean squared error: `Σ w·m·e² / Σ w·m`.

    Args:
        name: name of the metric.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`. Statistics `[2]`.

    Returns of a call: a float; NaN when nothing counted.

    Divides by: Σ w·m over the elements.

    Raises:
        InputError: shapes, weights or masks that do not fit.

    Example:
        >>> MeanSquaredError()([[0.0], [1.0]], [[1.0], [4.0]], sample_weight=[1.0, 3.0])
        7.0

    Source: keras.metrics.MeanSquaredError 3.15.
    """

    def __init__(self, name: str = "mean_squared_error") -> None:
        super().__init__(name)

    def _sums(self, batch: Aligned) -> Tensor:
        return mean_sums(self._error(batch).square(), batch.weighting)


@final
class RootMeanSquaredError(_ErrorMetric):
    """Root of the pooled mean squared error: `√(Σ w·m·e² / Σ w·m)`, never a mean of roots.

    Args:
        name: name of the metric.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`. Statistics `[2]`.

    Returns of a call: a float; NaN when nothing counted.

    Divides by: Σ w·m over the elements, below the root.

    Raises:
        InputError: shapes, weights or masks that do not fit.

    Example:
        >>> RootMeanSquaredError()([[0.0], [1.0]], [[1.0], [8.0]])
        5.0

    Source: keras.metrics.RootMeanSquaredError 3.15.
    """

    def __init__(self, name: str = "root_mean_squared_error") -> None:
        super().__init__(name)

    def _sums(self, batch: Aligned) -> Tensor:
        return mean_sums(self._error(batch).square(), batch.weighting)

    def result(self, statistics: Statistics) -> Result:
        """The root mean squared error of a whole."""
        squared = mean(statistics)
        # Negative weights can make the mean negative: then there is no root.
        return Result(math.sqrt(squared) if squared >= 0 else math.nan)


@final
class MeanOfLoss(LayoutMetric):
    """The mean of the elements of a loss: `Σ w·m·element / Σ w·m`.

    Args:
        loss: whose elements are independent of each other.
        name: name of the metric.

    Shapes: those of the loss. Statistics `[2]`.

    Returns of a call: a float; NaN when nothing counted.

    Divides by: Σ w·m over the elements, where a loss divides by the elements that count.

    Raises:
        InputError: shapes, weights or masks that do not fit.

    Example:
        >>> hinge = MeanOfLoss(losses.Hinge(), "hinge")
        >>> hinge([[1.0], [0.0]], [[0.0], [1.0]], sample_weight=[1.0, 3.0])
        1.75

    Source: keras.metrics.BinaryCrossentropy, Hinge and the like 3.15.
    """

    def __init__(self, loss: losses.Loss, name: str) -> None:
        super().__init__(name, loss)
        self.loss = loss

    def _sums(self, batch: Aligned) -> Tensor:
        return mean_sums(self.loss._elements(batch), batch.weighting)


@final
class MeanMetric(LayoutMetric):
    """The mean of a function's values: `Σ w·m·f / Σ w·m`.

    Args:
        fn: `fn(y_true, y_pred)`, one value per sample `[B]` or per entry `[B, d…]`. A scalar stands for the mean of its
            batch and is weighted by the number of samples: the result then depends on the split unless `fn` is a
            plain mean over samples.
        name: name of the metric; the function's own name if not given.

    Shapes: weights and masks fit the values of the function. Statistics `[2]`.

    Returns of a call: a float; NaN when nothing counted.

    Divides by: Σ w·m over the values, or the samples of scalars.

    Raises:
        InputError: a scalar together with a weight or a mask, values whose first axis is not the batch.

    Example:
        >>> within = MeanMetric(lambda y_true, y_pred: (y_true - y_pred).abs() < 0.5, "within_half")
        >>> within([[0.0], [0.0]], [[0.25], [2.0]])
        0.5

    Source: keras.metrics.MeanMetricWrapper 3.15, which gives a scalar of a short last batch the same weight.
    """

    def __init__(self, fn: Callable[[Tensor, Tensor], Any], name: str | None = None) -> None:
        if isinstance(fn, type) or not callable(fn):
            raise InputTypeError(f"A metric must be callable as fn(y_true, y_pred); received {fn!r}.")
        found = str(getattr(fn, "__name__", type(fn).__name__))
        super().__init__(name or ("metric" if found == "<lambda>" else found), losses.FunctionLoss(fn))
        self.fn = fn

    def _sums(self, batch: Aligned) -> Tensor:
        pred, late = batch.prediction.raw, batch.late
        samples = pred.shape[0] if pred.ndim else 1
        if samples == 0:
            # A function may have no value for no data; an empty part is neutral all the same.
            return torch.zeros(2, dtype=torch.float64, device=pred.device)
        values = as_tensor(self.fn(batch.y_true, pred), f"{self.name}: value", device=pred.device).detach().double()
        given = None if late is None else late.given
        if values.ndim == 0 and given is not None:
            raise InputError(
                f"{self.name}: expected one value per sample or entry to go with the {given}, received a scalar from "
                "the metric. Return the values before their mean."
            )
        if values.ndim == 0:
            return with_weight(values * samples, samples)
        if values.shape[0] != samples:
            raise InputError(
                f"{self.name}: expected one value per sample or entry, first axis {samples}; received values of shape "
                f"{shape_of(values)}. Return unreduced values, or a scalar."
            )
        weight, mask = (None, None) if late is None else (late.sample_weight, late.mask)
        weights = weighting(tuple(values.shape), 1, weight, mask, where=self.name)
        return mean_sums(weights.select(values.unsqueeze(-1), 0.0), weights)
