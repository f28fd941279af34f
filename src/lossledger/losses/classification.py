"""Cross-entropies: independent columns (binary), exclusive classes (categorical, sparse, soft targets).

Notation: `z` logits, `p` probabilities, `q = clip(p, ε, 1 − ε)` with ε = 1e-7, `y` targets, `K` classes.
Formulas and defaults are those of keras.losses 3.15; each docstring says where ours differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossledger.errors import InputError, InputTypeError
from lossledger.losses.aligned import Aligned, Late, and_mask, of_labels
from lossledger.losses.elementwise import ElementLoss
from lossledger.losses.prediction import Prediction, Space
from lossledger.reduction import Reduction
from lossledger.values import (
    check_labels,
    check_probabilities,
    check_targets,
    largest,
    outside_probabilities,
    selected,
    shape_of,
    streams,
    zeroed,
)
from lossledger.weighting import ClassWeight, Weighting, check_class_weight, class_vector, split_shape

EPSILON = 1e-7


class _CrossEntropy(ElementLoss):
    """Arguments and checks that all cross-entropies share."""

    # What an error says to do about logits that were taken for probabilities.
    _of_logits: ClassVar[str] = "use from_logits=True"

    def __init__(
        self,
        from_logits: bool,
        label_smoothing: float,
        axis: int,
        name: str | None,
        reduction: str | Reduction | None,
        dtype: str | torch.dtype | None,
    ) -> None:
        super().__init__(name, reduction, dtype)
        if not isinstance(from_logits, bool):
            raise InputError(f"{self.name}: from_logits must be True or False, received {from_logits!r}.")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"{self.name}: label_smoothing must be in [0, 1), received {label_smoothing!r}.")
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise InputTypeError(f"{self.name}: `axis` must be of type `int`; received {axis!r}. -1 is the last axis.")
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing
        self.axis = self.class_axis = axis

    @property
    def space(self) -> Space:  # type: ignore[override]
        """How the loss reads the output."""
        return "logits" if self.from_logits else "probabilities"

    def class_count(self, y_pred: Tensor, class_weight: ClassWeight) -> int:
        """One class weight a column of the output; of a single column, one for each label, 0 and 1."""
        columns = y_pred.shape[self.class_axis] if y_pred.ndim > 1 else 1
        return 2 if columns == 1 else columns

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        if not self.from_logits:
            check_probabilities(y_pred, where, self._of_logits)
        check_targets(y_true, where)

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        if not self.from_logits or weights.mask is None or y_true.shape != y_pred.shape:
            return super()._safe(y_true, y_pred, weights)
        true, pred = zeroed(weights.mask, [y_true, y_pred])
        return true, pred

    def _flagged(self, elements: Tensor, prediction: Prediction) -> Tensor:
        """NaN where the output is no probability: the step cannot read values, but it counts non-finite elements."""
        return torch.where(outside_probabilities(prediction.raw.detach()), torch.nan, elements)


class BinaryCrossentropy(_CrossEntropy):
    """Cross-entropy of independent columns, each with a target between 0 and 1.

    Element `−(y log q + (1 − y) log(1 − q))`, from logits `max(z, 0) − z·y + log(1 + exp(−|z|))`; the loss of an entry
    is the mean over the class axis.

    Args:
        from_logits: `True` when the output is logits, `False` when it has gone through a sigmoid.
        label_smoothing: `s` in [0, 1): targets become `y(1 − s) + s/2`.
        axis: class axis of the output; all but the batch axis are possible.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, C]`; `(N,)` is read as `(N, 1)`. `by="class"` gives each column twice: where
    its target is present (y > ½ before smoothing) and where it is absent. `class_weight` is per column; with a
    single column it is by label, 0 or 1.

    Divides by: unmasked entries × C.

    Raises:
        InputError: shapes that differ, probabilities or targets outside [0, 1].

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.BinaryCrossentropy()([[0.0, 1.0]], [[0.4, 0.6]])), 4)
        0.5108

    Source: keras.losses.BinaryCrossentropy 3.15.
    """

    classes_are: ClassVar[str | None] = "column"

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "binary_crossentropy",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, name, reduction, dtype)

    def _targets(self, batch: Aligned) -> Tensor:
        s = self.label_smoothing
        return batch.y_true if s == 0 else batch.y_true * (1 - s) + s / 2

    def _elements(self, batch: Aligned) -> Tensor:
        y = self._targets(batch)
        if self.from_logits:
            return F.binary_cross_entropy_with_logits(batch.prediction.raw, y, reduction="none")
        q = batch.prediction.raw.clamp(EPSILON, 1 - EPSILON)
        return self._flagged(-(y * q.log() + (1 - y) * (1 - q).log()), batch.prediction)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        y, p = self._targets(batch), batch.prediction.raw
        if self.from_logits:
            if batch.prediction.shared:
                batch.prediction.sigmoid()
            weights = batch.weighting
            elements = _softplus_less(p, y, weights) if streams(p) else self._elements(batch)
            # d/dz of max(z, 0) − z·y + log(1 + exp(−|z|)) is σ(z) − y.
            return elements, batch.prediction.own_sigmoid(weights.result(p)).sub_(y)
        elements = self._elements(batch)
        q = p.clamp(EPSILON, 1 - EPSILON)
        return elements, (q - y) / (q * (1 - q)) * ((p >= EPSILON) & (p <= 1 - EPSILON))

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        return column_weight(y_true, class_weight, where)


def _softplus_less(z: Tensor, y: Tensor, weights: Weighting) -> Tensor:
    """`max(z, 0) − z·y + log(1 + exp(−|z|))`, without a graph, in a buffer and where derivatives come afterwards."""
    logarithm = torch.abs(z, out=weights.ahead(z)).neg_().exp_().log1p_()
    return torch.clamp_min(z, 0, out=weights.kept(z)).addcmul_(z, y, value=-1).add_(logarithm)


def column_weight(y_true: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
    """A weight a column; with one column, a weight for the label 0 or 1."""
    columns = y_true.shape[-1]
    if columns > 1:
        return class_vector(class_weight, columns, where=where)
    return class_vector(class_weight, 2, where=where).to(y_true.device, non_blocking=True)[(y_true > 0.5).long()]


class CategoricalCrossentropy(_CrossEntropy):
    """Cross-entropy of exclusive classes with one-hot or soft targets.

    Entry `−Σ_k y_k log q_k` with `q = clip(p / Σ p, ε, 1 − ε)`; from logits `−Σ_k y_k log softmax(z)_k`.

    Args:
        from_logits: `True` when the output is logits, `False` when it has gone through a softmax.
        label_smoothing: `s` in [0, 1): targets become `y(1 − s) + s/K`, K the length of the class axis (Keras 3.15
            takes the last axis whatever `axis` is).
        axis: class axis.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, K]`; entries, weights and masks `[B, d…]`. `by="class"` groups entries by the
    argmax of the target before smoothing; so does `class_weight`.

    Divides by: unmasked entries.

    Raises:
        InputError: shapes that differ, probabilities or targets outside [0, 1].

    Example:
        >>> import lossledger as ll
        >>> round(float(ll.losses.CategoricalCrossentropy()([[0.0, 1.0]], [[0.1, 0.9]])), 4)
        0.1054

    Source: keras.losses.CategoricalCrossentropy 3.15.
    """

    classes_are: ClassVar[str | None] = "label"
    one_element: ClassVar[bool] = True

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "categorical_crossentropy",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, name, reduction, dtype)

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return (*y_pred.shape[:-1], 1)

    def _targets(self, batch: Aligned) -> Tensor:
        s = self.label_smoothing
        return batch.y_true if s == 0 else batch.y_true * (1 - s) + s / batch.y_true.shape[-1]

    def _elements(self, batch: Aligned) -> Tensor:
        y = self._targets(batch)
        if self.from_logits:
            return -(y * batch.prediction.log_softmax()).sum(-1, keepdim=True)
        p = batch.prediction.raw
        return self._flagged_entry(-(y * normalised(p).log()).sum(-1, keepdim=True), batch.prediction)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        y, p = self._targets(batch), batch.prediction.raw
        if self.from_logits:
            if batch.prediction.shared:
                batch.prediction.log_softmax()
            # −Σ y (z − log Σ exp z) has the derivative softmax(z)·Σy − y, written over the log-softmax.
            weights = batch.weighting
            slopes = batch.prediction.own_log_softmax(weights.result(p))
            elements = torch.mul(y, slopes, out=weights.passing(p)).sum(-1, keepdim=True).neg_()
            return elements, slopes.exp_().mul_(y.sum(-1, keepdim=True)).sub_(y)
        elements = self._elements(batch)
        # −Σ y log(p/S), S = Σp: −y/p + (Σ y)/S, for the classes that the clip leaves alone.
        total = p.sum(-1, keepdim=True)
        share = p / total
        inside = y * ((share >= EPSILON) & (share <= 1 - EPSILON))
        return elements, inside.sum(-1, keepdim=True) / total - inside / p.where(inside != 0, 1.0)

    def _flagged_entry(self, elements: Tensor, prediction: Prediction) -> Tensor:
        outside = outside_probabilities(prediction.raw.detach()).any(-1, keepdim=True)
        return torch.where(outside, torch.nan, elements)

    def _labels(self, batch: Aligned) -> tuple[int, Tensor]:
        known = batch.weighting.labels
        return batch.given.y_true.shape[-1], largest(batch.y_true) if known is None else known

    def _weighting(self, shape: tuple[int, ...], y_true: Tensor, y_pred: Tensor, given: Late, where: str) -> Weighting:
        if given.class_weight is None:
            return super()._weighting(shape, y_true, y_pred, given, where)
        found = super()._weighting(shape, y_true, y_pred, replace(given, class_weight=None), where)
        # To look for them is a pass over the targets, and groups need them again.
        labels = largest(y_true)
        vector = class_vector(given.class_weight, y_true.shape[-1], where=where).to(y_true, non_blocking=True)
        weight = vector[labels].unsqueeze(-1)
        return replace(found, given=weight if found.given is None else found.given * weight, labels=labels)


def normalised(p: Tensor) -> Tensor:
    """Probabilities that sum to 1 over the classes, clipped away from 0 and 1."""
    return (p / p.sum(-1, keepdim=True)).clamp(EPSILON, 1 - EPSILON)


class SoftCategoricalCrossentropy(CategoricalCrossentropy):
    """Cross-entropy of class probabilities as targets, with class weights inside the sum: `−Σ_k w_k y_k log q_k`.

    Without weights it is `CategoricalCrossentropy`, which takes soft targets as well. The two differ in what a class
    weight does: there `class_weight` is one number an entry, that of the class with the largest target; here each
    class of the target has its own. On one-hot targets both are the same.

    Args:
        class_weights: w, one number a class, finite and not negative; 1 without it. `class_weight` of `tally`, `fit`
            or an objective, by index or name, multiplies it.
        from_logits: as for `CategoricalCrossentropy`.
        label_smoothing: as for `CategoricalCrossentropy`; the weights multiply the smoothed targets.
        axis: class axis.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: targets and output `[B, d…, K]`; entries, weights and masks `[B, d…]`. `by="class"` groups entries by the
    argmax of the target before smoothing and weights.

    Divides by: unmasked entries, as torch.nn.CrossEntropyLoss does when its targets are probabilities. With integer
        targets torch divides by Σ of the weights of the labels: that is `CategoricalCrossentropy` or
        `SparseCategoricalCrossentropy` with `class_weight` and the reduction `mean_with_sample_weight`.

    Raises:
        InputError: as `CategoricalCrossentropy`; another number of class weights than classes.

    Example:
        >>> import lossledger as ll
        >>> soft = ll.losses.SoftCategoricalCrossentropy(class_weights=[1.0, 3.0])
        >>> round(float(soft([[0.25, 0.75]], [[0.5, 0.5]])), 4)           # (1 · 0.25 + 3 · 0.75) · log 2
        1.7329

    Source: torch.nn.CrossEntropyLoss 2.13 with probabilities as targets.
    """

    def __init__(
        self,
        class_weights: Sequence[float] | Tensor | None = None,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | Reduction | None = "sum_over_batch_size",
        name: str | None = "soft_categorical_crossentropy",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype)
        if isinstance(class_weights, Mapping):
            raise InputError(
                f"{self.name}: class_weights must be one number a class, since the number of classes is not known "
                f"here; received {class_weights!r}. Weights by index or name go to class_weight of fit or Objective."
            )
        if class_weights is not None:
            check_class_weight(class_weights, self.name)
            class_weights = tuple(class_vector(class_weights, len(class_weights), where=self.name).tolist())
        self.class_weights = class_weights

    def align(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        mask: Any = None,
        class_weight: ClassWeight | None = None,
        where: str | None = None,
        checked: bool = False,
    ) -> Aligned:
        """One batch, checked; class weights stay apart from sample weights, since they belong inside the sum."""
        batch = super().align(y_true, y_pred, sample_weight, mask, None, where, checked)
        return batch.with_columns(self.class_weights, class_weight)

    def _targets(self, batch: Aligned) -> Tensor:
        y = super()._targets(batch)
        return y if batch.column_weight is None else y * batch.column_weight


class IntegerLabels(_CrossEntropy):
    """The base of cross-entropies of exclusive classes with integer labels, of which one may be left out."""

    classes_are: ClassVar[str | None] = "label"
    one_element: ClassVar[bool] = True
    ignore_class: int | None = None

    def _classes(self, y_pred: Tensor) -> int:
        """Number of classes, of an output with the class axis last."""
        return y_pred.shape[-1]

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        split_shape(y_pred, where)
        if y_pred.ndim < 2:
            raise InputError(
                f"{where}: expected an output [B, …, classes], received shape {shape_of(y_pred)}. "
                "The model must give one number for each class."
            )
        axis = self._last(y_pred, where)
        pred = y_pred if axis is None else y_pred.movedim(axis, -1)
        labels = y_true
        if labels.ndim == pred.ndim and labels.shape[-1] == 1:
            labels = labels.squeeze(-1)
        elif axis is not None and labels.ndim == pred.ndim and labels.shape[axis] == 1:
            labels = labels.squeeze(axis)
        if labels.shape != pred.shape[:-1]:
            one_hot = y_true.shape == y_pred.shape
            remedy = (
                "The target looks one-hot: use CategoricalCrossentropy, or y_true.argmax(-1)."
                if one_hot
                else "If the output has its class axis at position 1 (NCHW), pass axis=1."
            )
            raise InputError(
                f"{where}: y_true holds one label for each entry, so y_true and y_pred must have the same shape "
                f"up until the last dimension, the classes; expected {tuple(pred.shape[:-1])}, received "
                f"y_true {shape_of(y_true)} with y_pred {shape_of(y_pred)}. {remedy}"
            )
        return labels, pred

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        return (*y_pred.shape[:-1], 1)

    def _weighting(self, shape: tuple[int, ...], y_true: Tensor, y_pred: Tensor, given: Late, where: str) -> Weighting:
        if self.ignore_class is not None:
            counts = y_true != self.ignore_class
            given = Late(given.sample_weight, and_mask(counts, given.mask, shape, where), given.class_weight)
        return super()._weighting(shape, y_true, y_pred, given, where)

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        assert weights.mask is not None
        pred = zeroed(weights.mask, [y_pred])[0] if self.from_logits else weights.select(y_pred, 0.5)
        return self._safe_index(y_true, weights), pred

    def _safe_index(self, y_true: Tensor, weights: Weighting) -> Tensor:
        assert weights.mask is not None
        return selected(weights.mask.squeeze(-1), y_true, 0)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        if not self.from_logits:
            check_probabilities(y_pred, where, self._of_logits)
        check_labels(y_true, self._classes(y_pred), where)

    def _labels(self, batch: Aligned) -> tuple[int, Tensor]:
        return self._classes(batch.prediction.raw), batch.y_true.long()

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        classes = self._classes(y_pred)
        vector = class_vector(class_weight, classes, where=where).to(y_true.device, non_blocking=True)
        # Labels that count are checked for their range.
        return of_labels(vector, y_true)


class SparseCategoricalCrossentropy(IntegerLabels):
    """Cross-entropy of exclusive classes with integer labels.

    Entry `−log q_y` with `q = clip(p / Σ p, ε, 1 − ε)`; from logits `−log softmax(z)_y`.

    Args:
        from_logits: `True` when the output is logits, `False` when it has gone through a softmax.
        ignore_class: a label whose entries are masked: they count nowhere, not in the divisor either.
        axis: class axis of the output.
        reduction: see `lossledger.reduction`.
        name: name of the term.
        dtype: dtype of the result.

    Shapes: labels `[B, d…]` or `[B, d…, 1]`, output `[B, d…, K]`; entries, weights and masks `[B, d…]`.

    Divides by: unmasked entries whose label is not `ignore_class`.

    Raises:
        InputError: labels outside 0 … K−1, shapes that do not fit, probabilities outside [0, 1].

    Example:
        >>> import lossledger as ll
        >>> ce = ll.losses.SparseCategoricalCrossentropy(ignore_class=-1)
        >>> round(float(ce([1, -1], [[0.1, 0.9], [0.5, 0.5]])), 4)
        0.1054

    Source: keras.losses.SparseCategoricalCrossentropy 3.15.
    """

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | None = None,
        reduction: str | Reduction | None = "sum_over_batch_size",
        axis: int = -1,
        name: str | None = "sparse_categorical_crossentropy",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(from_logits, 0.0, axis, name, reduction, dtype)
        self.ignore_class = ignore_class

    def _elements(self, batch: Aligned) -> Tensor:
        labels = batch.y_true.long().unsqueeze(-1)
        if self.from_logits:
            return -batch.prediction.log_softmax().gather(-1, labels)
        p = batch.prediction.raw
        entries = -normalised(p).gather(-1, labels).log()
        return torch.where(outside_probabilities(p.detach()).any(-1, keepdim=True), torch.nan, entries)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        if not self.from_logits:
            return None
        if batch.prediction.shared:
            batch.prediction.log_softmax()
        # softmax(z) − one_hot(y), written over the log-softmax, of which the elements are a part.
        raw = batch.prediction.raw
        slopes, labels = (
            batch.prediction.own_log_softmax(batch.weighting.result(raw)),
            batch.y_true.long().unsqueeze(-1),
        )
        elements = slopes.gather(-1, labels).neg_()
        slopes.exp_().scatter_add_(-1, labels, elements.new_full(elements.shape, -1.0))
        return elements, slopes
