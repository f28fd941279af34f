"""Modules that know of other ranks: DistributedDataParallel and FSDP2, and what they must not do inside a window.

A window divides by what all ranks counted, so gradients are summed, never averaged. This is the one place that says so
to the wrappers of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _of(net: nn.Module, kind: str) -> list[Any]:
    # They need ranks; a walk over the modules at each window would cost more than the rest of it.
    if not dist.is_available() or not dist.is_initialized():
        return []
    if kind == "fsdp":
        from torch.distributed.fsdp import FSDPModule

        return [module for module in net.modules() if isinstance(module, FSDPModule)]
    return [module for module in net.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]


def unwrapped(net: nn.Module) -> nn.Module:
    """The module inside of a DistributedDataParallel: its own synchronization is not needed."""
    return net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net


def is_sharded(net: nn.Module) -> bool:
    """Whether parameters are sharded by `fully_shard`."""
    return bool(_of(net, "fsdp"))


def in_lockstep(net: nn.Module) -> bool:
    """Whether forwards talk to other ranks, so that all ranks must run as many of them."""
    return is_sharded(net) or any(isinstance(module, nn.SyncBatchNorm) for module in net.modules())


def at_rest(net: nn.Module) -> None:
    """Parameters sharded again: the outermost module keeps them gathered after a forward without a backward."""
    for module in _of(net, "fsdp"):
        module.reshard()


def managed(net: nn.Module) -> set[int]:
    """The parameters whose gradients FSDP2 sums, by `id`."""
    at_rest(net)
    found = set()
    for module in _of(net, "fsdp"):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            found |= {id(one.sharded_param) for one in group.fsdp_params}
    return found


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: all of it, unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor; of a DTensor, gathered, so every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def clip_norm_(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients so that the norm of all of them is at most `most`; returns the norm before, plain."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = full(nn.utils.get_total_norm(gradients))
    # Each rank scales its own parts: one plain factor beside parts that may be empty.
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(g) for g in gradients], factor)
    return norm


def place_gradients(net: nn.Module) -> None:
    """Gradients of sharded parameters divided as these are: what a penalty gives may lie on every rank in full."""
    for parameter in net.parameters():
        sharded: Any = parameter
        if parameter.grad is not None and local(parameter) is not parameter:
            parameter.grad = sharded.grad.redistribute(sharded.device_mesh, sharded.placements)


@contextlib.contextmanager
def summing(net: nn.Module | None) -> Iterator[None]:
    """Wrappers sum gradients or leave them alone meanwhile; none of them averages."""
    if net is None:
        yield
        return
    for module in _of(net, "fsdp"):
        # The factor of a module is its own: children do not inherit it.
        set_factor = getattr(module, "set_gradient_divide_factor", None) or module.set_reduce_scatter_divide_factor
        set_factor(1.0)
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    with contextlib.ExitStack() as stack:
        for module in _of(net, "ddp"):
            stack.enter_context(module.no_sync())
            # The first forward would broadcast buffers, for which a rank without data does not come.
            before, module.require_forward_param_sync = module.require_forward_param_sync, False
            stack.callback(setattr, module, "require_forward_param_sync", before)
        yield
