"""Masks, sample weights and class weights become one weight per entry; targets and predictions are aligned.

The one place where shapes of different ranks meet. Shapes below: `B` samples, `d…` positions (time, height, width),
`C` the length of the class axis of the elements (1 where a loss has none). An *entry* is a position of the per-sample
loss, `[B, d…]`; an *element* is one number of the unreduced loss, `[B, d…, C]`. Everything is kept in the rank of the
elements: a weight per entry has the length 1 on the class axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossledger.errors import EmptyDataError, InputError, InputTypeError, UnknownNameError
from lossledger.values import Scratch, any_of, in_memory, is_number, selected, shape_of, streams

# Torch stores these, and can neither compare nor index them; the wider type holds all of their values.
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def as_tensor(value: Any, what: str, *, device: torch.device | None = None) -> Tensor:
    """`value` as a tensor, sharing memory where possible.

    Unsigned integers that torch cannot calculate with (label images often hold them) become the next signed ones.

    Raises:
        InputTypeError: `value` cannot become a tensor of numbers.
    """
    if isinstance(value, Tensor):
        moved = value if device is None or value.device == device else value.to(device)
        return moved.to(_WIDER[moved.dtype]) if moved.dtype in _WIDER else moved
    try:
        if isinstance(array := in_memory(value), np.ndarray) and not array.flags.writeable:
            with warnings.catch_warnings():
                # Memory maps are shared, not copied; nothing in the library writes to data.
                warnings.simplefilter("ignore")
                return as_tensor(torch.as_tensor(array), what, device=device)
        return as_tensor(torch.as_tensor(array, device=device), what)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(
            f"{what}: expected a tensor, a NumPy array or numbers, received {type(value).__name__} ({error}). "
            "Convert it to one rectangular array of numbers."
        ) from None


def align(y_true: Tensor, y_pred: Tensor, where: str = "loss") -> tuple[Tensor, Tensor]:
    """Targets and predictions of one shape, for losses that compare them element by element.

    `(N,)` with `(N,)` become `(N, 1)`: the last axis is the class axis, never the batch. Ranks that differ by one are
    aligned when the longer ends in 1. Everything else must match exactly: broadcasting would compare each prediction
    with each target.

    Args:
        y_true: targets.
        y_pred: predictions.
        where: the term, for the message.

    Returns:
        both, with the same shape `[B, …, C]`.

    Raises:
        InputError: shapes that differ in any other way.

    Example:
        >>> a, b = align(torch.zeros(4), torch.zeros(4, 1))
        >>> tuple(a.shape), tuple(b.shape)
        ((4, 1), (4, 1))
    """
    # The same names again: messages show what the caller passed.
    true, pred = y_true, y_pred
    if true.ndim == pred.ndim - 1 and pred.shape[-1] == 1:
        true = true.unsqueeze(-1)
    elif pred.ndim == true.ndim - 1 and true.shape[-1] == 1:
        pred = pred.unsqueeze(-1)
    if true.ndim == 1 and pred.ndim == 1:
        true, pred = true.unsqueeze(-1), pred.unsqueeze(-1)
    if true.shape != pred.shape or true.ndim == 0:
        raise InputError(
            f"{where}: y_true and y_pred must have the same shape; expected {shape_of(y_pred)} as y_pred, "
            f"received y_true {shape_of(y_true)}. {_shape_remedy(y_true, y_pred)}"
        )
    return true, pred


def _shape_remedy(y_true: Tensor, y_pred: Tensor) -> str:
    a, b = tuple(y_true.shape), tuple(y_pred.shape)
    if not a or not b:
        return "Pass arrays whose first axis is the batch."
    if a[0] != b[0]:
        return "The first axis is the batch: pass as many targets as predictions."
    for channels_first, other, names in (
        (b, a, ("output", "target", "y_pred")),
        (a, b, ("target", "output", "y_true")),
    ):
        if len(a) == len(b) > 2 and channels_first == (other[0], other[-1], *other[1:-1]):
            return (
                f"The {names[0]} has its class axis at position 1 (NCHW) and the {names[1]} has it last: permute one "
                f"of them, for example {names[2]}.movedim(1, -1)."
            )
    if len(a) == len(b) - 1 or (len(a) == len(b) and a[-1] == 1):
        return "If the target holds class indices, use SparseCategoricalCrossentropy; else reshape it."
    return "Reshape one of them; nothing is broadcast."


def split_shape(y_pred: Tensor, where: str) -> tuple[int, ...]:
    """The shape of the entries of predictions `[B, d…, C]`, once they are known not to be empty of axes.

    Raises:
        EmptyDataError: a length of 0 on another axis than the batch.
    """
    if y_pred.ndim == 0 or 0 in y_pred.shape[1:]:
        raise EmptyDataError(
            f"{where}: expected y_pred with a batch axis and no empty axis, received shape {shape_of(y_pred)}. "
            "Check the slice or the layer that made them."
        )
    return tuple(y_pred.shape[:-1])


# Axes shorter than this are not worth a loop of their own.
_SHORT = 64


@dataclass(frozen=True, slots=True, eq=False)
class Weighting:
    """What each element counts: the mask selects, the weight multiplies.

    Args:
        shape: the elements, `(B, d…, C)`.
        mask: bool, broadcastable to `shape`, `True` where an element counts; `None` when all do.
        given: float, broadcastable to `shape`, a factor of the weight; `None` when all are 1.
        columns: `[C]`, the other factor: the weights of classes that have a column each; `None` when all are 1.
        labels: the class of each entry, where its weight hung on it.

    Example:
        >>> w = weighting((2, 3), 1, mask=torch.tensor([[1, 1, 0], [1, 0, 0]]))
        >>> int(w.count())
        3
    """

    shape: tuple[int, ...]
    mask: Tensor | None = None
    given: Tensor | None = None
    _scratch: Scratch | None = field(default=None, repr=False)
    columns: Tensor | None = None
    labels: Tensor | None = field(default=None, repr=False)
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def weight(self) -> Tensor | None:
        """Sample weight × class weight, broadcastable to `shape`; `None` when all are 1."""
        if self.given is None or self.columns is None:
            return self.columns if self.given is None else self.given
        if "weights" not in self._known:
            self._known["weights"] = self.given * self.columns
        found: Tensor = self._known["weights"]
        return found

    @property
    def product(self) -> Tensor | None:
        """Weight × mask, exactly 0 where masked, also where the weight is NaN; `None` when all elements count 1."""
        if self.mask is None:
            return self.weight
        weight = self.weight
        if weight is None:
            return self.mask
        found: Tensor | None = self._known.get("product")
        if found is None:
            zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
            found = self._known["product"] = torch.where(self.mask, weight, zero)
        return found

    def product_for(self, elements: Tensor) -> Tensor | None:
        """The product as it multiplies large elements fastest: written out in their shape and dtype."""
        product = self.product
        if product is None or elements.requires_grad or product.requires_grad or not streams(elements):
            return product
        if product.dtype == elements.dtype and (product.shape == elements.shape or elements.shape[-1] >= _SHORT):
            return product
        if "spread" not in self._known:
            # Numbers first: repeating bools takes twice as long.
            small = product.to(elements.dtype)
            out = torch.empty(elements.shape, dtype=elements.dtype) if self._scratch is None else self.kept(elements)
            assert out is not None
            self._known["spread"] = out.copy_(small.expand(elements.shape))
        found: Tensor = self._known["spread"]
        return found

    def part(self, rows: slice, samples: int, scratch: Scratch) -> Weighting:
        """That of so many samples, which write to buffers."""
        rank, length = len(self.shape), self.shape[0]

        def cut(values: Tensor | None) -> Tensor | None:
            # A weight of fewer axes is one by column.
            return values if values is None or values.ndim != rank or values.shape[0] != length else values[rows]

        return Weighting((samples, *self.shape[1:]), cut(self.mask), cut(self.given), scratch, self.columns)

    def kept(self, values: Tensor) -> Tensor | None:
        """Where a result like the values is written that is needed until their part is done; `None`: anywhere."""
        return None if self._scratch is None else self._scratch.like(values)

    def result(self, values: Tensor) -> Tensor | None:
        """Where derivatives like the values are written; `None`: anywhere."""
        return None if self._scratch is None else self._scratch.result(values)

    def ahead(self, values: Tensor) -> Tensor | None:
        """As `passing`, before the derivatives are written; `None`: anywhere."""
        return None if self._scratch is None else self._scratch.ahead(values)

    def passing(self, values: Tensor) -> Tensor | None:
        """Where a result is written that is needed until the next one; `None`: anywhere."""
        return None if self._scratch is None else self._scratch.passing(values)

    def count(self) -> Tensor | int:
        """Number of unmasked elements."""
        if "count" not in self._known:
            self._known["count"] = self.total_of(self.mask)
        found: Tensor | int = self._known["count"]
        return found

    def total_weight(self) -> Tensor | int:
        """Σ weight · mask over the elements."""
        if "weight" not in self._known:
            product = self.product
            self._known["weight"] = self.count() if product is self.mask else self.total_of(product)
        found: Tensor | int = self._known["weight"]
        return found

    def total_of(self, statistic: Tensor | None) -> Tensor | int:
        """Σ over the elements of a statistic that broadcasts to them; the number of elements for `None`."""
        size = prod(self.shape)
        if statistic is None:
            return size
        repeats = size // statistic.numel() if statistic.numel() else 0
        if statistic.dtype != torch.bool:
            total = statistic.sum(dtype=torch.float64)
        else:
            total = torch.count_nonzero(statistic) if streams(statistic) else statistic.sum()
        return total if repeats == 1 else total * repeats

    def select(self, values: Tensor, safe: float) -> Tensor:
        """`values` with `safe` at masked positions, so that NaN or Inf there reach neither value nor gradient."""
        if self.mask is None:
            return values
        return selected(self.mask, values, safe)


def weighting(
    entries: tuple[int, ...],
    columns: int,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    class_weight: Tensor | None = None,
    where: str = "loss",
) -> Weighting:
    """One weight and one mask for the elements `[*entries, columns]`.

    Args:
        entries: `(B, d…)`, the shape of the per-sample loss.
        columns: length of the class axis of the elements, 1 where the loss has none.
        sample_weight: a scalar, `(B,)`, a leading part of `entries`, `entries`, or the elements' shape.
        mask: the same shapes; bool, or 0 and 1.
        class_weight: `(columns,)` on losses per column, or already one weight per entry, `[*entries, 1]`.
        where: the term, for the message.

    Raises:
        InputError: another shape. `(B,)` is always one number a sample, also when B equals another axis.
        InputTypeError: complex weights.
    """
    shape = (*entries, columns)
    if sample_weight is not None and sample_weight.is_complex():
        raise InputTypeError(
            f"{where}: sample_weight: expected real numbers, received dtype {sample_weight.dtype}. Pass its real part."
        )
    weight = None if sample_weight is None else expand(sample_weight, entries, columns, f"{where}: sample_weight")
    if weight is not None and not weight.is_floating_point():
        weight = weight.to(torch.get_default_dtype())
    by_column = None
    if class_weight is not None:
        # Multiplied out, they would be as large as the elements.
        if class_weight.ndim == 1 and (weight is None or weight.shape[-1] == 1):
            by_column = class_weight
        else:
            weight = class_weight if weight is None else weight * class_weight
    if mask is not None:
        mask = expand(as_mask(mask, f"{where}: mask"), entries, columns, f"{where}: mask")
    return Weighting(shape, mask, weight, columns=by_column)


def carried_mask(output: Any) -> Tensor | None:
    """The mask that a layer of Keras left on its output (or a torch module in the same attribute), bool.

    It is an attribute of the very tensor: a cast, a slice or a `detach` loses it.
    """
    mask = getattr(output, "_keras_mask", None)
    return mask.bool() if isinstance(mask, Tensor) else None


def joined(mask: Any, carried: Tensor | None, where: str) -> Any:
    """A given mask and the one that the output carries, where there are both.

    Example:
        >>> joined([True, False], torch.tensor([[True, False], [True, True]]), "loss").tolist()
        [[True, False], [False, False]]
    """
    if mask is None or carried is None:
        return carried if mask is None else mask
    return both(mask, carried, f"{where}: mask")


def masked_weight(sample_weight: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Sample weights that are 0 where a mask is not set, for code that knows no masks; leading axes match.

    Example:
        >>> masked_weight(torch.tensor([2.0, 3.0]), torch.tensor([[True, False], [True, True]])).tolist()
        [[2.0, 0.0], [3.0, 3.0]]
    """
    if mask is None:
        return sample_weight
    inside = mask != 0
    if sample_weight is None:
        return inside.to(torch.get_default_dtype())
    weight, inside = _of_one_rank(sample_weight, inside)
    return torch.where(inside, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _of_one_rank(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many axes as the longer one: missing axes at the end become 1."""
    rank = max(first.ndim, second.ndim)
    one, other = (t.reshape(*t.shape, *(1,) * (rank - t.ndim)) for t in (first, second))
    return one, other


def as_mask(mask: Tensor, what: str) -> Tensor:
    """A mask as bool.

    Raises:
        InputError: on the host, a value that is neither 0 nor 1: that would be a weight.
    """
    if mask.dtype == torch.bool:
        return mask
    # On a device this check would read a value back; the data boundary of `fit` has made the mask bool by then.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and any_of((mask != 0) & (mask != 1)):
        raise InputError(f"{what}: expected booleans or 0 and 1, received other values. Pass weights as sample_weight.")
    return mask != 0


def both(mask: Any, other: Any, what: str) -> Tensor:
    """True where two masks are: the shorter one holds for all that its entries contain.

    Raises:
        InputError: leading axes that differ.
    """
    one, two = (as_mask(as_tensor(m, what), what) for m in (mask, other))
    if two.device != one.device:
        two = two.to(one.device)
    one, two = _of_one_rank(one, two)
    if any(
        a != b and (axis == 0 or 1 not in (a, b)) for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=True))
    ):
        raise InputError(
            f"{what}: expected two masks with the same leading axes, received {shape_of(one)} and {shape_of(two)}."
        )
    return one & two


def expand(values: Tensor, entries: tuple[int, ...], columns: int, what: str) -> Tensor:
    """`values` in the rank of the elements: leading axes match, missing axes become 1.

    An axis of length 1 after the batch axis is repeated; the batch axis must match.

    Raises:
        InputError: the shape is none of the accepted ones.
    """
    shape = tuple(values.shape)
    rank = len(entries) + 1
    full = (*entries, columns)
    fits = len(shape) <= rank and all(
        mine == theirs or (mine == 1 and axis > 0) for axis, (mine, theirs) in enumerate(zip(shape, full, strict=False))
    )
    # (B, 1) against a loss of one number a sample: the trailing 1 is the class axis.
    if not fits:
        accepted = [str(entries[:k]) for k in range(1, len(entries) + 1)]
        if columns > 1:
            accepted.append(str(full))
        raise InputError(
            f"{what} must have one of the shapes {', '.join(accepted)}; received {shape}. "
            "Leading axes are those of the loss; nothing else is broadcast."
        )
    return values if len(shape) == rank else values.reshape(*shape, *(1,) * (rank - len(shape)))


ClassWeight = Mapping[Any, float] | Sequence[float] | Tensor


def class_vector(
    class_weight: ClassWeight, classes: int, names: Sequence[str] | None = None, where: str = "loss"
) -> Tensor:
    """Class weights as a vector `[classes]`, in float64: the caller rounds them to the dtype of the predictions.

    Args:
        class_weight: by index or name (a missing class has the weight 1), or one number a class. The values of a
            tensor are taken as they are: `check_class_weight` reads them once, outside of the step.
        classes: number of classes.
        names: class names, in order.
        where: the output, for the message.

    Raises:
        UnknownNameError: a name or an index that is no class.
        InputError: the wrong number of weights, or one that is negative or not finite.
        InputTypeError: a weight that is no number.

    Example:
        >>> class_vector({"cat": 3.0}, 2, names=["dog", "cat"]).tolist()
        [1.0, 3.0]
    """
    # Not in a compiled graph, which holds no branch on values.
    if not isinstance(class_weight, Tensor) and not torch.compiler.is_compiling():
        check_class_weight(class_weight, where)
    if isinstance(class_weight, Mapping):
        weights = [1.0] * classes
        for key, value in class_weight.items():
            weights[_class_index(key, classes, names, where)] = float(value)
        return torch.tensor(weights, dtype=torch.float64)
    # Numbers of Python are float64; torch would round them to its default dtype.
    held = isinstance(class_weight, Tensor | np.ndarray)
    vector = as_tensor(
        class_weight if held else torch.as_tensor(class_weight, dtype=torch.float64), f"{where}: class_weight"
    )
    if tuple(vector.shape) != (classes,):
        raise InputError(
            f"{where}: class_weight must hold one number a class; expected shape ({classes},), "
            f"received {shape_of(vector)}."
        )
    return vector.to(torch.float64)


def check_class_weight(class_weight: ClassWeight, where: str) -> None:
    """Class weights are numbers, finite and not negative; reads values, so it is not for the step of a training loop.

    Raises:
        InputError: a weight that is negative or not finite.
        InputTypeError: a weight that is no number.
    """
    if isinstance(class_weight, Mapping):
        for key, value in class_weight.items():
            if not is_number(value) and not (isinstance(value, Tensor | np.ndarray) and value.ndim == 0):
                raise InputTypeError(f"{where}: class_weight[{key!r}]: expected a number, received {value!r}.")
        values = torch.tensor([float(value) for value in class_weight.values()], dtype=torch.float64)
    else:
        values = as_tensor(class_weight, f"{where}: class_weight")
    if values.is_complex():
        raise InputTypeError(f"{where}: class_weight: expected real numbers, received dtype {values.dtype}.")
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise InputError(f"{where}: class_weight must be finite and not negative; received {values.tolist()}.")


def _class_index(key: Any, classes: int, names: Sequence[str] | None, where: str) -> int:
    """The class of a key: its name, or its index (a whole number, of whatever type)."""
    if isinstance(key, str):
        if names is not None and key in names:
            return list(names).index(key)
    elif is_number(key) and float(key).is_integer() and 0 <= key < classes:
        return int(key)
    known = list(names) if names is not None and isinstance(key, str) else list(range(classes))
    raise UnknownNameError(f"class in class_weight of {where}", key, known)


def argmax_weights(weights: Sequence[float] | Tensor, y_true: Any) -> Tensor:
    """A weight for each entry by the class with the largest target: `weights[argmax(y_true)]`.

    The way class weights are often written for segmentation. An entry without any class counts as class 0, since
    that is what argmax says of a row of zeros; with independent masks, `class_weight` by column has no such surprise.

    Args:
        weights: one number a class, `[C]`.
        y_true: one-hot or multi-label targets, `[B, d…, C]`.

    Returns:
        `[B, d…]`, to be passed as `sample_weight`.

    Raises:
        InputError: another number of classes.

    Example:
        >>> argmax_weights([1.0, 9.0], [[[0.0, 1.0], [1.0, 0.0]]])
        tensor([[9., 1.]])
    """
    targets = as_tensor(y_true, "y_true")
    vector = class_vector(weights, targets.shape[-1], where="argmax_weights")
    floating = isinstance(weights, Tensor) and weights.is_floating_point()
    vector = vector.to(weights.dtype if floating else torch.get_default_dtype())  # type: ignore[union-attr]
    return vector.to(targets.device)[targets.argmax(-1)]
