"""The gradient of a batch from closed forms, a part at a time, so that what is made on the way stays in the cache.

A large batch is worked through in parts of whole samples, whose tallies add up to its own; where an entry has one
element (cross-entropies of exclusive classes), in parts of entries. Nothing but the gradient, and one number an entry,
is held for the whole batch.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossledger.losses import groups as grouping
from lossledger.losses.aligned import Aligned
from lossledger.tally import Groups, Tally
from lossledger.values import Scratch, reciprocal, streams
from lossledger.weighting import Weighting

if TYPE_CHECKING:
    from lossledger.losses.loss import By, Loss

# Numbers of a part: half a dozen buffers of them, shared by two cores, fit in caches of 2 MB.
PART = 2**17
# Each thread keeps the buffers of a part, half a dozen; nothing in them is needed after it.
_KEPT = threading.local()
# Additions along the first axis go through so many rows at once.
_ROUND = 64


def backprop(loss: Loss, batch: Aligned, window: Tally | None, factor: float, by: By) -> tuple[Tally, Tensor] | None:
    """The tally and `factor` times the gradient, in the layout of the loss; `None` without a closed form.

    Args:
        loss: whose `_slopes` are taken.
        batch: the batch.
        window: see `Loss.backprop`.
        factor: multiplies the gradient.
        by: groups of the tally.
    """
    raw = batch.prediction.raw.detach()
    with torch.no_grad():
        rows = _in_parts(loss, batch, raw, by)
        if rows is None:
            closed = loss._slopes(batch)
            if closed is None:
                return None
            elements, gradient = closed
            tally = loss._tally_elements(batch, elements, by)
            scale = scale_of(tally if window is None else window, factor, raw.dtype)
            multiply(gradient, entry_weight(loss, batch, gradient), scale, gradient)
            return tally, gradient
        scale = scale_of(loss.divisor_aligned(batch) if window is None else window, factor, raw.dtype)
        gradient = torch.empty(raw.shape, dtype=raw.dtype)
        if loss.one_element:
            return _by_entries(loss, batch, rows, scale, gradient, by)
        return _by_samples(loss, batch, rows, scale, gradient, by)


def _in_parts(loss: Loss, batch: Aligned, raw: Tensor, by: By) -> int | None:
    """How many entries or samples make a part; `None` for a batch that is not divided."""
    if batch.late is not None or raw.numel() < 2 * PART or not streams(raw):
        return None
    if loss.one_element:
        return max(PART // raw.shape[-1], 1)
    # Ids are numbered for the whole batch; samples that are compared with each other stay together.
    if isinstance(by, Tensor) or not loss.additive or raw.ndim < 2:
        return None
    samples = PART // prod(raw.shape[1:])
    samples = samples - samples % _ROUND if samples > _ROUND else max(samples, 1)
    return samples if samples < raw.shape[0] else None


def scratch_of_thread() -> Scratch:
    """The buffers of this thread."""
    found: Scratch | None = getattr(_KEPT, "scratch", None)
    if found is None:
        found = _KEPT.scratch = Scratch()
    return found


def scale_of(whole: Tally, factor: float, dtype: torch.dtype) -> Any:
    """What multiplies each derivative: `factor` over the divisor."""
    return factor * whole.coefficient * reciprocal(whole.divisor + whole.offset, dtype)


def entry_weight(loss: Loss, batch: Aligned, slopes: Tensor) -> Tensor | None:
    """The factor on each derivative, as it multiplies fastest."""
    weights = batch.weighting
    if loss.reduction.rescale is None and weights.shape == slopes.shape:
        return weights.product_for(slopes)
    return loss._entry_weight(batch)


def multiply(slopes: Tensor, weight: Tensor | None, scale: Any, out: Tensor) -> None:
    """Slopes × weight × scale, in `out`, which may be the slopes; what is small is multiplied first."""
    if weight is not None and weight.shape != slopes.shape:
        weight = weight.to(slopes.dtype)
        weight, scale = (weight, None) if scale is None else (None, weight * scale)
    if weight is not None:
        slopes.mul_(weight)
    if scale is not None:
        torch.mul(slopes, scale, out=out)


def _by_samples(
    loss: Loss, batch: Aligned, samples: int, scale: Any, gradient: Tensor, by: By
) -> tuple[Tally, Tensor] | None:
    """Part after part of whole samples; tallies of parts add up to the tally of the batch."""
    tallies, apart, scratch = [], [], scratch_of_thread()
    for start in range(0, gradient.shape[0], samples):
        rows = slice(start, start + samples)
        scratch.take_back()
        part = _samples(batch, rows, scratch)
        closed = loss._slopes(part)
        if closed is None:
            return None
        kind = grouping.AndSamples(by) if isinstance(by, grouping.AndSamples) else by
        tallies.append(loss._tally_elements(part, closed[0], kind))
        if isinstance(kind, grouping.AndSamples):
            apart.append(kind.taken[batch.where][0])
        multiply(closed[1], entry_weight(loss, part, closed[1]), scale, gradient[rows])
    if isinstance(by, grouping.AndSamples):
        by.taken[batch.where] = _appended(apart), batch
    return added(tallies), gradient


def _by_entries(
    loss: Loss, batch: Aligned, entries: int, scale: Any, gradient: Tensor, by: By
) -> tuple[Tally, Tensor] | None:
    """Part after part of entries, for losses of one element an entry: their elements are few, and tallied at once."""
    classes = gradient.shape[-1]
    slopes = gradient.reshape(-1, classes)
    elements = slopes.new_empty((len(slopes), 1))
    weight = loss._entry_weight(batch)
    if weight is not None:
        weight = (weight.to(gradient.dtype) * scale).expand(batch.weighting.shape).reshape(-1, 1)
    true = batch.y_true.reshape(-1, classes) if batch.y_true.ndim == gradient.ndim else batch.y_true.reshape(-1)
    scratch = scratch_of_thread()
    flat = batch.prediction.map(lambda values: values.reshape(-1, classes))
    for start in range(0, len(slopes), entries):
        rows = slice(start, start + entries)
        prediction = flat.map(operator.itemgetter(rows))
        scratch.take_back()
        weighting = Weighting((len(prediction.raw), 1), _scratch=scratch)
        closed = loss._slopes(replace(batch, y_true=true[rows], prediction=prediction, weighting=weighting))
        if closed is None:
            return None
        elements[rows] = closed[0]
        torch.mul(closed[1], scale if weight is None else weight[rows], out=slopes[rows])
    return loss._tally_elements(batch, elements.reshape(batch.weighting.shape), by), gradient


def _samples(batch: Aligned, rows: slice, scratch: Scratch) -> Aligned:
    """Some samples of a batch."""
    weights = batch.weighting
    rank, length = len(weights.shape), weights.shape[0]

    def cut(values: Tensor | None) -> Tensor | None:
        # A weight of fewer axes is one by column.
        return values if values is None or values.ndim != rank or values.shape[0] != length else values[rows]

    true = batch.y_true[rows]
    return replace(
        batch,
        y_true=true,
        prediction=batch.prediction.map(operator.itemgetter(rows)),
        weighting=Weighting((len(true), *weights.shape[1:]), cut(weights.mask), cut(weights.weight), scratch),
    )


def added(tallies: Sequence[Tally]) -> Tally:
    """The sum of the tallies of parts; rows without keys follow each other."""
    groups = [tally.groups for tally in tallies if tally.groups is not None]
    if not groups or groups[0].keys is not None:
        return functools.reduce(operator.add, tallies)
    whole = functools.reduce(operator.add, (replace(tally, groups=None) for tally in tallies))
    return replace(whole, groups=_appended(groups))


def _appended(groups: Sequence[Groups]) -> Groups:
    columns = {one.name: [getattr(part, one.name) for part in groups] for one in fields(Groups)}
    rows: dict[str, Any] = {
        name: torch.cat(parts) for name, parts in columns.items() if all(isinstance(part, Tensor) for part in parts)
    }
    return replace(groups[0], **rows)
