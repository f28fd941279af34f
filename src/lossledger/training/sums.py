"""One pass over the data: what its batches add up to, and the log points at which the host reads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lossledger.distributed import ALONE, Group
from lossledger.losses.groups import AndSamples
from lossledger.objective import Objective
from lossledger.tally import Tally
from lossledger.training import grouping, memory, posting, spreading
from lossledger.training.grouping import Grouping, GroupSums
from lossledger.training.intervals import Closed, Intervals, of_all_ranks
from lossledger.training.measure import Measures, MetricPlan
from lossledger.training.named import Names
from lossledger.training.packed import Packed, PackedSums
from lossledger.training.progress import Show
from lossledger.training.running import Running
from lossledger.training.sampling import Sampling
from lossledger.training.sharing import in_order
from lossledger.training.spreading import Found, Spreading
from lossledger.training.step import Observe, StepResult, in_turn
from lossledger.training.waiting import Kept, Waiting, tallies_of
from lossledger.window import check_replay, merged

LOG_SECONDS = 0.1

T = TypeVar("T")


class Taker(Protocol[T]):
    """Adds up something of a pass, and of its intervals."""

    def read(self) -> T:
        """Of the whole pass, on the host."""
        ...

    def intervals(self, steps: int) -> list[tuple[int, T]]:
        """Of every interval by its last step, of which there are `steps` so far."""
        ...


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
        groups: the sums by named group, and those of each interval by its last step.
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
    groups: tuple[list[GroupSums], dict[int, list[GroupSums]]] = field(default_factory=lambda: ([], {}))
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
        waiting: lets tallies of small batches wait.
        by: of the tallies of every step, where somebody takes what they sum by sample; then none of them waits.
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
        waiting: Waiting | None = None,
        by: AndSamples | None = None,
    ) -> None:
        self.objective, self.by = objective, by
        # Sums of parts of the pass are made batch by batch, and so are those of several ranks.
        self.waiting = waiting if every is None and by is None and group.size == 1 else None
        self.group = group
        self.samples = samples
        self.running, self.packed = Running(device), PackedSums()
        self.intervals = None if every is None else Intervals(every, device)
        self.grouping = None if names is None else Grouping(objective, names, by, samples is not None, every)
        self.spread = Spreading(objective, names, every) if spread else None
        self.measures = Measures(objective, plans)
        self._measured = bool(plans)
        self._differs: Tensor | None = None
        self.show = show
        self.steps = 0
        self._device = device
        self.started = self._logged = time.perf_counter()
        self._last: tuple[dict[str, Tally], Kept | Packed | None] = {}, None
        self._seen: tuple[int, dict[str, Tally]] | None = None

    @property
    def observe(self) -> Observe | None:
        """Takes each batch of a step for metrics, samples and groups, before the step is added; `None` without any."""
        # Groups before samples, which take out what both read.
        takers = (self.measures if self._measured else None, self.grouping, self.samples, self.spread)
        return in_turn([taker.collect for taker in takers if taker is not None])

    def add(
        self,
        tallies: dict[str, Tally],
        done: StepResult | None = None,
        skip: bool = False,
        kept: Kept | Packed | None = None,
    ) -> None:
        """Add a step; nothing is read.

        Args:
            tallies: by term.
            done: what the step left, in training.
            skip: leave a step that was left out of the weights out of the numbers too.
            kept: what the tallies of the terms will be made from, if they wait.
        """
        self.steps += 1
        if tallies:
            self.running.add(tallies)
        if kept is not None:
            full = self.packed.add(kept) if isinstance(kept, Packed) else self._wait(kept)
            if full:
                self.running.add(full)
        if self.intervals is not None:
            self.intervals.add(self.steps, tallies)
        bad = None if done is None else done.bad
        if self._measured:
            self.measures.add(bad if skip else None)
        if self.samples is not None:
            self.samples.add(bad if skip else None)
        if self.grouping is not None:
            self.grouping.add(self.steps, bad if skip else None)
        if self.spread is not None:
            self.spread.add(self.steps, bad if skip else None)
        self._last = tallies, kept
        if done is not None and done.differs is not None:
            self._differs = done.differs if self._differs is None else self._differs | done.differs

    def _wait(self, kept: Kept) -> dict[str, Tally]:
        return {} if self.waiting is None else self.waiting.add(kept)

    def state_dict(self) -> dict[str, Any]:
        """How far the pass is."""
        intervals = None if self.intervals is None else self.intervals.state_dict()
        sums = {"running": self.running.state_dict(), "intervals": intervals}
        groups = None if self.grouping is None else self.grouping.state_dict()
        sums["spread"] = None if self.spread is None else self.spread.state_dict()
        if self.waiting is not None:
            sums["waiting"] = self.waiting.state_dict()
        if self.packed:
            sums["packed"] = self.packed.state_dict()
        state = {"steps": self.steps, **sums, "measures": self.measures.state_dict(), "groups": groups}
        return state if self.samples is None else {**state, "samples": self.samples.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was told; no step of it was left out and not yet reported."""
        self.steps = state["steps"]
        links = {t.name: t.loss.link for t in self.objective.terms}
        self.running.load_state_dict(state["running"], links)
        if state.get("waiting") is not None:
            waiting = Waiting(self.objective, "class", False) if self.waiting is None else self.waiting
            waiting.load_state_dict(state["waiting"], self._device)
            if self.waiting is None:
                self.running.add(waiting.tallies())
        if state.get("packed") is not None:
            self.packed.load_state_dict(state["packed"], links, self._device)
        if self.intervals is not None:
            self.intervals.load_state_dict(state["intervals"], links)
        if self.grouping is not None:
            self.grouping.load_state_dict(state["groups"], self._device)
        if self.spread is not None:
            self.spread.load_state_dict(state["spread"], self._device)
        self.measures.load_state_dict(state["measures"], self._device)
        if self.samples is not None:
            self.samples.load_state_dict(state["samples"])

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
        tallies = self._read()
        memory.watch(self.steps)
        if self.samples is not None:
            self.samples.flush()
        self._logged = time.perf_counter()
        if self.show.wants_numbers:
            self.show.update(self.steps, self._logged - self.started, self._shown(tallies))
        return tallies

    def _read(self) -> dict[str, Tally]:
        """The sums so far, read once. What waits goes on waiting, so that looking at them changes nothing."""
        if self._seen is None or self._seen[0] != self.steps:
            found = self.running.read()
            if self.waiting or self.packed:
                rest = Running(self._device)
                rest.add({} if self.waiting is None else self.waiting.tallies())
                rest.add(self.packed.tallies())
                found = merged((found, rest.read()))
            self._seen = self.steps, found
        return self._seen[1]

    def add_once(self, tallies: dict[str, Tally]) -> None:
        """Add what belongs to no step."""
        self.running.add(tallies)
        self._seen = None

    def current(self) -> dict[str, float]:
        """The numbers so far of this rank, read now; `last` is the loss of the last batch alone."""
        return self._shown(self._read())

    def _shown(self, tallies: dict[str, Tally]) -> dict[str, float]:
        # A rank without data in this step, or until now, has no numbers of its own.
        moving = posting.logs(self.objective, tallies) if tallies else {}
        known = tallies_of(self.objective, *self._last, None)
        last = {"last": posting.logs(self.objective, known)["loss"]} if known else {}
        loss = {"loss": moving.pop("loss")} if moving else {}
        return {**loss, **last, **moving, **self._metric_values()}

    def result(self) -> PassResult:
        """The sums of the whole pass, over all ranks."""
        group = self.group
        tallies = in_order(self.objective, merged(group.gather(self._read())))
        measured = self.measures.read(group)
        logs = posting.logs(self.objective, tallies) | {name: r.value for name, r in measured.items()}
        steps = max(steps for (steps,) in group.agree(self.steps))
        closed = [] if self.intervals is None else of_all_ranks(group.gather(self.intervals.all(self.steps)))
        intervals = [(step, in_order(self.objective, part)) for step, part in closed]
        seconds = time.perf_counter() - self.started
        groups = ([], {}) if self.grouping is None else self._over_ranks(self.grouping, grouping.of_all_ranks)
        spread = ({}, {}) if self.spread is None else self._over_ranks(self.spread, spreading.of_all_ranks)
        grouped = {} if self.grouping is None else self.grouping.kept()
        return PassResult(tallies, logs, measured, steps, seconds, intervals, self.samples, groups, grouped, spread)

    def _over_ranks(self, taker: Taker[T], joined: Callable[[Iterable[T]], T]) -> tuple[T, dict[int, T]]:
        """What a taker found in the whole pass and in each interval, that of all ranks joined."""
        ranks = self.group.gather((taker.read(), dict(taker.intervals(self.steps))))
        parts = {step: joined(found[step] for _, found in ranks) for step in ranks[0][1]}
        return joined(whole for whole, _ in ranks), parts

    def empty(self) -> bool:
        """Whether no rank had a batch."""
        return not any(steps for (steps,) in self.group.agree(self.steps))

    def _metric_values(self) -> dict[str, float]:
        return {name: result.value for name, result in self.measures.read().items()}
