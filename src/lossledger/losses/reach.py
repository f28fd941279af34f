"""The gradient of a loss from autograd, also for what it reads beside the output, such as a learnt weight of a task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from lossledger.errors import InputError

_OUTPUT_ONLY: ContextVar[bool] = ContextVar("output only", default=False)


@contextlib.contextmanager
def output_only() -> Iterator[None]:
    """Meanwhile losses leave the `.grad` of what they read beside the output as it is: somebody only looks."""
    token = _OUTPUT_ONLY.set(True)
    try:
        yield
    finally:
        _OUTPUT_ONLY.reset(token)


def is_wanted(parameter: Tensor) -> bool:
    """Whether a parameter that a loss reads collects its gradient now."""
    return parameter.requires_grad and not _OUTPUT_ONLY.get()


def pull(value: Tensor, output: Tensor, where: str) -> tuple[Tensor, bool]:
    """The gradient of a value with respect to the output; other trainable tensors get theirs in `.grad`.

    Args:
        value: one number, with a graph.
        output: a leaf of that graph.
        where: the term.

    Returns:
        the gradient, and whether there are other trainable tensors.

    Raises:
        InputError: the value does not depend on the output.

    Example:
        >>> output, scale = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> pull((3 * output * scale).sum(), output, "loss")
        (tensor([3., 3.]), True)
        >>> scale.grad
        tensor([6.])
    """
    # A compiler follows no graph from node to node; its steps are refused such losses.
    others = [] if torch.compiler.is_compiling() else [p for p in _leaves(value, output) if is_wanted(p)]
    found: tuple[Tensor | None, ...] = (None,)
    if value.requires_grad:
        # What else is read may have come with the output from one forward, whose graph is still to be gone through.
        found = torch.autograd.grad(value, [output, *others], retain_graph=bool(others), allow_unused=True)
    gradient, *rest = found
    if gradient is None:
        raise InputError(
            f"{where}: the loss does not depend on y_pred through differentiable operations; expected values with a "
            "gradient, received values without. Look for comparisons, rounding, .detach() or NumPy in it."
        )
    for leaf, further in zip(others, rest, strict=True):
        if further is not None:
            # As `backward` does, in place: whoever holds the tensor sees the sum.
            leaf.grad = _own(leaf, further) if leaf.grad is None else leaf.grad.add_(further)
    # Those of other terms are added to it, which one number that stands for all does not let happen.
    return gradient.contiguous() if 0 in gradient.stride() else gradient, bool(others)


def _own(leaf: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in memory of its own, laid out as the leaf: autograd hands out views, and one tensor to several."""
    return torch.empty_like(leaf).copy_(gradient) if gradient.layout == torch.strided else gradient.clone()


def _leaves(value: Tensor, known: Tensor) -> list[Tensor]:
    """The trainable tensors that a value depends on, but for the one that is known."""
    found, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Functions of the user may have attributes of any name.
        leaf = node.variable if type(node).__name__ == "AccumulateGrad" else None  # type: ignore[attr-defined]
        if leaf is not None and leaf is not known:
            found.append(leaf)
        waiting.extend(before for before, _ in node.next_functions)
    return found
