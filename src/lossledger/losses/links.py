"""From the sums of a cell to its loss: the curve of a focal or log-cosh form, absent classes, weights of classes.

A link sees the sums of the whole window, so a nonlinear loss of a ratio is exact however the data was split. The sums
are torch tensors in a step and NumPy arrays at a log point: links use what both kinds understand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from lossledger.tally import Number, divide


class Curve(Protocol):
    """A function of the loss of each cell."""

    def __call__(self, losses: Number) -> Number:
        """Its values."""
        ...

    def slope(self, losses: Tensor) -> Tensor:
        """Its derivative."""
        ...


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

    def slope(self, losses: Tensor) -> Tensor:
        """The derivative at each loss."""
        positive = losses > 0
        slope = self.exponent * losses.where(positive, 1.0) ** (self.exponent - 1) * positive
        if self.first:
            slope[..., : self.first] = 1.0
        return slope


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

    def slope(self, losses: Tensor) -> Tensor:
        """The derivative at each loss."""
        return losses.tanh()


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

    def losses(self, numerator: Number, divisor: Number, present: Number | None = None) -> Number:
        """The loss of each cell, without class weights; `present` is where there is a target, if that matters."""
        losses = divide(numerator + self.shift, divisor)
        losses = losses if self.curve is None else self.curve(losses)
        return losses if present is None else losses * present

    def slopes(
        self, numerator: Tensor, divisor: Tensor, outer: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The derivative of `Σ outer · losses` with respect to numerators and divisors."""
        losses = divide(numerator + self.shift, divisor)
        factor = divide(outer if present is None else outer * present, divisor)
        if self.curve is not None:
            factor = factor * self.curve.slope(losses)
        return factor, -factor * losses

    def __call__(self, numerator: Number, divisor: Number, statistics: Number) -> Number:
        """The share of each cell in the loss; statistics are counts, counts × class weights, and targets."""
        return self.losses(numerator, divisor) * self._weights(statistics)

    def gradient(self, numerator: Tensor, divisor: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative of the sum of the shares with respect to numerators and divisors."""
        return self.slopes(numerator, divisor, self._weights(statistics))

    def _weights(self, statistics: Number) -> Number:
        """What multiplies the loss of each cell."""
        count, weighted, target = statistics
        weights = divide(weighted, count)
        if self.absent == "keep":
            return weights
        present = target > 0
        weights = weights * present
        return divide(weights, present.sum()) if self.absent == "skip" and self.mean else weights


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
        weight, shift = self._weights(target, used)
        return (weight * numerator + shift) / ((weight * divisor).sum(axis=-1, keepdims=True) + self.smooth)

    def _weights(self, target: Number, used: Number) -> tuple[Number, Number]:
        """What multiplies the sums of each class, and what is added to its numerator."""
        # In the dtype of the sums: a bool times a constant would be rounded to the default one.
        used = used * (target * 0 + 1)
        weight = divide(used, target**self.power)
        largest = getattr(weight, "amax", weight.max)(axis=-1, keepdims=True)
        return weight + (weight == 0) * largest, divide(self.shift * used, used.sum(axis=-1, keepdims=True))

    def slopes(
        self, numerator: Tensor, divisor: Tensor, outer: Tensor, target: Tensor, used: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The derivative of `Σ outer · losses` with respect to numerators and divisors."""
        weight, shift = self._weights(target, used)
        whole = (weight * divisor).sum(-1, keepdim=True) + self.smooth
        factor = weight / whole
        joint = (outer * (weight * numerator + shift)).sum(-1, keepdim=True)
        return outer * factor, -factor * joint / whole

    def __call__(self, numerator: Number, divisor: Number, statistics: Number) -> Number:
        """The share of each class in the loss; statistics as for `CellLink`."""
        count, weighted, target = statistics
        return self.losses(numerator, divisor, target, count > 0) * divide(weighted, count)

    def gradient(self, numerator: Tensor, divisor: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative of the sum of the shares with respect to numerators and divisors."""
        count, weighted, target = statistics
        return self.slopes(numerator, divisor, divide(weighted, count), target, count > 0)
