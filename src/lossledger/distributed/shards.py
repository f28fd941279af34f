"""Tensors of which each rank has a part: put together for a checkpoint, and divided again from one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def is_part(value: Any) -> bool:
    """Whether a value is a DTensor, of which this rank has a part."""
    return hasattr(value, "device_mesh")


def gathered(value: Any, kept: bool) -> Any:
    """A tree whose DTensors are whole, on the host; one at a time is on the device, and all ranks ask.

    Args:
        value: dicts, lists and tuples of anything.
        kept: whether this rank wants them; in their place it has `None` otherwise.
    """
    if is_part(value):
        whole = value.detach().full_tensor()
        return whole.cpu() if kept else None
    if isinstance(value, Mapping) and not isinstance(value, Counter):
        return {name: gathered(part, kept) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(gathered(part, kept) for part in value)
    return value


def as_part(value: Tensor, like: Any) -> Tensor:
    """A whole tensor divided over the ranks as another one is; itself where that is whole, or where it is divided."""
    if not is_part(like) or is_part(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def as_whole(part: Tensor, like: Any) -> Tensor:
    """The DTensor of which this is the part of this rank, divided as another one is; itself where that is whole."""
    if not is_part(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def divided_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer, each tensor divided as its parameter is; counters of steps have another shape.

    Which kernels update, and where steps are counted, is up to the devices of this run, not to those of the saved one.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def divided(value: Any, like: Tensor) -> Any:
        return as_part(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value

    own = {
        index: {name: divided(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    groups = [
        saved | {name: group[name] for name in ("fused", "capturable") if name in group and name in saved}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "state": own, "param_groups": groups}
