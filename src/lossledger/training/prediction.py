"""Predictions: what a module returns for all of the data, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossledger.errors import EmptyDataError, InputTypeError
from lossledger.objective import Outputs
from lossledger.training.data import Batch, array_data, is_arrays, map_structure, to_device
from lossledger.training.step import Forward, run_forward


def predict(
    net: nn.Module,
    forward: Forward,
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
        InputTypeError: the module returned something else than tensors.
    """
    if is_arrays(x):
        inputs = (b.x for b in array_data(x, dtype=dtype).batches(batch_size, None))
    else:
        inputs = (item.x if isinstance(item, Batch) else _first(item, dtype) for item in x)
    found = []
    was_training = net.training
    net.eval()
    try:
        with torch.inference_mode():
            for index, one in enumerate(inputs):
                if steps is not None and index >= steps:
                    break
                outputs = run_forward(forward, to_device(Batch(one), device).x, autocast, device.type)
                outputs = outputs.outputs if isinstance(outputs, Outputs) else outputs
                found.append(map_structure(_to_numpy, outputs))
    finally:
        net.train(was_training)
    if not found:
        raise EmptyDataError("predict: the data gave no batch; expected at least one.")
    return _concatenate(found)


def _to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"predict: the model must return tensors, received {type(tensor).__name__}.")
    return tensor.float().cpu().numpy() if tensor.dtype == torch.bfloat16 else tensor.cpu().numpy()


def _concatenate(found: list[Any]) -> Any:
    first = found[0]
    if isinstance(first, Mapping):
        return {key: _concatenate([part[key] for part in found]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_concatenate([part[i] for part in found]) for i in range(len(first)))
    return np.concatenate(found)


def _first(item: Any, dtype: torch.dtype) -> Any:
    """The inputs of a batch: alone, or the first of `(x, y)`."""
    x = item[0] if isinstance(item, list | tuple) and 2 <= len(item) <= 3 else item
    return array_data(x, dtype=dtype).x
