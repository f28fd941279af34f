"""One batch between the caller and the arithmetic: aligned, weighted, masked elements made harmless."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.prediction import Prediction
from lossledger.reduction import Reduction
from lossledger.values import Scratch, selected
from lossledger.weighting import ClassWeight, Weighting, as_mask, carried_mask, class_vector, expand, joined


@dataclass(frozen=True, slots=True, eq=False)
class Late:
    """What a call gave beside targets and predictions, not yet in the shape of the elements."""

    sample_weight: Tensor | None
    mask: Tensor | None
    class_weight: ClassWeight | None

    @property
    def given(self) -> str | None:
        """The first argument that was given."""
        return next(
            (name for name in ("sample_weight", "mask", "class_weight") if getattr(self, name) is not None), None
        )


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """One batch, ready for arithmetic: a layout with the class axis last, masked elements replaced by safe values.

    Args:
        y_true: targets in the layout of the loss.
        prediction: the output in the same layout.
        weighting: mask and weight of each element.
        where: the term, for messages.
        late: sample weight, mask and class weight of a loss whose `call` alone can tell the shape of its entries;
            they become the weighting once it has run.
        column_weight: `[C]`, class weights of a loss that treats them apart from sample weights.
    """

    y_true: Tensor
    prediction: Prediction
    weighting: Weighting
    where: str
    late: Late | None = None
    column_weight: Tensor | None = None
    _lazy: tuple[Aligned, Callable[[], tuple[Tensor, Tensor]]] | None = field(default=None, init=False, repr=False)

    @classmethod
    def lazily(cls, given: Aligned, safe: Callable[[], tuple[Tensor, Tensor]]) -> Aligned:
        """A batch whose masked elements are replaced when somebody reads targets or predictions.

        Args:
            given: the batch with whatever masked elements hold.
            safe: makes targets and predictions without it.
        """
        found = object.__new__(cls)
        for name in ("weighting", "where", "late", "column_weight"):
            object.__setattr__(found, name, getattr(given, name))
        object.__setattr__(found, "_lazy", (given, safe))
        return found

    def __getattr__(self, name: str) -> Any:
        # Python asks here for what is not set: of a lazy batch, before it was read.
        if name not in ("y_true", "prediction"):
            raise AttributeError(name)
        assert self._lazy is not None
        true, pred = self._lazy[1]()
        object.__setattr__(self, "y_true", true)
        object.__setattr__(self, "prediction", Prediction(pred))
        return true if name == "y_true" else self.prediction

    @property
    def given(self) -> Aligned:
        """The batch as it was given: masked elements may hold anything, NaN too."""
        return self if self._lazy is None else self._lazy[0]

    def divisor(self, reduction: Reduction, weighting: Weighting) -> Tensor | int | None:
        """What the batch adds to the divisor; its targets are not read in vain."""
        return reduction.divisor(weighting, self.y_true if reduction.reads_targets else None)

    def part(self, rows: slice, scratch: Scratch) -> Aligned:
        """Some samples of the batch, whose calculation writes to buffers."""
        true = self.y_true[rows]
        return replace(
            self,
            y_true=true,
            prediction=self.prediction.map(operator.itemgetter(rows)),
            weighting=self.weighting.part(rows, len(true), scratch),
        )

    def made_safe(self, safe: Callable[[Tensor, Tensor, Weighting], tuple[Tensor, Tensor]]) -> Aligned:
        """The batch as it was given with harmless values at masked elements."""
        if self.weighting.mask is None:
            return self
        true, pred = safe(self.y_true, self.prediction.raw, self.weighting)
        return replace(self, y_true=true, prediction=Prediction(pred))

    def with_columns(self, *class_weights: ClassWeight | None) -> Aligned:
        """The batch with the product of those class weights that were given, one a column."""
        raw = self.given.prediction.raw
        vectors = [
            class_vector(given, raw.shape[-1], where=self.where).to(raw, non_blocking=True)
            for given in class_weights
            if given is not None
        ]
        if not vectors:
            return self
        found = replace(self.given, column_weight=torch.stack(vectors).prod(0))
        return found if self._lazy is None else Aligned.lazily(found, self._lazy[1])


def select_leading(y_true: Tensor, y_pred: Tensor, mask: Tensor | None, where: str) -> tuple[Tensor, Tensor]:
    """Harmless values at masked entries of inputs whose leading axes are those of the mask."""
    if mask is None:
        return y_true, y_pred
    mask = as_mask(mask, f"{where}: mask")

    def select(values: Tensor, safe: float) -> Tensor:
        inside = mask.squeeze(-1) if mask.ndim > values.ndim and mask.shape[-1] == 1 else mask
        inside = inside.reshape(*inside.shape, *(1,) * (values.ndim - inside.ndim))
        return selected(inside, values, safe)

    try:
        return select(y_true, 0), select(y_pred, 0.5)
    except RuntimeError:
        raise InputError(
            f"{where}: mask must have the leading axes of y_pred {tuple(y_pred.shape)}; received {tuple(mask.shape)}."
        ) from None


def and_mask(valid: Tensor, mask: Tensor | None, shape: tuple[int, ...], where: str) -> Tensor:
    """The mask of a call together with what the labels say, `[B, d…]`, for elements of the given shape."""
    if mask is None:
        return valid
    what = f"{where}: mask"
    return valid & expand(as_mask(mask, what), shape[:-1], 1, what).squeeze(-1)


def with_carried(y_pred: Any, mask: Any, checked: bool, where: str) -> tuple[Any, bool]:
    """The mask with the one that the output carries, and whether the values of the targets are known to be right.

    What a model masks is not known at the data boundary, where values are checked once.
    """
    carried = carried_mask(y_pred)
    if carried is None:
        return mask, checked
    return joined(mask, carried, where), checked and carried.device.type != "cpu"


def detached(output: Tensor) -> Tensor:
    """The output without its graph, with the mask that it carries."""
    found = output.detach()
    mask = getattr(output, "_keras_mask", None)
    if mask is not None:
        found._keras_mask = mask  # type: ignore[attr-defined]
    return found


def of_labels(vector: Tensor, labels: Tensor) -> Tensor:
    """The weight of each label, `[B, d…, 1]`, from those of the classes; a masked label may be any number.

    >>> of_labels(torch.tensor([1.0, 5.0]), torch.tensor([1, -1])).tolist()
    [[5.0], [1.0]]
    """
    return vector[labels.long().clamp(0, len(vector) - 1)].unsqueeze(-1)


def fitted(class_weight: Tensor, shape: tuple[int, ...], y_true: Tensor, where: str) -> Tensor:
    """One class weight a label, `[B, d…, 1]`, on the values that a loss returned, `[B, d…, …]`; weights a column stay.

    Raises:
        InputError: the loss returned a value for each class, or fewer values than there are labels.

    Example:
        >>> fitted(torch.ones(2, 5, 1), (2, 5, 3, 1), torch.zeros(2, 5), "loss").shape
        torch.Size([2, 5, 1, 1])
    """
    values, labels = shape[:-1], class_weight.shape[:-1]
    if class_weight.ndim == 1 or values == labels:
        return class_weight
    received = f"received values of the shape {values} and labels of the shape {tuple(labels)}"
    if values[: len(labels)] != labels:
        raise InputError(
            f"{where}: a class weight is one number a label; expected a value of the loss for each label, {received}. "
            "Reduce over fewer axes, or weigh the samples with sample_weight."
        )
    if values == y_true.shape and values[-1] > 1:
        raise InputError(
            f"{where}: a class weight is one number for each entry, by its largest target; expected one value an "
            f"entry, {received}. Take the mean over the classes, .mean(-1), or multiply by class inside the loss."
        )
    return class_weight.reshape(*labels, *(1,) * (len(shape) - len(labels)))
