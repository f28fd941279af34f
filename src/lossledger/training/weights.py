"""Weights on disk: safetensors, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor

from lossledger.distributed import as_part, full
from lossledger.errors import InputError
from lossledger.forward import Forward
from lossledger.ledger.segments import publish


def whole(forward: Forward) -> dict[str, Tensor]:
    """Copies of weights and buffers; sharded ones are gathered, so all ranks ask."""
    return {name: full(value.detach()).contiguous().clone() for name, value in forward.state().items()}


def save(state: dict[str, Tensor], path: str | Path) -> None:
    """Write weights and buffers to a temporary file, then put it in place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    safetensors.torch.save_file(state, str(temporary))
    publish(temporary, target)


def load(forward: Forward, path: str | Path) -> None:
    """Read weights and buffers that `save` wrote.

    Raises:
        InputError: no such file, or weights of another model.
    """
    if not Path(path).is_file():
        raise InputError(f"load_weights: expected a safetensors file, found none at {path}.")
    known = forward.state()
    try:
        state = safetensors.torch.load_file(str(path))
        forward.load({name: as_part(value, known.get(name)) for name, value in state.items()})
    except safetensors.SafetensorError as error:
        raise InputError(
            f"load_weights: expected a safetensors file, received {path}, which is none ({error}). What Keras or torch "
            "wrote, they read: model.net.load_weights(path), or model.net.load_state_dict(torch.load(path))."
        ) from None
    except InputError as error:
        raise InputError(f"load_weights: {path} does not fit this model. {error}") from None
