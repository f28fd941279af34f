"""Weights on disk: safetensors, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import nn

from lossledger.errors import InputError


def save(net: nn.Module, path: str | Path) -> None:
    """Write weights and buffers to a temporary file, then put it in place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    state = {name: value.detach().contiguous().clone() for name, value in net.state_dict().items()}
    safetensors.torch.save_file(state, str(temporary))
    temporary.replace(target)


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
