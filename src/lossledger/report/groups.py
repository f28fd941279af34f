"""What a report says of groups that are no classes: slices such as a site, and places in an image or a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lossledger.errors import InputError
from lossledger.ledger import Ledger, Row, Slices
from lossledger.ledger.table import exact_sum
from lossledger.report.shares import CLASS_KINDS, quotient

PLACE = "position"
MOST_SLICES = 10
_NO_SLICES = (*CLASS_KINDS, "term", "sample", PLACE)


@dataclass(frozen=True, slots=True)
class SliceRow:
    """One group: its share of the entries and of the loss, its own mean, and how far that is from the mean of all."""

    group: str
    count: int
    entries: float | None
    share: float | None
    mean: float | None
    factor: float | None


@dataclass(frozen=True, slots=True)
class SliceTable:
    """The groups of a kind by one term, the highest own mean first."""

    kind: str
    term: str
    split: str
    rows: tuple[SliceRow, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where entries lie, and their mean loss: row and column of an image block, or a stretch of a sequence (row 0)."""

    row: int
    column: int
    mean: float


@dataclass(frozen=True, slots=True)
class PlaceMap:
    """The mean loss of a term by place: `image` says whether places have rows; places begin at the named entry."""

    term: str
    split: str
    image: bool
    places: tuple[Place, ...]


def slice_tables(final: Sequence[Row], loss: float) -> Iterator[SliceTable]:
    """The groups of every kind that is neither a class nor a place, by term.

    Args:
        final: rows of one split and epoch.
        loss: of that epoch.
    """
    for kind in dict.fromkeys(row.kind for row in final if row.kind not in _NO_SLICES):
        for term in dict.fromkeys(row.term for row in final if row.kind == kind):
            yield _slices([row for row in final if (row.kind, row.term) == (kind, term)], loss)


def _slices(own: Sequence[Row], loss: float) -> SliceTable:
    groups: dict[str, list[Row]] = {}
    for row in own:
        groups.setdefault(row.group, []).append(row)
    count, mean = sum(row.count for row in own), _mean(own)
    rows = []
    for name, part in groups.items():
        entries = sum(row.count for row in part)
        share = quotient(exact_sum(row.contribution for row in part), loss)
        at = _mean(part)
        factor = None if at is None or not mean else at / mean
        rows.append(SliceRow(name, entries, quotient(entries, count), share, at, factor))
    rows.sort(key=lambda row: -row.mean if row.mean is not None and math.isfinite(row.mean) else math.inf)
    return SliceTable(own[0].kind, own[0].term, own[0].split, tuple(rows))


def _mean(rows: Sequence[Row]) -> float | None:
    """The own mean of rows, a unit of weight."""
    return quotient(exact_sum(row.total for row in rows), exact_sum(row.weight for row in rows))


def worst_slices(ledger: Ledger, most: int = MOST_SLICES) -> Slices | None:
    """Groups of samples, and conjunctions of them, that are worse than the rest; None where no groups were kept.

    Args:
        ledger: of one run.
        most: slices to name.
    """
    if not len(ledger.samples):
        return None
    try:
        found = ledger.worst_slices(most)
    except InputError:
        # Samples without groups, or groups of another split.
        return None
    return found if found.tested else None


def place_maps(final: Sequence[Row]) -> Iterator[PlaceMap]:
    """The mean loss by place of every term that has rows of places, whose groups are "row,column" or "position".

    Args:
        final: rows of one split and epoch.
    """
    placed = [row for row in final if row.kind == PLACE]
    for term in dict.fromkeys(row.term for row in placed):
        own = [row for row in placed if row.term == term]
        found = [(place_of(row.group), _mean([row])) for row in own]
        places = tuple(Place(*at, mean) for at, mean in found if at and mean is not None and math.isfinite(mean))
        if len(places) > 1:
            yield PlaceMap(term, own[0].split, any("," in row.group for row in own), places)


def place_of(group: str) -> tuple[int, int] | None:
    """Row and column that a group of a place begins at; None where it is not named like one.

    >>> place_of("0,16"), place_of("7"), place_of("north")
    ((0, 16), (0, 7), None)
    """
    parts = group.split(",")
    if len(parts) > 2 or not all(part.isdecimal() and part.isascii() for part in parts):
        return None
    row, column = ("0", *parts)[-2:]
    return int(row), int(column)
