"""What every metric is: sums of a batch, which add, and a finaliser that turns the sums of any whole into its value.

    value of the whole = result(statistics(part 1) + statistics(part 2) + …)

`statistics` stays on the device of the predictions and reads nothing back; `result` runs on the host, where values
are looked at anyway.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossledger.losses.aligned import Aligned
from lossledger.losses.loss import Loss
from lossledger.weighting import Weighting, as_tensor

Statistics = NDArray[np.float64] | Tensor
"""Summed statistics on the host."""


@dataclass(frozen=True, slots=True)
class Result:
    """The value of a metric; NaN where it is undefined because nothing counted.

    Args:
        value: the number that is printed.
        by_class: one value a class, for metrics that have classes.
    """

    value: float
    by_class: tuple[float, ...] | None = None


class Metric(ABC):
    """Base of every metric; subclass it and write `statistics` and `result` to make your own.

    `value = result(Σ statistics)`, the sum over any split of the data.

    Args:
        name: name of the metric, its key in the history.

    Divides by: what `result` divides by, once, after all parts have been added.

    Example:
        >>> import torch
        >>> class Bias(Metric):
        ...     def statistics(self, y_true, y_pred, sample_weight=None, mask=None):
        ...         error = (y_pred - y_true).double()
        ...         return torch.stack([error.sum(), torch.ones_like(error).sum()])
        ...     def result(self, statistics):
        ...         return Result(float(statistics[0] / statistics[1]))
        >>> Bias("bias")([1.0, 1.0], [2.0, 3.0])
        1.5
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def statistics(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The sums of a batch, float64, on the device of `y_pred`; they add with `+`.

        Args:
            y_true: targets.
            y_pred: predictions.
            sample_weight: a scalar, `(B,)`, a leading part of the entries' shape, or the elements' shape.
            mask: the same shapes; masked elements do not count, whatever they hold. Make it bool: a mask of numbers
                is checked on a CPU to hold 0 and 1 only.
        """

    @abstractmethod
    def result(self, statistics: Statistics) -> Result:
        """The value of a whole.

        Args:
            statistics: the sum of `statistics` over its parts, a NumPy array or a tensor on the host.
        """

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None) -> float:
        """The value of one batch.

        Args:
            y_true: targets, anything `torch.as_tensor` takes.
            y_pred: predictions.
            sample_weight: as in `statistics`.
            mask: as in `statistics`.
        """
        pred = as_tensor(y_pred, f"{self.name}: y_pred")
        true = as_tensor(y_true, f"{self.name}: y_true", device=pred.device)
        late = (
            None if value is None else as_tensor(value, f"{self.name}: {what}", device=pred.device)
            for what, value in (("sample_weight", sample_weight), ("mask", mask))
        )
        return self.result(self.statistics(true, pred, *late).detach().cpu()).value

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({shown})"


class LayoutMetric(Metric):
    """A metric that reads targets, predictions, weights and masks the way a loss does; a mean, if it says no more.

    Args:
        name: name of the metric.
        layout: the loss whose alignment, weighting and value checks apply; its value is never computed.
    """

    def __init__(self, name: str, layout: Loss) -> None:
        super().__init__(name)
        self._layout = layout

    @abstractmethod
    def _sums(self, batch: Aligned) -> Tensor:
        """The statistics of an aligned batch, whose masked elements hold safe values."""

    @torch.no_grad()
    def statistics(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The sums of a batch, float64, on the device of `y_pred`; see `Metric.statistics`.

        A NaN among unmasked predictions and a label out of range give NaN: they can be neither right nor wrong.
        """
        return self._sums(self._layout.align(y_true, y_pred, sample_weight, mask, where=self.name, checked=True))

    def result(self, statistics: Statistics) -> Result:
        """The mean of a whole: the first of its two sums over the second."""
        return Result(mean(statistics))

    @torch.no_grad()
    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None) -> float:
        """The value of one batch; values are checked too (labels, probabilities), which `statistics` cannot do."""
        batch = self._layout.align(y_true, y_pred, sample_weight, mask, where=self.name)
        return self.result(self._sums(batch).cpu()).value


def mean_sums(values: Tensor, weights: Weighting) -> Tensor:
    """`[Σ w·m·x, Σ w·m]` of values in the rank of the elements."""
    product = weights.product
    weighted = values if product is None else values.double() * product
    return with_weight(weighted.sum(dtype=torch.float64), weights.total_weight())


def with_weight(total: Tensor, weight: Tensor | int) -> Tensor:
    """A sum and what divides it, as one tensor of two float64."""
    # A fill, not a copy from the host: a copy would make the device wait.
    divisor = weight.double() if isinstance(weight, Tensor) else total.new_full((), weight)
    return torch.stack([total, divisor])


def mean(statistics: Statistics) -> float:
    """Total over weight; NaN when nothing counted."""
    total, weight = (float(value) for value in np.asarray(statistics, dtype=np.float64))
    return total / weight if weight != 0 else math.nan
