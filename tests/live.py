"""Random problems for comparisons with the installed frameworks, and what makes two numbers the same.

Hypothesis draws the structure (loss, arguments, shapes, which weights and masks); the numbers come from a drawn seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Problem:
    """A loss with its arguments, and arrays as somebody would pass them."""

    loss: str
    kwargs: dict[str, Any]
    y_true: np.ndarray
    y_pred: np.ndarray
    sample_weight: np.ndarray | float | None = None
    mask: np.ndarray | None = None

    def case(self, convention: str, **more: Any) -> dict[str, Any]:
        """In the form of `goldens/frameworks.json`."""
        return {"convention": convention, "scope": "loss", "id": None, **asdict(self), **more}


# How the numbers of a problem look; the first three are what a careful user has.
REAL, PROBABILITY, LOGIT, SIGN, LABEL, COUNT, WILD = "real", "probability", "logit", "sign", "label", "count", "wild"


def numbers(rng: np.random.Generator, kind: str, shape: tuple[int, ...], classes: int = 2) -> np.ndarray:
    """Float32 numbers, or int64 labels."""
    if kind == LABEL:
        return rng.integers(0, classes, shape)
    if kind == SIGN:
        return rng.choice(np.array([-1.0, 1.0], np.float32), shape)
    if kind == COUNT:
        return rng.integers(0, 5, shape).astype(np.float32)
    if kind == PROBABILITY:
        found = rng.uniform(0, 1, shape)
    elif kind == LOGIT:
        found = rng.normal(size=shape) * rng.choice([1.0, 5.0, 60.0])
    elif kind == WILD:
        found = rng.choice([-2.0, 0.0, 1e-9, 0.5, 1.0, 1.5, 40.0], shape)
    else:
        found = rng.normal(size=shape) * 2
    return found.astype(np.float32)


def close(found: Any, expected: Any, scale: float, ulps: float = 32) -> bool:
    """Equal up to `ulps` roundings of float32 at the size of the terms that were added; NaN is NaN, ∞ is ∞."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return False
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return False
    room = ulps * EPS * max(scale, 1e-30)
    return bool((np.abs(a[finite] - b[finite]) <= room + ulps * EPS * np.abs(b[finite])).all())
