"""Rows of the Lovász losses: the sets of mistakes written out."""

from __future__ import annotations

import numpy as np

import inputs
import lossledger as ll
import oracles
from declaration import Declaration

L = ll.losses
MAKES = {
    "hinge": lambda **k: L.LovaszHinge(**k),
    "softmax": lambda **k: L.LovaszSoftmax(from_logits=True, **k),
    "softmax-all": lambda **k: L.LovaszSoftmax(from_logits=True, classes="all", **k),
}


def extension(errors, truth):
    """Σ of each error times what its pixel adds to the Jaccard loss of the set of mistakes so far."""
    inside, total, before, mistakes = {i for i, t in enumerate(truth) if t}, 0.0, 0.0, set()
    for pixel in sorted(range(len(errors)), key=lambda i: -errors[i]):
        mistakes.add(pixel)
        now = len(mistakes) / len(inside | mistakes)
        total += errors[pixel] * (now - before)
        before = now
    return total


def image(name, y, z):
    """The loss of one image, [P, C]: its pixels are all there are."""
    if name == "hinge":
        return np.mean([extension(np.maximum(1 - z[:, c] * (2 * y[:, c] - 1), 0), y[:, c]) for c in range(3)])
    p = oracles.softmax(z)
    counted = [c for c in range(3) if name == "softmax-all" or y[:, c].any()]
    return np.mean([extension(np.abs(y[:, c] - p[:, c]), y[:, c]) for c in counted])


def images(name):
    """The mean over the images that count, each with its weight."""

    def value(y, z, w, m):
        return sum(w[b] * image(name, y[b], z[b]) for b in range(len(y)) if m[b]) / max(m.sum(), 1)

    return value


ROWS = [
    Declaration(
        f"lovasz-{name}",
        make,
        inputs.binary_logits if name == "hinge" else inputs.categorical_logits,
        None,
        closed=False,
        kinds=("class", "sample"),
        whole=images(name),
        per_sample=True,
        refused=() if name == "hinge" else (("classes", "some"),),
    )
    for name, make in MAKES.items()
]
