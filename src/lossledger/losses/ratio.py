"""The base of overlap losses: ratios of sums, over the batch or for each sample, and the policies they share.

With `TP = Σ y·p`, `FP = Σ (1 − y)·p`, `FN = Σ y·(1 − p)` over the reduced axes, a cell has the sums

    N = α·FP + β·FN,    D = κ·TP + N

and the loss `1 − (κ·TP + s_n) / (D + s_d) = (N + s_d − s_n) / (D + s_d)`, to which a subclass may apply a curve. Dice
is (κ, α, β) = (2, 1, 1), because Σy + Σp = 2·TP + FP + FN; Jaccard is (1, 1, 1); Tversky (1, α, β). With squares in
the divisor FP is `Σ p² − y·p` and FN is `Σ y² − y·p`: for Dice, D = Σy² + Σp² and N = Σ(y − p)².

TP and N are summed in the dtype of the output and joined in float64: the gradient needs D − N, of which float32 would
leave little where hardly anything was found.

When the reduced axes include the batch the loss is a *ratio*: its statistics add over micro-batches and ranks, the
loss itself does not. When they do not, each sample (and kept column) has a loss of its own and their mean is *linear*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossledger import reduction as reductions
from lossledger.errors import InputError
from lossledger.losses import summing
from lossledger.losses.aligned import Aligned
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.groups import AndSamples, of_cells
from lossledger.losses.links import CellLink, Curve, GeneralizedLink
from lossledger.losses.loss import By
from lossledger.losses.prediction import Prediction, Space
from lossledger.reduction import Reduction
from lossledger.tally import Groups, Link, Tally, divide
from lossledger.values import check_probabilities, check_targets, is_number, not_finite, reciprocal, selected
from lossledger.weighting import ClassWeight, Weighting

EPSILON = 1e-7
GROUPINGS = ("all", "sample", "class", "sample_class")
ABSENT = ("keep", "zero", "skip")


@dataclass(frozen=True, slots=True)
class Policies:
    """What the members of the family can do in more than one way; `Dice` says what each means."""

    grouping: str | None = None
    smooth_numerator: float | None = None
    include_background: bool = True
    squared: bool = False
    absent: str = "keep"


class Overlap(ElementLoss):
    """The family; a subclass fixes (κ, α, β), and the curve if it has one."""

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
        policies: Policies,
    ) -> None:
        super().__init__(name, reduction, dtype)
        if from_logits not in (False, "sigmoid", "softmax"):
            raise InputError(
                f"{self.name}: from_logits must be False, 'sigmoid' (independent masks) or 'softmax' (exclusive "
                f"classes); received {from_logits!r}. An overlap loss cannot tell by itself which one the logits need."
            )
        if not smooth > 0:
            raise InputError(f"{self.name}: smooth must be positive, received {smooth!r}; the divisor could be 0.")
        self._check_policies(policies, axis, smooth)
        self._coefficients = coefficients
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        self.from_logits = from_logits
        self.smooth = smooth
        self.grouping = policies.grouping
        self.smooth_numerator = policies.smooth_numerator
        self.include_background = policies.include_background
        self.squared = policies.squared
        self.absent = policies.absent

    def _check_policies(self, policies: Policies, axis: Any, smooth: float) -> None:
        grouping, top = policies.grouping, policies.smooth_numerator
        if grouping is not None and axis is not None:
            raise InputError(
                f"{self.name}: axis and grouping both say what the sums run over; expected one of them, received "
                f"axis={axis!r} and grouping={grouping!r}. Drop axis."
            )
        if grouping is not None and grouping not in GROUPINGS:
            raise InputError(f"{self.name}: grouping must be None or one of {GROUPINGS}; received {grouping!r}.")
        if policies.absent not in ABSENT:
            raise InputError(f"{self.name}: absent must be one of {ABSENT}; received {policies.absent!r}.")
        if top is not None and not (is_number(top) and 0 <= top <= smooth):
            raise InputError(
                f"{self.name}: smooth_numerator must be from 0 to smooth={smooth!r}, received {top!r}; a larger one "
                "gives scores above 1. None takes smooth itself."
            )

    @property
    def _curve(self) -> Curve | None:
        """What is applied to the loss of each cell."""
        return None

    @property
    def _link(self) -> CellLink | GeneralizedLink:
        """From the sums of the cells to their losses."""
        return self._cell_link

    @property
    def link(self) -> Link | None:  # type: ignore[override]
        """The link of the tallies over the batch; `None` for plain ratios."""
        return None if self._plain else self._link

    @property
    def _cell_link(self) -> CellLink:
        shift = 0.0 if self.smooth_numerator is None else self.smooth - self.smooth_numerator
        return CellLink(self._curve, shift, self.absent, self.reduction.statistic is not None)

    @property
    def _plain(self) -> bool:
        """Whether the quotient of the sums is the loss of a cell."""
        link = self._link
        return isinstance(link, CellLink) and (link.curve, link.shift, link.absent) == (None, 0.0, "keep")

    @property
    def space(self) -> Space:  # type: ignore[override]
        """How the loss reads the output."""
        return "logits" if self.from_logits else "probabilities"

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        if not self.from_logits:
            check_probabilities(y_pred, where, "use from_logits='sigmoid' or 'softmax'")
        check_targets(y_true, where)

    def _reduced(self, rank: int) -> tuple[int, ...]:
        """The axes that the statistics run over."""
        if self.grouping is not None:
            return tuple(range("sample" in self.grouping, rank - ("class" in self.grouping)))
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
        if not self.include_background:
            batch = self._foreground(batch)
        return batch.with_columns(class_weight)

    def _foreground(self, batch: Aligned) -> Aligned:
        """The batch with class 0 masked: in no sum, in no mean, in no count."""
        shape, weights = batch.weighting.shape, batch.weighting
        if shape[-1] < 2:
            raise InputError(
                f"{batch.where}: include_background=False leaves class 0 out; expected at least two columns on the "
                f"class axis, received an output of shape {shape}. Keep the background of a single mask."
            )
        mask = (torch.arange(shape[-1], device=batch.y_true.device) > 0).expand(shape)
        if weights.mask is not None:
            mask = mask & weights.mask
        raw = batch.prediction.raw
        # A softmax needs the output of the background.
        prediction = batch.prediction if self.from_logits == "softmax" else Prediction(selected(mask, raw, 0.5))
        return replace(
            batch,
            y_true=selected(mask, batch.y_true, 0),
            prediction=prediction,
            weighting=Weighting(shape, mask, weights.weight),
        )

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
        """The addends of N and TP, before weights."""
        _, alpha, beta = self._coefficients
        p, y, weights = self._probability(batch.prediction), batch.y_true, batch.weighting
        overlap = torch.mul(y, p, out=weights.kept(p))
        if self.squared:
            p, y = p * p, y * y
        out = weights.kept(p)
        wrong = torch.sub(p, overlap, out=out)
        if alpha != 1:
            wrong = torch.mul(wrong, alpha, out=out)
        return torch.add(wrong, torch.sub(y, overlap, out=weights.passing(p)), alpha=beta, out=out), overlap

    def _statistics(self, batch: Aligned, keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Numerator and divisor summed over all axes but `keep`, in the order of the axes, in float64."""
        # The gradient needs it whole.
        probability = self._probability(batch.prediction)
        plain = not (probability.requires_grad and torch.is_grad_enabled())
        parts = summing.parts_of(batch) if plain and 0 in keep else (batch,)
        sums = [self._sums(part, keep) for part in parts]
        # Widened after the sum: `sum(dtype=)` would make a wide copy of every addend.
        wrong, overlap = (torch.cat(ts).double() if len(ts) > 1 else ts[0].double() for ts in zip(*sums, strict=True))
        return wrong, self._coefficients[0] * overlap + wrong

    def _sums(self, batch: Aligned, keep: tuple[int, ...]) -> list[Tensor]:
        inside, weights, terms = self._inside(batch), batch.weighting, list(self._terms(batch))
        if inside is not None:
            wide = Weighting(weights.shape, None, inside, weights._scratch).product_for(terms[0])
            assert wide is not None
            # In place where terms lie in buffers.
            terms = [torch.mul(t, wide, out=None if weights._scratch is None else t) for t in terms]
        return [summing.summed(t, keep) for t in terms]

    def _volumes(self, batch: Aligned, keep: tuple[int, ...]) -> Tensor:
        """Σ y over all axes but `keep`: what makes a class present."""
        inside = self._inside(batch)
        addends = batch.y_true if inside is None else batch.y_true * inside
        axes = tuple(a for a in range(len(batch.weighting.shape)) if a not in keep)
        return addends.sum(axes) if axes else addends

    def _counts(self, batch: Aligned, keep: tuple[int, ...]) -> Tensor:
        """Number of unmasked elements over all axes but `keep`."""
        return summing.counted(batch.weighting.mask, batch.weighting.shape, keep, batch.y_true)

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
        finest = summing.with_samples(batch.weighting.shape, fine)
        numerator, divisor = self._statistics(batch, finest)
        scale = self._column_scale(batch)
        if scale is not None and self._plain:
            numerator = numerator * scale
        if finest != fine:
            if isinstance(by, AndSamples):
                own = (0, *kept)
                rows = [summing.narrowed(t.detach(), finest, own) for t in (numerator, divisor)]
                by.taken[batch.where] = self._ratio_groups(batch, rows[0], rows[1], own, "sample"), batch
            numerator, divisor = numerator.sum(0), divisor.sum(0)
        groups = None if by is None else self._ratio_groups(batch, numerator.detach(), divisor.detach(), fine, by)
        numerator = summing.narrowed(numerator, fine, kept).reshape(-1)
        return Tally(
            numerator,
            summing.narrowed(divisor, fine, kept).reshape(-1),
            batch.weighting.count(),
            batch.weighting.total_weight(),
            coefficient=self._coefficient(batch),
            offset=self._offset,
            form="ratio",
            nonfinite=not_finite(numerator.detach()).sum(),
            groups=groups,
            statistics=None if self._plain else self._cell_statistics(batch, kept, scale),
            link=self.link,
            shown=prod(batch.weighting.shape),
        )

    @property
    def _offset(self) -> float:
        """What smooths the divisor of each cell."""
        return self.smooth

    def _coefficient(self, batch: Aligned) -> float:
        """A sum over cells has the coefficient 1, as has a mean that the link takes; other reductions are a mean."""
        if self.reduction.statistic is None or self.absent == "skip":
            return 1.0
        shape = batch.weighting.shape
        lengths = [shape[a] for a in self._kept(len(shape))]
        if not self.include_background and len(shape) - 1 in self._kept(len(shape)):
            lengths[-1] -= 1
        return 1.0 / prod(lengths)

    def _cell_statistics(self, batch: Aligned, kept: tuple[int, ...], scale: Tensor | None) -> Tensor:
        """`[3, G]`: count, count × class weight and target of each cell; a constant of a cell travels as two sums."""
        count = self._counts(batch, kept).double()
        weighted = count if scale is None else count * scale
        return torch.stack((count, weighted, self._volumes(batch, kept).detach().double())).reshape(3, -1)

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
        between = [a for a in self._kept(last + 1) if a not in (0, last)]
        if axis is None or between:
            why = f"axis={self.axis} keeps axis {between[0]}" if between else "its groups are classes or samples"
            raise InputError(
                f"{batch.where}: a ratio over the batch cannot be divided by {by if isinstance(by, str) else 'ids'!r}: "
                f"{why}; expected 'class' or 'sample', and no axis kept between the batch and the last, the classes. "
                "With the classes on axis 1 (NCHW), permute targets and output to (0, 2, 3, 1)."
            )
        return axis

    def _ratio_groups(
        self, batch: Aligned, numerator: Tensor, divisor: Tensor, fine: tuple[int, ...], by: By
    ) -> Groups:
        """Rows from statistics that keep the axes `fine`."""
        shape, count = batch.weighting.shape, self._counts(batch, fine)
        return of_cells(str(by), shape, len(shape) - 1 in self._kept(len(shape)), numerator, count, divisor)

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
        if self.absent == "skip":
            present = (self._volumes(batch, self._kept(rank)) > 0).reshape(shape)
            mask = present if mask is None else mask & present
        weight = self._outside(batch)
        if weight is not None:
            kept = [weight.shape[a] for a in self._kept(rank)]
            weight = weight.reshape(*kept, *(1,) * (len(shape) - len(kept)))
        columns = self._column_scale(batch)
        if columns is not None:
            weight = columns if weight is None else weight * columns
        return replace(batch, weighting=Weighting(shape, mask, weight))

    def _columns(self, length: int) -> int:
        # A cell is an entry: the class axis that was kept is one of the axes of the entries, as in Keras.
        return 1

    def _facts(self, batch: Aligned) -> tuple[Tensor, ...]:
        """What the link knows of the cells beside their sums: those with a target, where that matters."""
        if self.absent == "keep":
            return ()
        return (self._volumes(batch, self._kept(len(batch.weighting.shape))) > 0,)

    def _losses(self, batch: Aligned, numerator: Tensor, divisor: Tensor, facts: tuple[Tensor, ...]) -> Tensor:
        """The loss of each cell, with a class axis at the end."""
        rank = len(batch.weighting.shape)
        cells: Tensor = self._link.losses(numerator, divisor + self._offset, *facts)
        return cells if rank - 1 not in self._reduced(rank) else cells.unsqueeze(-1)

    def _elements(self, batch: Aligned) -> Tensor:
        sums = self._statistics(batch, self._kept(len(batch.weighting.shape)))
        return self._losses(batch, *sums, self._facts(batch))

    def _entries(self, batch: Aligned) -> Tensor:
        rank = len(batch.weighting.shape)
        cells = self._elements(batch)
        if not self.is_ratio(rank):
            product = self._as_cells(batch).weighting.product
            cells = cells if product is None else cells * product
        cells = cells.to(batch.prediction.raw.dtype)
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
        with torch.no_grad():
            tally, factor_n, factor_d = factors(batch, window, factor, by)
            cells = tuple(length if axis in kept else 1 for axis, length in enumerate(shape))
            return tally, self._pull_back(batch, factor_n.reshape(cells), factor_d.reshape(cells))

    def _ratio_factors(
        self, batch: Aligned, window: Tally | None, factor: float, by: By
    ) -> tuple[Tally, Tensor, Tensor]:
        """The tally of a ratio, and the factors on ∂N and ∂D of each cell."""
        tally = self.tally_aligned(batch, by)
        whole = tally if window is None else window
        divisor, outer = whole.divisor + whole.offset, factor * tally.coefficient
        if not self._plain:
            factor_n, factor_d = self._link.gradient(whole.numerator, divisor, whole.statistics)
            return tally, outer * factor_n, outer * factor_d
        factor_n = outer * divide(torch.ones_like(divisor), divisor)
        factor_d = -factor_n * divide(whole.numerator, divisor)
        # The numerator of the tally already holds the class weights; its derivative takes them here.
        scale = self._column_scale(batch)
        return tally, factor_n if scale is None else factor_n * scale.reshape(-1), factor_d

    def _cell_factors(
        self, batch: Aligned, window: Tally | None, factor: float, by: By
    ) -> tuple[Tally, Tensor, Tensor]:
        """The tally of cells with a loss each, and the factors on ∂N and ∂D of each cell."""
        rank = len(batch.weighting.shape)
        numerator, divisor = self._statistics(batch, self._kept(rank))
        cells, facts = self._as_cells(batch), self._facts(batch)
        tally = self._tally_elements(cells, self._losses(batch, numerator, divisor, facts), by)
        whole = tally if window is None else window
        outer = self._cell_weight(cells, torch.ones_like(divisor))
        outer = outer * (factor * reciprocal(whole.divisor + whole.offset, divisor.dtype))
        return tally, *self._link.slopes(numerator, divisor + self._offset, outer, *facts)

    def _cell_weight(self, cells: Aligned, ones: Tensor) -> Tensor:
        """What multiplies the loss of each cell in the numerator of the tally, in the shape and dtype of `ones`."""
        weight, rank = self._entry_weight(cells), cells.prediction.raw.ndim
        if weight is None:
            return ones
        return ones * (weight.squeeze(-1) if rank - 1 in self._reduced(rank) else weight)

    def _pull_back(self, batch: Aligned, factor_n: Tensor, factor_d: Tensor) -> Tensor:
        """From factors on numerator and divisor to the gradient with respect to the output."""
        kappa, alpha, beta = self._coefficients
        y = batch.y_true
        # ∂N/∂p = α(1 − y) − βy and ∂D/∂p = ∂N/∂p + κy. Their factors are joined while they are in float64.
        both = factor_n + factor_d
        blank, full = (alpha * both).to(y.dtype), (kappa * factor_d - beta * both).to(y.dtype)
        if self.squared:
            # The square of p has the slope 2p in place of 1.
            gradient = 2 * blank * self._probability(batch.prediction) + (full - blank) * y
        else:
            gradient = torch.lerp(blank, full, y)
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
