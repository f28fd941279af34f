"""Weights on disk: safetensors, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from lossledger.errors import InputError
from lossledger.ledger.segments import publish


def state(net: nn.Module) -> dict[str, Any]:
    """All parameters and buffers by name, also the buffers that `state_dict` leaves out."""
    kept = net.state_dict()
    return {**kept, **{name: buffer for name, buffer in net.named_buffers() if name not in kept}}


def put(net: nn.Module, values: Mapping[str, Any]) -> None:
    """Put back what `state` told.

    Raises:
        RuntimeError: weights of another model.
    """
    kept = net.state_dict().keys()
    buffers = {name: buffer for name, buffer in net.named_buffers() if name not in kept}
    net.load_state_dict({name: value for name, value in values.items() if name not in buffers})
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, values[name].to(buffer.device, copy=True))


def save(net: nn.Module, path: str | Path) -> None:
    """Write weights and buffers to a temporary file, then put it in place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    state = {name: value.detach().contiguous().clone() for name, value in net.state_dict().items()}
    safetensors.torch.save_file(state, str(temporary))
    publish(temporary, target)


def load(net: nn.Module, path: str | Path) -> None:
    """Read weights and buffers that `save` wrote.

    Raises:
        InputError: no such file, or weights of another model.
    """
    if not Path(path).is_file():
        raise InputError(f"load_weights: expected a safetensors file, found none at {path}.")
    try:
        net.load_state_dict(safetensors.torch.load_file(str(path)))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"load_weights: {path} does not fit this model. {error}") from None
