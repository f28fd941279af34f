"""Calling an unknown loss function on pieces of a batch: which arguments it takes, and which batches it is asked of."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lossledger.errors import InputError, InputTypeError
from lossledger.losses.arguments import OUTPUTS, TARGETS
from lossledger.losses.expression import Expression
from lossledger.losses.loss import Loss
from lossledger.values import shape_of
from lossledger.weighting import as_mask, as_tensor

Order = Literal["y_true, y_pred", "input, target"]

MOST_ROWS = 16
_WEIGHTS = ("sample_weight", "sample_weights", "weights")


class ProbeFailed(Exception):
    """The function raised an error, or gave no finite number, on the batch of a probe."""


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """A batch to call the function with.

    Args:
        y_true: targets, batch first.
        y_pred: predictions, batch first.
        mask: bool, leading axes of the targets, or `None`.
        weight: `[B]`, for a function that takes weights.
    """

    y_true: Tensor
    y_pred: Tensor
    mask: Tensor | None = None
    weight: Tensor | None = None

    def __len__(self) -> int:
        return self.y_pred.shape[0]

    def rows(self, index: Sequence[int] | Tensor) -> Data:
        """The samples at these positions, in this order."""
        places = torch.as_tensor(index, device=self.y_pred.device)
        mask = None if self.mask is None else self.mask[places]
        weight = None if self.weight is None else self.weight[places]
        return Data(self.y_true[places], self.y_pred[places], mask, weight)

    def valid(self) -> list[int]:
        """Number of entries that count, a sample."""
        if self.mask is None:
            return [1] * len(self)
        return [int(count) for count in self.mask.flatten(1).sum(1)]


@dataclass(frozen=True, slots=True)
class Caller:
    """A loss function with what is known of its arguments.

    Args:
        fn: the function; a module is a copy, so that probing leaves its state alone.
        order: of its first two arguments.
        takes_mask: whether it has an argument `mask`.
        weight_name: its argument for sample weights, if it has one.
    """

    fn: Callable[..., Any]
    order: Order
    takes_mask: bool
    weight_name: str | None

    def raw(self, data: Data) -> Tensor:
        """What the function returns, as a tensor.

        Raises:
            ProbeFailed: it raised, or returned something that is no array of numbers.
        """
        named: dict[str, Any] = {}
        if self.takes_mask and data.mask is not None:
            named["mask"] = data.mask.clone()
        if self.weight_name is not None and data.weight is not None:
            named[self.weight_name] = data.weight.clone()
        # A function may write to its arguments; the caller's arrays must survive that.
        first, second = data.y_true.clone(), data.y_pred.clone()
        if self.order == "input, target":
            first, second = second, first
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = self.fn(first, second, **named)
                return result if isinstance(result, Tensor) else torch.as_tensor(result)
        except Exception as error:
            text = str(error).strip().splitlines()
            raise ProbeFailed(f"{type(error).__name__}: {text[0] if text else 'without a message'}") from error

    def value(self, data: Data) -> float:
        """The number that the function returns.

        Raises:
            ProbeFailed: as `raw`; also several numbers, or one that is not finite.
        """
        result = self.raw(data).detach()
        if result.numel() != 1:
            raise ProbeFailed(f"it returned shape {shape_of(result)}, not one number")
        number = float(result)
        if not math.isfinite(number):
            raise ProbeFailed(f"it returned {number}")
        return number


def caller_of(fn: Any, order: Order | None) -> Caller:
    """How to call a function, from its type and the names of its arguments.

    Raises:
        InputTypeError: not callable, or a class.
        InputError: an order that does not exist.
    """
    if isinstance(fn, type) or not callable(fn):
        raise InputTypeError(
            f"fingerprint: expected a function or an instance of a loss, received {_described(fn)}. "
            "Pass what is called with targets and predictions."
        )
    if order not in (None, "y_true, y_pred", "input, target"):
        raise InputError(f"fingerprint: order must be 'y_true, y_pred' or 'input, target'; received {order!r}.")
    names = _argument_names(fn)
    if order is None:
        order = _order_of(fn, names)
    if isinstance(fn, Expression | Loss):
        return Caller(fn, order, True, "sample_weight")
    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn)
    weight = next((name for name in names if name in _WEIGHTS), None)
    return Caller(fn, order, "mask" in names, weight)


def _described(fn: Any) -> str:
    return f"the class {fn.__name__}" if isinstance(fn, type) else type(fn).__name__


def _argument_names(fn: Any) -> list[str]:
    target = fn.forward if isinstance(fn, nn.Module) else fn
    try:
        return list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        # Functions written in C have no signature.
        return []


def _order_of(fn: Any, names: Sequence[str]) -> Order:
    if isinstance(fn, nn.Module):
        return "input, target"
    first = names[0].lower() if names else ""
    if first in OUTPUTS and not (len(names) > 1 and names[1].lower() in OUTPUTS):
        return "input, target"
    if first not in TARGETS and len(names) > 1 and names[1].lower() in TARGETS:
        return "input, target"
    return "y_true, y_pred"


def batch_of(y_true: Any, y_pred: Any, mask: Any) -> Data:
    """At most 16 samples that have something to say, detached from any graph.

    Raises:
        InputError: fewer than four samples, another number of targets, a mask that does not fit.
    """
    pred, true = as_tensor(y_pred, "y_pred").detach(), as_tensor(y_true, "y_true").detach()
    if pred.ndim == 0 or true.ndim == 0 or pred.shape[0] != true.shape[0]:
        raise InputError(
            "fingerprint: y_true and y_pred must have the batch on their first axis; expected as many targets as "
            f"predictions, received {shape_of(true)} and {shape_of(pred)}. Wrap a function of another layout in a "
            "lambda that moves the axes."
        )
    given = None
    if mask is not None:
        given = as_mask(as_tensor(mask, "mask", device=pred.device), "fingerprint: mask").detach()
        if given.ndim == 0 or given.shape[0] != pred.shape[0]:
            raise InputError(
                f"fingerprint: mask must have the batch on its first axis; expected {pred.shape[0]} samples, received "
                f"shape {shape_of(given)}."
            )
    data = Data(true.to(pred.device), pred, given)
    counted = [row for row, count in enumerate(data.valid()) if count]
    if len(counted) < 4:
        raise InputError(
            f"fingerprint: expected at least 4 samples with something to count, received {len(counted)}. "
            "Pass a batch of real or random data; 8 to 16 samples are enough."
        )
    step = max(1.0, len(counted) / MOST_ROWS)
    chosen = [counted[int(step * place)] for place in range(min(MOST_ROWS, len(counted)))]
    return data.rows(chosen)


def widened(caller: Caller, data: Data) -> tuple[Caller, Data]:
    """Function and batch in float64, where the function takes it: differences then stand out from rounding."""
    if not data.y_pred.is_floating_point():
        return caller, data
    fn = copy.deepcopy(caller.fn).double() if isinstance(caller.fn, nn.Module) else caller.fn
    wide = replace(caller, fn=fn)
    true = data.y_true.double() if data.y_true.is_floating_point() else data.y_true
    better = replace(data, y_true=true, y_pred=data.y_pred.double())
    try:
        wide.raw(better)
    except ProbeFailed:
        return caller, data
    return wide, better


def repeated(data: Data, axes: tuple[int, int]) -> Data:
    """Each position twice, along one axis of targets and predictions (and of the mask, where it has it)."""
    true_axis, pred_axis = axes
    mask = data.mask
    if mask is not None and mask.ndim > true_axis and mask.shape[true_axis] == data.y_true.shape[true_axis]:
        mask = torch.cat((mask, mask), true_axis)
    return replace(
        data,
        y_true=torch.cat((data.y_true, data.y_true), true_axis),
        y_pred=torch.cat((data.y_pred, data.y_pred), pred_axis),
        mask=mask,
    )


def positions(data: Data) -> list[tuple[int, int]]:
    """Pairs of axes of targets and predictions that may be positions of one sample (steps, pixels, columns)."""
    true, pred = data.y_true.shape, data.y_pred.shape
    if true == pred:
        return [(axis, axis) for axis in range(1, len(true))]
    pairs = []
    for axis in range(1, len(true)):
        for other in (axis, axis + 1):
            if other < len(pred) and true[axis] == pred[other] and true[axis] > 1:
                pairs.append((axis, other))
    return pairs


def padded(data: Data, axes: tuple[int, int], extra: int) -> Data | None:
    """The batch with `extra` more masked positions; `None` without a mask by position.

    What the padding holds is copied from a masked entry, so that labels to ignore stay labels to ignore.
    """
    mask, (true_axis, pred_axis) = data.mask, axes
    if mask is None or mask.ndim != 2 or true_axis != 1 or mask.shape[1] != data.y_true.shape[1]:
        return None
    hidden = (~mask).nonzero()
    if not len(hidden):
        return None
    sample, place = (int(index) for index in hidden[0])

    def fill(values: Tensor, axis: int) -> Tensor:
        entry = values[sample : sample + 1].narrow(axis, place, 1)
        sizes = [extra if a == axis else size for a, size in enumerate(values.shape)]
        return torch.cat((values, entry.expand(sizes)), axis)

    return replace(
        data,
        y_true=fill(data.y_true, true_axis),
        y_pred=fill(data.y_pred, pred_axis),
        mask=torch.cat((mask, mask.new_zeros(len(data), extra)), 1),
    )


def disturbed(data: Data, axes: tuple[int, int]) -> Data | None:
    """The batch with other predictions at masked positions; `None` where nothing is masked by position."""
    mask, (true_axis, pred_axis) = data.mask, axes
    if mask is None or mask.ndim != 2 or true_axis != 1 or mask.shape[1] != data.y_true.shape[1] or bool(mask.all()):
        return None
    shape = [len(data) if a == 0 else mask.shape[1] if a == pred_axis else 1 for a in range(data.y_pred.ndim)]
    inside = mask.reshape(shape)
    return replace(data, y_pred=torch.where(inside, data.y_pred, data.y_pred * 0.5 + 0.1))


def class_counts(data: Data) -> tuple[list[int], Tensor] | None:
    """The classes in the targets, and how many counted entries each sample has of each, `[B, K]`; `None` without."""
    true = data.y_true
    labels = true
    if true.is_floating_point():
        if bool((true != true.round()).any()):
            return None
        one_hot = true.ndim > 1 and true.shape[-1] > 1 and bool((true.sum(-1) == 1).all()) and bool((true >= 0).all())
        labels = true.argmax(-1) if one_hot else true
    counted = torch.ones_like(labels, dtype=torch.bool)
    if data.mask is not None and data.mask.shape == labels.shape[: data.mask.ndim]:
        counted = data.mask.reshape(*data.mask.shape, *(1,) * (labels.ndim - data.mask.ndim)).expand(labels.shape)
    names = sorted({int(label) for label in labels[counted].tolist()})
    if not 2 <= len(names) < len(data):
        return None
    rows = [((labels == name) & counted).reshape(len(data), -1).sum(1) for name in names]
    return names, torch.stack(rows, 1).double()
