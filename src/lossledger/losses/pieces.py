"""Large weighted or masked batches are aligned a piece at a time: what masks and weights make is never held at once."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lossledger.losses import backward
from lossledger.losses.closed import has_closed_form
from lossledger.losses.groups import AndSamples
from lossledger.losses.loss import By, Loss
from lossledger.tally import Tally
from lossledger.values import streams
from lossledger.weighting import ClassWeight, carried_mask


def backprop(
    loss: Loss,
    given: tuple[Any, Any, Any, Any],
    class_weight: ClassWeight | None,
    where: str,
    window: Tally | None,
    factor: float,
    by: By,
) -> tuple[Tally, Tensor] | None:
    """What `align` and `backprop_aligned` give, in the layout of the output; `None` where they have to be called.

    Args:
        loss: the loss.
        given: targets, whose values were checked, the output without its graph, sample weight and mask.
        class_weight: as in `Loss.align`.
        where: the term.
        window: see `Loss.backprop`.
        factor: multiplies the gradient.
        by: groups of the tally.
    """
    length = _length(loss, given, class_weight, by)
    if length is None:
        return None
    tallies, scratch = [], backward.scratch_of_thread()
    output: Tensor = given[1]
    scale = None if window is None else backward.scale_of(window, factor, output.dtype)
    gradient = torch.empty_like(output)
    with torch.no_grad():
        for start in range(0, len(output), length):
            rows = slice(start, start + length)
            scratch.take_back()
            y_true, y_pred, weight, mask = (None if v is None else v[rows] if v.ndim else v for v in given)
            piece = loss.align(y_true, y_pred, weight, mask, class_weight, where, checked=True)
            piece = replace(piece, weighting=replace(piece.weighting, _scratch=scratch))
            closed = loss._slopes(piece)
            if closed is None:
                return None
            tallies.append(loss._tally_elements(piece, closed[0], by))
            slopes = closed[1]
            # Where pieces alone tell what divides, the gradient is scaled at the end.
            backward.multiply(slopes, backward.entry_weight(loss, piece, slopes), scale, slopes)
            gradient[rows] = loss.restore(slopes, output[rows])
            # Else it would be there until the next one is.
            del piece, closed, slopes
        tally = backward.added(tallies)
        if scale is None:
            gradient.mul_(backward.scale_of(tally, factor, output.dtype))
    return tally, gradient


def _length(loss: Loss, given: tuple[Any, Any, Any, Any], class_weight: ClassWeight | None, by: By) -> int | None:
    """How many samples make a piece; `None` for a batch that is aligned at once."""
    output, beside = given[1], [value for value in given[2:] if value is not None]
    if not isinstance(output, Tensor) or output.dtype.itemsize < 4 or output.ndim < 2:
        return None
    if output.numel() < 2 * backward.PART or not streams(output) or (given[3] is None and class_weight is None):
        return None
    length = max(backward.PART // prod(output.shape[1:]), 1)
    if isinstance(by, Tensor | AndSamples) or loss.one_element or not has_closed_form(loss) or length >= len(output):
        return None
    alike = all(isinstance(v, Tensor) and v.device == output.device for v in (given[0], *beside))
    if not alike or carried_mask(output) is not None or len(given[0]) != len(output):
        return None
    return length if all(v.ndim == 0 or len(v) == len(output) for v in beside) else None
