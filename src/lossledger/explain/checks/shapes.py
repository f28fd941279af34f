"""SHAPE and AXIS: do targets and predictions fit, and is the class axis where the loss looks for it?"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.explain.checks.case import Case, TermCase
from lossledger.explain.checks.finding import Finding
from lossledger.losses.custom import TorchLoss
from lossledger.losses.loss import Loss
from lossledger.losses.ratio import Overlap

# Samples that a probe calls a loss with.
PROBED = 64


def refused_shapes(case: Case) -> Iterator[Finding]:
    """SHAPE1: the loss refuses the shapes."""
    for term in case.terms:
        if term.batch is None and isinstance(term.error, InputError):
            shapes = {"y_true": list(term.y_true.shape), "y_pred": list(term.y_pred.shape)}
            message, _, remedy = str(term.error).rpartition(". ")
            yield Finding("SHAPE1", "error", f"{message}.", remedy, {"term": term.name, **shapes})


def all_pairs(case: Case) -> Iterator[Finding]:
    """SHAPE2: a loss of the user's that stays the same when the targets change places compares all pairs."""
    for term in case.understood:
        if not term.custom or not term.probeable or term.samples < 3:
            continue
        small = term if term.samples <= PROBED else term.part(0, PROBED)
        if small.batch is None or small.tally is None or not _varies(small.y_true) or not _varies(small.y_pred):
            continue
        if small.sample_weight is not None or small.mask is not None:
            # Permuting targets under weights changes the value for another reason; the function is the same without.
            small = _plain(small)
            if small.tally is None:
                continue
        assert small.batch is not None
        value = small.value
        shuffled = _called(small, small.y_true.roll(1, 0))
        reversed_ = _called(small, small.y_true.flip(0))
        moved = _called(small, small.y_true * 1.5 + 0.25 if small.y_true.is_floating_point() else small.y_true.roll(1))
        if shuffled is None or reversed_ is None or moved is None:
            continue
        tolerance = 1e-5 * max(abs(value), 1e-12)
        ignores_targets = abs(moved - value) <= tolerance
        if abs(shuffled - value) <= tolerance and abs(reversed_ - value) <= tolerance and not ignores_targets:
            pairs = small.samples**2
            yield Finding(
                "SHAPE2",
                "error",
                f"{term.name}: the value is {value:.6g}, and {shuffled:.6g} with the targets in another order: each of "
                f"{small.samples} predictions is compared with each of {small.samples} targets ({pairs:,} pairs), not "
                "with its own.",
                f"Give both the same shape inside the function: y_true {tuple(term.y_true.shape)}, y_pred "
                f"{tuple(term.y_pred.shape)}; a squeeze or an index on one of them makes torch broadcast.",
                {"term": term.name, "value": value, "permuted": shuffled, "samples": small.samples},
            )


def _plain(term: TermCase) -> TermCase:
    return replace(term, sample_weight=None, mask=None, class_weight=None).part(0, term.samples)


def _called(term: TermCase, y_true: Tensor) -> float | None:
    try:
        other = replace(term, y_true=y_true).part(0, term.samples)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    return None if other.tally is None else other.value


def _varies(values: Tensor) -> bool:
    """Whether samples differ, far beyond rounding."""
    if values.shape[0] < 2:
        return False
    wide = values.double().reshape(values.shape[0], -1)
    spread = float((wide - wide[:1]).abs().max())
    return spread > 1e-3 * max(float(wide.abs().max()), 1e-12)


def ambiguous_axis(case: Case) -> Iterator[Finding]:
    """AXIS1: another axis looks like that of the classes, or is as long."""
    for term in case.terms:
        if not (term.exclusive or term.loss.classes_are == "column") or term.y_pred.ndim < 3:
            continue
        rank = term.y_pred.ndim
        axis = term.loss.class_axis % rank
        if isinstance(term.loss, TorchLoss) and not term.exclusive:
            continue
        one_hot = term.y_true.shape == term.y_pred.shape
        others = [other for other in range(1, rank) if other != axis and term.y_pred.shape[other] > 1]
        if one_hot and _sums_to_one(term.y_true, axis):
            continue
        for other in others:
            if one_hot and _sums_to_one(term.y_true, other):
                yield _axis_finding(term, "error" if term.exclusive else "warning", axis, other, "the targets sum")
                break
        else:
            if not term.exclusive or term.batch is None:
                continue
            equal = [other for other in others if term.y_pred.shape[other] == term.y_pred.shape[axis]]
            if not equal or _sums_to_one(term.y_pred, axis):
                continue
            for other in equal:
                if _sums_to_one(term.y_pred, other):
                    yield _axis_finding(term, "error", axis, other, "the predictions sum")
                    break
            else:
                size = term.y_pred.shape[axis]
                yield Finding(
                    "AXIS1",
                    "note",
                    f"{term.name}: axes {axis} and {equal[0]} of y_pred {tuple(term.y_pred.shape)} are both {size} "
                    f"long, so a wrong class axis cannot be noticed; the loss reads the classes on axis {axis}.",
                    "Check that the model puts its classes there; axis= says it otherwise.",
                    {"term": term.name, "axis": axis, "other": equal[0], "size": size},
                )


def _axis_finding(term: TermCase, severity: str, axis: int, other: int, evidence: str) -> Finding:
    return Finding(
        "AXIS1",
        severity,  # type: ignore[arg-type]
        f"{term.name}: the loss reads the classes on axis {axis} of {tuple(term.y_pred.shape)}, but {evidence} to 1 "
        f"over axis {other} and not over axis {axis}.",
        f"Move the classes to the end, for example movedim({other}, -1)"
        + (f", or pass axis={other}." if _takes_class_axis(term.loss) else "."),
        {"term": term.name, "axis": axis, "other": other},
    )


def _takes_class_axis(loss: Loss) -> bool:
    """Whether `axis` is that of the classes: in overlap losses it is that of the sums."""
    return not isinstance(loss, Overlap) and "axis" in inspect.signature(type(loss)).parameters


def _sums_to_one(values: Tensor, axis: int) -> bool:
    if values.numel() == 0:
        return False
    # The first sample tells most of what does not.
    return all(
        bool(((part.sum(axis, dtype=torch.float64) - 1).abs() < 1e-3).all()) and bool(part.amin() >= -1e-6)
        for part in (values[:1], values)
    )
