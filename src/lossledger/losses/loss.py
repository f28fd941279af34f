"""What every loss is: `call` for the value of each entry, and around it weights, masks, reduction, tally, gradient.

A loss goes through three steps, each in one place:

1. `_align` brings targets and predictions into one layout, class axis last;
2. `weighting.weighting` makes one weight an element, and masked elements are replaced by safe values;
3. `_tally_elements` weighs the unreduced elements and sums them: the numerator, the statistic that divides, the groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossledger import reduction as reductions
from lossledger.errors import InputError, InputTypeError
from lossledger.losses import backward
from lossledger.losses import groups as grouping
from lossledger.losses.aligned import Aligned, Late, detached, fitted, of_labels, select_leading, with_carried
from lossledger.losses.arguments import arguments, dtype_of, snake_case
from lossledger.losses.expression import Expression, factor_of
from lossledger.losses.prediction import Prediction, Space
from lossledger.losses.reach import pull
from lossledger.losses.reproducible import reproducible_tally
from lossledger.reduction import Reduction
from lossledger.tally import Groups, Link, Tally
from lossledger.values import count_not_finite, not_finite, reciprocal, streams
from lossledger.weighting import ClassWeight, Weighting, align, as_tensor, class_vector, weighting

By = str | Tensor | None
"""How a tally divides: `None`, `"class"`, `"label"`, `"sample"`, `"column"`, or integer group ids."""


class Loss:
    """Base of every loss; subclass it and write `call` to make your own.

    `call` returns the loss of each entry, `[B, d…]` (Keras: the mean over the last axis), and the base does the rest:
    alignment, masks, sample and class weights, the reduction, the tally, the gradient.

    Args:
        name: name of the term; the class name in snake case if not given.
        reduction: how entries become one number, see `lossledger.reduction`.
        dtype: dtype of the result; the arithmetic is in the dtype of the predictions, at least float32.

    Divides by: what the reduction says; by default the number of unmasked entries, never the weights.

    Raises:
        InputError: shapes, weights or masks that do not fit.

    Example:
        >>> import lossledger as ll, torch
        >>> class Quartic(ll.losses.Loss):
        ...     def call(self, y_true, y_pred):
        ...         return ((y_true - y_pred) ** 4).mean(-1)
        >>> float(Quartic()(torch.zeros(2, 1), torch.tensor([[1.0], [2.0]])))
        8.5
        >>> float(Quartic()(torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]), sample_weight=[1.0, 0.0]))
        0.5
    """

    space: Space = None
    scalar: str | None = None
    # Whether tallies of parts of a batch add up to the tally of the whole.
    additive: ClassVar[bool] = True
    class_axis: int = -1
    # From the sums of a ratio to its loss, where that is no plain quotient; it goes into the tallies.
    link: Link | None = None
    # What `by="class"` means, which a subclass of the library declares: "column" (each column has its own target,
    # split by presence), "label" (exclusive classes), "output" (regression columns), or None (no classes).
    classes_are: ClassVar[str | None] = None
    # Whether an entry has one element whatever the length of the class axis, and `_slopes` takes entries one by one.
    one_element: ClassVar[bool] = False
    # Whether a gradient went to trainable tensors that the loss reads beside the output.
    reaches: bool = False
    _default_name: ClassVar[str | None] = None

    def __init__(
        self,
        name: str | None = None,
        reduction: str | Reduction | None = "sum_over_batch_size",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self.name = name or self._default_name or snake_case(type(self).__name__)
        self.reduction = reductions.get(reduction)
        self._dtype = dtype_of(dtype)

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the result; `None`: that of the arithmetic."""
        return self._dtype

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each entry, `[B, d…]`; a subclass writes this.

        Args:
            y_true: targets.
            y_pred: predictions.
        """
        raise NotImplementedError(f"{type(self).__name__} must define call(self, y_true, y_pred).")

    # --- for callers -------------------------------------------------------------------------------------------

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None) -> Tensor:
        """The loss of a batch: a scalar, or one value an entry with the reduction `none`.

        Args:
            y_true: targets, anything `torch.as_tensor` takes.
            y_pred: predictions, `[B, d…, C]`.
            sample_weight: a scalar, `(B,)`, a leading part of the entries' shape, or the elements' shape.
            mask: the same shapes; masked elements reach neither value nor gradient, whatever they hold. A mask that
                layers of Keras left on `y_pred` counts too.
        """
        batch = self.align(y_true, y_pred, sample_weight, mask)
        if self.reduction is reductions.NONE:
            result = self._entries(batch)
        else:
            # Sums in float64 must not change the dtype of the loss.
            result = self.tally_aligned(batch).value.to(batch.prediction.raw.dtype)
        return result if self.dtype is None else result.to(self.dtype)

    def tally(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        mask: Any = None,
        by: By = None,
        class_weight: ClassWeight | None = None,
        reproducible: bool = False,
    ) -> Tally:
        """What a batch adds up to; tallies of batches add with `+` to that of the whole.

        Args:
            y_true: targets.
            y_pred: predictions.
            sample_weight: as in a call.
            mask: as in a call.
            by: divide over groups: `"class"`, `"label"`, `"sample"`, `"column"`, or integer ids, `(B,)` or per entry.
            class_weight: by index, or one number a class.
            reproducible: sums that have the same bits for any split, without a graph; see docs/windows.md.

        Example:
            >>> import lossledger as ll
            >>> mse = ll.losses.MeanSquaredError()
            >>> parts = mse.tally([[0.0]], [[3.0]]) + mse.tally([[0.0], [0.0]], [[0.0], [3.0]])
            >>> float(parts.value), int(parts.count)
            (6.0, 3)
        """
        batch = self.align(y_true, y_pred, sample_weight, mask, class_weight=class_weight)
        return reproducible_tally(self, batch, by) if reproducible else self.tally_aligned(batch, by)

    def backprop(
        self,
        y_true: Any,
        y_pred: Tensor,
        sample_weight: Any = None,
        mask: Any = None,
        window: Tally | None = None,
        by: By = None,
    ) -> tuple[Tally, Tensor]:
        """The tally of a batch and the gradient of the window's loss with respect to `y_pred`.

        Args:
            y_true: targets.
            y_pred: predictions; the gradient has its shape.
            sample_weight: as in a call.
            mask: as in a call.
            window: tally of the whole window (accumulation steps, ranks) that this batch is a part of: its divisor
                divides here. `None`: the batch is the window.
            by: as in `tally`.

        Returns:
            the tally of the batch, detached, and the gradient; `y_pred.backward(gradient)` continues it.

        Example:
            >>> import lossledger as ll, torch
            >>> _, gradient = ll.losses.MeanSquaredError().backprop([[0.0]], torch.tensor([[3.0]]))
            >>> gradient
            tensor([[6.]])
        """
        y_pred = detached(y_pred)
        batch = self.align(y_true, y_pred, sample_weight, mask)
        tally, gradient = self.backprop_aligned(batch, window, 1.0, by)
        return tally, self.restore(gradient, y_pred)

    # --- for the objective: the same, step by step -------------------------------------------------------------

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
        """One batch, checked and in the layout of the loss; `checked` skips the checks that read values."""
        where = where or self.name
        mask, checked = with_carried(y_pred, mask, checked, where)
        pred = as_tensor(y_pred, f"{where}: y_pred")
        true = as_tensor(y_true, f"{where}: y_true", device=pred.device)
        if true.requires_grad and not pred.requires_grad:
            raise InputError(
                f"{where}: only the first argument requires a gradient, so the arguments are swapped: expected "
                "(y_true, y_pred) as in Keras, received torch's (input, target). Swap them."
            )
        for what, value in (("y_true", true), ("y_pred", pred), ("sample_weight", sample_weight)):
            if value is not None and (tensor := as_tensor(value, f"{where}: {what}")).is_complex():
                raise InputTypeError(f"{where}: {what}: expected real numbers, received dtype {tensor.dtype}.")
        if not pred.is_floating_point():
            pred = pred.to(torch.get_default_dtype())
        if pred.dtype in (torch.float16, torch.bfloat16):
            pred = pred.float()
        if true.is_floating_point() and true.dtype != pred.dtype:
            true = true.to(pred.dtype)
        true, pred = self._align(true, pred, where)
        device = pred.device
        late = Late(
            None if sample_weight is None else as_tensor(sample_weight, f"{where}: sample_weight", device=device),
            None if mask is None else as_tensor(mask, f"{where}: mask", device=device),
            class_weight,
        )
        shape = self._shape(true, pred, where)
        if shape is None:
            true, pred = select_leading(true, pred, late.mask, where)
            return Aligned(true, Prediction(pred), Weighting(()), where, late)
        weights = self._weighting(shape, true, pred, late, where)
        if weights.mask is not None and checked and streams(pred) and not pred.requires_grad:
            given = Aligned(self._safe_index(true, weights), Prediction(pred), weights, where)
            return Aligned.lazily(given, lambda: self._safe(true, pred, weights))
        if weights.mask is not None:
            true, pred = self._safe(true, pred, weights)
        # A compiled graph holds no branch on values, so it goes without these checks.
        if not checked and not torch.compiler.is_compiling():
            self._check(true, pred, where)
        return Aligned(true, Prediction(pred), weights, where)

    def tally_aligned(self, batch: Aligned, by: By = None) -> Tally:
        """The tally of an aligned batch, differentiable."""
        return self._tally_elements(batch, self._elements(batch), by)

    def divisor_aligned(self, batch: Aligned) -> Tally:
        """The statistic that divides, without the numerator: known before the model has run."""
        if batch.late is not None:
            # The shape of the entries is known to `call` alone; what it makes of any prediction has that shape.
            with torch.no_grad():
                known = self.tally_aligned(batch)
            return Tally(0.0, known.divisor, 0, 0, offset=known.offset)
        columns = self._columns(batch.weighting.shape[-1])
        divisor = batch.divisor(reductions.divides(self.reduction, batch.where), batch.weighting)
        return Tally(0.0, 0, 0, 0, offset=columns) if divisor is None else Tally(0.0, divisor, 0, 0)

    def _columns(self, length: int) -> int:
        """How many elements make an entry, of which a sum is one: a class axis that a loss takes the mean over."""
        return length

    def is_ratio(self, rank: int) -> bool:
        """Whether the divisor of an output of that many axes depends on the predictions."""
        return False

    def backprop_aligned(
        self, batch: Aligned, window: Tally | None, factor: float, by: By = None
    ) -> tuple[Tally, Tensor]:
        """The tally of an aligned batch and `factor` times the gradient, in the layout of the loss.

        The plain form: autograd over the elements. Losses with a closed form override `_slopes`.
        """
        found = backward.backprop(self, batch, window, factor, by)
        if found is not None:
            return found
        with torch.enable_grad():
            leaf = batch.prediction.raw.detach().requires_grad_()
            tally = self.tally_aligned(replace(batch, prediction=Prediction(leaf)), by)
            whole = tally if window is None else window
            scale = factor * tally.coefficient * reciprocal(whole.divisor + whole.offset, tally.numerator.dtype)
            gradient, further = pull(tally.numerator * scale, leaf, batch.where)
            self.reaches = self.reaches or further
        return replace(tally, numerator=tally.numerator.detach()), gradient

    def restore(self, gradient: Tensor, y_pred: Tensor) -> Tensor:
        """A gradient in the layout of the loss, as the output has it."""
        return gradient.reshape(y_pred.shape).to(y_pred.dtype)

    # --- what a loss of the library declares -------------------------------------------------------------------

    def _align(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """Targets and predictions as `call` gets them; shapes that only `call` can judge are left alone."""
        longer, shorter = (y_true, y_pred) if y_true.ndim > y_pred.ndim else (y_pred, y_true)
        one_column = longer.ndim == shorter.ndim + 1 and longer.shape == (*shorter.shape, 1)
        other_batch = y_true.ndim and y_pred.ndim and y_true.shape[0] != y_pred.shape[0]
        if one_column or other_batch or (y_true.ndim == 1 and y_pred.ndim == 1):
            return align(y_true, y_pred, where)
        return y_true, y_pred

    def _shape(self, y_true: Tensor, y_pred: Tensor, where: str) -> tuple[int, ...] | None:
        """Shape of the elements, `(B, d…, C)`; `None` when only `call` can tell it."""
        return None

    def _weighting(self, shape: tuple[int, ...], y_true: Tensor, y_pred: Tensor, given: Late, where: str) -> Weighting:
        if given.given is None:
            return Weighting(shape)
        class_weight = None
        if (named := given.class_weight) is not None:
            class_weight = fitted(self._class_weight(y_true, y_pred, named, where), shape, y_true, where).to(y_pred)
        sample_weight = None if given.sample_weight is None else given.sample_weight.to(y_pred.dtype)
        return weighting(shape[:-1], shape[-1], sample_weight, given.mask, class_weight, where)

    def _late_weighting(self, batch: Aligned, elements: Tensor) -> Weighting:
        assert batch.late is not None
        if elements.ndim == 1 and batch.late.given is not None:
            raise InputError(
                f"{batch.where}: the loss returns one number for the whole batch, so a {batch.late.given} could only "
                "rescale it, not weigh samples; expected one value per sample or entry, received a scalar. Return the "
                "unreduced values, for example (y_true - y_pred).square().mean(-1)."
            )
        return self._weighting(tuple(elements.shape), batch.y_true, batch.prediction.raw, batch.late, batch.where)

    def class_count(self, y_pred: Tensor, class_weight: ClassWeight) -> int:
        """How many class weights the loss takes for an output; one more than were given where it cannot know."""
        keys = [int(key) for key in class_weight] if isinstance(class_weight, Mapping) else range(len(class_weight))
        return max(keys, default=-1) + 2

    def _class_weight(self, y_true: Tensor, y_pred: Tensor, class_weight: ClassWeight, where: str) -> Tensor:
        """Class weights of the targets, `[B, d…, 1]` or per column `[C]`."""
        labels = y_true
        if y_true.ndim == y_pred.ndim and y_true.shape[-1] > 1:
            labels = y_true.argmax(-1)
        elif y_true.ndim == y_pred.ndim:
            labels = y_true.squeeze(-1)
        classes = self.class_count(y_pred, class_weight)
        # The last number is for all classes that were not named.
        if isinstance(class_weight, Tensor):
            class_weight = torch.cat((class_weight, class_weight.new_ones(1)))
        elif not isinstance(class_weight, Mapping):
            class_weight = dict(enumerate(map(float, class_weight)))
        vector = class_vector(class_weight, classes, where=where).to(labels.device, non_blocking=True)
        return of_labels(vector, labels)

    def _check(self, y_true: Tensor, y_pred: Tensor, where: str) -> None:
        """Checks that read values (label range, probabilities), after masked elements have become harmless."""

    def _safe(self, y_true: Tensor, y_pred: Tensor, weights: Weighting) -> tuple[Tensor, Tensor]:
        """Targets and predictions with harmless values at masked elements."""
        return weights.select(y_true, 0), weights.select(y_pred, 0.5)

    def _safe_index(self, y_true: Tensor, weights: Weighting) -> Tensor:
        """Targets with which a calculation gets through, whatever masked ones hold: an index that exists."""
        return y_true

    def _elements(self, batch: Aligned) -> Tensor:
        """The unreduced loss, `[B, d…, C]`."""
        values = self.call(batch.y_true, batch.prediction.raw)
        if not isinstance(values, Tensor):
            raise InputTypeError(
                f"{batch.where}: the loss must return a tensor, received {type(values).__name__}. "
                "Compute it with torch operations so that it can be differentiated."
            )
        samples = batch.prediction.raw.shape[:1]
        if values.ndim and values.shape[:1] != samples:
            raise InputError(
                f"{batch.where}: the loss must return one value per sample or entry, with the batch on the first axis; "
                f"expected {samples[0]} there, received shape {tuple(values.shape)}. Reduce over other axes than 0."
            )
        return values.unsqueeze(-1)

    def _slopes(self, batch: Aligned) -> tuple[Tensor, Tensor] | None:
        """The elements and the derivative of their sum over the class axis, a new tensor; `None`: use autograd.

        The derivative is multiplied by one weight an entry; a loss whose elements depend on one column each also
        takes a weight an element.
        """
        return None

    def _entry_weight(self, batch: Aligned) -> Tensor | None:
        """The factor on each derivative: weight × mask, rescaled where the reduction rescales entries."""
        product = batch.weighting.product
        if self.reduction.rescale is None:
            return product
        rescale = self.reduction.rescale(batch.weighting).to(batch.prediction.raw, non_blocking=True)
        return rescale if product is None else product * rescale

    def _entries(self, batch: Aligned) -> Tensor:
        elements = self._elements(batch)
        weights = batch.weighting if batch.late is None else self._late_weighting(batch, elements)
        product = weights.product
        return (elements if product is None else elements * product).mean(-1)

    def _tally_elements(self, batch: Aligned, elements: Tensor, by: By) -> Tally:
        weights = batch.weighting if batch.late is None else self._late_weighting(batch, elements)
        if elements.ndim == 1:
            return self._tally_scalar(batch, elements, by)
        reduction = reductions.divides(self.reduction, batch.where)
        product = weights.product_for(elements)
        total = elements if product is None else torch.mul(elements, product, out=weights.kept(elements))
        weighted = (
            total if reduction.rescale is None else total * reduction.rescale(weights).to(total, non_blocking=True)
        )
        numerator, plain = weighted.sum(), total.detach()
        divisor = batch.divisor(reduction, weights)
        detached = plain if weighted is total else weighted.detach()
        if isinstance(by, grouping.AndSamples):
            by.taken[batch.where] = grouping.by_sample(detached, plain, weights), batch
        return Tally(
            numerator,
            0 if divisor is None else divisor,
            weights.count(),
            weights.total_weight(),
            offset=self._columns(elements.shape[-1]) if divisor is None else 0,
            nonfinite=count_not_finite(plain, numerator.detach(), weights.passing(plain)),
            groups=None if by is None else self._groups(batch, detached, plain, weights, by),
            shown=prod(weights.shape),
        )

    def _tally_scalar(self, batch: Aligned, elements: Tensor, by: By) -> Tally:
        """A function that returned one number: a mean over the samples unless declared a sum."""
        value = elements.squeeze(-1)
        if by is not None:
            raise InputError(
                f"{batch.where}: the loss returns one number for the whole batch, so it cannot be divided by {by!r}. "
                "Return one value per sample or entry."
            )
        bad = not_finite(value.detach()).sum()
        samples = batch.prediction.raw.shape[0]
        if self.scalar == "sum":
            return Tally(value, 0, samples, samples, offset=1, nonfinite=bad, shown=samples)
        return Tally(value * samples, samples, samples, samples, nonfinite=bad, shown=samples)

    def _groups(self, batch: Aligned, weighted: Tensor, total: Tensor, weights: Weighting, by: By) -> Groups:
        if isinstance(by, Tensor):
            index, keys = grouping.entry_ids(by.to(weighted.device), weights.shape[:-1], batch.where)
            return grouping.by_index("group", index, keys, len(keys), weighted, total, weights)
        if by == "sample":
            return grouping.by_sample(weighted, total, weights)
        if by == "column":
            return grouping.by_column("column", weighted, total, weights, None)
        if by == "class" and self.classes_are == "output":
            return grouping.by_column("class", weighted, total, weights, None)
        if by == "class" and self.classes_are == "column":
            return grouping.by_column("class", weighted, total, weights, grouping.present(batch.y_true, weights))
        if by in ("class", "label") and self.classes_are == "label":
            size, labels = self._labels(batch)
            return grouping.by_index(str(by), labels, grouping.keys_of(size), size, weighted, total, weights)
        named = {None: (), "label": ("class", "label")}.get(self.classes_are, ("class",))
        choices = ["sample", "column", *named]
        raise InputError(
            f"{batch.where}: cannot divide by {by!r}; expected one of {choices} or a tensor of integer group ids."
        )

    def _labels(self, batch: Aligned) -> tuple[int, Tensor]:
        raise NotImplementedError

    # --- configuration and algebra ----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal loss, as plain values."""
        config: dict[str, Any] = {"name": self.name, "reduction": self.reduction.name}
        if self.dtype is not None:
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        for name in arguments(type(self).__init__):
            if name not in ("self", "dtype", *config) and hasattr(self, name):
                value = getattr(self, name)
                config[name] = list(value) if isinstance(value, tuple) else value
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Loss:
        """The loss of a configuration made by `get_config`."""
        return cls(**config)

    def __repr__(self) -> str:
        defaults = arguments(type(self).__init__)
        shown = ", ".join(
            f"{name}={tuple(value) if isinstance(value, list) else value!r}"
            for name, value in self.get_config().items()
            if name != "name" and name in defaults and value != defaults[name].default
        )
        return f"{type(self).__name__}({shown})"

    def __mul__(self, factor: float) -> Expression:
        return Expression(((factor_of(factor), self),))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Expression:
        return Expression(((1.0, self),)) / divisor

    def __add__(self, other: Loss | Expression) -> Expression:
        return Expression(((1.0, self),)) + other

    def __radd__(self, other: object) -> Expression:
        # sum() starts from the integer 0.
        return 1.0 * self if other == 0 and isinstance(other, int) else NotImplemented
