"""Gradients of a window, summed over the ranks once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lossledger.distributed.group import Group, any_of, bits
from lossledger.distributed.ranks import buckets
from lossledger.distributed.wrappers import local, managed
from lossledger.errors import InputError


def sum_gradients(group: Group, net: nn.Module) -> None:
    """Each gradient becomes its sum over the ranks; what no rank used stays `None`.

    Gradients of `fully_shard` are sums already.

    Raises:
        InputError: a sparse gradient, which has no fixed size to add up.
    """
    done = managed(net)
    parameters = {n: p for n, p in net.named_parameters() if p.requires_grad and id(p) not in done}
    for name, parameter in parameters.items():
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise InputError(
                f"parameter {name!r}: expected a dense gradient, received a sparse one, which ranks cannot add up. "
                "Use Embedding(sparse=False)."
            )
    if not parameters:
        return
    used = any_of(group.agree(*bits([p.grad is not None for p in parameters.values()])), len(parameters))
    gradients: list[Tensor] = []
    for parameter, anywhere in zip(parameters.values(), used, strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(local(parameter.grad))
    for bucket in buckets(gradients):
        flat = group.sum_(torch.cat([g.reshape(-1) for g in bucket]))
        parts = torch.split(flat, [g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def same_start(group: Group, net: nn.Module) -> None:
    """Weights and buffers of all ranks as on rank 0; what is sharded is one model already."""
    done = managed(net)
    group.broadcast_(local(p) for p in net.parameters() if id(p) not in done)
    same_buffers(group, net)


def same_buffers(group: Group, net: nn.Module) -> None:
    """Buffers (running statistics) of all ranks as on rank 0."""
    group.broadcast_(local(b) for b in net.buffers())
