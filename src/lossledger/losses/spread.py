"""How far the elements of a batch reach, whole and by group; a pass of its own over them, made when it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from lossledger.losses.aligned import Aligned
from lossledger.losses.loss import Loss
from lossledger.losses.lovasz import _Lovasz
from lossledger.losses.ratio import Overlap
from lossledger.tally import GroupKey, Spread
from lossledger.weighting import Weighting


def unreduced(loss: Loss, batch: Aligned) -> tuple[Tensor, Weighting] | None:
    """The elements of an aligned batch and what they weigh; `None` where the loss has none.

    A ratio over the batch has none, nor has a function that returned one number.
    """
    if isinstance(loss, Overlap):
        if loss.is_ratio(len(batch.weighting.shape)):
            return None
        return loss._elements(batch), loss._as_cells(batch).weighting
    elements = loss._elements(batch)
    if isinstance(loss, _Lovasz):
        return elements, loss._as_images(batch).weighting
    if elements.ndim == 1:
        return None
    return elements, batch.weighting if batch.late is None else loss._late_weighting(batch, elements)


def whole(elements: Tensor, weighting: Weighting) -> Spread:
    """The spread of all unmasked elements."""
    low, high, squares = _sides(elements, weighting.mask)
    return Spread(low.amin(), high.amax(), squares.sum(dtype=torch.float64))


def by_sample(elements: Tensor, weighting: Weighting) -> Spread:
    """The spread of each sample, `[B]`."""
    low, high, squares = (side.reshape(len(side), -1) for side in _sides(elements, weighting.mask))
    return Spread(low.amin(1), high.amax(1), squares.sum(1, dtype=torch.float64))


def by_class(
    loss: Loss, batch: Aligned, elements: Tensor, weighting: Weighting
) -> tuple[tuple[GroupKey, ...], Spread] | None:
    """The spread of each class, with the keys that `by="class"` has; `None` where the loss has no classes."""
    if loss.classes_are is None:
        return None
    if loss.classes_are == "label" and not isinstance(loss, Overlap | _Lovasz):
        size, labels = loss._labels(batch)
        keys: tuple[GroupKey, ...] = tuple((label, "") for label in range(size))
        return keys, scattered(_entries(elements, weighting), labels.reshape(-1).clamp(0, size - 1), size)
    columns = range(elements.shape[-1])
    if loss.classes_are == "output" or isinstance(loss, Overlap | _Lovasz):
        return tuple((column, "") for column in columns), _columns(elements, weighting.mask)
    present = batch.y_true > 0.5
    sides = []
    for side in (present, ~present):
        mask = side if weighting.mask is None else side & weighting.mask
        sides.append(_columns(elements, mask))
    keys = tuple((column, side) for side in ("present", "absent") for column in columns)
    names = ("minimum", "maximum", "squares")
    return keys, Spread(*(torch.cat([getattr(side, name) for side in sides]) for name in names))


def scattered(rows: Spread, index: Tensor, size: int) -> Spread:
    """The spread of each of `size` groups, from that of entries whose groups `index` tells."""
    low, high = rows.minimum, rows.maximum
    return Spread(
        torch.full((size,), torch.inf, dtype=low.dtype, device=low.device).scatter_reduce(0, index, low, "amin"),
        torch.full((size,), -torch.inf, dtype=high.dtype, device=high.device).scatter_reduce(0, index, high, "amax"),
        torch.zeros(size, dtype=torch.float64, device=low.device).index_add_(0, index, rows.squares.double()),
    )


def _sides(elements: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The elements for a minimum, for a maximum, and their squares: what is masked changes none of them."""
    elements = elements.detach()
    if mask is None:
        return elements, elements, elements.square()
    return (
        torch.where(mask, elements, torch.inf),
        torch.where(mask, elements, -torch.inf),
        torch.where(mask, elements.square(), 0.0),
    )


def _columns(elements: Tensor, mask: Tensor | None) -> Spread:
    low, high, squares = (side.reshape(-1, elements.shape[-1]) for side in _sides(elements, mask))
    return Spread(low.amin(0), high.amax(0), squares.sum(0, dtype=torch.float64))


def _entries(elements: Tensor, weighting: Weighting) -> Spread:
    low, high, squares = (side.reshape(-1, elements.shape[-1]) for side in _sides(elements, weighting.mask))
    return Spread(low.amin(1), high.amax(1), squares.sum(1))
