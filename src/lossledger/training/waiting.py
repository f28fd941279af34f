"""Small batches whose tallies wait until there are many of them.

A tally costs some twenty small operations, whatever the size of the batch: for a small model more than its forward
pass. Tallies of parts add up to that of the whole, so that of many batches is made from them laid end to end. How many
depends on their number alone, never on the clock: sums are the same bits in every run.

Of a loss with one element an entry, such as a cross-entropy of labels, the elements wait in place of the output, which
may have many classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
SMALL = 2**15
# Of one whose elements wait: of larger ones, gradients are made part by part.
LARGE = 2**21
# Entries of such: with more of them a tally costs little beside its step, and those of many batches much memory.
ENTRIES = 2**13
# What is kept of smaller outputs is small enough to lie anywhere.
PINS = 2**12
TOGETHER = 64


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the tally of a batch is made from.

    Args:
        y_true: targets.
        output: of the model, detached; beside elements its shape alone, without memory.
        sample_weight: if any.
        mask: if any.
        elements: of each term, if they wait in place of the output.
    """

    y_true: Tensor
    output: Tensor
    sample_weight: Tensor | None
    mask: Tensor | None
    elements: list[Tensor] | None = None

    def tallies(self, objective: Objective, by: str | None) -> dict[str, Tally]:
        """By term."""
        with torch.no_grad():
            if self.elements is None:
                return objective.tallies(self.y_true, self.output, self.sample_weight, self.mask, by, checked=True)
            return objective.tallies_of(self.y_true, self.output, self.sample_weight, self.elements, by)


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
        # Of the last output whose elements wait.
        self._outline: Tensor | None = None
        self._places: dict[str | int, tuple[tuple[Any, ...], list[Tensor]]] = {}

    @classmethod
    def of(cls, objective: Objective, by: str | None, copies: bool) -> Waiting | None:
        """For an objective whose gradients need no tally; else `None`."""
        return cls(objective, by, copies) if can_wait(objective) and not objective.reproducible else None

    def kept(self, batch: Batch, output: Any) -> Kept | None:
        """A batch that may wait: one small output, and arrays with a row for each sample; else `None`."""
        if type(output) is not Tensor or output.numel() > SMALL:
            return None
        given = self._given(batch, output)
        if given is None:
            return None
        kept = output.detach()
        return Kept(given[0], kept if output.numel() <= PINS else self._own("output", kept), *given[1:])

    def pull(self, batch: Batch, output: Any) -> tuple[Kept, Pull] | None:
        """A batch of a step that may wait, with what to back-propagate now; else `None`."""
        if type(output) is not Tensor:
            return None
        plainly = output.numel() > SMALL
        if plainly and (output.numel() > LARGE or not self._closed.few or not _light(batch, output)):
            return None
        y, weight, mask = batch.y, batch.sample_weight, batch.mask
        bare = weight is None and mask is None and not self._copies and not hasattr(output, "_keras_mask")
        given = (y, None, None) if bare and type(y) is Tensor else self._given(batch, output)
        if given is None:
            return None
        detached = output.detach()
        found = self._closed.pull(given[0], detached, given[1], given[2], plainly)
        if found is None:
            return None
        if found.elements is None:
            kept = detached if output.numel() <= PINS else self._own("output", detached)
            return Kept(given[0], kept, given[1], given[2]), found
        if self._outline is None or self._outline.shape != output.shape:
            self._outline = _outline(detached, output.shape)
        elements = found.elements
        if output.numel() > PINS:
            elements = [self._own(position, one) for position, one in enumerate(elements)]
        return Kept(given[0], self._outline, given[1], None, elements), found

    def _given(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Targets, weights and mask; `None` where they are no arrays with a row for each sample."""
        y, weight, mask = batch.y, batch.sample_weight, batch.mask
        if type(y) is not Tensor:
            return None
        if carried_mask(output) is not None:
            return None
        for values in (weight, mask):
            if values is not None and (type(values) is not Tensor or values.shape[:1] != y.shape[:1]):
                return None
        if not self._copies:
            return y, weight, mask
        own = [None if v is None else self._own(n, v) for n, v in (("weight", weight), ("mask", mask))]
        return self._own("y", y), own[0], own[1]

    def _own(self, name: str | int, values: Tensor) -> Tensor:
        """A copy, in memory that is set aside for those of many batches.

        By itself it would lie between the blocks of its step, and keep the next step from using their room.
        """
        form = (values.shape, values.dtype)
        known, places = self._places.get(name, ((), []))
        if form != known:
            # Only what comes twice is worth room for many: sizes may change with every batch.
            self._places[name] = form, []
            return values.clone()
        if not places:
            places += values.new_empty((TOGETHER, *values.shape)).unbind()
        return places.pop().copy_(values)

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
        y, whole = torch.cat([b.y_true for b in several]), several[0]
        weights = [b.sample_weight for b in several if b.sample_weight is not None]
        if whole.elements is not None:
            parts = zip(*(b.elements for b in several if b.elements is not None), strict=True)
            output = _outline(whole.output, (len(y), *whole.output.shape[1:]))
            return Kept(y, output, torch.cat(weights) if weights else None, None, [torch.cat(part) for part in parts])
        masks = [b.mask for b in several if b.mask is not None]
        return Kept(
            y,
            torch.cat([b.output for b in several]),
            torch.cat(weights) if weights else None,
            torch.cat(masks) if masks else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """What waits, as one batch and the sizes of its parts."""
        if not self._batches:
            return {"sizes": []}
        whole = self._whole()
        arrays: dict[str, Any] = {"y": whole.y_true, "weight": whole.sample_weight, "mask": whole.mask}
        if whole.elements is None:
            arrays["output"] = whole.output
        else:
            arrays |= {"output": None, "elements": whole.elements, "shape": list(whole.output.shape[1:])}
        return {"sizes": [len(batch.y_true) for batch in self._batches], **arrays}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on with what `state_dict` told."""
        self._batches = []
        sizes = state["sizes"]
        if not sizes:
            return
        names = ("y", "output", "weight", "mask")
        parts = [(None,) * len(sizes) if state[n] is None else state[n].to(device).split(sizes) for n in names]
        # Checkpoints of before hold no elements.
        of_terms = [one.to(device).split(sizes) for one in state.get("elements", ())]
        for position, (y, output, weight, mask) in enumerate(zip(*parts, strict=True)):
            elements = [one[position] for one in of_terms] or None
            if elements is not None:
                output = _outline(elements[0], (len(y), *state["shape"]))
            self.add(Kept(y, output, weight, mask, elements))


def _light(batch: Batch, output: Tensor) -> bool:
    """Whether what waits in place of a large output is little: targets of its size wait no better than it does."""
    y, weight, most = batch.y, batch.sample_weight, min(ENTRIES, output.numel() // 2)
    few = weight is None or (type(weight) is Tensor and weight.numel() <= most)
    return few and batch.mask is None and type(y) is Tensor and y.numel() <= most


def _outline(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An output of a shape without its memory, in dtype and device as another."""
    return like.new_empty(()).expand(tuple(shape))


def _alike(a: Kept, b: Kept) -> bool:
    """Whether the arrays of two batches can be laid end to end."""
    if (a.elements is None) is not (b.elements is None):
        return False
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
