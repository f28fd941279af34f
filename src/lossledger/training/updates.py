"""The updates of torch's optimizers as operations on tensors alone, for a step that is compiled as a whole.

The formulas are those of torch.optim, and so is the state: what an optimizer of torch keeps is updated in place.
Numbers that a schedule may change (rates, momenta) come as a tensor, so that they are no part of a compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

_NUMBERS = {
    SGD: ("lr", "momentum", "dampening", "weight_decay"),
    Adam: ("lr", "betas", "eps", "weight_decay"),
    AdamW: ("lr", "betas", "eps", "weight_decay"),
}
"""By optimizer, the numbers of a group that may change from step to step."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a group of parameters is updated: what is the same in every step.

    Args:
        kind: the optimizer's name.
        slots: the state that each parameter has, in order, beside the count of steps.
        counts: whether the state holds a count of steps.
        decays: whether there is weight decay.
        decoupled: whether the decay is no part of the gradient.
        maximize: whether steps go up.
        nesterov: as of SGD.
    """

    kind: str
    slots: tuple[str, ...]
    counts: bool
    decays: bool
    decoupled: bool
    maximize: bool
    nesterov: bool


def supported() -> tuple[str, ...]:
    """Names of the optimizers that have rules."""
    return tuple(sorted(kind.__name__ for kind in _NUMBERS))


def names_of_numbers(optimizer: Optimizer) -> tuple[str, ...] | None:
    """The numbers of each group that a program takes as a tensor; `None` for an optimizer without rules."""
    return _NUMBERS.get(type(optimizer))  # type: ignore[arg-type]


def rule_of(optimizer: Optimizer, group: dict[str, Any]) -> Rule:
    """The rule of a group of parameters."""
    decays, maximize = bool(group["weight_decay"]), bool(group["maximize"])
    if type(optimizer) is SGD:
        slots = ("momentum_buffer",) if group["momentum"] else ()
        return Rule("sgd", slots, False, decays, False, maximize, bool(group["nesterov"]))
    largest = ("max_exp_avg_sq",) if group["amsgrad"] else ()
    # Before torch 2.7 AdamW is no Adam, and its groups do not say what it is.
    decoupled = bool(group.get("decoupled_weight_decay", type(optimizer) is AdamW))
    return Rule("adam", ("exp_avg", "exp_avg_sq", *largest), True, decays, decoupled, maximize, False)


def flat_numbers(values: tuple[Any, ...]) -> list[float]:
    """The numbers of a group in one list: betas are two."""
    flat: list[float] = []
    for value in values:
        flat += value if isinstance(value, tuple | list) else (value,)
    return flat


def update(
    rule: Rule,
    parameter: Tensor,
    gradient: Tensor,
    state: list[Tensor],
    step: Tensor | None,
    numbers: Tensor,
    bad: Tensor | None,
) -> None:
    """Update a parameter and its state in place, except where `bad` is set.

    Args:
        rule: of its group.
        parameter: the parameter.
        gradient: its gradient.
        state: its slots, in the order of the rule.
        step: the count of steps with this one, if the rule counts.
        numbers: those of the group, in float64.
        bad: a bool on the device, or `None` to update in any case.
    """
    # 16-bit parameters are updated in float32, as fused kernels do.
    wide = torch.promote_types(parameter.dtype, torch.float32)
    now, slots = parameter.to(wide), [slot.to(wide) for slot in state]
    slope = -gradient.to(wide) if rule.maximize else gradient.to(wide)
    if rule.kind == "sgd":
        after, changed = _sgd(rule, now, slope, slots, numbers)
    else:
        assert step is not None
        after, changed = _adam(rule, now, slope, slots, step, numbers)
    for target, old, new in zip((parameter, *state), (now, *slots), (after, *changed), strict=True):
        target.copy_(new if bad is None else torch.where(bad, old, new))


def _sgd(rule: Rule, now: Tensor, slope: Tensor, state: list[Tensor], numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
    rate, momentum, dampening, decay = numbers.unbind()
    if rule.decays:
        slope = slope + decay.to(now.dtype) * now
    if state:
        state = [state[0] * momentum.to(now.dtype) + (1 - dampening).to(now.dtype) * slope]
        slope = slope + momentum.to(now.dtype) * state[0] if rule.nesterov else state[0]
    return now - rate.to(now.dtype) * slope, state


def _adam(
    rule: Rule, now: Tensor, slope: Tensor, state: list[Tensor], step: Tensor, numbers: Tensor
) -> tuple[Tensor, list[Tensor]]:
    rate, beta1, beta2, epsilon, decay = numbers.unbind()
    kind = now.dtype
    if rule.decays and rule.decoupled:
        now = now * (1 - rate * decay).to(kind)
    elif rule.decays:
        slope = slope + decay.to(kind) * now
    first = state[0] + (slope - state[0]) * (1 - beta1).to(kind)
    second = state[1] * beta2.to(kind) + slope * slope * (1 - beta2).to(kind)
    largest = [torch.maximum(other, second) for other in state[2:]]
    count = step.double()
    rescaled = (1 - beta2**count).sqrt().to(kind)
    bound = (largest[0] if largest else second).sqrt() / rescaled + epsilon.to(kind)
    after = now - (rate / (1 - beta1**count)).to(kind) * (first / bound)
    return after, [first, second, *largest]
