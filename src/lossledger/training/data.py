"""Where batches come from: arrays in memory, or any iterable of batches. Both are checked once, at the boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossledger.errors import EmptyDataError, InputError, InputTypeError
from lossledger.weighting import as_mask, as_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch of data.

    Args:
        x: what the model is called with: a tensor, a dict or a tuple of tensors.
        y: targets, in the structure of the outputs; `None` for prediction.
        sample_weight: `[B]` or as the entries, for all outputs or by output.
        mask: as `sample_weight`, bool.
        ids: `[B]`, which samples of the data set these are, if known.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    mask: Any = None
    ids: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(next(leaves(self.x)).shape[0])


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors of a structure of dicts, lists and tuples."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    elif value is not None:
        yield value


def map_structure(fn: Callable[[Any], Any], value: Any) -> Any:
    """The structure with each array replaced by what `fn` makes of it."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: map_structure(fn, part) for key, part in value.items()}
    if isinstance(value, tuple) or (isinstance(value, list) and _holds_arrays(value)):
        return type(value)(map_structure(fn, part) for part in value) if type(value) in (list, tuple) else fn(value)
    return fn(value)


def _holds_arrays(value: Sequence[Any]) -> bool:
    """A list of arrays is a structure; a list of numbers or of lists is one array."""
    return bool(value) and all(isinstance(part, Tensor | np.ndarray | Mapping) for part in value)


def to_tensor(value: Any, what: str, dtype: torch.dtype) -> Tensor:
    """An array as a tensor; floating NumPy arrays take the dtype of the model, tensors keep their own."""
    tensor = as_tensor(value, what)
    if not isinstance(value, Tensor) and tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor


def _slicer(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda a: a[start:stop]


def _picker(ids: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda a: a.index_select(0, ids)


def _converter(what: str, dtype: torch.dtype) -> Callable[[Any], Tensor]:
    return lambda value: to_tensor(value, what, dtype)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayData:
    """Data in memory: every array has the samples on its first axis.

    Args:
        x: inputs.
        y: targets.
        sample_weight: weights.
        mask: masks.
        length: number of samples.
    """

    x: Any
    y: Any
    sample_weight: Any
    mask: Any
    length: int

    def steps(self, batch_size: int) -> int:
        """Number of batches of an epoch."""
        return -(-self.length // batch_size)

    def batches(self, batch_size: int, order: Tensor | None) -> Iterator[Batch]:
        """The batches of an epoch, in the given order of the samples; the last one may be smaller."""
        for start in range(0, self.length, batch_size):
            stop = min(start + batch_size, self.length)
            if order is None:
                ids = torch.arange(start, stop)
                yield self._batch(_slicer(start, stop), ids)
            else:
                ids = order[start:stop]
                yield self._batch(_picker(ids), ids)

    def _batch(self, take: Callable[[Tensor], Tensor], ids: Tensor) -> Batch:
        return Batch(
            map_structure(take, self.x),
            map_structure(take, self.y),
            map_structure(take, self.sample_weight),
            map_structure(take, self.mask),
            ids,
        )

    def part(self, start: int, stop: int) -> ArrayData:
        """The samples from `start` to `stop`."""
        take = _slicer(start, stop)
        return ArrayData(
            map_structure(take, self.x),
            map_structure(take, self.y),
            map_structure(take, self.sample_weight),
            map_structure(take, self.mask),
            stop - start,
        )


def array_data(
    x: Any, y: Any = None, sample_weight: Any = None, mask: Any = None, dtype: torch.dtype = torch.float32
) -> ArrayData:
    """Arrays as data, checked.

    Raises:
        EmptyDataError: no sample.
        InputError: arrays of different lengths.
        InputTypeError: something that is no array.
    """
    parts = {
        name: map_structure(_converter(name, dtype), value)
        for name, value in (("x", x), ("y", y), ("sample_weight", sample_weight), ("mask", mask))
    }
    parts["mask"] = map_structure(lambda m: as_mask(m, "mask"), parts["mask"])
    lengths = {name: [int(a.shape[0]) if a.ndim else -1 for a in leaves(v)] for name, v in parts.items()}
    if not lengths["x"]:
        raise EmptyDataError("x: expected at least one array, received none.")
    length = lengths["x"][0]
    for name, found in lengths.items():
        for other in found:
            if other != length:
                received = "a scalar" if other == -1 else f"{other}"
                raise InputError(
                    f"{name}: expected {length} samples on the first axis, as in x; received {received}. "
                    "Every array has the samples on its first axis."
                )
    if length == 0:
        raise EmptyDataError("x: expected at least one sample, received an array of length 0. Check how it was sliced.")
    return ArrayData(parts["x"], parts["y"], parts["sample_weight"], parts["mask"], length)


def is_arrays(x: Any) -> bool:
    """Whether `x` is data in memory rather than an iterable of batches."""
    if isinstance(x, Tensor | np.ndarray | Mapping):
        return True
    if isinstance(x, list | tuple) and x:
        return _holds_arrays(x) or (
            all(isinstance(part, int | float | list | tuple | np.generic) for part in x) and (not _is_batch_tuple(x[0]))
        )
    return False


def _is_batch_tuple(value: Any) -> bool:
    """A list of `(x, y)` pairs is an iterable of batches."""
    return isinstance(value, tuple) and any(isinstance(part, Tensor | np.ndarray | Mapping) for part in value)


def read_batch(item: Any, dtype: torch.dtype, position: int) -> Batch:
    """A batch from what an iterable gives: `(x, y)`, `(x, y, sample_weight)`, or a `Batch`.

    Raises:
        InputTypeError: something else.
        InputError: arrays of different lengths.
    """
    if isinstance(item, Batch):
        x, y, weight, mask = item.x, item.y, item.sample_weight, item.mask
    elif isinstance(item, list | tuple) and 2 <= len(item) <= 3:
        x, y, weight, mask = item[0], item[1], item[2] if len(item) == 3 else None, None
    else:
        raise InputTypeError(
            f"batch {position}: expected (x, y), (x, y, sample_weight) or a lossledger.Batch; received "
            f"{type(item).__name__}{f' of {len(item)}' if isinstance(item, list | tuple) else ''}."
        )
    data = array_data(x, y, weight, mask, dtype)
    ids = item.ids if isinstance(item, Batch) else None
    return Batch(data.x, data.y, data.sample_weight, data.mask, ids)


@dataclass(frozen=True, slots=True, eq=False)
class IterableData:
    """Batches from any iterable: a DataLoader, a list of batches, a generator.

    Args:
        source: the iterable.
        dtype: dtype of floating NumPy arrays.
    """

    source: Iterable[Any]
    dtype: torch.dtype

    @property
    def length(self) -> int | None:
        """Number of samples, which an iterable cannot tell."""
        return None

    def steps(self, batch_size: int) -> int | None:
        """Number of batches of an epoch, if the iterable has a length."""
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return None

    def batches(self, batch_size: int, order: Tensor | None) -> Iterator[Batch]:
        """The batches of an epoch."""
        for position, item in enumerate(self.source):
            yield read_batch(item, self.dtype, position)


Data = ArrayData | IterableData


def make_data(x: Any, y: Any, sample_weight: Any, mask: Any, dtype: torch.dtype, targets: bool = True) -> Data:
    """Data from what a user passed to `fit`, `evaluate` or `predict`.

    Raises:
        InputError: targets beside an iterable of batches, or none beside arrays.
        InputTypeError: neither arrays nor an iterable.
    """
    if x is None:
        raise EmptyDataError("x: expected arrays or an iterable of batches, received None.")
    if is_arrays(x):
        if y is None and targets:
            raise InputError("y: expected targets beside the arrays x, received None. Pass y, or batches of (x, y).")
        return array_data(x, y, sample_weight, mask, dtype)
    if not isinstance(x, Iterable) or isinstance(x, str):
        raise InputTypeError(f"x: expected arrays or an iterable of batches, received {type(x).__name__}.")
    for name, value in (("y", y), ("sample_weight", sample_weight), ("mask", mask)):
        if value is not None:
            raise InputError(
                f"{name}: x is an iterable of batches, which carry their own; received {name} beside it. "
                "Yield (x, y, sample_weight), or lossledger.Batch(x, y, sample_weight, mask)."
            )
    try:
        if len(x) == 0:  # type: ignore[arg-type]
            raise EmptyDataError("x: expected at least one batch, received an iterable of length 0.")
    except TypeError:
        pass
    return IterableData(x, dtype)


def order_of(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, a function of the seed and the epoch alone."""
    # Seeds of neighbouring epochs must not collide between runs whose seeds are neighbours.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(length, generator=generator)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device of the model."""
    if device.type == "cpu":
        return batch

    def move(a: Tensor) -> Tensor:
        return a.to(device, non_blocking=True)

    return Batch(
        map_structure(move, batch.x),
        map_structure(move, batch.y),
        map_structure(move, batch.sample_weight),
        map_structure(move, batch.mask),
        batch.ids,
    )
