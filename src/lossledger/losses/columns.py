"""Tally and gradient of a large batch whose columns are independent, where a weight or a mask is one number an entry.

What multiplies an entry is repeated over its columns for the gradient alone, and weighted sums by column are products
of matrices: no weighted element is ever written. Masked elements are calculated with whatever they hold, times 0; only
where that leaves NaN or infinity are they made harmless first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossledger.losses import groups as grouping
from lossledger.losses.aligned import Aligned
from lossledger.losses.beside import Beside
from lossledger.tally import Groups, Tally
from lossledger.values import Scratch
from lossledger.weighting import Weighting

if TYPE_CHECKING:
    from lossledger.losses.loss import By, Loss

Row = NDArray[np.float64]

# So many entries side by side: libraries multiply matrices of a few columns slowly, and add long columns up badly.
_FOLD = 4
# Plain sums want longer rows, up to so many numbers; more are worth a loop of their own.
_PLAIN, _WIDE = 64, 64


def blocks_of(columns: Tensor) -> Tensor:
    """What `spread` multiplies with, made once for all parts."""
    if len(columns) >= _WIDE:
        return columns
    return (torch.eye(_FOLD, dtype=columns.dtype).unsqueeze(-1) * columns).reshape(_FOLD, -1)


def spread(weights: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    """A weight an entry times a weight a column, `[N, C]`.

    >>> blocks = blocks_of(torch.tensor([1.0, 10.0]))
    >>> spread(torch.tensor([2.0, 3.0]), blocks, torch.empty(2, 2)).tolist()
    [[2.0, 20.0], [3.0, 30.0]]
    """
    size = out.shape[-1]
    if blocks.ndim == 1 or out.shape[0] % _FOLD:
        return torch.mul(weights.unsqueeze(-1), blocks if blocks.ndim == 1 else blocks[0, :size], out=out)
    # Twice as fast as to repeat numbers along a short axis; all but one of the numbers that are added are 0.
    torch.mm(weights.view(-1, _FOLD), blocks, out=out.view(-1, _FOLD * size))
    return out


def row_of(columns: Tensor) -> Tensor:
    """What `times_row` multiplies with, made once for all parts."""
    return columns if len(columns) >= _WIDE else columns.repeat(_PLAIN)


def times_row(values: Tensor, row: Tensor, out: Tensor) -> None:
    """Values × a number a column, `[N, C]`, in `out`.

    >>> values = torch.ones(65, 2)
    >>> times_row(values, row_of(torch.tensor([2.0, 3.0])), values)
    >>> values[0].tolist(), values[64].tolist()
    ([2.0, 3.0], [2.0, 3.0])
    """
    number, size = values.shape
    whole = number - number % (len(row) // size)
    torch.mul(values[:whole].view(-1, len(row)), row, out=out[:whole].view(-1, len(row)))
    if whole < number:
        torch.mul(values[whole:], row[:size], out=out[whole:])


def folded(weights: Tensor | None) -> Tensor | None:
    """Weights of entries as `Sums` multiplies with them."""
    return weights if weights is None or weights.shape[0] % _FOLD else weights.view(-1, _FOLD).t()


@dataclass(frozen=True, slots=True)
class Sums:
    """Σ over the entries of weights × values, by column, over parts.

    Args:
        size: number of columns.

    Example:
        >>> sums = Sums(2)
        >>> _ = sums.add(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> _ = sums.add(torch.tensor([1.0]), torch.tensor([[5.0, 5.0]]))
        >>> wholes({"a": sums})["a"].tolist()
        [12.0, 15.0]
    """

    size: int
    _parts: list[Tensor] = field(default_factory=list)

    def add(self, weights: Tensor | None, values: Tensor) -> Tensor:
        """Those of a part; returns sums that are finite where all numbers are.

        Args:
            weights: `[N]`, or what `folded` makes of them; `None` for ones.
            values: `[N, C]`.
        """
        number, size = values.shape
        if weights is None:
            fold = 1 if size >= _WIDE else _PLAIN
            whole = number - number % fold
            found = values[:whole].view(-1, fold * size).sum(0)
            if whole < number:
                found[:size] += values[whole:].sum(0)
        elif weights.ndim == 2:
            found = torch.mm(weights, values.view(-1, _FOLD * size))
        else:
            found = values.new_zeros(_FOLD, _FOLD * size)
            torch.sum(values * weights.unsqueeze(-1), 0, out=found[0, :size])
        self._parts.append(found)
        return found

    def drop(self) -> None:
        """Forget the last part."""
        self._parts.pop()


def wholes(sums: dict[str, Sums]) -> dict[str, Row]:
    """The sums over all parts by name, `[C]`, in float64, of those that have any."""
    return {name: _whole(one) for name, one in sums.items() if one._parts}


def _whole(one: Sums) -> Row:
    # NumPy does in a call what takes torch three times as long: the numbers are few.
    whole = np.zeros(one.size)
    for part in one._parts:
        kept = part.numpy().reshape(-1, one.size)
        # Of products of folded weights and folded values, those of an entry with itself lie on the diagonal.
        whole += np.add.reduce(kept if part.ndim == 1 else kept[:: _FOLD + 1], 0, dtype=np.float64)
    return whole


def applies(loss: Loss, batch: Aligned, by: By) -> bool:
    """Whether elements are those of independent columns, one for each number of the output, and groups are columns."""
    if isinstance(by, Tensor):
        return False
    given = batch.given
    named = by in (None, "column") or (by == "class" and loss.classes_are in ("column", "output"))
    if not named or not given.weighting.shape == given.prediction.raw.shape == given.y_true.shape:
        return False
    weights, rank = given.weighting, given.prediction.raw.ndim
    by_entry = (v is None or (v.ndim == rank and v.shape[-1] == 1) for v in (weights.mask, weights.given))
    return given.y_true.is_contiguous() and given.prediction.raw.is_contiguous() and all(by_entry)


def tries(loss: Loss, part: Aligned, safe: bool) -> Iterator[Aligned]:
    """A part as it is, if not even the part before had to be made safe; then without what masked elements hold."""
    masked = part.weighting.mask is not None
    if not (safe and masked):
        yield part
    if masked:
        yield part.made_safe(loss._safe)


def backprop(
    loss: Loss, batch: Aligned, length: int, scale: Any, gradient: Tensor, by: By, scratch: Scratch
) -> Tally | None:
    """The tally of a batch, and its gradient in the memory given; `None` where it has to be made another way.

    Args:
        loss: has a closed form.
        batch: see `applies`.
        length: how many entries make a part; with `AndSamples`, those of whole samples.
        scale: multiplies the gradient.
        gradient: in the shape of the output.
        by: `None`, `"class"` or `"column"`.
        scratch: buffers of a part.
    """
    given, size = batch.given, gradient.shape[-1]
    weights, columns = given.weighting, given.weighting.columns
    entries = (*weights.shape[:-1], 1)

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.expand(entries).reshape(-1)

    mask, factor = flat(weights.mask), flat(weights.given)
    rescale = None if loss.reduction.rescale is None else flat(loss.reduction.rescale(weights).to(gradient))
    true, pulled = given.y_true.view(-1, size), gradient.view(-1, size)
    flatly = given.prediction.map(lambda values: values.view(-1, size))
    split = by == "class" and loss.classes_are == "column"
    if mask is None and factor is None and rescale is None:
        wide = None if columns is None else row_of(columns * scale)
    else:
        wide = blocks_of(gradient.new_ones(size) if columns is None else columns)
    names = ("numerator", "total", "numerator present", "total present", "count present", "weight present")
    sums, heavy, safe = {name: Sums(size) for name in names}, [], False
    beside = Beside(by, loss, batch) if isinstance(by, grouping.AndSamples) else None
    for start in range(0, true.shape[0], length):
        rows = slice(start, start + length)
        out = pulled[rows]
        # A masked weight that is NaN stays NaN here, and is found in the sums.
        counts = None if mask is None else mask[rows].to(gradient.dtype)
        total = counts if factor is None else factor[rows] if counts is None else factor[rows] * counts
        numerator = total if rescale is None else rescale[rows] if total is None else total * rescale[rows]
        weighting = Weighting(
            (out.shape[0], size), None if mask is None else mask[rows].unsqueeze(-1), _scratch=scratch
        )
        mine, whole = folded(numerator), folded(total)
        part = Aligned(true[rows], flatly.map(operator.itemgetter(rows)), weighting, given.where)
        for tried in tries(loss, part, safe):
            scratch.take_back(out)
            closed = loss._slopes(tried)
            if closed is None or closed[0].shape != closed[1].shape:
                return None
            elements = closed[0]
            summed = sums["numerator"].add(mine, elements)
            _multiply(closed[1], numerator, wide, scale, out, scratch)
            # A number of the processor is read without waiting. Elements can be finite where derivatives are not.
            if isfinite(float(summed.sum())) and (mask is None or isfinite(float(out.sum()))):
                break
            sums["numerator"].drop()
        else:
            return None
        safe = tried is not part
        if rescale is not None:
            sums["total"].add(whole, elements)
        if factor is not None:
            assert total is not None
            heavy.append(float(total.sum()))
        if split:
            over = {"numerator": mine, "count": whole if total is counts else folded(counts)}
            if factor is not None:
                over["weight"] = whole
            if rescale is not None:
                over["total"] = whole
            _add_present(sums, over, torch.gt(tried.y_true, 0.5, out=scratch.passing(elements)), elements)
        if beside is not None:
            beside.add(tried, elements, (numerator, total, counts), mask is None or tried is not part, scratch)
    if beside is not None:
        beside.leave()
    return _tally(loss, batch, wholes(sums), sum(heavy) if factor is not None else None, by)


def _multiply(
    slopes: Tensor, weights: Tensor | None, wide: Tensor | None, scale: Any, out: Tensor, scratch: Scratch
) -> None:
    """Derivatives × what weighs them, in `out`.

    Args:
        slopes: `[N, C]`.
        weights: of entries, `[N]`.
        wide: of columns, as `spread` takes them; without weights of entries as `times_row` does, times the scale.
        scale: multiplies all.
        out: may be the slopes.
        scratch: buffers of a part.
    """
    if weights is not None:
        assert wide is not None
        torch.mul(slopes, spread(weights * scale, wide, scratch.passing(slopes)), out=out)
    elif wide is not None:
        times_row(slopes, wide, out)
    else:
        torch.mul(slopes, scale, out=out)


def _add_present(sums: dict[str, Sums], over: dict[str, Tensor | None], inside: Tensor, elements: Tensor) -> None:
    """Sums of a part where a target says that its class is there.

    Args:
        sums: by name, to add to.
        over: weights of entries by the name of what they weigh.
        inside: `[N, C]`, 1 where it is there, else 0; written over.
        elements: `[N, C]`.
    """
    for name in ("count", "weight"):
        if name in over:
            sums[f"{name} present"].add(over[name], inside)
    inside.mul_(elements)
    for name in ("numerator", "total"):
        if name in over:
            sums[f"{name} present"].add(over[name], inside)


def _tally(loss: Loss, batch: Aligned, sums: dict[str, Row], heavy: float | None, by: By) -> Tally:
    """From the sums by column, without the weights of columns; what is missing is another one again."""
    weights, like, divides = batch.weighting, batch.given.prediction.raw, loss.divisor_aligned(batch)
    size, count = weights.shape[-1], weights.count()
    each, columns = float(count) / size, None if weights.columns is None else weights.columns.numpy()
    split = "count present" in sums
    # Numerator, total, weight and count of the groups: those of all columns, or those of all behind those present.
    found = np.empty((4, 2 * size if split else size))
    whole = found[:, -size:]
    whole[0], whole[1] = sums["numerator"], sums.get("total", sums["numerator"])
    whole[2], whole[3] = each if heavy is None else heavy, each
    if split:
        there, counted = found[:, :size], sums["count present"]
        there[0] = sums["numerator present"]
        there[1] = sums.get("total present", there[0])
        there[2], there[3] = sums.get("weight present", counted), counted
    if columns is not None:
        found[:3].reshape(3, -1, size)[...] *= columns
    numerator, weight = float(whole[0].sum()), float(whole[2].sum())
    plain = heavy is None and columns is None
    groups = None
    if by is not None:
        keys = grouping.keys_of(size)
        if split:
            whole -= there
            keys = grouping.keys_of(size, ("present", "absent"))
        numbers, counts = torch.from_numpy(found[:3]).to(like.dtype), torch.from_numpy(found[3]).long()
        groups = Groups(str(by), keys, numbers[0], numbers[1], counts, counts if plain else numbers[2])
    return Tally(
        torch.full((), numerator, dtype=like.dtype),
        divides.divisor,
        count,
        count if plain else torch.full((), weight, dtype=torch.float64),
        offset=divides.offset,
        nonfinite=torch.zeros((), dtype=torch.int64),
        groups=groups,
        shown=prod(weights.shape),
    )
