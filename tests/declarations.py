"""One row a loss: how to make it, sample inputs, the oracle of its elements. The suites go through the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import lossledger as ll
import oracles

COLUMNS = 3


@dataclass(frozen=True)
class Declaration:
    """A loss under test.

    Args:
        name: of the row.
        make: makes the loss from a reduction.
        inputs: from a generator and entry shape (B, d…) to (y_true, y_pred) in float64.
        elements: oracle of the elements, [B, d…, C] (C = 1 where the loss has no class axis).
        closed: whether the gradient has a closed form of its own.
        kinds: groups that the tally can divide into.
    """

    name: str
    make: Callable[..., Any]
    inputs: Callable[[np.random.Generator, tuple[int, ...]], tuple[np.ndarray, np.ndarray]]
    elements: Callable[[np.ndarray, np.ndarray], np.ndarray]
    closed: bool = True
    kinds: tuple[str, ...] = ("class", "sample", "column")
    options: dict[str, Any] = field(default_factory=dict)


def binary_logits(rng, entries):
    return (rng.random((*entries, COLUMNS)) < 0.4).astype(float), rng.normal(0, 2, (*entries, COLUMNS))


def binary_probabilities(rng, entries):
    return (rng.random((*entries, COLUMNS)) < 0.4).astype(float), rng.uniform(0.02, 0.98, (*entries, COLUMNS))


def one_hot(rng, entries):
    return np.eye(COLUMNS)[rng.integers(0, COLUMNS, entries)]


def categorical_logits(rng, entries):
    return one_hot(rng, entries), rng.normal(0, 2, (*entries, COLUMNS))


def categorical_probabilities(rng, entries):
    return one_hot(rng, entries), oracles.softmax(rng.normal(0, 1, (*entries, COLUMNS)))


def sparse_logits(rng, entries):
    return rng.integers(0, COLUMNS, entries), rng.normal(0, 2, (*entries, COLUMNS))


def sparse_probabilities(rng, entries):
    return rng.integers(0, COLUMNS, entries), oracles.softmax(rng.normal(0, 1, (*entries, COLUMNS)))


def regression(rng, entries):
    return rng.normal(0, 1, (*entries, COLUMNS)), rng.normal(0, 2, (*entries, COLUMNS))


def signed(rng, entries):
    """Targets away from 0, on both sides."""
    return rng.choice([-1.0, 1.0], (*entries, COLUMNS)) * rng.uniform(0.5, 2, (*entries, COLUMNS)), rng.normal(
        0, 2, (*entries, COLUMNS)
    )


def positive(rng, entries):
    return rng.uniform(0.1, 3, (*entries, COLUMNS)), rng.uniform(0.1, 3, (*entries, COLUMNS))


def counts(rng, entries):
    return rng.poisson(2, (*entries, COLUMNS)).astype(float), rng.uniform(0.2, 4, (*entries, COLUMNS))


def distributions(rng, entries):
    return tuple(oracles.softmax(rng.normal(0, 1, (*entries, COLUMNS))) for _ in range(2))


def sides(rng, entries):
    """Labels −1 and 1."""
    return rng.choice([-1.0, 1.0], (*entries, COLUMNS)), rng.normal(0, 1, (*entries, COLUMNS))


def pick(values, labels):
    return np.take_along_axis(values, labels[..., None], -1)


def focal(y, p):
    return (1 - (y * p + (1 - y) * (1 - p))) ** 2 * oracles.bce(y, p)


class Quartic(ll.losses.Loss):
    """A loss as a user writes it: `call` gives the value of each entry."""

    def call(self, y_true, y_pred):
        return ((y_true - y_pred) ** 4).mean(-1)


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
    Declaration("bce-probabilities", lambda **k: L.BinaryCrossentropy(**k), binary_probabilities, oracles.bce),
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
        kinds=("class", "label", "sample"),
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
        lambda **k: L.FunctionLoss(lambda y, p: (y - p).square().mean(-1), name="own", **k),
        regression,
        lambda y, p: ((y - p) ** 2).mean(-1, keepdims=True),
        closed=False,
        kinds=("sample",),
    ),
]
NAMES = [row.name for row in ROWS]

REDUCTIONS = (
    "sum_over_batch_size",
    "sum",
    "mean_with_sample_weight",
    "sum_over_all_entries",
    "sum_over_nonzero_weights",
    "mean_per_sample",
)

# (κ, α, β) of each overlap loss, and the axes of its sums on [B, d, C].
OVERLAPS = {
    "dice": (lambda **k: L.Dice(**k), (2.0, 1.0, 1.0)),
    "jaccard": (lambda **k: L.Jaccard(**k), (1.0, 1.0, 1.0)),
    "tversky": (lambda **k: L.Tversky(alpha=0.3, beta=0.7, **k), (1.0, 0.3, 0.7)),
}
AXES = {"all": None, "batch-by-class": (0, 1), "sample-by-class": (1,), "sample": (1, 2)}


def tensors(*arrays):
    return [torch.as_tensor(a) for a in arrays]
