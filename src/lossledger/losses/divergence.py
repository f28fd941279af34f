"""Distances between distributions that are no cross-entropies: Kullback–Leibler, generalized cross-entropy."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.classification import (
    EPSILON,
    CategoricalCrossentropy,
    SparseCategoricalCrossentropy,
)
from lossledger.reduction import Reduction
from lossledger.values import outside_probabilities


class KLDivergence(CategoricalCrossentropy):
    """Kullback–Leibler divergence: entry `Σ_k y_k log(y_k / p_k)`, both clipped to [ε, 1].

    The difference to the cross-entropy with soft targets is the entropy of the target; the output is not normalised.

    Args:
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, K]`; entries, weights and masks `[B, d…]`. `by="class"` and `class_weight` go
    by the argmax of the target.

    Divides by: unmasked entries.

    Raises:
        InputError: shapes that differ, probabilities or targets outside [0, 1] (Keras clips them).

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.KLDivergence()([[0.5, 0.5]], [[0.25, 0.75]])), 4)
        0.1438

    Source: keras.losses.KLDivergence 3.15.
    """

    _of_logits: ClassVar[str] = "give it one: the loss takes no logits"

    def __init__(
        self,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "kl_divergence",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(reduction=reduction, name=name, dtype=dtype)

    def _elements(self, batch: Aligned) -> Tensor:
        y = batch.y_true.clamp(EPSILON, 1)
        entries = (y * (y.log() - batch.prediction.raw.clamp(EPSILON, 1).log())).sum(-1, keepdim=True)
        return self._flagged_entry(entries, batch.prediction)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        p = batch.prediction.raw
        inside = (p >= EPSILON) & (p <= 1)
        return self._elements(batch), -batch.y_true.clamp(EPSILON, 1) * inside / p.where(inside, 1.0)


class CategoricalGeneralizedCrossEntropy(SparseCategoricalCrossentropy):
    """Between cross-entropy (q → 0) and absolute error (q = 1), against wrong labels: entry `(1 − p_y^q) / q`.

    The output is neither clipped nor normalised: the gradient at a probability of 0 is infinite.

    Args:
        q: in (0, 1).
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B, d…]` or `[B, d…, 1]`, output `[B, d…, K]`; entries, weights and masks `[B, d…]`.

    Divides by: unmasked entries.

    Raises:
        InputError: q outside (0, 1), labels outside 0 … K−1, probabilities outside [0, 1].

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.CategoricalGeneralizedCrossEntropy()([1], [[0.75, 0.25]])), 4)
        1.0

    Source: Zhang and Sabuncu 2018; keras.losses.CategoricalGeneralizedCrossEntropy 3.15 (which compares every label
        with every sample where labels are `[B, 1]`; ours reads them as `[B]`).
    """

    _of_logits: ClassVar[str] = "give it one: the loss takes no logits"

    def __init__(
        self,
        q: float = 0.5,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "categorical_generalized_cross_entropy",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(reduction=reduction, name=name, dtype=dtype)
        if not 0 < q < 1:
            raise InputError(f"{self.name}: q must be in the interval (0, 1), ends excluded; received {q!r}.")
        self.q = q

    def _elements(self, batch: Aligned) -> Tensor:
        p = batch.prediction.raw
        entries = (1 - p.gather(-1, batch.y_true.long().unsqueeze(-1)) ** self.q) / self.q
        return torch.where(outside_probabilities(p.detach()).any(-1, keepdim=True), torch.nan, entries)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        labels, p = batch.y_true.long().unsqueeze(-1), batch.prediction.raw
        return self._elements(batch), torch.zeros_like(p).scatter(-1, labels, -(p.gather(-1, labels) ** (self.q - 1)))
