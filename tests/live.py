"""Random problems for comparisons with the installed frameworks, and what makes two numbers the same.

Hypothesis draws the structure (loss, arguments, shapes, which weights and masks); the numbers come from a drawn seed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

EPS = float(np.finfo(np.float32).eps)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of a framework, which our tests would raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


REAL, PROBABILITY, LOGIT, SIGN, BINARY, HOT, LABEL, COUNT = (
    "real", "probability", "logit", "sign", "binary", "one-hot", "label", "count"
)  # fmt: skip

# Of each loss of Keras, how targets and predictions look; with `from_logits` predictions are logits.
KERAS_LOSSES = {
    "MeanSquaredError": (REAL, REAL),
    "MeanAbsoluteError": (REAL, REAL),
    "MeanAbsolutePercentageError": (REAL, REAL),
    "MeanSquaredLogarithmicError": (REAL, REAL),
    "Huber": (REAL, REAL),
    "LogCosh": (REAL, REAL),
    "Poisson": (COUNT, PROBABILITY),
    "KLDivergence": (PROBABILITY, PROBABILITY),
    "CosineSimilarity": (REAL, REAL),
    "Hinge": (SIGN, REAL),
    "SquaredHinge": (BINARY, REAL),
    "CategoricalHinge": (HOT, REAL),
    "BinaryCrossentropy": (BINARY, PROBABILITY),
    "BinaryFocalCrossentropy": (BINARY, PROBABILITY),
    "CategoricalCrossentropy": (HOT, PROBABILITY),
    "CategoricalFocalCrossentropy": (HOT, PROBABILITY),
    "SparseCategoricalCrossentropy": (LABEL, PROBABILITY),
    "CategoricalGeneralizedCrossEntropy": (LABEL, PROBABILITY),
    "Dice": (BINARY, PROBABILITY),
    "Tversky": (BINARY, PROBABILITY),
    "Circle": (LABEL, REAL),
    "CTC": (LABEL, LOGIT),
}


def numbers(rng: np.random.Generator, kind: str, shape: tuple[int, ...], classes: int = 2) -> np.ndarray:
    """Numbers of a kind: float32, or int64 labels."""
    if kind == LABEL:
        return rng.integers(0, classes, shape)
    if kind == HOT and shape:
        return np.eye(shape[-1], dtype=np.float32)[rng.integers(0, shape[-1], shape[:-1])]
    found = {
        REAL: lambda: rng.normal(size=shape) * 2,
        PROBABILITY: lambda: rng.uniform(0, 1, shape),
        LOGIT: lambda: rng.normal(size=shape) * rng.choice([1.0, 5.0, 60.0]),
        SIGN: lambda: rng.choice([-1.0, 1.0], shape),
        BINARY: lambda: rng.integers(0, 2, shape),
        HOT: lambda: rng.integers(0, 2, shape),
        COUNT: lambda: rng.integers(0, 5, shape),
    }[kind]()
    return np.asarray(found, np.float32)


def often(share: float) -> st.SearchStrategy[bool]:
    """True about so often; False is the simpler value."""
    return st.integers(0, 99).map(lambda n: n >= 100 - 100 * share)


@st.composite
def arguments(draw: st.DrawFn, loss: str, rank: int) -> dict[str, Any]:
    """The arguments of a loss of Keras."""
    found: dict[str, Any] = {}

    def maybe(name: str, *values: Any) -> None:
        if draw(often(0.4)):
            found[name] = draw(st.sampled_from(values))

    axes = (-1, 1, -2) if rank > 2 else (-1,)
    if loss == "Huber":
        maybe("delta", 0.3, 2.0)
    if "Crossentropy" in loss:
        maybe("from_logits", True)
        maybe("axis", *axes)
        if loss == "SparseCategoricalCrossentropy":
            maybe("ignore_class", -1, 0, 1, 255)
        else:
            maybe("label_smoothing", 0.1, 0.4)
        if "Focal" in loss:
            maybe("gamma", 0.0, 1.0, 3.0)
            maybe("alpha", 0.1, 0.6)
        if loss == "BinaryFocalCrossentropy":
            maybe("apply_class_balancing", True)
    if loss == "CosineSimilarity":
        maybe("axis", *axes)
    if loss in ("Dice", "Tversky") and rank > 1:
        maybe("axis", list(range(1, rank)), 1, [1])
    if loss == "Tversky":
        maybe("alpha", 0.7)
        maybe("beta", 0.2)
    if loss == "Circle":
        maybe("gamma", 1.0, 20.0)
        maybe("remove_diagonal", False)
    if loss == "CategoricalGeneralizedCrossEntropy":
        maybe("q", 0.8)
    return found


def _pairs(draw: st.DrawFn, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
    vectors = rng.normal(size=(batch, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return rng.integers(0, 2, (batch, 1) if draw(often(0.3)) else batch), vectors.astype(np.float32)


def _sequences(draw: st.DrawFn, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
    steps, classes = draw(st.integers(2, 5)), draw(st.integers(2, 4))
    labels = rng.integers(1, classes, (batch, draw(st.integers(1, steps // 2 + 1))))
    for row in labels:
        row[rng.integers(0, len(row) + 1) :] = 0
    return labels, numbers(rng, LOGIT, (batch, steps, classes))


def _misshaped(draw: st.DrawFn, y: np.ndarray) -> np.ndarray:
    """Targets as people pass them by accident: an axis too many, too few, or of length 1."""
    change = draw(st.sampled_from(["none"] * 6 + ["drop", "add", "one column", "one sample", "first"]))
    if change == "drop" and y.ndim and y.shape[-1] == 1:
        return y[..., 0]
    if change == "add":
        return y[..., None]
    if change == "one column":
        return y[..., :1]
    if change == "one sample":
        return y[:1]
    return y[0] if change == "first" and y.ndim > 1 else y


@st.composite
def keras_problems(
    draw: st.DrawFn, losses: tuple[str, ...], reductions: tuple[str | None, ...], tidy: bool = False
) -> Problem:
    """A problem for a branch of Keras; `tidy`: shapes, labels and values that a careful user has."""
    loss = draw(st.sampled_from(losses))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 4))
    middle = draw(st.lists(st.integers(1, 3), max_size=2))
    target, kind = KERAS_LOSSES[loss]
    # One class is no classification: Keras squeezes its axis and takes another one for the classes.
    shape = (batch, *middle, draw(st.integers(2 if tidy and target == LABEL else 1, 4)))
    if not tidy and draw(often(0.07)):
        shape = (batch,)
    given = draw(arguments(loss, len(shape)))
    entries: tuple[int, ...] = (batch,)
    if loss == "Circle":
        y, p = _pairs(draw, rng, batch)
    elif loss == "CTC":
        y, p = _sequences(draw, rng, batch)
    else:
        p = numbers(rng, LOGIT if given.get("from_logits") else kind, shape)
        if kind == PROBABILITY and draw(often(0.2)) and not given.get("from_logits"):
            p = np.round(p) if tidy or draw(st.booleans()) else p * 3 - 1
        axis = given.get("axis", -1) if isinstance(given.get("axis", -1), int) else -1
        entries = tuple(np.delete(shape, axis).tolist())
        if target == LABEL:
            axis = axis % len(shape)
            y = rng.integers(0, shape[axis], entries)
            if not tidy and draw(often(0.15)):
                y = rng.integers(-1, shape[axis] + 1, entries)
            if "ignore_class" in given:
                y = np.where(rng.random(entries) < 0.4, given["ignore_class"], y)
            if draw(often(0.3)) and not tidy:
                y = np.expand_dims(y, draw(st.sampled_from([-1, axis])))
        else:
            soft = target in (BINARY, HOT) and "Hinge" not in loss and draw(often(0.3))
            y = numbers(rng, PROBABILITY if soft else target, shape)
            y = y if tidy else _misshaped(draw, y)
    shapes = [entries[:1], entries] if tidy else [(), entries[:1], (*entries[:1], 1), entries, (*entries, 1), shape]
    weight, mask = None, None
    if draw(often(0.6)):
        weight = rng.uniform(0, 2, draw(st.sampled_from(shapes))).astype(np.float32)
        weight = np.asarray(weight * draw(st.sampled_from([1, 1, 1, 0])) if draw(st.booleans()) else np.round(weight))
    if draw(often(0.4)):
        chosen = draw(st.sampled_from(shapes)) or entries
        mask = rng.random(chosen) < draw(st.sampled_from([0.7, 0.7, 0.0, 1.1]))
    given["reduction"] = draw(st.sampled_from(reductions))
    return Problem(loss, given, y, p, weight, mask)


def number(value: Any) -> np.ndarray:
    """What a case prints, as an array; its names of NaN and the infinities are those of NumPy."""
    return np.asarray(value, np.float64)


def size_of_terms(unreduced: Any, reduction: str | None) -> float:
    """The size at which a reduced loss is rounded: the largest term, or the sum of all."""
    terms = np.abs(np.asarray(unreduced, np.float64))
    terms = terms[np.isfinite(terms)]
    if not terms.size:
        return 0.0
    return float(terms.sum() if reduction == "sum" else terms.max())


def close(found: Any, expected: Any, scale: float, ulps: float = 64) -> bool:
    """Equal up to `ulps` roundings of float32 at the size of the terms that were added; NaN is NaN, ∞ is ∞."""
    a, b = number(found), number(expected)
    if a.shape != b.shape:
        return False
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return False
    return bool((np.abs(a[finite] - b[finite]) <= ulps * EPS * (scale + np.abs(b[finite]) + 1e-6)).all())


def assert_same(found: dict[str, Any], framework: Any, scale: float, ulps: float = 64) -> None:
    """A printed case is the framework's number, or names the class of its error."""
    if isinstance(framework, Exception):
        assert found.get("error") == type(framework).__name__, (found, framework)
    else:
        assert "value" in found, (found, framework)
        assert close(found["value"], framework, scale, ulps), (found, framework)
