"""What a report says, as plain values: no HTML, no text layout, no files.

`build_view` reads ledgers; `html`, `text` and `plain` show the view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lossledger.errors import InputError
from lossledger.ledger import Diff, Imbalance, Ledger, MetricRow, Row, Slices
from lossledger.ledger.table import exact_sum
from lossledger.report.charts import Curve, curves
from lossledger.report.gap import GapView, gap_view
from lossledger.report.groups import PlaceMap, SliceTable, place_maps, slice_tables, worst_slices
from lossledger.report.origin import Counted, counted, provenance
from lossledger.report.samples import Cartography, SampleTable, cartography, sample_tables
from lossledger.report.shares import ClassRow, ClassTable, OutputShare, TermShare, class_tables, output_shares, quotient

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

    `losses` are the last of each split; `sums` groupings were checked against their terms, `imbalances` failed;
    `unchecked` belong to terms that are NaN or infinite.
    """

    split: str
    epoch: int
    loss: float
    count: int
    losses: tuple[tuple[str, float], ...]
    sums: int
    unchecked: int
    imbalances: tuple[Imbalance, ...]
    hidden: Hidden | None
    nonfinite: int


@dataclass(frozen=True, slots=True)
class FindingView:
    """What a check found while the run trained."""

    code: str
    severity: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Against:
    """Why the loss differs from that of another run; `refused` says why the two cannot be compared."""

    other: str
    diff: Diff | None
    refused: str


@dataclass(frozen=True, slots=True)
class RunView:
    """All that is said of one run."""

    run: str
    verdict: Verdict
    outputs: tuple[OutputShare, ...]
    tables: tuple[ClassTable, ...]
    metrics: tuple[MetricRow, ...]
    curves: tuple[Curve, ...]
    provenance: tuple[tuple[str, str], ...]
    findings: tuple[FindingView, ...] = ()
    against: Against | None = None
    gap: GapView | None = None
    samples: tuple[SampleTable, ...] = ()
    cartography: Cartography | None = None
    slices: tuple[SliceTable, ...] = ()
    maps: tuple[PlaceMap, ...] = ()
    worst: Slices | None = None
    counted: tuple[Counted, ...] = ()

    @property
    def terms(self) -> tuple[TermShare, ...]:
        """The terms of all outputs, in their order."""
        return tuple(term for output in self.outputs for term in output.terms)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A quantity of several runs side by side: one row a class or term, one value a run."""

    title: str
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class ReportView:
    """A report: its runs, their comparison if there are several, pictures of bad samples, and who has only begun."""

    title: str
    runs: tuple[RunView, ...]
    comparisons: tuple[Comparison, ...]
    note: str
    pictures: tuple[Picture, ...]
    waiting: tuple[str, ...] = ()

    @property
    def left_out(self) -> str:
        """Which runs are not shown, in a sentence."""
        return f"Without the loss of an epoch yet, and not shown: {', '.join(self.waiting)}."


def build_view(ledger: Ledger, against: Ledger | None = None, pictures: Iterable[Picture] = ()) -> ReportView:
    """Read what a report says out of a ledger.

    Args:
        ledger: of one run or several, of which those without the loss of an epoch are only named.
        against: further runs to set beside them; where it is one, what moved the loss from its own to that of each run.
        pictures: of bad samples, the worst first.

    Raises:
        InputError: no run with the loss of an epoch, or none to set beside it.
    """
    books = [book for book in (ledger, against) if book is not None]
    every = [(book, book.select(run)) for book in books for run in book.runs]
    # Where all of a ledger have only begun, the first of them says so.
    parts = [
        part for part in every if _has_epoch(part[1]) or not any(map(_has_epoch, map(part[0].select, part[0].runs)))
    ]
    given = [part.run for _, part in parts]
    names = [f"{n} ({given[: i + 1].count(n)})" if given.count(n) > 1 else n for i, n in enumerate(given)]
    other = against if against is not None and len(against.runs) == 1 else None
    runs = tuple(
        _run_view(name, part, None if other is None or book is against else (names[-1], other))
        for name, (book, part) in zip(names, parts, strict=True)
    )
    compared = tuple(c for c in _comparisons(runs) if c.rows) if len(runs) > 1 else ()
    waiting = tuple(part.run for _, part in every if not _has_epoch(part))
    return ReportView(", ".join(names), runs, compared, _comparison_note(runs), tuple(pictures), waiting)


def _has_epoch(ledger: Ledger) -> bool:
    return any(row.kind == "term" and row.step is None and row.split in SPLITS for row in ledger.rows)


def _run_view(name: str, ledger: Ledger, against: tuple[str, Ledger] | None) -> RunView:
    rows = [row for row in ledger.rows if row.step is None]
    splits = [split for split in SPLITS if any(row.split == split and row.kind == "term" for row in rows)]
    if not splits:
        raise InputError(f"The run {name!r} has no loss of an epoch yet: there is nothing to report.")
    split = splits[0]
    epoch = max(row.epoch for row in rows if row.split == split and row.kind == "term")
    history = [row for row in rows if row.split == split]
    final = [row for row in history if row.epoch == epoch]
    metrics = [metric for metric in ledger.metrics if metric.split == split and metric.epoch == epoch]
    loss = ledger.loss(split, epoch)
    divided = list(_last_epochs(rows, splits))
    tables = tuple(class_tables(final, metrics, loss, ledger.info.get("class_names"), history))
    return RunView(
        run=name,
        verdict=_verdict(ledger, splits, final, tables),
        outputs=tuple(output_shares(final, tables, loss)),
        tables=tables,
        metrics=tuple(metrics),
        curves=curves(ledger.rows, ledger.metrics),
        provenance=tuple(provenance(ledger.info, rows)),
        findings=tuple(_findings(ledger.info.get("findings"))),
        against=None if against is None else _against(ledger, *against),
        gap=gap_view(ledger.info.get("gaps")),
        samples=tuple(sample_tables(ledger, ledger.info.get("class_names"))),
        cartography=cartography(ledger),
        slices=tuple(chain.from_iterable(slice_tables(own, ledger.loss(own[0].split)) for own in divided)),
        maps=tuple(chain.from_iterable(map(place_maps, divided))),
        worst=worst_slices(ledger),
        counted=tuple(counted(rows)),
    )


def _last_epochs(rows: Sequence[Row], splits: Sequence[str]) -> Iterable[list[Row]]:
    """The rows of the last epoch of each split, each kind of group only in the first split that has it."""
    met: set[str] = set()
    for split in splits:
        own = [row for row in rows if row.split == split]
        last = max(row.epoch for row in own if row.kind == "term")
        found = [row for row in own if row.epoch == last and row.kind not in met]
        met |= {row.kind for row in found if row.kind != "term"}
        yield found


def _findings(found: object) -> Iterable[FindingView]:
    """What the checks wrote into the run file; another program may have written something else."""
    for finding in found if isinstance(found, list | tuple) else ():
        if isinstance(finding, Mapping):
            yield FindingView(*(str(finding.get(name, "")) for name in ("code", "severity", "message", "remedy")))


def _against(ledger: Ledger, name: str, other: Ledger) -> Against:
    """What moved the loss from that of the other run to this one."""
    try:
        return Against(name, other.diff(ledger), "")
    except InputError as error:
        return Against(name, None, str(error))


def _verdict(ledger: Ledger, splits: list[str], final: list[Row], tables: Sequence[ClassTable]) -> Verdict:
    split, epoch = final[0].split, final[0].epoch
    whole = [row for row in final if row.kind == "term"]
    loss = ledger.loss(split, epoch)
    rows = ledger.rows
    terms = [row for row in rows if row.kind == "term"]
    # Of what is NaN or infinite no sum can be checked.
    endless = {(r.split, r.epoch, r.step, r.term) for r in terms if not math.isfinite(r.contribution)}
    grouped = {((r.split, r.epoch, r.step, r.term), r.kind) for r in rows if r.kind != "term"}
    return Verdict(
        split=split,
        epoch=epoch,
        loss=loss,
        count=max((row.count for row in whole if row.role == "data"), default=0),
        losses=tuple((other, ledger.loss(other)) for other in splits),
        sums=sum(where not in endless for where, _ in grouped),
        unchecked=sum(where in endless for where, _ in grouped),
        imbalances=tuple(ledger.balance()),
        hidden=_hidden(tables, whole, loss),
        nonfinite=sum(row.nonfinite for row in terms if row.step is None),
    )


def _hidden(tables: Sequence[ClassTable], whole: Sequence[Row], loss: float) -> Hidden | None:
    """The rare class whose own loss is furthest above the printed one; if there is none, the class with the highest.

    `None` where nothing is known by class, or there is only one and it is not rare.
    """
    data = [row for row in whole if row.role == "data"]
    found = []
    for table in tables:
        # A sum, or several terms, cannot be compared with the mean of one class: its own term's mean can.
        same = [row for row in data if row.term == table.term]
        own = quotient(exact_sum(row.total for row in same), sum(row.count for row in same))
        alone = len(data) == 1 and own is not None and abs(loss - own) <= 0.5 * abs(own)
        reference = loss if alone else own
        for row in table.rows if table.form == "linear" and reference and reference > 0 else ():
            if row.mean_present is not None and row.entries is not None and math.isfinite(row.mean_present):
                factor = row.mean_present / (reference or 1.0)
                rare = row.entries <= HIDDEN_SHARE and factor >= HIDDEN_FACTOR
                # A single column is the whole: it hides nothing but what is rare in itself, as one label of two values.
                if rare or len(table.rows) > 1:
                    term = "" if alone else table.term
                    found.append(Hidden(row, table.metrics, term, reference or 0.0, factor, rare))
    return max(found, key=lambda hidden: (hidden.rare, hidden.factor), default=None)


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
    recipes = {_recipe(run) for run in runs}
    different = "The runs were trained with different losses: compare their metrics, not their losses."
    return different if len(recipes) > 1 else ""


def _recipe(run: RunView) -> tuple[Any, ...]:
    said = [entry for entry in run.provenance if entry[0].split()[0] in ("recipe", "divisor")]
    return (*said, *((term.term, term.coefficient) for term in run.terms))
