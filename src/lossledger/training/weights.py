"""Weights on disk: safetensors, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from lossledger.errors import InputError
from lossledger.forward import Forward
from lossledger.ledger.segments import publish


def save(forward: Forward, path: str | Path) -> None:
    """Write weights and buffers to a temporary file, then put it in place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    state = {name: value.detach().contiguous().clone() for name, value in forward.state().items()}
    safetensors.torch.save_file(state, str(temporary))
    publish(temporary, target)


def load(forward: Forward, path: str | Path) -> None:
    """Read weights and buffers that `save` wrote.

    Raises:
        InputError: no such file, or weights of another model.
    """
    if not Path(path).is_file():
        raise InputError(f"load_weights: expected a safetensors file, found none at {path}.")
    try:
        forward.load(safetensors.torch.load_file(str(path)))
    except (InputError, safetensors.SafetensorError) as error:
        raise InputError(f"load_weights: {path} does not fit this model. {error}") from None
