"""Predictions: what a module returns for all of the data, as NumPy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossledger.batch import Batch, map_structure, rebuilt, to_device
from lossledger.distributed import at_rest, is_sharded
from lossledger.errors import EmptyDataError, InputTypeError
from lossledger.forward import Call, run_forward
from lossledger.objective import unpacked
from lossledger.training import memory
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
    inputs: Iterable[Any]
    count = steps
    if is_arrays(x):
        data = array_data(x, dtype=dtype)
        count = data.steps(batch_size) if steps is None else steps
        inputs = (batch.x for batch in data.batches(batch_size, None))
        joined = Joined(data.length if steps is None else min(data.length, steps * batch_size))
    else:
        inputs = (_inputs(item, dtype, position) for position, item in enumerate(x))
        joined = Joined(None)
    # What fully_shard gathers in inference mode cannot be used in a later training step.
    still = torch.no_grad() if is_sharded(net) else torch.inference_mode()
    with evaluating(net), still, memory.kept(device, count):
        for one in itertools.islice(inputs, steps):
            here = one if device.type == "cpu" else to_device(Batch(one), device).x
            joined.add(unpacked(run_forward(forward, here, autocast, device.type))[0])
    at_rest(net)
    return joined.whole()


class Joined:
    """Outputs of batches, end to end, as NumPy arrays.

    Args:
        samples: how many there will be, if that is known: the outputs are then written to their place as they come.

    Example:
        >>> joined = Joined(3)
        >>> for batch in (torch.tensor([1.0, 2.0]), torch.tensor([3.0])):
        ...     joined.add({"mean": batch})
        >>> joined.whole()
        {'mean': array([1., 2., 3.], dtype=float32)}
    """

    def __init__(self, samples: int | None) -> None:
        self._samples, self._filled = samples, 0
        self._places: Any = None
        self._parts: list[Any] = []

    def add(self, outputs: Any) -> None:
        """One more batch."""
        if self._samples is not None and self._filled == 0 and not self._parts:
            self._places = _places(outputs, self._samples)
        if self._places is not None:
            rows = _filled(self._places, outputs, self._filled)
            if rows is not None:
                self._filled += rows
                return
            # Outputs that change from batch to batch have no place: what is known of them goes on as parts.
            self._parts, self._places = [self._written()], None
        self._parts.append(map_structure(_to_numpy, outputs))

    def whole(self) -> Any:
        """All batches.

        Raises:
            EmptyDataError: there was none.
        """
        if self._places is not None:
            return self._written()
        if not self._parts:
            raise EmptyDataError("predict: the data gave no batch; expected at least one.")
        return _concatenate(self._parts)

    def _written(self) -> Any:
        def told(place: Tensor) -> np.ndarray[Any, Any]:
            return place.numpy() if len(place) == self._filled else place[: self._filled].clone().numpy()

        return map_structure(told, self._places)


def _places(outputs: Any, samples: int) -> Any:
    """Room for so many samples of these outputs; `None` where one of them has no samples, or is no tensor."""
    rows: set[int] = set()

    def place(output: Any) -> Any:
        if not isinstance(output, Tensor) or output.ndim == 0 or output.layout != torch.strided:
            rows.update((-1, -2))
            return None
        rows.add(len(output))
        return torch.empty((samples, *output.shape[1:]), dtype=_plain(output.dtype))

    found = map_structure(place, outputs)
    return found if len(rows) == 1 else None


def _filled(places: Any, outputs: Any, start: int) -> int | None:
    """Write a batch to its place: its number of rows; `None` where it does not fit."""
    pairs: list[tuple[Tensor, Tensor]] = []
    if not _paired(places, outputs, pairs):
        return None
    rows = pairs[0][1].shape[:1]
    for place, output in pairs:
        fits = output.shape[:1] == rows and output.shape[1:] == place.shape[1:] and output.ndim == place.ndim
        if not fits or _plain(output.dtype) != place.dtype or start + rows[0] > len(place):
            return None
    for place, output in pairs:
        place[start : start + rows[0]].copy_(output)
    return rows[0]


def _paired(places: Any, outputs: Any, pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Each place with its output; whether the structures are the same."""
    if isinstance(places, Tensor):
        pairs.append((places, outputs))
        return isinstance(outputs, Tensor)
    if places is None or outputs is None:
        return places is outputs
    if isinstance(places, Mapping):
        alike = isinstance(outputs, Mapping) and places.keys() == outputs.keys()
        return alike and all(_paired(place, outputs[name], pairs) for name, place in places.items())
    return (
        type(places) is type(outputs)
        and len(places) == len(outputs)
        and all(_paired(place, output, pairs) for place, output in zip(places, outputs, strict=True))
    )


def _plain(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the result: NumPy has no bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"predict: the model must return tensors, received {type(tensor).__name__}.")
    return tensor.to("cpu", _plain(tensor.dtype)).numpy()


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
