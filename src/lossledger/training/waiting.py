"""Small batches whose tallies wait until there are many of them.

A tally costs some twenty small operations, whatever the size of the batch: for a small model more than its forward
pass. Tallies of parts add up to that of the whole, so that of many batches is made from them laid end to end. How many
depends on their number alone, never on the clock: sums are the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossledger.batch import Batch
from lossledger.objective import Objective
from lossledger.objective.closed import Closed, Pull, can_wait
from lossledger.tally import Tally
from lossledger.training.packed import Packed
from lossledger.weighting import carried_mask

# Numbers of an output: of larger ones, keeping them costs more than their tally.
SMALL = 4096
TOGETHER = 64


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the tally of a batch is made from.

    Args:
        y_true: targets.
        output: of the model, detached.
        sample_weight: if any.
        mask: if any.
    """

    y_true: Tensor
    output: Tensor
    sample_weight: Tensor | None
    mask: Tensor | None

    def tallies(self, objective: Objective, by: str | None) -> dict[str, Tally]:
        """By term."""
        with torch.no_grad():
            return objective.tallies(self.y_true, self.output, self.sample_weight, self.mask, by, checked=True)


def tallies_of(
    objective: Objective, tallies: dict[str, Tally], kept: Kept | Packed | None, by: str | None
) -> dict[str, Tally]:
    """The tallies of a step, made now where they wait."""
    return tallies if kept is None else kept.tallies(objective, by) | tallies


class Waiting:
    """The batches that wait.

    Args:
        objective: makes their tallies.
        by: groups of the tallies.
        copies: take copies of targets, weights and masks: who made them may write the next batch over them.
    """

    def __init__(self, objective: Objective, by: str | None, copies: bool) -> None:
        self._objective = objective
        self._by = by
        self._copies = copies
        self._closed = Closed(objective)
        self._batches: list[Kept] = []

    @classmethod
    def of(cls, objective: Objective, by: str | None, copies: bool) -> Waiting | None:
        """For an objective whose gradients need no tally; else `None`."""
        return cls(objective, by, copies) if can_wait(objective) and not objective.reproducible else None

    def kept(self, batch: Batch, output: Any) -> Kept | None:
        """A batch that may wait: one small output, and arrays with a row for each sample; else `None`."""
        y, weight, mask = batch.y, batch.sample_weight, batch.mask
        if type(output) is not Tensor or output.numel() > SMALL or type(y) is not Tensor:
            return None
        if weight is None and mask is None and not self._copies and not hasattr(output, "_keras_mask"):
            return Kept(y, output.detach(), None, None)
        if carried_mask(output) is not None:
            return None
        for given in (weight, mask):
            if given is not None and (type(given) is not Tensor or given.shape[:1] != y.shape[:1]):
                return None
        arrays = [given.clone() if given is not None and self._copies else given for given in (y, weight, mask)]
        return Kept(arrays[0], output.detach(), arrays[1], arrays[2])

    def pull(self, batch: Batch, output: Any) -> tuple[Kept, Pull] | None:
        """A batch of a step that may wait, with what to back-propagate now; else `None`."""
        kept = self.kept(batch, output)
        found = None if kept is None else self._closed.pull(kept.y_true, kept.output, kept.sample_weight, kept.mask)
        return None if kept is None or found is None else (kept, found)

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Kept) -> dict[str, Tally]:
        """One more; the tallies of all before it where they are many, or where it does not fit to them."""
        found: dict[str, Tally] = {}
        if self._batches and (len(self._batches) == TOGETHER or not _alike(batch, self._batches[-1])):
            found = self.tallies()
            self._batches.clear()
        self._batches.append(batch)
        return found

    def tallies(self) -> dict[str, Tally]:
        """Of all that wait, by term."""
        return self._whole().tallies(self._objective, self._by) if self._batches else {}

    def _whole(self) -> Kept:
        several = self._batches
        if len(several) == 1:
            return several[0]
        weights = [b.sample_weight for b in several if b.sample_weight is not None]
        masks = [b.mask for b in several if b.mask is not None]
        return Kept(
            torch.cat([b.y_true for b in several]),
            torch.cat([b.output for b in several]),
            torch.cat(weights) if weights else None,
            torch.cat(masks) if masks else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """What waits, as one batch and the sizes of its parts."""
        if not self._batches:
            return {"sizes": []}
        whole = self._whole()
        arrays = {"y": whole.y_true, "output": whole.output, "weight": whole.sample_weight, "mask": whole.mask}
        return {"sizes": [len(batch.y_true) for batch in self._batches], **arrays}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on with what `state_dict` told."""
        self._batches = []
        sizes = state["sizes"]
        if not sizes:
            return
        names = ("y", "output", "weight", "mask")
        parts = [(None,) * len(sizes) if state[n] is None else state[n].to(device).split(sizes) for n in names]
        for batch in zip(*parts, strict=True):
            self.add(Kept(*batch))


def _alike(a: Kept, b: Kept) -> bool:
    """Whether the arrays of two batches can be laid end to end."""
    for one, other in (
        (a.y_true, b.y_true),
        (a.output, b.output),
        (a.sample_weight, b.sample_weight),
        (a.mask, b.mask),
    ):
        if one is None or other is None:
            if one is not other:
                return False
        elif one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
            return False
    return True
