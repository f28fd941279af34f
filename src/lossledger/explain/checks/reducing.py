"""RED, DEN, GA, SCALE: what the value is divided by, and what that does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lossledger import reduction as reductions
from lossledger.explain.checks.case import Case, TermCase
from lossledger.explain.checks.finding import Finding
from lossledger.explain.checks.shapes import PROBED
from lossledger.losses.loss import Loss


def declared_sum(case: Case) -> Iterator[Finding]:
    """RED1: a sum grows with the batch, and the learning rate with it."""
    for term in case.understood:
        tally = term.tally
        assert tally is not None
        scalar = getattr(term.loss, "scalar", None)
        summed = term.loss.reduction.statistic is None and term.loss.reduction is not reductions.NONE
        if tally.form == "ratio" or not (summed or scalar == "sum"):
            continue
        entries = term.samples if scalar == "sum" else term.entries()
        if entries < 2:
            continue
        yield Finding(
            "RED1",
            "note",
            f"{term.name}: {term.value:.6g} is a sum over {entries:,.0f} entries; against their mean "
            f"({term.value / entries:.4g}) the learning rate is in effect {entries:,.0f} times larger, and "
            "changes with the size of the batch.",
            "Use a mean, or divide the learning rate by that number and keep the batch size.",
            {"term": term.name, "value": term.value, "entries": entries},
        )


def scalar_that_sums(case: Case) -> Iterator[Finding]:
    """RED2: a scalar that doubles with the batch is a sum; RED3, below: one that does neither is coupled."""
    for term, ratio in _doubled(case):
        if term.elements is not None and term.elements.ndim == 1 and abs(ratio - 2) < 1e-3:
            n = term.samples
            yield Finding(
                "RED2",
                "warning",
                f"{term.name}: the same samples twice give {ratio:.4g} times the value, so the function returns a sum "
                f"over the {n} samples, while a scalar is taken for the mean of its batch: the learning rate is in "
                f"effect {n} times larger, and an epoch's loss depends on the batch size.",
                'Return one value a sample, or declare it: FunctionLoss(fn, scalar="sum").',
                {"term": term.name, "ratio": ratio, "samples": n},
            )


def coupled_samples(case: Case) -> Iterator[Finding]:
    """RED3: the value depends on which samples share a batch."""
    for term, ratio in _doubled(case):
        if abs(ratio - 1) > 1e-3 and abs(ratio - 2) > 1e-3:
            yield Finding(
                "RED3",
                "note",
                f"{term.name}: the same samples twice give {ratio:.4g} times the value, neither 1 (a mean) nor 2 (a "
                "sum): the samples of a batch are compared with each other.",
                "Intended for contrastive losses; then batches cannot be split or accumulated without changing it.",
                {"term": term.name, "ratio": ratio, "samples": term.samples},
            )


def _doubled(case: Case) -> Iterator[tuple[TermCase, float]]:
    """Losses of the user's, and by how much the value grows when every sample comes twice."""
    for term in case.understood:
        if not term.custom or not term.probeable or term.samples < 2 or getattr(term.loss, "scalar", None) is not None:
            continue
        if term.loss.reduction.statistic is None:
            continue
        small = replace(term if term.samples <= PROBED else term.part(0, PROBED), sample_weight=None, mask=None)
        once = replace(small, class_weight=None).part(0, small.samples)
        twice = replace(once, y_true=_twice(small.y_true), y_pred=_twice(small.y_pred)).part(0, 2 * small.samples)
        if once.tally is None or twice.tally is None or not abs(once.value) > 1e-12:
            continue
        yield term, twice.value / once.value


def _twice(values: Tensor) -> Tensor:
    return torch.cat((values, values))


def weights_as_mask(case: Case) -> Iterator[Finding]:
    """DEN1: weights of 0 and 1 stay in the divisor; a mask would not."""
    for term in case.understood:
        weight = term.weighting.weight if term.weighting is not None else None
        counts_all = term.loss.reduction is reductions.MEAN
        if weight is None or not counts_all or term.tally is None or term.tally.form == "ratio":
            continue
        if term.class_weight is not None or not bool(((weight == 0) | (weight == 1)).all()):
            continue
        kept, count = float(term.tally.weight), float(term.tally.count)
        if 0 < kept < count:
            yield Finding(
                "DEN1",
                "warning",
                f"{term.name}: all weights are 0 or 1, and the loss is divided by {count:,.0f} elements although only "
                f"{kept:,.0f} have a weight: {term.value:.4g} instead of {term.value * count / kept:.4g}.",
                "Pass them as mask=, or use reduction='mean_with_sample_weight'.",
                {"term": term.name, "count": count, "kept": kept, "value": term.value},
            )


def nothing_counts(case: Case) -> Iterator[Finding]:
    """DEN2: masks, ignored labels or weights leave nothing, or nearly nothing."""
    for term in case.understood:
        assert term.tally is not None
        size = 1
        for length in term.weighting.shape if term.weighting is not None else ():
            size *= length
        # Overlap losses count their cells; here every element of the output is meant.
        count = size if term.weighting is None or not term.weighting.shape else int(term.weighting.count())
        weight = float(term.tally.weight)
        if size < 2 or term.samples == 0:
            continue
        if count == 0 or weight == 0:
            what = "is masked or ignored" if count == 0 else "has the weight 0"
            yield Finding(
                "DEN2",
                "warning",
                f"{term.name}: every one of the {size:,} elements {what}; the loss is {term.value:g} and says nothing.",
                "Look at the mask, the label to ignore, or the weights: is their meaning reversed?",
                {"term": term.name, "count": count, "size": size, "weight": weight},
            )
        elif count < 0.01 * size:
            yield Finding(
                "DEN2",
                "note",
                f"{term.name}: only {count:,} of {size:,} elements count ({count / size:.2%}).",
                "If that is not what you expect, look at the mask: is its meaning reversed?",
                {"term": term.name, "count": count, "size": size, "weight": weight},
            )


def _additive(loss: Loss) -> bool:
    return bool(getattr(loss, "additive", True))


def _micro_batches(term: TermCase, parts: int) -> list[TermCase]:
    size = -(-term.samples // parts)
    return [term.part(start, min(start + size, term.samples)) for start in range(0, term.samples, size)]


def mean_of_means(case: Case) -> Iterator[Finding]:
    """GA1: micro-batches averaged as if they counted the same."""
    for term in _accumulated(case):
        if term.tally is None or term.tally.form == "ratio" or not _additive(term.loss):
            continue
        if term.loss.reduction.statistic is None:
            continue
        parts = _micro_batches(term, case.accumulate)
        values = [part.value for part in parts]
        mean = sum(values) / len(values)
        if not abs(term.value) > 1e-12:
            continue
        bias = mean / term.value - 1
        if abs(bias) > 0.01:
            divisors = [part.entries() for part in parts]
            yield Finding(
                "GA1",
                "warning",
                f"{term.name}: {len(parts)} micro-batches count {min(divisors):,.0f} to {max(divisors):,.0f} entries; "
                f"the mean of their means is {mean:.4g}, the loss of all {term.value:.4g} ({bias:+.1%}).",
                "Divide the sum of all micro-batches by all that counts; Objective and fit do.",
                {"term": term.name, "mean_of_means": mean, "value": term.value, "bias": bias, "entries": divisors},
            )


def parts_do_not_add(case: Case) -> Iterator[Finding]:
    """GA2: the gradient of micro-batches, averaged, is not that of the batch."""
    for term in _accumulated(case):
        if term.tally is None or term.batch is None or not term.probeable:
            continue
        if term.tally.form != "ratio" and _additive(term.loss) and not term.custom:
            continue
        whole = _gradient(term)
        parts = [_gradient(part) for part in _micro_batches(term, case.accumulate)]
        if whole is None or any(part is None for part in parts):
            continue
        merged = torch.cat([part for part in parts if part is not None]) / len(parts)
        scale = float(whole.double().norm())
        off = float((merged.double() - whole.double()).norm()) / scale if scale > 0 else 0.0
        if off > 0.01:
            kind = "a ratio over the batch" if term.tally.form == "ratio" else "a comparison of samples"
            if term.custom:
                kind = "one number a batch, or unequal micro-batches"
            yield Finding(
                "GA2",
                "warning",
                f"{term.name}: averaged over {len(parts)} micro-batches the gradient differs from that of the whole "
                f"batch by {off:.1%} of its length ({kind}).",
                "Accumulate its statistics, or keep the batch whole.",
                {"term": term.name, "difference": off, "parts": len(parts)},
            )


def _accumulated(case: Case) -> list[TermCase]:
    return [term for term in case.understood if case.accumulate > 1 and term.samples >= case.accumulate]


def _gradient(term: TermCase) -> Tensor | None:
    if term.batch is None or term.tally is None:
        return None
    return term.loss.restore(term.gradient(), term.y_pred.to(torch.promote_types(term.y_pred.dtype, torch.float32)))


def logged_factor(case: Case) -> Iterator[Finding]:
    """SCALE1: another program's number is ours times a factor with a name."""
    if case.logged is None:
        return
    total = sum(term.coefficient * term.value for term in case.understood)
    if not abs(total) > 1e-12 or not abs(case.logged) > 1e-12:
        return
    ratio = case.logged / total
    if abs(ratio - 1) < 1e-3:
        return
    for factor, name in _factors(case):
        if abs(ratio / factor - 1) < 1e-3:
            yield Finding(
                "SCALE1",
                "warning",
                f"The other program printed {case.logged:.6g}, the loss is {total:.6g}: {name}.",
                "Look for that number in the other program: a sum, accumulation steps, devices, a loss scale.",
                {"logged": case.logged, "value": total, "factor": ratio},
            )
            return
    yield Finding(
        "SCALE1",
        "note",
        f"The other program printed {case.logged:.6g}, the loss is {total:.6g}: {ratio:.6g} times, no factor that is "
        "known.",
        "Compare conventions: lossledger.compare shows each framework's number.",
        {"logged": case.logged, "value": total, "factor": ratio},
    )


def _factors(case: Case) -> Iterator[tuple[float, str]]:
    named: dict[float, Any] = {}
    for term in case.understood:
        columns = float(term.tally.count) if term.tally is not None else 0.0
        for number, what in (
            (term.samples, "the samples"),
            (term.entries(), "the entries"),
            (columns, "the elements"),
            (term.y_pred.shape[-1] if term.y_pred.ndim > 1 else 1, "the length of the last axis"),
        ):
            named.setdefault(float(number), what)
    for number in (*range(2, 17), *(2**k for k in range(5, 21))):
        named.setdefault(float(number), "accumulation steps, devices or a loss scale")
    for number, what in named.items():
        if number > 1:
            yield number, f"{number:,.0f} times, {what}"
            yield 1 / number, f"1/{number:,.0f}, {what}"
