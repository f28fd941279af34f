"""The objective: a named sum of terms over outputs, and the breakdown of one batch into them.

The user's loss (one, a list, a dict by output, an expression of several) is understood once, into a frozen plan of
terms; from then on every batch goes through the plan. A term is λ × value, and the total is the sum of the
contributions from left to right: data terms, regularizers, auxiliary losses.
"""

from __future__ import annotations

import contextlib
import contextvars
import fnmatch
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lossledger import losses, regularizers
from lossledger.errors import EmptyDataError, InputError, InputTypeError, UnknownNameError
from lossledger.losses.loss import Aligned, Expression, Loss
from lossledger.regularizers import Regularizer
from lossledger.tally import Tally
from lossledger.weighting import ClassWeight

# Samples whose targets are checked together: bounds the memory of the check.
CHECKED_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model returns when it has losses of its own beside its outputs.

    Args:
        outputs: the outputs, as the model would return them alone.
        losses: auxiliary losses by name, a scalar or one value a sample, `[B]`, each; `loss_weights` may weigh them.

    Example:
        >>> import torch
        >>> sorted(Outputs(torch.zeros(2, 1), {"kl": torch.ones(2)}).losses)
        ['kl']
    """

    outputs: Any
    losses: Mapping[str, Tensor] = field(default_factory=dict)


_collector: contextvars.ContextVar[dict[str, Tensor] | None] = contextvars.ContextVar("auxiliary", default=None)


def add_loss(name: str, value: Tensor) -> None:
    """Add an auxiliary loss from inside a module's forward; it becomes a term of that name.

    Outside of lossledger's training and evaluation the call does nothing, so the module works anywhere.

    Args:
        name: name of the term.
        value: a scalar, or one value a sample, `[B]` (then its mean is exact for every split of the data).

    Raises:
        InputError: the name was already used in this forward.
    """
    found = _collector.get()
    if found is None:
        return
    if name in found:
        raise InputError(f"add_loss: the name {name!r} was already used in this forward; each term needs its own.")
    found[name] = value


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, Tensor]]:
    """Collects what `add_loss` is given while a model runs."""
    found: dict[str, Tensor] = {}
    token = _collector.set(found)
    try:
        yield found
    finally:
        _collector.reset(token)


@dataclass(frozen=True, slots=True)
class TermPlan:
    """A data term: which loss reads which output, and its weights.

    `coefficient` is λ, the weight in the total: that of the output times `part_weight`, the weight in its expression.
    """

    name: str
    output: str
    loss: Loss
    coefficient: float
    part_weight: float
    class_weight: ClassWeight | None


@dataclass(frozen=True, slots=True)
class PenaltyPlan:
    """A regularizer, the parameters that it applies to, and the name of its term."""

    name: str
    regularizer: Regularizer
    pattern: str


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One term of a breakdown: λ × value.

    Args:
        name: name of the term, `"output/loss"` when there are several outputs.
        role: `"data"`, `"regularizer"` or `"auxiliary"`.
        weight: λ.
        tally: its additive statistics.
    """

    name: str
    role: str
    weight: float
    tally: Tally
    _loss: Loss | None = None
    _batch: Aligned | None = None

    @property
    def value(self) -> Tensor:
        """The value of the loss, detached."""
        return torch.as_tensor(self.tally.value).detach()

    @property
    def contribution(self) -> Tensor:
        """λ × value, detached: what the term adds to the total."""
        return self.weight * self.value

    def by(self, kind: str) -> dict[Hashable, Tensor]:
        """The contribution of each group, detached 0-d tensors; they sum to `contribution`.

        Args:
            kind: `"class"`, `"label"`, `"sample"` or `"column"`.

        Returns:
            by the index of the class, column or sample; for losses that split classes by presence, by
            `(index, "present")` and `(index, "absent")`.
        """
        tally = self.grouped(kind)
        shares = self.weight * tally.contributions()
        keys = tally.groups.keys if tally.groups is not None else None
        names: Sequence[Hashable] = range(len(shares))
        if keys is not None:
            names = [name if presence == "" else (name, presence) for name, presence in keys]
        return dict(zip(names, shares.unbind(), strict=True))

    def grouped(self, kind: str) -> Tally:
        """The tally of the term, divided over groups."""
        if self._loss is None or self._batch is None:
            raise InputError(f"{self.name}: a {self.role} term cannot be divided by {kind!r}; it has one value.")
        with torch.no_grad():
            return self._loss.tally_aligned(self._batch, kind)


@dataclass(frozen=True, slots=True, eq=False)
class Breakdown:
    """The loss of one batch with its terms: `sum(t.contribution for t in terms.values()) == total`.

    Args:
        total: differentiable scalar, the contributions summed from left to right.
        terms: by name, in the order of the sum.
    """

    total: Tensor
    terms: dict[str, Term]

    @property
    def value(self) -> float:
        """The total as a float."""
        return float(self.total.detach())

    def backward(self) -> None:
        """Back-propagate the total."""
        self.total.backward()

    def __str__(self) -> str:
        width = max([len(name) for name in self.terms] + [5])
        lines = [f"{'term':<{width}}  {'λ':>8}  {'value':>12}  {'contribution':>12}"]
        for name, term in self.terms.items():
            lines.append(
                f"{name:<{width}}  {term.weight:>8.4g}  {float(term.value):>12.6g}  {float(term.contribution):>12.6g}"
            )
        return "\n".join([*lines, f"{'total':<{width}}  {'':>8}  {'':>12}  {self.value:>12.6g}"])


@dataclass(frozen=True, slots=True, eq=False)
class Backprop:
    """What one batch leaves for the step: tallies by term, and what to back-propagate.

    Args:
        tallies: by term name, detached.
        roots: tensors of the graph, outputs and auxiliary values.
        gradients: the gradient of the window's loss with respect to each root.
    """

    tallies: dict[str, Tally]
    roots: list[Tensor]
    gradients: list[Tensor]


class Objective:
    """What training minimizes: a named sum of terms.

    Args:
        loss: one loss (name, `Loss`, expression, function, torch loss), a list by output, or a dict by output name;
            `None` skips an output.
        loss_weights: λ: a number, or by output name, in a list by output, or by auxiliary name; a missing one is 1.
        regularizers: by pattern of parameter names (`fnmatch`), for example `{"*.weight": "l2"}`.
        class_weight: by class, for one output; or by output name, then by class.
        output_names: names of the outputs when `loss` is a list; `output_0`, … if not given.
        class_names: names of the classes, in order, for `class_weight` by name.

    Raises:
        UnknownNameError: a loss, output, class or pattern that does not exist.
        InputError: two terms of one name, or lists of other lengths than the outputs.

    Example:
        >>> import lossledger as ll, torch
        >>> objective = ll.Objective({"price": "mse", "volume": "mae"}, loss_weights={"volume": 0.5})
        >>> y_true = {"price": torch.zeros(2, 1), "volume": torch.zeros(2, 1)}
        >>> y_pred = {"price": torch.ones(2, 1), "volume": torch.ones(2, 1)}
        >>> b = objective(y_true, y_pred)
        >>> b.value, float(b.terms["volume/mean_absolute_error"].contribution)
        (1.5, 0.5)
    """

    def __init__(
        self,
        loss: Any,
        loss_weights: Any = None,
        regularizers: Mapping[str, Any] | None = None,
        class_weight: Any = None,
        output_names: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.class_names = None if class_names is None else tuple(str(name) for name in class_names)
        by_output, self.structure = _by_output(loss, output_names)
        self.outputs = tuple(by_output)
        weights, self._auxiliary_weights = _loss_weights(loss_weights, self.outputs, self.structure)
        classes = _class_weights(class_weight, self.outputs, self.structure)
        self.terms = _plan(by_output, weights, classes, self.structure, self.class_names)
        self.penalties = _penalties(regularizers)
        if not self.terms:
            raise EmptyDataError("The objective has no term: every output has the loss None. Give at least one a loss.")

    # --- a call, with autograd --------------------------------------------------------------------------------

    def __call__(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None, model: nn.Module | None = None
    ) -> Breakdown:
        """The breakdown of a batch, differentiable.

        Args:
            y_true: targets, in the structure of the outputs.
            y_pred: what the model returned.
            sample_weight: for all outputs, or by output.
            mask: for all outputs, or by output.
            model: holds the parameters that the regularizers read.
        """
        batches, auxiliary, samples = self.align(y_true, y_pred, sample_weight, mask)
        terms: dict[str, Term] = {}
        for plan, batch in zip(self.terms, batches, strict=True):
            tally = plan.loss.tally_aligned(batch)
            terms[plan.name] = Term(plan.name, "data", plan.coefficient, tally, plan.loss, batch)
        for name, tally in self.penalty_tallies(model).items():
            terms[name] = Term(name, "regularizer", 1.0, tally)
        for name, value in auxiliary.items():
            terms[name] = Term(name, "auxiliary", self.auxiliary_weight(name), auxiliary_tally(name, value, samples))
        contributions = [term.weight * torch.as_tensor(term.tally.value) for term in terms.values()]
        total = contributions[0]
        for contribution in contributions[1:]:
            total = total + contribution
        return Breakdown(total, terms)

    def align(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None, mask: Any = None, checked: bool = False
    ) -> tuple[list[Aligned], dict[str, Tensor], int]:
        """Aligned batches, one a term, with the auxiliary losses and the number of samples."""
        auxiliary: dict[str, Tensor] = {}
        if isinstance(y_pred, Outputs):
            auxiliary, y_pred = dict(y_pred.losses), y_pred.outputs
        unknown = set(self._auxiliary_weights) - set(auxiliary)
        if unknown:
            raise UnknownNameError(
                "output or auxiliary loss in loss_weights", min(unknown), {*self.outputs, *auxiliary}
            )
        preds = self.split(y_pred, "y_pred")
        trues = self.split(y_true, "y_true", required=frozenset(plan.output for plan in self.terms))
        weights = self.split_optional(sample_weight, "sample_weight")
        masks = self.split_optional(mask, "mask")
        batches: list[Aligned] = []
        for plan in self.terms:
            key = plan.output
            batch = plan.loss.align(
                trues[key], preds[key], weights.get(key), masks.get(key), plan.class_weight, plan.name, checked
            )
            batches.append(_shared(batch, batches))
        first = batches[0].prediction.raw
        return batches, auxiliary, int(first.shape[0]) if first.ndim else 1

    # --- the step: closed forms, gradient of the window -------------------------------------------------------

    def backprop(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        mask: Any = None,
        by: str | None = "class",
        checked: bool = True,
    ) -> Backprop:
        """Tallies and gradients of a batch that is a whole window.

        Args:
            y_true: targets.
            y_pred: what the model returned, attached to its graph.
            sample_weight: as in a call.
            mask: as in a call.
            by: groups of the tallies, for terms that have them.
            checked: values were checked at the data boundary, and are not read here.
        """
        auxiliary: dict[str, Tensor] = {}
        if isinstance(y_pred, Outputs):
            auxiliary, y_pred = dict(y_pred.losses), y_pred.outputs
        preds = self.split(y_pred, "y_pred")
        detached = {name: pred.detach() for name, pred in preds.items()}
        readable = Outputs(self.joined(detached), auxiliary)
        batches, _, samples = self.align(y_true, readable, sample_weight, mask, checked)
        tallies: dict[str, Tally] = {}
        gradients: dict[str, Tensor] = {}
        for plan, batch in zip(self.terms, batches, strict=True):
            groups = by if plan.loss.classes_are is not None else None
            tally, gradient = plan.loss.backprop_aligned(batch, None, plan.coefficient, groups)
            tallies[plan.name] = tally
            gradient = plan.loss.restore(gradient, preds[plan.output])
            known = gradients.get(plan.output)
            gradients[plan.output] = gradient if known is None else known.add_(gradient)
        roots = [preds[name] for name in gradients]
        pulls = list(gradients.values())
        for name, value in auxiliary.items():
            tally = auxiliary_tally(name, value, samples)
            tallies[name] = detach(tally)
            roots.append(torch.as_tensor(tally.value))
            pulls.append(torch.full_like(roots[-1], self.auxiliary_weight(name)))
        return Backprop(tallies, roots, pulls)

    def tallies(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        mask: Any = None,
        by: str | None = "class",
        checked: bool = True,
    ) -> dict[str, Tally]:
        """Tallies of a batch by term, for evaluation; regularizers are not among them."""
        batches, auxiliary, samples = self.align(y_true, y_pred, sample_weight, mask, checked)
        found = {
            plan.name: plan.loss.tally_aligned(batch, by if plan.loss.classes_are is not None else None)
            for plan, batch in zip(self.terms, batches, strict=True)
        }
        for name, value in auxiliary.items():
            found[name] = auxiliary_tally(name, value, samples)
        return found

    def check_data(self, y: Any, outputs: Any, sample_weight: Any, mask: Any, length: int) -> None:
        """All targets of a data set, once, against the shape of the outputs of a few samples.

        Args:
            y: targets of the data set.
            outputs: what the model returned for a few samples.
            sample_weight: of the data set.
            mask: of the data set.
            length: number of samples.

        Raises:
            InputError: shapes that do not fit, labels out of range, probabilities outside [0, 1].
        """
        preds = self.split(outputs, "y_pred")
        trues = self.split(y, "y_true", required=frozenset(plan.output for plan in self.terms))
        weights = self.split_optional(sample_weight, "sample_weight")
        masks = self.split_optional(mask, "mask")
        for plan in self.terms:
            key = plan.output
            # One prediction, repeated without memory: only its shape matters for the targets.
            shape = preds[key].shape
            for start in range(0, length, CHECKED_AT_ONCE):
                stop = min(start + CHECKED_AT_ONCE, length)
                parts = [
                    None if value is None else value[start:stop]
                    for value in (trues[key], weights.get(key), masks.get(key))
                ]
                like = preds[key][:1].detach().cpu().expand(stop - start, *shape[1:])
                plan.loss.align(parts[0], like, parts[1], parts[2], plan.class_weight, plan.name)

    # --- the plan ----------------------------------------------------------------------------------------------

    def penalty_tallies(self, model: nn.Module | None) -> dict[str, Tally]:
        """The regularizers' tallies, differentiable: each is one value a step."""
        if not self.penalties:
            return {}
        if model is None:
            raise InputError(
                "The objective has regularizers but no model to read parameters from. "
                "Pass it: objective(y_true, y_pred, model=net)."
            )
        found = {}
        for penalty in self.penalties:
            values = [penalty.regularizer(p) for p in self.penalized(penalty, model)]
            total = values[0]
            for value in values[1:]:
                total = total + value
            found[penalty.name] = Tally(total, 1, 1, 1, nonfinite=1 - torch.isfinite(total.detach()).sum())
        return found

    @staticmethod
    def penalized(penalty: PenaltyPlan, model: nn.Module) -> list[nn.Parameter]:
        """The trainable parameters whose name matches.

        Raises:
            UnknownNameError: the pattern matches none.
        """
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matched = [p for name, p in named.items() if fnmatch.fnmatchcase(name, penalty.pattern)]
        if not matched:
            raise UnknownNameError("parameter pattern in regularizers", penalty.pattern, named)
        return matched

    def role(self, name: str) -> str:
        """The role of a term by its name."""
        if any(plan.name == name for plan in self.terms):
            return "data"
        return "regularizer" if any(penalty.name == name for penalty in self.penalties) else "auxiliary"

    def coefficient(self, name: str) -> float:
        """λ of a term by its name."""
        for plan in self.terms:
            if plan.name == name:
                return plan.coefficient
        return 1.0 if self.role(name) == "regularizer" else self.auxiliary_weight(name)

    def group_name(self, index: object, groups: int) -> str:
        """The name of a class where there are as many names as groups, else its index as text."""
        names = self.class_names
        if names is not None and len(names) == groups and isinstance(index, int):
            return names[index]
        return str(index)

    def auxiliary_weight(self, name: str) -> float:
        """λ of an auxiliary loss."""
        return self._auxiliary_weights.get(name, 1.0)

    def split(self, value: Any, what: str, required: frozenset[str] | None = None) -> dict[str, Any]:
        """A value for each output, from the structure of the outputs.

        Raises:
            InputError: a structure that does not fit the loss.
            UnknownNameError: an output that does not exist.
        """
        required = frozenset(self.outputs) if required is None else required
        if self.structure == "one":
            if isinstance(value, Mapping | list | tuple) and what == "y_pred":
                raise InputError(
                    f"The loss is for one output; expected {what} to be one tensor, received a "
                    f"{type(value).__name__} of {len(value)}. Give a loss for each output: a dict by name or a list."
                )
            return {"": value}
        if isinstance(value, Mapping):
            missing = [name for name in required if name not in value]
            if missing:
                raise UnknownNameError(f"output in {what} (missing {missing[0]!r})", missing[0], value)
            unknown = [name for name in value if name not in self.outputs]
            if unknown and what != "y_pred":
                raise UnknownNameError(f"output in {what}", unknown[0], self.outputs)
            return {name: value[name] for name in self.outputs if name in value}
        if isinstance(value, list | tuple):
            if len(value) != len(self.outputs):
                raise InputError(
                    f"{what}: expected {len(self.outputs)} outputs {list(self.outputs)}, received {len(value)}. "
                    "Give one value an output; the loss None skips an output."
                )
            return dict(zip(self.outputs, value, strict=True))
        raise InputError(
            f"{what}: expected a {'dict' if self.structure == 'dict' else 'list'} with the outputs "
            f"{list(self.outputs)}, received {type(value).__name__}. The loss was given by output."
        )

    def joined(self, by_name: dict[str, Any]) -> Any:
        """The inverse of `split`."""
        if self.structure == "one":
            return by_name[""]
        return by_name if self.structure == "dict" else list(by_name.values())

    def split_optional(self, value: Any, what: str) -> dict[str, Any]:
        """A weight or mask for each output; a single one is for all of them."""
        if value is None:
            return {}
        if self.structure == "one":
            if isinstance(value, Mapping):
                raise InputError(f"{what}: the model has one output; expected an array, received a dict.")
            return {"": value}
        if isinstance(value, Mapping):
            unknown = [name for name in value if name not in self.outputs]
            if unknown:
                raise UnknownNameError(f"output in {what}", unknown[0], self.outputs)
            return dict(value)
        if isinstance(value, list | tuple) and len(value) == len(self.outputs) and not _is_numbers(value):
            return dict(zip(self.outputs, value, strict=True))
        return dict.fromkeys(self.outputs, value)


def detach(tally: Tally) -> Tally:
    """The tally with a detached numerator."""
    return replace(tally, numerator=tally.numerator.detach())


def auxiliary_tally(name: str, value: Tensor, samples: int) -> Tally:
    """The tally of an auxiliary loss: the mean of one value a sample, or a scalar that counts for its samples.

    Raises:
        InputError: another shape.
    """
    if not isinstance(value, Tensor) or value.ndim > 1 or (value.ndim == 1 and value.shape[0] != samples):
        received = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"auxiliary loss {name!r}: expected a scalar tensor or one value a sample, ({samples},); received "
            f"{received}. Reduce it over all axes but the batch."
        )
    bad = value.numel() - torch.isfinite(value.detach()).sum()
    numerator = value.sum() if value.ndim else value * samples
    return Tally(numerator, samples, samples, samples, nonfinite=bad)


def _is_numbers(value: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) for v in value)


def _shared(batch: Aligned, others: list[Aligned]) -> Aligned:
    """The batch with the activations of another term that reads the very same output."""
    for other in others:
        if other.prediction.raw is batch.prediction.raw:
            return replace(batch, prediction=other.prediction)
    return batch


def _by_output(loss: Any, names: Sequence[str] | None) -> tuple[dict[str, Loss | Expression | None], str]:
    """The loss of each output, and whether outputs come alone, in a list or in a dict."""
    if isinstance(loss, Mapping) and not set(loss) >= {"class_name", "config"}:
        found = {str(name): None if one is None else losses.get(one) for name, one in loss.items()}
        return found, "dict"
    if isinstance(loss, list | tuple):
        names = [f"output_{i}" for i in range(len(loss))] if names is None else [str(n) for n in names]
        if len(names) != len(loss):
            raise InputError(
                f"loss: expected one loss for each of the outputs {names}, received {len(loss)}. "
                "Use None for an output without a loss."
            )
        return {n: None if one is None else losses.get(one) for n, one in zip(names, loss, strict=True)}, "list"
    if loss is None:
        raise InputTypeError("loss: expected a loss, a list or a dict of losses by output; received None.")
    return {"": losses.get(loss)}, "one"


def _loss_weights(weights: Any, outputs: tuple[str, ...], structure: str) -> tuple[dict[str, float], dict[str, float]]:
    """λ of each output, and the weights whose names are no output: those of auxiliary losses."""
    if weights is None:
        return {}, {}
    if isinstance(weights, Mapping):
        numbers = {str(name): _number(value, f"loss_weights[{name!r}]") for name, value in weights.items()}
        return (
            {name: value for name, value in numbers.items() if name in outputs},
            {name: value for name, value in numbers.items() if name not in outputs},
        )
    if isinstance(weights, list | tuple):
        if len(weights) != len(outputs):
            raise InputError(
                f"loss_weights: expected {len(outputs)} numbers for the outputs {list(outputs)}, "
                f"received {len(weights)}."
            )
        return {n: _number(w, "loss_weights") for n, w in zip(outputs, weights, strict=True)}, {}
    if structure != "one":
        raise InputError(
            f"loss_weights: expected a dict or list for the outputs {list(outputs)}, received {weights!r}."
        )
    return {"": _number(weights, "loss_weights")}, {}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InputTypeError(f"{where}: expected a number, received {value!r}.")
    return float(value)


def _class_weights(class_weight: Any, outputs: tuple[str, ...], structure: str) -> dict[str, ClassWeight]:
    if class_weight is None:
        return {}
    if structure == "one":
        return {"": class_weight}
    if isinstance(class_weight, Mapping) and all(isinstance(key, str) for key in class_weight):
        unknown = [name for name in class_weight if name not in outputs]
        if unknown:
            raise UnknownNameError("output in class_weight", unknown[0], outputs)
        return dict(class_weight)
    raise InputError(
        f"class_weight: the model has several outputs {list(outputs)}; expected a dict by output, then by class, "
        f"received {class_weight!r}."
    )


def _plan(
    by_output: dict[str, Loss | Expression | None],
    weights: dict[str, float],
    class_weights: dict[str, ClassWeight],
    structure: str,
    class_names: tuple[str, ...] | None,
) -> tuple[TermPlan, ...]:
    terms = []
    for output, loss in by_output.items():
        if loss is None:
            continue
        parts = loss.terms if isinstance(loss, Expression) else ((1.0, loss),)
        for coefficient, part in parts:
            name = part.name if structure == "one" else f"{output}/{part.name}"
            class_weight = _indexed(class_weights.get(output), class_names, name)
            weight = coefficient * weights.get(output, 1.0)
            terms.append(TermPlan(name, output, part, weight, coefficient, class_weight))
    return tuple(terms)


def _indexed(class_weight: ClassWeight | None, class_names: tuple[str, ...] | None, where: str) -> ClassWeight | None:
    """Class weights by index: names are resolved once, here."""
    if not isinstance(class_weight, Mapping) or not any(isinstance(key, str) for key in class_weight):
        return class_weight
    found: dict[Any, float] = {}
    for key, value in class_weight.items():
        if isinstance(key, str) and (class_names is None or key not in class_names):
            raise UnknownNameError(f"class in class_weight of {where}", key, class_names or ())
        found[class_names.index(key) if isinstance(key, str) and class_names is not None else key] = value
    return found


def _penalties(given: Mapping[str, Any] | None) -> tuple[PenaltyPlan, ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise InputTypeError(
            "regularizers: expected a dict from a pattern of parameter names to a regularizer, for example "
            f"{{'*.weight': 'l2'}}; received {type(given).__name__}."
        )
    plans = []
    for pattern, one in given.items():
        regularizer = regularizers.get(one)
        name = regularizer.name if pattern == "*" else f"{regularizer.name}/{pattern}"
        plans.append(PenaltyPlan(name, regularizer, str(pattern)))
    return tuple(plans)
