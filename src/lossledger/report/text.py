"""The report for a terminal, at most 80 columns wide, and as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lossledger.ledger.table import aligned, cell_width, clean, shortened
from lossledger.report import cells, sentences
from lossledger.report.view import ReportView, RunView

WIDTH = 80


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


def _document(view: ReportView, form: _Form) -> str:
    parts = [form.heading(f"Loss report: {view.title}", 1)]
    names = [run.run for run in view.runs]
    parts += [form.paragraph(view.left_out)] if view.waiting else []
    if view.comparisons:
        parts.append(form.heading("Side by side", 2))
        parts += [form.paragraph(view.note)] if view.note else []
        for comparison in view.comparisons:
            parts += [form.heading(comparison.title, 3), form.table(*cells.comparison_cells(comparison, names))]
    for run in view.runs:
        parts += [form.heading(run.run, 2)] if len(names) > 1 else []
        parts += [form.paragraph(sentence) for sentence in sentences.verdict_sentences(run.verdict)]
        parts += _run_parts(run, form)
    return "\n\n".join(parts) + "\n"


def _run_parts(run: RunView, form: _Form) -> Iterator[str]:
    yield from (form.heading("Where the loss is", 3), form.table(*cells.share_cells(run.outputs)))
    if run.curves:
        yield from (form.heading("Curves", 3), form.table(*cells.curve_cells(run.curves)))
    for classes in run.tables:
        of = f" of {classes.output}" if classes.output else ""
        yield form.heading(f"Classes{of}; own means of {classes.term}", 3)
        shown = cells.foremost(classes, cells.MOST_ROWS, run.verdict.hidden.row if run.verdict.hidden else None)
        yield form.table(*cells.class_table_cells(shown))
        if left := len(classes.rows) - len(shown.rows):
            yield form.paragraph(f"{left:,} more are in the ledger; of all classes, these add most to the loss.")
    for worst in run.samples:
        yield form.heading(f"Worst samples, {worst.split}, epoch {worst.epoch}", 3)
        yield form.table(*cells.sample_cells(worst))
    if run.cartography is not None:
        yield form.heading("How sure the model was of the samples", 3)
        yield form.paragraph(sentences.cartography_sentence(run.cartography))
    for slices in run.slices:
        yield form.heading(f"By {slices.kind}: {slices.term}, {slices.split}", 3)
        yield form.table(*cells.slice_cells(slices))
    if run.worst is not None:
        yield form.heading("Worst slices", 3)
        yield form.paragraph(sentences.worst_sentence(run.worst))
        yield form.table(*cells.worst_cells(run.worst))
    for places in run.maps:
        yield form.heading(f"By place: {places.term}, {places.split}", 3)
        yield form.paragraph(sentences.place_sentence(places))
    if run.against is not None:
        yield form.heading(f"Difference from {run.against.other}", 3)
        yield form.paragraph(sentences.against_sentence(run.against))
        if run.against.diff is not None:
            yield form.table(*cells.against_cells(run.against.diff))
    if run.gap is not None:
        yield from (form.heading("Training and validation", 3), form.paragraph(sentences.gap_sentence(run.gap)))
        yield form.table(*cells.gap_cells(run.gap))
    if run.provenance:
        yield from (form.heading("Provenance", 3), form.facts(run.provenance))
    if run.findings:
        yield form.heading("Checks", 3)
        yield from (form.paragraph(sentences.finding_sentence(finding)) for finding in run.findings)


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
