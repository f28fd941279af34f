"""The losses as functions: one value an entry, unreduced; those of keras.losses have its names and arguments.

A function is its class with the reduction `none`, so the formula stands in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.asymmetric import AsymmetricFocal, AsymmetricFocalTversky
from lossledger.losses.classification import (
    BinaryCrossentropy,
    CategoricalCrossentropy,
    SoftCategoricalCrossentropy,
    SparseCategoricalCrossentropy,
)
from lossledger.losses.contrastive import InfoNCE, NTXent
from lossledger.losses.divergence import CategoricalGeneralizedCrossEntropy, KLDivergence
from lossledger.losses.focal import AsymmetricMultiLabel, BinaryFocalCrossentropy, CategoricalFocalCrossentropy
from lossledger.losses.generalized import GeneralizedDice
from lossledger.losses.hinge import CategoricalHinge, Hinge, SquaredHinge
from lossledger.losses.likelihood import GaussianNegativeLogLikelihood, PoissonNegativeLogLikelihood
from lossledger.losses.lovasz import LovaszHinge, LovaszSoftmax
from lossledger.losses.metric_learning import Circle, SupervisedContrastive, TripletHard, TripletSemiHard, circle_of
from lossledger.losses.overlap import Dice, FocalTversky, Jaccard, LogCoshDice, Tversky
from lossledger.losses.ranking import Contrastive, MarginRanking, Triplet
from lossledger.losses.regression import (
    CosineSimilarity,
    Huber,
    LogCosh,
    MeanAbsoluteError,
    MeanAbsolutePercentageError,
    MeanSquaredError,
    MeanSquaredLogarithmicError,
    Poisson,
    Quantile,
)
from lossledger.losses.sequence import CTC


def binary_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Tensor:
    """The binary cross-entropy of each entry, `[B, d…]`; see `BinaryCrossentropy`."""
    return BinaryCrossentropy(from_logits, label_smoothing, axis, "none")(y_true, y_pred)


def binary_focal_crossentropy(
    y_true: Any,
    y_pred: Any,
    apply_class_balancing: bool = False,
    alpha: float = 0.25,
    gamma: float = 2.0,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """The binary focal cross-entropy of each entry, `[B, d…]`; see `BinaryFocalCrossentropy`."""
    return BinaryFocalCrossentropy(apply_class_balancing, alpha, gamma, from_logits, label_smoothing, axis, "none")(
        y_true, y_pred
    )


def categorical_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Tensor:
    """The categorical cross-entropy of each entry, `[B, d…]`; see `CategoricalCrossentropy`."""
    return CategoricalCrossentropy(from_logits, label_smoothing, axis, "none")(y_true, y_pred)


def categorical_focal_crossentropy(
    y_true: Any,
    y_pred: Any,
    alpha: float = 0.25,
    gamma: float = 2.0,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """The categorical focal cross-entropy of each entry, `[B, d…]`; see `CategoricalFocalCrossentropy`."""
    return CategoricalFocalCrossentropy(alpha, gamma, from_logits, label_smoothing, axis, "none")(y_true, y_pred)


def sparse_categorical_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = False, ignore_class: int | None = None, axis: int = -1
) -> Tensor:
    """The cross-entropy of each integer label, `[B, d…]`; see `SparseCategoricalCrossentropy`."""
    return SparseCategoricalCrossentropy(from_logits, ignore_class, "none", axis)(y_true, y_pred)


def mean_squared_error(y_true: Any, y_pred: Any) -> Tensor:
    """The squared error of each entry, `[B, d…]`; see `MeanSquaredError`."""
    return MeanSquaredError("none")(y_true, y_pred)


def mean_absolute_error(y_true: Any, y_pred: Any) -> Tensor:
    """The absolute error of each entry, `[B, d…]`; see `MeanAbsoluteError`."""
    return MeanAbsoluteError("none")(y_true, y_pred)


def huber(y_true: Any, y_pred: Any, delta: float = 1.0) -> Tensor:
    """The Huber loss of each entry, `[B, d…]`; see `Huber`."""
    return Huber(delta, "none")(y_true, y_pred)


def dice(y_true: Any, y_pred: Any, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """The Dice loss of each kept cell; see `Dice`."""
    return Dice("none", axis=axis)(y_true, y_pred)


def jaccard(y_true: Any, y_pred: Any, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """The Jaccard loss of each kept cell; see `Jaccard`."""
    return Jaccard("none", axis=axis)(y_true, y_pred)


def tversky(
    y_true: Any, y_pred: Any, alpha: float = 0.5, beta: float = 0.5, axis: int | tuple[int, ...] | None = None
) -> Tensor:
    """The Tversky loss of each kept cell; see `Tversky`."""
    return Tversky(alpha, beta, "none", axis=axis)(y_true, y_pred)


def focal_tversky(
    y_true: Any,
    y_pred: Any,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 0.75,
    axis: int | tuple[int, ...] | None = None,
) -> Tensor:
    """The focal Tversky loss of each kept cell; see `FocalTversky`."""
    return FocalTversky(alpha, beta, gamma, "none", axis=axis)(y_true, y_pred)


def log_cosh_dice(y_true: Any, y_pred: Any, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """The log-cosh of the Dice loss of each kept cell; see `LogCoshDice`."""
    return LogCoshDice("none", axis=axis)(y_true, y_pred)


def generalized_dice(y_true: Any, y_pred: Any, weights: str = "square") -> Tensor:
    """The generalized Dice loss of each sample, `[B]`; see `GeneralizedDice`."""
    return GeneralizedDice(weights, "none")(y_true, y_pred)


def lovasz_hinge(y_true: Any, y_pred: Any) -> Tensor:
    """The Lovász hinge of each image, `[B]`; see `LovaszHinge`."""
    return LovaszHinge(reduction="none")(y_true, y_pred)


def lovasz_softmax(y_true: Any, y_pred: Any, from_logits: bool = False, classes: str = "present") -> Tensor:
    """The Lovász softmax loss of each image, `[B]`; see `LovaszSoftmax`."""
    return LovaszSoftmax(from_logits, classes, reduction="none")(y_true, y_pred)


def asymmetric_focal(
    y_true: Any, y_pred: Any, delta: float = 0.7, gamma: float = 2.0, from_logits: bool = False, axis: int = -1
) -> Tensor:
    """The asymmetric focal cross-entropy of each entry, `[B, d…]`; see `AsymmetricFocal`."""
    return AsymmetricFocal(delta, gamma, from_logits, axis, "none")(y_true, y_pred)


def asymmetric_focal_tversky(y_true: Any, y_pred: Any, delta: float = 0.7, gamma: float = 0.75) -> Tensor:
    """The asymmetric focal Tversky loss of each sample and class, `[B, K]`; see `AsymmetricFocalTversky`."""
    return AsymmetricFocalTversky(delta, gamma, "none")(y_true, y_pred)


def mean_absolute_percentage_error(y_true: Any, y_pred: Any) -> Tensor:
    """The percentage error of each entry, `[B, d…]`; see `MeanAbsolutePercentageError`."""
    return MeanAbsolutePercentageError("none")(y_true, y_pred)


def mean_squared_logarithmic_error(y_true: Any, y_pred: Any) -> Tensor:
    """The squared logarithmic error of each entry, `[B, d…]`; see `MeanSquaredLogarithmicError`."""
    return MeanSquaredLogarithmicError("none")(y_true, y_pred)


def log_cosh(y_true: Any, y_pred: Any) -> Tensor:
    """The log-cosh of the error of each entry, `[B, d…]`; see `LogCosh`."""
    return LogCosh("none")(y_true, y_pred)


def poisson(y_true: Any, y_pred: Any) -> Tensor:
    """The Poisson loss of each entry, `[B, d…]`; see `Poisson`."""
    return Poisson("none")(y_true, y_pred)


def hinge(y_true: Any, y_pred: Any) -> Tensor:
    """The hinge loss of each entry, `[B, d…]`; see `Hinge`."""
    return Hinge("none")(y_true, y_pred)


def squared_hinge(y_true: Any, y_pred: Any) -> Tensor:
    """The squared hinge loss of each entry, `[B, d…]`; see `SquaredHinge`."""
    return SquaredHinge("none")(y_true, y_pred)


def categorical_hinge(y_true: Any, y_pred: Any) -> Tensor:
    """The categorical hinge loss of each entry, `[B, d…]`; see `CategoricalHinge`."""
    return CategoricalHinge("none")(y_true, y_pred)


def kl_divergence(y_true: Any, y_pred: Any) -> Tensor:
    """The Kullback–Leibler divergence of each entry, `[B, d…]`; see `KLDivergence`."""
    return KLDivergence("none")(y_true, y_pred)


def categorical_generalized_cross_entropy(y_true: Any, y_pred: Any, q: float = 0.5) -> Tensor:
    """The generalized cross-entropy of each integer label, `[B, d…]`; see `CategoricalGeneralizedCrossEntropy`."""
    return CategoricalGeneralizedCrossEntropy(q, "none")(y_true, y_pred)


def cosine_similarity(y_true: Any, y_pred: Any, axis: int = -1) -> Tensor:
    """Minus the cosine of each entry, `[B, d…]`; see `CosineSimilarity`."""
    return CosineSimilarity(axis, "none")(y_true, y_pred)


def ctc(y_true: Any, y_pred: Any) -> Tensor:
    """The CTC loss of each sample, `[B]`; see `CTC`."""
    return CTC("none")(y_true, y_pred)


def circle(
    y_true: Any,
    y_pred: Any,
    ref_labels: Any = None,
    ref_embeddings: Any = None,
    remove_diagonal: bool = True,
    gamma: float = 80.0,
    margin: float = 0.4,
) -> Tensor:
    """The circle loss of each sample among those of its batch, `[B]`, or among a reference; see `Circle`.

    Args:
        y_true: labels, `[B]`.
        y_pred: embeddings of length 1, `[B, D]`.
        ref_labels: labels of the samples to compare with, `[R]`; those of the batch if not given.
        ref_embeddings: their embeddings, `[R, D]`; given together with their labels.
        remove_diagonal: a sample is not its own positive.
        gamma: γ > 0, the scale.
        margin: m, how near is near enough.

    Raises:
        InputError: shapes that do not fit, only one of the two references.

    Example:
        >>> near, far = [1.0, 0.0], [0.0, 1.0]
        >>> circle([0], [near], ref_labels=[0, 1], ref_embeddings=[near, far], remove_diagonal=False, gamma=1.0)
        tensor([0.5459])
    """
    loss = Circle(gamma, margin, remove_diagonal, "none")
    if ref_labels is None and ref_embeddings is None:
        return loss(y_true, y_pred)
    if ref_labels is None or ref_embeddings is None:
        raise InputError("circle: expected ref_labels and ref_embeddings together, received one of them.")
    batch, reference = loss.align(y_true, y_pred), loss.align(ref_labels, ref_embeddings, where="circle: reference")
    anchors, others = batch.prediction.raw, reference.prediction.raw
    if anchors.shape[1] != others.shape[1]:
        raise InputError(
            f"circle: ref_embeddings: expected vectors of length {anchors.shape[1]} as y_pred, received "
            f"{others.shape[1]}."
        )
    same = batch.y_true[:, :1] == reference.y_true[:, 0]
    positive = same & ~torch.eye(*same.shape, dtype=torch.bool, device=same.device) if remove_diagonal else same
    return circle_of(anchors, others, positive, ~same, gamma, margin)


def soft_categorical_crossentropy(
    y_true: Any,
    y_pred: Any,
    class_weights: Sequence[float] | Tensor | None = None,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """The cross-entropy of each entry with class probabilities, `[B, d…]`; see `SoftCategoricalCrossentropy`."""
    return SoftCategoricalCrossentropy(class_weights, from_logits, label_smoothing, axis, "none")(y_true, y_pred)


def asymmetric_multi_label(
    y_true: Any,
    y_pred: Any,
    gamma_positive: float = 1.0,
    gamma_negative: float = 4.0,
    clip: float = 0.05,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """The asymmetric loss of each entry, `[B, d…]`; see `AsymmetricMultiLabel`."""
    return AsymmetricMultiLabel(gamma_positive, gamma_negative, clip, from_logits, label_smoothing, axis, "none")(
        y_true, y_pred
    )


def quantile(y_true: Any, y_pred: Any, quantile: float | Sequence[float] = 0.5) -> Tensor:
    """The pinball loss of each entry, `[B, d…]`; see `Quantile`."""
    return Quantile(quantile, "none")(y_true, y_pred)


def gaussian_negative_log_likelihood(
    y_true: Any, y_pred: Any, log_variance: bool = False, full: bool = False, eps: float = 1e-6
) -> Tensor:
    """The negative log-likelihood of each entry, `[B, d…]`; see `GaussianNegativeLogLikelihood`."""
    return GaussianNegativeLogLikelihood(log_variance, full, eps, "none")(y_true, y_pred)


def poisson_negative_log_likelihood(
    y_true: Any, y_pred: Any, log_input: bool = True, full: bool = False, eps: float = 1e-8
) -> Tensor:
    """The negative log-likelihood of each entry, `[B, d…]`; see `PoissonNegativeLogLikelihood`."""
    return PoissonNegativeLogLikelihood(log_input, full, eps, "none")(y_true, y_pred)


def margin_ranking(y_true: Any, y_pred: Any, margin: float = 0.0) -> Tensor:
    """The ranking loss of each pair of scores, `[B, d…]`; see `MarginRanking`."""
    return MarginRanking(margin, "none")(y_true, y_pred)


def contrastive(y_true: Any, y_pred: Any, margin: float = 1.0) -> Tensor:
    """The contrastive loss of each pair of embeddings, `[B, d…]`; see `Contrastive`."""
    return Contrastive(margin, "none")(y_true, y_pred)


def triplet(y_true: Any, y_pred: Any, margin: float = 1.0, squared: bool = False) -> Tensor:
    """The triplet loss of each given triplet, `[B, d…]`; see `Triplet`."""
    return Triplet(margin, squared, "none")(y_true, y_pred)


def triplet_hard(y_true: Any, y_pred: Any, margin: float = 1.0, squared: bool = False) -> Tensor:
    """The triplet loss of each sample with the hardest partners of its batch, `[B]`; see `TripletHard`."""
    return TripletHard(margin, squared, "none")(y_true, y_pred)


def triplet_semi_hard(y_true: Any, y_pred: Any, margin: float = 1.0, squared: bool = False) -> Tensor:
    """The triplet loss of each sample with semi-hard negatives of its batch, `[B]`; see `TripletSemiHard`."""
    return TripletSemiHard(margin, squared, "none")(y_true, y_pred)


def supervised_contrastive(y_true: Any, y_pred: Any, temperature: float = 0.1) -> Tensor:
    """The contrastive loss of each sample among those of its batch, `[B]`; see `SupervisedContrastive`."""
    return SupervisedContrastive(temperature, "none")(y_true, y_pred)


def info_nce(y_true: Any, y_pred: Any, temperature: float = 0.07, symmetric: bool = False) -> Tensor:
    """The loss of finding its key of each sample, `[B]`; see `InfoNCE`."""
    return InfoNCE(temperature, symmetric, "none")(y_true, y_pred)


def nt_xent(y_true: Any, y_pred: Any, temperature: float = 0.1) -> Tensor:
    """The loss of finding the other view of each sample, `[B]`; see `NTXent`."""
    return NTXent(temperature, "none")(y_true, y_pred)
