"""The updates of torch's optimizers as operations on tensors alone, for a step that is compiled as a whole.

The formulas are those of torch.optim, and so is the state: what an optimizer of torch keeps is updated in place.
Numbers that a schedule may change (rates, momenta) come as a tensor, so that they are no part of a compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

_MOMENTS = ("lr", "betas", "eps", "weight_decay")
_NUMBERS: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("lr", "momentum", "dampening", "weight_decay"),
    Adam: _MOMENTS,
    AdamW: _MOMENTS,
    Adamax: _MOMENTS,
    NAdam: (*_MOMENTS, "momentum_decay"),
    RMSprop: ("lr", "alpha", "momentum", "eps", "weight_decay"),
    Adagrad: ("lr", "lr_decay", "eps", "weight_decay"),
    Adadelta: ("lr", "rho", "eps", "weight_decay"),
}
"""By optimizer, the numbers of a group that may change from step to step."""

_SLOTS: dict[type[Optimizer], tuple[tuple[str, str], ...]] = {
    SGD: (("momentum_buffer", "momentum"),),
    Adam: (("exp_avg", ""), ("exp_avg_sq", ""), ("max_exp_avg_sq", "amsgrad")),
    AdamW: (("exp_avg", ""), ("exp_avg_sq", ""), ("max_exp_avg_sq", "amsgrad")),
    Adamax: (("exp_avg", ""), ("exp_inf", "")),
    NAdam: (("exp_avg", ""), ("exp_avg_sq", ""), ("mu_product", "")),
    RMSprop: (("square_avg", ""), ("momentum_buffer", "momentum"), ("grad_avg", "centered")),
    Adagrad: (("sum", ""),),
    Adadelta: (("square_avg", ""), ("acc_delta", "")),
}
"""By optimizer, what it keeps of a parameter beside the count of steps, and the option that asks for it, if any."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a group of parameters is updated: what is the same in every step.

    Args:
        kind: the optimizer.
        numbers: names of the numbers, in order.
        slots: the state that each parameter has, in order, beside the count of steps.
        counts: whether the state holds a count of steps.
        decays: whether there is weight decay.
        decoupled: whether the decay is no part of the gradient.
        maximize: whether steps go up.
        nesterov: as of SGD.
    """

    kind: type[Optimizer]
    numbers: tuple[str, ...]
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
    return _NUMBERS.get(type(optimizer))


def rule_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Rule:
    """The rule of a group of parameters."""
    kind = type(optimizer)
    numbers = tuple(n for name in _NUMBERS[kind] for n in (("beta1", "beta2") if name == "betas" else (name,)))
    slots = tuple(slot for slot, option in _SLOTS[kind] if not option or group[option])
    # Before torch 2.7 AdamW is no Adam, and its groups do not say what it is.
    decoupled = bool(group.get("decoupled_weight_decay", kind is AdamW))
    return Rule(
        kind,
        numbers,
        slots,
        kind is not SGD,
        bool(group["weight_decay"]),
        decoupled,
        bool(group["maximize"]),
        bool(group.get("nesterov")),
    )


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
    old = [tensor.to(wide) for tensor in (parameter, *state)]
    given = dict(zip(rule.numbers, numbers.unbind(), strict=True))
    now, slope = old[0], -gradient.to(wide) if rule.maximize else gradient.to(wide)
    if rule.decays and rule.decoupled:
        now = now * (1 - given["lr"] * given["weight_decay"]).to(wide)
    elif rule.decays:
        slope = slope + given["weight_decay"].to(wide) * now
    case = _Case(rule, now, slope, dict(zip(rule.slots, old[1:], strict=True)), step, given)
    change = _CHANGES[rule.kind](case)
    for target, before, after in zip((parameter, *state), old, (now - change, *case.state.values()), strict=True):
        target.copy_(after if bad is None else torch.where(bad, before, after))


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One parameter in one step.

    Args:
        rule: of its group.
        now: the parameter.
        slope: its gradient.
        state: its slots by name; a change puts the new ones in their places.
        step: the count of steps.
        numbers: by name, in float64.
    """

    rule: Rule
    now: Tensor
    slope: Tensor
    state: dict[str, Tensor]
    step: Tensor | None
    numbers: Mapping[str, Tensor]

    def number(self, value: Tensor) -> Tensor:
        """A number in the dtype of the parameter."""
        return value.to(self.now.dtype)

    def of(self, name: str) -> Tensor:
        """A number of the group in the dtype of the parameter."""
        return self.number(self.numbers[name])

    @property
    def count(self) -> Tensor:
        assert self.step is not None
        return self.step.double()

    def mean(self, slot: str, decay: Tensor, value: Tensor) -> Tensor:
        """Move a running mean towards a value."""
        self.state[slot] = self.state[slot] + (value - self.state[slot]) * self.number(1 - decay)
        return self.state[slot]

    def squares(self, slot: str, decay: Tensor, value: Tensor) -> Tensor:
        """Take a square into a running mean of squares."""
        self.state[slot] = self.state[slot] * self.number(decay) + value * value * self.number(1 - decay)
        return self.state[slot]


def _sgd(case: _Case) -> Tensor:
    slope = case.slope
    if "momentum_buffer" in case.state:
        momentum, kept = case.of("momentum"), case.number(1 - case.numbers["dampening"])
        case.state["momentum_buffer"] = buffer = case.state["momentum_buffer"] * momentum + kept * slope
        slope = slope + momentum * buffer if case.rule.nesterov else buffer
    return case.of("lr") * slope


def _adam(case: _Case) -> Tensor:
    n = case.numbers
    first = case.mean("exp_avg", n["beta1"], case.slope)
    second = case.squares("exp_avg_sq", n["beta2"], case.slope)
    if "max_exp_avg_sq" in case.state:
        case.state["max_exp_avg_sq"] = second = torch.maximum(case.state["max_exp_avg_sq"], second)
    bound = second.sqrt() / case.number((1 - n["beta2"] ** case.count).sqrt()) + case.of("eps")
    return case.number(n["lr"] / (1 - n["beta1"] ** case.count)) * (first / bound)


def _adamax(case: _Case) -> Tensor:
    n = case.numbers
    first = case.mean("exp_avg", n["beta1"], case.slope)
    bound = torch.maximum(case.state["exp_inf"] * case.of("beta2"), case.slope.abs() + case.of("eps"))
    case.state["exp_inf"] = bound
    return case.number(n["lr"] / (1 - n["beta1"] ** case.count)) * (first / bound)


def _nadam(case: _Case) -> Tensor:
    n = case.numbers
    first = case.mean("exp_avg", n["beta1"], case.slope)
    second = case.squares("exp_avg_sq", n["beta2"], case.slope)
    bound = (second / case.number(1 - n["beta2"] ** case.count)).sqrt() + case.of("eps")
    now, later = (
        n["beta1"] * (1 - 0.5 * 0.96 ** (step * n["momentum_decay"])) for step in (case.count, case.count + 1)
    )
    product = case.state["mu_product"].double() * now
    case.state["mu_product"] = case.number(product)
    by_slope, by_mean = n["lr"] * (1 - now) / (1 - product), n["lr"] * later / (1 - product * later)
    return case.number(by_slope) * (case.slope / bound) + case.number(by_mean) * (first / bound)


def _rmsprop(case: _Case) -> Tensor:
    n = case.numbers
    squares = case.squares("square_avg", n["alpha"], case.slope)
    if "grad_avg" in case.state:
        squares = squares - case.mean("grad_avg", n["alpha"], case.slope).square()
    step = case.slope / (squares.sqrt() + case.of("eps"))
    if "momentum_buffer" in case.state:
        case.state["momentum_buffer"] = step = case.state["momentum_buffer"] * case.of("momentum") + step
    return case.of("lr") * step


def _adagrad(case: _Case) -> Tensor:
    n = case.numbers
    case.state["sum"] = case.state["sum"] + case.slope * case.slope
    rate = n["lr"] / (1 + (case.count - 1) * n["lr_decay"])
    return case.number(rate) * (case.slope / (case.state["sum"].sqrt() + case.of("eps")))


def _adadelta(case: _Case) -> Tensor:
    n, epsilon = case.numbers, case.of("eps")
    squares = case.squares("square_avg", n["rho"], case.slope)
    step = (case.state["acc_delta"] + epsilon).sqrt() / (squares + epsilon).sqrt() * case.slope
    case.squares("acc_delta", n["rho"], step)
    return case.of("lr") * step


_CHANGES: dict[type[Optimizer], Callable[[_Case], Tensor]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    Adamax: _adamax,
    NAdam: _nadam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
    Adadelta: _adadelta,
}
"""By optimizer what is subtracted from the parameter, after decay; the state of the case becomes the new one."""
