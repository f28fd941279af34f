"""One optimizer step: forward, tallies and gradients in closed form, backward, gate, update. No host read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossledger.batch import Batch
from lossledger.distributed import LONE_SHARE, Share, clip_norm_, is_sharded
from lossledger.errors import InputError
from lossledger.forward import Call, run_forward
from lossledger.objective import Backprop, Objective, Penalty
from lossledger.tally import Tally
from lossledger.training.fused import clear_gradients
from lossledger.training.gate import Gate, bad_elements
from lossledger.training.placed import device_of
from lossledger.training.waiting import Kept, Waiting
from lossledger.values import not_finite
from lossledger.window import NO_GRADIENT, Window, propagate, running

if TYPE_CHECKING:
    from lossledger.training.jit import Jit
    from lossledger.training.packed import Packed


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What a training step needs, resolved once in `compile`.

    Args:
        net: the module.
        forward: calls it with the inputs of a batch.
        objective: what is minimized.
        optimizer: what updates the parameters.
        parameters: the trainable parameters; none of a model that is only evaluated.
        penalties: the regularizers with the parameters that they read.
        autocast: dtype of the forward pass, or `None`.
        clip_norm: largest norm of the gradient, or `None`.
        gate: leaves out updates that are not finite; `None` lets them through.
        jit: compiles steps; `None` runs them as they are.
    """

    net: nn.Module
    forward: Call
    objective: Objective
    optimizer: Optimizer
    parameters: tuple[nn.Parameter, ...]
    penalties: tuple[Penalty, ...]
    autocast: torch.dtype | None
    clip_norm: float | None
    gate: Gate | None
    jit: Jit | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is, also one of which nothing is trained."""
        return self.parameters[0].device if self.parameters else device_of(self.net)


Observe = Callable[[Batch, Any], None]
"""Looks at a batch and at what the model returned for it."""


def in_turn(observers: Sequence[Observe]) -> Observe | None:
    """Shows each batch to all of them, one after another; `None` without any."""
    if len(observers) < 2:
        return observers[0] if observers else None

    def all_of_them(batch: Batch, outputs: Any) -> None:
        for observe in observers:
            observe(batch, outputs)

    return all_of_them


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step leaves, on the device.

    Args:
        tallies: by term, detached.
        bad: whether the step was left out because loss or gradient were not finite; `None` when steps are not gated.
        differs: whether the second round of a window was not the first again; `None` where there was one round.
        kept: what the tallies of the terms will be made from, where they wait; then only penalties have theirs.
    """

    tallies: dict[str, Tally]
    bad: Tensor | None
    differs: Tensor | None = None
    kept: Kept | Packed | None = None


def train_step(
    plan: StepPlan,
    batches: tuple[Batch, ...],
    by: str | None,
    checked: bool = True,
    observe: Observe | None = None,
    share: Share = LONE_SHARE,
    spare: Batch | None = None,
    waiting: Waiting | None = None,
    confirm: Callable[[Any], None] | None = None,
) -> StepResult:
    """Update the parameters with one window of batches.

    Args:
        plan: what a step needs.
        batches: the window, on the device of the model.
        by: groups of the tallies.
        checked: the values of the targets have been checked at the data boundary.
        observe: sees each batch with its outputs, once.
        share: the part of this rank in the window.
        spare: a batch for forwards that count for nothing.
        waiting: lets the tallies of a small batch wait.
        confirm: sees the outputs before anything is made of them.

    Raises:
        InputError: nothing of the loss depends on a trainable parameter, or a loss that parts do not add up to.
    """
    if plan.jit is not None:
        done = plan.jit.step(plan, batches, by, checked, observe, share)
        if done is not None:
            return done
    if plan.gate is not None:
        plan.gate.before_forward()
    kept = None
    sums: Sequence[Tensor] = ()
    if len(batches) > 1 or share.group.size > 1:
        window = Window(plan.objective, batches, plan.net, plan.penalties, by, checked, share, spare)
        tallies, differs = _accumulate(plan, window, observe, confirm)
    else:
        batch, differs = batches[0], None
        outputs = run_forward(plan.forward, batch.x, plan.autocast, plan.parameters[0].device.type)
        if confirm is not None:
            confirm(outputs)
        waits = None if waiting is None or not checked else waiting.pull(batch, outputs)
        if waits is None:
            found = plan.objective.backprop(batch.y, outputs, batch.sample_weight, batch.mask, by, checked)
        else:
            kept, pulled = waits
            found = Backprop({}, [outputs] if outputs.requires_grad else [], [pulled.gradient])
            sums = pulled.sums
        tallies = found.tallies
        if not propagate(found, plan.penalties):
            raise InputError(NO_GRADIENT)
        if observe is not None:
            observe(batch, outputs)
    bad = _update(plan, tallies, sums, differs, share)
    clear_gradients(plan.optimizer)
    return StepResult(tallies, bad, differs, kept)


def _accumulate(
    plan: StepPlan, window: Window, observe: Observe | None, confirm: Callable[[Any], None] | None
) -> tuple[dict[str, Tally], Tensor | None]:
    """The gradient of several batches, as if they were one."""
    device = plan.parameters[0].device.type
    with running(window):
        for batch in window:
            outputs = run_forward(plan.forward, batch.x, plan.autocast, device)
            if confirm is not None:
                confirm(outputs)
            window.backward(outputs)
            if observe is not None and not (window.counting or window.blank):
                observe(batch, outputs)
    return window.tallies, window.differs


def _update(
    plan: StepPlan, tallies: dict[str, Tally], sums: Sequence[Tensor], differs: Tensor | None, share: Share
) -> Tensor | None:
    """Clip, gate, step; `sums` are those of the elements of terms without a tally."""
    norm = None
    if plan.clip_norm is not None:
        sharded = is_sharded(plan.net)
        norm = (clip_norm_ if sharded else nn.utils.clip_grad_norm_)(plan.parameters, plan.clip_norm)
    if plan.gate is None:
        plan.optimizer.step()
        return None
    wrong = plan.gate.bad(plan.parameters, sums) if norm is None else not_finite(sum(sums, norm))
    bad = (bad_elements(tallies) > 0) | wrong if tallies else wrong
    stopped = bad if differs is None else bad | differs
    if share.group.size > 1:
        # Every rank leaves the step out, or none does.
        bad, stopped = (share.group.sum_(torch.stack([bad, stopped]).double()) > 0).unbind()
    plan.gate.step(stopped)
    return bad
