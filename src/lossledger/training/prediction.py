"""Predictions: what a module returns for all of the data, as NumPy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossledger.batch import Batch, map_structure, rebuilt, to_device
from lossledger.distributed import at_rest, is_sharded
from lossledger.errors import EmptyDataError, InputTypeError
from lossledger.forward import Call, run_forward
from lossledger.objective import unpacked
from lossledger.training.data import array_data, check_kind, is_arrays
from lossledger.training.modes import evaluating


def predict(
    net: nn.Module,
    forward: Call,
    x: Any,
    batch_size: int,
    steps: int | None,
    autocast: torch.dtype | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """The outputs for all batches, joined; the module is in evaluation mode meanwhile.

    Raises:
        EmptyDataError: the data gave no batch.
        InputTypeError: data that cannot be read, or the module returned something else than tensors.
    """
    check_kind(x)
    if is_arrays(x):
        inputs = (b.x for b in array_data(x, dtype=dtype).batches(batch_size, None))
    else:
        inputs = (_inputs(item, dtype, position) for position, item in enumerate(x))
    found = []
    # What fully_shard gathers in inference mode cannot be used in a later training step.
    still = torch.no_grad() if is_sharded(net) else torch.inference_mode()
    with evaluating(net), still:
        for one in itertools.islice(inputs, steps):
            outputs = run_forward(forward, to_device(Batch(one), device).x, autocast, device.type)
            found.append(map_structure(_to_numpy, unpacked(outputs)[0]))
    at_rest(net)
    if not found:
        raise EmptyDataError("predict: the data gave no batch; expected at least one.")
    return _concatenate(found)


def _to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"predict: the model must return tensors, received {type(tensor).__name__}.")
    return tensor.float().cpu().numpy() if tensor.dtype == torch.bfloat16 else tensor.cpu().numpy()


def _concatenate(found: list[Any]) -> Any:
    first = found[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: _concatenate([part[key] for part in found]) for key in first}
    if isinstance(first, list | tuple):
        return rebuilt(first, [_concatenate([part[i] for part in found]) for i in range(len(first))])
    # A number beside the outputs has no samples to join: one for each batch.
    return np.concatenate(found) if first.ndim else np.stack(found)


def _inputs(item: Any, dtype: torch.dtype, position: int) -> Any:
    """The inputs of a batch: alone, as a loader without targets gives them (`[x]`), or the first of `(x, y)`."""
    if isinstance(item, Batch):
        x = item.x
    else:
        x = item[0] if isinstance(item, list | tuple) and 1 <= len(item) <= 3 else item
    return array_data(x, dtype=dtype, position=position).x
