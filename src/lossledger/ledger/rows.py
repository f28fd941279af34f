"""What the ledger holds: a row for each term and group, a row for each metric."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lossledger.ledger.columns import INTEGER, REAL, TEXT

_SQL_TYPES = {"str": TEXT, "int": INTEGER, "int | None": INTEGER, "float": REAL, "float | None": REAL}


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of the ledger: what a term, or one group of it, brought to the loss of a step or an epoch.

    Args:
        split: "training", "validation" or "test".
        epoch: from 1; 0 outside `fit`.
        step: from 1 over the run; None where the row covers the whole epoch.
        term: name of the term, such as "mask/dice".
        role: "data", "regularizer" or "auxiliary".
        form: "linear" (the divisor does not depend on the predictions) or "ratio".
        kind: "term" for the whole term, otherwise what `group` names: "class", "column", "label", "sample", ….
        group: the name of the group; "" where `kind` is "term".
        presence: "present" or "absent" where a binary loss splits a class by its target; otherwise "".
        total: Σ weight · mask · element.
        count: how many elements were not masked.
        weight: Σ weight · mask; for a ratio term what the group brings to the divisor.
        coefficient: λ, the weight of the term in the loss.
        divisor: what the total was divided by.
        contribution: what the row adds to the loss; the rows of one kind add up to it.
        nonfinite: how many unmasked elements were NaN or infinite.
        minimum: the smallest unmasked element, without weights, of `spread=True`; None where that was not asked for,
            where nothing was counted, or where the term has no elements: regularizers, ratios over the batch.
        maximum: the largest, with the same exceptions; NaN where an element is.
        squares: Σ element² over the unmasked elements, without weights.
        masked: of a whole term, how many elements did not count: masked, of an ignored label or absent class; with
            `count` it adds up to all that were shown. None where it is not known: in groups, and in older ledgers.
    """

    split: str
    epoch: int
    step: int | None
    term: str
    role: str
    form: str
    kind: str
    group: str
    presence: str
    total: float
    count: int
    weight: float
    coefficient: float
    divisor: float
    contribution: float
    nonfinite: int
    minimum: float | None = None
    maximum: float | None = None
    squares: float | None = None
    masked: int | None = None


@dataclass(frozen=True, slots=True)
class MetricRow:
    """The value of a metric at the end of an epoch; NaN where it is undefined, as the IoU of an absent class.

    Args:
        split: "training", "validation" or "test".
        epoch: from 1; 0 outside `fit`.
        metric: name of the metric.
        group: name of the class; "" for the overall value.
        value: the metric's value.
    """

    split: str
    epoch: int
    metric: str
    group: str
    value: float


ROW_COLUMNS = {item.name: _SQL_TYPES[str(item.type)] for item in fields(Row)}
METRIC_COLUMNS = {item.name: _SQL_TYPES[str(item.type)] for item in fields(MetricRow)}
OPTIONAL = frozenset({"step", "minimum", "maximum", "squares", "masked"})
