"""The loop: passes over the data, with numbers read by the host at log points only, ten times a second at most."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossledger.batch import Batch, to_device
from lossledger.distributed import Group, at_rest, in_lockstep, is_sharded
from lossledger.errors import EmptyDataError, LossledgerError, NonFiniteError
from lossledger.forward import run_forward
from lossledger.tally import Tally
from lossledger.training.callback import Callback, LazyLogs, overrides
from lossledger.training.checking import Checking
from lossledger.training.data import Data
from lossledger.training.gate import bad_elements
from lossledger.training.jit import Course
from lossledger.training.known import Assumed
from lossledger.training.modes import evaluating
from lossledger.training.sharing import Turn, never, own_batches, turns
from lossledger.training.step import Observe, StepPlan, StepResult, train_step
from lossledger.training.sums import Pass, PassResult
from lossledger.training.trace import nonfinite_error
from lossledger.training.waiting import Kept, tallies_of
from lossledger.training.watching import watched, watchers
from lossledger.window import padded

if TYPE_CHECKING:
    from lossledger.training.backup import Backup

# Batches kept since the last log point, to name the samples of a bad one.
RECENT = 1024


# The number of a step, what its batches are made again from, and what it left.
Recent = tuple[int, tuple[Any, ...], StepResult]
# What a batch of a validation is made again from, and its tallies or what they will be made from.
Told = tuple[Any, dict[str, Tally], Kept | None]


@dataclass(frozen=True, slots=True, eq=False)
class TrainOptions:
    """How an epoch of training runs, resolved once in `fit`."""

    batch_size: int
    accumulate: int
    steps: int | None
    by: str | None
    every: int | None
    on_nonfinite: str
    checked: bool
    callbacks: Sequence[Callback]
    after_step: Callable[[], None] | None
    backup: Backup | None = None
    checks: Checking | None = None
    assumed: Assumed | None = None


def train_epoch(
    plan: StepPlan, windows: Iterator[Turn], data: Data, options: TrainOptions, current: Pass, first_step: int
) -> PassResult:
    """One epoch of training, or the rest of one that was interrupted: `current` knows how far it was.

    Raises:
        EmptyDataError: the data gave no batch.
        NonFiniteError: the loss is not finite, and `on_nonfinite` is "raise".
    """
    device = plan.parameters[0].device
    begin = [c for c in options.callbacks if overrides(c, "on_train_batch_begin")]
    end = [c for c in options.callbacks if overrides(c, "on_train_batch_end")]
    longest = max(1, RECENT // options.accumulate)
    recent: deque[Recent] = deque(maxlen=longest)
    watch, skip = options.on_nonfinite == "raise", options.on_nonfinite == "skip"
    group = current.group
    # A step that is left out of the numbers needs its own.
    waiting = None if skip else current.waiting
    observe = current.observe
    first = observe if options.checks is None else options.checks.with_first(observe)
    assumed = options.assumed
    observers: Iterator[Observe | None] = itertools.chain((first,), itertools.repeat(observe))
    watching = watchers(options.callbacks)
    if watching:
        observers = watched(observers, watching, plan, current.steps)
    for index, (turn, observer) in enumerate(zip(windows, observers, strict=False), current.steps):
        window = tuple(map(to_device, turn.batches, itertools.repeat(device)))
        spare = None if turn.spare is None else to_device(turn.spare, device)
        for callback in begin:
            callback.on_train_batch_begin(index, {})
        confirm = None if assumed is None or not assumed.waiting else assumed.confirm
        done = train_step(plan, window, options.by, options.checked, observer, turn.share, spare, waiting, confirm)
        tallies = without_bad(done.tallies, done.bad) if skip and done.bad is not None else done.tallies
        current.add(tallies, done, skip, done.kept)
        if options.after_step is not None:
            options.after_step()
        if watch:
            # Batches and outputs are made again if they are asked for: kept, they would hold the memory of many.
            recent.append((first_step + index, tuple(map(data.kept, turn.batches)), done))
        if (current.is_due() if group.size == 1 else turn.due) or len(recent) == longest:
            current.log()
            current.check_replays()
            if watch:
                stop_if_bad(plan, data, current, recent)
            recent.clear()
        for callback in end:
            callback.on_train_batch_end(index, LazyLogs(current.current))
        if options.backup is not None and options.backup.due(current.steps, turn):
            current.check_replays()
            if watch:
                stop_if_bad(plan, data, current, recent)
                recent.clear()
            options.backup.write(current)
    if current.empty():
        raise EmptyDataError(
            "fit: the data gave no batch in this epoch; expected at least one. A generator is exhausted after one "
            "pass: pass a list, a DataLoader, or an object whose __iter__ starts over."
        )
    current.check_replays()
    if watch:
        stop_if_bad(plan, data, current, recent)
    return current.result()


def train_single(plan: StepPlan, data: Data, current: Pass, watch: bool) -> PassResult:
    """One step on one batch, of which each rank takes its share.

    Raises:
        NonFiniteError: the loss is not finite, and `watch` is set.
    """
    device = plan.parameters[0].device
    if plan.jit is not None:
        plan.jit.begin(plan, Course(observed=current.observe is not None))
    share = own_batches(data, data.length or 1, None, current.group)
    turn = next(turns(data, share, 1, current.group, current.is_due, never))
    batches = tuple(to_device(batch, device) for batch in turn.batches)
    spare = None if turn.spare is None else to_device(turn.spare, device)
    done = train_step(plan, batches, None, False, current.observe, turn.share, spare)
    current.add(done.tallies, done)
    if watch:
        stop_if_bad(plan, data, current, [(1, tuple(map(data.kept, turn.batches)), done)])
    return current.result()


def stop_if_bad(plan: StepPlan, data: Data, current: Pass, recent: Sequence[Recent]) -> None:
    """Raise the error of the first recent step that was left out, if there was one; a read.

    Raises:
        NonFiniteError: loss or gradient of a step are not finite.
    """
    flags = [done.bad for _, _, done in recent if done.bad is not None]
    if not flags or not bool(torch.stack(flags).any()):
        return
    for step, window, done in recent:
        if done.bad is not None and bool(done.bad):
            # The forward of a sharded model is that of all ranks: it is not run again for one of them.
            again = bool(window) and not is_sharded(plan.net)
            batch, outputs = _first_bad(plan, map(data.again, window)) if again else (None, None)
            tallies = tallies_of(plan.objective, done.tallies, done.kept, "class")
            error = nonfinite_error(plan.objective, step, tallies, batch, outputs)
            raise _of_the_cause(current.group, error, any(int(t.nonfinite) for t in tallies.values()))


def _of_the_cause(group: Group, error: LossledgerError, here: bool) -> LossledgerError:
    """The error of the first rank whose own loss is not finite; all ranks stop at the same step."""
    if group.size == 1:
        return error
    found = group.gather((here, str(error), getattr(error, "record", None)))
    rank = next((rank for rank, (bad, *_) in enumerate(found) if bad), 0)
    _, text, record = found[rank]
    return error if rank == group.rank else NonFiniteError(f"rank {rank}: {text}", record)


def _first_bad(plan: StepPlan, window: Iterable[Batch]) -> tuple[Batch, Any]:
    """The first batch of a window whose loss is not finite, or else the last, with what the model makes of it now."""
    with torch.no_grad(), evaluating(plan.net):
        for host in window:
            batch = to_device(host, plan.device)
            outputs = run_forward(plan.forward, batch.x, plan.autocast, plan.device.type)
            found = plan.objective.tallies(batch.y, outputs, batch.sample_weight, batch.mask, None)
            if bool(bad_elements(found)):
                break
    return batch, outputs


def without_bad(tallies: dict[str, Tally], bad: Tensor) -> dict[str, Tally]:
    """The tallies of a step that is left out when it is not finite: nothing of it counts but the record of it."""
    good = ~bad

    def keep(value: Any) -> Any:
        tensor = value if isinstance(value, Tensor) else torch.full((), value, device=good.device)
        return torch.where(good, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))

    kept = {}
    for name, tally in tallies.items():
        if tally.grid is not None:
            kept[name] = tally.grid.map(lambda part: without_bad({"": part}, bad)[""], keep).tally()
            continue
        groups = tally.groups
        if groups is not None:
            groups = replace(
                groups,
                numerator=keep(groups.numerator),
                total=keep(groups.total),
                count=keep(groups.count),
                weight=keep(groups.weight),
            )
        kept[name] = replace(
            tally,
            numerator=keep(tally.numerator),
            divisor=keep(tally.divisor),
            count=keep(tally.count),
            weight=keep(tally.weight),
            shown=None if tally.shown is None else keep(tally.shown),
            groups=groups,
            statistics=None if tally.statistics is None else keep(tally.statistics),
        )
    return kept


def evaluate_pass(
    plan: StepPlan,
    data: Data,
    batch_size: int,
    steps: int | None,
    current: Pass,
    checked: bool,
    assumed: Assumed | None = None,
) -> PassResult:
    """One pass without training: the weights stand still, so the numbers are frozen.

    Raises:
        EmptyDataError: the data gave no batch.
    """
    device = plan.device
    objective = plan.objective
    recent: deque[Told] = deque(maxlen=RECENT)
    waiting = current.waiting
    observe = current.observe
    group = current.group
    by = current.by or "class"
    with torch.no_grad(), evaluating(plan.net):
        for host, blank in _frozen(plan, data, batch_size, steps, group):
            batch = to_device(host, device)
            if blank:
                run_forward(plan.forward, batch.x, plan.autocast, device.type)
                continue
            outputs = run_forward(plan.forward, batch.x, plan.autocast, device.type)
            if assumed is not None and assumed.waiting:
                assumed.confirm(outputs)
            kept = None if waiting is None or not checked else waiting.kept(batch, outputs)
            tallies = {}
            if kept is None:
                tallies = objective.tallies(batch.y, outputs, batch.sample_weight, batch.mask, by, checked)
            if observe is not None:
                observe(batch, outputs)
            current.add(tallies, kept=kept)
            recent.append((data.kept(host), tallies, kept))
            if current.is_due() or len(recent) == RECENT:
                _explain_bad(plan, data, current.log(), recent)
                recent.clear()
        if current.empty():
            raise EmptyDataError("evaluate: the data gave no batch; expected at least one.")
        # The weights stand still, so a penalty on them counts once, not once a batch.
        penalties = {penalty.name: penalty.tally() for penalty in plan.penalties}
        if penalties and group.rank == 0:
            current.add_once(penalties)
        _explain_bad(plan, data, current.log(), recent)
    at_rest(plan.net)
    return current.result()


def _frozen(
    plan: StepPlan, data: Data, batch_size: int, steps: int | None, group: Group
) -> Iterator[tuple[Batch, bool]]:
    """The batches of this rank; where forwards talk to other ranks, blank ones for those of others."""
    if group.size == 1 or not in_lockstep(plan.net):
        for one in itertools.islice(own_batches(data, batch_size, None, group), steps):
            if one is not None:
                yield one, False
        return
    batches = itertools.islice(own_batches(data, batch_size, None, group), steps)
    for turn in turns(data, batches, 1, group, never, never):
        for position, batch in enumerate(padded(turn.batches, turn.share, True, turn.spare)):
            yield batch, position >= len(turn.batches)


def _explain_bad(plan: StepPlan, data: Data, sums: dict[str, Tally], recent: Iterable[Told]) -> None:
    """A loss that is not finite because the outputs cannot be right is an error; any other is reported as it is."""
    if not any(int(tally.nonfinite) for tally in sums.values()) or is_sharded(plan.net):
        return
    for kept, tallies, waits in recent:
        if bool(bad_elements(tallies_of(plan.objective, tallies, waits, None))):
            batch, outputs = _first_bad(plan, [data.again(kept)])
            plan.objective.align(batch.y, outputs, batch.sample_weight, batch.mask)
