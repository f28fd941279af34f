"""An explanation for a terminal, at most 80 columns wide."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lossledger.report.numbers import display

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from lossledger.explain.explanation import Explanation, TermExplanation

WIDTH = 80
MOST_GROUPS = 12

_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def as_text(explanation: Explanation) -> str:
    """The explanation as plain text.

    Args:
        explanation: what to show.
    """
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=WIDTH, color_system=None, force_terminal=False).print(renderable(explanation))
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def renderable(explanation: Explanation) -> Group:
    """The explanation for `rich.print`.

    Args:
        explanation: what to show.
    """
    from rich.console import Group

    return Group(*_blocks(explanation))


def shape_text(shape: tuple[int, ...] | None) -> str:
    """A shape as people write it; nothing for one number, dots for a shape that only the loss knows.

    Args:
        shape: of a step.
    """
    return "…" if shape is None else str(shape) if shape else ""


def _blocks(explanation: Explanation) -> Iterator[RenderableType]:
    from rich.text import Text

    yield _plain(" ".join(explanation.sentences))
    yield Text()
    yield _plain(explanation.equation)
    if explanation.outputs:
        yield Text()
        rows = [(name, display(value, digits=4)) for name, value in explanation.outputs]
        yield _table(("output", "contribution"), rows)
    for term in explanation.terms:
        yield Text()
        yield from _term(term)
    if explanation.parts:
        yield Text()
        yield _plain("Parts of the window", "bold")
        parts = [
            (
                part.term,
                str(part.part),
                f"{part.samples:,}",
                display(part.divisor, "count"),
                display(part.share, "percent"),
                display(part.value, digits=6),
            )
            for part in explanation.parts
        ]
        yield _table(("term", "part", "samples", "divisor", "share", "own loss"), parts)
        mean = display(explanation.mean_of_parts, digits=6)
        yield _plain(f"Mean of the parts' losses {mean}, the loss {display(explanation.value, digits=6)}.")


def _term(term: TermExplanation) -> Iterator[RenderableType]:
    weight = "" if term.weight == 1 else f", × {term.weight:g} adds {display(term.contribution, digits=6)}"
    yield _plain(f"{term.name} = {display(term.value, digits=6)}{weight}", "bold")
    yield _plain(term.equation)
    if term.steps:
        rows = [
            (step.operation, shape_text(step.shape), "" if step.value is None else display(step.value, digits=6))
            for step in term.steps
        ]
        yield _table(("step", "shape", "value"), rows)
    if term.divisor is not None:
        yield _plain(f"Divisor: {term.divisor.name}: {term.divisor.source}.")
    if term.order:
        yield _plain(term.order)
    if term.groups:
        yield _table(("group", "adds", "share", "elements", "own mean"), group_rows(term, MOST_GROUPS))
        if len(term.groups) > MOST_GROUPS:
            yield _plain(f"{len(term.groups) - MOST_GROUPS} smaller groups are not shown.")
    if term.references:
        yield _table(("level", "value", "which predictions"), reference_rows(term))
    if term.skill is not None:
        yield _plain(f"Skill against the base rate: {display(term.skill)} (1: the loss is 0; 0: the base rate).")
    for text in term.consistency:
        yield _plain(text)


def group_rows(term: TermExplanation, most: int) -> list[tuple[str, ...]]:
    """The largest groups of a term as text.

    Args:
        term: of an explanation.
        most: how many.
    """
    return [
        (
            group.name,
            display(group.contribution),
            display(group.share, "percent"),
            display(group.count, "count"),
            display(group.mean),
        )
        for group in term.groups[:most]
    ]


def reference_rows(term: TermExplanation) -> list[tuple[str, ...]]:
    """The levels of a term as text.

    Args:
        term: of an explanation.
    """
    return [(level.name, display(level.value, digits=4), level.meaning) for level in term.references]


def _plain(text: str, style: str = "") -> RenderableType:
    from rich.text import Text

    # Names may come from data: no markup is read in them, and no control character reaches the terminal.
    return Text(_HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text), style=style)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    words = {"step", "shape", "group", "level", "which predictions", "term", "output"}
    for head in heads:
        table.add_column(head, justify="left" if head in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    return table
