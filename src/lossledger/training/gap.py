"""`Gap`: what makes training loss and validation loss differ, measured at the end of an epoch on the same batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lossledger.batch import Batch, leaves, to_device
from lossledger.distributed import ALONE, Group, in_lockstep
from lossledger.errors import InputError
from lossledger.forward import run_forward
from lossledger.objective import Objective
from lossledger.tally import Tally
from lossledger.training import randomness
from lossledger.training.callback import Logs
from lossledger.training.data import ArrayData, Data
from lossledger.training.modes import evaluating
from lossledger.training.running import Running
from lossledger.training.step import Observe, StepPlan
from lossledger.training.watching import EpochEnd, Watcher
from lossledger.training.waterfall import AUGMENTED, States, Waterfall, waterfall
from lossledger.window import merged
from lossledger.window.state import modules_of, moving

Plain = Callable[[Batch], Any]
"""From a batch as it was trained on to the same samples without augmentation: a batch, or its inputs alone."""

NO_PLAIN = "not told apart from data; plain=fn gives the same batch without it."


@dataclass(slots=True, eq=False)
class Unit:
    """One step that is measured again: its micro-batches, and what they added to the loss of the epoch."""

    batches: list[Batch] = field(default_factory=list)
    moving: list[dict[str, Tally]] = field(default_factory=list)


class Chosen:
    """Steps spread evenly over an epoch.

    Args:
        most: how many.
        steps: of the epoch, where that is known; else steps are thinned out as they come.
    """

    def __init__(self, most: int, steps: int | None) -> None:
        self._most = most
        self._stride = 1
        self._places = None if steps is None else {int((i + 0.5) * steps / most) for i in range(most)}
        self.units: dict[int, Unit] = {}

    def unit(self, step: int) -> Unit | None:
        """The unit of a step, if it is one of those."""
        if self._places is not None:
            return self.units.setdefault(step, Unit()) if step in self._places else None
        if step % self._stride:
            return None
        found = self.units.setdefault(step, Unit())
        if len(self.units) > self._most:
            self._stride *= 2
            self.units = {place: unit for place, unit in self.units.items() if place % self._stride == 0}
        return found


class Gap(Watcher):
    """Measure at epoch ends what makes the validation loss differ from the training loss.

    Some batches of the epoch, spread evenly over it, are kept with what they added to its loss. At its end they are
    evaluated again at the weights as they are then: in train mode, in eval mode, without augmentation, and counted as
    the validation counts. The differences are the parts, and what remains is due to other samples. Weights, running
    statistics and random state are put back, so that training goes on as if nothing had been measured.

    Args:
        batches: how many batches (steps, with `accumulate`) to measure again; they are kept in memory.
        every: measure every so many epochs, at those that end with a validation.
        plain: a function from a batch as it was trained on to the same samples without augmentation: a
            `lossledger.Batch`, or its inputs alone. `batch.ids` tells the samples, where the data know them.
        show: what takes the text of each measurement, for example `print`.

    Raises:
        InputError: fewer than 2 batches; a fit without a validation; a model whose forward talks to other ranks.

    Example:
        >>> import lossledger as ll, torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 8)
        >>> model = ll.Model(torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)))
        >>> model.compile("adam", "mse")
        >>> gap = Gap(batches=4)
        >>> _ = model.fit(x, x.sum(1), batch_size=8, verbose=0, seed=0, validation_split=0.5, callbacks=gap)
        >>> [part.name for part in gap.found[0].parts]
        ['weights moved', 'regularizers', 'train mode', 'augmentation', 'counting', 'data']
    """

    def __init__(
        self,
        batches: int = 8,
        every: int = 1,
        plain: Plain | None = None,
        show: Callable[[str], Any] | None = None,
    ) -> None:
        for name, value, least in (("batches", batches, 2), ("every", every, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"Gap: expected a whole number from {least} for {name}, received {value!r}.")
        self._batches = batches
        self._every = every
        self._plain = plain
        self._show = show
        self._chosen: Chosen | None = None
        self.found: list[Waterfall] = []

    def on_train_begin(self, logs: Logs) -> None:
        """Start over."""
        check_measurable(self.model.net, "Gap")
        if self.params.get("validation") is False:
            raise InputError(
                "Gap: expected validation_data or validation_split in fit, received neither. There is no validation "
                "loss to compare with; pass one of them, or leave Gap out."
            )
        self._chosen = None
        self.found = []

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        """Choose the batches of an epoch that will be measured; one that goes on after an interruption is not."""
        due = (epoch + 1) % self._every == 0
        self._chosen = Chosen(self._batches, self.params.get("steps")) if due else None

    def observer(self, step: int, plan: StepPlan) -> Observe | None:
        """Keeps the batches of a chosen step, with what they add to the loss."""
        unit = None if self._chosen is None else self._chosen.unit(step)
        if unit is None:
            return None

        def keep(batch: Batch, outputs: Any) -> None:
            with torch.no_grad():
                found = plan.objective.tallies(batch.y, outputs, batch.sample_weight, batch.mask, None)
            unit.batches.append(batch)
            unit.moving.append({name: _detached(tally) for name, tally in found.items()})

        return keep

    def on_validated(self, end: EpochEnd) -> None:
        """Measure, and keep the result with the run."""
        chosen, self._chosen = self._chosen, None
        if chosen is None:
            return
        weighted = weighs(end.frozen_plan.objective, end.held, end.validation)
        measuring = Measuring(end.plan, end.frozen_plan, end.device, self._plain, weighted)
        units = measuring.units(chosen.units, end.group)
        if not units:
            return
        found = waterfall(
            end.plan.objective,
            units,
            end.training,
            end.validation,
            end.epoch + 1,
            of_augmentation(self._plain, isinstance(end.data, ArrayData)),
            of_weights(weighted),
        )
        self.found.append(found)
        record(end.ledger.info, found)
        if self._show is not None and end.group.rank == 0:
            self._show(str(found))


def check_measurable(net: nn.Module, who: str) -> None:
    """Batches of one rank can be evaluated by that rank alone.

    Raises:
        InputError: a model whose forward talks to other ranks.
    """
    if in_lockstep(net):
        raise InputError(
            f"{who}: expected a model that a rank can run alone, received one with sharded parameters or "
            "SyncBatchNorm. Measure the gap of an unsharded copy."
        )


def of_augmentation(plain: Plain | None, in_memory: bool) -> dict[str, str]:
    """The reason why the augmentation cannot be told apart, if it cannot; nothing augments arrays."""
    return {} if in_memory or plain is not None else {AUGMENTED: NO_PLAIN}


def of_weights(weighted: bool) -> tuple[str, ...]:
    """What cannot be told apart, where the validation data carry sample weights."""
    if not weighted:
        return ()
    return ("counting: the validation has sample weights; those of the training stay, too.",)


def record(info: dict[str, Any], found: Waterfall) -> None:
    """Keep a waterfall with a run, as `ledger.info["gaps"]`; an epoch that ran again is kept once."""
    kept = [one for one in info.get("gaps", ()) if one["epoch"] != found.epoch]
    info["gaps"] = [*kept, found.to_dict()]


@dataclass(frozen=True, slots=True, eq=False)
class Measuring:
    """Evaluates the same batches in one state after another.

    Args:
        plan: of a training step.
        frozen_plan: of the validation.
        device: of the model.
        plain: takes the augmentation away.
        weighted: the validation counts sample weights.
    """

    plan: StepPlan
    frozen_plan: StepPlan
    device: torch.device
    plain: Plain | None
    weighted: bool

    def units(self, chosen: Mapping[int, Unit], group: Group = ALONE) -> list[States]:
        """The tallies of each step in each state, of all ranks; steps that are not finite in one of them are left out.

        Args:
            chosen: steps by number, the same numbers on all ranks.
            group: the ranks.
        """
        with undisturbed(self.plan.net, self.device), torch.no_grad():
            mine = {step: self._states(unit) for step, unit in chosen.items()}
        everybody = group.gather(mine)
        units: list[States] = []
        for step in chosen:
            parts = [found[step] for found in everybody]
            states = dict.fromkeys(state for part in parts for state in part)
            unit = {state: merged(part[state] for part in parts if state in part) for state in states}
            if unit and not any(int(tally.nonfinite) for tallies in unit.values() for tally in tallies.values()):
                units.append(unit)
        return units

    def _states(self, unit: Unit) -> dict[str, dict[str, Tally]]:
        if not unit.batches:
            return {}
        net, objective = self.plan.net, self.plan.objective
        found = {"moving": self._read(unit.moving)} if unit.moving else {}
        found["train"] = self._read([self._tallies(objective, batch) for batch in unit.batches])
        with evaluating(net):
            found["eval"] = self._read([self._tallies(objective, batch) for batch in unit.batches])
            batches = unit.batches
            if self.plain is not None:
                batches = [to_device(_without_augmentation(self.plain, batch), self.device) for batch in batches]
                found["plain"] = self._read([self._tallies(objective, batch) for batch in batches])
            alike = [batch if self.weighted else replace(batch, sample_weight=None) for batch in batches]
            changed = self.frozen_plan.objective is not objective or any(
                batch.sample_weight is not None for batch in batches if not self.weighted
            )
            if changed:
                frozen = self.frozen_plan.objective
                found["counted"] = self._read([self._tallies(frozen, batch) for batch in alike])
        return found

    def _tallies(self, objective: Objective, batch: Batch) -> dict[str, Tally]:
        outputs = run_forward(self.plan.forward, batch.x, self.plan.autocast, self.device.type)
        return objective.tallies(batch.y, outputs, batch.sample_weight, batch.mask, None)

    def _read(self, parts: Sequence[dict[str, Tally]]) -> dict[str, Tally]:
        """The sum of some tallies, on the host."""
        running = Running(self.device)
        for part in parts:
            running.add(part)
        return running.read()


def _detached(tally: Tally) -> Tally:
    """An auxiliary loss comes attached to the graph of the step, which must not be kept."""
    numerator = tally.numerator
    return replace(tally, numerator=numerator.detach().clone()) if isinstance(numerator, Tensor) else tally


def _without_augmentation(plain: Plain, batch: Batch) -> Batch:
    found = plain(batch)
    other = found if isinstance(found, Batch) else replace(batch, x=found)
    sizes = [int(leaf.shape[0]) for leaf in leaves(other.x)]
    if not sizes or sizes[0] != batch.size:
        raise InputError(
            f"Gap: expected of plain the same {batch.size} samples without augmentation, received "
            f"{sizes[0] if sizes else 'no'} samples. Return inputs in the order of the batch."
        )
    return other


def weighs(objective: Objective, held: Data, tallies: Mapping[str, Tally]) -> bool:
    """Whether a validation counts sample weights; batches from an iterable tell by what their entries weigh.

    Args:
        objective: of the validation, without class weights.
        held: the data.
        tallies: of the validation.
    """
    if isinstance(held, ArrayData):
        return held.sample_weight is not None
    return any(
        abs(float(tally.weight) - float(tally.count)) > 1e-9 * max(float(tally.count), 1.0)
        for name, tally in tallies.items()
        if objective.role(name) == "data" and tally.form == "linear"
    )


@contextlib.contextmanager
def undisturbed(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Random state, buffers, and what Keras layers keep beside their weights, put back as they were."""
    # A forward may also put another tensor in the place of a buffer.
    modules = modules_of(net)
    owners = [(module, dict(module._buffers)) for module in modules]
    kept = [(tensor, tensor.detach().clone()) for tensor in moving(modules)]
    state = randomness.capture(device)
    try:
        yield
    finally:
        for module, buffers in owners:
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        randomness.restore(state, device)
