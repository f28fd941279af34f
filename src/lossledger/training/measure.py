"""Metrics of an epoch: their statistics are added up on the device, and read with the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossledger import metrics
from lossledger.batch import Batch
from lossledger.distributed import ALONE, Group
from lossledger.errors import InputError, UnknownNameError
from lossledger.ledger import MetricRow
from lossledger.losses.expression import Expression
from lossledger.losses.loss import Loss
from lossledger.objective import Objective, unpacked
from lossledger.training import posting
from lossledger.weighting import carried_mask, joined


@dataclass(frozen=True, slots=True, eq=False)
class MetricPlan:
    """A metric, the output that it reads, its name in History, and whether sample weights apply."""

    name: str
    output: str
    metric: Any
    weighted: bool

    @property
    def weighted_name(self) -> str:
        """Its name where the same metric without weights has the plain one."""
        name = f"weighted_{self.metric.name}"
        return f"{self.output}_{name}" if self.output else name


def plan(objective: Objective, given: Any, weighted: Any) -> tuple[MetricPlan, ...]:
    """The metrics of `compile`, resolved once.

    Raises:
        UnknownNameError: an output or metric that does not exist.
        InputError: two metrics of one name.
    """
    plans = _plans(objective, given, False)
    names = [p.name for p in plans]
    # As in Keras, where the same name stands in both lists.
    plans += [replace(p, name=p.weighted_name) if p.name in names else p for p in _plans(objective, weighted, True)]
    names = [p.name for p in plans]
    taken = {"loss", "last", *(posting.loss_key(t.name) for t in objective.terms)}
    taken |= {f"{output}_loss" for output in objective.outputs}
    for name in names:
        if name in taken:
            raise InputError(f"metrics: the name {name!r} is that of a loss in the history; give the metric another.")
        if names.count(name) > 1:
            raise InputError(f"metrics: the name {name!r} is used twice; give one metric another name.")
    return tuple(plans)


def _plans(objective: Objective, given: Any, weighted: bool) -> list[MetricPlan]:
    if given is None:
        return []
    by_output: dict[str, Any] = {}
    if isinstance(given, Mapping) and objective.structure == "one":
        raise UnknownNameError("output in metrics", next(iter(given), ""), ["the one output"])
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in objective.outputs]
        if unknown:
            raise UnknownNameError("output in metrics", unknown[0], objective.outputs)
        by_output = dict(given)
    elif objective.structure == "one":
        by_output = {"": given}
    elif isinstance(given, list | tuple) and len(given) == len(objective.outputs):
        by_output = dict(zip(objective.outputs, given, strict=True))
    else:
        raise InputError(
            f"metrics: expected a dict by output, or one entry for each of {list(objective.outputs)}; "
            f"received {given!r}."
        )
    found = []
    for output, entries in by_output.items():
        for entry in entries if isinstance(entries, list | tuple) else [entries]:
            if entry is None:
                continue
            metric = metrics.get(entry, _loss_of(objective, output))
            name = f"{output}_{metric.name}" if output else metric.name
            found.append(MetricPlan(name, output, metric, weighted))
    return found


def _loss_of(objective: Objective, output: str) -> Loss | Expression | None:
    terms = tuple((t.coefficient, t.loss) for t in objective.terms if t.output == output)
    if not terms:
        return None
    return terms[0][1] if len(terms) == 1 else Expression(terms)


class Measures:
    """The metrics of one pass over the data.

    Args:
        objective: knows the outputs.
        plans: the metrics.
    """

    def __init__(self, objective: Objective, plans: tuple[MetricPlan, ...]) -> None:
        self._objective = objective
        self._plans = plans
        self._sums: dict[str, Tensor] = {}
        self._step: dict[str, Tensor] = {}
        self._updates: list[tuple[metrics.Stateful, tuple[Any, ...]]] = []
        for p in plans:
            if isinstance(p.metric, metrics.Stateful):
                p.metric.reset()

    def collect(self, batch: Batch, y_pred: Any) -> None:
        """Take a batch of the current step; it counts when the step is added. Nothing is read."""
        trues = self._objective.split(batch.y, "y_true", frozenset())
        preds = self._objective.split(unpacked(y_pred)[0], "y_pred")
        weights = self._objective.split_optional(batch.sample_weight, "sample_weight")
        masks = self._objective.split_optional(batch.mask, "mask")
        with torch.no_grad():
            for p in self._plans:
                key = p.output
                mask = joined(masks.get(key), carried_mask(preds[key]), p.name)
                weight = weights.get(key) if p.weighted else None
                if isinstance(p.metric, metrics.Stateful):
                    extra = (weight, mask) if p.metric.weighs else ()
                    self._updates.append((p.metric, (trues[key], preds[key].detach(), *extra)))
                    continue
                _add(self._step, p.name, p.metric.statistics(trues[key], preds[key].detach(), weight, mask))

    def add(self, bad: Tensor | None = None) -> None:
        """Add the step whose batches were collected. One that was left out, as `bad` says, is left out here too.

        A metric with a state of its own cannot be told on the device: for those `bad` is read.
        """
        if not self._plans:
            return
        for name, sums in self._step.items():
            _add(self._sums, name, sums if bad is None else torch.where(bad, torch.zeros_like(sums), sums))
        if self._updates and (bad is None or not bool(bad)):
            for metric, batch in self._updates:
                metric.update(*batch)
        self._step, self._updates = {}, []

    def state_dict(self) -> dict[str, Any]:
        """The sums, and the states of the metrics that keep their own."""
        own = {p.name: p.metric.state_dict() for p in self._plans if isinstance(p.metric, metrics.Stateful)}
        return {"sums": self._sums, "own": own}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` told."""
        self._sums = {name: sums.to(device, copy=True) for name, sums in state["sums"].items()}
        for p in self._plans:
            if isinstance(p.metric, metrics.Stateful):
                p.metric.load_state_dict(state["own"][p.name], device)

    def read(self, group: Group = ALONE) -> dict[str, metrics.Result]:
        """The metrics so far, of all ranks of the group: one transfer."""
        if group.size > 1:
            return self._read_all(group)
        flat = [t.reshape(-1).double() for t in self._sums.values()]
        host = torch.cat(flat).cpu().numpy() if flat else np.zeros(0)
        found: dict[str, metrics.Result] = {}
        start = 0
        for p in self._plans:
            if isinstance(p.metric, metrics.Stateful):
                found[p.name] = p.metric.compute()
                continue
            if p.name in self._sums:
                size = self._sums[p.name].numel()
                part = host[start : start + size].reshape(tuple(self._sums[p.name].shape))
                found[p.name] = p.metric.result(part)
                start += size
        return found

    def _read_all(self, group: Group) -> dict[str, metrics.Result]:
        mine = {name: t.double().cpu() for name, t in self._sums.items()}
        sums: dict[str, Tensor] = {}
        for part in group.gather(mine):
            for name, value in part.items():
                _add(sums, name, value)
        found: dict[str, metrics.Result] = {}
        for p in self._plans:
            if isinstance(p.metric, metrics.TorchMetric):
                anywhere = any(count for (count,) in group.agree(int(p.metric.updated)))
                found[p.name] = p.metric.compute(over_ranks=True) if anywhere else metrics.Result(math.nan)
            elif isinstance(p.metric, metrics.KerasMetric):
                found[p.name] = _of_keras(p.metric, group)
            elif p.name in sums:
                found[p.name] = p.metric.result(sums[p.name].numpy())
        return found


def _of_keras(metric: metrics.KerasMetric, group: Group) -> metrics.Result:
    """The value over all ranks; some metrics are built by their first batch, which a rank may not have had."""
    built = [values for values in group.gather(metric.values()) if values]
    mine = metric.compute_of([sum(parts[1:], parts[0]) for parts in zip(*built, strict=True)]) if metric.built else None
    return next((result for result in group.gather(mine) if result is not None), metrics.Result(math.nan))


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    known = sums.get(name)
    sums[name] = value if known is None else known.add_(value)


def metric_rows(objective: Objective, results: Mapping[str, metrics.Result], split: str, epoch: int) -> list[MetricRow]:
    """Ledger rows of metrics: the value, and one for each class."""
    rows = []
    for name, result in results.items():
        rows.append(MetricRow(split, epoch, name, "", result.value))
        by_class = result.by_class or ()
        for index, value in enumerate(by_class):
            rows.append(MetricRow(split, epoch, name, objective.group_name(index, len(by_class)), value))
    return rows
