"""How the terms of a pass divide over named groups: sums by group on the device, one `index_add_` a kind and term.

Each sample brings its share of numerator, total, count and weight to a term, for a ratio to each of its cells; what the
samples of a group bring adds up, over batches, windows and ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossledger.batch import Batch
from lossledger.errors import InputError
from lossledger.ledger import Row
from lossledger.losses.groups import AndSamples
from lossledger.objective import Objective
from lossledger.tally import Groups, Tally
from lossledger.training import posting
from lossledger.training.named import Names


@dataclass(frozen=True, slots=True, eq=False)
class GroupSums:
    """What the groups of one kind bring to one term, on the host.

    Args:
        kind: what the groups are.
        term: name of the term.
        names: of the groups.
        sums: `[4, groups, cells]`: numerator, total, count and weight; on a grid `[4 · parts, groups, cells]`.
        cells: whether each cell has a divisor of its own.
    """

    kind: str
    term: str
    names: tuple[str, ...]
    sums: NDArray[np.float64]
    cells: bool


# By kind and term.
Sums = dict[tuple[str, str], Tensor]


class Grouping:
    """The sums by group of one pass; nothing is read before its end.

    Args:
        objective: knows the terms.
        names: the groups of the data.
        by: takes what tallies have summed by sample, where they are made with it.
        keep: keep which sample is in which group too; then somebody else takes the sums out of `by`.
        every: steps of an interval whose sums are kept by themselves, if any; its end is a read.
    """

    def __init__(
        self,
        objective: Objective,
        names: Names,
        by: AndSamples | None = None,
        keep: bool = False,
        every: int | None = None,
    ) -> None:
        self._objective, self._names, self._by, self._keep = objective, names, by, keep
        self._every = every
        self._kept: dict[str, list[Tensor]] = {}
        self._kinds: tuple[str, ...] | None = None
        self._step: list[tuple[Mapping[str, Tensor], dict[str, Tensor]]] = []
        self._sums: Sums = {}
        self._open: Sums = {}
        self._closed: list[tuple[int, list[GroupSums]]] = []
        self._cells: dict[str, bool] = {}

    def collect(self, batch: Batch, outputs: Any) -> None:
        """Take a batch of the current step; it counts when the step is added.

        Raises:
            InputError: other kinds of groups than before, or a loss that cannot be divided by sample.
        """
        codes = batch.groups if isinstance(batch.groups, Mapping) else {}
        kinds = tuple(sorted(codes))
        if self._kinds is None:
            self._kinds = kinds
        if kinds != self._kinds:
            raise InputError(
                f"groups: expected the kinds {list(self._kinds)} in every batch, as in the first; received "
                f"{list(kinds)}. Give each batch the same kinds of groups."
            )
        if codes:
            self._step.append((codes, self._by_sample(batch, outputs)))

    def _by_sample(self, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """`[4, B, cells]` of each data term, part by part on a grid."""
        objective, parts = self._objective, dict[str, list[Groups | None]]()
        # What a step has summed by sample has the bits of its batch: a grid has none of it.
        taken = {} if self._by is None or objective.reproducible else self._by.taken
        with torch.no_grad():
            if any(plan.name not in taken for plan in objective.terms):
                aligned, _, _ = objective.align(batch.y, outputs, batch.sample_weight, batch.mask, checked=True)
                for plan, one in zip(objective.terms, aligned, strict=True):
                    if plan.name not in taken:
                        tally = objective.by_sample(plan, one)
                        if tally.grid is not None:
                            parts[plan.name] = [part.groups for part in tally.grid.parts]
                        elif tally.groups is not None:
                            taken[plan.name] = tally.groups, one
            parts |= {name: [groups] for name, (groups, _) in taken.items()}
            found = {plan.name: self._stacked(plan.name, parts[plan.name], batch.size) for plan in objective.terms}
        if self._by is not None and not self._keep:
            self._by.taken = {}
        return found

    def _stacked(self, term: str, parts: list[Groups | None], size: int) -> Tensor:
        sums: list[Tensor] = []
        for rows in parts:
            assert rows is not None
            self._cells[term] = rows.cell is not None
            sums += (rows.numerator, rows.total, rows.count, rows.weight)
        return torch.stack([column.double() for column in sums]).reshape(len(sums), size, -1)

    def add(self, step: int, bad: Tensor | None = None) -> None:
        """Add the step whose batches were collected, counted from 1; of one that was left out, nothing counts."""
        rooms = (self._sums,) if self._every is None else (self._sums, self._open)
        for codes, rows in self._step:
            for kind, index in codes.items() if self._keep else ():
                self._kept.setdefault(kind, []).append(index)
            for term, values in rows.items():
                kept = values if bad is None else torch.where(bad, torch.zeros_like(values), values)
                for kind, index in codes.items():
                    for sums in rooms:
                        self._room(sums, kind, term, kept).index_add_(1, index.to(kept.device), kept)
        self._step = []
        if self._every is not None and step % self._every == 0:
            self._closed.append((step, self._read(self._open)))
            self._open = {}

    def _room(self, sums: Sums, kind: str, term: str, like: Tensor) -> Tensor:
        """The sums of a kind, with room for every group that was met."""
        size, known = self._names.number(kind), sums.get((kind, term))
        if known is None or known.shape[1] < size:
            wide = like.new_zeros(like.shape[0], size, like.shape[2])
            if known is not None:
                wide[:, : known.shape[1]] = known
            sums[kind, term] = known = wide
        return known

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, and the names."""
        closed = [
            (step, [(one.kind, one.term, one.names, torch.from_numpy(one.sums), one.cells) for one in part])
            for step, part in self._closed
        ]
        return {
            "kinds": self._kinds,
            "cells": self._cells,
            "sums": list(self._sums.items()),
            "open": list(self._open.items()),
            "closed": closed,
            "names": self._names.state_dict(),
            "kept": {kind: torch.cat([part.cpu() for part in parts]) for kind, parts in self._kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` told."""
        self._kinds, self._cells = state["kinds"], dict(state["cells"])
        self._sums = {key: sums.to(device, copy=True) for key, sums in state["sums"]}
        # Earlier versions kept no sums of intervals.
        self._open = {key: sums.to(device, copy=True) for key, sums in state.get("open", ())}
        self._closed = [
            (
                step,
                [GroupSums(kind, term, tuple(names), sums.numpy(), cells) for kind, term, names, sums, cells in part],
            )
            for step, part in state.get("closed", ())
        ]
        self._names.load_state_dict(state["names"])
        self._kept = {kind: [index] for kind, index in state["kept"].items()}

    def kept(self) -> dict[str, list[str]]:
        """By kind, the group of each sample of this process, in the order in which they were taken."""
        found = {}
        for kind, parts in self._kept.items():
            names = np.array(self._names.of(kind), dtype=object)
            found[kind] = names[torch.cat([part.cpu() for part in parts]).numpy()].tolist()
        return found

    def read(self) -> list[GroupSums]:
        """The sums of this process, on the host."""
        return self._read(self._sums)

    def intervals(self, steps: int) -> list[tuple[int, list[GroupSums]]]:
        """The sums of every interval by its last step, of which there are `steps` so far."""
        rest = [(steps, self._read(self._open))] if self._every is not None and steps % self._every else []
        return [*self._closed, *rest]

    def _read(self, of: Sums) -> list[GroupSums]:
        found = []
        for (kind, term), sums in of.items():
            names = self._names.of(kind)[: sums.shape[1]]
            found.append(GroupSums(kind, term, names, sums.cpu().numpy(), self._cells[term]))
        return found


def of_all_ranks(parts: Iterable[list[GroupSums]]) -> list[GroupSums]:
    """The sums of all ranks, added up by the names of their groups."""
    found: dict[tuple[str, str], GroupSums] = {}
    for part in (one for rank in parts for one in rank):
        known = found.get((part.kind, part.term))
        found[part.kind, part.term] = part if known is None else _joined(known, part)
    return list(found.values())


def _joined(a: GroupSums, b: GroupSums) -> GroupSums:
    names = {name: place for place, name in enumerate(dict.fromkeys((*a.names, *b.names)))}
    sums = np.zeros((len(a.sums), len(names), a.sums.shape[2]))
    for part in (a, b):
        sums[:, [names[name] for name in part.names]] += part.sums
    return replace(a, names=tuple(names), sums=sums)


def rows(
    objective: Objective,
    tallies: Mapping[str, Tally],
    groups: Iterable[GroupSums],
    split: str,
    epoch: int,
    step: int | None = None,
) -> Iterator[Row]:
    """The ledger rows of named groups: what each brings to its terms.

    Args:
        objective: names the terms.
        tallies: of the whole pass, or interval: what divides.
        groups: the sums by group.
        split: for the rows.
        epoch: for the rows.
        step: for the rows.
    """
    for one in groups:
        cells = one.sums.shape[2]
        keys = tuple((name, f"cell {cell}" if one.cells else "") for name in one.names for cell in range(cells))
        # Parts of a grid, fine ones first.
        summed: NDArray[np.float64] = np.add.reduce(one.sums.reshape(-1, 4, len(keys))[::-1])
        numerator, total, count, weight = summed
        divided = Groups(
            one.kind, keys, numerator, total, count, weight, tuple(range(cells)) * len(one.names) if one.cells else None
        )
        tally = replace(tallies[one.term], groups=divided)
        found = [row for row in posting.rows(objective, {one.term: tally}, split, epoch, step) if row.kind != "term"]
        for _, parts in groupby(found, key=lambda row: row.group):
            yield _added(list(parts))


def _added(parts: list[Row]) -> Row:
    """One row for a group of which each cell of a ratio has a part."""
    if len(parts) == 1:
        return replace(parts[0], presence="")
    return replace(
        parts[0],
        presence="",
        total=sum(part.total for part in parts),
        count=sum(part.count for part in parts),
        weight=sum(part.weight for part in parts),
        divisor=sum(part.divisor for part in parts),
        contribution=sum(part.contribution for part in parts),
    )
