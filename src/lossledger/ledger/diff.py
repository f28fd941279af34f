"""Why two losses differ: group by group, the part where counts moved and the part where the loss of a group moved.

A group contributes share · mean: its own mean, and how much of the divisor it owns. Between two epochs or runs

    Δ(share · mean) = Δshare · (mean of both means) + Δmean · (mean of both shares)

holds exactly, so that the parts of all groups add up to the difference of the two losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from lossledger.errors import InputError
from lossledger.ledger.table import aligned, cell_width, exact_sum, significant

if TYPE_CHECKING:
    import pandas

    from lossledger.ledger.rows import Row

# What makes two numbers incomparable: the same arrays would give different losses.
RECIPE = ("recipe", "divisors", "class_weight", "regularizers")
# A mix below this part of the contributions is what the few operations in float64 leave.
ROUNDING = 1e-15
# Of a terminal.
WIDTH = 80


@dataclass(frozen=True, slots=True)
class DiffRow:
    """How one group of one term moved the loss.

    Args:
        term: name of the term.
        kind: what the group is, "class", "label", …; "term" for a term without groups.
        group: name of the group; "" for a term without groups.
        presence: "present", "absent" or "".
        before: contribution to the first loss.
        after: contribution to the second loss.
        difference: after − before; mix + rate.
        mix: the part that comes from how much of the divisor the group owns.
        rate: the part that comes from the group's own mean.
    """

    term: str
    kind: str
    group: str
    presence: str
    before: float
    after: float
    difference: float
    mix: float
    rate: float


@dataclass(frozen=True, slots=True)
class Diff:
    """The difference of two losses, by group; the differences of all rows add up to `difference`.

    Args:
        first: what was compared, in words.
        second: with what.
        before: the first loss.
        after: the second loss.
        rows: one a group of a term, in the order of the ledger.

    >>> row = DiffRow("mse", "class", "a", "", 0.5, 0.75, 0.25, 0.25, 0.0)
    >>> print(Diff("epoch 1", "epoch 2", 0.5, 0.75, (row,)))
    epoch 1: 0.5000 → epoch 2: 0.7500, difference 0.2500
    term   group  before   after  difference     mix  rate
    mse    a      0.5000  0.7500      0.2500  0.2500     0
    total         0.5000  0.7500      0.2500  0.2500     0
    """

    first: str
    second: str
    before: float
    after: float
    rows: tuple[DiffRow, ...]

    @property
    def difference(self) -> float:
        """The second loss minus the first."""
        return self.after - self.before

    @property
    def mix(self) -> float:
        """The part of the difference that comes from counts and shares."""
        return exact_sum(row.mix for row in self.rows)

    @property
    def rate(self) -> float:
        """The part of the difference that comes from the groups' own means."""
        return exact_sum(row.rate for row in self.rows)

    def __str__(self) -> str:
        numbers = ("before", "after", "difference", "mix", "rate")
        lines = [
            (row.term, f"{row.group} {row.presence}".strip(), *(getattr(row, n) for n in numbers)) for row in self.rows
        ]
        lines.append(("total", "", self.before, self.after, self.difference, self.mix, self.rate))
        cells = [[*line[:2], *(significant(float(value)) for value in line[2:])] for line in lines]
        before, after = f"{self.first}: {significant(self.before)}", f"→ {self.second}: {significant(self.after)}"
        tail = f"difference {significant(self.difference)}"
        head = f"{before} {after}, {tail}"
        # On lines of their own where one would be wider than a terminal.
        head = head if cell_width(head) <= WIDTH else f"{before}\n{after}\n{tail}"
        table = aligned(("term", "group", *numbers), cells, (False, False, True, True, True, True, True))
        return f"{head}\n{table}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        sums = {"difference": self.difference, "mix": self.mix, "rate": self.rate}
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], **sums}

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame; pandas must be installed."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows], columns=[f.name for f in fields(DiffRow)])


class Side(NamedTuple):
    """One side of a comparison: what it is called, its rows of one split and epoch, and how it was made."""

    name: str
    rows: tuple[Row, ...]
    info: Mapping[str, Any]


def difference(first: Side, second: Side, kind: str) -> Diff:
    """Compare two sides by groups of `kind`; terms without such groups are compared as a whole.

    Raises:
        InputError: the recipes differ, so that the numbers measure different things.
    """
    _refuse_other_recipe(first, second)
    before, after = (_cells(side.rows, kind) for side in (first, second))
    rows = tuple(_row(key, before.get(key), after.get(key)) for key in {**before, **after})
    return Diff(first.name, second.name, _loss(first.rows), _loss(second.rows), rows)


def _refuse_other_recipe(first: Side, second: Side) -> None:
    wrong = []
    for name in RECIPE:
        one, other = first.info.get(name) or {}, second.info.get(name) or {}
        if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
            # A ledger that was not made by `fit` may say it in words.
            wrong += [f"{name}: {one or 'none'} against {other or 'none'}"] if one != other else []
            continue
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                wrong.append(f"{name} of {key!r}: {one.get(key, 'none')} against {other.get(key, 'none')}")
    terms = [{row.term: row.coefficient for row in side.rows if row.kind == "term"} for side in (first, second)]
    if not wrong and terms[0] != terms[1]:
        wrong.append(f"terms and their weights: {terms[0]} against {terms[1]}")
    if wrong:
        raise InputError(
            f"diff: {first.name} and {second.name} measure different things, so the difference of their losses means "
            f"nothing; expected the same recipe, received {'; '.join(wrong)}. Evaluate both models with one objective, "
            "or compare a metric."
        )


Key = tuple[str, str, str, str]


def _cells(rows: tuple[Row, ...], kind: str) -> dict[Key, Row]:
    grouped = {row.term for row in rows if row.kind == kind}
    wanted = [row for row in rows if row.kind == (kind if row.term in grouped else "term")]
    return {(row.term, row.kind, row.group, row.presence): row for row in wanted}


def _row(key: Key, before: Row | None, after: Row | None) -> DiffRow:
    first, second = (0.0 if row is None else row.contribution for row in (before, after))
    mix, rate = _parts(first, second, _mean(before), _mean(after))
    return DiffRow(*key, before=first, after=second, difference=second - first, mix=mix, rate=rate)


def _mean(row: Row | None) -> float | None:
    """The group's own mean; `None` where nothing was counted."""
    if row is None:
        return None
    size = row.weight if row.form == "ratio" else row.count
    return row.total / size if size else None


def _parts(first: float, second: float, mean: float | None, other: float | None) -> tuple[float, float]:
    """Mix and rate of a group, from its two contributions and its two means."""
    moved = second - first
    if not math.isfinite(moved):
        return math.nan, math.nan
    if mean is None or other is None:
        # Counted on one side only: there is no second mean to compare with.
        return moved, 0.0
    if mean == 0 or other == 0:
        # Without a loss on one side its share cannot be seen in the contribution: it is taken as unchanged.
        return 0.0, moved
    # Shares follow from contributions, so that every reduction and coefficient is covered.
    rate = (other - mean) * (first / mean + second / other) / 2
    if abs(moved - rate) <= ROUNDING * (abs(first) + abs(second)):
        return 0.0, moved
    return moved - rate, rate


def _loss(rows: tuple[Row, ...]) -> float:
    loss = 0.0
    for row in rows:
        if row.kind == "term":
            loss += row.contribution
    return loss
