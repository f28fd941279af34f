"""The tables of every report: headings, and cells as `display` shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lossledger.ledger import Diff, Slices
from lossledger.ledger.table import DASH
from lossledger.report.charts import Curve
from lossledger.report.gap import GapView
from lossledger.report.groups import SliceTable
from lossledger.report.numbers import Style, display
from lossledger.report.samples import SampleTable
from lossledger.report.shares import ClassRow, ClassTable, OutputShare, TermShare
from lossledger.report.view import Comparison

Cells = tuple[list[str], list[list[str]]]
MOST_CLASSES = 12
# Rows of a class table in text; a page has its own limit.
MOST_ROWS = 100


def share_cells(outputs: Sequence[OutputShare]) -> Cells:
    """Headings and cells of what every term adds to the loss, with its largest classes.

    Args:
        outputs: of a run.
    """
    lines: list[list[str]] = []
    for output in outputs:
        if len(outputs) > 1 and output.name:
            lines.append([f"all of {output.name}", display(output.contribution), display(output.share, "percent"), ""])
        lines += chain.from_iterable(_term_lines(term) for term in output.terms)
    return ["term", "contribution", "of the loss", "of the entries"], lines


def _term_lines(term: TermShare) -> list[list[str]]:
    lines = [[term.term, display(term.contribution), display(term.share, "percent"), ""]]
    for part in term.classes[:MOST_CLASSES]:
        entries = display(part.entries, "percent")
        lines.append([f"  {part.name}", display(part.contribution), display(part.share, "percent"), entries])
    if rest := term.classes[MOST_CLASSES:]:
        brought = sum(part.contribution for part in rest)
        share = sum(part.share or 0.0 for part in rest)
        lines.append([f"  {len(rest)} others", display(brought), display(share, "percent"), ""])
    return lines


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers: its heading, how it is shown, and the numbers."""

    head: str
    style: Style
    values: tuple[float | None, ...]


def foremost(table: ClassTable, most: int, named: ClassRow | None = None) -> ClassTable:
    """A class table of `most` rows at most: those that add most to the loss, in the order of the table.

    Args:
        table: of one output.
        most: rows to keep.
        named: a row that a sentence speaks of, kept whatever it adds.
    """
    if len(table.rows) <= most:
        return table

    def rank(row: ClassRow) -> tuple[bool, bool, float]:
        # A share that is not a number comes before all that are, one that nobody knows after them.
        share = math.inf if row.share is None or math.isnan(row.share) else row.share
        return row != named, row.share is None, -share

    kept = sorted(range(len(table.rows)), key=lambda position: rank(table.rows[position]))[:most]
    return replace(table, rows=tuple(table.rows[position] for position in sorted(kept)))


def class_columns(table: ClassTable) -> list[Column]:
    """The columns of a class table after the names, as every report shows them.

    Args:
        table: of one output.
    """
    rows, linear = table.rows, table.form == "linear"
    found = [Column("present", "percent", tuple(row.entries for row in rows))] if linear else []
    found.append(Column("of the loss", "percent", tuple(row.share for row in rows)))
    found.append(Column("own mean", "number", tuple(row.mean for row in rows)))
    if linear:
        found.append(Column("where present", "number", tuple(row.mean_present for row in rows)))
    if any(row.change is not None for row in rows):
        found.append(Column("trend", "change", tuple(row.change for row in rows)))
    for position, metric in enumerate(table.metrics):
        found.append(Column(metric, "number", tuple(row.metrics[position] for row in rows)))
    spread = (("smallest", "minimum"), ("largest", "maximum"), ("root mean square", "root_mean_square"))
    for head, name in spread if any(row.reach.maximum is not None for row in rows) else ():
        found.append(Column(head, "number", tuple(getattr(row.reach, name) for row in rows)))
    if table.weighted:
        found.append(Column("avg. weight", "number", tuple(row.average_weight for row in rows)))
    return found


def class_table_cells(table: ClassTable) -> Cells:
    """Headings and cells of a class table, as every report shows them.

    Args:
        table: of one output.
    """
    columns = class_columns(table)
    lines = [
        [row.name, *(display(column.values[i], column.style) for column in columns)] for i, row in enumerate(table.rows)
    ]
    return ["class", *(column.head for column in columns)], lines


def sample_cells(table: SampleTable) -> Cells:
    """Headings and cells of the worst samples; columns of which nothing is known are left out.

    Args:
        table: of one split.
    """
    rows = table.rows
    columns = [
        ("sample", [str(row.sample) for row in rows]),
        ("loss", [display(row.loss) for row in rows]),
        ("of the loss", [display(row.share, "percent") for row in rows]),
        ("true", [row.label for row in rows]),
        ("said", [row.predicted for row in rows]),
        ("confidence", [display(row.confidence) for row in rows]),
        ("correct", [display(row.correct, "percent") for row in rows]),
    ]
    known = [(head, cells) for head, cells in columns if any(cell not in ("", DASH) for cell in cells)]
    return [head for head, _ in known], [list(line) for line in zip(*(cells for _, cells in known), strict=True)]


def slice_cells(table: SliceTable) -> Cells:
    """Headings and cells of the groups of a kind.

    Args:
        table: of one kind and term.
    """
    heads = [table.kind, "entries", "of the entries", "of the loss", "own mean", "of the mean"]
    lines = []
    for row in table.rows:
        shares = (display(row.entries, "percent"), display(row.share, "percent"))
        lines.append([row.group, display(row.count, "count"), *shares, display(row.mean), display(row.factor, "times")])
    return heads, lines


def worst_cells(found: Slices) -> Cells:
    """Headings and cells of the worst slices.

    Args:
        found: of a run.
    """
    heads = ["slice", "samples", "of all", "mean loss", "outside", "difference", "p"]
    lines = []
    for row in found:
        numbers = (row.mean, row.outside, row.effect, row.p)
        shown = (display(row.count, "count"), display(row.share, "percent"), *map(display, numbers))
        lines.append([str(row), *shown])
    return heads, lines


def against_cells(diff: Diff) -> Cells:
    """Headings and cells of what moved the loss, the largest difference first.

    Args:
        diff: of two runs.
    """
    lines = []
    for row in sorted(diff.rows, key=lambda row: -abs(row.difference) if math.isfinite(row.difference) else -math.inf):
        name = f"{row.group} {row.presence}".strip() or "all of it"
        values = (row.before, row.after, row.difference, row.mix, row.rate)
        lines.append([name, row.term, *(display(value) for value in values)])
    return ["group", "term", "before", "after", "difference", "mix", "rate"], lines


def curve_cells(curves: Sequence[Curve]) -> Cells:
    """Headings and cells of a table with the ends and extremes of every line.

    Args:
        curves: of a run.
    """
    lines = []
    for curve in curves:
        for series in curve.series:
            values = [value for _, value in series.points]
            ends = (values[0], min(values), max(values), values[-1])
            lines.append([curve.title, series.name, *(display(value) for value in ends)])
    return ["curve", "line", "first", "lowest", "highest", "last"], lines


def comparison_cells(comparison: Comparison, runs: Sequence[str]) -> Cells:
    """Headings and cells of a comparison; two runs also get the difference, second minus first.

    Args:
        comparison: one quantity of several runs.
        runs: their names.
    """
    heads = ["", *runs, *(["difference"] if len(runs) == 2 else [])]
    lines = []
    for label, values in comparison.rows:
        line = [label, *(display(value) for value in values)]
        if len(runs) == 2:
            line.append(display(_difference(*values)))
        lines.append(line)
    return heads, lines


def _difference(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return None
    # What is left of two equal numbers after rounding would be shown as a difference that is not there.
    return 0.0 if math.isclose(first, second, rel_tol=1e-12) else second - first


def gap_cells(gap: GapView) -> Cells:
    """Headings and cells of the parts.

    Args:
        gap: of a run.
    """
    lines = []
    for line in gap.lines:
        exact = line.error is not None and math.isclose(line.error, 0.0, abs_tol=1e-300)
        error = "exact" if exact else display(line.error, digits=2)
        lines.append([line.name, display(line.value), error, display(line.level, digits=4)])
    return ["part", "change", "± error", "loss"], lines
