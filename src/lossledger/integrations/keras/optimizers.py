"""Optimizers of Keras: the same steps by torch's kernels where they can make them, else by Keras's own `apply`.

Adam of Keras puts ε beside √v before the correction of the second moment, torch after it:

    Keras:  w − lr · √(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε)
    torch:  w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε′)

They are one for ε′ = ε / √(1 − β₂ᵗ), which a hook sets before each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.optimizers.base_optimizer import BaseOptimizer
from torch import nn
from torch.optim import Optimizer

from lossledger.errors import EmptyDataError, InputError
from lossledger.integrations.keras import tree


def understood(given: Any, net: nn.Module) -> Any:
    """A name or an optimizer of Keras as an optimizer of torch; anything else as it is.

    Args:
        given: a name takes torch's kernels where they make the same steps; an object stays in charge of its own state
            and learning rate.
        net: the model.

    Raises:
        InputError: an optimizer that needs more than one call a step.
    """
    if isinstance(given, str):
        try:
            named = keras.optimizers.get(given)
        except ValueError:
            # The library's own error names what there is.
            return given
        variables = trained(net)
        make = _KERNELS.get(type(named).__name__)
        return Applied(named, variables) if make is None else make(named, [v.value for v in variables])
    return Applied(given, trained(net)) if isinstance(given, BaseOptimizer) else given


def trained(net: nn.Module) -> list[Any]:
    """The trainable variables; a parameter of a torch module becomes one that shares its memory.

    Raises:
        EmptyDataError: there is none.
    """
    known = {id(variable.value): variable for variable in tree.variables(net).values()}
    found = [
        known[id(parameter)] if id(parameter) in known else keras.Variable(parameter, name=name.replace(".", "_"))
        for name, parameter in tree.parameters(net).items()
    ]
    if not found:
        raise EmptyDataError("optimizer: the model has no trainable variable; expected at least one.")
    return found


# --- torch's kernels ---------------------------------------------------------------------------------------------


def _adam(named: Any, parameters: list[nn.Parameter]) -> Optimizer:
    fused = _fused(parameters)
    options: dict[str, Any] = {"lr": _rate(named), "betas": (named.beta_1, named.beta_2), "fused": fused}
    groups = [{"params": parameters, "epsilon": named.epsilon, "steps": 0}]
    decay = named.weight_decay
    made: Optimizer
    if decay is None:
        made = torch.optim.Adam(groups, **options)
    else:
        made = torch.optim.AdamW(groups, weight_decay=decay, **options)
    made.register_step_pre_hook(_place_epsilon)
    return made


def _place_epsilon(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        group["steps"] += 1
        group["eps"] = group["epsilon"] / math.sqrt(1 - group["betas"][1] ** group["steps"])


def _sgd(named: Any, parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=_rate(named), fused=_fused(parameters))


def _fused(parameters: list[nn.Parameter]) -> bool | None:
    """Whether torch has fused kernels where the parameters are; `None` leaves the choice to torch."""
    return True if all(p.device.type in ("cpu", "cuda") for p in parameters) else None


_KERNELS: dict[str, Callable[[Any, list[nn.Parameter]], Optimizer]] = {"Adam": _adam, "AdamW": _adam, "SGD": _sgd}


# --- Keras's own apply -------------------------------------------------------------------------------------------


class Applied(Optimizer):
    """An optimizer of Keras as one of torch: a step hands the gradients to its `apply`.

    Clipping, weight decay, schedules and constraints are Keras's. `param_groups[0]["lr"]` sets its learning rate, and
    a rate that is set on the Keras optimizer counts too.

    Args:
        optimizer: the optimizer; it is built here, and used, not copied.
        variables: the trainable variables.

    Raises:
        InputError: an optimizer that scales the loss, accumulates, or replaces the weights at the end.

    Source: keras.optimizers 3.15.
    """

    def __init__(self, optimizer: Any, variables: list[Any]) -> None:
        _refuse(optimizer)
        self.keras = optimizer
        self._variables = variables
        super().__init__([v.value for v in variables], {"lr": _rate(optimizer)})
        self._shown = self.param_groups[0]["lr"]
        if not optimizer.built:
            optimizer.build(variables)
        try:
            optimizer._check_variables_are_known(variables)
        except ValueError as error:
            raise InputError(
                f"optimizer: {type(optimizer).__name__} was built for other variables than those of this model; "
                "expected a new one. Make another instance, also after the trainable layers have changed."
            ) from error
        # What the gate puts back after a step that is left out, and what a checkpoint holds.
        self.state[variables[0].value] = {str(i): v.value for i, v in enumerate(optimizer.variables)}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of Keras's optimizer, with the gradients that there are."""
        rate = self.param_groups[0]["lr"]
        if rate != self._shown:
            self._set(rate)
        pairs = [(v.value.grad, v) for v in self._variables if v.value.grad is not None]
        with torch.no_grad():
            self.keras.apply([gradient for gradient, _ in pairs], [variable for _, variable in pairs])

    def _set(self, rate: float) -> None:
        if not isinstance(self.keras._learning_rate, keras.Variable):
            raise InputError(
                f"The learning rate of {type(self.keras).__name__} comes from a schedule; expected nothing else to set "
                f"it, received {rate!r}. Make it with a number, or leave the callback out."
            )
        self.keras.learning_rate = rate
        self._shown = rate

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state in place, in the order of the variables of Keras's optimizer."""
        saved = state_dict["state"][0]
        if len(saved) != len(self.keras.variables):
            raise InputError(
                f"optimizer: expected {len(self.keras.variables)} variables of {type(self.keras).__name__}, received "
                f"{len(saved)}. Load the state of the same optimizer and model."
            )
        for i, variable in enumerate(self.keras.variables):
            variable.assign(saved[str(i)])
        self.param_groups[0]["lr"] = self._shown = state_dict["param_groups"][0]["lr"]

    def __repr__(self) -> str:
        return f"Applied({type(self.keras).__name__})"


def _rate(optimizer: Any) -> float:
    """The learning rate now; that of the first step for a schedule."""
    return float(keras.ops.convert_to_tensor(optimizer.learning_rate))


def _refuse(optimizer: Any) -> None:
    name = type(optimizer).__name__
    reasons = {
        "scales the loss, which a gradient in closed form does not go through": optimizer.loss_scale_factor is not None
        or hasattr(optimizer, "inner_optimizer"),
        "accumulates gradients itself, and divides the last window wrongly; fit(accumulate=…) does not": bool(
            optimizer.gradient_accumulation_steps
        ),
        "averages the weights itself (use_ema); compile(ema=…) does, as Keras's fit": bool(optimizer.use_ema),
        "replaces the weights when training ends, which only Keras's fit calls": (
            type(optimizer).finalize_variable_values is not BaseOptimizer.finalize_variable_values
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"optimizer: {name} {reason}; expected an optimizer whose apply is all of a step. Make it without that."
            )
