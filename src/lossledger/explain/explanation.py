"""`explain`: what the loss of one batch is made of, from the tallies that the loss returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lossledger.errors import InputError
from lossledger.explain import html, references, steps, text
from lossledger.explain.references import Reference
from lossledger.explain.steps import Divisor, Group, Step
from lossledger.objective import Objective
from lossledger.objective.breakdown import Breakdown, Term
from lossledger.report.numbers import display
from lossledger.values import is_number
from lossledger.weighting import as_tensor


@dataclass(frozen=True, slots=True)
class TermExplanation:
    """One term: λ × value, and how the value came about.

    Args:
        name: of the term.
        role: `"data"`, `"regularizer"` or `"auxiliary"`.
        weight: λ.
        value: of the loss.
        contribution: λ × value.
        share: of the whole loss; `None` where that is 0.
        equation: the formula with the numbers of the batch.
        steps: from the output to the value.
        divisor: what divides, and where it comes from.
        order: whether the order of the averages matters here, with numbers.
        groups: contributions by class, where the loss has classes.
        references: levels to compare the value with.
        skill: 1 − value / base rate; `None` where there is no base rate above 0.
        consistency: what metrics say that the value must be at least.
    """

    name: str
    role: str
    weight: float
    value: float
    contribution: float
    share: float | None
    equation: str
    steps: tuple[Step, ...] = ()
    divisor: Divisor | None = None
    order: str = ""
    groups: tuple[Group, ...] = ()
    references: tuple[Reference, ...] = ()
    skill: float | None = None
    consistency: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One term on a part of the batch: a micro-batch, or the share of a rank.

    Args:
        term: its name.
        part: position, from 0.
        samples: how many.
        divisor: of the part alone; `None` for a ratio, whose divisors are one a cell.
        value: the loss that the part alone would print.
        share: the part's share of the divisor of the whole, which is what it counts in the exact loss.
    """

    term: str
    part: int
    samples: int
    divisor: float | None
    value: float
    share: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the loss of a batch is made of; `str()`, `rich.print()`, a notebook and `to_dict()` show it.

    Args:
        value: the loss.
        sentences: it in words.
        equation: the sum of the terms.
        terms: one by one, in the order of the sum.
        outputs: contribution by output, where there are several.
        parts: by term and part, where parts were asked for.
        mean_of_parts: the mean of the losses of the parts, which is not the loss; `None` without parts.
    """

    value: float
    sentences: tuple[str, ...]
    equation: str
    terms: tuple[TermExplanation, ...]
    outputs: tuple[tuple[str, float], ...] = ()
    parts: tuple[Part, ...] = ()
    mean_of_parts: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return text.as_text(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        return text.renderable(self)

    def _repr_html_(self) -> str:
        return html.as_html(self)


def explain(
    loss: Any,
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    mask: Any = None,
    *,
    parts: Sequence[int] | None = None,
    model: nn.Module | None = None,
    class_weight: Any = None,
) -> Explanation:
    """What the loss of a batch is made of: the equation with its numbers, each reduction, the divisor, what to expect.

    Args:
        loss: a loss, its name, an expression, a function, or an objective.
        y_true: targets, as in a call of the loss or objective.
        y_pred: what the model returned.
        sample_weight: as in a call.
        mask: as in a call.
        parts: numbers of samples of the micro-batches or ranks of a window; they must add up to the batch.
        model: holds the parameters that the regularizers of an objective read.
        class_weight: of a loss, by index or one number a class; an objective has its own.

    Returns:
        an `Explanation`. Its numbers are those of the tally that the loss returns, divided as the loss divides.

    Raises:
        InputError: as the loss; parts that do not add up to the batch; class weights beside an objective.

    Example:
        >>> import lossledger as ll
        >>> found = ll.explain("mse", [[0.0], [0.0]], [[1.0], [3.0]])
        >>> print(found.terms[0].equation)
        Σ l / entries = 10 / 2 = 5
        >>> found.terms[0].divisor.value
        2.0
    """
    if isinstance(loss, Objective) and class_weight is not None:
        raise InputError(
            "explain: class_weight goes with a loss; expected none beside an objective, received some. Give it to the "
            "objective: Objective(…, class_weight=…)."
        )
    objective = loss if isinstance(loss, Objective) else Objective(loss, class_weight=class_weight)
    if objective is not loss:
        # To an objective a list is one value an output; to a loss it is an array.
        y_true, y_pred = as_tensor(y_true, "y_true"), as_tensor(y_pred, "y_pred")
        sample_weight = None if sample_weight is None else as_tensor(sample_weight, "sample_weight")
        mask = None if mask is None else as_tensor(mask, "mask")
    with torch.no_grad():
        whole = objective(y_true, y_pred, sample_weight, mask, model=model)
        terms = tuple(_term(objective, term, float(whole.total)) for term in whole.terms.values())
        outputs = _outputs(objective, terms)
        found = Explanation(whole.value, (), _equation(whole), terms, outputs)
        if parts is not None:
            found = _with_parts(found, objective, whole, (y_true, y_pred, sample_weight, mask), parts)
    return replace(found, sentences=_sentences(found))


def _term(objective: Objective, term: Term, total: float) -> TermExplanation:
    value, contribution = float(term.value), float(term.contribution)
    share = contribution / total if total else None
    plain = TermExplanation(term.name, term.role, term.weight, value, contribution, share, _number(value))
    loss, batch = term._loss, term._batch
    if loss is None or batch is None:
        return replace(plain, equation=f"{term.role} = {_number(value)}")
    levels = references.levels(loss, batch)
    base = next((level.value for level in levels if level.name == "base rate"), None)
    return replace(
        plain,
        equation=steps.equation(loss, batch, term.tally),
        steps=steps.steps(loss, batch, term.tally),
        divisor=steps.divisor(loss, batch, term.tally),
        order=steps.order(loss, batch, term),
        groups=steps.groups(loss, term, objective.group_name),
        references=levels,
        skill=1 - value / base if base is not None and base > 0 else None,
        consistency=references.consistency(loss, batch, term.tally),
    )


def _number(value: float) -> str:
    return display(value, digits=6)


def _equation(whole: Breakdown) -> str:
    if len(whole.terms) == 1:
        (term,) = whole.terms.values()
        if term.weight == 1:
            return f"loss = {term.name} = {_number(whole.value)}"
    products = " + ".join(f"{term.weight:g} × {_number(float(term.value))}" for term in whole.terms.values())
    names = " + ".join(f"{term.weight:g} × {term.name}" for term in whole.terms.values())
    return f"loss = {names} = {products} = {_number(whole.value)}"


def _outputs(objective: Objective, terms: Sequence[TermExplanation]) -> tuple[tuple[str, float], ...]:
    if len(objective.outputs) < 2:
        return ()
    sums: dict[str, float] = {}
    outputs = {plan.name: plan.output for plan in objective.terms}
    for term in terms:
        name = outputs.get(term.name, term.role)
        sums[name] = sums.get(name, 0.0) + term.contribution
    return tuple(sums.items())


# --- a window -----------------------------------------------------------------------------------------------------


def _with_parts(
    found: Explanation, objective: Objective, whole: Breakdown, data: tuple[Any, ...], sizes: Sequence[int]
) -> Explanation:
    first = next(term._batch for term in whole.terms.values() if term._batch is not None)
    samples = first.prediction.raw.shape[0]
    if any(size < 1 for size in sizes) or sum(sizes) != samples:
        raise InputError(
            f"explain: parts must be positive numbers of samples that add up to the batch; expected {samples} in all, "
            f"received {list(sizes)}."
        )
    rows: list[Part] = []
    values: list[float] = []
    start = 0
    for place, size in enumerate(sizes):
        y_true, y_pred, sample_weight, mask = (_sliced(value, start, start + size) for value in data)
        tallies = objective.tallies(y_true, y_pred, sample_weight, mask, by=None)
        start += size
        weights = {name: whole.terms[name].weight for name in tallies}
        values.append(sum(weights[name] * float(torch.as_tensor(tally.value)) for name, tally in tallies.items()))
        for name, tally in tallies.items():
            own, all_of_it = steps.single_divisor(tally), steps.single_divisor(whole.terms[name].tally)
            scale = steps.columns(whole.terms[name])
            share = None if own is None or not all_of_it or tally.offset else own / all_of_it
            value = float(torch.as_tensor(tally.value))
            rows.append(Part(name, place, size, None if own is None else own / scale, value, share))
    penalties = sum(float(term.contribution) for term in whole.terms.values() if term.role == "regularizer")
    return replace(found, parts=tuple(rows), mean_of_parts=sum(values) / len(values) + penalties)


def _sliced(value: Any, start: int, stop: int) -> Any:
    """The same samples of everything that has a batch axis, in any structure of outputs."""
    if value is None or is_number(value):
        return value
    if isinstance(value, Mapping):
        return {name: _sliced(part, start, stop) for name, part in value.items()}
    if isinstance(value, list | tuple) and any(
        isinstance(part, Tensor) or hasattr(part, "__array__") for part in value
    ):
        return type(value)(_sliced(part, start, stop) for part in value)
    if isinstance(value, Tensor) and not value.ndim:
        return value
    return value[start:stop]


# --- in words -----------------------------------------------------------------------------------------------------


def _sentences(found: Explanation) -> tuple[str, ...]:
    shown = display(found.value, digits=4)
    largest = max(found.terms, key=lambda term: abs(term.contribution))
    if len(found.terms) == 1:
        over = largest.divisor.words if largest.divisor else "one value"
        first = f"The loss {shown} is {largest.name}: {over}."
    else:
        part = f"{largest.name} adds {display(largest.contribution, digits=4)}"
        share = "" if largest.share is None else f", {display(largest.share, 'percent')} of it"
        first = f"The loss {shown} is the sum of {len(found.terms)} terms; {part}{share}."
    second = largest.order
    third = _level_sentence(largest)
    return tuple(sentence for sentence in (first, second, third) if sentence)


def _level_sentence(term: TermExplanation) -> str:
    base = next((level for level in term.references if level.name == "base rate"), None)
    if base is not None and term.skill is not None:
        if term.skill > 0:
            return (
                f"{base.meaning} would give {display(base.value, digits=4)}; the predictions are "
                f"{display(term.skill, 'percent')} better than that."
            )
        return f"{base.meaning} would give {display(base.value, digits=4)}: the predictions are not better than that."
    rows = [group for group in term.groups if group.share is not None]
    if len(rows) > 1:
        top = max(rows, key=lambda group: abs(group.contribution))
        return f"{top.name} adds {display(top.contribution, digits=4)}, {display(top.share, 'percent')} of the term."
    return ""
