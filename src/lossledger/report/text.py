"""The report for a terminal, at most 80 columns wide, and as Markdown; and the sentences that every report shares."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence

from lossledger.ledger.table import DASH, aligned, cell_width, clean, shortened
from lossledger.report.charts import Curve
from lossledger.report.numbers import display
from lossledger.report.view import ClassTable, Comparison, ReportView, RunView, TermShare, Verdict

WIDTH = 80
MOST_CLASSES = 12

Layout = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


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
    return _document(view, heading=_underlined, paragraph=_wrapped, table=_text_table)


def as_markdown(view: ReportView) -> str:
    """The report as Markdown with pipe tables; names in it are escaped.

    Args:
        view: what to say.
    """
    return _document(view, heading=_hashed, paragraph=_escaped, table=_pipe_table)


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


def class_table_cells(table: ClassTable) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a class table, as every report shows them.

    Args:
        table: of one output.
    """
    linear = table.form == "linear"
    heads = ["class", *(["present"] if linear else []), "of the loss", "own mean"]
    heads += [*(["where present"] if linear else []), *table.metrics, *(["avg. weight"] if table.weighted else [])]
    lines = []
    for row in table.rows:
        line = [row.name, *([display(row.entries, "percent")] if linear else [])]
        line += [display(row.share, "percent"), display(row.mean)]
        line += [*([display(row.mean_present)] if linear else []), *(display(value) for value in row.metrics)]
        lines.append([*line, *([display(row.average_weight)] if table.weighted else [])])
    return heads, lines


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


def _document(
    view: ReportView, heading: Callable[[str, int], str], paragraph: Callable[[str], str], table: Layout
) -> str:
    parts = [heading(f"Loss report: {view.title}", 1)]
    names = [run.run for run in view.runs]
    if view.comparisons:
        parts.append(heading("Side by side", 2))
        parts += [paragraph(view.note)] if view.note else []
        for comparison in view.comparisons:
            parts += [heading(comparison.title, 3), table(*comparison_cells(comparison, names))]
    for run in view.runs:
        parts += [heading(run.run, 2)] if len(names) > 1 else []
        parts += [paragraph(sentence) for sentence in sentences(run.verdict)]
        parts += _run_tables(run, heading, table)
        if run.findings:
            parts += [heading("Checks", 3), *map(paragraph, run.findings)]
    return "\n\n".join(parts) + "\n"


def sentences(verdict: Verdict) -> list[str]:
    """The verdict in sentences: the loss, what it hides, what was not finite, whether the books balance.

    Args:
        verdict: of a run.
    """
    said = (headline(verdict), hidden_sentence(verdict), nonfinite_sentence(verdict), balance_sentence(verdict))
    return [sentence for sentence in said if sentence]


def _run_tables(run: RunView, heading: Callable[[str, int], str], table: Layout) -> list[str]:
    parts = [heading("Where the loss is", 3)]
    parts.append(table(["term", "contribution", "of the loss", "of the entries"], _share_lines(run.terms)))
    for classes in run.tables:
        of = f" of {classes.output}" if classes.output else ""
        parts += [heading(f"Classes{of}; own means of {classes.term}", 3), table(*class_table_cells(classes))]
    if run.curves:
        parts += [heading("Curves", 3), table(*curve_cells(run.curves))]
    return parts


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


def _share_lines(terms: Sequence[TermShare]) -> list[list[str]]:
    lines = []
    for term in terms:
        lines.append([term.term, display(term.contribution), display(term.share, "percent"), ""])
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


def _wrapped(sentence: str) -> str:
    return textwrap.fill(clean(sentence), WIDTH)


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
    return position == 0 or head == "line"


def _hashed(title: str, level: int) -> str:
    return f"{'#' * level} {_escaped(title)}"


def _escaped(sentence: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", clean(sentence))


def _pipe_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if _is_name(head, i) else "---:" for i, head in enumerate(heads)]
    rows = [[_escaped(re.sub("^  ", "· ", cell)) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [[_escaped(h) for h in heads], rule, *rows])
