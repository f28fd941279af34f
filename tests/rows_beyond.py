"""Rows of the classification, regression and metric-learning losses that Keras does not have."""

from __future__ import annotations

import math

import numpy as np

import lossledger as ll
import oracles
from declaration import Declaration
from inputs import COLUMNS, binary_logits, binary_probabilities, counts, regression
from oracles import distance

L = ll.losses
CLASSES = np.array([1.0, 3.0, 0.5])
QUANTILES = (0.1, 0.5, 0.8)
WIDTH = 4


# --- inputs --------------------------------------------------------------------------------------------------------


def soft_logits(rng, entries):
    return oracles.softmax(rng.normal(0, 1, (*entries, COLUMNS))), rng.normal(0, 2, (*entries, COLUMNS))


def soft_probabilities(rng, entries):
    return tuple(oracles.softmax(rng.normal(0, 1, (*entries, COLUMNS))) for _ in range(2))


def one_target(rng, entries):
    return rng.normal(0, 1, (*entries, 1)), rng.normal(0, 2, (*entries, len(QUANTILES)))


def gaussian(rng, entries):
    mean, variance = rng.normal(0, 2, (*entries, COLUMNS)), rng.uniform(0.3, 3, (*entries, COLUMNS))
    return rng.normal(0, 1, (*entries, COLUMNS)), np.concatenate((mean, variance), -1)


def log_counts(rng, entries):
    return rng.poisson(2, (*entries, COLUMNS)).astype(float), rng.normal(0, 1, (*entries, COLUMNS))


def scores(rng, entries):
    return rng.choice([-1.0, 1.0], (*entries, 1)), rng.normal(0, 1, (*entries, 2))


def pairs(rng, entries):
    return (rng.random((*entries, 1)) < 0.5).astype(float), rng.normal(0, 0.5, (*entries, 2, WIDTH))


def triplets(rng, entries):
    return np.zeros((*entries, 1)), rng.normal(0, 1, (*entries, 3, WIDTH))


# --- oracles, one number at a time ---------------------------------------------------------------------------------


def each(fn, y, p):
    """Elements `[*y.shape]` from a function of a number of y and what belongs to it in p."""
    return np.array([fn(float(y[i]), i) for i in np.ndindex(y.shape)]).reshape(y.shape)


def soft_crossentropy(y, p, weights, smoothing=0.0):
    """Σ over the classes, in a loop; p are probabilities."""
    entries = np.zeros((*y.shape[:-1], 1))
    for index in np.ndindex(y.shape[:-1]):
        for k in range(y.shape[-1]):
            target = y[index][k] * (1 - smoothing) + smoothing / y.shape[-1]
            entries[index] -= weights[k] * target * math.log(p[index][k])
    return entries


def asymmetric(y, p, positive, negative, clip):
    def element(target, i):
        q = p[i]
        shifted = max(q - clip, 0.0)
        return -target * (1 - q) ** positive * math.log(q) - (1 - target) * shifted**negative * math.log(1 - shifted)

    return each(element, y, p)


def pinball(y, p, q):
    q = np.broadcast_to(q, p.shape)
    return each(lambda value, i: max(q[i] * (y[i] - value), (q[i] - 1) * (y[i] - value)), p, y)


def gaussian_nll(y, p, variance, constant=0.0):
    def element(target, i):
        *entry, column = i
        mean, v = p[(*entry, column)], variance(p[(*entry, column + y.shape[-1])])
        return constant + 0.5 * (math.log(v) + (target - mean) ** 2 / v)

    return each(element, y, p)


def stirling(y):
    return y * math.log(y) - y + 0.5 * math.log(2 * math.pi * y) if y > 1 else 0.0


def members(fn, y, p):
    """Entries `[…, 1]` from a function of a label and the scores or vectors that belong to it."""
    return each(lambda label, i: fn(label, p[i[:-1]]), y, p)


def contrastive(label, pair, margin):
    d = distance(*pair)
    return label * d**2 + (1 - label) * max(margin - d, 0) ** 2


ROWS: list[Declaration] = [
    Declaration(
        "soft-crossentropy-logits",
        lambda **k: L.SoftCategoricalCrossentropy(class_weights=CLASSES, from_logits=True, **k),
        soft_logits,
        lambda y, z: soft_crossentropy(y, oracles.softmax(z), CLASSES),
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "soft-crossentropy-smoothed",
        lambda **k: L.SoftCategoricalCrossentropy(class_weights=CLASSES, label_smoothing=0.2, **k),
        soft_probabilities,
        lambda y, p: soft_crossentropy(y, p, CLASSES, 0.2),
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "asymmetric-logits",
        lambda **k: L.AsymmetricMultiLabel(from_logits=True, **k),
        binary_logits,
        lambda y, z: asymmetric(y, oracles.sigmoid(z), 1, 4, 0.05),
        closed=False,
    ),
    Declaration(
        "asymmetric-probabilities",
        lambda **k: L.AsymmetricMultiLabel(gamma_positive=0.5, gamma_negative=0.7, clip=0.2, **k),
        binary_probabilities,
        lambda y, p: asymmetric(y, p, 0.5, 0.7, 0.2),
        closed=False,
    ),
    Declaration(
        "asymmetric-without-clip",
        lambda **k: L.AsymmetricMultiLabel(gamma_positive=0.0, gamma_negative=2.0, clip=0.0, from_logits=True, **k),
        binary_logits,
        lambda y, z: asymmetric(y, oracles.sigmoid(z), 0, 2, 0),
        closed=False,
    ),
    Declaration("quantile", lambda **k: L.Quantile(0.8, **k), regression, lambda y, p: pinball(y, p, 0.8)),
    Declaration(
        "quantiles",
        lambda **k: L.Quantile(QUANTILES, **k),
        one_target,
        lambda y, p: pinball(np.broadcast_to(y, p.shape), p, QUANTILES),
    ),
    Declaration(
        "gaussian",
        lambda **k: L.GaussianNegativeLogLikelihood(full=True, **k),
        gaussian,
        lambda y, p: gaussian_nll(y, p, lambda v: v, 0.5 * math.log(2 * math.pi)),
        kinds=("class", "sample"),
    ),
    Declaration(
        "gaussian-log-variance",
        lambda **k: L.GaussianNegativeLogLikelihood(log_variance=True, **k),
        gaussian,
        lambda y, p: gaussian_nll(y, p, math.exp),
        kinds=("class", "sample"),
    ),
    Declaration(
        "poisson-log-rate",
        lambda **k: L.PoissonNegativeLogLikelihood(full=True, **k),
        log_counts,
        lambda y, z: each(lambda target, i: math.exp(z[i]) - target * z[i] + stirling(target), y, z),
    ),
    Declaration(
        "poisson-rate",
        lambda **k: L.PoissonNegativeLogLikelihood(log_input=False, eps=0.1, **k),
        counts,
        lambda y, p: each(lambda target, i: p[i] - target * math.log(p[i] + 0.1), y, p),
    ),
    Declaration(
        "margin-ranking",
        lambda **k: L.MarginRanking(margin=0.7, **k),
        scores,
        lambda y, p: members(lambda label, s: max(0.0, 0.7 - label * (s[0] - s[1])), y, p),
        kinds=("sample",),
    ),
    Declaration(
        "contrastive",
        lambda **k: L.Contrastive(margin=2.0, **k),
        pairs,
        lambda y, p: members(lambda label, pair: contrastive(label, pair, 2.0), y, p),
        closed=False,
        kinds=("sample",),
    ),
    Declaration(
        "triplet",
        lambda **k: L.Triplet(margin=1.5, **k),
        triplets,
        lambda y, p: members(lambda _, t: max(0.0, distance(t[0], t[1]) - distance(t[0], t[2]) + 1.5), y, p),
        closed=False,
        kinds=("sample",),
    ),
    Declaration(
        "triplet-squared",
        lambda **k: L.Triplet(margin=1.5, squared=True, **k),
        triplets,
        lambda y, p: members(lambda _, t: max(0.0, distance(t[0], t[1]) ** 2 - distance(t[0], t[2]) ** 2 + 1.5), y, p),
        closed=False,
        kinds=("sample",),
    ),
]
