"""Callbacks that look further than Keras's hooks let them: at single batches, and at the tallies of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lossledger.batch import Batch
from lossledger.distributed import Group
from lossledger.ledger import Ledger
from lossledger.tally import Tally
from lossledger.training.callback import Callback
from lossledger.training.data import Data
from lossledger.training.step import Observe, StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class EpochEnd:
    """An epoch of `fit` that was validated.

    Args:
        epoch: from 0.
        plan: of its steps.
        frozen_plan: of the validation: without the class weights of `fit`.
        training: tallies of the epoch by term, on the host.
        validation: those of the validation.
        data: of the training.
        held: of the validation.
        device: of the model.
        group: the ranks that share the data.
        ledger: of the run.
    """

    epoch: int
    plan: StepPlan
    frozen_plan: StepPlan
    training: Mapping[str, Tally]
    validation: Mapping[str, Tally]
    data: Data
    held: Data
    device: torch.device
    group: Group
    ledger: Ledger


class Watcher(Callback):
    """A callback that sees batches of its choice, and the tallies of each validated epoch. No host read in a step."""

    def observer(self, step: int, plan: StepPlan) -> Observe | None:
        """What sees the micro-batches of a step with their outputs; `None` for nothing.

        Args:
            step: of the epoch, from 0.
            plan: of the step.
        """
        return None

    def on_validated(self, end: EpochEnd) -> None:
        """After an epoch that ended with a validation, before the ledger is written."""


def watchers(callbacks: Iterable[Callback]) -> list[Watcher]:
    """Those of the callbacks that watch."""
    return [callback for callback in callbacks if isinstance(callback, Watcher)]


def watched(
    observers: Iterable[Observe | None], watching: Sequence[Watcher], plan: StepPlan, first: int
) -> Iterator[Observe | None]:
    """What observes each step, with those who watch it.

    Args:
        observers: what observes the steps anyway.
        watching: the callbacks.
        plan: of the steps.
        first: number of the first step.
    """
    for step, observe in enumerate(observers, first):
        asked = [observe, *(callback.observer(step, plan) for callback in watching)]
        found = [one for one in asked if one is not None]
        yield _each(found) if len(found) > 1 else (found[0] if found else None)


def _each(observers: Sequence[Observe]) -> Observe:
    def observe(batch: Batch, outputs: Any) -> None:
        for one in observers:
            one(batch, outputs)

    return observe
