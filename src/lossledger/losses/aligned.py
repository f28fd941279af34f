"""One batch between the caller and the arithmetic: aligned, weighted, masked elements made harmless."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.prediction import Prediction
from lossledger.weighting import ClassWeight, Weighting, as_mask, carried_mask, class_vector, expand, joined, selected


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

    def with_columns(self, *class_weights: ClassWeight | None) -> Aligned:
        """The batch with the product of those class weights that were given, one a column."""
        raw = self.prediction.raw
        vectors = [
            class_vector(given, raw.shape[-1], where=self.where).to(raw, non_blocking=True)
            for given in class_weights
            if given is not None
        ]
        return replace(self, column_weight=torch.stack(vectors).prod(0)) if vectors else self


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
