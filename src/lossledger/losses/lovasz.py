"""Lovász losses: the convex surrogate of the Jaccard loss, over the sorted errors of an image.

With the errors `e` of one class in falling order and `J(k)` the Jaccard loss when the k largest errors are mistakes,

    loss = Σ_k e_(k) · (J(k) − J(k − 1)),    J(k) = 1 − (T − hits_k) / (T + misses_k)

where `T` counts the pixels of the class, `hits_k` those among the k, and `misses_k` the others among the k.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.loss import By
from lossledger.losses.prediction import Space
from lossledger.reduction import Reduction
from lossledger.tally import Tally, divide
from lossledger.values import check_probabilities, check_targets, outside_probabilities, selected
from lossledger.weighting import ClassWeight, Weighting


def lovasz_sum(errors: Tensor, truth: Tensor, valid: Tensor | None) -> Tensor:
    """The Lovász extension of each image and class, `[I, C]`.

    Args:
        errors: `[I, P, C]`, at least 0.
        truth: `[I, P, C]`, 0 or 1.
        valid: bool, of the same shape; a pixel that is not valid is as if it were not there. `None`: all are.
    """
    if valid is not None:
        # Behind all others, and neither pixel of the class nor of the rest.
        errors = selected(valid, errors, -1.0)
    errors, order = errors.sort(1, descending=True)
    truth = truth.gather(1, order)
    others = 1 - truth
    if valid is not None:
        inside = valid.gather(1, order)
        errors, truth, others = errors * inside, truth * inside, others * inside
    total = truth.sum(1, keepdim=True)
    jaccard = 1 - divide(total - truth.cumsum(1), total + others.cumsum(1))
    steps = torch.diff(jaccard, dim=1, prepend=torch.zeros_like(jaccard[:, :1]))
    return (errors * steps).sum(1)


class _Lovasz(ElementLoss):
    """What both forms share: images as rows, weights by image."""

    classes_are = "column"

    def __init__(
        self, per_image: bool, name: str | None, reduction: str | Reduction | None, dtype: str | torch.dtype | None
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.per_image = per_image

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """Whether tallies of parts of a batch add up to the tally of the whole."""
        return self.per_image

    def class_count(self, y_pred: Tensor, class_weight: ClassWeight) -> int:
        """One class weight a column of the output."""
        return y_pred.shape[-1] if y_pred.ndim > 1 else 1

    def align(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        mask: Any = None,
        class_weight: ClassWeight | None = None,
        where: str | None = None,
        checked: bool = False,
    ) -> Aligned:
        """One batch, checked; class weights stay apart from sample weights, since a class is no pixel."""
        batch = super().align(y_true, y_pred, sample_weight, mask, None, where, checked)
        weight = batch.weighting.weight
        if weight is not None and (not self.per_image or any(length > 1 for length in weight.shape[1:])):
            expected = "one weight an image, (B,)" if self.per_image else "none, since the batch is sorted as one image"
            raise InputError(
                f"{batch.where}: sample_weight: expected {expected}; received shape {tuple(weight.shape)}. A sorted "
                "sum has no weights by pixel: leave pixels out with mask."
            )
        return batch.with_columns(class_weight)

    def _images(self, values: Tensor) -> Tensor:
        """`[B, d…, C]` as `[I, P, C]`."""
        pixels = prod(values.shape[1:-1])
        images = (values.shape[0], pixels) if self.per_image else (1, values.shape[0] * pixels)
        return values.reshape(*images, values.shape[-1])

    def _valid(self, batch: Aligned) -> Tensor | None:
        mask = batch.weighting.mask
        return None if mask is None else self._images(mask.expand(batch.weighting.shape))

    def _as_images(self, batch: Aligned) -> Aligned:
        """The batch with the weighting of its images and classes."""
        weights, valid = batch.weighting, self._valid(batch)
        shape = (weights.shape[0] if self.per_image else 1, weights.shape[-1])
        weight = None if weights.weight is None else weights.weight.reshape(-1, 1)
        if batch.column_weight is not None:
            columns = batch.column_weight.expand(shape)
            weight = columns if weight is None else columns * weight
        mask = None if valid is None else self._counted(valid.any(1))
        return replace(batch, weighting=Weighting(shape, mask, weight))

    def _counted(self, columns: Tensor) -> Tensor:
        """Which image and class counts, from which have valid pixels."""
        return columns

    def tally_aligned(self, batch: Aligned, by: By = None) -> Tally:
        """The tally of an aligned batch, differentiable."""
        if not self.per_image and (isinstance(by, Tensor) or by == "sample"):
            raise InputError(
                f"{batch.where}: with per_image=False the batch is sorted as one image, so its loss cannot be divided "
                "by sample or ids; expected 'class', or per_image=True."
            )
        images = self._as_images(batch)
        # An image and class has no presence: it already compares all of its pixels.
        return self._tally_elements(images, self._elements(batch), "column" if by == "class" else by)

    def divisor_aligned(self, batch: Aligned) -> Tally:
        """The statistic that divides, without the numerator."""
        return super().divisor_aligned(self._as_images(batch))

    def _entries(self, batch: Aligned) -> Tensor:
        elements, product = self._elements(batch), self._as_images(batch).weighting.product
        return (elements if product is None else elements * product).mean(-1)


class LovaszHinge(_Lovasz):
    """Lovász hinge of independent masks: the Lovász extension of the errors `max(1 − z·(2y − 1), 0)` of each image.

    Args:
        per_image: `True`: each image by itself, then their mean. `False`: the batch is sorted as one image; then parts
            of a batch do not add up to the whole, and `additive` is `False`.
        reduction: of the images and columns.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: masks and logits `[B, d…, C]`, one binary mask a column; targets above ½ are 1. A masked pixel is a deleted
    one. Sample weights `(B,)` with `per_image=True` only; class weights by column.

    Divides by: unmasked images × C.

    Raises:
        InputError: shapes that differ, targets outside [0, 1], weights by pixel.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.LovaszHinge()([[[1.0], [0.0]]], [[[0.5], [-2.0]]])), 4)
        0.5

    Source: Berman et al. 2018; segmentation_models.pytorch 0.6 (`LovaszLoss("binary")`, where `per_image` is `False`).
    """

    space: Space = "logits"

    def __init__(
        self,
        per_image: bool = True,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "lovasz_hinge",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(per_image, name, reduction, dtype)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        check_targets(y_true, where)

    def _elements(self, batch: Aligned) -> Tensor:
        truth = (batch.y_true > 0.5).to(batch.prediction.raw)
        errors = (1 - batch.prediction.raw * (2 * truth - 1)).clamp(min=0)
        return lovasz_sum(self._images(errors), self._images(truth), self._valid(batch))


class LovaszSoftmax(_Lovasz):
    """Lovász softmax of exclusive classes: the Lovász extension of `|y − p|` of each class, and their mean by image.

    Args:
        from_logits: `True` for logits of a softmax, `False` for probabilities.
        classes: `"present"`: the mean over the classes that the image has; `"all"`: over all classes.
        per_image: as for `LovaszHinge`.
        reduction: of the images.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: one-hot targets (above ½ is 1) and output `[B, d…, K]`. A masked pixel is a deleted one, also in what is
    present. Sample weights `(B,)` with `per_image=True` only; class weights multiply the part of their class.

    Divides by: the classes of each image, then the images.

    Raises:
        InputError: shapes that differ, probabilities or targets outside [0, 1], weights by pixel.

    Example:
        >>> import lossledger as ll
        >>> masks, found = [[[1.0, 0.0], [1.0, 0.0]]], [[[0.9, 0.1], [0.4, 0.6]]]
        >>> round(float(ll.losses.LovaszSoftmax()(masks, found)), 4)
        0.35

    Source: Berman et al. 2018; segmentation_models.pytorch 0.6 (`LovaszLoss("multiclass")`: present classes,
        `per_image=False`).
    """

    def __init__(
        self,
        from_logits: bool = False,
        classes: str = "present",
        per_image: bool = True,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "lovasz_softmax",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(per_image, name, reduction, dtype)
        if not isinstance(from_logits, bool):
            raise InputError(f"{self.name}: from_logits must be True or False, received {from_logits!r}.")
        if classes not in ("present", "all"):
            raise InputError(f"{self.name}: classes must be 'present' or 'all', received {classes!r}.")
        self.from_logits = from_logits
        self.classes = classes

    @property
    def space(self) -> Space:  # type: ignore[override]
        """How the loss reads the output."""
        return "logits" if self.from_logits else "probabilities"

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        if not self.from_logits:
            check_probabilities(y_pred, where)
        check_targets(y_true, where)

    def _counted(self, columns: Tensor) -> Tensor:
        # An image counts as a whole, whatever its classes.
        return columns.any(-1, keepdim=True)

    def _elements(self, batch: Aligned) -> Tensor:
        raw = batch.prediction.raw
        p = batch.prediction.softmax() if self.from_logits else raw
        truth, valid = self._images((batch.y_true > 0.5).to(p)), self._valid(batch)
        losses = lovasz_sum((truth - self._images(p)).abs(), truth, valid)
        here = truth if valid is None else truth * valid
        columns = here.sum(1) > 0 if self.classes == "present" else torch.ones_like(losses, dtype=torch.bool)
        # The mean over the class axis makes of them the mean over the classes that count.
        counted = columns.sum(-1, keepdim=True)
        elements: Tensor = divide(losses * columns * losses.shape[-1], counted)
        if self.from_logits:
            return elements
        outside = self._images(outside_probabilities(raw.detach())).any(1)
        return torch.where(outside, torch.nan, elements)
