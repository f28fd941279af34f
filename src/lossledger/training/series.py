"""The rows of an epoch as named series, for programs that draw curves."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeVar

from lossledger.ledger import Ledger, MetricRow, Row
from lossledger.ledger.table import mean_of

# Programs that draw curves take names of letters, digits, and these; longer names are refused by some.
_OTHER = re.compile(r"[^\w\-. ]")
LONGEST_NAME = 200

R = TypeVar("R", Row, MetricRow)


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a series.

    Args:
        split: "training", "validation" or "test".
        step: of a row of steps; None for an epoch.
        name: of the series: what is measured, the term, and the group if there is one.
        value: a number, which may be NaN or infinite.
    """

    split: str
    step: int | None
    name: tuple[str, ...]
    value: float


def epoch_rows(ledger: Ledger | None, epoch: int) -> tuple[list[Row], list[MetricRow]]:
    """The rows and metrics of the epoch that was posted last, counted from 1; none of another epoch."""
    assert ledger is not None, "the model trains"
    return _tail(ledger.rows, epoch), _tail(ledger.metrics, epoch)


def _tail(rows: Sequence[R], epoch: int) -> list[R]:
    return list(takewhile(lambda row: row.epoch == epoch, reversed(rows)))[::-1]


@dataclass(eq=False)
class Series:
    """Turns rows into points.

    Args:
        most_groups: a kind of groups with more of them is left out, with a warning; so are samples, without one.

    Example:
        >>> names = dict(split="training", epoch=1, step=None, term="mse", role="data", form="linear", kind="term")
        >>> sums = dict(total=2.0, count=4, weight=4.0, coefficient=0.5, divisor=4.0, contribution=0.25, nonfinite=0)
        >>> for point in Series().points([Row(**names, group="", presence="", **sums, masked=1)], []):
        ...     print("/".join(point.name), point.value)
        contribution/mse 0.25
        count/mse 4.0
        masked/mse 1.0
        mean/mse 0.5
        nonfinite/mse 0.0
    """

    most_groups: int = 100
    _warned: set[tuple[str, str]] = field(default_factory=set)

    def points(self, rows: Sequence[Row], metrics: Sequence[MetricRow]) -> Iterator[Point]:
        """The points of rows and of metrics by group.

        Of a term: contribution, count, masked where it is known, mean (total / count; for a ratio total / weight) and
        nonfinite; of a group contribution, count and mean. Rows of steps begin with the loss of their steps. A metric
        that is undefined for a group has no point.
        """
        left_out = self._many(rows)
        losses: dict[tuple[str, int], float] = {}
        for row in rows:
            if row.step is not None and row.kind == "term":
                # Not sum(): the loss is added from left to right, as the one that was optimized.
                losses[row.split, row.step] = losses.get((row.split, row.step), 0.0) + row.contribution
        for (split, step), loss in losses.items():
            yield Point(split, step, ("loss",), loss)
        for row in rows:
            if row.kind != "sample" and (row.term, row.kind) not in left_out:
                yield from _of_row(row)
        groups = {metric.group for metric in metrics if metric.group}
        if len(groups) <= self.most_groups:
            for metric in metrics:
                if metric.group and not math.isnan(metric.value):
                    yield Point(metric.split, None, ("metric", metric.metric, metric.group), metric.value)

    def _many(self, rows: Sequence[Row]) -> set[tuple[str, str]]:
        found: dict[tuple[str, str], set[str]] = {}
        for row in rows:
            if row.kind not in ("term", "sample"):
                found.setdefault((row.term, row.kind), set()).add(row.group)
        many = {key for key, groups in found.items() if len(groups) > self.most_groups}
        for term, kind in sorted(many - self._warned):
            warnings.warn(
                f"{len(found[term, kind])} groups of the kind {kind!r} of {term!r} are not written as series: expected "
                f"at most most_groups={self.most_groups}. They are in the ledger; a larger most_groups writes them.",
                UserWarning,
                stacklevel=2,
            )
        self._warned |= many
        return many


def _of_row(row: Row) -> Iterator[Point]:
    owner = (row.term,) if row.kind == "term" else (row.term, row.kind, row.group)
    if row.presence:
        owner = (*owner, row.presence)
    found = {"contribution": row.contribution, "count": float(row.count)}
    if row.masked is not None:
        found["masked"] = float(row.masked)
    mean = mean_of(row.total, row.count, row.weight, row.form == "ratio")
    if mean is not None:
        found["mean"] = mean
    if row.kind == "term":
        found["nonfinite"] = float(row.nonfinite)
    for what, value in found.items():
        yield Point(row.split, row.step, (what, *owner), value)


class Names:
    """Names of series that every program takes; two series never share one.

    Example:
        >>> names = Names()
        >>> names.of("mean", "mask/dice", "class", "cat & dog"), names.of("mean", "mask/dice", "class", "cat | dog")
        ('mean/mask/dice/class/cat _ dog', 'mean/mask/dice/class/cat _ dog-2')
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], str] = {}
        self._taken: set[str] = set()

    def of(self, *parts: str) -> str:
        """The name of the series of these parts; a term keeps its slashes, a group does not."""
        if parts not in self._known:
            self._known[parts] = self._new(parts)
        return self._known[parts]

    def _new(self, parts: tuple[str, ...]) -> str:
        # The name of a term or a metric stands second.
        pieces = [piece for i, part in enumerate(parts) for piece in (part.split("/") if i == 1 else [part])]
        name = "/".join(map(_clean, pieces))
        if len(name) > LONGEST_NAME:
            name = f"{name[: LONGEST_NAME - 17]}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:16]}"
        found, number = name, 1
        # Some programs make files of names, which some systems do not tell apart by case.
        while found.casefold() in self._taken:
            number += 1
            found = f"{name}-{number}"
        self._taken.add(found.casefold())
        return found


def _clean(piece: str) -> str:
    found = _OTHER.sub("_", piece).strip()
    return found if found.strip(".") else "_" * max(len(found), 1)
