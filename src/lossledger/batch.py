"""One batch of data, and the structures of arrays that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossledger.errors import InputTypeError
from lossledger.weighting import as_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch of data.

    Args:
        x: what the model is called with: a tensor, a dict or a tuple of tensors.
        y: targets, in the structure of the outputs; `None` for prediction.
        sample_weight: `[B]` or as the entries, for all outputs or by output.
        mask: as `sample_weight`, bool.
        groups: integer group ids, `[B]` or one an entry, by which a window can divide its loss (`by="group"`); or for
            `fit` and `evaluate` a dict by kind, such as `{"site": ids}`, of a name or number for each sample.
        ids: `[B]`, which samples of the data set these are, if known.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    mask: Any = None
    groups: Any = None
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
    # Most values are a tensor, and every step comes through here.
    if isinstance(value, Tensor):
        return fn(value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: map_structure(fn, part) for key, part in value.items()}
    if isinstance(value, tuple) or (isinstance(value, list) and holds_arrays(value)):
        return rebuilt(value, [map_structure(fn, part) for part in value])
    return fn(value)


def rebuilt(like: Sequence[Any], parts: list[Any]) -> Any:
    """The parts as a list, a tuple or a named tuple, as `like` is one."""
    if isinstance(like, list):
        return parts
    return type(like)._make(parts) if hasattr(like, "_make") else tuple(parts)


def holds_arrays(value: Sequence[Any]) -> bool:
    """Whether a list or tuple is a structure of arrays; one of numbers, or of lists of numbers, is a single array.

    The first part decides: a value that stands for no array (`None`) is never a number.
    """
    if not value:
        return False
    first = value[0]
    if isinstance(first, list | tuple):
        return holds_arrays(first)
    return first is None or isinstance(first, Mapping) or _is_array(first)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) or (hasattr(value, "__array__") and not isinstance(value, np.generic))


def to_tensor(value: Any, what: str, dtype: torch.dtype) -> Tensor:
    """An array as a tensor; floating NumPy arrays take the dtype of the model, tensors keep their own."""
    tensor = as_tensor(value, what)
    if not isinstance(value, Tensor) and tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor


def as_batch(item: Any, position: int) -> Batch:
    """A batch from what an iterable gives: `(x, y)`, `(x, y, sample_weight)`, or a `Batch`.

    Raises:
        InputTypeError: something else.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, list | tuple) and 2 <= len(item) <= 3:
        return Batch(item[0], item[1], item[2] if len(item) == 3 else None)
    raise InputTypeError(
        f"batch {position}: Data is expected to be in format (x, y), (x, y, sample_weight) or a lossledger.Batch; "
        f"received {type(item).__name__}{_inside(item)}"
    )


def _inside(item: Any) -> str:
    """The end of a sentence about what is no batch: how long it is, or its keys."""
    if isinstance(item, Mapping):
        return _by_key(item)
    return f" of {len(item)}." if isinstance(item, list | tuple) else "."


# What keys are called whose values are targets or weights; what else there is goes into the model.
_TARGETS = ("y", "label", "labels", "target", "targets", "y_true")
_WEIGHTS = ("sample_weight", "sample_weights", "weight", "weights")


def _by_key(item: Mapping[Any, Any]) -> str:
    """The keys of a dict that was given as a batch, and a line that makes a batch of such dicts."""
    keys = list(item)
    received = f" with the keys {', '.join(map(repr, keys))}." if keys else " without keys."
    if len(keys) < 2:
        return f"{received} Give inputs and targets, for example lossledger.Batch(x, y)."
    target = next((key for name in _TARGETS for key in keys if str(key).lower() == name), keys[-1])
    weight = next((key for name in _WEIGHTS for key in keys if key != target and str(key).lower() == name), None)
    inputs = [key for key in keys if key not in (target, weight)]
    # A model takes one input by its position, several by their names.
    x = f"b[{inputs[0]!r}]" if len(inputs) == 1 else f"{{key: b[key] for key in ({', '.join(map(repr, inputs))})}}"
    parts = ", ".join([x, *(f"b[{key!r}]" for key in (target, weight) if key is not None)])
    return (
        f"{received} Give the tuple or lossledger.Batch instead, from a DataLoader by its collate_fn, for example: "
        f"def collate(samples): b = torch.utils.data.default_collate(samples); return lossledger.Batch({parts})"
    )


def as_batches(given: Any) -> list[Batch]:
    """The micro-batches of a window.

    Raises:
        InputTypeError: one batch that stands in no list, or something that holds no batches.
    """
    single = isinstance(given, Batch) or (isinstance(given, list | tuple) and bool(given) and _is_array(given[0]))
    if single or not isinstance(given, Iterable):
        received = "one batch" if single else type(given).__name__
        raise InputTypeError(
            f"batches: expected an iterable of micro-batches, received {received}. Put a single one in a list: [batch]."
        )
    return [as_batch(item, i) for i, item in enumerate(given)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device of the model."""
    if device.type == "cpu":
        return batch

    def move(a: Any) -> Any:
        return a.to(device, non_blocking=True) if isinstance(a, Tensor) else a

    return Batch(
        map_structure(move, batch.x),
        map_structure(move, batch.y),
        map_structure(move, batch.sample_weight),
        map_structure(move, batch.mask),
        map_structure(move, batch.groups),
        batch.ids,
    )
