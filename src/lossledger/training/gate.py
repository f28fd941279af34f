"""The gate: an update that is not finite reaches neither weights nor optimizer nor buffers.

The flag stays on the device. Fused kernels leave a step out by themselves when a flag says so (the hook of torch's
gradient scaler). Other optimizers run, and what they changed is put back where the flag is set: exact, at the price of
a copy of weights and state for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossledger.distributed import local
from lossledger.tally import Tally
from lossledger.training.fused import STATES, FusedStep
from lossledger.values import not_finite


class Gate:
    """Guards the steps of one optimizer.

    Args:
        net: the module.
        optimizer: if it is one of torch's with a fused kernel and nobody chose otherwise, it is switched to it.
        parameters: the trainable parameters.
        running: what the forward pass changes (running statistics), guarded too.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        parameters: tuple[nn.Parameter, ...],
        running: Sequence[Tensor],
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._buffers = list(running)
        self._kept: list[Tensor] = []
        prefer_fused(net, optimizer)
        count_on_device(optimizer)
        # The flag is a plain tensor, which kernels do not take beside sharded parameters.
        whole = all(local(p) is p for p in parameters)
        fused = whole and all(group.get("fused") for group in optimizer.param_groups)
        self._fused = FusedStep(optimizer) if fused else None
        self._found, self._one = torch.zeros(()), torch.ones(())

    def bad(self, parameters: tuple[nn.Parameter, ...], sums: Sequence[Tensor] = ()) -> Tensor:
        """Whether any gradient, or any of some sums, is not finite, on the device."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        # Gradients that a fused kernel takes are whole and dense.
        numbers: list[Any] = [_plain(gradient) for gradient in gradients] if self._fused is None else gradients
        numbers += sums
        if not numbers:
            return torch.zeros((), dtype=torch.bool)
        device = numbers[0].device
        if self._found.device != device:
            self._found, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        self._found.zero_()
        try:
            # One call, that of gradient scaling: by 1 it leaves every number as it is.
            torch._amp_foreach_non_finite_check_and_unscale_(numbers, self._found, self._one)
        except RuntimeError:
            # It takes no complex or expanded gradients, nor several devices.
            return not_finite(torch.stack([norm.to(device) for norm in torch._foreach_norm(numbers)]).sum())
        return self._found > 0

    def before_forward(self) -> None:
        """Keep the buffers as they are."""
        self._kept = [b.detach().clone() for b in self._buffers]

    def step(self, bad: Tensor) -> None:
        """Step the optimizer, except where `bad`, a bool on the device, is set."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(bad, kept, buffer))
        if self._fused is None:
            self._step_and_restore(bad)
        else:
            self._fused(bad)

    def forget(self) -> None:
        """Somebody else has put other tensors into the state of the optimizer."""
        if self._fused is not None:
            self._fused.forget()

    def _step_and_restore(self, bad: Tensor) -> None:
        # The model may have been moved since.
        count_on_device(self._optimizer)
        before = [t.detach().clone() for t in self._changing()]
        for parameter in self._parameters:
            # State that this very step makes has nothing to go back to: it must at least be finite.
            if parameter.grad is not None and not parameter.grad.is_sparse:
                gradient = local(parameter.grad)
                gradient.copy_(torch.where(bad, torch.zeros_like(gradient), gradient))
        self._optimizer.step()
        with torch.no_grad():
            for now, kept in zip(self._changing(), before, strict=False):
                now.copy_(torch.where(bad.to(now.device), kept, now))

    def _changing(self) -> list[Tensor]:
        """Parameters, then the tensors of the optimizer's state, in an order that only grows."""
        found: list[Tensor] = [local(p) for p in self._parameters]
        for parameter in self._parameters:
            state = self._optimizer.state.get(parameter, {})
            found += [local(value) for value in state.values() if isinstance(value, Tensor)]
        return found


def _plain(gradient: Tensor) -> Tensor:
    """The numbers that this process holds of a gradient."""
    gradient = local(gradient)
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def prefer_fused(net: nn.Module, optimizer: Optimizer) -> None:
    """Run a plain optimizer of torch by its fused kernel: the same update, faster, and it can be gated."""
    sparse = any(getattr(module, "sparse", False) for module in net.modules())
    if type(optimizer) not in STATES or optimizer.state or sparse:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") and local(p) is p for p in parameters)
    chosen = any(
        group.get(name) for group in optimizer.param_groups for name in ("foreach", "capturable", "differentiable")
    )
    undecided = all(group.get("fused") is None for group in optimizer.param_groups)
    if fits and undecided and not chosen:
        for group in optimizer.param_groups:
            group["fused"] = True


def count_on_device(optimizer: Optimizer) -> None:
    """Keep the step counters of unfused optimizers where the parameters are.

    On the host, where torch leaves them, a flag on the device would have to be read before one is put back.
    """
    if optimizer.state:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    on_device = all(p.device.type == "cuda" and local(p) is p for p in parameters)
    for group in optimizer.param_groups:
        if "capturable" in group and not (group.get("fused") or group.get("differentiable")):
            group["capturable"] = on_device


def bad_elements(tallies: dict[str, Tally]) -> Tensor:
    """Number of non-finite elements in all terms, on the device."""
    found = [torch.as_tensor(tally.nonfinite) for tally in tallies.values()]
    total = found[0]
    for other in found[1:]:
        total = total + other
    return total
