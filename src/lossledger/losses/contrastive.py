"""Losses of two views of each sample: each view finds the other among those of the batch.

All are batch-coupled: the value of a split is not the value of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.coupled import BatchCoupled, check_temperature, log_sum_exp
from lossledger.losses.regression import direction
from lossledger.reduction import Reduction
from lossledger.values import shape_of
from lossledger.weighting import split_shape


class _TwoViews(BatchCoupled):
    """Two embeddings a sample, `[B, 2, D]`; the targets are not read."""

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        split_shape(y_pred, where)
        samples = tuple(y_pred.shape[:1])
        if y_pred.ndim != 3 or y_pred.shape[1] != 2 or tuple(y_true.shape) not in (samples, (*samples, 1)):
            raise InputError(
                f"{where}: expected an output [B, 2, D], two embeddings a sample, and any targets [B]; received y_true "
                f"{shape_of(y_true)} and y_pred {shape_of(y_pred)}. Join the views: torch.stack((first, second), 1)."
            )
        return torch.zeros(samples, dtype=torch.int64, device=y_pred.device), y_pred

    def _anchors(self, labels: Tensor, present: Tensor) -> Tensor:
        # A sample that is alone finds its other view without a choice.
        return present & (present.sum() > 1)


class InfoNCE(_TwoViews):
    """Each query finds its key among the keys of the batch: `−log (exp(s_ii / τ) / Σ_j exp(s_ij / τ))`.

    s_ij is the cosine between query i and key j. With `symmetric` the mean of this and of the way back, each key among
    the queries.

    Batch-coupled: the value of a split is not the value of the whole, for the sum runs over the batch (the value of
    chance is log B). A masked sample is neither anchor nor partner. A sample weight weighs the anchor.

    Args:
        temperature: τ > 0.
        symmetric: both ways.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: output `[B, 2, D]`, query and key of each sample, of any length; targets `[B]` or `[B, 1]`, which are not
    read: pass zeros. Weights and masks `[B]`.

    Divides by: unmasked samples; 0 where there is only one.

    Raises:
        InputError: shapes that do not fit, a temperature that is not positive.

    Example:
        >>> import lossledger as ll
        >>> near, far = [1.0, 0.0], [0.0, 1.0]
        >>> ll.losses.info_nce([0, 0], [[near, near], [far, near]], temperature=1.0)
        tensor([0.6931, 0.6931])

    Source: van den Oord, Li and Vinyals 2018; Radford et al. 2021 (symmetric).
    """

    def __init__(
        self,
        temperature: float = 0.07,
        symmetric: bool = False,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "info_nce",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.temperature = check_temperature(temperature, self.name)
        self.symmetric = symmetric

    def _costs(self, vectors: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        queries, keys = direction(vectors).unbind(1)
        similarity = queries @ keys.T / self.temperature
        chosen = present.expand(len(present), -1)
        there = log_sum_exp(similarity, chosen) - similarity.diagonal()
        if not self.symmetric:
            return there
        return 0.5 * (there + log_sum_exp(similarity.T, chosen) - similarity.diagonal())


class NTXent(_TwoViews):
    """Each view finds the other view of its sample among all other views: a cross-entropy of 2B − 1 choices.

    Of a view i with its other view j `−log (exp(s_ij / τ) / Σ_{k ≠ i} exp(s_ik / τ))`, with s the cosine; the loss of a
    sample is the mean of its two views.

    Batch-coupled: the value of a split is not the value of the whole, for the sum runs over the batch. A masked sample
    is neither anchor nor partner. A sample weight weighs the anchor.

    Args:
        temperature: τ > 0.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: output `[B, 2, D]`, two views of each sample, of any length; targets `[B]` or `[B, 1]`, which are not read:
    pass zeros. Weights and masks `[B]`.

    Divides by: unmasked samples; 0 where there is only one.

    Raises:
        InputError: shapes that do not fit, a temperature that is not positive.

    Example:
        >>> import lossledger as ll
        >>> views = [[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]
        >>> ll.losses.nt_xent([0, 0], views, temperature=1.0)             # log(1 + 2 · exp(−1))
        tensor([0.5514, 0.5514])

    Source: Chen et al. 2020.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "nt_xent",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        self.temperature = check_temperature(temperature, self.name)

    def _costs(self, vectors: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        samples = len(present)
        # View v of sample i is row v·B + i.
        views = direction(vectors).transpose(0, 1).reshape(2 * samples, -1)
        similarity = views @ views.T / self.temperature
        others = present.repeat(2) & ~torch.eye(2 * samples, dtype=torch.bool, device=present.device)
        pair = similarity.diagonal(samples).repeat(2)
        return (log_sum_exp(similarity, others) - pair).reshape(2, samples).mean(0)
