"""Sample inputs of the loss suites: from a generator and entry shape (B, d…) to (y_true, y_pred) in float64."""

from __future__ import annotations

import numpy as np

import oracles

COLUMNS = 3


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


def label_sequences(rng, entries):
    """Labels of one or two steps, padded with 0, for each sample; the outputs are the steps."""
    labels = rng.integers(1, COLUMNS, (entries[0], 2))
    labels[:, 1] *= rng.integers(0, 2, len(labels))
    return labels, rng.normal(0, 2, (*entries, COLUMNS))


# What targets are, as far as losses check it; inputs that are not listed have no mistakes of their own.
TARGETS = {
    binary_logits: "shares",
    binary_probabilities: "shares",
    categorical_logits: "shares",
    categorical_probabilities: "shares",
    distributions: "shares",
    sparse_logits: "labels",
    sparse_probabilities: "labels",
    regression: "real",
    signed: "real",
    positive: "real",
    counts: "real",
    sides: "signs",
}
