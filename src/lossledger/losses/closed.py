"""The gradient of a batch without its tally, for losses whose derivative has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lossledger.losses.aligned import Aligned
from lossledger.losses.backward import entry_weight, multiply, scale_of
from lossledger.losses.loss import Loss
from lossledger.losses.prediction import Prediction
from lossledger.weighting import Weighting


def has_closed_form(loss: Loss) -> bool:
    """Whether elements and derivatives of a loss are all that its tally and its gradient are made from."""
    kind = type(loss)
    plain = kind.backprop_aligned is Loss.backprop_aligned and kind.tally_aligned is Loss.tally_aligned
    return plain and kind._slopes is not Loss._slopes and loss.additive


@dataclass(frozen=True, slots=True, eq=False)
class Plain:
    """What batches of one shape have in common, where a loss takes targets and outputs as they are.

    Args:
        loss: has a closed form.
        weighting: every element counts 1.
        where: the term.
        scale: λ over the divisor.
    """

    loss: Loss
    weighting: Weighting
    where: str
    scale: float

    def gradient(self, y_true: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor] | None:
        """As `closed_gradient`."""
        found = self.loss._slopes(Aligned(y_true, prediction, self.weighting, self.where))
        return None if found is None else (found[0], found[1].mul_(self.scale))


def plain(loss: Loss, batch: Aligned, y_true: Tensor, output: Tensor, factor: float) -> Plain | None:
    """The plain case, if a batch was one: alignment left it as it was, and shapes alone divide.

    Args:
        loss: has a closed form.
        batch: what alignment made of it.
        y_true: targets, as they were given.
        output: of the model, as it was given.
        factor: λ.
    """
    weights = batch.weighting
    same = batch.y_true is y_true and batch.prediction.raw is output and batch.late is None
    if not same or weights.mask is not None or weights.weight is not None or loss.reduction.rescale is not None:
        return None
    if batch.column_weight is not None or loss.reduction.reads_targets:
        return None
    scale = scale_of(loss.divisor_aligned(batch), factor, output.dtype)
    return None if isinstance(scale, Tensor) else Plain(loss, weights, batch.where, scale)


def closed_gradient(loss: Loss, batch: Aligned, factor: float) -> tuple[Tensor, Tensor] | None:
    """The elements of a batch that is a window of its own, and `factor` times its gradient; no sum is made.

    Args:
        loss: one with a closed form.
        batch: aligned.
        factor: λ.

    Returns:
        `None` where this batch has no closed form after all.
    """
    found = None if batch.late is not None else loss._slopes(batch)
    if found is None:
        return None
    elements, gradient = found
    scale = scale_of(loss.divisor_aligned(batch), factor, elements.dtype)
    multiply(gradient, entry_weight(loss, batch, gradient), scale, gradient)
    return elements, gradient
