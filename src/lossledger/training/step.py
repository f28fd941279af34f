"""One optimizer step: forward, tallies and gradients in closed form, backward, gate, update. No host read.

The gate: when an element of the loss is NaN or infinite, the update must not reach the weights. The flag stays on
the device. A fused optimizer leaves the step out by itself; for the others the gradients become zero.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossledger.objective import Objective, Outputs, collecting
from lossledger.tally import Tally
from lossledger.training.data import Batch
from lossledger.training.optimizers import takes_found_inf

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
        autocast: dtype of the forward pass, or `None`.
        clip_norm: largest norm of the gradient, or `None`.
        gated: leave out updates from a non-finite loss.
    """

    net: nn.Module
    forward: Forward
    objective: Objective
    optimizer: Optimizer
    parameters: tuple[nn.Parameter, ...]
    autocast: torch.dtype | None
    clip_norm: float | None
    gated: bool


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
        if isinstance(x, list | tuple) and (any_position or len(positional) >= len(x) > 1):
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
    if isinstance(outputs, Outputs):
        return Outputs(outputs.outputs, {**outputs.losses, **added})
    return Outputs(outputs, added)


def train_step(plan: StepPlan, batch: Batch, by: str | None, checked: bool = True) -> tuple[dict[str, Tally], Any]:
    """Update the parameters with one batch; the batch is the window.

    Args:
        plan: what a step needs.
        batch: on the device of the model.
        by: groups of the tallies.
        checked: the values of the targets have been checked at the data boundary.

    Returns:
        the tallies by term, detached and on the device, and what the model returned.
    """
    objective = plan.objective
    outputs = run_forward(plan.forward, batch.x, plan.autocast, plan.parameters[0].device.type)
    result = objective.backprop(batch.y, outputs, batch.sample_weight, batch.mask, by, checked)
    tallies, roots, gradients = result.tallies, result.roots, result.gradients
    for name, tally in objective.penalty_tallies(plan.net).items():
        roots.append(tally.numerator)
        gradients.append(torch.ones_like(tally.numerator))
        tallies[name] = Tally(tally.numerator.detach(), 1, 1, 1, nonfinite=tally.nonfinite)
    torch.autograd.backward(roots, gradients)
    if plan.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(plan.parameters, plan.clip_norm)
    if plan.gated:
        _gate(plan, tallies)
    plan.optimizer.step()
    plan.optimizer.zero_grad(set_to_none=True)
    return tallies, outputs


def bad_elements(tallies: dict[str, Tally]) -> Tensor:
    """Number of non-finite elements in all terms, on the device."""
    found = [tally.nonfinite for tally in tallies.values()]
    total = found[0]
    for other in found[1:]:
        total = total + other
    return torch.as_tensor(total)


def _gate(plan: StepPlan, tallies: dict[str, Tally]) -> None:
    bad = bad_elements(tallies) > 0
    if takes_found_inf(plan.optimizer):
        # The hook of torch's gradient scaler: fused kernels read it on the device and keep parameters and state.
        plan.optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]
        plan.optimizer.grad_scale = None  # type: ignore[attr-defined]
        return
    for parameter in plan.parameters:
        if parameter.grad is not None:
            parameter.grad = torch.where(bad, torch.zeros((), device=bad.device, dtype=parameter.dtype), parameter.grad)
