"""From the sums of a cell to its loss: the curve of a focal or log-cosh form, absent classes, weights of classes.

A link sees the sums of the whole window, so a nonlinear loss of a ratio is exact however the data was split. The sums
are torch tensors in a step and NumPy arrays at a log point: links use what both kinds understand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lossledger.tally import Number, divide

Curve = Callable[[Number], Number]


@dataclass(frozen=True, slots=True)
class Power:
    """`x^exponent`, with the derivative 0 where x is 0: there, an exponent below 1 has none.

    Args:
        exponent: positive.
        first: the first cell along the last axis that is raised; those before it stay as they are.

    Example:
        >>> Power(0.5, first=1)(np.array([0.25, 0.25, 0.0]))
        array([0.25, 0.5 , 0.  ])
    """

    exponent: float
    first: int = 0

    def __call__(self, losses: Number) -> Number:
        """The curve of each loss."""
        # A base of 1 where the loss is not positive keeps NaN out of the gradient.
        raised = (losses * (losses > 0) + (losses <= 0)) ** self.exponent * (losses > 0)
        if self.first == 0:
            return raised
        kept = ((losses * 0 + 1).cumsum(-1)) <= self.first
        return losses * kept + raised * (kept == 0)


@dataclass(frozen=True, slots=True)
class LogCosh:
    """`log cosh x`, written `log(1 + 2 sinh²(x / 2))`, which is exact for small x too.

    Example:
        >>> round(float(LogCosh()(np.array(1.0))), 4)
        0.4338
    """

    def __call__(self, losses: Number) -> Number:
        """The curve of each loss."""
        half = losses / 2
        if hasattr(half, "sinh"):
            return (2 * half.sinh() ** 2).log1p()
        return np.log1p(2 * np.sinh(half) ** 2)


@dataclass(frozen=True, slots=True)
class CellLink:
    """The loss of each cell of a ratio over the batch: `c · curve((N + shift) / D)`, and what absent cells do.

    Args:
        curve: `None` for the ratio itself.
        shift: added to the numerator of the loss: what the divisor is smoothed by and the score is not.
        absent: `"keep"`, `"zero"` (a cell without target costs nothing) or `"skip"` (it also leaves the mean).
        mean: with `"skip"`, whether the losses divide by the number of present cells.
    """

    curve: Curve | None = None
    shift: float = 0.0
    absent: str = "keep"
    mean: bool = True

    def losses(self, numerator: Number, divisor: Number) -> Number:
        """The loss of each cell, without class weights and whatever its target."""
        losses = divide(numerator + self.shift, divisor)
        return losses if self.curve is None else self.curve(losses)

    def __call__(self, numerator: Number, divisor: Number, statistics: Number) -> Number:
        """The share of each cell in the loss; statistics are counts, counts × class weights, and targets."""
        count, weighted, target = statistics
        losses = self.losses(numerator, divisor) * divide(weighted, count)
        if self.absent == "keep":
            return losses
        present = target > 0
        losses = losses * present
        return divide(losses, present.sum()) if self.absent == "skip" and self.mean else losses


@dataclass(frozen=True, slots=True)
class GeneralizedLink:
    """Classes of one Dice loss, each weighted by its volume: `(Σ_g w N + shift) / (Σ_g w D + smooth)`, cell by cell.

    Args:
        power: of the volume: `w = 1 / T^power`, and for an empty class the largest weight of the others.
        smooth: added to the divisor.
        shift: added to the numerator of the loss, spread evenly over the classes.
    """

    power: int
    smooth: float
    shift: float = 0.0

    def losses(self, numerator: Number, divisor: Number, target: Number, used: Number) -> Number:
        """The share of each class (last axis) in the loss; `used` is where a class has elements."""
        # In the dtype of the sums: a bool times a constant would be rounded to the default one.
        used = used * (target * 0 + 1)
        weight = divide(used, target**self.power)
        largest = getattr(weight, "amax", weight.max)(axis=-1, keepdims=True)
        weight = weight + (weight == 0) * largest
        shift = divide(self.shift * used, used.sum(axis=-1, keepdims=True))
        return (weight * numerator + shift) / ((weight * divisor).sum(axis=-1, keepdims=True) + self.smooth)

    def __call__(self, numerator: Number, divisor: Number, statistics: Number) -> Number:
        """The share of each class in the loss; statistics as for `CellLink`."""
        count, weighted, target = statistics
        return self.losses(numerator, divisor, target, count > 0) * divide(weighted, count)
