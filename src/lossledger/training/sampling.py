"""The sample ledger of a pass: the loss of every sample by term, from the outputs that the pass has made anyway.

What a batch tells stays on the device as a few numbers a sample; log points bring it to the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lossledger.batch import Batch
from lossledger.distributed import Group
from lossledger.errors import InputError, InputTypeError
from lossledger.ledger.columns import Columns
from lossledger.ledger.samples import sample_columns, stacked
from lossledger.losses.groups import AndSamples
from lossledger.losses.loss import Loss
from lossledger.losses.ratio import Overlap
from lossledger.objective import Objective
from lossledger.tally import Groups, Tally
from lossledger.training.data import Data, IterableData
from lossledger.training.dynamics import look, measures
from lossledger.weighting import as_tensor

_SUMS = ("numerator", "total", "count", "weight")


@dataclass(frozen=True, slots=True)
class Numbering:
    """How the samples of a pass are numbered where batches carry no ids.

    Args:
        start: index of the first sample of arrays in the data that the user gave.
        unknown: why the position of a sample does not say which it is; empty where it does.
    """

    start: int = 0
    unknown: str = ""


def numbering(data: Data, group: Group, start: int = 0, again: bool = True) -> Numbering:
    """How samples are numbered.

    Args:
        data: of the pass.
        group: the ranks that share it.
        start: index of the first sample of arrays.
        again: whether later passes go over the same data.
    """
    if not isinstance(data, IterableData):
        return Numbering(start)
    source, reason = data.source, ""
    if group.size > 1:
        reason = "each rank has a loader of its own"
    elif again and isinstance(source, Iterator):
        reason = f"a {type(source).__name__} goes on from epoch to epoch"
    elif data.has_state or (isinstance(source, DataLoader) and not _sequential(source)):
        reason = f"the {type(source).__name__} has an order of its own"
    return Numbering(0, reason)


def _sequential(loader: DataLoader[Any]) -> bool:
    if isinstance(loader.dataset, IterableDataset):
        return True
    batches = loader.batch_sampler
    return isinstance(loader.sampler, SequentialSampler) and (batches is None or type(batches) is BatchSampler)


def check_samples(samples: Any) -> bool:
    """The argument `samples`.

    Raises:
        InputTypeError: no truth value.
    """
    if not isinstance(samples, bool):
        raise InputTypeError(f"samples: expected True or False, received {samples!r}.")
    return samples


class Sampling:
    """The samples of one pass; nothing is read before a log point.

    Tallies that are made with `by` leave here what they have summed by sample.

    Args:
        objective: names the terms.
        numbers: how samples are numbered.
    """

    def __init__(self, objective: Objective, numbers: Numbering = Numbering()) -> None:
        self._objective, self._numbers = objective, numbers
        self.by = AndSamples("class")
        self._next = numbers.start
        self._measured = _measured(objective)
        self.by.look = functools.partial(look, self._measured)
        self._step: list[tuple[Tensor, dict[str, dict[str, Tensor]]]] = []
        self._waiting: list[tuple[Tensor, dict[str, dict[str, Tensor]], Tensor | None]] = []
        self._ids: list[NDArray[np.int64]] = []
        self._fields: dict[str, dict[str, list[NDArray[Any]]]] = {}
        self._cells: dict[str, int] = {}

    def collect(self, batch: Batch, outputs: Any) -> None:
        """Take a batch of the current step; it counts when the step is added.

        Raises:
            InputError: a loss that cannot be divided by sample, or samples that nobody can tell apart.
        """
        objective = self._objective
        taken, self.by.taken = self.by.taken, {}
        seen, self.by.seen = self.by.seen, {}
        if objective.reproducible:
            # What a step has summed by sample has the bits of its batch.
            taken, seen = {}, {}
        with torch.no_grad():
            if any(plan.name not in taken for plan in objective.terms):
                aligned, _, _ = objective.align(batch.y, outputs, batch.sample_weight, batch.mask, checked=True)
                for plan, one in zip(objective.terms, aligned, strict=True):
                    groups = None if plan.name in taken else objective.by_sample(plan, one).groups
                    if groups is not None:
                        taken[plan.name] = groups, one
            size = next(iter(taken.values()))[1].given.prediction.raw.shape[0]
            ids = self._ids_of(batch, size)
            found: dict[str, dict[str, Tensor]] = {}
            for plan in objective.terms:
                groups, one = taken[plan.name]
                cells = len(groups) // size
                self._cells[plan.name] = cells if groups.cell is not None else 0
                rows = {name: getattr(groups, name).reshape(size, cells) for name in _SUMS}
                if plan.name in self._measured:
                    rows |= measures(plan.loss, one, seen.get(plan.name))
                found[plan.name] = rows
        self._step.append((ids, found))

    def _ids_of(self, batch: Batch, size: int) -> Tensor:
        start = self._next
        self._next += size
        if batch.ids is None:
            if self._numbers.unknown:
                raise InputError(
                    f"samples=True: {self._numbers.unknown}, so the position of a sample does not say which it is; "
                    "expected batches with ids. Yield lossledger.Batch(x, y, ids=…)."
                )
            return torch.arange(start, start + size)
        ids = as_tensor(batch.ids, "ids")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputTypeError(f"ids: expected whole numbers, one a sample; received dtype {ids.dtype}.")
        if tuple(ids.shape) != (size,):
            raise InputError(f"ids: expected one a sample, ({size},); received shape {tuple(ids.shape)}.")
        return ids + self._numbers.start if self._numbers.start else ids

    def add(self, bad: Tensor | None = None) -> None:
        """Add the step whose batches were collected; of one that was left out, as `bad` says, nothing counts."""
        self._waiting += [(ids, found, bad) for ids, found in self._step]
        self._step = []

    def flush(self) -> None:
        """Bring what was added to the host."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._ids.append(_on_host([ids for ids, _, _ in waiting]).astype(np.int64))
        left_out = _left_out(waiting)
        for term, fields in waiting[0][1].items():
            known = self._fields.setdefault(term, {})
            for name in fields:
                values = _on_host([found[term][name] for _, found, _ in waiting])
                if left_out is not None and name in _SUMS:
                    values[left_out] = 0
                known.setdefault(name, []).append(values)

    def state_dict(self) -> dict[str, Any]:
        """The samples so far, and the number of the next."""
        self.flush()
        fields = {t: {n: torch.from_numpy(_joined(v)) for n, v in f.items()} for t, f in self._fields.items()}
        ids = torch.from_numpy(_joined(self._ids)) if self._ids else torch.zeros(0, dtype=torch.int64)
        return {"next": self._next, "ids": ids, "fields": fields, "cells": self._cells}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` told."""
        self._next, self._cells = state["next"], dict(state["cells"])
        self._ids = [state["ids"].numpy()] if len(state["ids"]) else []
        self._fields = {t: {n: [v.numpy()] for n, v in f.items()} for t, f in state["fields"].items()}

    @property
    def ids(self) -> NDArray[np.int64]:
        """The number of each sample, in the order in which they were taken."""
        self.flush()
        return _joined(self._ids) if self._ids else np.zeros(0, np.int64)

    def columns(self, tallies: Mapping[str, Tally], split: str, epoch: int) -> Columns:
        """The rows of the pass for the ledger.

        Args:
            tallies: of the whole pass, over all ranks: what divides.
            split: for the rows.
            epoch: for the rows.
        """
        self.flush()
        parts = []
        for term, fields in self._fields.items():
            ids = _joined(self._ids)
            order = np.argsort(ids, kind="stable")
            values = {name: _joined(found)[order] for name, found in fields.items()}
            values["sample"] = ids[order]
            parts.append(sample_columns(term, split, epoch, self._numbers_of(term, tallies[term], values)))
        return stacked(parts)

    def _numbers_of(self, term: str, tally: Tally, values: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        sums = {name: values[name].reshape(-1) for name in _SUMS}
        size, cells = values["numerator"].shape
        cell = tuple(range(cells)) * size if self._cells[term] else None
        coefficient = self._objective.coefficient(term)
        shares = replace(tally, groups=Groups("sample", None, **sums, cell=cell)).contributions()
        total, count, weight = (
            values[name].astype(float if name != "count" else np.int64).sum(1) for name in ("total", "count", "weight")
        )
        divisor = weight if tally.form == "ratio" else count
        mean = np.divide(total, divisor, out=np.zeros(size), where=divisor != 0)
        found = {name: array for name, array in values.items() if name not in _SUMS}
        return found | {
            "coefficient": np.full(size, coefficient),
            "total": total,
            "count": count,
            "weight": weight,
            "mean": mean,
            "contribution": coefficient * np.asarray(shares, dtype=float).reshape(size, -1).sum(1),
        }


def _on_host(parts: list[Tensor]) -> NDArray[Any]:
    """All parts in one transfer."""
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    array: NDArray[Any] = torch.cat(parts).detach().cpu().numpy()
    return array


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _left_out(waiting: list[tuple[Tensor, Any, Tensor | None]]) -> NDArray[np.bool_] | None:
    """[N] Which samples belong to a step that was left out."""
    if all(bad is None for _, _, bad in waiting):
        return None
    flags = [torch.zeros(()) if bad is None else bad.reshape(()).float() for _, _, bad in waiting]
    sizes = [len(ids) for ids, _, _ in waiting]
    found: NDArray[np.bool_] = np.repeat(_on_host([flag.reshape(1) for flag in flags]) > 0, sizes)
    return found


# --- what training dynamics need -----------------------------------------------------------------------------------


def _measured(objective: Objective) -> dict[str, Loss]:
    """The first term of each output that tells classes apart entry by entry."""
    first: dict[str, tuple[str, Loss]] = {}
    for plan in objective.terms:
        loss = plan.loss
        if loss.classes_are in ("label", "column") and loss.space is not None and not isinstance(loss, Overlap):
            first.setdefault(plan.output, (plan.name, loss))
    return dict(first.values())
