"""Where the loss of an epoch is: outputs, their terms, the classes of each, and the table of the classes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from lossledger.ledger import MetricRow, Row
from lossledger.ledger.table import exact_sum, merged

# Groups that are classes, the one that a reader knows best first. Other kinds (a site, a position) are no classes.
CLASS_KINDS = ("class", "column", "label")


@dataclass(frozen=True, slots=True)
class ClassShare:
    """What one class brings to a term: contribution, and shares of the loss and of the entries (None: unknown)."""

    name: str
    contribution: float
    share: float | None
    present: float | None
    entries: float | None


@dataclass(frozen=True, slots=True)
class TermShare:
    """What a term brings to the loss, and its classes, largest contribution first."""

    term: str
    role: str
    coefficient: float
    contribution: float
    share: float | None
    classes: tuple[ClassShare, ...]


@dataclass(frozen=True, slots=True)
class OutputShare:
    """What an output brings to the loss, with its terms; the name is "" where the model has one output."""

    name: str
    contribution: float
    share: float | None
    terms: tuple[TermShare, ...]


@dataclass(frozen=True, slots=True)
class Reach:
    """Smallest, largest and root mean square of unmasked elements, without weights; None unless the run kept them."""

    minimum: float | None = None
    maximum: float | None = None
    root_mean_square: float | None = None


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class: share of the entries where it is present, share of the loss, own means a unit of weight, metrics.

    `trend` is its own mean by epoch, where it is present if that is known.
    """

    name: str
    entries: float | None
    share: float | None
    mean: float | None
    mean_present: float | None
    average_weight: float | None
    metrics: tuple[float | None, ...]
    trend: tuple[tuple[int, float | None], ...] = ()
    reach: Reach = Reach()

    @property
    def change(self) -> float | None:
        """How much the own mean changed from the first to the last epoch, as a share of the first."""
        values = [value for _, value in self.trend if value is not None and math.isfinite(value)]
        return (values[-1] - values[0]) / abs(values[0]) if len(values) > 1 and values[0] else None


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of one output; own means are those of `term`, shares are of the whole loss."""

    output: str
    term: str
    form: str
    metrics: tuple[str, ...]
    rows: tuple[ClassRow, ...]
    weighted: bool


def class_tables(
    final: Sequence[Row], metrics: Sequence[MetricRow], loss: float, class_names: object, history: Sequence[Row] = ()
) -> Iterable[ClassTable]:
    """One table an output.

    Args:
        final: rows of one split and epoch.
        metrics: of the same split and epoch.
        loss: of that epoch.
        class_names: in their order, by output where there are several.
        history: rows of all epochs of the split, for the trend.
    """
    outputs = {output_of(row.term) for row in final if row.role == "data"} - {""}
    by_output: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for term in dict.fromkeys(row.term for row in final):
        if groups := class_groups(final, term):
            by_output.setdefault(output_of(term), {})[term] = groups
    for output, terms in by_output.items():
        main = next((t for t, groups in terms.items() if _form(groups) == "linear"), next(iter(terms)))
        listed = class_names.get(output) if isinstance(class_names, Mapping) else class_names
        names = _names_in_order([*terms[main], *chain.from_iterable(terms.values())], listed)
        measured = _class_metrics(metrics, output, outputs, names)
        trends = _trends(history, main)
        whole_count = sum(row.count for rows in terms[main].values() for row in rows)
        rows = []
        for name in names:
            own = terms[main].get(name, [])
            share = quotient(exact_sum(r.contribution for g in terms.values() for r in g.get(name, [])), loss)
            values = tuple(by_class.get(name) for by_class in measured.values())
            if own or any(value is not None for value in values):
                rows.append(_class_row(name, own, whole_count, share, values, trends.get(name, ())))
        weighted = any(abs((row.average_weight or 1) - 1) > 1e-9 for row in rows)
        yield ClassTable(output, main, _form(terms[main]), tuple(measured), tuple(rows), weighted)


def _class_row(
    name: str,
    own: Sequence[Row],
    whole_count: int,
    share: float | None,
    metrics: tuple[float | None, ...],
    trend: tuple[tuple[int, float | None], ...],
) -> ClassRow:
    count, weight = sum(r.count for r in own), exact_sum(r.weight for r in own)
    split, present = any(r.presence for r in own), _where_present(own)
    linear = all(r.form == "linear" for r in own)
    entries = quotient(sum(r.count for r in present), count if split else whole_count) if linear and own else None
    mean_present = _own_mean(present)
    return ClassRow(
        name=name,
        entries=entries,
        share=share,
        mean=_own_mean(own),
        mean_present=mean_present if linear else None,
        average_weight=quotient(weight, count) if linear else None,
        metrics=metrics,
        trend=trend,
        reach=reach(own),
    )


def reach(rows: Sequence[Row]) -> Reach:
    """How far the elements of rows of one term reach.

    Args:
        rows: of the ledger.
    """
    counts = [row.count for row in rows]
    low, high, squares = (
        merged(name, [getattr(row, name) for row in rows], counts) for name in ("minimum", "maximum", "squares")
    )
    mean = None if squares is None else quotient(squares, sum(counts))
    # Another program may have written squares that are none.
    root = None if mean is None else math.sqrt(mean) if mean >= 0 else math.nan
    return Reach(low, high, root)


def _where_present(own: Sequence[Row]) -> Sequence[Row]:
    """A binary loss splits each class by its target; a categorical one has a row only where the class is present."""
    return [row for row in own if row.presence != "absent"]


def _own_mean(rows: Sequence[Row]) -> float | None:
    return quotient(exact_sum(row.total for row in rows), exact_sum(row.weight for row in rows))


def _trends(history: Sequence[Row], term: str) -> dict[str, tuple[tuple[int, float | None], ...]]:
    """The own mean of each class by epoch."""
    found: dict[str, dict[int, list[Row]]] = {}
    for name, rows in class_groups(history, term).items():
        epochs = found.setdefault(name, {})
        for row in _where_present(rows):
            epochs.setdefault(row.epoch, []).append(row)
    return {
        name: tuple((epoch, _own_mean(epochs[epoch])) for epoch in sorted(epochs)) for name, epochs in found.items()
    }


def output_shares(final: Sequence[Row], tables: Sequence[ClassTable], loss: float) -> Iterable[OutputShare]:
    """What each output brings to the loss, its terms, and their classes.

    Args:
        final: rows of one split and epoch.
        tables: of the classes.
        loss: of that epoch.
    """
    terms = list(_term_shares(final, tables, loss))
    # The part of a regularizer's name before the stroke is its kind, not an output.
    output = {term.term: output_of(term.term) if term.role == "data" else "" for term in terms}
    for name in dict.fromkeys(output.values()):
        own = tuple(term for term in terms if output[term.term] == name)
        contribution = exact_sum(term.contribution for term in own)
        yield OutputShare(name, contribution, quotient(contribution, loss), own)


def _term_shares(final: Sequence[Row], tables: Sequence[ClassTable], loss: float) -> Iterable[TermShare]:
    entries = {(table.output, row.name): row.entries for table in tables for row in table.rows}
    for term in dict.fromkeys(row.term for row in final if row.kind == "term"):
        own = [row for row in final if row.term == term and row.kind == "term"]
        contribution = exact_sum(row.contribution for row in own)
        classes = []
        for name, rows in class_groups(final, term).items():
            brought = exact_sum(row.contribution for row in rows)
            present = [row.contribution for row in rows if row.presence == "present"]
            where_present = quotient(exact_sum(present), loss) if any(row.presence for row in rows) else None
            known = entries.get((output_of(term), name))
            classes.append(ClassShare(name, brought, quotient(brought, loss), where_present, known))
        classes.sort(key=lambda c: -c.contribution)
        share = quotient(contribution, loss)
        yield TermShare(term, own[0].role, own[0].coefficient, contribution, share, tuple(classes))


def class_groups(rows: Sequence[Row], term: str) -> dict[str, list[Row]]:
    """The rows of a term by class: by the kind of group that a reader knows best.

    Args:
        rows: of the ledger.
        term: name of the term.
    """
    grouped = [row for row in rows if row.term == term and row.kind in CLASS_KINDS]
    kind = min((row.kind for row in grouped), key=CLASS_KINDS.index, default="")
    groups: dict[str, list[Row]] = {}
    for row in grouped:
        if row.kind == kind:
            groups.setdefault(row.group, []).append(row)
    return groups


def _form(groups: Mapping[str, Sequence[Row]]) -> str:
    return next(row.form for rows in groups.values() for row in rows)


def output_of(name: str) -> str:
    """The output that a term or metric belongs to: "mask" of "mask/dice", "" of "dice".

    >>> output_of("mask/dice"), output_of("dice")
    ('mask', '')
    """
    return name.rpartition("/")[0]


def _names_in_order(found: Iterable[str], class_names: object) -> dict[str, None]:
    met = dict.fromkeys(found)
    listed = [str(name) for name in class_names] if isinstance(class_names, list | tuple) else []
    return dict.fromkeys([*(name for name in listed if name in met), *met])


def _class_metrics(
    metrics: Iterable[MetricRow], output: str, outputs: Collection[str], names: Collection[str]
) -> dict[str, dict[str, float | None]]:
    """Metrics by class that belong to an output, by their short name."""
    found: dict[str, dict[str, float | None]] = {}
    for metric in metrics:
        if metric.group in names and _measured_output(metric.metric, outputs) in (output, ""):
            found.setdefault(metric.metric.rpartition("/")[2], {})[metric.group] = metric.value
    return found


def _measured_output(metric: str, outputs: Collection[str]) -> str:
    """The output of a metric, "mask" of "mask_iou"; of several that fit, the longest."""
    fitting = [name for name in outputs if metric.startswith((f"{name}_", f"{name}/"))]
    return max(fitting, key=len, default=output_of(metric))


def quotient(numerator: float, divisor: float) -> float | None:
    """The quotient; None where there is nothing to divide by."""
    return numerator / divisor if divisor and not math.isnan(divisor) else None
