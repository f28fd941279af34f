"""Sums over the elements of a cell: a large batch is worked through in parts of whole samples."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from lossledger.losses import backward
from lossledger.losses.aligned import Aligned
from lossledger.values import streams, sum_rows

# Below so many addends a sum by sample would be nearly as long as what is summed.
_LONG = 32


def parts_of(batch: Aligned) -> Iterator[Aligned]:
    """The batch, in parts of whole samples that fit in the cache with what is made of them, where it is large.

    What a part writes to its weighting's buffers is gone with the next part.
    """
    raw = batch.prediction.raw
    if not streams(raw):
        yield batch
        return
    scratch = backward.scratch_of_thread()
    length = max(backward.PART // prod(raw.shape[1:]), 1)
    for start in range(0, len(raw), length):
        scratch.take_back()
        yield batch.part(slice(start, start + length), scratch)


def with_samples(shape: tuple[int, ...], keep: tuple[int, ...]) -> tuple[int, ...]:
    """The axes to keep, and that of the samples before them where a sample has many addends.

    It hangs on shapes alone: a sum over samples of sums has the same bits whether somebody wants those of samples too.

    Example:
        >>> with_samples((16, 64, 64, 5), (3,)), with_samples((16, 5), (1,))
        ((0, 3), (1,))
    """
    if 0 in keep or prod(shape[1:]) < _LONG * prod([shape[axis] for axis in keep]):
        return keep
    return (0, *keep)


def summed(values: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Σ over all axes but `keep`, in the order of the axes."""
    axes = tuple(axis for axis in range(values.ndim) if axis not in keep)
    if axes and keep == (0, values.ndim - 1) and streams(values):
        return sum_rows(values.flatten(1, -2))
    return values.sum(axes) if axes else values


def counted(mask: Tensor | None, shape: tuple[int, ...], keep: tuple[int, ...], like: Tensor) -> Tensor:
    """How many elements are unmasked, over all axes but `keep`.

    Args:
        mask: broadcasts to the shape, in the rank of it; `None`: all are unmasked.
        shape: of the elements.
        keep: axes.
        like: on the device of the result.
    """
    left = tuple(shape[axis] for axis in keep)
    axes = tuple(axis for axis in range(len(shape)) if axis not in keep)
    if mask is None:
        return like.new_full((), prod([shape[axis] for axis in axes]), dtype=torch.int64).expand(left)
    # A number that stands for several along an axis is looked at once.
    repeats = prod([shape[axis] for axis in axes if mask.shape[axis] == 1])
    found = mask.sum(axes) * repeats if axes else mask.long()
    return found.expand(left)


def narrowed(values: Tensor, axes: tuple[int, ...], keep: tuple[int, ...]) -> Tensor:
    """Sums that kept `axes`, summed over those that `keep` lacks."""
    rest = tuple(position for position, axis in enumerate(axes) if axis not in keep)
    return values.sum(rest) if rest else values
