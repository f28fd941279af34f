"""What each sample adds up to, beside the sums by column of parts of whole samples."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import isfinite, prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossledger.losses.aligned import Aligned
from lossledger.losses.groups import AndSamples
from lossledger.tally import Groups
from lossledger.values import Scratch
from lossledger.weighting import Weighting

if TYPE_CHECKING:
    from lossledger.losses.loss import Loss


class Beside:
    """The rows by sample of a batch, and what `AndSamples.look` tells of it.

    Args:
        by: takes them.
        loss: makes masked elements harmless.
        batch: the whole batch, whose columns are independent.
    """

    def __init__(self, by: AndSamples, loss: Loss, batch: Aligned) -> None:
        self._by, self._loss, self._batch = by, loss, batch
        weights, like = batch.weighting, batch.given.prediction.raw
        self._entries, self._size = prod(weights.shape[1:-1]), weights.shape[-1]
        self._columns = like.new_ones(self._size) if weights.columns is None else weights.columns.to(like.dtype)
        self._plain = weights.columns is None
        self._rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._seen: list[dict[str, Tensor]] = []

    def add(
        self,
        part: Aligned,
        elements: Tensor,
        weights: tuple[Tensor | None, Tensor | None, Tensor | None],
        safe: bool,
        scratch: Scratch,
    ) -> None:
        """A part of whole samples.

        Args:
            part: its entries, `[N, C]`.
            elements: `[N, C]`, without weights.
            weights: `[N]`, those of the numerator and of the total without the weights of columns, and the mask as
                numbers; `None` for ones.
            safe: whether masked elements are harmless.
            scratch: its buffers, which it needs no more.
        """
        numerator, total, counts = weights
        samples = elements.shape[0] // self._entries
        first = self._sum(elements, numerator)
        second = first if total is numerator else self._sum(elements, total)
        count = self._each(counts, samples).mul(self._size).long()
        heavy = count if self._plain and total is counts else self._each(total, samples) * self._columns.sum()
        self._rows.append((first, second, count, heavy))
        if self._by.look is None:
            return
        seen = self._looked(self._by.look, part, samples, scratch)
        # What masked elements hold is multiplied with 0. A number of the processor is read without waiting.
        if not safe and not all(isfinite(float(values.sum())) for values in seen.values()):
            seen = self._looked(self._by.look, part.made_safe(self._loss._safe), samples, scratch)
        self._seen.append(seen)

    def _looked(
        self, look: Callable[[Aligned], dict[str, Tensor]], part: Aligned, samples: int, scratch: Scratch
    ) -> dict[str, Tensor]:
        scratch.take_back()
        mask, shape = part.weighting.mask, (samples, self._entries, self._size)
        return look(
            Aligned(
                part.y_true.view(shape),
                part.prediction.map(operator.methodcaller("view", *shape)),
                Weighting(shape, None if mask is None else mask.view(*shape[:2], 1), _scratch=scratch),
                self._batch.where,
            )
        )

    def leave(self) -> None:
        """All parts were added."""
        rows = [torch.cat(parts) for parts in zip(*self._rows, strict=True)]
        self._by.leave(Groups("sample", None, rows[0], rows[1], rows[2], rows[3]), self._batch, self._seen)

    def _sum(self, elements: Tensor, weights: Tensor | None) -> Tensor:
        """Σ by sample of weights × elements."""
        if weights is None and self._plain:
            return elements.view(-1, self._entries * self._size).sum(1)
        # Over columns first: what is left is as small as the weights.
        entries = torch.mv(elements, self._columns)
        return (entries if weights is None else entries.mul_(weights)).view(-1, self._entries).sum(1)

    def _each(self, weights: Tensor | None, samples: int) -> Tensor:
        """Σ by sample of a number an entry."""
        if weights is None:
            return self._columns.new_full((samples,), self._entries)
        return weights.view(-1, self._entries).sum(1)
