"""Losses of embeddings: what counts is which samples of a batch are near each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned, Late, and_mask
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.prediction import Prediction
from lossledger.losses.regression import refuse_class_weight
from lossledger.reduction import Reduction
from lossledger.weighting import ClassWeight, Weighting, as_tensor, shape_of, split_shape


class Circle(ElementLoss):
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

    classes_are: ClassVar[str | None] = None
    additive: ClassVar[bool] = False
    """Whether tallies of parts of a batch add up to the tally of the whole."""

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
        """One batch; targets become `[B, 2]`, the label and whether the sample takes part."""
        batch = super().align(y_true, y_pred, sample_weight, mask, class_weight, where, checked)
        labels, vectors = batch.y_true, batch.prediction.raw
        present = torch.ones_like(labels, dtype=torch.bool)
        if mask is not None:
            given = as_tensor(mask, f"{batch.where}: mask", device=labels.device)
            present = and_mask(present, given, batch.weighting.shape, batch.where)
            labels = labels.where(present, torch.zeros_like(labels))
            vectors = vectors.where(present.unsqueeze(-1), torch.zeros_like(vectors))
        return replace(
            batch,
            y_true=torch.stack((labels, present.to(labels.dtype)), -1),
            prediction=batch.prediction if mask is None else Prediction(vectors),
        )

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        split_shape(y_pred, where)
        labels = y_true.squeeze(-1) if y_true.ndim == 2 and y_true.shape[-1] == 1 else y_true
        if y_pred.ndim != 2 or labels.shape != y_pred.shape[:1]:
            raise InputError(
                f"{where}: expected one label a sample, [B] or [B, 1], and embeddings [B, D]; received y_true "
                f"{shape_of(y_true)} and y_pred {shape_of(y_pred)}. One-hot labels become labels with argmax(-1)."
            )
        return labels.long() if labels.dtype == torch.bool else labels, y_pred

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return (y_pred.shape[0], 1)

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        refuse_class_weight("a loss of pairs", class_weight, where)

    def _weighting(self, shape: tuple[int, ...], y_true: Tensor, y_pred: Tensor, given: Late, where: str) -> Weighting:
        present = and_mask(torch.ones_like(y_true, dtype=torch.bool), given.mask, shape, where)
        positive, negative = self._partners(y_true, present)
        counts = present & positive.any(1) & negative.any(1)
        return super()._weighting(shape, y_true, y_pred, Late(given.sample_weight, counts, given.class_weight), where)

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        # A sample without a positive is no anchor, but a negative of others.
        return y_true, y_pred

    def _partners(self, labels: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples (columns) are positives and negatives of which anchors (rows)."""
        same = labels.unsqueeze(0) == labels.unsqueeze(1)
        positive, negative = same & present, ~same & present
        if self.remove_diagonal:
            positive = positive & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        return positive, negative

    def _elements(self, batch: Aligned) -> Tensor:
        labels, present = batch.y_true.unbind(-1)
        positive, negative = self._partners(labels, present != 0)
        vectors, m = batch.prediction.raw, self.margin
        distance = (1 - vectors @ vectors.T).clamp(min=0)
        near = -self.gamma * (m + distance).clamp(min=0) * (m - distance)
        far = self.gamma * (1 + m - distance).clamp(min=0) * (1 - m - distance)
        exponent = _log_sum_exp(near, positive) + _log_sum_exp(far, negative)
        counts = positive.any(1) & negative.any(1) & (present != 0)
        return F.softplus(exponent).where(counts, 0.0).unsqueeze(-1)


def _log_sum_exp(values: Tensor, chosen: Tensor) -> Tensor:
    """`log Σ exp` over the chosen values of each row, 0 where none is chosen."""
    some = chosen.any(1, keepdim=True)
    return values.masked_fill(~chosen, -torch.inf).masked_fill(~some, 0.0).logsumexp(1).where(some.squeeze(1), 0.0)
