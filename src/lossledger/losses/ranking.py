"""Losses of pairs and triplets that the data gives: each compares its own scores or embeddings, so parts add up."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import debug_unwrap

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.regression import refuse_class_weight
from lossledger.reduction import Reduction
from lossledger.values import check_targets, selected, shape_of
from lossledger.weighting import ClassWeight, Weighting, split_shape


class _Compared(ElementLoss):
    """An entry compares a few scores or embeddings of its own, `[B, d…, members]` or `[B, d…, members, D]`."""

    classes_are: ClassVar[str | None] = None
    members: ClassVar[int]
    embeddings: ClassVar[bool] = True
    expected: ClassVar[str]

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        split_shape(y_pred, where)
        axis = -2 if self.embeddings else -1
        entries = tuple(y_pred.shape[:axis])
        fits = entries and y_pred.shape[axis] == self.members
        if not fits or tuple(y_true.shape) not in (entries, (*entries, 1)):
            raise InputError(
                f"{where}: expected {self.expected}; received y_true {shape_of(y_true)} and y_pred {shape_of(y_pred)}. "
                f"Put what is compared on one axis: torch.stack((…), {axis})."
            )
        return y_true.reshape(*entries, 1).to(y_pred.dtype), y_pred

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return tuple(y_true.shape)

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        assert weights.mask is not None
        mask = weights.mask.unsqueeze(-1) if self.embeddings else weights.mask
        return weights.select(y_true, 1), selected(mask, y_pred, 0.5)

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        refuse_class_weight("a loss of pairs", class_weight, where)


def check_margin(margin: Any, name: str) -> float:
    """A margin that is not negative.

    Raises:
        InputError: a negative margin, or NaN.
    """
    if not margin >= 0:
        raise InputError(f"{name}: expected margin >= 0, received {margin!r}.")
    return float(margin)


def length(vectors: Tensor) -> Tensor:
    """Euclidean length along the last axis; the gradient at a zero vector is 0."""
    square = vectors.square().sum(-1)
    # A NaN stays one: it is not 0.
    some = square != 0
    return square.where(some, 1.0).sqrt().where(some, 0.0)


class MarginRanking(_Compared):
    """Of two scores the right one is higher by a margin: `max(0, m − y (s₁ − s₂))`.

    Args:
        margin: m ≥ 0.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B, d…]` or `[B, d…, 1]`, 1 where the first score shall be the higher one and −1 where the second;
    output `[B, d…, 2]`, the two scores; entries, weights and masks `[B, d…]`.

    Divides by: unmasked entries.

    Raises:
        InputError: shapes that do not fit, labels other than −1 and 1, a negative margin.

    Example:
        >>> import lossledger as ll
        >>> ll.losses.margin_ranking([1, -1], [[0.5, 0.25], [0.5, 0.25]], margin=0.5)
        tensor([0.2500, 0.7500])

    Source: torch.nn.MarginRankingLoss 2.13 (which takes the scores apart).
    """

    members: ClassVar[int] = 2
    embeddings: ClassVar[bool] = False
    expected: ClassVar[str] = "labels [B, …], -1 or 1, and an output [B, …, 2], two scores an entry"

    def __init__(
        self,
        margin: float = 0.0,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "margin_ranking",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.margin = check_margin(margin, self.name)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        y_true = debug_unwrap(y_true.detach())
        bad = y_true.abs() != 1
        if bool(bad.any()):
            raise InputError(
                f"{where}: expected labels -1 and 1, received {float(y_true[bad][0]):g} ({int(bad.sum())} such). "
                "Labels 0 and 1 become these with 2 * y - 1."
            )

    def _missing(self, batch: Aligned) -> Tensor:
        lead = batch.prediction.raw[..., :1] - batch.prediction.raw[..., 1:]
        return self.margin - batch.y_true * lead

    def _elements(self, batch: Aligned) -> Tensor:
        return self._missing(batch).clamp(min=0)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        missing = self._missing(batch)
        # Equal scores without a margin lie on the edge: they are pulled apart, as autograd and torch do.
        slope = batch.y_true * (missing >= 0)
        return missing.clamp(min=0), torch.cat((-slope, slope), -1)


class Contrastive(_Compared):
    """Two embeddings of one kind near each other, of different kinds at least a margin apart.

    Entry `y·d² + (1 − y)·max(m − d, 0)²` with d the Euclidean distance of the pair. At distance 0 the gradient is 0.

    Args:
        margin: m ≥ 0.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B, d…]` or `[B, d…, 1]`, 1 where the two are of one kind and 0 where not; output `[B, d…, 2, D]`,
    the pair; entries, weights and masks `[B, d…]`.

    Divides by: unmasked entries.

    Raises:
        InputError: shapes that do not fit, labels outside [0, 1], a negative margin.

    Example:
        >>> import lossledger as ll
        >>> pair = [[0.0, 0.0], [0.3, 0.4]]
        >>> ll.losses.contrastive([1, 0], [pair, pair])
        tensor([0.2500, 0.2500])

    Source: Hadsell, Chopra and LeCun 2006, without their factor ½.
    """

    members: ClassVar[int] = 2
    expected: ClassVar[str] = "labels [B, …], 0 or 1, and an output [B, …, 2, D], two embeddings an entry"

    def __init__(
        self,
        margin: float = 1.0,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "contrastive",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.margin = check_margin(margin, self.name)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        check_targets(y_true, where)

    def _elements(self, batch: Aligned) -> Tensor:
        first, second = batch.prediction.raw.unbind(-2)
        difference, y = first - second, batch.y_true
        near = difference.square().sum(-1, keepdim=True)
        far = (self.margin - length(difference).unsqueeze(-1)).clamp(min=0).square()
        return y * near + (1 - y) * far


class Triplet(_Compared):
    """An anchor nearer to its positive than to its negative, by a margin: `max(0, d(a, p) − d(a, n) + m)`.

    d is the Euclidean distance, or its square. The triplets come from the data, so parts add up; `TripletHard` and
    `TripletSemiHard` look for them in the batch. At distance 0 the gradient is 0.

    Args:
        margin: m ≥ 0.
        squared: compare squared distances.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: output `[B, d…, 3, D]`, anchor, positive and negative of each entry; targets `[B, d…]` or `[B, d…, 1]`,
    which are not read (a triplet has no target): pass zeros. Entries, weights and masks `[B, d…]`.

    Divides by: unmasked entries.

    Raises:
        InputError: shapes that do not fit, a negative margin.

    Example:
        >>> import lossledger as ll
        >>> anchor, positive, negative = [0.0, 0.0], [0.0, 0.5], [0.75, 0.0]
        >>> float(ll.losses.Triplet(margin=1.0)([0], [[anchor, positive, negative]]))
        0.75

    Source: Weinberger and Saul 2009; Schroff, Kalenichenko and Philbin 2015 (squared); torch.nn.TripletMarginLoss 2.13
        (which adds 1e-6 to each difference).
    """

    members: ClassVar[int] = 3
    expected: ClassVar[str] = "an output [B, …, 3, D], anchor, positive and negative an entry, and any targets [B, …]"

    def __init__(
        self,
        margin: float = 1.0,
        squared: bool = False,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "triplet",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.margin = check_margin(margin, self.name)
        self.squared = squared

    def _elements(self, batch: Aligned) -> Tensor:
        anchor, positive, negative = batch.prediction.raw.unbind(-2)
        near, far = anchor - positive, anchor - negative
        distances = near.square().sum(-1) - far.square().sum(-1) if self.squared else length(near) - length(far)
        return (distances + self.margin).clamp(min=0).unsqueeze(-1)
