"""Values: division by what may be 0; checks that numbers are finite, labels exist, probabilities are in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from lossledger.errors import InputError, InputTypeError

# The values behind `torch.func.vmap`. Before torch 2.7 nothing public shows them, and vmap refuses to check values.
unwrapped: Any = getattr(torch.func, "debug_unwrap", lambda tensor: tensor)


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a real number, of Python or of NumPy; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def in_memory(value: Any) -> Any:
    """Arrays of other libraries, such as a column of pandas, as NumPy's; what torch knows by itself stays.

    torch would read a column as a sequence: position 0 as the row that is called 0.
    """
    if hasattr(value, "__array__") and not hasattr(value, "__torch_function__"):
        return np.asarray(value)
    return value


def not_finite(values: Tensor) -> Tensor:
    """Where values are NaN or infinite: `x − x` is 0 for every other number, in half the passes of `isfinite`."""
    return (values - values).ne(0)


# From here on a pass over memory costs more than a call of torch.
LARGE = 2**14


def streams(tensor: Tensor) -> bool:
    """Whether passes over memory decide what a calculation costs: a large plain tensor on the processor.

    Compilers and vmap arrange passes themselves, and want no operation in place.
    """
    if tensor.numel() < LARGE or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and unwrapped(tensor) is tensor


# Rows of so few columns are put side by side, so many, before they are summed.
_NARROW, _FOLD = 64, 64


def sum_rows(values: Tensor) -> Tensor:
    """Σ over the second last axis.

    >>> sum_rows(torch.ones(2, 3, 4)).tolist()
    [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    *before, length, columns = values.shape
    if columns <= _NARROW and length % _FOLD == 0 and streams(values):
        # Long rows add up several times faster than short ones.
        values = values.reshape(*before, -1, _FOLD * columns).sum(-2).reshape(*before, _FOLD, columns)
    return values.sum(-2)


def largest(y_true: Tensor) -> Tensor:
    """`argmax` over the class axis."""
    # On a processor `max` finds the same place in a third of the time.
    return y_true.max(-1).indices if streams(y_true) else y_true.argmax(-1)


class Scratch:
    """Memory that is written to again and again: fresh memory costs more than what is written to it.

    Example:
        >>> scratch = Scratch()
        >>> first, second = scratch.like(torch.ones(2, 3)), scratch.like(torch.ones(2, 3))
        >>> scratch.take_back()
        >>> scratch.like(torch.ones(6)).data_ptr() == first.data_ptr() != second.data_ptr()
        True
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        # Their views, of one shape at a time.
        self._views: dict[tuple[torch.dtype, int], Tensor] = {}
        self._taken = 0
        self._result: Tensor | None = None

    def like(self, values: Tensor) -> Tensor:
        """A buffer of its own in shape and dtype of the values, contiguous, with anything in it."""
        self._taken += 1
        return self._buffer(values, self._taken)

    def passing(self, values: Tensor) -> Tensor:
        """As `like`, but the next to ask gets the same one."""
        return self._buffer(values, 0)

    def result(self, values: Tensor) -> Tensor:
        """As `like`, for what becomes the result: its own memory, if that was said."""
        return self.like(values) if self._result is None else self._result

    def ahead(self, values: Tensor) -> Tensor:
        """As `passing`, before there is a result: in its memory, if that was said."""
        return self.passing(values) if self._result is None else self._result

    def take_back(self, result: Tensor | None = None) -> None:
        """All buffers can be handed out again; the result of what comes next goes where it is said."""
        self._taken, self._result = 0, result

    def _buffer(self, values: Tensor, position: int) -> Tensor:
        known = self._views.get((values.dtype, position))
        if known is not None and known.shape == values.shape:
            return known
        size, buffers = values.numel(), self._buffers.setdefault(values.dtype, [])
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            while len(buffers) <= position:
                buffers.append(torch.empty(0, dtype=values.dtype))
            if buffers[position].numel() < size:
                buffers[position] = torch.empty(size, dtype=values.dtype)
            found = self._views[values.dtype, position] = buffers[position][:size].view(values.shape)
        return found


def selected(mask: Tensor, values: Tensor, safe: float) -> Tensor:
    """`values` where the mask is set, and `safe` elsewhere; the mask broadcasts to the values."""
    return torch.where(mask, values, torch.full((), safe, dtype=values.dtype, device=values.device))


# Axes that are too short to be worth a loop of their own, and numbers that fit in a cache beside others.
_SHORT, _SLICE = 64, 2**17

# Integers as wide as the numbers of these types.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def zeroed(mask: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape and dtype with 0 where the mask is not set, whatever they hold there.

    A product would keep NaN, and a choice by bools takes four times as long as one by the bits of integers.

    Example:
        >>> zeroed(torch.tensor([[True], [False]]), [torch.tensor([[1.0], [float("nan")]])])[0].tolist()
        [[1.0], [0.0]]
    """
    first = values[0]
    kind = _BITS.get(first.dtype)
    if kind is None or not streams(first) or any(v.requires_grad for v in values):
        return [selected(mask, v, 0) for v in values]
    found = [torch.empty(v.shape, dtype=v.dtype) for v in values]
    # −1 has all bits set.
    bits = mask.to(kind).neg_()
    length = len(first) if first.shape[-1] >= _SHORT else max(_SLICE * len(first) // first.numel(), 1)
    bits = bits.expand(len(first), *bits.shape[1:])
    wide = torch.empty(0, dtype=kind)
    for start in range(0, len(first), length):
        rows = slice(start, start + length)
        chosen = bits[rows]
        if first.shape[-1] < _SHORT:
            # Repeating a number along a short axis takes a call each time: once, not for each tensor.
            wide = wide if start and len(chosen) == length else torch.empty(first[rows].shape, dtype=kind)
            chosen = wide.copy_(chosen.expand(wide.shape))
        for value, result in zip(values, found, strict=True):
            torch.bitwise_and(value[rows].view(kind), chosen, out=result[rows].view(kind))
    return found


def count_not_finite(elements: Tensor, total: Tensor, out: Tensor | None = None) -> Tensor:
    """Number of elements that are NaN or infinite; at least 1 where finite elements overflow in their sum."""
    if streams(elements) and bool(torch.isfinite(total)):
        # To look at a number of the processor waits for nothing.
        return torch.zeros((), dtype=torch.int64)
    # NaN is no zero, and every other number minus itself is one.
    zeros = torch.sub(elements, elements, out=out)
    # To count in numbers takes a fifth of the time of `count_nonzero`.
    bad = zeros.ne_(0).sum().long() if streams(zeros) else torch.count_nonzero(zeros)
    return torch.maximum(bad, not_finite(total))


def any_of(bad: Tensor) -> bool:
    """Whether any is set, on the host; under `torch.func.vmap`, in any of the problems."""
    return bool(unwrapped(bad).any())


def shape_of(tensor: Tensor) -> str:
    """The shape as people write it: `(16, 1)`."""
    return str(tuple(tensor.shape))


def check_labels(
    labels: Tensor, classes: int, where: str, ignore: int | None = None, option: str = "ignore_class"
) -> None:
    """Integer labels are in `[0, classes)`; read on the host, so call it at the data boundary.

    `option` is what the loss calls the argument for the label `ignore`.

    Raises:
        InputTypeError: labels that are not integers.
        InputError: a label out of range, with its value and how many there are.
    """
    labels = unwrapped(labels)
    if labels.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise InputTypeError(f"{where}: expected integer class labels, received dtype {labels.dtype}.")
    bad = (labels < 0) | (labels >= classes) | (labels != labels.round() if labels.is_floating_point() else False)
    if ignore is not None:
        bad &= labels != ignore
    if bool(bad.any()):
        position = tuple(bad.nonzero()[0].tolist())
        raise InputError(
            f"{where}: labels must be integers from 0 to {classes - 1}; received {labels[position].item():g} at "
            f"position {position} ({int(bad.sum())} such in all). Map the labels to 0…{classes - 1}, widen the output, "
            f"or name the label to leave out with {option}."
        )


# Rounding may carry a probability a little past 1; more than this is no rounding.
PROBABILITY_SLACK = 1e-6


def outside_probabilities(y_pred: Tensor) -> Tensor:
    """Where a prediction is no probability; NaN is not counted here, it is non-finite."""
    return (y_pred < -PROBABILITY_SLACK) | (y_pred > 1 + PROBABILITY_SLACK)


def check_probabilities(y_pred: Tensor, where: str, of_logits: str = "use from_logits=True") -> None:
    """Probabilities are in [0, 1]; reads values, so it is not for the step of a training loop.

    Args:
        y_pred: predictions.
        where: beginning of the error.
        of_logits: what to do where they are logits.

    Raises:
        InputError: a value outside, with that remedy.
    """
    y_pred = unwrapped(y_pred.detach())
    # What is repeated without memory is looked at once.
    y_pred = y_pred[tuple(slice(1) if step == 0 else slice(None) for step in y_pred.stride())]
    bad = outside_probabilities(y_pred)
    if bool(bad.any()):
        given = "with from_logits=False " if "from_logits" in of_logits else ""
        raise InputError(
            f"{where}: {given}predictions must be probabilities in [0, 1]; received "
            f"{float(y_pred[bad][0]):g} ({int(bad.sum())} outside in all). If the model has no sigmoid or softmax at "
            f"its end, {of_logits}."
        )


def check_targets(y_true: Tensor, where: str, upper: float = 1.0) -> None:
    """Targets of a cross-entropy are in [0, upper]; reads values.

    Raises:
        InputError: a target outside, with its value.
    """
    y_true = unwrapped(y_true.detach())
    if not y_true.numel():
        return
    # One pass over the targets; NaN is both the least and the greatest of all.
    least, greatest = torch.stack(y_true.aminmax()).tolist()
    if not (least >= 0 and greatest <= upper):
        bad = ~((y_true >= 0) & (y_true <= upper))
        raise InputError(
            f"{where}: targets must be in [0, {upper:g}]; received {float(y_true[bad][0]):g} "
            f"({int(bad.sum())} outside in all). Use 0 and 1 (or probabilities); for class indices use "
            "SparseCategoricalCrossentropy."
        )


def reciprocal(divisor: Any, dtype: torch.dtype) -> Any:
    """1 / divisor, and 0 where nothing counted."""
    if isinstance(divisor, Tensor):
        return ((divisor != 0) / (divisor + (divisor == 0)).double()).to(dtype)
    return 1.0 / divisor if divisor else 0.0
