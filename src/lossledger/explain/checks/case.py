"""A set-up, understood once: what the rules read, so that no rule aligns, weighs or calls a loss by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lossledger.errors import LossledgerError
from lossledger.explain.checks.probe import can_be_called_again
from lossledger.losses.aligned import Aligned
from lossledger.losses.custom import TorchLoss
from lossledger.losses.loss import Loss
from lossledger.losses.prediction import Prediction
from lossledger.losses.reach import output_only
from lossledger.objective import Objective, unpacked
from lossledger.tally import Tally
from lossledger.weighting import ClassWeight, Weighting, as_tensor, carried_mask, joined


@dataclass(frozen=True, slots=True, eq=False)
class TermCase:
    """One term with its part of the data.

    Args:
        name: of the term.
        loss: of the term.
        coefficient: λ.
        output: the output that it reads.
        y_true: targets as they were given.
        y_pred: predictions as they were given, detached.
        sample_weight: as it was given.
        mask: as it was given.
        class_weight: as the objective holds it.
        activation: the last operation of the model, where the graph tells: "softmax", "sigmoid", "log_softmax".
        batch: aligned; `None` where the loss refused the shapes.
        elements: the unreduced values of a loss whose `call` alone can tell their shape; of others `None`.
        weighting: mask and weight of each element; `None` where the loss refused.
        tally: with groups by class where there are some; `None` where the loss refused.
        error: what the loss refused with.
        probeable: the loss may be called again.
    """

    name: str
    loss: Loss
    coefficient: float
    output: str
    y_true: Tensor
    y_pred: Tensor
    sample_weight: Tensor | None
    mask: Tensor | None
    class_weight: ClassWeight | None
    activation: str | None
    batch: Aligned | None = None
    elements: Tensor | None = None
    weighting: Weighting | None = None
    tally: Tally | None = None
    error: LossledgerError | None = None
    probeable: bool = True

    @property
    def value(self) -> float:
        """The loss of the term, without λ."""
        return float("nan") if self.tally is None else float(self.tally.value)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.y_pred.shape[0]) if self.y_pred.ndim else 1

    def gradient(self, factor: float = 1.0) -> Tensor:
        """The gradient of `factor` times the loss at the output; parameters that the loss reads collect none."""
        assert self.batch is not None
        with output_only():
            return self.loss.backprop_aligned(self.batch, None, factor)[1]

    @property
    def custom(self) -> bool:
        """Whether the loss is a function or a class of the user's."""
        return self.batch is not None and self.batch.late is not None

    @property
    def exclusive(self) -> bool:
        """Whether the loss reads its class axis as exclusive classes."""
        module = self.module
        if module is not None:
            return isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss)
        return self.loss.classes_are == "label" or getattr(self.loss, "from_logits", None) == "softmax"

    @property
    def module(self) -> nn.Module | None:
        """The module of a loss of torch."""
        return self.loss.module if isinstance(self.loss, TorchLoss) else None

    @property
    def rows(self) -> Tensor:
        """The predictions that count, `[N, K]`, class axis last."""
        assert self.batch is not None
        raw = self.batch.prediction.raw
        if self.loss.class_axis == 1 and isinstance(self.loss, TorchLoss) and raw.ndim > 1:
            raw = raw.movedim(1, -1)
        return counted(raw, self.weighting)

    def entries(self) -> float:
        """How many entries the loss was divided by, or would be: unmasked elements over the class axis."""
        if self.tally is None:
            return 0.0
        columns = self.weighting.shape[-1] if self.weighting is not None and self.weighting.shape else 1
        return float(self.tally.count) / columns

    def again(self, batch: Aligned) -> float:
        """The loss of another batch."""
        with torch.no_grad():
            return float(self.loss.tally_aligned(batch).value)

    def part(self, start: int, stop: int) -> TermCase:
        """The term on some of its samples."""

        def cut(value: Tensor | None) -> Any:
            whole = value is None or value.ndim == 0 or value.shape[0] != self.samples
            return value if whole or value is None else value[start:stop]

        parts = [cut(v) for v in (self.y_true, self.y_pred, self.sample_weight, self.mask)]
        cleared = replace(
            self, y_true=parts[0], y_pred=parts[1], sample_weight=parts[2], mask=parts[3], batch=None, tally=None
        )
        try:
            return _understood(cleared)
        except (RuntimeError, TypeError, IndexError):
            # A function of the user's may need the batch that it was given; then there is nothing to probe.
            return cleared


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A set-up: an objective and one batch, or all arrays.

    Args:
        objective: what is minimized.
        terms: one a term.
        logged: a number that another program printed for the same arrays, or `None`.
        accumulate: micro-batches that a training loop would split the arrays into.
        end: the class that ends a sequence, where the caller knows it.
    """

    objective: Objective
    terms: tuple[TermCase, ...]
    logged: float | None = None
    accumulate: int = 1
    end: int | None = None

    @property
    def understood(self) -> list[TermCase]:
        """The terms that have a value."""
        return [term for term in self.terms if term.tally is not None]


def understand(
    objective: Objective,
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    mask: Any = None,
    logged: float | None = None,
    accumulate: int = 1,
    again: bool = False,
    end: int | None = None,
) -> Case:
    """Everything that the rules read, from what a loss is called with.

    Args:
        objective: what is minimized.
        y_true: targets.
        y_pred: predictions.
        sample_weight: as in a call.
        mask: as in a call.
        logged: another program's number.
        accumulate: micro-batches.
        again: the losses have been called with this batch; those that remember their calls are left alone.
        end: the class that ends a sequence.
    """
    outputs, _ = unpacked(y_pred)
    if objective.structure == "one" and isinstance(outputs, list | tuple):
        # A loss takes lists of numbers; an objective would read a list as several outputs.
        outputs = as_tensor(outputs, "y_pred")
    preds = objective.split(outputs, "y_pred")
    trues = objective.split(y_true, "y_true", required=frozenset(plan.output for plan in objective.terms))
    weights = objective.split_optional(sample_weight, "sample_weight")
    masks = objective.split_optional(mask, "mask")
    terms = []
    for plan in objective.terms:
        key = plan.output
        pred = as_tensor(preds[key], f"{plan.name}: y_pred")
        true = as_tensor(trues[key], f"{plan.name}: y_true", device=pred.device)
        given = [
            None if one.get(key) is None else as_tensor(one[key], f"{plan.name}: {what}", device=pred.device)
            for what, one in (("sample_weight", weights), ("mask", masks))
        ]
        # The mask that the output carries is lost when it is detached or cut; from here on it is one mask.
        mask_of_both = joined(given[1], carried_mask(preds[key]), plan.name)
        term = TermCase(
            plan.name,
            plan.loss,
            plan.coefficient,
            key,
            true.detach(),
            pred.detach(),
            given[0],
            mask_of_both,
            plan.class_weight,
            activation(pred),
            probeable=can_be_called_again(plan.loss),
        )
        terms.append(term if again and not term.probeable else _understood(term))
    return Case(objective, tuple(terms), logged, accumulate, end)


def _understood(term: TermCase) -> TermCase:
    loss = term.loss
    given = (term.y_true, term.y_pred, term.sample_weight, term.mask, term.class_weight, term.name)
    try:
        batch = loss.align(*given)
    except LossledgerError as error:
        try:
            batch = loss.align(*given, checked=True)
        except LossledgerError:
            return replace(term, error=error)
        # What the checks of values refuse is for the rules; some modules of torch would raise in the arithmetic.
        return replace(term, batch=batch, weighting=batch.weighting if batch.late is None else None, error=error)
    try:
        with torch.no_grad():
            if batch.late is None:
                tally = loss.tally_aligned(batch, "class" if loss.classes_are is not None else None)
                return replace(term, batch=batch, weighting=batch.weighting, tally=tally)
            elements = loss._elements(batch)
            weighting = loss._late_weighting(batch, elements)
            tally = loss._tally_elements(batch, elements, None)
            return replace(term, batch=batch, elements=elements.detach(), weighting=weighting, tally=tally)
    except LossledgerError as error:
        return replace(term, batch=batch, error=error)


# Operations that change the shape of a tensor and not its values.
_RESHAPING = ("View", "Reshape", "Squeeze", "Unsqueeze", "Permute", "Transpose", "Clone", "Alias", "ToCopy")
_ACTIVATIONS = {"LogSoftmaxBackward": "log_softmax", "SoftmaxBackward": "softmax", "SigmoidBackward": "sigmoid"}


def activation(y_pred: Tensor) -> str | None:
    """The last operation that made the values, if it is a softmax or a sigmoid."""
    node: Any = y_pred.grad_fn
    for _ in range(8):
        if node is None:
            return None
        name = type(node).__name__
        for start, found in _ACTIVATIONS.items():
            if name.startswith(start):
                return found
        if not any(word in name for word in _RESHAPING) or not node.next_functions:
            return None
        node = node.next_functions[0][0]
    return None


def counted(values: Tensor, weighting: Weighting | None) -> Tensor:
    """`[B, d…, K]` as the rows `[N, K]` of the entries that count."""
    mask = None if weighting is None else weighting.mask
    flat = values.reshape(-1, values.shape[-1])
    if mask is None:
        return flat
    entries = mask.any(-1)
    if prod(values.shape[:-1]) != entries.numel():
        entries = entries.expand(values.shape[:-1])
    return flat[entries.reshape(-1)]


def with_prediction(batch: Aligned, raw: Tensor) -> Aligned:
    """The batch with another output."""
    return replace(batch, prediction=Prediction(raw))
