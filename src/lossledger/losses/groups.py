"""How the elements of a batch divide over groups: by column and presence, by label, by sample, by given ids.

Each function takes weighted elements (`[B, d…, C]`, detached) and returns the rows of `tally.Groups`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.tally import Groups
from lossledger.values import streams, sum_rows
from lossledger.weighting import Weighting

# From here on float32 does not hold every whole number.
_EXACT = 2**24


class AndSamples(str):
    """A kind of groups, and beside it the groups by sample of the same elements: a step computes them once.

    Losses that sum elements leave in `taken`, by term, the groups and the batch; who wants them takes them out. Where a
    batch is worked through in parts of whole samples, `look` sees each while it is in the cache, and what it tells of
    the samples is left in `seen`. Masked outputs may hold anything; where sums are not finite, it sees harmless ones.

    >>> AndSamples("class") == "class", AndSamples("class").taken
    (True, {})
    """

    taken: dict[str, tuple[Groups, Aligned]]
    seen: dict[str, dict[str, Tensor]]
    look: Callable[[Aligned], dict[str, Tensor]] | None

    def __new__(cls, kind: str) -> AndSamples:
        """The kind, with nothing taken yet."""
        made = super().__new__(cls, kind)
        made.taken, made.seen, made.look = {}, {}, None
        return made

    def leave(self, groups: Groups, batch: Aligned, seen: Sequence[dict[str, Tensor]] = ()) -> None:
        """Leave the groups by sample of a batch, and what `look` told of its parts, in order."""
        self.taken[batch.where] = groups, batch
        if seen and seen[0]:
            self.seen[batch.where] = {name: torch.cat([one[name] for one in seen]) for name in seen[0]}


@lru_cache(64)
def keys_of(size: int, presences: tuple[str, ...] = ("",)) -> tuple[tuple[int, str], ...]:
    """The keys of so many classes, made once: with many of them, a step would spend its time on their names.

    >>> keys_of(2, ("present", "absent"))
    ((0, 'present'), (1, 'present'), (0, 'absent'), (1, 'absent'))
    """
    return tuple((index, presence) for presence in presences for index in range(size))


@lru_cache(8)
def keys_of_samples(samples: int, classes: int) -> tuple[tuple[int, str], ...]:
    """The keys of the classes of each sample.

    >>> keys_of_samples(2, 1)
    ((0, 'class 0'), (1, 'class 0'))
    """
    return tuple((sample, f"class {index}") for sample in range(samples) for index in range(classes))


def column_sums(values: Tensor) -> Tensor:
    """Σ over all axes but the last, `[C]`.

    >>> column_sums(torch.ones(3, 4, 2)).tolist()
    [12.0, 12.0]
    """
    return sum_rows(values.reshape(-1, values.shape[-1]))


def present(y_true: Tensor, weighting: Weighting) -> Tensor:
    """Where a target says that its class is there: bools, or 0 and 1 in the dtype of large targets."""
    if not (streams(y_true) and y_true.is_floating_point()):
        return y_true > 0.5
    out = weighting.kept(y_true)
    return torch.gt(y_true, 0.5, out=torch.empty_like(y_true) if out is None else out)


def _count(inside: Tensor) -> Tensor:
    """How many are set in each column, of bools or of 0 and 1."""
    if inside.numel() // max(inside.shape[-1], 1) >= _EXACT:
        return inside.reshape(-1, inside.shape[-1]).sum(0, dtype=torch.int64)
    # Sums of bools along the first axis are slow; float32 holds counts below 2²⁴ exactly.
    return column_sums(inside if inside.is_floating_point() else inside.float()).long()


def _columns(values: Tensor | None, weighting: Weighting, device: torch.device) -> Tensor:
    """Σ over all axes but the last of something that broadcasts to the elements; their number for `None`."""
    columns = weighting.shape[-1]
    if values is None:
        return torch.full((columns,), prod(weighting.shape[:-1]), dtype=torch.int64, device=device)
    if values.shape == weighting.shape:
        return _count(values) if values.dtype == torch.bool else column_sums(values)
    if values.shape[-1] == 1 and values.numel() > 1:
        # The same in each column.
        whole = values.sum() * (prod(weighting.shape[:-1]) // values.numel())
        return whole.expand(columns)
    return values.expand(weighting.shape).reshape(-1, columns).sum(0)


def _each_once(
    rows: Callable[[Tensor | None], Tensor], weighted: Tensor, total: Tensor, weighting: Weighting
) -> list[Tensor]:
    """Rows of numerator, total, count and weight; what is one tensor, or all ones, is summed once."""
    known: dict[int, Tensor] = {}
    sums = []
    for values in (weighted, total, weighting.mask, weighting.product):
        if id(values) not in known:
            known[id(values)] = rows(values)
        sums.append(known[id(values)])
    return sums


def _split(values: Tensor | None, weighted: Tensor, weighting: Weighting, presence: Tensor | None) -> Tensor:
    """The rows of `by_column` for values that broadcast to the elements; their number for `None`."""
    # No function inside another that calls itself: such a circle would keep the batch until it is collected.
    columns, device = weighting.shape[-1], weighted.device
    if values is not None and values.numel() == columns == values.shape[-1] and weighting.shape != values.shape:
        # One weight a column: no pass over the elements.
        number = _split(None, weighted, weighting, presence)
        return number * (values.reshape(-1) if presence is None else values.reshape(-1).repeat(2))
    whole = _columns(values, weighting, device)
    if presence is None:
        return whole
    if values is None or values is weighting.mask:
        # The target of a masked element is 0: it is absent.
        part = _count(presence)
    else:
        wide = weighting.product_for(weighted) if values is weighting.product else values
        assert wide is not None
        part = column_sums(torch.mul(wide, presence, out=weighting.passing(weighted)))
    return torch.cat((part, whole - part))


def by_column(kind: str, weighted: Tensor, total: Tensor, weighting: Weighting, presence: Tensor | None) -> Groups:
    """Rows by column of the class axis; with `presence` (see `present`) each is split in two.

    Rows are in the order column 0 … C−1 (present, where split), then column 0 … C−1 absent.
    """
    columns = weighting.shape[-1]
    rows = functools.partial(_split, weighted=weighted, weighting=weighting, presence=presence)
    sums = _each_once(rows, weighted, total, weighting)
    keys = keys_of(columns) if presence is None else keys_of(columns, ("present", "absent"))
    return Groups(kind, keys, sums[0], sums[1], sums[2], sums[3])


def by_index(
    kind: str,
    index: Tensor,
    keys: tuple[tuple[int, str], ...] | None,
    size: int,
    weighted: Tensor,
    total: Tensor,
    weighting: Weighting,
) -> Groups:
    """Rows by an integer index of each entry, `[B, d…]`; entries whose index is outside `[0, size)` are masked."""
    columns = weighting.shape[-1]
    flat = index.reshape(-1)
    # Ignored labels carry weight 0, but their index must still be one that exists.
    flat = flat.clamp(0, size - 1)

    def scatter(values: Tensor | None) -> Tensor:
        if values is None:
            ones = torch.full_like(flat, columns)
            return torch.zeros(size, dtype=torch.int64, device=flat.device).index_add_(0, flat, ones)
        if values.shape != weighting.shape:
            values = values.expand(weighting.shape)
        entries = values.reshape(-1, columns).sum(-1)
        return torch.zeros(size, dtype=entries.dtype, device=flat.device).index_add_(0, flat, entries)

    sums = _each_once(scatter, weighted, total, weighting)
    return Groups(kind, keys, sums[0], sums[1], sums[2], sums[3])


def of_cells(
    kind: str, shape: tuple[int, ...], by_class: bool, numerator: Tensor, count: Tensor, divisor: Tensor
) -> Groups:
    """Rows of a ratio, by class or by sample, from sums that are kept apart that far.

    Args:
        kind: "sample"; anything else is by class.
        shape: of the elements.
        by_class: every class is a cell of its own; then each sample has a row for each.
        numerator: of the rows.
        count: of the rows.
        divisor: of the rows.
    """
    samples, classes = shape[0], shape[-1]
    keys: tuple[tuple[int, str], ...] | None = keys_of(classes)
    if kind == "sample":
        keys = keys_of_samples(samples, classes) if by_class else None
    cell = tuple(range(classes)) * (samples if kind == "sample" else 1) if by_class else None
    rows = [values.reshape(-1) for values in (numerator, count, divisor)]
    return Groups(kind, keys, rows[0], rows[0], rows[1], rows[2], cell)


def by_sample(weighted: Tensor, total: Tensor, weighting: Weighting) -> Groups:
    """One row a sample, in order."""
    samples, device = weighting.shape[0], weighted.device
    elements = prod(weighting.shape[1:])

    def rows(values: Tensor | None) -> Tensor:
        if values is None:
            return torch.full((samples,), elements, dtype=torch.int64, device=device)
        # What repeats along an axis is summed once.
        own = values.reshape(*(1,) * (len(weighting.shape) - values.ndim), *values.shape).flatten(1)
        whole, repeats = own.sum(1), elements // max(own.shape[1], 1)
        return (whole if repeats == 1 else whole * repeats).expand(samples)

    sums = _each_once(rows, weighted, total, weighting)
    return Groups("sample", None, sums[0], sums[1], sums[2], sums[3])


def entry_ids(ids: Tensor, entries: tuple[int, ...], where: str) -> tuple[Tensor, tuple[tuple[int, str], ...]]:
    """Given group ids, `(B,)` or a leading part of the entries, as an index for each entry, and the keys.

    Reads the ids on the host: this is for a call, not for the step of a training loop.

    Raises:
        InputError: ids of another shape, or ids that are not integers.
    """
    if ids.is_floating_point() or ids.is_complex():
        raise InputError(f"{where}: group ids given as `by` must be integers, received dtype {ids.dtype}.")
    if ids.ndim == 0 or tuple(ids.shape) != entries[: ids.ndim]:
        raise InputError(
            f"{where}: group ids given as `by` must have the shape of the leading axes of the entries {entries}; "
            f"received {tuple(ids.shape)}."
        )
    names, index = torch.unique(ids, return_inverse=True)
    index = index.reshape(*ids.shape, *(1,) * (len(entries) - ids.ndim)).expand(entries)
    return index, tuple((int(name), "") for name in names)
