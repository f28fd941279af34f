"""NAN, PREC, TOK, DUP: values that are not finite, too coarse, missing, or counted twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lossledger.errors import LossledgerError
from lossledger.explain.checks.case import Case, TermCase
from lossledger.explain.checks.finding import Finding
from lossledger.values import not_finite

HALF = (torch.float16, torch.bfloat16)
SHOWN = 8


def positions(found: Tensor) -> str:
    """The first positions of a bool `[B]`, as people write them."""
    which = found.nonzero().flatten().tolist()
    return ", ".join(str(i) for i in which[:SHOWN]) + (", …" if len(which) > SHOWN else "")


def _by_sample(values: Tensor | None, samples: int) -> Tensor | None:
    """`[B]`, how many values of each sample are not finite; `None` where all are."""
    if values is None or values.ndim == 0 or values.shape[0] != samples or not values.is_floating_point():
        return None
    # One pass where all is well: what is not finite, or overflows, makes the sum so.
    if bool(torch.isfinite(values.sum())):
        return None
    return not_finite(values).reshape(samples, -1).sum(1)


def _bad_parts(term: TermCase) -> dict[str, Tensor]:
    """By what was given, the non-finite numbers of each sample that count."""
    assert term.batch is not None
    weights = term.weighting
    given = {
        "y_true": term.batch.y_true,
        "y_pred": term.batch.prediction.raw,
        "sample_weight": None if weights is None or not weights.shape else weights.product,
    }
    found = {name: _by_sample(values, term.samples) for name, values in given.items()}
    return {name: bad for name, bad in found.items() if bad is not None and bool(bad.any())}


def _hidden(term: TermCase) -> int:
    """Non-finite targets and predictions as they were given, under a mask or not."""
    return sum(int(not_finite(v).sum()) for v in (term.y_true, term.y_pred) if v.is_floating_point())


def not_finite_values(case: Case) -> Iterator[Finding]:
    """NAN1: what counts is not finite; NAN2 says so where something was meant to take it out."""
    for term in case.terms:
        if term.batch is None or _meant_to_hide(term) or _passes_over(term):
            continue
        yield from _nonfinite(
            term, "NAN1", "", "Repair or mask the samples; a lower learning rate if the output blew up."
        )


def mask_leaves_values(case: Case) -> Iterator[Finding]:
    """NAN2: a mask, or weights of 0, that do not take out what is not finite."""
    for term in case.terms:
        if term.batch is None or not _meant_to_hide(term):
            continue
        zero = term.sample_weight is not None and bool((term.sample_weight == 0).any()) and term.mask is None
        covered = _hidden(term) - sum(
            int(bad.sum()) for name, bad in _bad_parts(term).items() if name != "sample_weight"
        )
        if zero:
            how = " The weight 0 does not take them out: 0 × NaN is NaN."
        else:
            how = f" The mask takes out {covered:,} others and leaves these."
        yield from _nonfinite(term, "NAN2", how, "Pass a mask that is False wherever a value is missing.")


def _meant_to_hide(term: TermCase) -> bool:
    bad = _bad_parts(term) if term.batch is not None else {}
    if not bad or "sample_weight" in bad:
        return False
    zeros = term.sample_weight is not None and bool((term.sample_weight == 0).any())
    return term.mask is not None or zeros


def _passes_over(term: TermCase) -> bool:
    """A loss of the user's that leaves out missing targets by itself: its values are finite without them."""
    left_out = term.custom and term.tally is not None and not int(term.tally.nonfinite)
    return left_out and _bad_parts(term).keys() == {"y_true"}


def _nonfinite(term: TermCase, code: str, how: str, remedy: str) -> Iterator[Finding]:
    bad = _bad_parts(term)
    if bad:
        samples = torch.stack([counts > 0 for counts in bad.values()]).any(0)
        listed = ", ".join(f"{int(counts.sum()):,} in {name}" for name, counts in bad.items())
        yield Finding(
            code,
            "error",
            f"{term.name}: NaN or infinity that counts: {listed}; {int(samples.sum())} of {term.samples} samples "
            f"(positions {positions(samples)}).{how}",
            remedy,
            {"term": term.name, "samples": samples.nonzero().flatten().tolist()}
            | {name: int(counts.sum()) for name, counts in bad.items()},
        )
    elif code == "NAN1" and term.tally is not None and int(term.tally.nonfinite):
        yield Finding(
            code,
            "error",
            f"{term.name}: {int(term.tally.nonfinite):,} elements of the loss are NaN or infinite although targets, "
            "predictions and weights are finite.",
            "Look for a logarithm, a root or a division at 0, or an exponential that overflows.",
            {"term": term.name, "elements": int(term.tally.nonfinite)},
        )


def gradient_not_finite(case: Case) -> Iterator[Finding]:
    """NAN3: a finite loss with a gradient that is not."""
    for term in case.understood:
        # Closed forms and built-in elements have finite gradients where their values are: the laws test that.
        if not term.custom or not term.probeable or int(term.tally.nonfinite if term.tally else 1) or not term.samples:
            continue
        assert term.batch is not None
        if not torch.isfinite(term.batch.prediction.raw).all():
            continue
        try:
            gradient = term.gradient()
        except LossledgerError:
            continue
        bad = _by_sample(gradient, term.samples)
        if bad is not None and bool(bad.any()):
            yield Finding(
                "NAN3",
                "error",
                f"{term.name}: the loss is finite ({term.value:.4g}) but its gradient is not, for "
                f"{int((bad > 0).sum())} of {term.samples} samples (positions {positions(bad > 0)}).",
                "A root or a power below 1 at 0 does this: add a small number inside it, or select with where on both "
                "sides.",
                {"term": term.name, "samples": bad.nonzero().flatten().tolist(), "value": term.value},
            )


def low_precision(case: Case) -> Iterator[Finding]:
    """PREC1: values, results or weights in half precision."""
    for term in case.understood:
        what: tuple[str, torch.dtype] | None = None
        if term.elements is not None and term.elements.dtype in HALF:
            what = ("the function returns", term.elements.dtype)
        elif term.loss.dtype in HALF:
            what = ("the result is asked for in", term.loss.dtype)
        if what is None:
            continue
        half = torch.finfo(what[1])
        stuck = int(2 / half.eps)
        yield Finding(
            "PREC1",
            "warning",
            f"{term.name}: {what[0]} {str(what[1]).removeprefix('torch.')}: {half.eps / 2:.2%} of each value is lost, "
            f"a running sum stops growing by 1 at {stuck:,}, and the largest number is {half.max:.3g}.",
            "Calculate losses in float32: y_pred.float() in the function, and no dtype.",
            {"term": term.name, "dtype": str(what[1]), "stuck": stuck, "largest": half.max},
        )


def samples_without_targets(case: Case) -> Iterator[Finding]:
    """TOK1: samples of which nothing counts, in data with a mask or a label for each step or pixel."""
    for term in case.understood:
        weights = term.weighting
        if weights is None or len(weights.shape) < 3 or weights.mask is None or term.samples < 2:
            continue
        mask = weights.mask
        if all(length == 1 for length in mask.shape[1:]):
            # One number a sample takes samples out on purpose.
            continue
        kept = mask.reshape(mask.shape[0], -1).any(1)
        empty = ~kept
        if bool(empty.any()) and bool(kept.any()) and not _given_by_sample(term, empty):
            share = float(mask.expand(weights.shape).double().mean())
            yield Finding(
                "TOK1",
                "warning",
                f"{term.name}: {int(empty.sum())} of {term.samples} samples have no target at all (positions "
                f"{positions(empty)}); {share:.1%} of all elements are targets.",
                "They cost time and teach nothing: look at the mask and the truncation, or leave them out.",
                {"term": term.name, "samples": empty.nonzero().flatten().tolist(), "share": share},
            )


def end_never_a_target(case: Case) -> Iterator[Finding]:
    """TOK2: the class that ends a sequence, where the caller named it, is a target nowhere."""
    if case.end is None:
        return
    for term in case.understood:
        labels, weights = term.y_true, term.weighting
        if weights is None or len(weights.shape) < 3 or not term.exclusive:
            continue
        if labels.shape != weights.shape[:-1]:
            labels = labels.squeeze(-1) if labels.shape == (*weights.shape[:-1], 1) else labels
        if labels.shape != weights.shape[:-1]:
            # Targets as probabilities name no class.
            continue
        product = weights.product
        counts = torch.ones_like(labels, dtype=torch.bool)
        if product is not None:
            counts = (product != 0).expand(weights.shape).any(-1)
        ends = labels.eq(case.end)
        if bool((ends & counts).any()):
            continue
        hidden = int(ends.sum())
        where = f"at {hidden:,} places it is a label that does not count" if hidden else "it is no label anywhere"
        share = float(counts.double().mean())
        yield Finding(
            "TOK2",
            "warning",
            f"{term.name}: class {case.end}, the end of a sequence, is a target in 0 of {term.samples} samples "
            f"({where}); {share:.1%} of all entries are targets. The model never learns to stop.",
            "Give padding a label of its own, so that ignoring it does not take the ends out too.",
            {"term": term.name, "end": case.end, "hidden": hidden, "share": share},
        )


def _given_by_sample(term: TermCase, empty: Tensor) -> bool:
    """Whether a weight of 0 for the whole sample already says that it is left out."""
    weight = None if term.weighting is None else term.weighting.weight
    if weight is None or weight.shape[0] != empty.shape[0]:
        return False
    return bool((weight.reshape(weight.shape[0], -1) == 0).all(1)[empty].all())


def repeated_tail(case: Case) -> Iterator[Finding]:
    """DUP1: the last samples are the first again, as samplers of several devices pad."""
    for term in case.terms:
        repeated = _repeated(term)
        if repeated:
            yield Finding(
                "DUP1",
                "warning",
                f"{term.name}: the last {repeated} of {term.samples} samples are the first {repeated} again, targets "
                f"and predictions: {term.samples - repeated} samples are counted as {term.samples}.",
                f"Leave the last {repeated} out: a sampler for several devices pads its last batch this way.",
                {"term": term.name, "repeated": repeated, "samples": term.samples},
            )


def _repeated(term: TermCase) -> int:
    """Length of the longest tail that equals the head, of rows that are otherwise all different."""
    samples = term.samples
    if samples < 8 or not term.y_pred.is_floating_point() or term.y_true.shape[:1] != term.y_pred.shape[:1]:
        return 0
    rows = torch.cat([v.reshape(samples, -1).double() for v in (term.y_pred, term.y_true)], 1)
    matches = (rows == rows[:1]).all(1)
    matches[0] = False
    for start in matches.nonzero().flatten().tolist():
        length = samples - start
        if 2 * length <= samples and bool((rows[start:] == rows[:length]).all()):
            # Models of few distinct outputs repeat themselves everywhere.
            distinct = len(torch.unique(rows[:start], dim=0))
            return length if distinct == start else 0
    return 0
