"""Where batches come from: arrays in memory, or any iterable of batches. Both are checked once, at the boundary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossledger.batch import Batch, as_batch, holds_arrays, leaves, map_structure, to_tensor
from lossledger.errors import EmptyDataError, InputError, InputTypeError
from lossledger.training.named import Names
from lossledger.weighting import as_mask

# Batches that are taken from arrays together: one call for many small ones, and few bytes beside a large one.
AT_ONCE = 64
AT_ONCE_BYTES = 2**20


def _slicer(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda a: a[start:stop]


def _picker(ids: Tensor) -> Callable[[Tensor], Tensor]:
    # Arrays may lie on a device already, and the order of the samples does not.
    return lambda a: a.index_select(0, ids if a.device == ids.device else ids.to(a.device, non_blocking=True))


def _taker(start: int, stop: int, order: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What takes the samples from `start` to `stop` of an order out of an array, and their numbers."""
    if order is None:
        return _slicer(start, stop), torch.arange(start, stop)
    return _picker(order[start:stop]), order[start:stop]


def _converter(what: str, dtype: torch.dtype) -> Callable[[Any], Tensor]:
    return lambda value: to_tensor(value, what, dtype)


def _column(part: Any, take: Callable[[Tensor], Tensor], size: int) -> Iterable[Any]:
    """Some samples of an array, or of a structure of arrays, by batches of a size; `None` for each without any."""
    if part is None:
        return itertools.repeat(None)
    if isinstance(part, Tensor):
        # Parts that autograd takes for tensors of their own: a model may write into its inputs.
        return take(part).unsafe_split(size)
    taken = map_structure(take, part)
    first = next(leaves(taken), None)
    if first is None:
        return itertools.repeat(taken)
    return (map_structure(_slicer(start, start + size), taken) for start in range(0, len(first), size))


@dataclass(frozen=True, slots=True, eq=False)
class ArrayData:
    """Data in memory: every array has the samples on its first axis.

    Args:
        x: inputs.
        y: targets.
        sample_weight: weights.
        mask: masks.
        length: number of samples.
        groups: by kind, the number of each sample's group.
        names: of these groups, if there are any.
    """

    x: Any
    y: Any
    sample_weight: Any
    mask: Any
    length: int
    groups: Any = None
    names: Names | None = None

    def steps(self, batch_size: int) -> int:
        """Number of batches of an epoch."""
        return -(-self.length // batch_size)

    def batches(self, batch_size: int, order: Tensor | None, taken: int = 0) -> Iterator[Batch]:
        """The batches of an epoch but the first `taken`, in the given order of the samples; the last may be smaller."""
        several = self._at_once(batch_size, order)
        for first in range(taken - taken % several, self.steps(batch_size), several):
            take, ids = _taker(first * batch_size, min((first + several) * batch_size, self.length), order)
            columns = [_column(part, take, batch_size) for part in (self.x, self.y, self.sample_weight, self.mask)]
            # What a run that goes on has seen is passed over: its batches must lie in memory where they lay.
            yield from itertools.islice(
                map(Batch, *columns, _column(self.groups, take, batch_size), ids.unsafe_split(batch_size)),
                max(0, taken - first),
                None,
            )

    def _at_once(self, batch_size: int, order: Tensor | None) -> int:
        """How many batches are taken from the arrays in one call for each, and divided: few where they are copies."""
        if order is None:
            return AT_ONCE
        arrays = leaves([self.x, self.y, self.sample_weight, self.mask, self.groups])
        sample = sum(a.element_size() * a.numel() // self.length for a in arrays)
        return max(1, min(AT_ONCE, AT_ONCE_BYTES // max(1, sample * batch_size)))

    def between(self, start: int, stop: int, order: Tensor | None) -> Batch:
        """The batch of the samples from `start` to `stop` of the given order."""
        return self._taken(*_taker(start, stop, order))

    def kept(self, batch: Batch) -> Any:
        """The little that `again` makes one of these batches from: kept instead of it, it holds none of its arrays."""
        return batch.ids

    def again(self, kept: Any) -> Batch:
        """The batch of which `kept` told, on the processor."""
        return self._taken(_picker(kept), kept)

    def _taken(self, take: Callable[[Tensor], Tensor], ids: Tensor) -> Batch:
        return Batch(
            map_structure(take, self.x),
            map_structure(take, self.y),
            map_structure(take, self.sample_weight),
            map_structure(take, self.mask),
            None if self.groups is None else map_structure(take, self.groups),
            ids=ids,
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
            map_structure(take, self.groups),
            self.names,
        )


def array_data(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    mask: Any = None,
    dtype: torch.dtype = torch.float32,
    position: int | None = None,
) -> ArrayData:
    """Arrays as data, checked.

    Args:
        x: inputs.
        y: targets.
        sample_weight: weights.
        mask: masks.
        dtype: dtype of floating NumPy arrays.
        position: which batch of an iterable this is; `None`: all of the data.

    Raises:
        EmptyDataError: no sample.
        InputError: arrays of different lengths, or a weight that is not finite.
        InputTypeError: something that is no array.
    """
    where = "" if position is None else f"batch {position}: "
    given = {"x": x, "y": y, "sample_weight": sample_weight, "mask": mask}
    parts = {name: map_structure(_converter(f"{where}{name}", dtype), value) for name, value in given.items()}
    parts["mask"] = map_structure(lambda m: as_mask(m, f"{where}mask"), parts["mask"])
    length = _common_length(parts, where)
    check_weights(parts["sample_weight"], parts["mask"], where, waiting=position is None)
    return ArrayData(parts["x"], parts["y"], parts["sample_weight"], parts["mask"], length)


def _common_length(parts: Mapping[str, Any], where: str) -> int:
    """Number of samples, the same in every array."""
    lengths = {name: [int(a.shape[0]) if a.ndim else -1 for a in leaves(v)] for name, v in parts.items()}
    if not lengths["x"]:
        raise EmptyDataError(f"{where}x: expected at least one array, received none.")
    length = lengths["x"][0]
    if length == -1:
        raise InputError(f"{where}x: expected the samples on the first axis, received a scalar. Pass an array of them.")
    for name, found in lengths.items():
        for other in found:
            if other != length:
                received = "a scalar" if other == -1 else f"{other}"
                raise InputError(
                    f"Data cardinality is ambiguous: {where}{name}: expected {length} samples on the first axis, as in "
                    f"x; received {received}. Every array has the samples on its first axis."
                )
    if length == 0:
        raise EmptyDataError(
            f"{where}x: expected at least one sample, received an array of length 0. Check how it was sliced."
        )
    return length


def check_weights(sample_weight: Any, mask: Any, where: str, waiting: bool) -> None:
    """Weights are finite where the mask lets them count: one that is not would reach every number of its step.

    Args:
        sample_weight: converted weights, in the structure of the outputs.
        mask: converted masks.
        where: the batch, for the message.
        waiting: check also what lies on a device, and wait for the answer.

    Raises:
        InputError: NaN or infinity, with the position of the first such sample.
        InputTypeError: complex weights.
    """
    for key, weight in _named(sample_weight):
        if weight.is_complex():
            raise InputTypeError(
                f"{where}sample_weight: expected real numbers, received dtype {weight.dtype}. Pass its real part."
            )
        if not weight.is_floating_point() or not (waiting or weight.device.type == "cpu"):
            continue
        bad = ~torch.isfinite(weight)
        if not bool(bad.any()):
            continue
        masks = [m for name, m in _named(mask) if name in (key, ())]
        counted = _at_samples(bad, masks[0] if masks else None)
        if bool(counted.any()):
            sample = int(counted.nonzero()[0])
            raise InputError(
                f"{where}sample_weight: expected finite numbers, received {_first_bad(weight[sample])} at sample "
                f"{sample} ({int(counted.sum())} such samples in all). Use 0, or a mask, for what must not count."
            )


def _named(value: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors of a structure with the keys and indices that lead to them."""
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _named(part, (*key, name))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _named(part, (*key, index))


def _at_samples(bad: Tensor, mask: Tensor | None) -> Tensor:
    """Which samples have a bad weight that the mask lets count, `[B]`."""
    if mask is not None:
        rank = max(bad.ndim, mask.ndim)
        wide, open_ = (t.reshape(*t.shape, *(1,) * (rank - t.ndim)) for t in (bad, mask))
        # Shapes that do not fit each other are refused where those of the loss are known.
        if all(m == n or 1 in (m, n) for m, n in zip(wide.shape, open_.shape, strict=True)):
            bad = wide & open_.to(wide.device)
    return bad.reshape(bad.shape[0], -1).any(1)


def _first_bad(weights: Tensor) -> float:
    return float(weights[~torch.isfinite(weights)].reshape(-1)[0])


def is_arrays(x: Any) -> bool:
    """Whether `x` is data in memory rather than an iterable of batches.

    A tuple is data in memory. A list is a structure of arrays, or one array of numbers, unless its items are batches:
    `Batch`es, or lists or tuples of arrays.
    """
    if isinstance(x, Tensor | np.ndarray | Mapping) or hasattr(x, "__array__"):
        return True
    if not isinstance(x, list | tuple) or not x:
        return False
    first = x[0]
    if isinstance(first, Batch):
        return False
    return isinstance(x, tuple) or not (isinstance(first, list | tuple) and holds_arrays(first))


def read_batch(item: Any, dtype: torch.dtype, position: int) -> Batch:
    """A batch from what an iterable gives: `(x, y)`, `(x, y, sample_weight)`, or a `Batch`.

    Raises:
        InputTypeError: something else.
        InputError: arrays of different lengths.
    """
    batch = as_batch(item, position)
    data = array_data(batch.x, batch.y, batch.sample_weight, batch.mask, dtype, position)
    return Batch(data.x, data.y, data.sample_weight, data.mask, batch.groups, batch.ids)


@dataclass(frozen=True, slots=True, eq=False)
class IterableData:
    """Batches from any iterable: a DataLoader, a list of batches, a generator.

    Args:
        source: the iterable.
        dtype: dtype of floating NumPy arrays.
        names: of the groups that batches carry.
    """

    source: Iterable[Any]
    dtype: torch.dtype
    names: Names = field(default_factory=Names)

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
        return self.read(self.opened(), 0)

    def kept(self, batch: Batch) -> Any:
        """The batch itself: nothing else can make it `again`."""
        return batch

    def again(self, kept: Any) -> Batch:
        """The batch of which `kept` told."""
        return kept  # type: ignore[no-any-return]

    @property
    def has_state(self) -> bool:
        """Whether the iterable tells and takes its own state, as torchdata's StatefulDataLoader does."""
        return all(callable(getattr(self.source, name, None)) for name in ("state_dict", "load_state_dict"))

    def opened(self) -> Iterator[Any]:
        """An iterator of the source.

        One with a state of its own has its own randomness: what opening it draws from torch's generator, which is not
        the same for a loader that was put back to a state, must not reach the model.
        """
        if not self.has_state:
            return iter(self.source)
        with torch.random.fork_rng(devices=[]):
            return iter(self.source)

    def read(self, items: Iterable[Any], position: int) -> Iterator[Batch]:
        """Batches from items of the source; the first of them is the one at `position`."""
        for offset, item in enumerate(items):
            batch = read_batch(item, self.dtype, position + offset)
            if isinstance(batch.groups, Mapping):
                groups = self.names.codes(batch.groups, batch.size, f"batch {position + offset}: ")
                batch = replace(batch, groups=groups)
            yield batch


Data = ArrayData | IterableData


def check_kind(x: Any) -> None:
    """`x` can be data at all.

    Raises:
        EmptyDataError: `None`.
        InputTypeError: neither arrays nor an iterable.
    """
    if x is None:
        raise EmptyDataError("x: expected arrays or an iterable of batches, received None.")
    if not is_arrays(x) and (not isinstance(x, Iterable) or isinstance(x, str | bytes)):
        raise InputTypeError(
            f"x: expected arrays or an iterable of batches, received {type(x).__name__}. "
            "Convert it to an array, or wrap a data set in a DataLoader."
        )


def make_data(x: Any, y: Any, sample_weight: Any, mask: Any, dtype: torch.dtype, groups: Any = None) -> Data:
    """Data from what a user passed to `fit` or `evaluate`.

    Raises:
        InputError: targets beside an iterable of batches, or none beside arrays.
        InputTypeError: neither arrays nor an iterable.
    """
    check_kind(x)
    if is_arrays(x):
        if y is None:
            if isinstance(x, list) and isinstance(x[0], Mapping):
                as_batch(x[0], 0)
            raise InputError(
                "y: expected targets beside the arrays x, received None. Pass y, or a list (not a tuple) of batches "
                "(x, y)."
            )
        return with_groups(array_data(x, y, sample_weight, mask, dtype), groups)
    for name, value in (("y", y), ("sample_weight", sample_weight), ("mask", mask), ("groups", groups)):
        if value is not None:
            raise InputError(
                f"{name}: x is an iterable of batches, which carry their own; received {name} beside it. "
                "Yield (x, y, sample_weight), or lossledger.Batch(x, y, sample_weight, mask, groups)."
            )
    try:
        if len(x) == 0:  # type: ignore[arg-type]
            raise EmptyDataError("x: expected at least one batch, received an iterable of length 0.")
    except TypeError:
        pass
    return IterableData(x, dtype)


def with_groups(data: ArrayData, groups: Any) -> ArrayData:
    """The data with named groups of samples.

    Raises:
        InputTypeError: no dict by kind.
        InputError: as `Names.codes`.
    """
    if groups is None:
        return data
    if not isinstance(groups, Mapping):
        raise InputTypeError(
            f"groups: expected a dict by kind, such as {{'site': ids}}, received {type(groups).__name__}."
        )
    names = Names()
    return replace(data, groups=names.codes(groups, data.length), names=names)


def order_of(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, a function of the seed and the epoch alone."""
    # Seeds of neighbouring epochs must not collide between runs whose seeds are neighbours.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(length, generator=generator)
