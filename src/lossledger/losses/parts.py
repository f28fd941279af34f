"""Whether the loss of a whole can be had from its parts."""

from __future__ import annotations

import torch

from lossledger.errors import InputError
from lossledger.losses.aligned import Aligned
from lossledger.losses.loss import Loss


def check_part(loss: Loss, batch: Aligned) -> None:
    """The batch may be a part of a window: what the parts say adds up to what the whole says.

    Raises:
        InputError: a loss of pairs within the batch, or one number of which nobody said what it stands for.
    """
    check_additive(loss, batch.where)
    if batch.late is None or loss.scalar is not None:
        return
    with torch.no_grad():
        one_number = loss._elements(batch).ndim == 1
    if one_number:
        raise InputError(
            f"{batch.where}: the loss returns one number for a batch, and a window of several batches cannot know what "
            "it was divided by; expected one value per sample or entry, or a declared scalar. Wrap it: "
            "lossledger.losses.FunctionLoss(fn, scalar='mean') or scalar='sum'."
        )


def check_additive(loss: Loss, where: str | None) -> None:
    """The loss does not compare samples.

    Raises:
        InputError: it does.
    """
    if not loss.additive:
        raise InputError(
            f"{where}: the loss compares the samples of a batch with each other, so the losses of parts do not "
            "add up to the loss of the whole; expected a window of one batch in one process, received several "
            "batches or ranks. Use one larger batch (accumulate=1) in one process."
        )
