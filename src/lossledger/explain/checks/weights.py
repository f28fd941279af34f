"""W: weights that do nothing, too much, or something else than meant."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lossledger import reduction as reductions
from lossledger.errors import InputError
from lossledger.explain.checks.case import Case, TermCase
from lossledger.explain.checks.finding import Finding
from lossledger.losses.classification import SoftCategoricalCrossentropy

# A mean weight this far from 1 changes the loss, and the steps of plain gradient descent, by an order of magnitude.
LARGE = 10.0


def weights_cancel(case: Case) -> Iterator[Finding]:
    """W1: divided by the sum of the weights, weights that are all the same do nothing."""
    for term in case.understood:
        weight = _counting_weights(term)
        if weight is None or not weight.numel():
            continue
        first = float(weight[0])
        if first in (0.0, 1.0) or float((weight - first).abs().max()) > 1e-6 * abs(first):
            continue
        yield Finding(
            "W1",
            "warning",
            f"{term.name}: the weight of all {weight.numel():,} entries that count is {first:g}, and the loss is "
            "divided by the sum of the weights: they cancel, and have no effect at all here.",
            "Use a reduction that divides by the entries, or batches in which the weights differ.",
            {"term": term.name, "weight": first, "entries": weight.numel(), "value": term.value},
        )


def _counting_weights(term: TermCase) -> Tensor | None:
    """Weights of the entries that count, of a loss that divides by them."""
    module, batch = term.module, term.batch
    own = getattr(module, "weight", None)
    if isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss) and own is not None and batch is not None:
        if batch.y_true.is_floating_point() or term.loss.reduction is not reductions.MEAN:
            return None
        labels = batch.y_true.reshape(-1).long()
        mask = batch.weighting.mask
        kept: Tensor = labels if mask is None else labels[mask.expand(batch.weighting.shape).reshape(-1)]
        return own.to(kept.device)[kept].double()  # type: ignore[no-any-return]
    weights = term.weighting
    if weights is None or weights.weight is None or term.loss.reduction.name != "mean_with_sample_weight":
        return None
    wide = weights.weight.expand(weights.shape).double()
    return wide.reshape(-1) if weights.mask is None else wide[weights.mask.expand(weights.shape)]


def scalar_with_weights(case: Case) -> Iterator[Finding]:
    """W2: one number for the batch cannot be weighed."""
    for term in case.terms:
        late = None if term.batch is None else term.batch.late
        if late is None or late.given is None or not isinstance(term.error, InputError):
            continue
        if "one number for the whole batch" not in str(term.error):
            continue
        yield Finding(
            "W2",
            "error",
            f"{term.name}: the loss returns one number for the {term.samples} samples, so the {late.given} can only "
            "rescale it, not weigh samples.",
            "Return the unreduced values, for example (y_true - y_pred).square().mean(-1).",
            {"term": term.name, "given": late.given, "samples": term.samples},
        )


def weights_change_scale(case: Case) -> Iterator[Finding]:
    """W3: weights far from 1 on average change the size of the loss and of the steps."""
    for term in case.understood:
        tally = term.tally
        assert tally is not None
        given = term.weighting is not None and term.weighting.weight is not None
        divides = term.loss.reduction.name not in ("sum_over_batch_size", "sum_over_all_entries", "mean_per_sample")
        if not given or divides or tally.form == "ratio" or not float(tally.count):
            continue
        mean = float(tally.weight) / float(tally.count)
        weights = term.weighting.weight if term.weighting is not None else None
        if weights is None or not bool(torch.isfinite(weights).all()) or bool((weights == 0).any()) or mean <= 0:
            continue
        if mean > LARGE or mean < 1 / LARGE:
            yield Finding(
                "W3",
                "warning",
                f"{term.name}: the weights are {mean:.4g} on average, and do not divide the loss: it is about "
                f"{mean:.3g} times that of weights around 1, and so is the learning rate of plain gradient descent.",
                "Divide the weights by their mean, or use reduction='mean_with_sample_weight'.",
                {"term": term.name, "mean_weight": mean, "value": term.value},
            )


def smoothing_with_class_weights(case: Case) -> Iterator[Finding]:
    """W4: class weights inside the sum over smoothed targets move what the loss is smallest at."""
    for term in case.understood:
        found = _smoothed_weights(term)
        if found is None:
            continue
        smoothing, weights = found
        classes = len(weights)
        # For the true class t, Σ_c w_c y_c log p_c is largest at p_c ∝ w_c y_c.
        targets = torch.full((classes, classes), smoothing / classes, dtype=torch.float64)
        targets += (1 - smoothing) * torch.eye(classes, dtype=torch.float64)
        best = targets * weights
        best = best / best.sum(1, keepdim=True).clamp(min=1e-300)
        worst = int((best.diagonal() - targets.diagonal()).argmin())
        winner = int(best[worst].argmax())
        own, meant = float(best[worst, worst]), float(targets[worst, worst])
        if meant - own < 0.01:
            continue
        wrong = winner != worst
        beaten = f", less than the {float(best[worst, winner]):.3f} of class {winner}" if wrong else ""
        yield Finding(
            "W4",
            "error" if wrong else "warning",
            f"{term.name}: with label smoothing {smoothing:g} and class weights from {float(weights.min()):g} to "
            f"{float(weights.max()):g} the loss is smallest where the true class {worst} has the probability "
            f"{own:.3f}{beaten}; without the weights {meant:.3f}.",
            "Give the weights as class_weight or sample_weight, which weigh the entry, or drop the smoothing.",
            {"term": term.name, "class": worst, "best": own, "meant": meant, "winner": winner},
        )


def _smoothed_weights(term: TermCase) -> tuple[float, Tensor] | None:
    """Label smoothing and class weights of a loss that multiplies the two inside its sum."""
    module = term.module
    if isinstance(module, nn.CrossEntropyLoss):
        weights, smoothing = module.weight, float(module.label_smoothing)
    elif isinstance(term.loss, SoftCategoricalCrossentropy):
        weights, smoothing = (None if term.batch is None else term.batch.column_weight), term.loss.label_smoothing
    else:
        return None
    if weights is None or smoothing == 0:
        return None
    wide = weights.detach().double().cpu()
    return None if not float(wide.min()) >= 0 or not float(wide.max()) > 0 else (smoothing, wide)
