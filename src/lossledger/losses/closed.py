"""The gradient of a batch without its tally, for losses whose derivative has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lossledger.losses.aligned import Aligned, of_labels
from lossledger.losses.backward import entry_weight, multiply, scale_of
from lossledger.losses.loss import Loss
from lossledger.losses.prediction import Prediction
from lossledger.weighting import ClassWeight, Weighting, expand


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
        vector: the weight of each class, `[K]`, where labels have one.
    """

    loss: Loss
    weighting: Weighting
    where: str
    scale: float
    vector: Tensor | None = None

    def gradient(
        self, y_true: Tensor, prediction: Prediction, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """As `closed_gradient`; `sample_weight` in any shape that alignment takes."""
        found = self.loss._slopes(Aligned(y_true, prediction, self.weighting, self.where))
        if found is None:
            return None
        elements, slopes = found
        # In the order of the aligned form: the same bits.
        scale: Tensor | float = self.scale
        own = None if self.vector is None else of_labels(self.vector, y_true)
        if sample_weight is not None:
            shape = self.weighting.shape
            given = expand(sample_weight.to(slopes.dtype), shape[:-1], shape[-1], f"{self.where}: sample_weight")
            scale = (given if own is None else given * own) * scale
        elif own is not None:
            scale = own * scale
        return elements, slopes.mul_(scale)


def plain(
    loss: Loss,
    batch: Aligned,
    y_true: Tensor,
    output: Tensor,
    factor: float,
    class_weight: ClassWeight | None = None,
) -> Plain | None:
    """The plain case, if a batch was one: alignment left it as it was, and shapes alone divide.

    Args:
        loss: has a closed form.
        batch: what alignment made of it.
        y_true: targets, as they were given.
        output: of the model, as it was given.
        factor: λ.
        class_weight: those of the term, a vector for labels.
    """
    weights = batch.weighting
    same = batch.y_true is y_true and batch.prediction.raw is output and batch.late is None
    if not same or weights.mask is not None or loss.reduction.rescale is not None:
        return None
    if batch.column_weight is not None or loss.reduction.reads_targets:
        return None
    scale = scale_of(loss.divisor_aligned(batch), factor, output.dtype)
    if isinstance(scale, Tensor):
        return None
    if weights.weight is None:
        return Plain(loss, weights, batch.where, scale)
    labels = loss.one_element and y_true.shape == output.shape[:-1] and not y_true.is_floating_point()
    if not (labels and isinstance(class_weight, Tensor | None)):
        return None
    vector = None if class_weight is None else class_weight.to(output)
    return Plain(loss, Weighting(weights.shape), batch.where, scale, vector)


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
