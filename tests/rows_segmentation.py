"""Rows of the segmentation losses that Keras does not have; those of whole images are in `rows_overlap`."""

from __future__ import annotations

import numpy as np

import lossledger as ll
import oracles
from declaration import Declaration
from inputs import categorical_logits, categorical_probabilities

L = ll.losses


def asymmetric_focal(y, p, delta=0.7, gamma=2.0):
    """Entry by entry: the weight of its class, and the focus if it is background."""
    entries = np.empty((*y.shape[:-1], 1))
    for index in np.ndindex(y.shape[:-1]):
        q = np.clip(p[index], oracles.EPSILON, 1 - oracles.EPSILON)
        factors = [(1 - delta) * (1 - q[0]) ** gamma] + [delta] * (len(q) - 1)
        entries[index] = sum(-f * t * np.log(v) for f, t, v in zip(factors, y[index], q, strict=True))
    return entries


ROWS: list[Declaration] = [
    Declaration(
        "asymmetric-focal",
        lambda **k: L.AsymmetricFocal(**k),
        categorical_probabilities,
        asymmetric_focal,
        closed=False,
        kinds=("class", "label", "sample"),
    ),
    Declaration(
        "asymmetric-focal-logits",
        lambda **k: L.AsymmetricFocal(0.6, 0.5, from_logits=True, **k),
        categorical_logits,
        lambda y, z: asymmetric_focal(y, oracles.softmax(z), 0.6, 0.5),
        closed=False,
        kinds=("class", "label", "sample"),
    ),
]
