"""Losses that are functions or torch modules: yours, and torch's own, each called the way it expects.

torch's losses take `(input, target)` and reduce by themselves. They are called unreduced here, so that weights,
masks, groups and splitting work, and their divisor (Σ of class weights for an indexed cross-entropy with `weight`)
becomes a statistic like any other.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossledger import reduction as reductions
from lossledger.errors import InputError, InputTypeError
from lossledger.losses.aligned import Aligned
from lossledger.losses.loss import Loss, snake_case
from lossledger.reduction import Reduction
from lossledger.weighting import align, check_labels, check_probabilities, shape_of


class FunctionLoss(Loss):
    """A function `fn(y_true, y_pred)` as a loss.

    Args:
        fn: returns one value per entry, one per sample, or a scalar.
        name: name of the term; the function's own name if not given.
        reduction: of the values that the function returns.
        scalar: what a scalar stands for, `"mean"` or `"sum"` over the samples. Without it a scalar is taken as the
            mean of its batch, and refused where a batch is only a part (accumulation, ranks).
        dtype: dtype of the result.

    Divides by: the number of values, or the samples of a scalar mean.

    Raises:
        InputError: a scalar together with weights or a mask.

    Example:
        >>> import lossledger as ll, torch
        >>> loss = ll.losses.FunctionLoss(lambda y_true, y_pred: ((y_true - y_pred) ** 2).sum(), name="sse")
        >>> float(loss(torch.zeros(2, 1), torch.tensor([[1.0], [2.0]])))
        5.0
    """

    def __init__(
        self,
        fn: Callable[[Tensor, Tensor], Tensor],
        name: str | None = None,
        reduction: str | Reduction | None = "sum_over_batch_size",
        scalar: str | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        if not callable(fn):
            raise InputTypeError(f"A loss must be callable as fn(y_true, y_pred); received {type(fn).__name__}.")
        if scalar not in (None, "mean", "sum"):
            raise InputError(f"scalar must be 'mean', 'sum' or None; received {scalar!r}.")
        found = getattr(fn, "__name__", type(fn).__name__)
        super().__init__(name or ("loss" if found == "<lambda>" else found), reduction, dtype)
        self.fn = fn
        self.scalar = scalar

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The values that the function returns."""
        return self.fn(y_true, y_pred)


# Losses of torch whose inputs have one shape and whose mean is over all elements.
_ELEMENTWISE = (
    nn.L1Loss,
    nn.MSELoss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.SoftMarginLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.HingeEmbeddingLoss,
)
_INDEXED = (nn.CrossEntropyLoss, nn.NLLLoss)
_PER_SAMPLE = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)

_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.l1_loss: nn.L1Loss,
    F.mse_loss: nn.MSELoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.kl_div: nn.KLDivLoss,
    F.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
}


class TorchLoss(Loss):
    """A loss of `torch.nn`, called as `(input, target)` and unreduced, with torch's own divisor.

    Args:
        module: a loss module with reduction `mean`, `sum` (or `batchmean`); its class axis is 1, as in torch.
        name: name of the term.

    Divides by: elements for element-wise losses; Σ of the class weights of the unignored labels for an indexed
        cross-entropy; samples for cross-entropy with probabilities and for margin losses; 1 for `sum`.

    Raises:
        InputTypeError: a module that takes more than an input and a target.

    Example:
        >>> import lossledger as ll, torch
        >>> loss = ll.losses.get(torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
        >>> logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
        >>> round(float(loss(labels, logits)), 4)
        0.6931

    Source: torch.nn 2.13.
    """

    def __init__(self, module: nn.Module, name: str | None = None) -> None:
        if not isinstance(module, _ELEMENTWISE + _INDEXED + _PER_SAMPLE):
            raise InputTypeError(
                f"torch.nn.{type(module).__name__} takes more than an input and a target; expected one of torch's "
                "losses of two arguments. Wrap it: lambda y_true, y_pred: module(…)."
            )
        kind = str(getattr(module, "reduction", "mean"))
        if isinstance(module, nn.KLDivLoss) and kind == "mean":
            kind = "elements"
        super().__init__(
            name or snake_case(type(module).__name__.removesuffix("Loss")), "sum" if kind == "sum" else "mean"
        )
        if kind == "none":
            self.reduction = reductions.NONE
        self.module = copy.copy(module)
        self.module.reduction = "none"  # type: ignore[assignment]
        self._batchmean = kind == "batchmean"
        self.class_axis = -1 if isinstance(module, _ELEMENTWISE) else 1

    @property
    def _class_weight_tensor(self) -> Tensor | None:
        weight = getattr(self.module, "weight", None)
        return weight if isinstance(weight, Tensor) else None

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The unreduced values of torch."""
        module = self.module.to(y_pred.device)
        indexed = isinstance(module, _INDEXED) and not y_true.is_floating_point()
        labels = indexed or isinstance(module, nn.MultiMarginLoss | nn.MultiLabelMarginLoss)
        values: Tensor = module(y_pred, y_true.long() if labels else y_true.to(y_pred.dtype))
        return values

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        if isinstance(self.module, _ELEMENTWISE):
            return align(y_true, y_pred, where)
        expected = (y_pred.shape[0], *y_pred.shape[2:])
        if y_true.shape == (*expected, 1) and y_true.shape != y_pred.shape:
            y_true = y_true.squeeze(-1)
        if isinstance(self.module, _INDEXED) and y_true.shape not in (expected, y_pred.shape):
            raise InputError(
                f"{where}: torch's {type(self.module).__name__} has its class axis at position 1; expected y_true "
                f"{expected} (labels) for y_pred {shape_of(y_pred)}, received {shape_of(y_true)}. For a class axis at "
                "the end use lossledger.losses.SparseCategoricalCrossentropy."
            )
        return y_true, y_pred

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        if isinstance(self.module, nn.BCELoss):
            check_probabilities(y_pred, where)
        if isinstance(self.module, _INDEXED) and not y_true.is_floating_point():
            check_labels(y_true, y_pred.shape[1], where, ignore=self.module.ignore_index)

    def _tally_elements(self, batch: Aligned, elements: Tensor, by: Any) -> Any:
        tally = super()._tally_elements(batch, elements, by)
        if self.reduction.statistic is None:
            return tally
        own = self._own_divisor(batch, elements)
        return tally if own is None else replace(tally, divisor=own)

    def _own_divisor(self, batch: Aligned, elements: Tensor) -> Tensor | int | None:
        """torch's divisor where it is not the number of values."""
        if self._batchmean:
            return elements.shape[0]
        if not isinstance(self.module, _INDEXED) or batch.y_true.is_floating_point():
            return None
        valid = batch.y_true != self.module.ignore_index
        late = batch.late
        if late is not None and late.mask is not None:
            weights = self._late_weighting(batch, elements)
            assert weights.mask is not None
            valid = valid & weights.mask.squeeze(-1)
        weight = self._class_weight_tensor
        if weight is None:
            return valid.sum()
        labels = torch.where(valid, batch.y_true, 0).long()
        return (weight.to(labels.device)[labels].double() * valid).sum()

    def get_config(self) -> dict[str, Any]:
        """Not available: a torch module is its own configuration."""
        raise InputTypeError(f"{self.name}: a torch loss has no configuration; keep the module itself.")


def from_callable(fn: Any) -> Loss:
    """Any callable as a loss: a torch loss module or function, a partial of one, or `fn(y_true, y_pred)`.

    Raises:
        InputTypeError: not callable, or a class that was not instantiated.
    """
    if isinstance(fn, type):
        raise InputTypeError(f"Expected a loss, received the class {fn.__name__}. Make an instance: {fn.__name__}().")
    if isinstance(fn, nn.Module) and isinstance(fn, _ELEMENTWISE + _INDEXED + _PER_SAMPLE):
        return TorchLoss(fn)
    function, options = (fn.func, fn.keywords) if isinstance(fn, functools.partial) and not fn.args else (fn, {})
    known = _FUNCTIONS.get(function) if inspect.isroutine(function) else None
    return FunctionLoss(fn) if known is None else TorchLoss(known(**options), name=function.__name__)
