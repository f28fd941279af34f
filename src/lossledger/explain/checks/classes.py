"""CLS: classes that own the loss, hide in it, or never occur."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from lossledger.explain.checks.case import Case
from lossledger.explain.checks.finding import Finding
from lossledger.objective import Objective
from lossledger.tally import Tally

# A class is rare below this share of the entries, and needs so many of them before its mean says anything.
RARE, VERY_RARE, SUPPORT = 0.05, 0.01, 5
OWNS, TIMES = 0.5, 10.0
# Entries a class that must be there before one without any is no accident.
EXPECTED = 20


@dataclass(frozen=True, slots=True)
class ClassRow:
    """A group of a tally by class, in plain numbers."""

    name: str
    presence: str
    count: float
    weight: float
    total: float
    share: float

    @property
    def mean(self) -> float:
        """Its own mean."""
        return self.total / self.count if self.count else 0.0


def rows_of(tally: Tally, objective: Objective) -> list[ClassRow]:
    """The groups by class of a linear tally, if it has any."""
    groups = tally.groups
    if groups is None or groups.kind not in ("class", "label") or tally.form == "ratio" or groups.keys is None:
        return []
    classes = len({key for key, _ in groups.keys})
    value = float(tally.value)
    # Lists are read at once; number by number, thousands of classes would take longer than a step.
    shares = torch.as_tensor(tally.contributions()).double().tolist()
    count = torch.as_tensor(groups.count).double().tolist()
    weight = torch.as_tensor(groups.weight).double().tolist()
    total = torch.as_tensor(groups.total).double().tolist()
    return [
        ClassRow(objective.group_name(key, classes), presence, n, w, t, share / value if value else 0.0)
        for (key, presence), n, w, t, share in zip(groups.keys, count, weight, total, shares, strict=True)
    ]


def owning(rows: Sequence[ClassRow]) -> list[ClassRow]:
    """Rows of few entries and most of the loss, without a weight that says so."""
    return [
        row
        for row in rows
        if row.count >= SUPPORT
        and not _favoured(row)
        and _rarity(row, rows) < RARE
        and isfinite(row.share)
        and row.share > OWNS
    ]


def hiding(rows: Sequence[ClassRow]) -> list[ClassRow]:
    """Rows so rare that the mean of all cannot show how bad their own is; the worst first."""
    mean = _mean(rows)
    if not isfinite(mean) or mean <= 0:
        return []
    found = [
        row
        for row in rows
        if row.count >= SUPPORT
        and not _favoured(row)
        and row.share <= OWNS
        and _rarity(row, rows) < VERY_RARE
        and row.mean > TIMES * mean
    ]
    return sorted(found, key=lambda row: -row.mean)


def owns(name: str, rows: Sequence[ClassRow], found: Sequence[ClassRow]) -> Iterator[Finding]:
    """CLS1, of the rows found."""
    for row in found:
        rarity = _rarity(row, rows)
        yield Finding(
            "CLS1",
            "warning",
            f"{name}: {_group(row)} is {rarity:.2%} of the entries ({row.count:,.0f}) and {row.share:.1%} of the loss; "
            f"its own mean is {row.mean:.4g}.",
            "Look at its samples first: wrong labels cost most. If they are right, the class needs more data.",
            {"term": name, "class": row.name, "entries": rarity, "loss": row.share, "mean": row.mean},
        )


def hidden(name: str, rows: Sequence[ClassRow], found: Sequence[ClassRow]) -> Iterator[Finding]:
    """CLS2, of the rows found: the worst, and the names of the others."""
    if not found:
        return
    row, mean = found[0], _mean(rows)
    rarity = _rarity(row, rows)
    others = f" So do {', '.join(other.name for other in found[1:6])}." if len(found) > 1 else ""
    yield Finding(
        "CLS2",
        "warning",
        f"{name}: {_group(row)} is {rarity:.2%} of the entries ({row.count:,.0f}) and hides in the mean: its own is "
        f"{row.mean:.4g}, {row.mean / mean:.3g} times the {mean:.4g} of all.{others}",
        "Watch it by itself in the ledger; class_weight or an overlap loss such as Dice gives it a say.",
        {"term": name, "classes": [r.name for r in found], "entries": rarity, "mean": row.mean, "all": mean},
    )


def _favoured(row: ClassRow) -> bool:
    """Whether a weight above 1 already gives the class more of a say."""
    return row.weight > 1.01 * row.count


def _mean(rows: Sequence[ClassRow]) -> float:
    entries = sum(row.count for row in rows)
    return sum(row.total for row in rows) / entries if entries else 0.0


def _rarity(row: ClassRow, rows: Sequence[ClassRow]) -> float:
    """Share of the entries; where each class has a column of its own, of the entries of that column."""
    whole = sum(other.count for other in rows if not row.presence or other.name == row.name)
    return row.count / whole if whole else 0.0


def absent(name: str, rows: Sequence[ClassRow], samples: int | None, ignored: object = None) -> Iterator[Finding]:
    """CLS3: classes of the output that no target has.

    Args:
        name: of the term.
        rows: by class.
        samples: of the batch, where pixels or steps of few samples are no evidence; `None` for a whole epoch.
        ignored: the label that is left out on purpose.
    """
    split = any(row.presence for row in rows)
    present = [row for row in rows if not split or row.presence == "present"]
    entries = sum(row.count for row in rows) / (len(present) if split and present else 1)
    enough = EXPECTED * len(present)
    if len(present) < 2 or entries < enough or (samples is not None and samples < enough):
        return
    missing = [row.name for row in present if row.count == 0 and row.name != str(ignored)]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        yield Finding(
            "CLS3",
            "warning",
            f"{name}: {len(missing)} of {len(present)} classes never occur in {entries:,.0f} entries: {shown}.",
            "Check how labels are numbered, and how the data was split; the model can only learn never to say them.",
            {"term": name, "classes": missing, "entries": entries},
        )


def _group(row: ClassRow) -> str:
    return f"class {row.name}" + (f" where {row.presence}" if row.presence else "")


def owning_class(case: Case) -> Iterator[Finding]:
    """CLS1 on arrays."""
    for term in case.understood:
        assert term.tally is not None
        rows = rows_of(term.tally, case.objective)
        yield from owns(term.name, rows, owning(rows))


def hidden_class(case: Case) -> Iterator[Finding]:
    """CLS2 on arrays."""
    for term in case.understood:
        assert term.tally is not None
        rows = rows_of(term.tally, case.objective)
        yield from hidden(term.name, rows, hiding(rows))


def absent_class(case: Case) -> Iterator[Finding]:
    """CLS3 on arrays."""
    for term in case.understood:
        assert term.tally is not None
        rows = rows_of(term.tally, case.objective)
        yield from absent(term.name, rows, term.samples, getattr(term.loss, "ignore_class", None))
