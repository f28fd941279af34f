"""Rules for the end of an epoch: from tallies that the host already has, over several epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lossledger.explain.checks import classes
from lossledger.explain.checks.classes import ClassRow
from lossledger.explain.checks.finding import Finding
from lossledger.explain.checks.terms import share_findings
from lossledger.losses.classification import BinaryCrossentropy, CategoricalCrossentropy, SparseCategoricalCrossentropy
from lossledger.objective import Objective
from lossledger.tally import Tally

# Epochs in a row before a class or a term is judged: early training looks wrong everywhere.
PATIENCE = 3
# Epochs that a loss must stay at the level of the base rate, and how little it may move meanwhile.
LATE, STANDSTILL = 5, 2e-3
EPSILON = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Epochs:
    """What the epochs so far added up to, on the host.

    Args:
        objective: names the terms.
        training: tallies by term, epoch after epoch.
        validation: of the last epoch, if it was validated.
        weighted: whether weights were given with the validation data, as far as that was seen.
    """

    objective: Objective
    training: Sequence[Mapping[str, Tally]]
    validation: Mapping[str, Tally] | None = None
    weighted: bool = False


def _recent(epochs: Epochs) -> Sequence[Mapping[str, Tally]]:
    return epochs.training[-PATIENCE:] if len(epochs.training) >= PATIENCE else ()


def owning_class(epochs: Epochs) -> Iterator[Finding]:
    """CLS1, in each of the last epochs."""
    for name, rows, found in _lasting(epochs, classes.owning):
        yield from classes.owns(name, rows, found)


def hidden_class(epochs: Epochs) -> Iterator[Finding]:
    """CLS2, in each of the last epochs."""
    for name, rows, found in _lasting(epochs, classes.hiding):
        yield from classes.hidden(name, rows, found)


def _lasting(
    epochs: Epochs, choose: Callable[[Sequence[ClassRow]], list[ClassRow]]
) -> Iterator[tuple[str, Sequence[ClassRow], list[ClassRow]]]:
    """Rows of the last epoch by term, and those that are chosen in each of the last epochs."""
    recent = _recent(epochs)
    for plan in epochs.objective.terms:
        books = [classes.rows_of(t[plan.name], epochs.objective) for t in recent if plan.name in t]
        if books and len(books) == len(recent):
            chosen = [{(row.name, row.presence) for row in choose(rows)} for rows in books]
            always = set.intersection(*chosen)
            yield plan.name, books[-1], [row for row in choose(books[-1]) if (row.name, row.presence) in always]


def absent_class(epochs: Epochs) -> Iterator[Finding]:
    """CLS3, over all of the data."""
    for plan in epochs.objective.terms:
        tally = epochs.training[-1].get(plan.name)
        if tally is not None:
            rows = classes.rows_of(tally, epochs.objective)
            yield from classes.absent(plan.name, rows, None, getattr(plan.loss, "ignore_class", None))


def value_share(epochs: Epochs) -> Iterator[Finding]:
    """TERM1, in every epoch from the first: a term that was learned and became small is none."""
    # What holds in every epoch holds in the first ones: later epochs find nothing new.
    if len(epochs.training) != PATIENCE:
        return
    found: list[Finding] = []
    for tallies in epochs.training:
        parts = [
            (plan.name, plan.coefficient * float(tallies[plan.name].value))
            for plan in epochs.objective.terms
            if plan.name in tallies
        ]
        now = list(share_findings(parts, "TERM1", "loss", f" in each of {len(epochs.training)} epochs"))
        if not now or (found and now[0].data["most"] != found[0].data["most"]):
            return
        found = now
    yield from found


def base_rate(epochs: Epochs) -> Iterator[Finding]:
    """FLOOR2: the loss stands still at that of always answering with the frequencies of the classes."""
    last = epochs.training[-LATE:]
    if len(last) < LATE:
        return
    for plan in epochs.objective.terms:
        plain = getattr(plan.loss, "label_smoothing", 0.0) == 0 and plan.loss.reduction.name == "sum_over_batch_size"
        known = type(plan.loss) in (BinaryCrossentropy, CategoricalCrossentropy, SparseCategoricalCrossentropy)
        if not plain or not known or any(plan.name not in tallies for tallies in last):
            continue
        values = [float(tallies[plan.name].value) for tallies in last]
        rows = classes.rows_of(last[-1][plan.name], epochs.objective)
        unweighted = all(abs(row.weight - row.count) <= 1e-6 * max(row.count, 1) for row in rows)
        base = _entropy(rows)
        # A loss on its way down passes this level: only one that stays has learned nothing.
        near = all(abs(value - base) <= 0.01 * base for value in values)
        if rows and unweighted and base > EPSILON and near and max(values) - min(values) < STANDSTILL * base:
            yield Finding(
                "FLOOR2",
                "warning",
                f"{plan.name}: the loss stands at {values[-1]:.4g} since {LATE} epochs; always answering with the "
                f"frequencies of the classes gives {base:.4g}. The model has learned nothing beyond them.",
                "Try the learning rate, and whether inputs and targets belong together; a few samples must be "
                "learnable by heart.",
                {"term": plan.name, "value": values[-1], "base_rate": base, "epochs": LATE},
            )


def _entropy(rows: Sequence[ClassRow]) -> float:
    """The cross-entropy of the frequencies: −Σ n log(n / N) / N, column by column where they are independent."""
    whole: dict[str, float] = {}
    split = any(row.presence for row in rows)
    for row in rows:
        key = row.name if split else ""
        whole[key] = whole.get(key, 0.0) + row.count
    parts = [-row.count * math.log(row.count / whole[row.name if split else ""]) for row in rows if row.count > 0]
    return math.fsum(parts) / max(math.fsum(row.count for row in rows), EPSILON)


def recipes_differ(epochs: Epochs) -> Iterator[Finding]:
    """REC1: training is weighed otherwise than validation, so that the two losses are different quantities."""
    if epochs.validation is None:
        return
    for plan in epochs.objective.terms:
        training, validation = epochs.training[-1].get(plan.name), epochs.validation.get(plan.name)
        if training is None or validation is None or training.form == "ratio":
            continue
        if not float(training.count) or not float(validation.count):
            continue
        ours = float(training.weight) / float(training.count)
        theirs = float(validation.weight) / float(validation.count)
        if abs(ours - theirs) > 0.01 * max(abs(ours), abs(theirs)):
            yield Finding(
                "REC1",
                "warning",
                f"{plan.name}: a training entry weighs {ours:.4g} on average, a validation entry {theirs:.4g}: loss "
                "and val_loss are different quantities, and their difference says nothing about overfitting.",
                f"Compare the ledger's means by class, or {_alike(training, validation, epochs.weighted)}.",
                {"term": plan.name, "training": ours, "validation": theirs},
            )


def _alike(training: Tally, validation: Tally, given: bool) -> str:
    """What would make the weights of the two alike; `given`: there are weights with the validation data."""
    if not given and not _weighs(validation):
        return "give validation_data weights too"
    if not _weighs(training):
        return "leave the weights of validation_data out, or pass fit a sample_weight by the same rule"
    return "divide the weights of each by their mean: both have some, of different size"


def _weighs(tally: Tally) -> bool:
    """Whether entries weigh other than 1, as far as the sums show it."""
    groups = tally.groups
    sums = [(float(tally.weight), float(tally.count))]
    if groups is not None:
        sums += zip(map(float, groups.weight), map(float, groups.count), strict=True)
    return any(abs(weight - count) > 1e-6 * max(count, 1.0) for weight, count in sums)
