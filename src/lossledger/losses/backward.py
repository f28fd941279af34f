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
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossledger.losses import columns
from lossledger.losses import groups as grouping
from lossledger.losses.aligned import Aligned
from lossledger.tally import Groups, Tally
from lossledger.values import Scratch, reciprocal, selected, streams
from lossledger.weighting import Weighting

if TYPE_CHECKING:
    from lossledger.losses.loss import By, Loss

# Numbers of a part, of large batches of twice as many: the half a dozen tensors of a part fit in the cache that cores
# share, and its buffers are small beside the gradient. Smaller ones would cost more in calls than they gain.
PART = 2**18
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
    raw = batch.given.prediction.raw
    with torch.no_grad():
        if batch.late is None and raw.ndim > 1 and streams(raw):
            found = _in_parts(loss, batch, window, factor, by)
            if found is not None:
                return found
        closed = loss._slopes(batch)
        if closed is None:
            return None
        elements, gradient = closed
        tally = loss._tally_elements(batch, elements, by)
        scale = scale_of(tally if window is None else window, factor, raw.dtype)
        multiply(gradient, entry_weight(loss, batch, gradient), scale, gradient)
        return tally, gradient


def _in_parts(loss: Loss, batch: Aligned, window: Tally | None, factor: float, by: By) -> tuple[Tally, Tensor] | None:
    """As `backprop`, for a batch whose parts are worth it; `None` for others."""
    raw = batch.given.prediction.raw
    each = prod(raw.shape[1:])
    by_column = loss.additive and columns.applies(loss, batch, by)
    if by_column and each > PART and isinstance(by, grouping.AndSamples):
        by_column = False
    # Ids are numbered for the whole batch; samples that are compared with each other stay together.
    by_sample = loss.additive and not isinstance(by, Tensor) and len(raw) > 1 and raw.numel() >= 2 * PART
    if not (loss.one_element or by_column or by_sample):
        return None
    scale = scale_of(loss.divisor_aligned(batch) if window is None else window, factor, raw.dtype)
    gradient = torch.empty(raw.shape, dtype=raw.dtype)
    if loss.one_element:
        return _by_entries(loss, batch, scale, gradient, by)
    if by_column:
        # Of whole samples, where they fit: then nothing changes because somebody asks for those.
        length, scratch = _length(raw.numel(), raw.shape[-1]), scratch_of_thread()
        if each <= PART:
            length = _length(raw.numel(), each) * (each // raw.shape[-1])
        tally = columns.backprop(loss, batch, length, scale, gradient, by, scratch)
        if tally is not None:
            return tally, gradient
    return _by_samples(loss, batch, scale, gradient, by) if by_sample else None


def _length(numbers: int, each: int) -> int:
    """How many entries or samples of so many numbers each make a part: all parts are about alike."""
    part = PART if numbers < 16 * PART else 2 * PART
    length = -(-numbers // (each * -(-numbers // part)))
    return -(-length // _ROUND) * _ROUND if length > _ROUND else max(length, 1)


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


def _by_samples(loss: Loss, batch: Aligned, scale: Any, gradient: Tensor, by: By) -> tuple[Tally, Tensor] | None:
    """Part after part of whole samples; tallies of parts add up to the tally of the batch."""
    tallies, apart, seen, scratch = [], [], [], scratch_of_thread()
    samples = _length(gradient.numel(), prod(gradient.shape[1:]))
    for start in range(0, gradient.shape[0], samples):
        rows = slice(start, start + samples)
        scratch.take_back()
        part = batch.given.part(rows, scratch).made_safe(loss._safe)
        closed = loss._slopes(part)
        if closed is None:
            return None
        kind = grouping.AndSamples(by) if isinstance(by, grouping.AndSamples) else by
        tallies.append(loss._tally_elements(part, closed[0], kind))
        if isinstance(kind, grouping.AndSamples):
            apart.append(kind.taken[batch.where][0])
        multiply(closed[1], entry_weight(loss, part, closed[1]), scale, gradient[rows])
        if isinstance(by, grouping.AndSamples) and by.look is not None:
            # Of the part, its buffers are needed no more.
            scratch.take_back()
            seen.append(by.look(part))
    if isinstance(by, grouping.AndSamples):
        by.leave(_appended(apart), batch, seen)
    return added(tallies), gradient


def _by_entries(loss: Loss, batch: Aligned, scale: Any, gradient: Tensor, by: By) -> tuple[Tally, Tensor] | None:
    """Part after part of entries, for losses of one element an entry: their elements are few, and tallied at once."""
    given = batch if loss.reduction.reads_targets else batch.given
    classes = gradient.shape[-1]
    slopes = gradient.reshape(-1, classes)
    elements = slopes.new_empty((len(slopes), 1))
    weight = loss._entry_weight(batch)
    if weight is not None:
        weight = (weight.to(gradient.dtype) * scale).expand(batch.weighting.shape).reshape(-1, 1)
    true = given.y_true.reshape(-1, classes) if given.y_true.ndim == gradient.ndim else given.y_true.reshape(-1)
    mask = None if batch.weighting.mask is None else batch.weighting.mask.expand(batch.weighting.shape).reshape(-1, 1)
    scratch = scratch_of_thread()
    flat = given.prediction.map(lambda values: values.reshape(-1, classes))
    entries, safe = _length(slopes.numel(), classes), False
    for start in range(0, slopes.shape[0], entries):
        rows = slice(start, start + entries)
        out, prediction = slopes[rows], flat.map(operator.itemgetter(rows))
        weighting = Weighting((out.shape[0], 1), None if mask is None else mask[rows], _scratch=scratch)
        part = Aligned(true[rows], prediction, weighting, given.where, column_weight=given.column_weight)
        for tried in columns.tries(loss, part, safe):
            scratch.take_back(out)
            closed = loss._slopes(tried)
            if closed is None:
                return None
            torch.mul(closed[1], scale if weight is None else weight[rows], out=out)
            # A number of the processor is read without waiting.
            if mask is None or isfinite(float(out.sum())):
                break
        assert closed is not None
        elements[rows], safe = closed[0], tried is not part
    if mask is not None:
        elements = selected(mask, elements, 0)
    return loss._tally_elements(given, elements.view(batch.weighting.shape), by), gradient


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
