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
from lossledger.losses.aligned import Aligned, Late, and_mask, of_labels
from lossledger.losses.arguments import check_order
from lossledger.losses.loss import Loss
from lossledger.reduction import Reduction
from lossledger.tally import Tally
from lossledger.values import check_labels, check_probabilities, selected, shape_of
from lossledger.weighting import ClassWeight, Weighting, align, class_vector


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
        InputError: a scalar together with weights or a mask, a function whose arguments are named in torch's order.

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
        check_order(fn.forward if isinstance(fn, nn.Module) else fn, found)
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


# Ours for those of torch that take more than an input and a target.
_OURS = {
    nn.GaussianNLLLoss: "GaussianNegativeLogLikelihood",
    nn.MarginRankingLoss: "MarginRanking",
    nn.TripletMarginLoss: "Triplet",
}


def _remedy(module: nn.Module) -> str:
    ours = _OURS.get(type(module))
    wrap = "rap it: lambda y_true, y_pred: module(…)."
    return f"W{wrap}" if ours is None else f"Use lossledger.losses.{ours}, or w{wrap}"


# Names of terms: the function without its suffix.
_NAMES = {module: function.__name__.removesuffix("_loss") for function, module in _FUNCTIONS.items()}


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
                f"losses of two arguments. {_remedy(module)}"
            )
        kind = str(getattr(module, "reduction", "mean"))
        super().__init__(name or _NAMES[type(module)], "sum" if kind == "sum" else "none" if kind == "none" else "mean")
        self.module = copy.copy(module)
        self.module.reduction = "none"  # type: ignore[assignment]
        self.class_axis = -1 if isinstance(module, _ELEMENTWISE) else 1
        self._batchmean = kind == "batchmean"

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The unreduced values of torch."""
        module = self.module.to(y_pred.device)
        labels = self._indexed(y_true) or isinstance(module, nn.MultiMarginLoss | nn.MultiLabelMarginLoss)
        values: Tensor = module(y_pred, y_true.long() if labels else y_true.to(y_pred.dtype))
        return values

    def _indexed(self, y_true: Tensor) -> bool:
        """Whether the targets are class labels, not probabilities."""
        return isinstance(self.module, _INDEXED) and not y_true.is_floating_point()

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
        if isinstance(self.module, nn.CrossEntropyLoss) and y_true.is_floating_point() != (y_true.ndim == y_pred.ndim):
            raise InputTypeError(
                f"{where}: torch takes labels {expected} in whole numbers and probabilities {shape_of(y_pred)} in "
                f"floating point; received {y_true.dtype} {shape_of(y_true)}. Convert them: y.long() for labels, "
                "y.float() for one-hot targets."
            )
        return y_true, y_pred

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        if isinstance(self.module, _ELEMENTWISE):
            return (*y_pred.shape, 1)
        return (y_pred.shape[0], *(y_pred.shape[2:] if isinstance(self.module, _INDEXED) else ()), 1)

    def _weighting(self, shape: tuple[int, ...], y_true: Tensor, y_pred: Tensor, given: Late, where: str) -> Weighting:
        if self._indexed(y_true):
            counts = torch.ne(y_true, self.module.ignore_index)  # type: ignore[arg-type]
            given = Late(given.sample_weight, and_mask(counts, given.mask, shape, where), given.class_weight)
        return super()._weighting(shape, y_true, y_pred, given, where)

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        if not isinstance(self.module, _INDEXED) or y_pred.ndim < 2:
            return super()._class_weight(y_true, y_pred, class_weight, where)
        # One a class of the output, so that a class which it does not have is refused.
        vector = class_vector(class_weight, y_pred.shape[1], where=where).to(y_pred.device, non_blocking=True)
        return of_labels(vector, y_true.argmax(1) if y_true.ndim == y_pred.ndim else y_true)

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        assert weights.mask is not None
        mask = weights.mask.squeeze(-1)

        def select(values: Tensor, safe: float) -> Tensor:
            inside = mask
            if not isinstance(self.module, _ELEMENTWISE) and values.ndim > mask.ndim:
                # The class axis of the output, and of targets that are probabilities, is 1.
                inside = mask.unsqueeze(1)
            return selected(inside, values, safe)

        return select(y_true, 0), select(y_pred, 0.5)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        if isinstance(self.module, nn.BCELoss):
            check_probabilities(y_pred, where, "use torch.nn.BCEWithLogitsLoss")
        if self._indexed(y_true):
            check_labels(y_true, y_pred.shape[1], where, option="ignore_index")

    def _tally_elements(self, batch: Aligned, elements: Tensor, by: Any) -> Tally:
        tally = super()._tally_elements(batch, elements, by)
        own = None if self.reduction.statistic is None else self._own_divisor(batch)
        return tally if own is None else replace(tally, divisor=own)

    def divisor_aligned(self, batch: Aligned) -> Tally:
        """The statistic that divides, torch's own where it is not the number of values."""
        tally = super().divisor_aligned(batch)
        own = None if self.reduction.statistic is None else self._own_divisor(batch)
        return tally if own is None else replace(tally, divisor=own)

    def _own_divisor(self, batch: Aligned) -> Tensor | int | None:
        if self._batchmean:
            # Samples that have anything to say.
            return reductions.get("mean_per_sample").divisor(batch.weighting, batch.y_true)
        weight = getattr(self.module, "weight", None)
        if weight is None or not self._indexed(batch.y_true):
            return None
        shares: Tensor = weight.to(batch.y_true.device)[batch.y_true.long()].double()
        mask = batch.weighting.mask
        return shares.sum() if mask is None else (shares * mask.squeeze(-1)).sum()

    def __repr__(self) -> str:
        return f"TorchLoss({type(self.module).__name__})"

    def get_config(self) -> dict[str, Any]:
        """Not available: a torch module is its own configuration.

        Raises:
            InputTypeError: always.
        """
        raise InputTypeError(f"{self.name}: a torch loss has no configuration; keep the module itself.")


def from_callable(fn: Any) -> Loss:
    """Any callable as a loss: a torch loss module or function, a partial of one, or `fn(y_true, y_pred)`.

    Raises:
        InputTypeError: not callable, a class that was not instantiated, a torch loss of other arguments.
    """
    if isinstance(fn, type):
        raise InputTypeError(f"Expected a loss, received the class {fn.__name__}. Make an instance: {fn.__name__}().")
    if isinstance(fn, nn.modules.loss._Loss):
        return TorchLoss(fn)
    function, options = (fn.func, fn.keywords) if isinstance(fn, functools.partial) and not fn.args else (fn, {})
    known = _FUNCTIONS.get(function) if inspect.isroutine(function) else None
    if known is None:
        return FunctionLoss(fn)
    try:
        return TorchLoss(known(**options))
    except TypeError as error:
        raise InputTypeError(
            f"torch.nn.functional.{function.__name__}: {error}; expected the arguments of torch.nn.{known.__name__}, "
            f"received {sorted(options)}. Wrap it: lambda y_true, y_pred: {function.__name__}(y_pred, y_true, …)."
        ) from None
