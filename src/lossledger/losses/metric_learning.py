"""Losses of embeddings with labels: what counts is which samples of a batch are near each other.

All are batch-coupled: the value of a split is not the value of the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.coupled import Labelled, check_temperature, log_sum_exp
from lossledger.losses.ranking import check_margin
from lossledger.losses.regression import direction
from lossledger.reduction import Reduction


class Circle(Labelled):
    """Embeddings of one label together, of others apart; batch-coupled: parts of a batch do not add up to the whole.

    Of an anchor `softplus(log Σ_pos exp(−γ(m + d)₊(m − d)) + log Σ_neg exp(γ(1 + m − d)₊(1 − m − d)))`, with
    `d = max(1 − cos, 0)` the distance to the samples of its label and to those of others.

    Positives and negatives come from the same batch, so a sample's loss depends on the samples beside it: `additive` is
    `False`, and accumulation or ranks see other pairs than one big batch. A masked sample is neither anchor nor
    partner. A sample weight weighs the anchor.

    Args:
        gamma: γ > 0, the scale.
        margin: m, how near is near enough.
        remove_diagonal: a sample is not its own positive.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B]` or `[B, 1]`, embeddings `[B, D]` of length 1; weights and masks `[B]`.

    Divides by: unmasked samples that have a positive and a negative in the batch.

    Raises:
        InputError: shapes that do not fit, γ that is not positive.

    Example:
        >>> import lossledger as ll
        >>> near, far = [1.0, 0.0], [0.0, 1.0]
        >>> circle = ll.losses.Circle(gamma=1.0)
        >>> round(float(circle([0, 0, 1], [near, near, far])), 4)
        0.5459

    Source: Sun et al. 2020; keras.losses.Circle 3.15 (which divides by the losses that are greater than 0, so also
        leaves out those that underflow, and lets masked samples be partners).
    """

    def __init__(
        self,
        gamma: float = 80.0,
        margin: float = 0.4,
        remove_diagonal: bool = True,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "circle",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        if not gamma > 0:
            raise InputError(f"{self.name}: gamma must be positive, received {gamma!r}.")
        self.gamma = gamma
        self.margin = margin
        self.remove_diagonal = remove_diagonal

    def _costs(self, vectors: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        return circle_of(vectors, vectors, *self._partners(labels, present), self.gamma, self.margin)


def circle_of(
    anchors: Tensor, others: Tensor, positive: Tensor, negative: Tensor, gamma: float, margin: float
) -> Tensor:
    """The circle loss of each anchor (row) among others (columns), `[B]`; 0 without a positive or a negative."""
    distance = (1 - anchors @ others.T).clamp(min=0)
    near = -gamma * (margin + distance).clamp(min=0) * (margin - distance)
    far = gamma * (1 + margin - distance).clamp(min=0) * (1 - margin - distance)
    losses = F.softplus(log_sum_exp(near, positive) + log_sum_exp(far, negative))
    return losses.where(positive.any(1) & negative.any(1), 0.0)


class _Mined(Labelled):
    """Triplets that are looked for in the batch, by their distances."""

    def __init__(
        self,
        margin: float,
        squared: bool,
        reduction: str | Reduction | None,
        name: str | None,
        dtype: str | torch.dtype | None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.margin = check_margin(margin, self.name)
        self.squared = squared

    def _distances(self, vectors: Tensor) -> Tensor:
        # From differences, not from products: near vectors would lose all digits. The gradient at 0 is 0.
        distance = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        return distance.square() if self.squared else distance


class TripletHard(_Mined):
    """Each anchor with its farthest positive and its nearest negative: `max(0, max d(a, p) − min d(a, n) + m)`.

    Batch-coupled: the value of a split is not the value of the whole, for the triplets are looked for in the batch. A
    masked sample is neither anchor nor partner. A sample weight weighs the anchor.

    Args:
        margin: m ≥ 0.
        squared: compare squared Euclidean distances.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B]` or `[B, 1]`, embeddings `[B, D]`; weights and masks `[B]`.

    Divides by: unmasked samples that have a positive and a negative in the batch.

    Raises:
        InputError: shapes that do not fit, a negative margin.

    Example:
        >>> import lossledger as ll
        >>> points = [[0.0], [1.0], [3.0], [4.5]]
        >>> ll.losses.triplet_hard([0, 0, 1, 1], points)
        tensor([0.0000, 0.0000, 0.5000, 0.0000])

    Source: Hermans, Beyer and Leibe 2017 ("batch hard").
    """

    def __init__(
        self,
        margin: float = 1.0,
        squared: bool = False,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "triplet_hard",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(margin, squared, reduction, name, dtype)

    def _costs(self, vectors: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        positive, negative = self._partners(labels, present)
        distance = self._distances(vectors)
        near, far = _farthest(distance, positive), -_farthest(-distance, negative)
        return (near - far + self.margin).clamp(min=0)


class TripletSemiHard(_Mined):
    """Each pair of an anchor and a positive with the nearest negative that is farther away than the positive.

    `max(0, d(a, p) − d(a, n) + m)`; where no negative is farther than the positive, n is the farthest one. The loss of
    an anchor is the mean over its positives.

    Batch-coupled: the value of a split is not the value of the whole, for the triplets are looked for in the batch. A
    masked sample is neither anchor nor partner. A sample weight weighs the anchor.

    Args:
        margin: m ≥ 0.
        squared: compare squared Euclidean distances.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B]` or `[B, 1]`, embeddings `[B, D]`; weights and masks `[B]`.

    Divides by: unmasked samples that have a positive and a negative in the batch. Other libraries divide by the number
        of pairs instead, where an anchor with many positives counts more.

    Raises:
        InputError: shapes that do not fit, a negative margin.

    Example:
        >>> import lossledger as ll
        >>> points = [[0.0], [1.0], [1.5], [5.0]]
        >>> ll.losses.triplet_semi_hard([0, 0, 1, 1], points)
        tensor([0.5000, 0.0000, 3.0000, 0.5000])

    Source: Schroff, Kalenichenko and Philbin 2015 (with squared distances).
    """

    def __init__(
        self,
        margin: float = 1.0,
        squared: bool = False,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "triplet_semi_hard",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(margin, squared, reduction, name, dtype)

    def _costs(self, vectors: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        positive, negative = self._partners(labels, present)
        distance = self._distances(vectors)
        # The negatives of each anchor in order; the first behind each positive is found by bisection.
        ordered = distance.masked_fill(~negative, torch.inf).sort(1).values
        place = torch.searchsorted(ordered.detach(), distance.detach(), right=True)
        behind = place < negative.sum(1, keepdim=True)
        # A column at the end, which no pair with a positive and a negative reads.
        padded = F.pad(ordered, (0, 1)).masked_fill(F.pad(ordered, (0, 1)).isinf(), 0.0)
        far = torch.where(behind, padded.gather(1, place), _farthest(distance, negative).unsqueeze(1))
        missing = (distance - far + self.margin).clamp(min=0).where(positive, 0.0)
        return missing.sum(1) / positive.sum(1).clamp(min=1)


class SupervisedContrastive(Labelled):
    """Embeddings of one label together: a cross-entropy whose right answers are the positives of an anchor.

    Of an anchor the mean over its positives of `−log (exp(s_ap / τ) / Σ_n exp(s_an / τ))`, with s the cosine and n all
    samples but the anchor.

    Batch-coupled: the value of a split is not the value of the whole, for the sum runs over the batch. A masked sample
    is neither anchor nor partner. A sample weight weighs the anchor. Several views of a sample are samples of one
    label.

    Args:
        temperature: τ > 0.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B]` or `[B, 1]`, embeddings `[B, D]` of any length; weights and masks `[B]`.

    Divides by: unmasked samples that have a positive in the batch.

    Raises:
        InputError: shapes that do not fit, a temperature that is not positive.

    Example:
        >>> import lossledger as ll
        >>> points = [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]
        >>> ll.losses.supervised_contrastive([0, 0, 1], points, temperature=1.0)   # log(1 + exp(−1))
        tensor([0.3133, 0.3133, 0.0000])

    Source: Khosla et al. 2020 (their L_out).
    """

    def __init__(
        self,
        temperature: float = 0.1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "supervised_contrastive",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.temperature = check_temperature(temperature, self.name)

    def _anchors(self, labels: Tensor, present: Tensor) -> Tensor:
        return present & self._partners(labels, present)[0].any(1)

    def _costs(self, vectors: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        positive, negative = self._partners(labels, present)
        unit = direction(vectors)
        similarity = unit @ unit.T / self.temperature
        mean = similarity.where(positive, 0.0).sum(1) / positive.sum(1).clamp(min=1)
        return log_sum_exp(similarity, positive | negative) - mean


def _farthest(distance: Tensor, chosen: Tensor) -> Tensor:
    """The largest of the chosen distances of each row, 0 where none is chosen."""
    some = chosen.any(1, keepdim=True)
    return distance.masked_fill(~chosen, -torch.inf).masked_fill(~some, 0.0).amax(1)
