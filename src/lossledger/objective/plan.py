"""From what a user gives as loss, weights and regularizers to a frozen plan of terms, understood once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lossledger import losses, regularizers
from lossledger.errors import InputError, InputTypeError, UnknownNameError
from lossledger.losses.aligned import Aligned
from lossledger.losses.expression import Expression
from lossledger.losses.loss import Loss
from lossledger.regularizers import Regularizer
from lossledger.tally import Tally
from lossledger.values import is_number, not_finite
from lossledger.weighting import ClassWeight, check_class_weight


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
    """A regularizer, the pattern of the parameter names that it applies to, and the name of its term."""

    name: str
    regularizer: Regularizer
    pattern: str


@dataclass(frozen=True, slots=True, eq=False)
class Penalty:
    """A regularizer together with the parameters of a model that its pattern names."""

    name: str
    regularizer: Regularizer
    parameters: tuple[nn.Parameter, ...]

    def tally(self) -> Tally:
        """The penalty at the weights as they are, differentiable: one value a step."""
        total = self.regularizer(self.parameters[0])
        for parameter in self.parameters[1:]:
            total = total + self.regularizer(parameter)
        if hasattr(total, "full_tensor"):
            # Of sharded parameters: each rank has its part of the sum.
            total = total.full_tensor()
        return Tally(total, 1, 1, 1, nonfinite=not_finite(total.detach()).sum(), shown=1)


def by_output(loss: Any, names: Sequence[str] | None) -> tuple[dict[str, Loss | Expression | None], str]:
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
        raise InputTypeError(
            "No loss to compute. Provide a `loss` argument: expected a loss, a list or a dict of losses by output; "
            "received None."
        )
    return {"": losses.get(loss)}, "one"


def loss_weights(weights: Any, outputs: tuple[str, ...], structure: str) -> tuple[dict[str, float], dict[str, float]]:
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
            wanted = "one number" if structure == "one" else f"{len(outputs)} numbers for the outputs {list(outputs)}"
            raise InputError(
                f"`loss_weights` must match the number of losses: expected {wanted}, received {len(weights)}."
            )
        return {n: _number(w, "loss_weights") for n, w in zip(outputs, weights, strict=True)}, {}
    if structure != "one":
        raise InputError(
            f"loss_weights: expected a dict or list for the outputs {list(outputs)}, received {weights!r}."
        )
    if not is_number(weights):
        raise InputTypeError(
            "Expected `loss_weights` argument to be a float (one output), or a list or a dict (several outputs); "
            f"received {weights!r}."
        )
    return {"": _number(weights, "loss_weights")}, {}


def _number(value: Any, where: str) -> float:
    if not is_number(value):
        raise InputTypeError(f"{where}: expected a number, received {value!r}.")
    if not math.isfinite(value):
        raise InputError(f"{where}: expected a finite number, received {float(value)}.")
    return float(value)


def class_names(names: Any) -> tuple[str, ...] | None:
    """Names of the classes, each its own.

    Raises:
        InputTypeError: one text or a dict instead of a list of names.
        InputError: an empty name, or one that is used twice: two classes would become one row of the ledger.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputTypeError(f"class_names: expected a list of names, received {names!r}.")
    if isinstance(names, Mapping):
        # The order of a dict need not be that of its classes, and its keys may be outputs.
        raise InputTypeError(
            f"class_names: expected a list of names, in the order of the classes, received a dict {names!r}. The names "
            "go to each output with that many classes; of a dict from names to indices pass sorted(d, key=d.get)."
        )
    found = tuple(str(name) for name in names)
    if "" in map(str.strip, found):
        raise InputError(f"class_names: expected a name for each class, received an empty one: {list(found)}.")
    twice = [name for name in found if found.count(name) > 1]
    if twice:
        raise InputError(f"class_names: expected a name of its own for each class, received {twice[0]!r} twice.")
    return found


def class_weights(class_weight: Any, outputs: tuple[str, ...], structure: str) -> dict[str, ClassWeight]:
    """Class weights of each output."""
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


def class_axes(loss: Loss) -> tuple[int, ...]:
    """Where an output may have its classes: a loss that divides by none, torch's or a function, says it of none."""
    return (loss.class_axis,) if loss.classes_are is not None or loss.class_axis != -1 else (-1, 1)


def terms(
    by_output: dict[str, Loss | Expression | None],
    weights: dict[str, float],
    class_weights: dict[str, ClassWeight],
    structure: str,
    class_names: tuple[str, ...] | None,
) -> tuple[TermPlan, ...]:
    """The data terms, in the order of the outputs and of the parts of each loss."""
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
    if class_weight is not None:
        check_class_weight(class_weight, where)
    if not isinstance(class_weight, Mapping) or not any(isinstance(key, str) for key in class_weight):
        return class_weight
    found: dict[Any, float] = {}
    for key, value in class_weight.items():
        if isinstance(key, str) and (class_names is None or key not in class_names):
            hint = "" if class_names else "; without class_names a class is a whole number, not text"
            raise UnknownNameError(f"class in class_weight of {where}{hint}", key, class_names or ())
        found[class_names.index(key) if isinstance(key, str) and class_names is not None else key] = value
    return found


def penalties(given: Mapping[str, Any] | None) -> tuple[PenaltyPlan, ...]:
    """The regularizers, each a term of its own."""
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


def shared(batch: Aligned, others: list[Aligned]) -> Aligned:
    """The batch with the activations of another term that reads the very same output."""
    if batch.given is not batch:
        return batch
    for other in others:
        if other.given is other and other.prediction.raw is batch.prediction.raw:
            other.prediction.shared = True
            return replace(batch, prediction=other.prediction)
    return batch
