"""Rows of the losses of keras.losses, and of losses as a user writes them."""

from __future__ import annotations

import numpy as np
import torch

import lossledger as ll
import oracles
from declaration import Declaration, Mistake
from inputs import (
    COLUMNS,
    binary_logits,
    binary_probabilities,
    categorical_logits,
    categorical_probabilities,
    counts,
    distributions,
    label_sequences,
    positive,
    regression,
    sides,
    signed,
    sparse_logits,
    sparse_probabilities,
)
from lossledger.errors import InputError


def pick(values, labels):
    return np.take_along_axis(values, labels[..., None], -1)


def focal(y, p):
    return (1 - (y * p + (1 - y) * (1 - p))) ** 2 * oracles.bce(y, p)


class Quartic(ll.losses.Loss):
    """A loss as a user writes it: `call` gives the value of each entry."""

    def call(self, y_true, y_pred):
        return ((y_true - y_pred) ** 4).mean(-1)


def squares(y_true, y_pred):
    """A loss as a user writes it in one line."""
    return (y_true - y_pred).square().mean(-1)


def smooth(y, s):
    return y * (1 - s) + s / COLUMNS


L = ll.losses
ROWS = [
    Declaration(
        "bce-logits",
        lambda **k: L.BinaryCrossentropy(from_logits=True, **k),
        binary_logits,
        oracles.bce_logits,
    ),
    Declaration(
        "bce-probabilities",
        lambda **k: L.BinaryCrossentropy(**k),
        binary_probabilities,
        oracles.bce,
        refused=(("from_logits", 1), ("label_smoothing", 1), ("label_smoothing", -0.1), ("axis", True), ("axis", 1.5)),
    ),
    Declaration(
        "bce-smoothed",
        lambda **k: L.BinaryCrossentropy(from_logits=True, label_smoothing=0.2, **k),
        binary_logits,
        lambda y, z: oracles.bce_logits(y * 0.8 + 0.1, z),
    ),
    Declaration(
        "binary-focal",
        lambda **k: L.BinaryFocalCrossentropy(**k),
        binary_probabilities,
        focal,
        closed=False,
        refused=(("gamma", -1), ("alpha", 2)),
    ),
    Declaration(
        "binary-focal-balanced-logits",
        lambda **k: L.BinaryFocalCrossentropy(apply_class_balancing=True, alpha=0.3, gamma=1.5, from_logits=True, **k),
        binary_logits,
        lambda y, z: (
            (y * 0.3 + (1 - y) * 0.7)
            * (1 - np.where(y == 1, oracles.sigmoid(z), 1 - oracles.sigmoid(z))) ** 1.5
            * oracles.bce_logits(y, z)
        ),
        closed=False,
    ),
    Declaration(
        "cce-logits",
        lambda **k: L.CategoricalCrossentropy(from_logits=True, **k),
        categorical_logits,
        lambda y, z: -(y * np.log(oracles.softmax(z))).sum(-1, keepdims=True),
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "cce-probabilities-smoothed",
        lambda **k: L.CategoricalCrossentropy(label_smoothing=0.1, **k),
        categorical_probabilities,
        lambda y, p: -(smooth(y, 0.1) * np.log(oracles.normalised(p))).sum(-1, keepdims=True),
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "categorical-focal",
        lambda **k: L.CategoricalFocalCrossentropy(**k),
        categorical_probabilities,
        lambda y, p: (0.25 * (1 - oracles.normalised(p)) ** 2 * -(y * np.log(oracles.normalised(p)))).sum(
            -1, keepdims=True
        ),
        closed=False,
        refused=(("gamma", -1),),
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "sparse-logits",
        lambda **k: L.SparseCategoricalCrossentropy(from_logits=True, **k),
        sparse_logits,
        lambda y, z: -np.log(pick(oracles.softmax(z), y)),
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "sparse-probabilities",
        lambda **k: L.SparseCategoricalCrossentropy(**k),
        sparse_probabilities,
        lambda y, p: -np.log(pick(oracles.normalised(p), y)),
        closed=False,
        kinds=("class", "label", "sample"),
    ),
    Declaration("mse", lambda **k: L.MeanSquaredError(**k), regression, lambda y, p: (y - p) ** 2),
    Declaration("mae", lambda **k: L.MeanAbsoluteError(**k), regression, lambda y, p: np.abs(y - p)),
    Declaration(
        "huber",
        lambda **k: L.Huber(delta=0.7, **k),
        regression,
        lambda y, p: np.where(np.abs(y - p) <= 0.7, 0.5 * (y - p) ** 2, 0.7 * np.abs(y - p) - 0.5 * 0.49),
        refused=(("delta", 0),),
    ),
    Declaration(
        "mape",
        lambda **k: L.MeanAbsolutePercentageError(**k),
        signed,
        lambda y, p: 100 * np.abs(y - p) / np.abs(y),
    ),
    Declaration(
        "msle",
        lambda **k: L.MeanSquaredLogarithmicError(**k),
        positive,
        lambda y, p: np.log((1 + p) / (1 + y)) ** 2,
    ),
    Declaration("log-cosh", lambda **k: L.LogCosh(**k), regression, lambda y, p: np.log(np.cosh(p - y))),
    Declaration("poisson", lambda **k: L.Poisson(**k), counts, lambda y, p: p - y * np.log(p + oracles.EPSILON)),
    Declaration(
        "cosine",
        lambda **k: L.CosineSimilarity(**k),
        regression,
        oracles.minus_cosine,
        closed=False,
        kinds=("sample",),
    ),
    Declaration(
        "hinge-zero-one", lambda **k: L.Hinge(**k), binary_logits, lambda y, p: np.maximum(1 - (2 * y - 1) * p, 0)
    ),
    Declaration("hinge-signs", lambda **k: L.Hinge(**k), sides, lambda y, p: np.maximum(1 - y * p, 0)),
    Declaration(
        "squared-hinge",
        lambda **k: L.SquaredHinge(**k),
        binary_logits,
        lambda y, p: np.maximum(1 - (2 * y - 1) * p, 0) ** 2,
    ),
    Declaration(
        "categorical-hinge",
        lambda **k: L.CategoricalHinge(**k),
        categorical_logits,
        oracles.categorical_hinge,
        closed=False,
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "kl-divergence",
        lambda **k: L.KLDivergence(**k),
        distributions,
        lambda y, p: (y * np.log(y / p)).sum(-1, keepdims=True),
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "generalized-crossentropy-sparse",
        lambda **k: L.CategoricalGeneralizedCrossEntropy(q=0.7, **k),
        sparse_probabilities,
        lambda y, p: (1 - pick(p, y) ** 0.7) / 0.7,
        refused=(("q", 0.0), ("q", 1.0), ("q", 2.0)),
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "ctc",
        lambda **k: L.CTC(**k),
        label_sequences,
        lambda y, z: np.array([[oracles.ctc(labels, logits)] for labels, logits in zip(y, z, strict=True)]),
        closed=False,
        kinds=("sample",),
        per_sample=True,
        mistakes=(
            Mistake("label", lambda loss, y, p: loss(y + 9, p), InputError, ("0 to 2",)),
            Mistake("inner-blank", lambda loss, y, p: loss(y * 0 + torch.tensor([0, 1]), p), InputError, ("0 is",)),
            Mistake("too-few-steps", lambda loss, y, p: loss(y * 0 + 1, p[:, :2]), InputError, ("at least 3 steps",)),
            Mistake("no-step-axis", lambda loss, y, p: loss(y, p[:, 0]), InputError, ("Logits `y_pred`",)),
        ),
        # torch's CTC has no batching rule, and reads lengths on the host.
        one_graph=False,
        batched=False,
    ),
    Declaration(
        "custom-class",
        lambda **k: Quartic(**k),
        regression,
        lambda y, p: ((y - p) ** 4).mean(-1, keepdims=True),
        closed=False,
        kinds=("sample",),
    ),
    Declaration(
        "custom-function",
        lambda **k: L.FunctionLoss(squares, name="own", **k),
        regression,
        lambda y, p: ((y - p) ** 2).mean(-1, keepdims=True),
        closed=False,
        kinds=("sample",),
    ),
]
