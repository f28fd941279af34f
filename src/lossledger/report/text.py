"""The report for a terminal, at most 80 columns wide, and as Markdown; and the sentences that every report shares."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from lossledger.ledger import Diff, Slices
from lossledger.ledger.table import DASH, aligned, cell_width, clean, shortened
from lossledger.report.charts import Curve
from lossledger.report.gap import gap_cells, gap_sentence
from lossledger.report.groups import PlaceMap, SliceTable
from lossledger.report.numbers import Style, display
from lossledger.report.samples import Cartography, SampleTable
from lossledger.report.shares import ClassTable, OutputShare, TermShare
from lossledger.report.view import Against, Comparison, FindingView, ReportView, RunView, Verdict

WIDTH = 80
MOST_CLASSES = 12
TREND = "trend"


@dataclass(frozen=True, slots=True)
class _Form:
    """How the parts of a document are written: as plain text or as Markdown."""

    heading: Callable[[str, int], str]
    paragraph: Callable[[str], str]
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
    facts: Callable[[Sequence[tuple[str, str]]], str]


def as_text(view: ReportView) -> str:
    """The report as plain text in lines of at most 80 columns.

    Args:
        view: what to say.

    >>> from lossledger.ledger import Ledger, Row
    >>> from lossledger.report import build_view
    >>> ledger = Ledger("demo")
    >>> key = ("training", 1, None, "mse", "data", "linear", "term", "", "")
    >>> ledger.append([Row(*key, 2.0, 4, 4.0, 1.0, 4.0, 0.5, 0)])
    >>> print(as_text(build_view(ledger)).splitlines()[3])
    Training loss 0.5000 after epoch 1, over 4 entries.
    """
    return _document(view, _Form(_underlined, _wrapped, _text_table, _indented))


def as_markdown(view: ReportView) -> str:
    """The report as Markdown with pipe tables; names in it are escaped.

    Args:
        view: what to say.
    """
    return _document(view, _Form(_hashed, _escaped, _pipe_table, _listed))


def headline(verdict: Verdict) -> str:
    """The printed loss, over what it was taken.

    Args:
        verdict: of a run.
    """
    when = f"after epoch {verdict.epoch}" if verdict.epoch else "as evaluated"
    others = [f"{split} {display(value, digits=4)}" for split, value in verdict.losses if split != verdict.split]
    aside = f" (last {', '.join(others)})" if others else ""
    over = f", over {display(verdict.count, 'count')} entries" if verdict.count else ""
    value = display(verdict.loss, digits=4)
    return f"{verdict.split.capitalize()} loss {'is not a number' if value == DASH else value} {when}{aside}{over}."


def balance_sentence(verdict: Verdict) -> str:
    """Whether the entries by group add up to the printed loss.

    Args:
        verdict: of a run.
    """
    if not verdict.sums:
        return "There are no entries by group to check against the loss."
    sums = f"{verdict.sums:,} {'sum' if verdict.sums == 1 else 'sums'}"
    if not verdict.imbalances:
        return f"The books balance: the entries by group add up to the printed loss in each of {sums}."
    first = verdict.imbalances[0]
    where = f"{first.split} epoch {first.epoch}" + (f", step {first.step}" if first.step is not None else "")
    return (
        f"The books do not balance in {len(verdict.imbalances):,} of {sums}: in {where}, the entries of {first.term} "
        f"by {first.kind} differ from its contribution by {display(first.difference)}."
    )


def hidden_sentence(verdict: Verdict) -> str:
    """What the printed number hides: the class whose own loss is far above it; "" where nothing is known by class.

    Args:
        verdict: of a run.
    """
    hidden = verdict.hidden
    if hidden is None:
        return ""
    row = hidden.row
    name = f"own {hidden.term}" if hidden.term else "own loss"
    reference = (
        f"the mean of {display(hidden.reference)}" if hidden.term else f"the printed {display(hidden.reference)}"
    )
    factor = display(hidden.factor, "times").removesuffix("×")
    if not hidden.rare:
        return (
            f"No rare class hides behind the mean: the highest {name} where present is that of {row.name}, "
            f"{display(row.mean_present)}, {factor} times {reference}."
        )
    measured = zip(hidden.metrics, row.metrics, strict=True)
    metric = next((f", and its {m} is {display(value)}" for m, value in measured if display(value) != DASH), "")
    return (
        f"Class {row.name} is present in {display(row.entries, 'percent')} of the entries; its {name} there is "
        f"{display(row.mean_present)}, {factor} times {reference}{metric}."
    )


def nonfinite_sentence(verdict: Verdict) -> str:
    """How many elements were NaN or infinite; "" if none.

    Args:
        verdict: of a run.
    """
    if not verdict.nonfinite:
        return ""
    return f"{display(verdict.nonfinite, 'count')} unmasked elements were NaN or infinite over the run."


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers: its heading, how it is shown, and the numbers."""

    head: str
    style: Style
    values: tuple[float | None, ...]


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
        found.append(Column(TREND, "change", tuple(row.change for row in rows)))
    for position, metric in enumerate(table.metrics):
        found.append(Column(metric, "number", tuple(row.metrics[position] for row in rows)))
    spread = (("smallest", "minimum"), ("largest", "maximum"), ("root mean square", "root_mean_square"))
    for head, name in spread if any(row.reach.maximum is not None for row in rows) else ():
        found.append(Column(head, "number", tuple(getattr(row.reach, name) for row in rows)))
    if table.weighted:
        found.append(Column("avg. weight", "number", tuple(row.average_weight for row in rows)))
    return found


def class_table_cells(table: ClassTable) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a class table, as every report shows them.

    Args:
        table: of one output.
    """
    columns = class_columns(table)
    lines = [
        [row.name, *(display(column.values[i], column.style) for column in columns)] for i, row in enumerate(table.rows)
    ]
    return ["class", *(column.head for column in columns)], lines


def sample_cells(table: SampleTable) -> tuple[list[str], list[list[str]]]:
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


def cartography_sentence(found: Cartography) -> str:
    """What the confidence in the samples says in numbers.

    Args:
        found: of a run.
    """
    never = sum(dot.correct == 0 for dot in found.dots)
    drawn = "" if len(found.dots) == found.count else f" {len(found.dots):,} are shown, the least sure among them."
    missed = f" {never:,} of them were never right." if never else ""
    return (
        f"Mean and deviation of the confidence in the true class, of each of {found.count:,} {found.split} samples "
        f"over {found.epochs} epochs, by {found.term}.{drawn}{missed} Low confidence with little variability is where "
        "labels are wrong or samples too hard; high variability is where the model learned most."
    )


def slice_cells(table: SliceTable) -> tuple[list[str], list[list[str]]]:
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


def worst_sentence(found: Slices) -> str:
    """How many slices were tested, and how many of them are worse than the rest by more than chance.

    Args:
        found: of a run.
    """
    return (
        f"{found.tested:,} groups of samples, and conjunctions of two, were compared with the rest of "
        f"{found.samples:,} samples; {found.significant:,} {'is' if found.significant == 1 else 'are'} worse by more "
        f"than chance. The p-values pay for every test (Holm, level {found.level:g})."
    )


def worst_cells(found: Slices) -> tuple[list[str], list[list[str]]]:
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


def place_sentence(found: PlaceMap) -> str:
    """Where the mean loss is highest and lowest.

    Args:
        found: of a term.
    """
    worst, best = (pick(found.places, key=lambda place: place.mean) for pick in (max, min))
    high, low = (
        f"at row {place.row}, column {place.column}" if found.image else f"at position {place.column}"
        for place in (worst, best)
    )
    return f"The mean loss is highest {high} ({display(worst.mean)}) and lowest {low} ({display(best.mean)})."


def finding_sentence(finding: FindingView) -> str:
    """What a check found, with its code.

    Args:
        finding: of a run.
    """
    return " ".join(part for part in (f"{finding.code} {finding.severity}:", finding.message, finding.remedy) if part)


def against_sentence(against: Against) -> str:
    """What moved the loss since the other run, or why that cannot be said.

    Args:
        against: of a run.
    """
    diff = against.diff
    if diff is None:
        return f"The losses cannot be compared. {against.refused}"
    return (
        f"{diff.first}: {display(diff.before, digits=4)}; {diff.second}: {display(diff.after, digits=4)}. "
        f"Of the difference of {display(diff.difference)}, {display(diff.mix)} is mix (what share of the divisor the "
        f"groups have) and {display(diff.rate)} is rate (the own mean of the groups)."
    )


def against_cells(diff: Diff) -> tuple[list[str], list[list[str]]]:
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


def comparison_cells(comparison: Comparison, runs: Sequence[str]) -> tuple[list[str], list[list[str]]]:
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


def _document(view: ReportView, form: _Form) -> str:
    parts = [form.heading(f"Loss report: {view.title}", 1)]
    names = [run.run for run in view.runs]
    parts += [form.paragraph(view.left_out)] if view.waiting else []
    if view.comparisons:
        parts.append(form.heading("Side by side", 2))
        parts += [form.paragraph(view.note)] if view.note else []
        for comparison in view.comparisons:
            parts += [form.heading(comparison.title, 3), form.table(*comparison_cells(comparison, names))]
    for run in view.runs:
        parts += [form.heading(run.run, 2)] if len(names) > 1 else []
        parts += [form.paragraph(sentence) for sentence in sentences(run.verdict)]
        parts += _run_parts(run, form)
    return "\n\n".join(parts) + "\n"


def _run_parts(run: RunView, form: _Form) -> Iterator[str]:
    yield from (
        form.heading("Where the loss is", 3),
        form.table(["term", "contribution", "of the loss", "of the entries"], _share_lines(run.outputs)),
    )
    if run.curves:
        yield from (form.heading("Curves", 3), form.table(*curve_cells(run.curves)))
    for classes in run.tables:
        of = f" of {classes.output}" if classes.output else ""
        yield form.heading(f"Classes{of}; own means of {classes.term}", 3)
        yield form.table(*class_table_cells(classes))
    for worst in run.samples:
        yield form.heading(f"Worst samples, {worst.split}, epoch {worst.epoch}", 3)
        yield form.table(*sample_cells(worst))
    if run.cartography is not None:
        yield form.heading("How sure the model was of the samples", 3)
        yield form.paragraph(cartography_sentence(run.cartography))
    for slices in run.slices:
        yield form.heading(f"By {slices.kind}: {slices.term}, {slices.split}", 3)
        yield form.table(*slice_cells(slices))
    if run.worst is not None:
        yield form.heading("Worst slices", 3)
        yield form.paragraph(worst_sentence(run.worst))
        yield form.table(*worst_cells(run.worst))
    for places in run.maps:
        yield form.heading(f"By place: {places.term}, {places.split}", 3)
        yield form.paragraph(place_sentence(places))
    if run.against is not None:
        yield form.heading(f"Difference from {run.against.other}", 3)
        yield form.paragraph(against_sentence(run.against))
        if run.against.diff is not None:
            yield form.table(*against_cells(run.against.diff))
    if run.gap is not None:
        yield from (form.heading("Training and validation", 3), form.paragraph(gap_sentence(run.gap)))
        yield form.table(*gap_cells(run.gap))
    if run.provenance:
        yield from (form.heading("Provenance", 3), form.facts(run.provenance))
    if run.findings:
        yield form.heading("Checks", 3)
        yield from (form.paragraph(finding_sentence(finding)) for finding in run.findings)


def sentences(verdict: Verdict) -> list[str]:
    """The verdict in sentences: the loss, what it hides, what was not finite, whether the books balance.

    Args:
        verdict: of a run.
    """
    said = (headline(verdict), hidden_sentence(verdict), nonfinite_sentence(verdict), balance_sentence(verdict))
    return [sentence for sentence in said if sentence]


def curve_cells(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
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


def _share_lines(outputs: Sequence[OutputShare]) -> list[list[str]]:
    lines: list[list[str]] = []
    for output in outputs:
        if len(outputs) > 1 and output.name:
            lines.append([f"all of {output.name}", display(output.contribution), display(output.share, "percent"), ""])
        lines += chain.from_iterable(_term_lines(term) for term in output.terms)
    return lines


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


def _underlined(title: str, level: int) -> str:
    title = shortened(clean(title), WIDTH)
    return title if level > 2 else f"{title}\n{('=' if level == 1 else '-') * cell_width(title)}"


def _wrapped(sentence: str, indent: str = "") -> str:
    said = clean(sentence)
    # Characters may take two columns of a terminal, which textwrap does not know.
    width = WIDTH if cell_width(said) <= len(said) else WIDTH // 2
    return textwrap.fill(said, width, subsequent_indent=indent)


def _text_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The table, continued below with its first column repeated where it is wider than a line."""
    names = [_is_name(head, i) for i, head in enumerate(heads)]
    shown = [shortened(clean(head), 16) for head in heads]
    widths = [2 + max(cell_width(line[i]) for line in (shown, *lines)) for i in range(len(heads))]
    # Names can be shortened to this, numbers not at all.
    least = [min(14, size) if name else size for name, size in zip(names, widths, strict=True)]
    pieces: list[list[int]] = [[0]]
    for i in range(1, len(heads)):
        used = sum(least[j] for j in (*pieces[-1], i)) - 2
        if used > WIDTH and len(pieces[-1]) > 1:
            pieces.append([0])
        pieces[-1].append(i)
    laid = [
        aligned([shown[i] for i in piece], [[line[i] for i in piece] for line in lines], [not names[i] for i in piece])
        for piece in pieces
    ]
    return "\n\n".join(laid)


def _is_name(head: str, position: int) -> bool:
    return position == 0 or head in ("line", "term", "true", "said")


def _indented(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(_wrapped(f"{name}: {value}", "  ") for name, value in facts)


def _listed(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {_escaped(name)}: {_escaped(value)}" for name, value in facts)


def _hashed(title: str, level: int) -> str:
    return f"{'#' * level} {_escaped(title)}"


def _escaped(sentence: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", clean(sentence))


def _pipe_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if _is_name(head, i) else "---:" for i, head in enumerate(heads)]
    rows = [[_escaped(re.sub("^  ", "· ", cell)) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [[_escaped(h) for h in heads], rule, *rows])
