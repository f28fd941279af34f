"""The spread of the elements of a pass: smallest, largest and Σ element² of each term and group, on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lossledger.batch import Batch
from lossledger.ledger import Row
from lossledger.losses import spread
from lossledger.objective import Objective
from lossledger.tally import GroupKey, Spread
from lossledger.training.named import Names

# Of term, kind (classes of all sorts are one), group and presence.
Found = dict[tuple[str, str, str, str], Spread]
_CLASSES = ("class", "column", "label")
_TERM: tuple[GroupKey, ...] = (("", ""),)


class _Sums:
    """Spreads by term and kind, `[3, R]` each: minimum, maximum, squares."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str], Tensor] = {}

    def add(self, key: tuple[str, str], rows: Tensor) -> None:
        known = self.of.get(key)
        if known is None:
            self.of[key] = rows
            return
        size = max(known.shape[1], rows.shape[1])
        a, b = Spread(*_padded(known, size)), Spread(*_padded(rows, size))
        self.of[key] = _packed(a + b)


class Spreading:
    """The spreads of one pass; nothing is read before the end of an interval.

    Args:
        objective: knows the terms.
        names: the groups of the data, if there may be any.
        every: steps of an interval whose spreads are kept by themselves, if any.
    """

    def __init__(self, objective: Objective, names: Names | None, every: int | None) -> None:
        self._objective, self._names, self._every = objective, names, every
        self._keys: dict[str, tuple[GroupKey, ...]] = {}
        self._step: list[tuple[tuple[str, str], Tensor]] = []
        self._whole, self._open = _Sums(), _Sums()
        self._closed: list[tuple[int, Found]] = []

    def collect(self, batch: Batch, outputs: Any) -> None:
        """Take a batch of the current step; it counts when the step is added."""
        objective = self._objective
        groups = batch.groups if isinstance(batch.groups, Mapping) else {}
        with torch.no_grad():
            aligned, _, _ = objective.align(batch.y, outputs, batch.sample_weight, batch.mask, checked=True)
            for plan, one in zip(objective.terms, aligned, strict=True):
                found = spread.unreduced(plan.loss, one)
                if found is None or not found[0].numel():
                    continue
                self._take(plan.name, "term", spread.whole(*found))
                classes = spread.by_class(plan.loss, one, *found)
                if classes is not None:
                    self._keys[plan.name] = classes[0]
                    self._take(plan.name, "class", classes[1])
                samples = spread.by_sample(*found) if groups else None
                for kind, index in groups.items():
                    assert samples is not None and self._names is not None
                    size = self._names.number(kind)
                    self._take(plan.name, kind, spread.scattered(samples, index.to(found[0].device), size))

    def _take(self, term: str, kind: str, found: Spread) -> None:
        self._step.append(((term, kind), _packed(found)))

    def add(self, step: int, bad: Tensor | None = None) -> None:
        """Add the step whose batches were collected, counted from 1; of one that was left out, nothing counts."""
        for key, rows in self._step:
            kept = rows if bad is None else torch.where(bad, _nothing(rows), rows)
            self._whole.add(key, kept)
            if self._every is not None:
                self._open.add(key, kept)
        self._step = []
        if self._every is not None and step % self._every == 0:
            self._closed.append((step, self._read(self._open)))
            self._open = _Sums()

    def read(self) -> Found:
        """The spreads of the whole pass, on the host."""
        return self._read(self._whole)

    def intervals(self, steps: int) -> list[tuple[int, Found]]:
        """The spreads of every interval by its last step, of which there are `steps` so far."""
        rest = [(steps, self._read(self._open))] if self._every is not None and steps % self._every else []
        return [*self._closed, *rest]

    def _read(self, sums: _Sums) -> Found:
        found: Found = {}
        for (term, kind), rows in sums.of.items():
            keys: tuple[GroupKey, ...] = _TERM
            if kind == "class":
                classes = len({group for group, _ in self._keys[term]})
                keys = tuple((self._objective.group_name(g, classes), side) for g, side in self._keys[term])
            elif kind != "term" and self._names is not None:
                keys = tuple((name, "") for name in self._names.of(kind))
            for (group, presence), row in zip(keys, rows.cpu().T.tolist(), strict=False):
                found[term, kind, str(group), presence] = Spread(*row)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The spreads so far."""
        closed = [
            (step, [(key, (s.minimum, s.maximum, s.squares)) for key, s in found.items()])
            for step, found in self._closed
        ]
        sums = {"whole": list(self._whole.of.items()), "open": list(self._open.of.items())}
        return {"keys": self._keys, "closed": closed, **sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` told."""
        self._keys = dict(state["keys"])
        self._closed = [(step, {key: Spread(*values) for key, values in found}) for step, found in state["closed"]]
        self._whole.of = {key: rows.to(device, copy=True) for key, rows in state["whole"]}
        self._open.of = {key: rows.to(device, copy=True) for key, rows in state["open"]}


def of_all_ranks(parts: Iterable[Found]) -> Found:
    """The spreads of all ranks."""
    found: Found = {}
    for part in parts:
        for key, one in part.items():
            found[key] = found[key] + one if key in found else one
    return found


def filled(rows: Iterable[Row], found: Found) -> list[Row]:
    """The rows, with the spread of each; a row that counts nothing has none."""
    return [_filled(row, found.get(_key(row))) for row in rows]


def _filled(row: Row, one: Spread | None) -> Row:
    if one is None or row.count == 0:
        return row
    return replace(row, minimum=one.minimum, maximum=one.maximum, squares=one.squares)


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.term, "class" if row.kind in _CLASSES else row.kind, row.group, row.presence


def _packed(one: Spread) -> Tensor:
    return torch.stack([part.double().reshape(-1) for part in (one.minimum, one.maximum, one.squares)])


def _padded(rows: Tensor, size: int) -> Tensor:
    if rows.shape[1] == size:
        return rows
    return torch.cat((rows, _nothing(rows.new_zeros(3, size - rows.shape[1]))), 1)


def _nothing(like: Tensor) -> Tensor:
    """The spread of no element, in the shape of another."""
    zero = Spread.zero()
    return torch.stack([torch.full_like(like[0], part) for part in (zero.minimum, zero.maximum, zero.squares)])
