"""Cross-entropy of `hidden @ weightᵀ + bias` in chunks of rows: the logits of all rows never exist at once.

A chunk is one buffer, rows × vocabulary, that holds the logits, then their exponentials, then the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The last layer, and how its cross-entropy is made.

    Args:
        weight: `[V, D]`.
        bias: `[V]`, if there is one.
        label_smoothing: ε, the share of the target that is spread evenly over the vocabulary.
        z_loss: factor of `(log Σ exp z)²`.
        chunk_bytes: what the buffers of a chunk may take.
    """

    weight: Tensor
    bias: Tensor | None
    label_smoothing: float
    z_loss: float
    chunk_bytes: int

    def rows(self, dtype: torch.dtype) -> int:
        """Rows of a chunk whose products are in `dtype`: at least one, whatever the budget."""
        narrow = 0 if _wide(dtype) == dtype else dtype.itemsize
        return max(1, self.chunk_bytes // (self.weight.shape[0] * (_wide(dtype).itemsize + narrow)))


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """Where a pass adds the gradients, in at least float32; `None` for those that nobody asked for.

    Args:
        hidden: `[N, D]`, in the dtype of the hidden states; rows are written, not added to.
        weight: `[V, D]`.
        bias: `[V]`.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """Zeros in the shapes of these."""
        return cls(
            None if hidden is None else torch.zeros_like(hidden, memory_format=torch.contiguous_format),
            None if weight is None else torch.zeros_like(weight, dtype=_wide(weight.dtype)),
            None if bias is None else torch.zeros_like(bias, dtype=_wide(bias.dtype)),
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def passed(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    kept: Tensor | None,
    factors: Tensor | None = None,
    gradients: Gradients | None = None,
) -> Tensor:
    """The loss of each row, and gradients of `Σ factor · loss` where they are asked for.

    Args:
        hidden: `[N, D]`.
        labels: `[N]`, in `[0, V)` at the rows that are kept.
        head: the last layer.
        kept: indices of the rows that count; all for `None`. The others are never read, and their loss is 0.
        factors: `[N]`, what multiplies the loss of each row.
        gradients: takes what is added.
    """
    vocabulary, smoothing = head.weight.shape[0], head.label_smoothing
    # Under autocast hidden states are narrower than the weight: the product is that of the wider of the two.
    product = torch.promote_types(hidden.dtype, head.weight.dtype)
    wide = _wide(product)
    weight = head.weight.to(product)
    bias = None if head.bias is None else head.bias.to(product)
    length = hidden.shape[0] if kept is None else len(kept)
    most = min(head.rows(product), max(length, 1))
    buffer = hidden.new_empty((most, vocabulary), dtype=product)
    scores_buffer = buffer if product == wide else hidden.new_empty((most, vocabulary), dtype=wide)
    values = hidden.new_zeros(hidden.shape[0], dtype=wide)
    for rows in _rows(length, most, kept):
        inputs = hidden[rows].to(product)
        targets = labels[rows].unsqueeze(1)
        narrow, scores = buffer[: len(inputs)], scores_buffer[: len(inputs)]
        torch.mm(inputs, weight.T, out=narrow)
        if bias is not None:
            narrow.add_(bias)
        if product != wide:
            scores.copy_(narrow)
        top = scores.amax(1, keepdim=True)
        scores.sub_(top)
        value = scores.gather(1, targets).mul_(smoothing - 1)
        if smoothing:
            value -= smoothing * scores.mean(1, keepdim=True)
        total = scores.exp_().sum(1, keepdim=True)
        logarithm = total.log()
        value += logarithm
        logarithm += top
        if head.z_loss:
            value += head.z_loss * logarithm.square()
        values[rows] = value.squeeze(1)
        if factors is None or gradients is None:
            continue
        factor = factors[rows].unsqueeze(1).to(wide)
        scores.mul_(factor * (1 + 2 * head.z_loss * logarithm) / total)
        if smoothing:
            scores.sub_(factor * (smoothing / vocabulary))
        scores.scatter_add_(1, targets, factor * (smoothing - 1))
        _add(gradients, rows, scores, narrow, inputs, weight)
    return values


def _rows(length: int, most: int, kept: Tensor | None) -> Iterator[slice | Tensor]:
    for start in range(0, length, most):
        part = slice(start, min(start + most, length))
        yield part if kept is None else kept[part]


def _add(
    gradients: Gradients, rows: slice | Tensor, slopes: Tensor, narrow: Tensor, inputs: Tensor, weight: Tensor
) -> None:
    """Add what a chunk gives to the gradients; `slopes` is that of its logits."""
    if gradients.weight is not None:
        # In at least float32 and without a product of its own, so that the number of chunks leaves no trace.
        gradients.weight.addmm_(slopes.T.to(gradients.weight.dtype), inputs.to(gradients.weight.dtype))
    if gradients.bias is not None:
        gradients.bias.add_(slopes.sum(0))
    if gradients.hidden is not None:
        if slopes.dtype != narrow.dtype:
            slopes = narrow.copy_(slopes)
        gradients.hidden[rows] = (slopes @ weight).to(gradients.hidden.dtype)


class LinearCrossentropyFunction(torch.autograd.Function):
    """The loss of each row, differentiable once; the logits are made again for the gradient, not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        kept: Tensor | None,
        head: Head,
    ) -> Tensor:
        """The loss of each row."""
        ctx.save_for_backward(hidden, labels, kept)
        ctx.head = head
        return passed(hidden, labels, head, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        hidden, labels, kept = ctx.saved_tensors
        head: Head = ctx.head
        wanted = ctx.needs_input_grad
        found = Gradients.zeros(
            hidden if wanted[0] else None, head.weight if wanted[1] else None, head.bias if wanted[2] else None
        )
        passed(hidden, labels, head, kept, factors[0], found)
        weight = None if found.weight is None else found.weight.to(head.weight.dtype)
        bias = None if found.bias is None or head.bias is None else found.bias.to(head.bias.dtype)
        return found.hidden, weight, bias, None, None, None
