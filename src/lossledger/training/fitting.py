"""One call of `fit`: its epochs, with their validation, callbacks and ledger rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lossledger.batch import Batch
from lossledger.distributed import Group, same_buffers, together
from lossledger.errors import NonFiniteError
from lossledger.forward import Forward
from lossledger.ledger import Ledger
from lossledger.ledger.samples import stacked
from lossledger.losses.groups import AndSamples
from lossledger.objective import Objective
from lossledger.training import boundary, grouping, loop, measure, memory, posting, spreading
from lossledger.training.average import Average
from lossledger.training.data import ArrayData, Data, order_of
from lossledger.training.jit import Course
from lossledger.training.known import Assumed
from lossledger.training.measure import MetricPlan
from lossledger.training.progress import Show
from lossledger.training.sampling import Numbering, Sampling, numbering
from lossledger.training.sharing import alone, never, own_batches, turns
from lossledger.training.step import StepPlan
from lossledger.training.sums import Pass, PassResult
from lossledger.training.waiting import Waiting
from lossledger.training.watching import EpochEnd, watchers


@dataclass(slots=True, eq=False)
class Progress:
    """How far a call of `fit` has come.

    Args:
        history: numbers by name, one an epoch.
        done: the epochs that ended, from 0.
        step: number of the next epoch's first step, from 1.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)
    step: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Fitting:
    """What the epochs of one call of `fit` share, already checked.

    Args:
        forward: of the model, with its weights.
        plan: of a training step.
        frozen_plan: of a validation: without class weights.
        metrics: the metrics.
        data: to train on.
        validation: to validate on, if any.
        validation_freq: validate every so many epochs.
        options: of an epoch.
        device: of the model.
        epochs: the epochs, from 0.
        shuffled: a new order of the samples every epoch, of arrays only.
        seed: of that order.
        ledger: takes the rows.
        run_dir: where the ledger is written after every epoch, if anywhere.
        stopped: whether a callback ended the training.
        stop: sets that.
        average: of the weights.
        group: the ranks that share the data.
        samples: keep what each sample brings to the loss.
        spread: keep how far the elements reach.
        first_held: index of the first sample of the validation in the data that were given.
        progress: how far a resumed run was.
    """

    forward: Forward
    plan: StepPlan
    frozen_plan: StepPlan
    metrics: tuple[MetricPlan, ...]
    data: Data
    validation: Data | None
    validation_freq: int
    options: loop.TrainOptions
    device: torch.device
    epochs: range
    shuffled: bool
    seed: int
    ledger: Ledger
    run_dir: str | Path | None
    stopped: Callable[[], bool]
    stop: Callable[[bool], None]
    average: Average
    group: Group
    samples: bool = False
    spread: bool = False
    first_held: int = 0
    progress: Progress = field(default_factory=Progress)

    def run(self, show: Show) -> tuple[dict[str, list[float]], list[int]]:
        """All epochs, or those that a resumed run lacks: the numbers by name, and the epochs that ran."""
        progress, backup = self.progress, self.options.backup
        if backup is not None:
            backup.begin()
        ended = bool(progress.done) and self._any_stopped() and not (backup is not None and backup.interrupted)
        for epoch in () if ended else self.epochs[len(progress.done) :]:
            result = self._train(epoch, show)
            logs, held = dict(result.logs), None
            if self.validation is not None and (epoch + 1) % self.validation_freq == 0:
                held = self._validate(self.validation, epoch, show)
                logs |= {f"val_{name}": value for name, value in held.logs.items()}
            for name, value in logs.items():
                progress.history.setdefault(name, []).append(value)
            progress.done.append(epoch)
            progress.step += result.steps
            show.end(self._title(epoch), result.steps, result.seconds, logs)
            if self.options.checks is not None:
                weighted = isinstance(self.validation, ArrayData) and self.validation.sample_weight is not None
                self.options.checks.epoch(result.tallies, None if held is None else held.tallies, weighted)
            if held is not None:
                self._tell_watchers(epoch, result, held)
            together(self.group, self._save)
            for callback in self.options.callbacks:
                callback.on_epoch_end(epoch, logs)
            last = self._any_stopped() or epoch == self.epochs[-1]
            if backup is not None:
                backup.end_epoch(last)
            if last:
                break
        return progress.history, progress.done

    def _tell_watchers(self, epoch: int, result: PassResult, held: PassResult) -> None:
        assert self.validation is not None
        end = EpochEnd(
            epoch,
            self.plan,
            self.frozen_plan,
            result.tallies,
            held.tallies,
            self.data,
            self.validation,
            self.device,
            self.group,
            self.ledger,
        )
        for callback in watchers(self.options.callbacks):
            callback.on_validated(end)

    def _any_stopped(self) -> bool:
        return any(stop for (stop,) in self.group.agree(int(self.stopped())))

    def record(self, error: NonFiniteError) -> None:
        """What the first NaN came from, kept with the run."""
        self.ledger.info["nonfinite"] = error.record
        self._save()

    def _save(self) -> None:
        # All ranks hold the same rows; one writes them. Each has samples of its own.
        if self.run_dir is not None and self.group.rank == 0:
            self.ledger.save(self.run_dir)
        elif self.run_dir is not None and self.samples:
            self.ledger.save_samples(self.run_dir)

    def _title(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self.epochs.stop}"

    def _train(self, epoch: int, show: Show) -> PassResult:
        backup, options = self.options.backup, self.options
        if backup is None or not backup.interrupted:
            for callback in options.callbacks:
                callback.on_epoch_begin(epoch, {})
        steps = self.data.steps(options.batch_size) if options.steps is None else options.steps
        show.begin(self._title(epoch), boundary.updates_of(steps, options.accumulate))
        samples = Sampling(self.plan.objective, numbering(self.data, self.group)) if self.samples else None
        current = Pass(
            self.plan.objective,
            self.metrics,
            self.device,
            show,
            self.group,
            options.every,
            samples,
            self.data.names,
            self.spread,
            Waiting.of(self.plan.objective, options.by, not isinstance(self.data, ArrayData)),
            _by_sample_too(self.data, samples),
        )
        if current.by is not None:
            options = replace(options, by=current.by)
        length = self.data.length
        order = order_of(length, self.seed, epoch) if length is not None and self.shuffled else None
        if backup is None:
            whole = own_batches(self.data, options.batch_size, order, self.group)
            batches: Iterator[Batch | None] = itertools.islice(whole, options.steps)
        else:
            batches = backup.batches(options.batch_size, order, options.steps, current)
        if self.group.size == 1:
            windows = alone(batches, options.accumulate)
        else:
            save = never if backup is None else backup.is_time
            windows = turns(self.data, batches, options.accumulate, self.group, current.is_due, save)
        if self.plan.jit is not None:
            course = Course(
                self.data,
                options.batch_size,
                options.steps,
                windows=options.accumulate > 1 or self.group.size > 1,
                observed=current.observe is not None,
                packs=options.every is None and options.on_nonfinite != "skip",
                say=show.say,
            )
            self.plan.jit.begin(self.plan, course)
        result = loop.train_epoch(self.plan, windows, self.data, options, current, self.progress.step)
        same_buffers(self.group, self.plan.net)
        for step, tallies in result.intervals:
            number = self.progress.step - 1 + step
            rows = posting.rows(self.plan.objective, tallies, "training", epoch + 1, number)
            groups = result.groups[1].get(step, [])
            rows += grouping.rows(self.plan.objective, tallies, groups, "training", epoch + 1, number)
            self.ledger.append(spreading.filled(rows, result.spread[1].get(step, {})))
        post(self.ledger, self.plan.objective, result, "training", epoch + 1, self._pooled)
        return result

    def _validate(self, data: Data, epoch: int, show: Show) -> PassResult:
        with boundary.about_validation():
            size = self.options.batch_size
            samples = numbering(data, self.group, self.first_held) if self.samples else None
            result = evaluated(
                self.frozen_plan, self.metrics, data, size, None, show, self.device, self.group, samples, self.spread
            )
        post(self.ledger, self.frozen_plan.objective, result, "validation", epoch + 1, self._pooled)
        return result

    @property
    def _pooled(self) -> Group | None:
        """The ranks, where each holds the samples of all: a folder has a segment of each instead."""
        return self.group if self.run_dir is None else None


def evaluated(
    plan: StepPlan,
    metrics: tuple[MetricPlan, ...],
    data: Data,
    batch_size: int,
    steps: int | None,
    show: Show,
    device: torch.device,
    group: Group,
    samples: Numbering | None = None,
    spread: bool = False,
    assumed: Assumed | None = None,
) -> PassResult:
    """One pass over data while the weights stand still."""
    count = data.steps(batch_size) if steps is None else steps
    show.begin("evaluate", count)
    kept = None if samples is None else Sampling(plan.objective, samples)
    waiting = Waiting.of(plan.objective, "class", not isinstance(data, ArrayData))
    by = _by_sample_too(data, kept)
    current = Pass(
        plan.objective,
        metrics,
        device,
        show,
        group,
        samples=kept,
        names=data.names,
        spread=spread,
        waiting=waiting,
        by=by,
    )
    checked = boundary.checked_at_once(data, device)
    with memory.kept(device, count):
        return loop.evaluate_pass(plan, data, batch_size, steps, current, checked, assumed)


def _by_sample_too(data: Data, samples: Sampling | None) -> AndSamples | None:
    """Takes what the tallies of steps sum by sample, where samples or groups want it.

    Whether an iterable carries groups shows too late, and a run that is resumed must go the same way.
    """
    if samples is not None:
        return samples.by
    return AndSamples("class") if isinstance(data, ArrayData) and data.groups else None


def post(
    ledger: Ledger,
    objective: Objective,
    result: PassResult,
    split: str,
    epoch: int,
    pooled: Group | None = None,
) -> None:
    """The rows of a pass, written to the ledger; with `pooled`, the samples of all of its ranks."""
    if result.samples is not None:
        found = result.samples.columns(result.tallies, split, epoch)
        ledger.append_samples(found if pooled is None else stacked(pooled.gather(found)))
        grouped = (result.samples.ids, result.grouped)
        for ids, groups in [grouped] if pooled is None else pooled.gather(grouped):
            if groups:
                ledger.append_groups(split, ids, groups)
    rows = [
        *posting.rows(objective, result.tallies, split, epoch),
        *grouping.rows(objective, result.tallies, result.groups[0], split, epoch),
    ]
    ledger.append(
        spreading.filled(rows, result.spread[0]),
        measure.metric_rows(objective, result.metrics, split, epoch),
    )
