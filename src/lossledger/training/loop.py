"""The loop: passes over the data, with numbers read by the host at log points only, ten times a second at most."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossledger.batch import Batch, to_device
from lossledger.distributed import ALONE, Group, at_rest, in_lockstep, is_sharded
from lossledger.errors import EmptyDataError, LossledgerError, NonFiniteError
from lossledger.forward import run_forward
from lossledger.objective import Objective
from lossledger.tally import Tally
from lossledger.training import grouping, posting, spreading
from lossledger.training.callback import Callback, LazyLogs, overrides
from lossledger.training.checking import Checking
from lossledger.training.data import Data
from lossledger.training.gate import bad_elements
from lossledger.training.grouping import Grouping, GroupSums
from lossledger.training.intervals import Closed, Intervals, of_all_ranks
from lossledger.training.measure import Measures, MetricPlan
from lossledger.training.modes import evaluating
from lossledger.training.named import Names
from lossledger.training.progress import Show
from lossledger.training.running import Running
from lossledger.training.sampling import Sampling
from lossledger.training.sharing import Turn, in_order, never, own_batches, turns
from lossledger.training.spreading import Found, Spreading
from lossledger.training.step import Observe, StepPlan, StepResult, in_turn, train_step
from lossledger.training.trace import nonfinite_error
from lossledger.training.watching import watched, watchers
from lossledger.window import check_replay, merged, padded

if TYPE_CHECKING:
    from lossledger.training.backup import Backup

LOG_SECONDS = 0.1
# Batches kept since the last log point, to name the samples of a bad one.
RECENT = 1024


@dataclass(frozen=True, slots=True, eq=False)
class PassResult:
    """What a pass over the data adds up to.

    Args:
        tallies: by term, on the host.
        logs: numbers by name, losses then metrics.
        metrics: results by name, with their classes.
        steps: number of optimizer steps, or of batches where nothing is trained.
        seconds: duration.
        intervals: the tallies of parts of the pass by their last step, if they were asked for.
        samples: what each sample told, where that is kept.
        groups: the sums by named group.
        grouped: by kind, the group of each of the samples.
        spread: of the elements, where that was asked for, and of each interval by its last step.
    """

    tallies: dict[str, Tally]
    logs: dict[str, float]
    metrics: dict[str, Any]
    steps: int
    seconds: float
    intervals: Closed = field(default_factory=list)
    samples: Sampling | None = None
    groups: list[GroupSums] = field(default_factory=list)
    grouped: dict[str, list[str]] = field(default_factory=dict)
    spread: tuple[Found, dict[int, Found]] = field(default_factory=lambda: ({}, {}))


class Pass:
    """One pass over the data: running tallies, metrics, and the log points.

    Args:
        objective: names the terms.
        plans: the metrics.
        device: of the model.
        show: the progress display.
        group: the ranks whose sums a log point adds up.
        every: steps of an interval whose sums are kept by themselves, if any.
        samples: takes what each sample tells, if that is kept.
        names: of the groups of the data, if there may be any.
        spread: keep how far the elements reach.
    """

    def __init__(
        self,
        objective: Objective,
        plans: tuple[MetricPlan, ...],
        device: torch.device,
        show: Show,
        group: Group = ALONE,
        every: int | None = None,
        samples: Sampling | None = None,
        names: Names | None = None,
        spread: bool = False,
    ) -> None:
        self.objective = objective
        self.group = group
        self.samples = samples
        self.running = Running(device)
        self.intervals = None if every is None else Intervals(every, device)
        self.grouping = None if names is None else Grouping(objective, names, samples is not None)
        self.spread = Spreading(objective, names, every) if spread else None
        self.measures = Measures(objective, plans)
        self._measured = bool(plans)
        self._differs: Tensor | None = None
        self.show = show
        self.steps = 0
        self._bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.started = self._logged = time.perf_counter()
        self._last: dict[str, Tally] = {}

    @property
    def observe(self) -> Observe | None:
        """Takes each batch of a step for metrics, samples and groups, before the step is added; `None` without any."""
        takers = (self.measures if self._measured else None, self.samples, self.spread, self.grouping)
        return in_turn([taker.collect for taker in takers if taker is not None])

    def add(self, tallies: dict[str, Tally], done: StepResult | None = None, skip: bool = False) -> None:
        """Add a step; nothing is read.

        Args:
            tallies: by term.
            done: what the step left, in training.
            skip: leave a step that was left out of the weights out of the numbers too.
        """
        self.steps += 1
        self.running.add(tallies)
        if self.intervals is not None:
            self.intervals.add(self.steps, tallies)
        bad = None if done is None else done.bad
        self.measures.add(bad if skip else None)
        if self.samples is not None:
            self.samples.add(bad if skip else None)
        if self.grouping is not None:
            self.grouping.add(bad if skip else None)
        if self.spread is not None:
            self.spread.add(self.steps, bad if skip else None)
        self._last = tallies
        if bad is not None:
            self._bad_steps += bad
        if done is not None and done.differs is not None:
            self._differs = done.differs if self._differs is None else self._differs | done.differs

    def state_dict(self) -> dict[str, Any]:
        """How far the pass is."""
        intervals = None if self.intervals is None else self.intervals.state_dict()
        sums = {"running": self.running.state_dict(), "intervals": intervals}
        groups = None if self.grouping is None else self.grouping.state_dict()
        sums["spread"] = None if self.spread is None else self.spread.state_dict()
        state = {"steps": self.steps, **sums, "measures": self.measures.state_dict(), "groups": groups}
        return state if self.samples is None else {**state, "samples": self.samples.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was told; no step of it was left out and not yet reported."""
        self.steps = state["steps"]
        links = {t.name: t.loss.link for t in self.objective.terms}
        self.running.load_state_dict(state["running"], links)
        if self.intervals is not None:
            self.intervals.load_state_dict(state["intervals"], links)
        if self.grouping is not None:
            self.grouping.load_state_dict(state["groups"], self._bad_steps.device)
        if self.spread is not None:
            self.spread.load_state_dict(state["spread"], self._bad_steps.device)
        self.measures.load_state_dict(state["measures"], self._bad_steps.device)
        if self.samples is not None:
            self.samples.load_state_dict(state["samples"])

    def bad_steps(self) -> int:
        """Number of steps that were left out; a read."""
        return int(self._bad_steps)

    def check_replays(self) -> None:
        """The second rounds of windows were their first again; a read, where there were any.

        Raises:
            ReplayError: one was not.
        """
        if self._differs is not None:
            check_replay(self._differs)

    def is_due(self) -> bool:
        """Whether a log point has come."""
        return time.perf_counter() - self._logged >= LOG_SECONDS

    def log(self) -> dict[str, Tally]:
        """A log point: read the sums and show them."""
        tallies = self.running.read()
        if self.samples is not None:
            self.samples.flush()
        self._logged = time.perf_counter()
        if self.show.wants_numbers:
            self.show.update(self.steps, self._logged - self.started, self._shown(tallies))
        return tallies

    def current(self) -> dict[str, float]:
        """The numbers so far of this rank, read now; `last` is the loss of the last batch alone."""
        return self._shown(self.running.read())

    def _shown(self, tallies: dict[str, Tally]) -> dict[str, float]:
        # A rank without data in this step, or until now, has no numbers of its own.
        moving = posting.logs(self.objective, tallies) if tallies else {}
        last = {"last": posting.logs(self.objective, self._last)["loss"]} if self._last else {}
        loss = {"loss": moving.pop("loss")} if moving else {}
        return {**loss, **last, **moving, **self._metric_values()}

    def result(self) -> PassResult:
        """The sums of the whole pass, over all ranks."""
        group = self.group
        tallies = in_order(self.objective, merged(group.gather(self.running.read())))
        measured = self.measures.read(group)
        logs = posting.logs(self.objective, tallies) | {name: r.value for name, r in measured.items()}
        steps = max(steps for (steps,) in group.agree(self.steps))
        closed = [] if self.intervals is None else of_all_ranks(group.gather(self.intervals.all(self.steps)))
        intervals = [(step, in_order(self.objective, part)) for step, part in closed]
        sums = [] if self.grouping is None else grouping.of_all_ranks(group.gather(self.grouping.read()))
        seconds = time.perf_counter() - self.started
        grouped = {} if self.grouping is None else self.grouping.kept()
        return PassResult(
            tallies, logs, measured, steps, seconds, intervals, self.samples, sums, grouped, self._spreads()
        )

    def _spreads(self) -> tuple[Found, dict[int, Found]]:
        if self.spread is None:
            return {}, {}
        ranks = self.group.gather((self.spread.read(), dict(self.spread.intervals(self.steps))))
        parts = {step: spreading.of_all_ranks(found[step] for _, found in ranks) for step in ranks[0][1]}
        return spreading.of_all_ranks(whole for whole, _ in ranks), parts

    def empty(self) -> bool:
        """Whether no rank had a batch."""
        return not any(steps for (steps,) in self.group.agree(self.steps))

    def _metric_values(self) -> dict[str, float]:
        return {name: result.value for name, result in self.measures.read().items()}


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


def train_epoch(
    plan: StepPlan, windows: Iterator[Turn], options: TrainOptions, current: Pass, first_step: int
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
    recent: deque[tuple[int, tuple[Batch, ...], StepResult]] = deque(maxlen=longest)
    watch, skip = options.on_nonfinite == "raise", options.on_nonfinite == "skip"
    group = current.group
    observe = current.observe
    first = observe if options.checks is None else options.checks.with_first(observe)
    observers: Iterator[Observe | None] = itertools.chain((first,), itertools.repeat(observe))
    watching = watchers(options.callbacks)
    if watching:
        observers = watched(observers, watching, plan, current.steps)
    for index, (turn, observer) in enumerate(zip(windows, observers, strict=False), current.steps):
        window = tuple(map(to_device, turn.batches, itertools.repeat(device)))
        spare = None if turn.spare is None else to_device(turn.spare, device)
        for callback in begin:
            callback.on_train_batch_begin(index, {})
        done = train_step(plan, window, options.by, options.checked, observer, turn.share, spare)
        tallies = without_bad(done.tallies, done.bad) if skip and done.bad is not None else done.tallies
        current.add(tallies, done, skip)
        if options.after_step is not None:
            options.after_step()
        if watch:
            # Outputs are made again if they are asked for: kept, they would hold the memory of many batches.
            recent.append((first_step + index, window, done))
        if (current.is_due() if group.size == 1 else turn.due) or len(recent) == longest:
            current.log()
            current.check_replays()
            if watch:
                stop_if_bad(plan, current, recent)
            recent.clear()
        for callback in end:
            callback.on_train_batch_end(index, LazyLogs(current.current))
        if options.backup is not None and options.backup.due(current.steps, turn):
            current.check_replays()
            if watch:
                stop_if_bad(plan, current, recent)
                recent.clear()
            options.backup.write(current)
    if current.empty():
        raise EmptyDataError(
            "fit: the data gave no batch in this epoch; expected at least one. A generator is exhausted after one "
            "pass: pass a list, a DataLoader, or an object whose __iter__ starts over."
        )
    current.check_replays()
    if watch:
        stop_if_bad(plan, current, recent)
    return current.result()


def train_single(plan: StepPlan, data: Data, current: Pass, watch: bool) -> PassResult:
    """One step on one batch, of which each rank takes its share.

    Raises:
        NonFiniteError: the loss is not finite, and `watch` is set.
    """
    device = plan.parameters[0].device
    share = own_batches(data, data.length or 1, None, current.group)
    turn = next(turns(data, share, 1, current.group, current.is_due, never))
    batches = tuple(to_device(batch, device) for batch in turn.batches)
    spare = None if turn.spare is None else to_device(turn.spare, device)
    done = train_step(plan, batches, None, False, current.observe, turn.share, spare)
    current.add(done.tallies, done)
    if watch:
        stop_if_bad(plan, current, [(1, batches, done)])
    return current.result()


def stop_if_bad(plan: StepPlan, current: Pass, recent: Sequence[tuple[int, tuple[Batch, ...], StepResult]]) -> None:
    """Raise the error of the first recent step that was left out, if the count says there was one.

    Raises:
        NonFiniteError: loss or gradient of a step are not finite.
    """
    if not current.bad_steps():
        return
    for step, window, done in recent:
        if done.bad is not None and bool(done.bad):
            # The forward of a sharded model is that of all ranks: it is not run again for one of them.
            again = bool(window) and not is_sharded(plan.net)
            batch, outputs = _first_bad(plan, window) if again else (None, None)
            error = nonfinite_error(plan.objective, step, done.tallies, batch, outputs)
            raise _of_the_cause(current.group, error, any(int(t.nonfinite) for t in done.tallies.values()))


def _of_the_cause(group: Group, error: LossledgerError, here: bool) -> LossledgerError:
    """The error of the first rank whose own loss is not finite; all ranks stop at the same step."""
    if group.size == 1:
        return error
    found = group.gather((here, str(error), getattr(error, "record", None)))
    rank = next((rank for rank, (bad, *_) in enumerate(found) if bad), 0)
    _, text, record = found[rank]
    return error if rank == group.rank else NonFiniteError(f"rank {rank}: {text}", record)


def _first_bad(plan: StepPlan, window: tuple[Batch, ...]) -> tuple[Batch, Any]:
    """The first batch of a window whose loss is not finite, or else the last, with what the model makes of it now."""
    with torch.no_grad(), evaluating(plan.net):
        for batch in window:
            outputs = run_forward(plan.forward, batch.x, plan.autocast, plan.parameters[0].device.type)
            found = plan.objective.tallies(batch.y, outputs, batch.sample_weight, batch.mask, None)
            if bool(bad_elements(found)):
                break
    return batch, outputs


def without_bad(tallies: dict[str, Tally], bad: Tensor) -> dict[str, Tally]:
    """The tallies of a step that is left out when it is not finite: nothing of it counts but the record of it."""
    good = ~bad

    def keep(value: Any) -> Any:
        tensor = torch.as_tensor(value, device=good.device)
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
            groups=groups,
            statistics=None if tally.statistics is None else keep(tally.statistics),
        )
    return kept


def evaluate_pass(
    plan: StepPlan, data: Data, batch_size: int, steps: int | None, current: Pass, checked: bool
) -> PassResult:
    """One pass without training: the weights stand still, so the numbers are frozen.

    Raises:
        EmptyDataError: the data gave no batch.
    """
    device = plan.parameters[0].device if plan.parameters else torch.device("cpu")
    objective = plan.objective
    recent: deque[tuple[Batch, dict[str, Tally], Any]] = deque(maxlen=RECENT)
    observe = current.observe
    group = current.group
    by = "class" if current.samples is None else current.samples.by
    with torch.no_grad(), evaluating(plan.net):
        for host, blank in _frozen(plan, data, batch_size, steps, group):
            batch = to_device(host, device)
            if blank:
                run_forward(plan.forward, batch.x, plan.autocast, device.type)
                continue
            outputs = run_forward(plan.forward, batch.x, plan.autocast, device.type)
            tallies = objective.tallies(batch.y, outputs, batch.sample_weight, batch.mask, by, checked)
            if observe is not None:
                observe(batch, outputs)
            current.add(tallies)
            recent.append((batch, tallies, outputs))
            if current.is_due() or len(recent) == RECENT:
                _explain_bad(objective, current.log(), recent)
                recent.clear()
        if current.empty():
            raise EmptyDataError("evaluate: the data gave no batch; expected at least one.")
        _explain_bad(objective, current.log(), recent)
        # The weights stand still, so a penalty on them counts once, not once a batch.
        penalties = {penalty.name: penalty.tally() for penalty in plan.penalties}
        if group.rank == 0:
            current.running.add(penalties)
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


def _explain_bad(
    objective: Objective, sums: dict[str, Tally], recent: Iterable[tuple[Batch, dict[str, Tally], Any]]
) -> None:
    """A loss that is not finite because the outputs cannot be right is an error; any other is reported as it is."""
    if not any(int(tally.nonfinite) for tally in sums.values()):
        return
    for batch, tallies, outputs in recent:
        if bool(bad_elements(tallies)):
            objective.align(batch.y, outputs, batch.sample_weight, batch.mask)
