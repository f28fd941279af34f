"""Rows of the overlap losses: what to make, and the value from the formula, cell by cell in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import lossledger as ll

L = ll.losses
EPSILON = 1e-7
GROUPINGS = ("all", "sample", "class", "sample_class")


@dataclass(frozen=True)
class Overlap:
    """An overlap loss under test.

    Args:
        name: of the row.
        make: makes the loss.
        value: oracle, from (y, p, weight, mask, class_weight) of the shapes [B, T, C], [B, T] or [B], [B, T], [C].
        grouping: what the sums run over.
        empty: the loss of a batch without target and prediction.
    """

    name: str
    make: Callable[..., Any]
    value: Callable[..., float]
    grouping: str
    empty: float = 0.0

    @property
    def ratio(self) -> bool:
        """Whether the sums run over the batch."""
        return "sample" not in self.grouping


@dataclass(frozen=True)
class Formula:
    """A score of one cell, from weights and the cell's targets and probabilities as flat arrays; and its curve."""

    score: Callable[..., float]
    curve: Callable[[float, int], float] = lambda loss, column: loss
    policies: dict[str, Any] = field(default_factory=dict)


def dice_score(w, y, p, top, bottom, squared):
    size = (w * (y**2 + p**2)).sum() if squared else (w * (y + p)).sum()
    return (2 * (w * y * p).sum() + top) / (size + bottom)


def jaccard_score(w, y, p, top, bottom, squared):
    both = (w * y * p).sum()
    size = (w * (y**2 + p**2)).sum() if squared else (w * (y + p)).sum()
    return (both + top) / (size - both + bottom)


def tversky_score(alpha, beta):
    def score(w, y, p, top, bottom, squared):
        true, extra, missed = (w * y * p).sum(), (w * (1 - y) * p).sum(), (w * y * (1 - p)).sum()
        return (true + top) / (true + alpha * extra + beta * missed + bottom)

    return score


def cells_of(shape, grouping):
    """Each cell as its samples and columns."""
    samples, columns = range(shape[0]), range(shape[-1])
    if grouping == "all":
        return [(list(samples), list(columns))]
    if grouping == "sample":
        return [([b], list(columns)) for b in samples]
    if grouping == "class":
        return [(list(samples), [c]) for c in columns]
    return [([b], [c]) for b, c in itertools.product(samples, columns)]


def value_of(formula, grouping, total=False, smooth=EPSILON, **policies):
    """The mean (or the sum) of the cells, one at a time."""
    top = policies.get("smooth_numerator", smooth)
    first = 0 if policies.get("include_background", True) else 1
    absent = policies.get("absent", "keep")
    linear = "sample" in grouping

    def value(y, p, weight=None, mask=None, class_weight=None):
        w = np.ones(y.shape[:2]) if weight is None else np.asarray(weight, float)
        outside = linear and w.ndim == 1
        m = np.ones(y.shape[:2], bool) if mask is None else mask
        c = np.ones(y.shape[-1]) if class_weight is None else np.asarray(class_weight, float)
        found, cells = 0.0, 0
        for samples, columns in cells_of(y.shape, grouping):
            columns = [k for k in columns if k >= first]
            if not columns:
                continue
            picked = np.ix_(samples, range(y.shape[1]), columns)
            inside = np.broadcast_to((w[:, None] if w.ndim == 1 else w)[..., None], y.shape)[picked]
            inside = np.ones_like(inside) if outside else inside.copy()
            if "class" not in grouping:
                inside = inside * c[columns]
            valid = np.broadcast_to(m[..., None], y.shape)[picked]
            inside = np.where(valid, inside, 0.0).ravel()
            truth, guess = (np.where(valid, a[picked], 0.0).ravel() for a in (y, p))
            if not valid.any():
                # Nothing counted: a sample leaves the mean, a class over the batch stays as a 0.
                cells += not linear and absent != "skip"
                continue
            here = (inside * truth).sum() > 0
            if absent == "skip" and not here:
                continue
            cells += 1
            if absent == "zero" and not here:
                continue
            score = formula.score(inside, truth, guess, top, smooth, policies.get("squared", False))
            factor = (w[samples[0]] if outside else 1.0) * (c[columns[0]] if "class" in grouping else 1.0)
            found += factor * formula.curve(1 - score, columns[0])
        return found if total else (found / cells if cells else 0.0)

    return value


FORMULAS = {
    "dice": (L.Dice, {}, Formula(dice_score)),
    "jaccard": (L.Jaccard, {}, Formula(jaccard_score)),
    "tversky": (L.Tversky, {"alpha": 0.3, "beta": 0.7}, Formula(tversky_score(0.3, 0.7))),
    "focal_tversky": (L.FocalTversky, {}, Formula(tversky_score(0.3, 0.7), lambda x, _: max(x, 0.0) ** 0.75)),
    "focal_tversky_easy": (L.FocalTversky, {"gamma": 2.0}, Formula(tversky_score(0.3, 0.7), lambda x, _: x**2)),
    "log_cosh_dice": (L.LogCoshDice, {}, Formula(dice_score, lambda x, _: np.log(np.cosh(x)))),
}
POLICIES = {
    "plain": {},
    "smoothed": {"smooth": 1.0, "smooth_numerator": 0.25},
    "foreground": {"include_background": False},
    "squared": {"squared": True},
    "absent-zero": {"absent": "zero"},
    "absent-skip": {"absent": "skip"},
    "all-policies": {"absent": "skip", "include_background": False, "smooth": 0.5, "smooth_numerator": 0.0},
}
# Policies one at a time run in the suite of overlap losses alone.
ALONE = ("smoothed", "foreground", "squared", "absent-zero", "absent-skip")


def _rows():
    for (name, (make, options, formula)), grouping, (policy, chosen) in itertools.product(
        FORMULAS.items(), GROUPINGS, POLICIES.items()
    ):
        if "tversky" in name and policy == "squared":
            continue
        curve = formula.curve
        shift = 1 - chosen["smooth_numerator"] / chosen["smooth"] if "smooth_numerator" in chosen else 0.0
        yield Overlap(
            f"{name}-{grouping}-{policy}",
            lambda make=make, options=options, grouping=grouping, chosen=chosen, **k: make(
                grouping=grouping, **options, **chosen, **k
            ),
            value_of(formula, grouping, **chosen),
            grouping,
            0.0 if chosen.get("absent", "keep") != "keep" else float(curve(shift, 1)),
        )


def asymmetric_curve(gamma):
    return lambda loss, column: loss if column == 0 else max(loss, 0.0) ** (1 - gamma)


def _asymmetric_rows():
    for grouping, absent in itertools.product(("class", "sample_class"), ("keep", "skip")):
        formula = Formula(tversky_score(0.4, 0.6), asymmetric_curve(0.5))
        yield Overlap(
            f"asymmetric_focal_tversky-{grouping}-{absent}",
            lambda grouping=grouping, absent=absent, **k: L.AsymmetricFocalTversky(
                0.6, 0.5, grouping=grouping, absent=absent, **k
            ),
            value_of(formula, grouping, absent=absent),
            grouping,
        )


def generalized(grouping, power, top=EPSILON, bottom=EPSILON, first=0):
    """The generalized Dice loss; one ratio a sample, or one."""

    def value(y, p, weight=None, mask=None, class_weight=None):
        w = np.ones(y.shape[:2]) if weight is None else np.asarray(weight, float)
        m = np.ones(y.shape[:2], bool) if mask is None else mask
        c = np.ones(y.shape[-1]) if class_weight is None else np.asarray(class_weight, float)
        outside = grouping == "sample" and w.ndim == 1
        found = []
        for samples in [[b] for b in range(len(y))] if grouping == "sample" else [list(range(len(y)))]:
            if not m[samples].any():
                continue
            inside = np.where(m[samples], 1.0 if outside else (w[:, None] if w.ndim == 1 else w)[samples], 0.0)
            volumes = [(inside * y[samples, :, k]).sum() for k in range(first, y.shape[-1])]
            finite = [v**-power for v in volumes if v > 0]
            # An empty class takes the largest weight that is a number.
            weights = [v**-power if v > 0 else max(finite, default=0.0) for v in volumes]
            if power == 0:
                weights = [1.0 for _ in volumes]
            wrong, size = 0.0, bottom
            for k, v in enumerate(weights, start=first):
                both = 2 * (inside * y[samples, :, k] * p[samples, :, k]).sum()
                whole = (inside * (y[samples, :, k] + p[samples, :, k])).sum()
                wrong += c[k] * (v * (whole - both) + (bottom - top) / len(volumes))
                size += v * whole
            found.append((w[samples[0]] if outside else 1.0) * wrong / size)
        return float(np.mean(found)) if found else 0.0

    return value


def _generalized_rows():
    for grouping, (weights, power) in itertools.product(
        ("sample", "all"), {"square": 2, "simple": 1, "uniform": 0}.items()
    ):
        yield Overlap(
            f"generalized_dice-{grouping}-{weights}",
            lambda grouping=grouping, weights=weights, **k: L.GeneralizedDice(weights, grouping=grouping, **k),
            generalized(grouping, power),
            grouping,
        )
    for grouping in ("sample", "all"):
        yield Overlap(
            f"generalized_dice-{grouping}-foreground",
            lambda grouping=grouping, **k: L.GeneralizedDice(
                grouping=grouping, include_background=False, smooth=0.5, smooth_numerator=0.1, **k
            ),
            generalized(grouping, 2, 0.1, 0.5, 1),
            grouping,
            0.8,
        )


ROWS = [*_rows(), *_asymmetric_rows(), *_generalized_rows()]
NAMES = [row.name for row in ROWS]
