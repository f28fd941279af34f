"""What a report says, as plain values: no HTML, no text layout, no files.

`build_view` reads ledgers; `html` and `text` show the view.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lossledger.errors import InputError
from lossledger.ledger import Imbalance, Ledger, MetricRow, Row
from lossledger.ledger.table import GROUP_KINDS, exact_sum
from lossledger.report.charts import Curve, curves

SPLITS = ("validation", "training", "test")
HIDDEN_SHARE = 0.1
HIDDEN_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a bad sample: the bytes of a PNG file, what it shows, and the run that it belongs to."""

    data: bytes
    caption: str
    run: str


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
class ClassRow:
    """One class: share of the entries where it is present, share of the loss, own means a unit of weight, metrics."""

    name: str
    entries: float | None
    share: float | None
    mean: float | None
    mean_present: float | None
    average_weight: float | None
    metrics: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of one output; own means are those of `term`, shares are of the whole loss."""

    output: str
    term: str
    form: str
    metrics: tuple[str, ...]
    rows: tuple[ClassRow, ...]
    weighted: bool


@dataclass(frozen=True, slots=True)
class Hidden:
    """A class whose own mean where present is `factor` times `reference`: the mean of `term`, "" for the whole loss."""

    row: ClassRow
    metrics: tuple[str, ...]
    term: str
    reference: float
    factor: float
    rare: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The printed loss of the last epoch, and whether it can be trusted.

    `losses` are the last of each split; `sums` groupings were checked against their terms, `imbalances` failed.
    """

    split: str
    epoch: int
    loss: float
    count: int
    losses: tuple[tuple[str, float], ...]
    sums: int
    imbalances: tuple[Imbalance, ...]
    hidden: Hidden | None
    nonfinite: int


@dataclass(frozen=True, slots=True)
class RunView:
    """All that is said of one run."""

    run: str
    verdict: Verdict
    terms: tuple[TermShare, ...]
    tables: tuple[ClassTable, ...]
    metrics: tuple[MetricRow, ...]
    curves: tuple[Curve, ...]
    provenance: tuple[tuple[str, str], ...]
    findings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A quantity of several runs side by side: one row a class or term, one value a run."""

    title: str
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class ReportView:
    """A report: its runs, their comparison if there are several, and pictures of bad samples."""

    title: str
    runs: tuple[RunView, ...]
    comparisons: tuple[Comparison, ...]
    note: str
    pictures: tuple[Picture, ...]


def build_view(ledger: Ledger, against: Ledger | None = None, pictures: Iterable[Picture] = ()) -> ReportView:
    """Read what a report says out of a ledger.

    Args:
        ledger: of one run or several.
        against: further runs to set beside them.
        pictures: of bad samples, the worst first.

    Raises:
        InputError: a run without the loss of any epoch.
    """
    parts = [book.select(run) for book in (ledger, against) if book is not None for run in book.runs]
    given = [part.run for part in parts]
    names = [f"{n} ({given[: i + 1].count(n)})" if given.count(n) > 1 else n for i, n in enumerate(given)]
    runs = tuple(_run_view(name, part) for name, part in zip(names, parts, strict=True))
    compared = tuple(c for c in _comparisons(runs) if c.rows) if len(runs) > 1 else ()
    return ReportView(", ".join(names), runs, compared, _comparison_note(runs), tuple(pictures))


# What a report says of a finding of the checks, in this order.
_FINDING = ("code", "severity", "message", "remedy")


def _run_view(name: str, ledger: Ledger) -> RunView:
    rows = [row for row in ledger.rows if row.step is None]
    splits = [split for split in SPLITS if any(row.split == split and row.kind == "term" for row in rows)]
    if not splits:
        raise InputError(f"The run {name!r} has no loss of an epoch yet: there is nothing to report.")
    split = splits[0]
    epoch = max(row.epoch for row in rows if row.split == split and row.kind == "term")
    final = [row for row in rows if row.split == split and row.epoch == epoch]
    metrics = [metric for metric in ledger.metrics if metric.split == split and metric.epoch == epoch]
    loss = ledger.loss(split, epoch)
    tables = tuple(_class_tables(final, metrics, loss, ledger.info.get("class_names")))
    return RunView(
        run=name,
        verdict=_verdict(ledger, splits, final, tables),
        terms=tuple(_term_shares(final, tables, loss)),
        tables=tables,
        metrics=tuple(metrics),
        curves=curves(ledger.rows, ledger.metrics),
        provenance=tuple(_flat({key: value for key, value in ledger.info.items() if key != "findings"})),
        findings=tuple(" ".join(str(f.get(k, "")) for k in _FINDING) for f in ledger.info.get("findings", ())),
    )


def _verdict(ledger: Ledger, splits: list[str], final: list[Row], tables: Sequence[ClassTable]) -> Verdict:
    split, epoch = final[0].split, final[0].epoch
    whole = [row for row in final if row.kind == "term"]
    loss = ledger.loss(split, epoch)
    return Verdict(
        split=split,
        epoch=epoch,
        loss=loss,
        count=max((row.count for row in whole if row.role == "data"), default=0),
        losses=tuple((other, ledger.loss(other)) for other in splits),
        sums=len({(r.split, r.epoch, r.step, r.term, r.kind) for r in ledger.rows if r.kind != "term"}),
        imbalances=tuple(ledger.balance()),
        hidden=_hidden(tables, whole, loss),
        nonfinite=sum(row.nonfinite for row in ledger.rows if row.kind == "term" and row.step is None),
    )


def _hidden(tables: Sequence[ClassTable], whole: Sequence[Row], loss: float) -> Hidden | None:
    """The rare class whose own loss is furthest above the printed one; if there is none, the class with the highest."""
    data = [row for row in whole if row.role == "data"]
    found = []
    for table in tables:
        # A sum, or several terms, cannot be compared with the mean of one class: its own term's mean can.
        same = [row for row in data if row.term == table.term]
        own = _quotient(exact_sum(row.total for row in same), sum(row.count for row in same))
        alone = len(data) == 1 and own is not None and abs(loss - own) <= 0.5 * abs(own)
        reference = loss if alone else own
        for row in table.rows if table.form == "linear" and reference and reference > 0 else ():
            if row.mean_present is not None and row.entries is not None and math.isfinite(row.mean_present):
                factor = row.mean_present / (reference or 1.0)
                rare = row.entries <= HIDDEN_SHARE and factor >= HIDDEN_FACTOR
                found.append(Hidden(row, table.metrics, "" if alone else table.term, reference or 0.0, factor, rare))
    return max(found, key=lambda hidden: (hidden.rare, hidden.factor), default=None)


def _class_tables(
    final: Sequence[Row], metrics: Sequence[MetricRow], loss: float, class_names: object
) -> Iterable[ClassTable]:
    by_output: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for term in dict.fromkeys(row.term for row in final):
        if groups := _groups(final, term):
            by_output.setdefault(_output(term), {})[term] = groups
    for output, terms in by_output.items():
        main = next((t for t, groups in terms.items() if _form(groups) == "linear"), next(iter(terms)))
        listed = class_names.get(output) if isinstance(class_names, Mapping) else class_names
        names = _names_in_order([*terms[main], *chain.from_iterable(terms.values())], listed)
        measured = _class_metrics(metrics, output, names)
        whole_count = sum(row.count for rows in terms[main].values() for row in rows)
        rows = []
        for name in names:
            own = terms[main].get(name, [])
            share = _quotient(exact_sum(r.contribution for g in terms.values() for r in g.get(name, [])), loss)
            values = tuple(by_class.get(name) for by_class in measured.values())
            if own or any(value is not None for value in values):
                rows.append(_class_row(name, own, whole_count, share, values))
        weighted = any(abs((row.average_weight or 1) - 1) > 1e-9 for row in rows)
        yield ClassTable(output, main, _form(terms[main]), tuple(measured), tuple(rows), weighted)


def _class_row(
    name: str, own: Sequence[Row], whole_count: int, share: float | None, metrics: tuple[float | None, ...]
) -> ClassRow:
    count, weight = sum(r.count for r in own), exact_sum(r.weight for r in own)
    # A binary loss splits each class by its target; a categorical one has a row only where the class is present.
    split = any(r.presence for r in own)
    present = [r for r in own if r.presence != "absent"] if split else own
    linear = all(r.form == "linear" for r in own)
    entries = _quotient(sum(r.count for r in present), count if split else whole_count) if linear and own else None
    mean_present = _quotient(exact_sum(r.total for r in present), exact_sum(r.weight for r in present))
    return ClassRow(
        name=name,
        entries=entries,
        share=share,
        mean=_quotient(exact_sum(r.total for r in own), weight),
        mean_present=mean_present if linear else None,
        average_weight=_quotient(weight, count) if linear else None,
        metrics=metrics,
    )


def _term_shares(final: Sequence[Row], tables: Sequence[ClassTable], loss: float) -> Iterable[TermShare]:
    entries = {(table.output, row.name): row.entries for table in tables for row in table.rows}
    for term in dict.fromkeys(row.term for row in final if row.kind == "term"):
        own = [row for row in final if row.term == term and row.kind == "term"]
        contribution = exact_sum(row.contribution for row in own)
        classes = []
        for name, rows in _groups(final, term).items():
            brought = exact_sum(row.contribution for row in rows)
            present = [row.contribution for row in rows if row.presence == "present"]
            where_present = _quotient(exact_sum(present), loss) if any(row.presence for row in rows) else None
            known = entries.get((_output(term), name))
            classes.append(ClassShare(name, brought, _quotient(brought, loss), where_present, known))
        classes.sort(key=lambda c: -c.contribution)
        share = _quotient(contribution, loss)
        yield TermShare(term, own[0].role, own[0].coefficient, contribution, share, tuple(classes))


def _comparisons(runs: Sequence[RunView]) -> Iterable[Comparison]:
    """Final losses, terms and metrics of several runs, and each metric by class."""
    yield _compared("Loss", [dict(run.verdict.losses) for run in runs])
    yield _compared("Contribution to the loss", [{term.term: term.contribution for term in run.terms} for run in runs])
    yield _compared("Metrics", [{m.metric: m.value for m in run.metrics if not m.group} for run in runs])
    for metric in dict.fromkeys(m.metric for run in runs for m in run.metrics if m.group):
        by_class = [{m.group: m.value for m in run.metrics if m.metric == metric and m.group} for run in runs]
        yield _compared(f"{metric} by class", by_class)


def _compared(title: str, values: Sequence[Mapping[str, float]]) -> Comparison:
    labels = dict.fromkeys(chain.from_iterable(values))
    return Comparison(title, tuple((label, tuple(v.get(label) for v in values)) for label in labels))


def _comparison_note(runs: Sequence[RunView]) -> str:
    """What stands in the way of comparing the runs' losses."""
    recipes = {(dict(r.provenance).get("recipe"), *((t.term, t.coefficient) for t in r.terms)) for r in runs}
    different = "The runs were trained with different losses: compare their metrics, not their losses."
    return different if len(recipes) > 1 else ""


def _groups(rows: Sequence[Row], term: str) -> dict[str, list[Row]]:
    """The rows of a term by group, of the kind that a reader knows best: class, column or label."""
    grouped = [row for row in rows if row.term == term and row.kind not in ("term", "sample")]
    kinds = sorted({row.kind for row in grouped}, key=lambda k: (GROUP_KINDS.index(k) if k in GROUP_KINDS else 9, k))
    groups: dict[str, list[Row]] = {}
    for row in grouped:
        if row.kind == kinds[0]:
            groups.setdefault(row.group, []).append(row)
    return groups


def _form(groups: Mapping[str, Sequence[Row]]) -> str:
    return next(row.form for rows in groups.values() for row in rows)


def _output(name: str) -> str:
    """The output that a term or metric belongs to: "mask" of "mask/dice", "" of "dice"."""
    return name.rpartition("/")[0]


def _names_in_order(found: Iterable[str], class_names: object) -> dict[str, None]:
    met = dict.fromkeys(found)
    listed = [str(name) for name in class_names] if isinstance(class_names, list | tuple) else []
    return dict.fromkeys([*(name for name in listed if name in met), *met])


def _class_metrics(
    metrics: Iterable[MetricRow], output: str, names: Collection[str]
) -> dict[str, dict[str, float | None]]:
    """Metrics by class that belong to an output, by their short name."""
    found: dict[str, dict[str, float | None]] = {}
    for metric in metrics:
        if metric.group in names and _output(metric.metric) in (output, ""):
            found.setdefault(metric.metric.rpartition("/")[2], {})[metric.group] = metric.value
    return found


def _quotient(numerator: float, divisor: float) -> float | None:
    return numerator / divisor if divisor and not math.isnan(divisor) else None


def _flat(info: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in info.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            items = value if isinstance(value, list | tuple) else [value]
            yield f"{prefix}{key}", ", ".join(str(item) for item in items)
