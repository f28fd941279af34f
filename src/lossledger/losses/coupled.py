"""The base of losses whose samples are compared with each other, and what they compare with.

A sample's loss depends on the samples beside it, so the value of a split is not the value of the whole: `additive` is
`False`. Within one batch everything else holds: masks, weights, groups by sample, reductions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned, Late, and_mask
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.prediction import Prediction
from lossledger.losses.regression import refuse_class_weight
from lossledger.values import selected, shape_of
from lossledger.weighting import ClassWeight, Weighting, as_tensor, split_shape


class BatchCoupled(ElementLoss):
    """A loss of labels `[B]` and embeddings `[B, …]` in which every unmasked sample is an anchor and a partner.

    A subclass says which anchors count, and what each of them costs.
    """

    classes_are: ClassVar[str | None] = None
    additive: ClassVar[bool] = False
    """Whether tallies of parts of a batch add up to the tally of the whole."""

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
            labels = selected(present, labels, 0)
            vectors = selected(present.reshape(-1, *(1,) * (vectors.ndim - 1)), vectors, 0.0)
        return replace(
            batch,
            y_true=torch.stack((labels, present.to(labels.dtype)), -1),
            prediction=batch.prediction if mask is None else Prediction(vectors),
        )

    def _anchors(self, labels: Tensor, present: Tensor) -> Tensor:
        """`[B]`, which samples have partners enough to count."""
        raise NotImplementedError

    def _costs(self, vectors: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """`[B]`, the loss of each anchor, finite also where it does not count."""
        raise NotImplementedError

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return (y_pred.shape[0], 1)

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        refuse_class_weight("a loss of pairs", class_weight, where)

    def _weighting(self, shape: tuple[int, ...], y_true: Tensor, y_pred: Tensor, given: Late, where: str) -> Weighting:
        present = and_mask(torch.ones_like(y_true, dtype=torch.bool), given.mask, shape, where)
        counts = self._anchors(y_true, present)
        return super()._weighting(shape, y_true, y_pred, Late(given.sample_weight, counts, given.class_weight), where)

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        # A sample that does not count as an anchor is a partner of others.
        return y_true, y_pred

    def _elements(self, batch: Aligned) -> Tensor:
        (labels, taking_part), vectors = batch.y_true.unbind(-1), batch.prediction.raw
        if len(labels) == 0:
            return vectors.flatten(1).sum(1, keepdim=True)
        present = taking_part != 0
        costs = self._costs(vectors, labels, present)
        return costs.where(self._anchors(labels, present), 0.0).unsqueeze(-1)


class Labelled(BatchCoupled):
    """Embeddings with a label each: the positives of an anchor are the other samples of its label."""

    remove_diagonal: bool = True

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        split_shape(y_pred, where)
        labels = y_true.squeeze(-1) if y_true.ndim == 2 and y_true.shape[-1] == 1 else y_true
        if y_pred.ndim != 2 or labels.shape != y_pred.shape[:1]:
            raise InputError(
                f"{where}: expected one label a sample, [B] or [B, 1], and embeddings [B, D]; received y_true "
                f"{shape_of(y_true)} and y_pred {shape_of(y_pred)}. One-hot labels become labels with argmax(-1)."
            )
        return labels.long() if labels.dtype == torch.bool else labels, y_pred

    def _anchors(self, labels: Tensor, present: Tensor) -> Tensor:
        positive, negative = self._partners(labels, present)
        return present & positive.any(1) & negative.any(1)

    def _partners(self, labels: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples (columns) are positives and negatives of which anchors (rows)."""
        same = labels.unsqueeze(0) == labels.unsqueeze(1)
        positive, negative = same & present, ~same & present
        if self.remove_diagonal:
            positive = positive & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        return positive, negative


def log_sum_exp(values: Tensor, chosen: Tensor) -> Tensor:
    """`log Σ exp` over the chosen values of each row, 0 where none is chosen."""
    some = chosen.any(1, keepdim=True)
    return values.masked_fill(~chosen, -torch.inf).masked_fill(~some, 0.0).logsumexp(1).where(some.squeeze(1), 0.0)


def check_temperature(temperature: Any, name: str) -> float:
    """A temperature that divides similarities.

    Raises:
        InputError: not positive.
    """
    if not temperature > 0:
        raise InputError(f"{name}: temperature must be positive, received {temperature!r}.")
    return float(temperature)
