"""Rows of the losses whose samples are compared with each other, with oracles in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import lossledger as ll
import oracles
from declaration import Declaration
from oracles import distance

L = ll.losses


# --- oracles: the loss of each anchor, None where it does not count ------------------------------------------------


def cosine(a, b):
    return float(np.dot(a, b)) / (math.sqrt(float(np.dot(a, a))) * math.sqrt(float(np.dot(b, b))))


def crossentropy(right, scores):
    """−log of the share of exp(right) in the sum of the exponentials."""
    return math.log(sum(math.exp(s - right) for s in scores))


def partners(labels, present, a):
    others = [b for b in range(len(labels)) if present[b] and b != a]
    return [b for b in others if labels[b] == labels[a]], [b for b in others if labels[b] != labels[a]]


def by_anchor(fn):
    """An oracle of the labelled losses from the loss of one anchor with its positives and negatives."""

    def oracle(labels, vectors, present):
        found: list[float | None] = []
        for a in range(len(labels)):
            near, far = partners(labels, present, a)
            found.append(fn(vectors, a, near, far) if present[a] else None)
        return found

    return oracle


def hard(margin, power):
    def anchor(v, a, near, far):
        if not near or not far:
            return None
        farthest = max(distance(v[a], v[p]) ** power for p in near)
        nearest = min(distance(v[a], v[n]) ** power for n in far)
        return max(0.0, farthest - nearest + margin)

    return by_anchor(anchor)


def semi_hard(margin, power):
    def anchor(v, a, near, far):
        if not near or not far:
            return None
        found = []
        for p in near:
            d = distance(v[a], v[p]) ** power
            behind = [distance(v[a], v[n]) ** power for n in far if distance(v[a], v[n]) ** power > d]
            n = min(behind) if behind else max(distance(v[a], v[n]) ** power for n in far)
            found.append(max(0.0, d - n + margin))
        return sum(found) / len(found)

    return by_anchor(anchor)


def supervised(temperature):
    def anchor(v, a, near, far):
        if not near:
            return None
        scores = [cosine(v[a], v[b]) / temperature for b in near + far]
        return sum(crossentropy(cosine(v[a], v[p]) / temperature, scores) for p in near) / len(near)

    return by_anchor(anchor)


def circle(gamma, margin):
    def oracle(labels, vectors, present):
        losses, counts = oracles.circle(labels, vectors, gamma, margin, True, present)
        return [float(value) if count else None for value, count in zip(losses, counts, strict=True)]

    return oracle


def info_nce(temperature, symmetric):
    def oracle(_, views, present):
        here = [i for i in range(len(views)) if present[i]]
        found: list[float | None] = []
        for i in range(len(views)):
            if not present[i] or len(here) < 2:
                found.append(None)
                continue
            right = cosine(views[i][0], views[i][1]) / temperature
            there = crossentropy(right, [cosine(views[i][0], views[j][1]) / temperature for j in here])
            back = crossentropy(right, [cosine(views[j][0], views[i][1]) / temperature for j in here])
            found.append((there + back) / 2 if symmetric else there)
        return found

    return oracle


def nt_xent(temperature):
    def oracle(_, views, present):
        here = [(i, v) for i in range(len(views)) if present[i] for v in (0, 1)]
        found: list[float | None] = []
        for i in range(len(views)):
            if not present[i] or len(here) < 4:
                found.append(None)
                continue
            both = 0.0
            for v in (0, 1):
                scores = [cosine(views[i][v], views[j][w]) / temperature for j, w in here if (j, w) != (i, v)]
                both += crossentropy(cosine(views[i][0], views[i][1]) / temperature, scores)
            found.append(both / 2)
        return found

    return oracle


@dataclass(frozen=True)
class Coupled:
    """A batch-coupled loss under test: how to make it, its inputs, the loss of each anchor."""

    make: Callable[..., Any]
    inputs: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    oracle: Callable[..., list[float | None]]


def labelled(seed, samples=9, unit=False):
    rng = np.random.default_rng(seed)
    labels, vectors = rng.integers(0, 3, samples), rng.normal(size=(samples, 4))
    labels[-1] = 7  # without a positive
    labels[:2] = 0
    return labels, vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if unit else vectors


def views(seed, samples=9):
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(samples, 4))
    return np.zeros(samples), np.stack((first, first + 0.5 * rng.normal(size=(samples, 4))), 1)


LOSSES = {
    "circle": Coupled(lambda **k: L.Circle(5.0, 0.3, **k), lambda s, n: labelled(s, n, unit=True), circle(5.0, 0.3)),
    "triplet-hard": Coupled(lambda **k: L.TripletHard(2.0, **k), labelled, hard(2.0, 1)),
    "triplet-hard-squared": Coupled(lambda **k: L.TripletHard(2.0, squared=True, **k), labelled, hard(2.0, 2)),
    "triplet-semi-hard": Coupled(lambda **k: L.TripletSemiHard(0.8, **k), labelled, semi_hard(0.8, 1)),
    "triplet-semi-hard-squared": Coupled(
        lambda **k: L.TripletSemiHard(0.8, squared=True, **k), labelled, semi_hard(0.8, 2)
    ),
    "supervised-contrastive": Coupled(lambda **k: L.SupervisedContrastive(0.3, **k), labelled, supervised(0.3)),
    "info-nce": Coupled(lambda **k: L.InfoNCE(0.2, **k), views, info_nce(0.2, False)),
    "info-nce-symmetric": Coupled(lambda **k: L.InfoNCE(0.2, symmetric=True, **k), views, info_nce(0.2, True)),
    "nt-xent": Coupled(lambda **k: L.NTXent(0.4, **k), views, nt_xent(0.4)),
}


def declared(name, row):
    """The row as the matrix reads it."""

    def inputs(rng, entries):
        return row.inputs(int(rng.integers(2**31)), entries[0])

    def whole(y, p, w, m):
        losses = row.oracle(y, p, m)
        counted = [weight * loss for weight, loss in zip(w, losses, strict=True) if loss is not None]
        return sum(counted) / len(counted)

    return Declaration(name, row.make, inputs, None, closed=False, kinds=("sample",), whole=whole, per_sample=True)


ROWS = [declared(name, row) for name, row in LOSSES.items()]
