"""The losses as functions: one value an entry, unreduced, with the names and arguments of keras.losses.

A function is its class with the reduction `none`, so the formula stands in one place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lossledger.losses.classification import (
    BinaryCrossentropy,
    BinaryFocalCrossentropy,
    CategoricalCrossentropy,
    CategoricalFocalCrossentropy,
    SparseCategoricalCrossentropy,
)
from lossledger.losses.overlap import Dice, Jaccard, Tversky
from lossledger.losses.regression import Huber, MeanAbsoluteError, MeanSquaredError


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
    return SparseCategoricalCrossentropy(from_logits, ignore_class, axis, "none")(y_true, y_pred)


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
    return Dice(axis, reduction="none")(y_true, y_pred)


def jaccard(y_true: Any, y_pred: Any, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """The Jaccard loss of each kept cell; see `Jaccard`."""
    return Jaccard(axis, reduction="none")(y_true, y_pred)


def tversky(
    y_true: Any, y_pred: Any, alpha: float = 0.5, beta: float = 0.5, axis: int | tuple[int, ...] | None = None
) -> Tensor:
    """The Tversky loss of each kept cell; see `Tversky`."""
    return Tversky(alpha, beta, axis, reduction="none")(y_true, y_pred)
