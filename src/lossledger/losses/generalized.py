"""Generalized Dice: the classes of a sample in one ratio, each weighted by the inverse of its volume."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.links import GeneralizedLink
from lossledger.losses.ratio import EPSILON, Overlap, Policies
from lossledger.reduction import Reduction
from lossledger.weighting import Weighting

POWERS = {"square": 2, "simple": 1, "uniform": 0}


class GeneralizedDice(Overlap):
    """Generalized Dice loss: `1 − (2 Σ_c w_c Σ y·p + s_n) / (Σ_c w_c (Σ y + Σ p) + s_d)`, with `w_c = 1 / (Σ y)²`.

    A class without target takes the largest weight of the others; without any target all weights are 0, and so is the
    loss. Weights of large classes are small numbers: keep `smooth` well below `1 / pixels`.

    Args:
        weights: `"square"` for `1 / T²` of the volume T = Σ y, `"simple"` for `1 / T`, `"uniform"` for 1.
        from_logits: `False`, `"sigmoid"` or `"softmax"`.
        smooth: s_d > 0, added to the divisor.
        grouping: `"sample"`: a loss for each sample, then their mean. `"all"`: one ratio over the batch, with weights
            from the volumes of the whole window.
        smooth_numerator: as for `Dice`.
        include_background: as for `Dice`.
        reduction: of the samples.
        name: name of the term.
        dtype: dtype of the result.

    Weights: as for `Dice` with the same grouping; class weights multiply the part of their class in the loss.

    Divides by: the weighted sum of Σ y + Σ p, then the number of samples.

    Raises:
        InputError: as `Dice`; another name of weights or grouping.

    Example:
        >>> import lossledger as ll
        >>> masks, found = [[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], [[[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]]]
        >>> round(float(ll.losses.GeneralizedDice()(masks, found)), 4)
        0.3153

    Source: Sudre et al. 2017; monai.losses.GeneralizedDiceLoss 1.6.
    """

    def __init__(
        self,
        weights: str = "square",
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "generalized_dice",
        dtype: str | torch.dtype | None = None,
        from_logits: bool | str = False,
        smooth: float = EPSILON,
        *,
        grouping: str = "sample",
        smooth_numerator: float | None = None,
        include_background: bool = True,
    ) -> None:
        policies = Policies(grouping, smooth_numerator, include_background)
        super().__init__((2.0, 1.0, 1.0), None, from_logits, smooth, name, reduction, dtype, policies)
        if grouping not in ("sample", "all"):
            raise InputError(f"{self.name}: grouping must be 'sample' or 'all', received {grouping!r}.")
        if weights not in POWERS:
            raise InputError(f"{self.name}: weights must be one of {tuple(POWERS)}, received {weights!r}.")
        self.weights = weights

    @property
    def _link(self) -> GeneralizedLink:
        return GeneralizedLink(POWERS[self.weights], self.smooth, self._cell_link.shift)

    @property
    def _offset(self) -> float:
        # The smoothing enters once, after the weighted sum.
        return 0.0

    def _reduced(self, rank: int) -> tuple[int, ...]:
        # Sums keep the classes; the link joins them.
        return tuple(range(self.grouping == "sample", rank - 1))

    def _coefficient(self, batch: Aligned) -> float:
        return 1.0

    def _as_cells(self, batch: Aligned) -> Aligned:
        cells = super()._as_cells(batch)
        weights = cells.weighting
        if weights.mask is None:
            return cells
        # A sample counts as a whole, with all of its classes.
        mask = weights.mask.any(-1, keepdim=True)
        return replace(cells, weighting=Weighting(weights.shape, mask, weights.weight))

    def _facts(self, batch: Aligned) -> tuple[Tensor, ...]:
        kept = self._kept(len(batch.weighting.shape))
        return self._volumes(batch, kept).detach().double(), self._counts(batch, kept) > 0

    def _losses(self, batch: Aligned, numerator: Tensor, divisor: Tensor, facts: tuple[Tensor, ...]) -> Tensor:
        # The mean over the class axis makes of them their sum.
        return super()._losses(batch, numerator, divisor, facts) * numerator.shape[-1]

    def _cell_weight(self, cells: Aligned, ones: Tensor) -> Tensor:
        return super()._cell_weight(cells, ones) * ones.shape[-1]

    def _entries(self, batch: Aligned) -> Tensor:
        elements, product = self._elements(batch), self._as_cells(batch).weighting.product
        return (elements if product is None else elements * product).mean(-1).to(batch.prediction.raw.dtype)
