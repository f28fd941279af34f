"""SPACE and FLOOR: logits or probabilities, and how low the loss can go."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from lossledger.explain.checks.case import Case, TermCase, with_prediction
from lossledger.explain.checks.finding import Finding
from lossledger.losses.classification import BinaryCrossentropy, CategoricalCrossentropy

# A probability may be a little past 1 by rounding; rows of probabilities sum to 1 this closely, in half precision too.
SLACK, SUM_SLACK = 1e-6, 4e-3
# Numbers that must lie in [0, 1], and reach near both ends, before they are taken for probabilities without a graph.
ENOUGH, NEAR = 64, 0.1


def _reads_logits(term: TermCase) -> bool:
    module = term.module
    if module is not None:
        return isinstance(module, nn.BCEWithLogitsLoss | nn.CrossEntropyLoss)
    return bool(getattr(term.loss, "from_logits", False))


def probabilities_as_logits(case: Case) -> Iterator[Finding]:
    """SPACE1: a softmax of a softmax, or a sigmoid of a sigmoid."""
    for term in case.understood:
        if not _reads_logits(term) or not _counts_something(term):
            continue
        rows = term.rows
        low, high = float(rows.min()), float(rows.max())
        if not (low >= -SLACK and high <= 1 + SLACK) or low == high:
            continue
        twice = "softmax" if term.exclusive and rows.shape[-1] > 1 else "sigmoid"
        if twice == "softmax":
            sums = bool(((rows.double().sum(-1) - 1).abs() < SUM_SLACK).all()) and len(rows) >= 2
            certain = sums or term.activation in ("softmax", "sigmoid")
            seen = "and each row sums to 1" if sums else f"and the model ends in a {term.activation}"
        else:
            spread = rows.numel() >= ENOUGH and low <= NEAR and high >= 1 - NEAR
            certain = spread or term.activation in ("softmax", "sigmoid")
            seen = f"and the model ends in a {term.activation}" if term.activation else "from end to end"
        if not certain:
            continue
        floor = _floor_of_perfect(term)
        limit = "" if floor is None else f" A perfect model would still have {floor:.4g} (now {term.value:.4g})."
        other = "use from_logits=False"
        if term.module is not None:
            other = "give torch.nn.NLLLoss the logarithm" if twice == "softmax" else "use torch.nn.BCELoss"
        yield Finding(
            "SPACE1",
            "error",
            f"{term.name}: the loss expects logits, but all {rows.numel():,} predictions lie in [{low:.3g}, "
            f"{high:.3g}] {seen}: they are probabilities, and go through a {twice} again.{limit}",
            f"Remove the {term.activation or twice} at the end of the model, or {other}.",
            {"term": term.name, "low": low, "high": high, "floor": floor, "value": term.value},
        )


def _counts_something(term: TermCase) -> bool:
    return term.batch is not None and term.tally is not None and int(term.tally.count) > 0


def _floor_of_perfect(term: TermCase) -> float | None:
    """The loss of perfect probabilities, read as the loss reads its input."""
    batch = term.batch
    if batch is None:
        return None
    raw, y = batch.prediction.raw, batch.y_true
    if y.shape == raw.shape:
        return term.again(with_prediction(batch, y.to(raw)))
    axis = 1 if term.module is not None else -1
    if y.ndim == raw.ndim - 1:
        ideal = F.one_hot(y.long().clamp(0, raw.shape[axis] - 1), raw.shape[axis]).to(raw)
        return term.again(with_prediction(batch, ideal.movedim(-1, axis)))
    return None


def logits_as_probabilities(case: Case) -> Iterator[Finding]:
    """SPACE2: the loss reads probabilities (or their logarithms), and gets something else."""
    for term in case.terms:
        if term.batch is None or not term.batch.prediction.raw.numel():
            continue
        expects = "probabilities" if _reads_probabilities(term) else None
        if isinstance(term.module, nn.NLLLoss):
            expects = "log-probabilities"
        if expects is None:
            continue
        rows = term.rows.double()
        if not rows.numel() or not bool(torch.isfinite(rows).all()):
            continue
        low, high = float(rows.min()), float(rows.max())
        data = {"term": term.name, "low": low, "high": high}
        if expects == "probabilities" and (low < -SLACK or high > 1 + SLACK):
            outside = int(((rows < -SLACK) | (rows > 1 + SLACK)).sum())
            yield Finding(
                "SPACE2",
                "error",
                f"{term.name}: the loss expects probabilities, but {outside:,} of {rows.numel():,} predictions lie "
                f"outside [0, 1], from {low:.4g} to {high:.4g}.",
                "Use from_logits=True, or end the model with a sigmoid or softmax.",
                {**data, "outside": outside},
            )
        elif expects == "log-probabilities" and rows.shape[-1] > 1:
            off = float(torch.logsumexp(rows, -1).abs().max())
            if off > 1e-2:
                total = float(rows[0].exp().sum())
                yield Finding(
                    "SPACE2",
                    "error",
                    f"{term.name}: the loss expects log-probabilities, whose exponentials sum to 1; those of the "
                    f"first entry sum to {total:.4g}.",
                    "Give it log_softmax(logits), or use a cross-entropy of logits.",
                    {**data, "sum": total},
                )


def _reads_probabilities(term: TermCase) -> bool:
    return isinstance(term.module, nn.BCELoss) or term.loss.space == "probabilities"


def rows_do_not_sum(case: Case) -> Iterator[Finding]:
    """SPACE3: exclusive classes whose probabilities do not sum to 1: a sigmoid where a softmax belongs."""
    for term in case.understood:
        if term.loss.space != "probabilities" or not term.exclusive or not _counts_something(term):
            continue
        rows = term.rows.double()
        if rows.shape[-1] < 2 or float(rows.min()) < -SLACK or float(rows.max()) > 1 + SLACK:
            continue
        sums = rows.sum(-1)
        off = int(((sums - 1).abs() > 0.02).sum())
        if 2 * off > len(sums):
            yield Finding(
                "SPACE3",
                "warning",
                f"{term.name}: the classes exclude each other, but the probabilities of {off:,} of {len(sums):,} "
                f"entries do not sum to 1: sums from {float(sums.min()):.3g} to {float(sums.max()):.3g}.",
                "End the model with a softmax over the classes, or use a binary loss for independent ones.",
                {"term": term.name, "off": off, "least": float(sums.min()), "most": float(sums.max())},
            )


def smoothing_floor(case: Case) -> Iterator[Finding]:
    """FLOOR1: the loss is as low as its label smoothing lets it be."""
    for term in case.understood:
        smoothing = float(getattr(term.loss, "label_smoothing", 0.0))
        if smoothing == 0 or type(term.loss) not in (BinaryCrossentropy, CategoricalCrossentropy):
            continue
        assert term.batch is not None
        y, raw = term.batch.y_true, term.batch.prediction.raw
        binary = isinstance(term.loss, BinaryCrossentropy)
        smooth = y * (1 - smoothing) + smoothing / (2 if binary else y.shape[-1])
        if term.loss.space == "logits":
            smooth = smooth.clamp(1e-7, 1 - 1e-7)
            smooth = torch.logit(smooth) if binary else smooth.log()
        floor = term.again(with_prediction(term.batch, smooth.to(raw)))
        if floor > 0 and term.value < 1.01 * floor:
            yield Finding(
                "FLOOR1",
                "note",
                f"{term.name}: with label_smoothing={smoothing:g} no model comes below {floor:.4g}; this one is at "
                f"{term.value:.4g}, {term.value - floor:.2g} above.",
                "Nothing is wrong; compare the part above the floor, or the loss without smoothing.",
                {"term": term.name, "floor": floor, "value": term.value},
            )


def same_output_for_all(case: Case) -> Iterator[Finding]:
    """FLOOR2: the output does not depend on the sample, though the targets do."""
    for term in case.understood:
        same_shape = term.y_pred.ndim and term.samples >= 8 and getattr(term.loss, "additive", True)
        if not same_shape or not _counts_something(term) or term.mask is not None:
            continue
        pred = term.y_pred.double().reshape(term.samples, -1)
        true = term.y_true.double().reshape(term.samples, -1)
        scale = max(float(pred.abs().max()), 1e-12)
        if not bool(torch.isfinite(pred).all()) or float((pred - pred[:1]).abs().max()) > 1e-6 * scale:
            continue
        if float((true - true[:1]).abs().max()) > 0:
            yield Finding(
                "FLOOR2",
                "warning",
                f"{term.name}: the output is the same for all {term.samples} samples (the first number is "
                f"{float(pred[0, 0]):.4g}) although the targets differ; {term.value:.4g} is the loss of a constant.",
                "The model ignores its input: look for a dead layer, a learning rate too high, or a saturated end.",
                {"term": term.name, "samples": term.samples, "value": term.value, "first": float(pred[0, 0])},
            )
