"""Negative log-likelihoods: the output holds the parameters of a distribution, the target is drawn from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import debug_unwrap

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.regression import ErrorLoss
from lossledger.reduction import Reduction
from lossledger.values import shape_of
from lossledger.weighting import Weighting, split_shape


class GaussianNegativeLogLikelihood(ErrorLoss):
    """Negative log-likelihood of a normal distribution whose mean and variance the model gives.

    Element `½ (log v + (y − μ)² / v)` with `v = max(variance, eps)`, or with the logarithm s of the variance
    `½ (s + (y − μ)² exp(−s))`, which needs no clipping.

    Args:
        log_variance: `True` when the second half of the output is the logarithm of the variance.
        full: add the constant `½ log 2π`.
        eps: ε > 0, the smallest variance; the gradient passes as if the variance were ε, so that it can grow again.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets `[B, d…, C]`, output `[B, d…, 2C]`: C means, then C variances. Targets `[B, d…]` go with an output
    `[B, d…, 2]`.

    Divides by: unmasked entries × C.

    Raises:
        InputError: an output that is not twice as wide as the target, a negative variance (NaN in a training step),
            eps that is not positive.

    Example:
        >>> import lossledger as ll
        >>> loss = ll.losses.GaussianNegativeLogLikelihood()
        >>> float(loss([[1.0]], [[3.0, 1.0]])), float(loss([1.0], [[1.0, 1.0]]))
        (2.0, 0.0)

    Source: Nix and Weigend 1994; torch.nn.GaussianNLLLoss 2.13 (which takes mean and variance apart).
    """

    def __init__(
        self,
        log_variance: bool = False,
        full: bool = False,
        eps: float = 1e-6,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "gaussian_negative_log_likelihood",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        if not eps > 0:
            raise InputError(f"{self.name}: eps must be positive, received {eps!r}.")
        self.log_variance = log_variance
        self.full = full
        self.eps = eps

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        entries = split_shape(y_pred, where)
        columns, odd = divmod(y_pred.shape[-1], 2)
        accepted = [(*entries, columns)] + ([entries] if columns == 1 else [])
        if odd or y_pred.ndim < 2 or tuple(y_true.shape) not in accepted:
            raise InputError(
                f"{where}: expected targets [B, …, C] and an output [B, …, 2C], C means and then C variances; received "
                f"y_true {shape_of(y_true)} and y_pred {shape_of(y_pred)}. Join what the model gives: "
                "torch.cat((mean, variance), -1)."
            )
        return y_true.reshape(*entries, columns).to(y_pred.dtype), y_pred

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return tuple(y_true.shape)

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        twice = Weighting(tuple(y_pred.shape), _both(weights.mask))
        return weights.select(y_true, 0), twice.select(y_pred, 0.5)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        bad = debug_unwrap(y_pred.detach().chunk(2, -1)[1] < 0)
        if not self.log_variance and bool(bad.any()):
            raise InputError(
                f"{where}: a variance must not be negative; received {int(bad.sum())} that are. End the model with a "
                "softplus, or let it give logarithms: log_variance=True."
            )

    def _variance(self, spread: Tensor) -> Tensor:
        """v; NaN where it is negative: the step cannot read values, but it counts non-finite elements."""
        if self.log_variance:
            return spread.exp()
        # The clip adds a constant, so the derivative passes.
        lifted = spread + (self.eps - spread.detach()).clamp(min=0)
        return torch.where(spread.detach() < 0, torch.nan, lifted)

    def _elements(self, batch: Aligned) -> Tensor:
        mean, spread = batch.prediction.raw.chunk(2, -1)
        square = (batch.y_true - mean).square()
        if self.log_variance:
            elements = 0.5 * (spread + square * (-spread).exp())
        else:
            variance = self._variance(spread)
            elements = 0.5 * (variance.log() + square / variance)
        return elements + 0.5 * math.log(2 * math.pi) if self.full else elements

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        mean, spread = batch.prediction.raw.chunk(2, -1)
        error = mean - batch.y_true
        # ∂/∂μ = (μ − y) / v, ∂/∂v = ½ (1 − (y − μ)² / v) / v, and v times that for log v.
        precision = (-spread).exp() if self.log_variance else 1 / self._variance(spread)
        slope = 0.5 * (1 - error.square() * precision)
        return self._elements(batch), torch.cat(
            (error * precision, slope if self.log_variance else slope * precision), -1
        )

    def _entry_weight(self, batch: Aligned) -> Tensor | None:
        return _both(super()._entry_weight(batch))


def _both(values: Tensor | None) -> Tensor | None:
    """A mask or weight of the targets' columns, for means and variances; one an entry is for all columns."""
    return values if values is None or values.shape[-1] == 1 else torch.cat((values, values), -1)


class PoissonNegativeLogLikelihood(ErrorLoss):
    """Negative log-likelihood of counts whose rate, or its logarithm, the model gives.

    Element `exp(z) − y·z` of the logarithm z of the rate, or `p − y·log(p + eps)` of the rate p. Keras's `Poisson` is
    the second form with ε = 1e-7.

    Args:
        log_input: `True` when the output is the logarithm of the rate.
        full: add Stirling's approximation of `log y!`, `y·log y − y + ½ log 2πy`, where y > 1.
        eps: ε > 0, added to the rate before its logarithm; not used with `log_input`.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`.

    Divides by: unmasked entries × C.

    Raises:
        InputError: shapes that differ, eps that is not positive.

    Example:
        >>> import lossledger as ll
        >>> loss = ll.losses.PoissonNegativeLogLikelihood()
        >>> float(loss([[2.0]], [[0.0]])), round(float(loss([[2.0]], [[0.6931]])), 3)    # the rates 1 and 2
        (1.0, 0.614)

    Source: torch.nn.PoissonNLLLoss 2.13.
    """

    def __init__(
        self,
        log_input: bool = True,
        full: bool = False,
        eps: float = 1e-8,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "poisson_negative_log_likelihood",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        if not eps > 0:
            raise InputError(f"{self.name}: eps must be positive, received {eps!r}.")
        self.log_input = log_input
        self.full = full
        self.eps = eps

    def _elements(self, batch: Aligned) -> Tensor:
        y, p = batch.y_true, batch.prediction.raw
        elements = p.exp() - y * p if self.log_input else p - y * (p + self.eps).log()
        if not self.full:
            return elements
        large = y.where(y > 1, 1.0)
        stirling = large * large.log() - large + 0.5 * (2 * math.pi * large).log()
        return elements + stirling.where(y > 1, 0.0)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        y, p = batch.y_true, batch.prediction.raw
        return self._elements(batch), p.exp() - y if self.log_input else 1 - y / (p + self.eps)
