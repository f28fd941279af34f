"""One optimizer step: forward, tallies and gradients in closed form, backward, gate, update. No host read."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossledger.errors import InputError
from lossledger.objective import Objective, Outputs, Penalty, collecting, unpacked
from lossledger.tally import Tally
from lossledger.training.data import Batch
from lossledger.training.gate import Gate, bad_elements, bad_gradient
from lossledger.weighting import not_finite

Forward = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What a training step needs, resolved once in `compile`.

    Args:
        net: the module.
        forward: calls it with the inputs of a batch.
        objective: what is minimized.
        optimizer: what updates the parameters.
        parameters: the trainable parameters.
        penalties: the regularizers with the parameters that they read.
        autocast: dtype of the forward pass, or `None`.
        clip_norm: largest norm of the gradient, or `None`.
        gate: leaves out updates that are not finite; `None` lets them through.
    """

    net: nn.Module
    forward: Forward
    objective: Objective
    optimizer: Optimizer
    parameters: tuple[nn.Parameter, ...]
    penalties: tuple[Penalty, ...]
    autocast: torch.dtype | None
    clip_norm: float | None
    gate: Gate | None


def calling(net: nn.Module) -> Forward:
    """How the module takes its inputs: a dict by keyword where forward names the keys, a tuple by position."""
    parameters = inspect.signature(net.forward).parameters
    names = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    any_position = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())

    def forward(x: Any) -> Any:
        if isinstance(x, Mapping) and (any_keyword or names >= set(x)):
            return net(**x)
        if isinstance(x, list | tuple) and (any_position or len(positional) >= len(x) > 0):
            return net(*x)
        return net(x)

    return forward


def run_forward(plan_forward: Forward, x: Any, autocast: torch.dtype | None, device: str) -> Any:
    """What the model returns, with the losses that its modules added."""
    context = torch.autocast(device, autocast) if autocast is not None else contextlib.nullcontext()
    with collecting() as added, context:
        outputs = plan_forward(x)
    if not added:
        return outputs
    alone, returned = unpacked(outputs)
    return Outputs(alone, {**returned, **added})


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step leaves, on the device.

    Args:
        tallies: by term, detached.
        outputs: what the model returned.
        bad: whether the step was left out because loss or gradient were not finite; `None` when steps are not gated.
    """

    tallies: dict[str, Tally]
    outputs: Any
    bad: Tensor | None


def train_step(plan: StepPlan, batch: Batch, by: str | None, checked: bool = True) -> StepResult:
    """Update the parameters with one batch; the batch is the window.

    Args:
        plan: what a step needs.
        batch: on the device of the model.
        by: groups of the tallies.
        checked: the values of the targets have been checked at the data boundary.

    Raises:
        InputError: nothing of the loss depends on a trainable parameter.
    """
    objective = plan.objective
    if plan.gate is not None:
        plan.gate.before_forward()
    outputs = run_forward(plan.forward, batch.x, plan.autocast, plan.parameters[0].device.type)
    result = objective.backprop(batch.y, outputs, batch.sample_weight, batch.mask, by, checked)
    tallies, roots, gradients = result.tallies, result.roots, result.gradients
    for penalty in plan.penalties:
        tally = penalty.tally()
        roots.append(tally.numerator)
        gradients.append(torch.ones_like(tally.numerator))
        tallies[penalty.name] = replace(tally, numerator=tally.numerator.detach())
    if not roots:
        raise InputError(
            "The loss does not depend on any trainable parameter: expected outputs that require a gradient, received "
            "detached ones. Look for .detach(), torch.no_grad() or NumPy in the model's forward."
        )
    torch.autograd.backward(roots, gradients)
    bad = _update(plan, tallies)
    plan.optimizer.zero_grad(set_to_none=True)
    return StepResult(tallies, outputs, bad)


def _update(plan: StepPlan, tallies: dict[str, Tally]) -> Tensor | None:
    """Clip, gate, step."""
    norm = None
    if plan.clip_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(plan.parameters, plan.clip_norm)
    if plan.gate is None:
        plan.optimizer.step()
        return None
    wrong = bad_gradient(plan.parameters) if norm is None else not_finite(norm)
    bad = (bad_elements(tallies) > 0) | wrong
    plan.gate.step(bad)
    return bad
