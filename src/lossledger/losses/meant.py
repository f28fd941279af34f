"""Names that losses have elsewhere, and which losses of this library they may mean."""

from __future__ import annotations

import re

# By a name in small letters, without signs and without "loss" at its end: losses, and where each is right. What is
# called so in torch takes logits, unless it says otherwise.
_CLASSES = (
    ("SparseCategoricalCrossentropy(from_logits=True)", "integer labels"),
    ("CategoricalCrossentropy(from_logits=True)", "one-hot targets"),
    ("BinaryCrossentropy(from_logits=True)", "columns of 0 and 1"),
)
_MEANT = {
    "crossentropy": _CLASSES,
    "ce": _CLASSES,
    "nll": (
        ("SparseCategoricalCrossentropy(from_logits=True)", "integer labels, of logits or log-probabilities"),
        ("GaussianNegativeLogLikelihood()", "a mean and a variance"),
        ("PoissonNegativeLogLikelihood()", "counts"),
    ),
    "bce": (("BinaryCrossentropy()", "probabilities"), ("BinaryCrossentropy(from_logits=True)", "logits")),
    "bcewithlogits": (("BinaryCrossentropy(from_logits=True)", "logits"),),
    "dice": (
        ("Dice()", "probabilities"),
        ("Dice(from_logits='sigmoid')", "logits of columns of 0 and 1"),
        ("Dice(from_logits='softmax')", "logits of classes"),
    ),
    "focal": (
        ("BinaryFocalCrossentropy(from_logits=True)", "columns of 0 and 1"),
        ("CategoricalFocalCrossentropy(from_logits=True)", "one-hot targets"),
    ),
    "iou": (
        ("Jaccard()", "probabilities"),
        ("Jaccard(from_logits='sigmoid')", "logits of columns of 0 and 1"),
        ("Jaccard(from_logits='softmax')", "logits of classes"),
    ),
    "l1": (("MeanAbsoluteError()", ""),),
    "l2": (("MeanSquaredError()", ""),),
    "mse": (("MeanSquaredError()", ""),),
    "smoothl1": (("Huber()", ""),),
}


def meant(name: str) -> str:
    """What a name that is no loss here may mean, in a sentence; "" where nobody knows.

    Args:
        name: as it was given.

    >>> meant("BCEWithLogitsLoss")
    'Of lossledger.losses it may mean BinaryCrossentropy(from_logits=True) for logits.'
    >>> meant("gelu")
    ''
    """
    found = _MEANT.get(re.sub("[^a-z0-9]", "", name.lower()).removesuffix("loss"), ())
    if not found:
        return ""
    named = [f"{loss} for {where}" if where else loss for loss, where in found]
    listed = " or ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return f"Of lossledger.losses it may mean {listed}."
