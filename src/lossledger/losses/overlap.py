"""Overlap losses: Dice, Jaccard, Tversky.

All three are one ratio of sums. With `TP = Σ y·p`, `FP = Σ (1 − y)·p`, `FN = Σ y·(1 − p)` over the reduced axes:

    loss = (α·FP + β·FN) / (κ·TP + α·FP + β·FN + ε)

Dice is (κ, α, β) = (2, 1, 1), because Σy + Σp = 2·TP + FP + FN; Jaccard is (1, 1, 1); Tversky (1, α, β). Where target
and prediction are both empty the loss is 0 (Keras 3.15: 1; it adds ε to the divisor only).

When the reduced axes include the batch the loss is a *ratio*: its statistics add over micro-batches and ranks, the
loss itself does not. When they do not, each sample (and kept column) has a loss of its own and their mean is *linear*.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossledger import reduction as reductions
from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.loss import By, reciprocal
from lossledger.losses.prediction import Prediction, Space
from lossledger.reduction import Reduction
from lossledger.tally import Groups, Tally, divide
from lossledger.weighting import (
    ClassWeight,
    Weighting,
    check_probabilities,
    check_targets,
    class_vector,
    not_finite,
)

EPSILON = 1e-7


class _Overlap(ElementLoss):
    """The family; a subclass fixes (κ, α, β)."""

    classes_are: ClassVar[str | None] = "column"

    def __init__(
        self,
        coefficients: tuple[float, float, float],
        axis: int | tuple[int, ...] | None,
        from_logits: bool | str,
        smooth: float,
        name: str | None,
        reduction: str | Reduction | None,
        dtype: str | torch.dtype | None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        if from_logits not in (False, "sigmoid", "softmax"):
            raise InputError(
                f"{self.name}: from_logits must be False, 'sigmoid' (independent masks) or 'softmax' (exclusive "
                f"classes); received {from_logits!r}. An overlap loss cannot tell by itself which one the logits need."
            )
        if not smooth > 0:
            raise InputError(f"{self.name}: smooth must be positive, received {smooth!r}; the divisor could be 0.")
        self._coefficients = coefficients
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        self.from_logits = from_logits
        self.smooth = smooth

    @property
    def space(self) -> Space:  # type: ignore[override]
        """How the loss reads the output."""
        return "logits" if self.from_logits else "probabilities"

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        if not self.from_logits:
            check_probabilities(y_pred, where)
        check_targets(y_true, where)

    def _reduced(self, rank: int) -> tuple[int, ...]:
        """The axes that the statistics run over."""
        if self.axis is None:
            return tuple(range(rank))
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        bad = [axis for axis in axes if not -rank <= axis < rank]
        if bad:
            raise InputError(f"{self.name}: axis {bad[0]} does not exist; the output has {rank} axes.")
        return tuple(sorted(axis % rank for axis in axes))

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
        """One batch, checked; class weights stay apart from sample weights, since the two act on different axes."""
        batch = super().align(y_true, y_pred, sample_weight, mask, None, where, checked)
        if class_weight is None:
            return batch
        columns = class_vector(class_weight, batch.weighting.shape[-1], where=batch.where)
        return replace(batch, column_weight=columns.to(batch.prediction.raw))

    def class_count(self, y_pred: Tensor, class_weight: ClassWeight) -> int:
        """One class weight a column of the output."""
        return y_pred.shape[-1] if y_pred.ndim > 1 else 1

    def _probability(self, prediction: Prediction) -> Tensor:
        if self.from_logits == "sigmoid":
            return prediction.sigmoid()
        return prediction.softmax() if self.from_logits == "softmax" else prediction.raw

    def _inside(self, batch: Aligned) -> Tensor | None:
        """What multiplies the addends: the mask, and weights of reduced axes."""
        rank = len(batch.weighting.shape)
        weights = batch.weighting
        if self._outside(batch) is not None:
            weights = Weighting(weights.shape, weights.mask)
        inside = weights.product
        if batch.column_weight is not None and rank - 1 in self._reduced(rank):
            inside = batch.column_weight if inside is None else inside * batch.column_weight
        return inside

    def _outside(self, batch: Aligned) -> Tensor | None:
        """A sample weight that is constant along the reduced axes: it multiplies the loss of its sample."""
        weight, reduced = batch.weighting.weight, self._reduced(len(batch.weighting.shape))
        if weight is None or 0 in reduced or any(weight.shape[axis] > 1 for axis in reduced):
            return None
        return weight

    def _column_scale(self, batch: Aligned) -> Tensor | None:
        """Class weights of a kept class axis, one for each cell of a sample or of the batch."""
        shape = batch.weighting.shape
        kept = self._kept(len(shape))
        if batch.column_weight is None or len(shape) - 1 not in kept:
            return None
        return batch.column_weight.expand(*(shape[a] for a in kept))

    def _terms(self, batch: Aligned) -> tuple[Tensor, Tensor]:
        """The addends of numerator and divisor, before weights; linear in the probabilities."""
        kappa, alpha, beta = self._coefficients
        p, y = self._probability(batch.prediction), batch.y_true
        overlap = y * p
        wrong = alpha * (p - overlap) + beta * (y - overlap)
        return wrong, kappa * overlap + wrong

    def _statistics(self, batch: Aligned, keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Numerator and divisor summed over all axes but `keep`, in the order of the axes."""
        inside = self._inside(batch)
        axes = tuple(a for a in range(len(batch.weighting.shape)) if a not in keep)
        sums = [t if inside is None else t * inside for t in self._terms(batch)]
        return (sums[0].sum(axes), sums[1].sum(axes)) if axes else (sums[0], sums[1])

    def _kept(self, rank: int) -> tuple[int, ...]:
        reduced = self._reduced(rank)
        return tuple(axis for axis in range(rank) if axis not in reduced)

    def is_ratio(self, rank: int) -> bool:
        """Whether the statistics run over the batch, so that only whole windows have a value."""
        return 0 in self._reduced(rank)

    # --- the ratio: statistics over the batch ------------------------------------------------------------------

    def tally_aligned(self, batch: Aligned, by: By = None) -> Tally:
        """The tally of an aligned batch, differentiable."""
        rank = len(batch.weighting.shape)
        if not self.is_ratio(rank):
            return self._tally_elements(self._as_cells(batch), self._elements(batch), by)
        reductions.divides(self.reduction, batch.where)
        kept = self._kept(rank)
        # One pass: the statistics of the groups, summed over what the cells do not keep.
        fine = kept if by is None else tuple(sorted({*kept, self._group_axis(batch, by)}))
        numerator, divisor = self._statistics(batch, fine)
        scale = self._column_scale(batch)
        if scale is not None:
            numerator = numerator * scale
        groups = None if by is None else self._ratio_groups(batch, numerator.detach(), divisor.detach(), fine, by)
        summed = tuple(position for position, axis in enumerate(fine) if axis not in kept)
        if summed:
            numerator, divisor = numerator.sum(summed), divisor.sum(summed)
        numerator = numerator.reshape(-1)
        return Tally(
            numerator,
            divisor.reshape(-1),
            batch.weighting.count(),
            batch.weighting.total_weight(),
            # A sum over cells has the coefficient 1; every other reduction is their mean.
            coefficient=1.0 if self.reduction.statistic is None else 1.0 / numerator.numel(),
            offset=self.smooth,
            form="ratio",
            nonfinite=not_finite(numerator.detach()).sum(),
            groups=groups,
        )

    def divisor_aligned(self, batch: Aligned) -> Tally:
        """The divisor of the linear form; a ratio has none before the model has run."""
        rank = len(batch.weighting.shape)
        if self.is_ratio(rank):
            raise InputError(f"{batch.where}: the divisor of a ratio depends on the predictions; take its tally.")
        return super().divisor_aligned(self._as_cells(batch))

    def _group_axis(self, batch: Aligned, by: By) -> int:
        """The axis along which the groups of a ratio lie."""
        last = len(batch.weighting.shape) - 1
        axis = {"class": last, "column": last, "sample": 0}.get(by) if isinstance(by, str) else None
        if axis is None or any(a not in (0, last) for a in self._kept(last + 1)):
            raise InputError(
                f"{batch.where}: a ratio over the batch cannot be divided by {by if isinstance(by, str) else 'ids'!r}; "
                "expected 'class' or 'sample', with no axis kept but the class axis."
            )
        return axis

    def _ratio_groups(
        self, batch: Aligned, numerator: Tensor, divisor: Tensor, fine: tuple[int, ...], by: By
    ) -> Groups:
        """Rows from statistics that keep the axes `fine`."""
        shape, mask = batch.weighting.shape, batch.weighting.mask
        samples, classes = range(shape[0]), range(shape[-1])
        whole = torch.ones((), dtype=torch.int64, device=numerator.device) if mask is None else mask
        count = whole.expand(shape).sum(tuple(a for a in range(len(shape)) if a not in fine))
        by_class = len(shape) - 1 in self._kept(len(shape))
        keys: tuple[tuple[Any, str], ...] | None = tuple((column, "") for column in classes)
        cell: tuple[int, ...] | None = tuple(classes) if by_class else None
        if by == "sample":
            keys = tuple((sample, f"class {c}") for sample in samples for c in classes) if by_class else None
            cell = tuple(classes) * len(samples) if by_class else None
        rows = [t.reshape(-1) for t in (numerator, numerator, count, divisor)]
        return Groups(str(by), keys, rows[0], rows[1], rows[2], rows[3], cell)

    # --- the linear form: a loss for each sample and kept axis ------------------------------------------------

    def _as_cells(self, batch: Aligned) -> Aligned:
        """The batch with the weighting of its cells: a cell counts when any of its elements does."""
        rank = len(batch.weighting.shape)
        reduced = self._reduced(rank)
        entries = tuple(batch.weighting.shape[a] for a in self._kept(rank))
        shape = entries if rank - 1 not in reduced else (*entries, 1)
        mask = batch.weighting.mask
        if mask is not None:
            mask = mask.expand(batch.weighting.shape)
            for axis in reversed(reduced):
                mask = mask.any(axis)
            mask = mask.reshape(shape)
        weight = self._outside(batch)
        if weight is not None:
            kept = [weight.shape[a] for a in self._kept(rank)]
            weight = weight.reshape(*kept, *(1,) * (len(shape) - len(kept)))
        columns = self._column_scale(batch)
        if columns is not None:
            weight = columns if weight is None else weight * columns
        return replace(batch, weighting=Weighting(shape, mask, weight))

    def _losses(self, batch: Aligned, numerator: Tensor, divisor: Tensor) -> Tensor:
        """The loss of each cell, with a class axis at the end."""
        cells = numerator / (divisor + self.smooth)
        rank = len(batch.weighting.shape)
        return cells if rank - 1 not in self._reduced(rank) else cells.unsqueeze(-1)

    def _elements(self, batch: Aligned) -> Tensor:
        return self._losses(batch, *self._statistics(batch, self._kept(len(batch.weighting.shape))))

    def _entries(self, batch: Aligned) -> Tensor:
        rank = len(batch.weighting.shape)
        cells = self._elements(batch)
        if not self.is_ratio(rank):
            product = self._as_cells(batch).weighting.product
            cells = cells if product is None else cells * product
        return cells if rank - 1 not in self._reduced(rank) else cells.squeeze(-1)

    def _groups(self, batch: Aligned, weighted: Tensor, total: Tensor, weights: Weighting, by: By) -> Groups:
        # A cell has no presence: it already compares all of its elements.
        return super()._groups(batch, weighted, total, weights, "column" if by == "class" else by)

    # --- the gradient, in closed form --------------------------------------------------------------------------

    def backprop_aligned(
        self, batch: Aligned, window: Tally | None, factor: float, by: By = None
    ) -> tuple[Tally, Tensor]:
        """The tally and `factor` times the gradient: `c (∂N/D* − N* ∂D/D*²)` with the window's N* and D*."""
        shape = batch.weighting.shape
        kept = self._kept(len(shape))
        factors = self._ratio_factors if self.is_ratio(len(shape)) else self._cell_factors
        tally, factor_n, factor_d = factors(batch, window, factor, by)
        cells = tuple(length if axis in kept else 1 for axis, length in enumerate(shape))
        return tally, self._pull_back(batch, factor_n.reshape(cells), factor_d.reshape(cells))

    def _ratio_factors(
        self, batch: Aligned, window: Tally | None, factor: float, by: By
    ) -> tuple[Tally, Tensor, Tensor]:
        """The tally of a ratio, and the factors on ∂N and ∂D of each cell."""
        tally = self.tally_aligned(batch, by)
        whole = tally if window is None else window
        divisor = whole.divisor + whole.offset
        factor_n = factor * tally.coefficient * divide(torch.ones_like(divisor), divisor)
        factor_d = -factor_n * divide(whole.numerator, divisor)
        # The numerator of the tally already holds the class weights; its derivative takes them here.
        scale = self._column_scale(batch)
        return tally, factor_n if scale is None else factor_n * scale.reshape(-1), factor_d

    def _cell_factors(
        self, batch: Aligned, window: Tally | None, factor: float, by: By
    ) -> tuple[Tally, Tensor, Tensor]:
        """The tally of cells with a loss each, and the factors on ∂N and ∂D of each cell."""
        rank = len(batch.weighting.shape)
        numerator, own = self._statistics(batch, self._kept(rank))
        cells = self._as_cells(batch)
        tally = self._tally_elements(cells, self._losses(batch, numerator, own), by)
        whole = tally if window is None else window
        product = self._entry_weight(cells)
        if product is not None:
            # A number times a mask would be a float32.
            product = product.to(numerator.dtype)
        weight = 1.0 if product is None else product.squeeze(-1) if rank - 1 in self._reduced(rank) else product
        scale = factor * reciprocal(whole.divisor + whole.offset, numerator.dtype) * weight
        factor_n = scale / (own + self.smooth)
        return tally, factor_n, -factor_n * numerator / (own + self.smooth)

    def _pull_back(self, batch: Aligned, factor_n: Tensor, factor_d: Tensor) -> Tensor:
        """From factors on numerator and divisor to the gradient with respect to the output."""
        kappa, alpha, beta = self._coefficients
        y = batch.y_true
        # ∂N/∂p = α(1 − y) − βy and ∂D/∂p = ∂N/∂p + κy.
        wrong = alpha - (alpha + beta) * y
        gradient = wrong * (factor_n + factor_d) + (kappa * factor_d) * y
        inside = self._inside(batch)
        if inside is not None:
            gradient = gradient * inside
        if self.from_logits == "sigmoid":
            p = batch.prediction.sigmoid()
            return gradient * (p * (1 - p))
        if self.from_logits == "softmax":
            p = batch.prediction.softmax()
            return p * (gradient - (p * gradient).sum(-1, keepdim=True))
        return gradient.to(batch.prediction.raw.dtype)


class Dice(_Overlap):
    """Dice loss: `1 − 2 Σ y·p / (Σ y + Σ p)`, with ε in the divisor.

    Args:
        axis: axes of the sums. `None`: all, also the batch (Keras's default): one number. `(1, 2)` on `[B, H, W, C]`:
            a loss for each sample and column, then their mean. `(0, 1, 2)`: one for each column over the whole batch.
        from_logits: `False` for probabilities, `"sigmoid"` or `"softmax"` for logits.
        smooth: ε > 0, added to the divisor.
        reduction: of the kept cells; `sum` adds them, the others take their mean.
        name: name of the term.
        dtype: dtype of the result.

    Weights: on reduced axes they enter the sums (a sample of weight 2 counts twice), on kept axes they multiply.

    Divides by: Σ y + Σ p of each cell, then the number of cells.

    Raises:
        InputError: shapes that differ, probabilities or targets outside [0, 1].

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.Dice()([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.5

    Source: Milletari et al. 2016; keras.losses.Dice 3.15, which gives 1 where target and prediction are empty, ours 0.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "dice",
        axis: int | tuple[int, ...] | None = None,
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
    ) -> None:
        super().__init__((2.0, 1.0, 1.0), axis, from_logits, smooth, name, reduction, dtype)


class Jaccard(_Overlap):
    """Jaccard (intersection over union) loss: `1 − Σ y·p / (Σ y + Σ p − Σ y·p)`, with ε in the divisor.

    Args:
        axis: axes of the sums, as for `Dice`.
        from_logits: `False`, `"sigmoid"` or `"softmax"`.
        smooth: ε > 0, added to the divisor.
        reduction: of the kept cells.
        name: name of the term.
        dtype: dtype of the result.

    Divides by: the union of each cell, then the number of cells.

    Raises:
        InputError: as `Dice`.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.Jaccard()([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.6667

    Source: Jaccard 1912; soft form as in segmentation_models.pytorch 0.6.
    """

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "jaccard",
        axis: int | tuple[int, ...] | None = None,
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
    ) -> None:
        super().__init__((1.0, 1.0, 1.0), axis, from_logits, smooth, name, reduction, dtype)


class Tversky(_Overlap):
    """Tversky loss: `1 − TP / (TP + α·FP + β·FN)`, with ε in the divisor.

    Args:
        alpha: α ≥ 0, the weight of false positives.
        beta: β ≥ 0, the weight of false negatives. Above α it favours recall.
        axis: axes of the sums, as for `Dice`.
        from_logits: `False`, `"sigmoid"` or `"softmax"`.
        smooth: ε > 0, added to the divisor.
        reduction: of the kept cells.
        name: name of the term.
        dtype: dtype of the result.

    Divides by: TP + α·FP + β·FN of each cell, then the number of cells.

    Raises:
        InputError: as `Dice`; a negative weight.

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.Tversky(alpha=0.3, beta=0.7)([[1.0, 0.0]], [[0.5, 0.5]])), 4)
        0.5

    Source: Salehi et al. 2017. Keras 3.15 swaps the two weights (alpha multiplies false negatives there).
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "tversky",
        axis: int | tuple[int, ...] | None = None,
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
    ) -> None:
        super().__init__((1.0, alpha, beta), axis, from_logits, smooth, name, reduction, dtype)
        if alpha < 0 or beta < 0:
            raise InputError(f"{self.name}: alpha and beta must not be negative; received {alpha!r} and {beta!r}.")
        self.alpha = alpha
        self.beta = beta
