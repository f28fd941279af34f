"""Where the numbers of a run come from: what it was made of, and what was counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossledger.ledger import Row
from lossledger.report.numbers import display
from lossledger.report.shares import Reach, reach

# Said in sections of their own, or in words of their own below.
_ELSEWHERE = ("findings", "recipe", "divisors", "regularizers", "class_names", "gaps")


def provenance(info: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Names and values: recipe and divisor of every term, settings, seed, versions, ranks, and what was counted.

    Args:
        info: of the run file.
        rows: of its epochs.

    >>> list(provenance({"recipe": {"mse": {"loss": "MeanSquaredError()", "weight": 0.5}}, "seed": 7}, ()))
    [('recipe of mse', '0.5 × MeanSquaredError()'), ('seed', '7')]
    """
    yield from _recipe(info)
    yield from _flat({key: value for key, value in info.items() if key not in _ELSEWHERE})
    yield from ((f"entries of {found.term}, {found.split}", _said(found)) for found in counted(rows))


def _recipe(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The loss of every term with its weight, what divides it, and the regularizers."""
    terms = info.get("recipe")
    for name, made in terms.items() if isinstance(terms, Mapping) else ():
        if isinstance(made, Mapping) and {"loss", "weight"} <= made.keys():
            weight = "" if made["weight"] == 1 else f"{made['weight']} × "
            yield f"recipe of {name}", f"{weight}{made['loss']}"
        else:
            yield f"recipe of {name}", str(made)
    if terms and not isinstance(terms, Mapping):
        yield "recipe", str(terms)
    for key, title in (("divisors", "divisor"), ("regularizers", "regularizer")):
        found = info.get(key)
        if isinstance(found, Mapping):
            yield from (
                (f"{title} of {name}" if key == "divisors" else f"{title} {name}", str(v)) for name, v in found.items()
            )
        elif found:
            yield title, str(found)
    names = info.get("class_names")
    if names:
        yield from _flat({"class names": names})


@dataclass(frozen=True, slots=True)
class Counted:
    """What the last epoch of a split counted of a term; `masked` is None where an older ledger does not know it."""

    term: str
    split: str
    epoch: int
    count: int
    masked: int | None
    nonfinite: int
    divisor: float
    reach: Reach


def counted(rows: Sequence[Row]) -> Iterator[Counted]:
    """What the last epoch of each split counted, term by term.

    Args:
        rows: of epochs.
    """
    whole = [row for row in rows if row.kind == "term" and row.role == "data"]
    for split in dict.fromkeys(row.split for row in whole):
        last = max(row.epoch for row in whole if row.split == split)
        for row in whole:
            if (row.split, row.epoch) == (split, last):
                sums = (row.count, row.masked, row.nonfinite, row.divisor)
                yield Counted(row.term, split, last, *sums, reach([row]))


def _said(found: Counted) -> str:
    """Counts in words; what an older ledger does not know is said to be unknown."""
    masked = "" if found.masked is None else f", {_masked(found.masked, found.count)}"
    finite = "all finite" if not found.nonfinite else f"{display(found.nonfinite, 'count')} of them not finite"
    said = (
        f"{display(found.count, 'count')} not masked{masked}, {finite}; divided by {display(found.divisor, digits=6)}"
    )
    if found.reach.maximum is not None:
        ends = f"from {display(found.reach.minimum)} to {display(found.reach.maximum)}"
        said += f"; elements {ends}, root mean square {display(found.reach.root_mean_square)}"
    return said if found.masked is not None else f"{said}; how many were masked is not known"


def _masked(masked: int, count: int) -> str:
    if not masked:
        return "none masked"
    return f"{display(masked, 'count')} masked ({display(masked / (masked + count), 'percent')} of all)"


def _flat(info: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in info.items():
        name = f"{prefix}{key}".replace("_", " ") if not prefix else f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        else:
            items = value if isinstance(value, list | tuple) else [value]
            yield name, ", ".join(str(item) for item in items)
