"""Where in an image or a sequence the loss is: rows of a kind of group, the place of an entry."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from lossledger.errors import InputError
from lossledger.ledger import Ledger, Row
from lossledger.ledger.table import exact_sum
from lossledger.losses.loss import Loss

if TYPE_CHECKING:
    from torch import Tensor

PLACE = "position"
# Largest difference between what the places add up to and the loss in the ledger: that of `Ledger.balance`.
TOLERANCE = 1e-6


def add_places(
    ledger: Ledger,
    loss: Loss,
    y_true: Any,
    y_pred: Any,
    *,
    term: str,
    sample_weight: Any = None,
    mask: Any = None,
    split: str = "validation",
    epoch: int | None = None,
    most: int = 24,
) -> list[Row]:
    """Divide a term of an epoch over the places of its entries, and add the rows to the ledger.

    A place is a block of an image, named "row,column" after its first pixel, or a stretch of a sequence, named after
    its first position. The rows have the kind "position" and add up to the term like those of any kind.

    Args:
        ledger: has the term in this split and epoch.
        loss: of the term.
        y_true: `[B, …]` targets of the whole split.
        y_pred: `[B, T, C]` or `[B, H, W, C]`, what the model said after that epoch.
        term: its name.
        sample_weight: as for the split.
        mask: as for the split.
        split: "training", "validation" or "test".
        epoch: the last of the split if not given.
        most: places an axis.

    Returns:
        the rows that were added.

    Raises:
        InputError: a loss without such a term or without places, or outputs that do not give the loss of the epoch.

    >>> key = ("validation", 1, None, "mean_squared_error", "data", "linear", "term", "", "")
    >>> ledger = Ledger("demo")
    >>> ledger.append([Row(*key, 2.0, 4, 4.0, 1.0, 4.0, 0.5, 0)])
    >>> y_true, y_pred = torch.zeros(1, 4, 1), torch.tensor([[[1.0], [0.0], [0.0], [1.0]]])
    >>> from lossledger.losses import MeanSquaredError
    >>> rows = add_places(ledger, MeanSquaredError(), y_true, y_pred, term="mean_squared_error")
    >>> [(row.group, row.contribution) for row in rows]
    [('0', 0.25), ('1', 0.0), ('2', 0.0), ('3', 0.25)]
    """
    # A place sums entries of the whole split one after another, which float32 would not hold.
    predicted = torch.as_tensor(y_pred).detach().double()
    ids, names = _blocks(tuple(predicted.shape), most)
    with torch.no_grad():
        tally = loss.tally(torch.as_tensor(y_true), predicted, sample_weight, mask, by=ids)
    groups = tally.groups
    if groups is None or groups.keys is None or tally.form != "linear":
        raise InputError(f"add_places: expected a loss that is a mean or sum over places, received {loss!r}.")
    whole = _term(ledger, term, split, epoch)
    shares = [whole.coefficient * float(share) for share in tally.contributions()]
    _same_loss(whole, exact_sum(shares), exact_sum(map(abs, shares)))
    sums = ([float(value) for value in values] for values in (groups.total, groups.count, groups.weight))
    rows = [
        Row(
            *(whole.split, whole.epoch, None, whole.term, whole.role, whole.form, PLACE, names[int(str(key))], ""),
            *(total, int(count), weight, whole.coefficient, whole.divisor, share, 0),
        )
        for (key, _), total, count, weight, share in zip(groups.keys, *sums, shares, strict=True)
    ]
    ledger.append(rows)
    return rows


def _blocks(shape: tuple[int, ...], most: int) -> tuple[Tensor, list[str]]:
    """The place of every entry, `shape` without its last axis, and the names of the places."""
    axes = shape[1:-1]
    if not 1 <= len(axes) <= 2:
        raise InputError(
            f"add_places: y_pred: expected [B, T, C] or [B, H, W, C], received {list(shape)}: there are no places."
        )
    sizes = [math.ceil(size / most) for size in axes]
    starts = [range(0, size, block) for size, block in zip(axes, sizes, strict=True)]
    index = torch.zeros(axes, dtype=torch.int64)
    for axis, (size, block) in enumerate(zip(axes, sizes, strict=True)):
        along = torch.arange(size) // block
        index = index * len(starts[axis]) + along.reshape([-1 if i == axis else 1 for i in range(len(axes))])
    return index.expand(shape[:-1]), [",".join(map(str, place)) for place in product(*starts)]


def _term(ledger: Ledger, term: str, split: str, epoch: int | None) -> Row:
    found = [row for row in ledger.rows if (row.kind, row.term, row.split, row.step) == ("term", term, split, None)]
    wanted = max((row.epoch for row in found), default=None) if epoch is None else epoch
    for row in found:
        if row.epoch == wanted:
            return row
    known = sorted({(row.term, row.split) for row in ledger.rows if row.kind == "term" and row.step is None})
    raise InputError(f"add_places: the ledger has no term {term!r} of {split!r}, epoch {wanted}; it has {known}.")


def _same_loss(whole: Row, contribution: float, magnitude: float) -> None:
    if not abs(contribution - whole.contribution) <= TOLERANCE * (magnitude + abs(whole.contribution)):
        raise InputError(
            f"add_places: y_pred: expected the outputs of {whole.split} after epoch {whole.epoch}, where {whole.term} "
            f"added {whole.contribution!r}; received outputs that add {contribution!r}. Predict with the weights of "
            "that epoch, and give the weights and mask of the split."
        )
