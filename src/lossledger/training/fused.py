"""Steps of torch's fused optimizers without what torch.optim prepares anew for each: some seventy Python calls.

The kernels and their arguments are those that torch.optim itself calls. Whatever is not the plain case (hooks,
schedulers that count steps, parameters without a gradient, tensors as learning rates) takes the optimizer's own `step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

_GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = (
    torch_optimizer._global_optimizer_pre_hooks,
    torch_optimizer._global_optimizer_post_hooks,
)
# The state that the kernels of an optimizer take.
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
STATES: dict[type[Optimizer], tuple[str, ...]] = {SGD: ("momentum_buffer",), Adam: _MOMENTS, AdamW: _MOMENTS}


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """One group of parameters with its state, in the lists that a kernel takes."""

    group: dict[str, Any]
    parameters: list[Tensor]
    states: list[list[Tensor]]
    decoupled: bool


class FusedStep:
    """The step of one fused optimizer.

    Args:
        optimizer: of torch, with a fused kernel and set to use it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state: Any = None
        self._prepared: list[_Prepared] = []

    def __call__(self, bad: Tensor) -> None:
        """Step, except where `bad`, a bool on the device, is set."""
        flag = bad.to(torch.float32)
        optimizer: Any = self._optimizer
        gradients = self._gradients()
        if gradients is None:
            optimizer.found_inf, optimizer.grad_scale = flag, None
            optimizer.step()
            # Left behind, the flag would silence the caller's own later steps.
            del optimizer.found_inf, optimizer.grad_scale
            self._prepare()
            return
        kernel = _sgd if type(optimizer) is SGD else _adam
        with torch.no_grad():
            for prepared, grads in zip(self._prepared, gradients, strict=True):
                kernel(prepared, grads, flag)

    def forget(self) -> None:
        """Prepare anew with the next step."""
        self._state, self._prepared = None, []

    def _gradients(self) -> list[list[Tensor]] | None:
        """The gradients by group; `None` where this step is not the plain case that was prepared."""
        optimizer: Any = self._optimizer
        if optimizer.state is not self._state or len(optimizer.param_groups) != len(self._prepared):
            return None
        # A scheduler counts steps by a `step` of the instance.
        if "step" in vars(optimizer) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return None
        if _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1]:
            return None
        found = []
        for prepared, group in zip(self._prepared, optimizer.param_groups, strict=True):
            if group is not prepared.group or not _is_plain(group):
                return None
            grads = [p.grad for p in prepared.parameters]
            for gradient in grads:
                if gradient is None:
                    return None
            found.append(grads)
        return found  # type: ignore[return-value]

    def _prepare(self) -> None:
        """The lists of the next steps, once the optimizer has made its state."""
        optimizer: Any = self._optimizer
        self._state, self._prepared = None, []
        if type(optimizer) not in STATES:
            return
        prepared = []
        for group in optimizer.param_groups:
            parameters = list(group["params"])
            slots = STATES[type(optimizer)] if group.get("momentum") != 0 else ()
            states = [[optimizer.state.get(p, {}).get(slot) for p in parameters] for slot in slots]
            kinds = {(p.device, p.dtype) for p in parameters}
            if len(kinds) != 1 or not _is_plain(group) or any(s is None for of_slot in states for s in of_slot):
                return
            # Before torch 2.7 AdamW is no Adam, and its groups do not say what it is.
            decoupled = group.get("decoupled_weight_decay", type(optimizer) is AdamW)
            prepared.append(_Prepared(group, parameters, states, decoupled))
        self._state, self._prepared = optimizer.state, prepared


def _is_plain(group: dict[str, Any]) -> bool:
    numbers = (group["lr"], *group.get("betas", ()))
    for number in numbers:
        if isinstance(number, Tensor):
            return False
    return bool(group.get("fused")) and not (
        group.get("amsgrad") or group.get("capturable") or group.get("differentiable")
    )


def _adam(prepared: _Prepared, grads: list[Tensor], flag: Tensor) -> None:
    group = prepared.group
    averages, squares, steps = prepared.states
    # A step that is left out does not count.
    torch._foreach_add_(steps, [flag.logical_not()] * len(steps))
    kernel: Any = torch._fused_adamw_ if prepared.decoupled else torch._fused_adam_
    kernel(
        prepared.parameters,
        grads,
        averages,
        squares,
        [],
        steps,
        amsgrad=False,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        grad_scale=None,
        found_inf=flag,
    )


def _sgd(prepared: _Prepared, grads: list[Tensor], flag: Tensor) -> None:
    group = prepared.group
    torch._fused_sgd_(
        prepared.parameters,
        grads,
        prepared.states[0] if prepared.states else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
        grad_scale=None,
        found_inf=flag,
    )


def clear_gradients(optimizer: Optimizer) -> None:
    """`zero_grad`, without its Python calls where it is torch's own."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad(set_to_none=True)
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
