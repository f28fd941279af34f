"""Tallies whose bits do not depend on how the data was cut, given the same bits of the predictions.

Two things make the last bits of a sum depend on the split. Additions round, so their order shows; and some kernels of
torch (sigmoid, softplus, powers, sums over an axis) give other bits at another place of an array, or beside others.
Here each sample is tallied alone, as a batch of one in one thread, and the numbers of the samples are added on the
fixed grids of `lossledger.tally.Grid`, which rounds each of them once, at 2^-60, whatever it is added to.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.prediction import Prediction
from lossledger.tally import GRID, Grid, Tally
from lossledger.weighting import Weighting

if TYPE_CHECKING:
    from lossledger.losses.loss import By, Loss

# What of a tally and of its groups adds up in floating point.
_SUMS = ("numerator", "divisor", "weight", "statistics")
_ROWS = ("numerator", "total", "weight")


def check_reproducible(loss: Loss, where: str) -> None:
    """The loss of a sample does not depend on the samples beside it.

    Raises:
        InputError: it does.
    """
    if not loss.additive:
        raise InputError(
            f"{where}: reproducible=True: expected a loss of single samples, received one that compares the samples of "
            "a batch, so its value depends on the batches themselves. Use reproducible=False."
        )


def reproducible_tally(loss: Loss, batch: Aligned, by: By = None) -> Tally:
    """The tally of an aligned batch on a grid, without a graph.

    Args:
        loss: whose tally it is.
        batch: the batch.
        by: groups, see `Loss.tally`.

    Raises:
        InputError: a loss that compares samples, or one number for a batch of which nobody said what it stands for.
    """
    check_reproducible(loss, batch.where)
    raw = batch.prediction.raw
    size = raw.shape[0] if raw.ndim else 1
    # Whoever wants rows of samples beside the groups must not be given those of a batch of one.
    by = str(by) if isinstance(by, str) else by
    with torch.no_grad(), _one_thread(raw.device):
        if batch.late is not None and loss.scalar is None and loss._elements(batch).ndim == 1:
            raise InputError(
                f"{batch.where}: reproducible=True: expected one value per sample or entry, or a declared scalar; "
                "received one number for a batch. Wrap it: lossledger.losses.FunctionLoss(fn, scalar='mean') or "
                "scalar='sum'."
            )
        tallies = [
            loss.tally_aligned(_sample(batch, i, size), by[i : i + 1] if isinstance(by, Tensor) else by)
            for i in range(size)
        ]
        if not tallies:
            return _on_grid([loss.tally_aligned(batch, by)]).tally()
        if isinstance(by, Tensor):
            # Each sample has rows of its own, which are found by their keys.
            return functools.reduce(operator.add, (_on_grid([tally]) for tally in tallies)).tally()
        if by == "sample":
            return _on_grid([shifted(tally, i) for i, tally in enumerate(tallies)], apart=True).tally()
        return _on_grid(tallies).tally()


def shifted(tally: Tally, start: int) -> Tally:
    """A tally whose rows are named by sample, with the samples numbered from `start`."""
    groups = tally.groups
    if groups is None or groups.kind != "sample" or groups.keys is None:
        return tally
    if tally.grid is not None:
        return tally.grid.map(lambda part: shifted(part, start)).tally()
    keys = tuple((start + int(str(sample)), column) for sample, column in groups.keys)
    return replace(tally, groups=replace(groups, keys=keys))


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """One thread meanwhile: several cut a large sample where their number says."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def _sample(batch: Aligned, index: int, size: int) -> Aligned:
    """One sample as a batch of its own, in memory as any other batch of one."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            return value
        return value[index : index + 1].contiguous()

    weights, late = batch.weighting, batch.late
    rank = len(weights.shape)
    # A weight of fewer axes is one by column.
    mask, weight = (cut(v) if v is not None and v.ndim == rank else v for v in (weights.mask, weights.weight))
    return replace(
        batch,
        y_true=cut(batch.y_true),
        prediction=Prediction(cut(batch.prediction.raw.detach())),
        weighting=Weighting((1, *weights.shape[1:]) if rank else (), mask, weight),
        late=None if late is None else replace(late, sample_weight=cut(late.sample_weight), mask=cut(late.mask)),
    )


def _on_grid(tallies: Sequence[Tally], apart: bool = False) -> Grid:
    """The sum of tallies that have the same rows, or rows `apart`; each number is an entry of the grid."""
    first, device = tallies[0], tallies[0].numerator.device
    groups = first.groups
    columns = [[getattr(tally, name) for tally in tallies] for name in _SUMS]
    if groups is not None:
        columns += [[getattr(tally.groups, name) for tally in tallies] for name in _ROWS]
    # Whole numbers of Python add without rounding as they are.
    fractions = [i for i, column in enumerate(columns) if column[0] is not None and not isinstance(column[0], int)]
    stacked = [torch.stack([torch.as_tensor(v, device=device).double() for v in columns[i]]) for i in fractions]
    rest = torch.cat([values.reshape(len(tallies), -1) for values in stacked], 1)
    parts, size = [], rest.new_zeros(())
    for position, step in enumerate(GRID):
        # Adding 0 makes one zero of the two.
        high = (rest / step).round() * step + 0.0
        # NaN and infinity stay what they are, in the first part alone.
        rest = torch.where(rest.isfinite(), rest - high, 0.0)
        split = torch.split(high, [values[0].numel() for values in stacked], 1)
        sums: list[Any] = [_whole(column) if position == 0 else _none(column[0]) for column in columns]
        for i, values, piece in zip(fractions, stacked, split, strict=True):
            kept = apart and i >= len(_SUMS)
            sums[i] = piece.reshape(-1) if kept else piece.sum(0).reshape(values.shape[1:])
        if position == 0:
            size = high.abs().sum()
        parts.append(_part(tallies, sums, position == 0, apart))
    return Grid(tuple(parts), size, len(tallies))


def _part(tallies: Sequence[Tally], sums: Sequence[Any], counts: bool, apart: bool) -> Tally:
    """A tally of these sums; the coarse part has the counts."""
    first = tallies[0]
    groups = first.groups
    if groups is not None:
        own = [tally.groups for tally in tallies if tally.groups is not None]
        rows = dict(zip(_ROWS, sums[len(_SUMS) :], strict=True))
        if apart:
            count = torch.cat([one.count for one in own])
            keys = None if groups.keys is None else tuple(key for one in own for key in one.keys or ())
            cell = None if groups.cell is None else tuple(place for one in own for place in one.cell or ())
            groups = replace(groups, keys=keys, cell=cell)
        else:
            count = _total([one.count for one in own])
        groups = replace(groups, count=count if counts else torch.zeros_like(count), **rows)
    return replace(
        first,
        **dict(zip(_SUMS, sums, strict=False)),
        count=_total([tally.count for tally in tallies]) if counts else 0,
        nonfinite=_total([tally.nonfinite for tally in tallies]) if counts else 0,
        groups=groups,
        shown=_total([tally.shown for tally in tallies]) if counts else 0,
    )


def _whole(column: Sequence[Any]) -> Any:
    return sum(column) if isinstance(column[0], int) else None


def _none(value: Any) -> Any:
    return 0 if isinstance(value, int) else None


def _total(counts: Sequence[Any]) -> Any:
    return torch.stack(list(counts)).sum(0) if all(isinstance(c, Tensor) for c in counts) else sum(counts)
