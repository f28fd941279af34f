"""The base of built-in losses that compare targets and predictions of one shape, with the class axis anywhere."""

from __future__ import annotations

from torch import Tensor

from lossledger.errors import InputError
from lossledger.losses.aligned import Late
from lossledger.losses.loss import Loss
from lossledger.weighting import Weighting, align, split_shape


class ElementLoss(Loss):
    """A loss with an element for each number of the output, averaged over the class axis.

    A subclass writes `_elements`, and `_slopes` where the derivative has a closed form. `class_axis` is
    the caller's; inside, it is always the last.
    """

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each entry, `[B, d…]`: the mean of the elements over the class axis."""
        return self._entries(self.align(y_true, y_pred))

    def restore(self, gradient: Tensor, y_pred: Tensor) -> Tensor:
        """A gradient with the class axis last, as the output has it."""
        if self.class_axis != -1 and y_pred.ndim == gradient.ndim:
            gradient = gradient.movedim(-1, self.class_axis)
        return gradient.reshape(y_pred.shape).to(y_pred.dtype)

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        true, pred = align(y_true, y_pred, where)
        split_shape(pred, where)
        if not true.is_floating_point() or true.dtype != pred.dtype:
            true = true.to(pred.dtype)
        axis = self._last(pred, where)
        return (true, pred) if axis is None else (true.movedim(axis, -1), pred.movedim(axis, -1))

    def _last(self, y_pred: Tensor, where: str) -> int | None:
        """The class axis, if it has to be moved to the end."""
        axis = self.class_axis if self.class_axis >= 0 else y_pred.ndim + self.class_axis
        if not 0 < axis < y_pred.ndim:
            raise InputError(
                f"{where}: axis={self.class_axis} is no class axis of an output of shape {tuple(y_pred.shape)}; "
                f"expected 1 to {y_pred.ndim - 1}, or negative. Axis 0 is the batch."
            )
        return None if axis == y_pred.ndim - 1 else axis

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return tuple(y_pred.shape)

    def _weighting(self, shape: tuple[int, ...], y_true: Tensor, y_pred: Tensor, given: Late, where: str) -> Weighting:
        # A weight or a mask in the caller's layout: its class axis moves with that of the output.
        if self.class_axis not in (-1, len(shape) - 1) and given.given is not None:
            moved = [
                v.movedim(self.class_axis, -1) if v is not None and v.ndim == len(shape) else v
                for v in (given.sample_weight, given.mask)
            ]
            given = Late(moved[0], moved[1], given.class_weight)
        return super()._weighting(shape, y_true, y_pred, given, where)
