"""From the output to one number: each reduction with its shape, the divisor and its source, the groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lossledger import reduction as reductions
from lossledger.losses.aligned import Aligned
from lossledger.losses.coupled import BatchCoupled
from lossledger.losses.custom import TorchLoss
from lossledger.losses.loss import Loss
from lossledger.losses.overlap import Dice, Jaccard, Tversky
from lossledger.objective.breakdown import Term
from lossledger.report.numbers import display
from lossledger.tally import Tally
from lossledger.weighting import Weighting

OVERLAPS = (Dice, Jaccard, Tversky)

_ENTRIES = "entries"
_SOURCES = {
    "sum_over_batch_size": ("valid entries", "entries that the mask leaves; weights never divide"),
    "mean_with_sample_weight": ("Σ weights", "the weights of the entries that count, as they were applied"),
    "sum_over_all_entries": ("all entries", "every entry, masked or not"),
    "sum_over_nonzero_weights": ("entries of weight ≠ 0", "entries whose weight × mask is not 0"),
    "mean_per_sample": ("samples", "samples with at least one valid entry; each was divided by its own entries before"),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step from the output to the value.

    Args:
        operation: what is done.
        shape: of the result; `()` for one number, `None` where only the loss knows it.
        value: of the result, where it is one number.
    """

    operation: str
    shape: tuple[int, ...] | None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Divisor:
    """What divides.

    Args:
        value: in entries; `None` for a ratio, which has one a cell.
        name: what it is.
        source: where it comes from.
        words: what the value is, for a sentence.
    """

    value: float | None
    name: str
    source: str
    words: str


@dataclass(frozen=True, slots=True)
class Group:
    """The part of a class in a term: contribution, share of the term, number of elements, own mean."""

    name: str
    contribution: float
    share: float | None
    count: int
    mean: float | None


def number(value: float) -> str:
    """A number of an equation, to six digits.

    Args:
        value: the number.
    """
    return f"{value:.6g}"


def single_divisor(tally: Tally) -> float | None:
    """The divisor in elements, the offset included; `None` for one a cell.

    Args:
        tally: of a batch.
    """
    divisor = torch.as_tensor(tally.divisor + tally.offset)
    return float(divisor) if divisor.numel() == 1 and tally.form == "linear" else None


def columns(term: Term) -> int:
    """The length of the class axis over which the entries of a term are means; 1 where there is none.

    Args:
        term: of a breakdown.
    """
    if term._loss is None or term._batch is None:
        return 1
    return _weighting(term._loss, term._batch).shape[-1]


def _weighting(loss: Loss, batch: Aligned) -> Weighting:
    """The weighting of the entries of the loss; `(1,)` stands for entries that only the loss knows."""
    if batch.late is not None:
        return Weighting((1,))
    if isinstance(loss, OVERLAPS) and not loss.is_ratio(len(batch.weighting.shape)):
        return loss._as_cells(batch).weighting
    return batch.weighting


def _is_ratio(loss: Loss, batch: Aligned) -> bool:
    return isinstance(loss, OVERLAPS) and loss.is_ratio(len(batch.weighting.shape))


def _given(loss: Loss, batch: Aligned) -> tuple[bool, bool]:
    """Whether there are weights, and whether there is a mask."""
    if batch.late is not None:
        late = batch.late
        return late.sample_weight is not None or late.class_weight is not None, late.mask is not None
    weighting = _weighting(loss, batch)
    return weighting.weight is not None or batch.column_weight is not None, weighting.mask is not None


def divisor(loss: Loss, batch: Aligned, tally: Tally) -> Divisor:
    """What divides the numerator of a tally.

    Args:
        loss: that made it.
        batch: aligned.
        tally: of the batch.
    """
    found = single_divisor(tally)
    if found is None:
        cells = torch.as_tensor(tally.numerator).numel()
        many = f"the mean over {cells:,} cells" if cells > 1 and tally.coefficient != 1 else "a quotient of sums"
        source = "sums of targets and predictions over the batch: it depends on the predictions"
        return Divisor(None, "areas", source, f"{many}, each a quotient of areas summed over the batch")
    scale = _weighting(loss, batch).shape[-1]
    value = found / scale
    if loss.reduction.statistic is None or tally.offset:
        return Divisor(1.0, "1", "a sum divides by nothing", f"a sum over {_counted(tally, scale)} entries")
    name, source = _source(loss, batch)
    inner = f", each the mean over {scale:,} classes" if scale > 1 else ""
    mean = name in (_ENTRIES, "valid entries", "cells")
    words = "the mean over" if mean else "a total divided by"
    return Divisor(value, name, source, f"{words} {display(value, 'count')} {name}{inner}")


def _source(loss: Loss, batch: Aligned) -> tuple[str, str]:
    weighted, masked = _given(loss, batch)
    if isinstance(loss, TorchLoss) and loss._own_divisor(batch) is not None:
        if isinstance(loss.module, nn.KLDivLoss):
            return "samples", "the batch size, by reduction='batchmean'"
        return "Σ class weights", "the class weights of the labels that count, as in torch"
    if isinstance(loss, BatchCoupled):
        return "samples", "samples that have the partners which the loss needs in this batch"
    name, source = _SOURCES.get(
        loss.reduction.name, (f"{loss.reduction.name}", f"the statistic of the reduction {loss.reduction.name!r}")
    )
    if loss.reduction is reductions.MEAN and not masked:
        shape = _weighting(loss, batch).shape[:-1]
        product = " × ".join(f"{size:,}" for size in shape) or "all values"
        cells = "cells" if isinstance(loss, OVERLAPS) else _ENTRIES
        return cells, f"every entry counts once: {product}" + ("; weights never divide" if weighted else "")
    return name, source


def _counted(tally: Tally, scale: int) -> str:
    return f"{int(tally.count) // scale:,}"


def equation(loss: Loss, batch: Aligned, tally: Tally) -> str:
    """The formula of the reduction with the numbers of the batch.

    Args:
        loss: that made the tally.
        batch: aligned.
        tally: of the batch.
    """
    value = float(torch.as_tensor(tally.value))
    weighted, masked = _given(loss, batch)
    entry = "l" + ("·w" if weighted else "") + ("·m" if masked else "")
    found = divisor(loss, batch, tally)
    if found.value is None:
        numerators = torch.as_tensor(tally.numerator).reshape(-1).tolist()
        divisors = torch.as_tensor(tally.divisor + tally.offset).reshape(-1).tolist()
        shown = [f"{number(n)}/{number(d)}" for n, d in zip(numerators, divisors, strict=True)][:4]
        more = " + …" if len(numerators) > 4 else ""
        mean = f"1/{len(numerators)} · (" if tally.coefficient != 1 else "("
        return f"{mean}{' + '.join(shown)}{more}) = {number(value)}"
    scale = _weighting(loss, batch).shape[-1]
    total = float(torch.as_tensor(tally.numerator)) / scale
    if found.name == "1":
        return f"Σ {entry} = {number(value)}"
    return f"Σ {entry} / {found.name} = {number(total)} / {number(found.value)} = {number(value)}"


def steps(loss: Loss, batch: Aligned, tally: Tally) -> tuple[Step, ...]:
    """Each reduction with the shape of its result.

    Args:
        loss: that made the tally.
        batch: aligned.
        tally: of the batch.
    """
    rows = [Step("output", tuple(batch.prediction.raw.shape))]
    value = float(torch.as_tensor(tally.value))
    if _is_ratio(loss, batch):
        return (*rows, *_ratio_steps(loss, batch, tally, value))
    weighting = _weighting(loss, batch)
    weighted, masked = _given(loss, batch)
    scale = weighting.shape[-1]
    entries = weighting.shape[:-1] if batch.late is None else None
    if isinstance(loss, OVERLAPS):
        rows.append(
            Step(f"areas over axes {loss._reduced(len(batch.weighting.shape))}, their quotient", weighting.shape)
        )
    elif entries is not None and weighting.shape == tuple(batch.prediction.raw.shape):
        rows.append(Step("loss of each element", weighting.shape))
    if scale > 1:
        rows.append(Step("mean over class", entries))
    elif not isinstance(loss, OVERLAPS):
        rows.append(Step("loss of each entry (class axis used up)", entries))
    if weighted:
        rows.append(Step("× weight", entries))
    if masked:
        rows.append(Step(f"× mask: {_counted(tally, scale)} entries count", entries))
    if loss.reduction.rescale is not None:
        rows.append(Step("÷ valid entries of its sample", entries))
    count = prod(entries) if entries is not None else int(tally.count)
    total = float(torch.as_tensor(tally.numerator)) / scale
    rows.append(Step(f"Σ {count:,} entries", (), total))
    found = divisor(loss, batch, tally)
    if found.value is not None and found.name != "1":
        rows.append(Step(f"÷ {display(found.value, 'count')} {found.name}", (), value))
    return tuple(rows)


def _ratio_steps(loss: Loss, batch: Aligned, tally: Tally, value: float) -> list[Step]:
    assert isinstance(loss, OVERLAPS)
    shape = batch.weighting.shape
    axes = loss._reduced(len(shape))
    kept = tuple(shape[axis] for axis in loss._kept(len(shape)))
    rows = [Step("true and false positives, false negatives of each element", shape)]
    if batch.weighting.product is not None:
        rows.append(Step("× weight and mask", shape))
    rows.append(Step(f"Σ over axes {axes}: two areas", kept))
    rows.append(Step(f"quotient, ε = {loss.smooth:g} in the divisor", kept, None if kept else value))
    if kept:
        rows.append(
            Step("sum over cells" if tally.coefficient == 1 and prod(kept) > 1 else "mean over cells", (), value)
        )
    return rows


def order(loss: Loss, batch: Aligned, term: Term) -> str:
    """Whether it matters what is averaged first, shown on the samples of the batch.

    Args:
        loss: of the term.
        batch: aligned.
        term: of the breakdown.
    """
    if _is_ratio(loss, batch):
        return "Here the areas are summed over the batch first and divided then: it is no mean of the samples' losses."
    if loss.reduction.statistic is None or term.tally.offset:
        return "A sum has no order, and nothing divides: twice the data is twice the loss."
    if batch.late is not None:
        return ""
    rows = term.grouped("sample").groups
    assert rows is not None
    counts = torch.as_tensor(rows.count).double()
    totals = torch.as_tensor(rows.total).double()
    some = counts > 0
    if not bool(some.any()):
        return "Nothing counts in this batch: the loss is 0, over 0 entries."
    own = float((totals[some] / counts[some]).mean())
    weighted, masked = _given(loss, batch)
    value = float(term.value)
    if loss.reduction.name == "mean_per_sample":
        everything = float(totals.sum() / counts.sum())
        return (
            f"Each sample is averaged over its own entries first, then the samples: {number(value)}; over all valid "
            f"entries at once it would be {number(everything)}."
        )
    if abs(own - value) <= 1e-6 * max(abs(own), abs(value)):
        why = "" if weighted or masked else ": without weights and masks all samples are of one size"
        return (
            f"The order does not matter{why}. The mean of the {int(some.sum()):,} samples' own means is "
            f"{number(own)}, the mean of everything {number(value)}."
        )
    return (
        f"The order matters here: everything at once over the divisor is {number(value)}, the mean of the samples' own "
        f"means would be {number(own)}."
    )


def groups(loss: Loss, term: Term, named: Callable[[object, int], str]) -> tuple[Group, ...]:
    """The contributions of the classes, largest first; empty for a loss without classes.

    Args:
        loss: of the term.
        term: of the breakdown.
        named: the name of a class, from its number and how many there are.
    """
    if loss.classes_are is None:
        return ()
    tally = term.grouped("class")
    rows = tally.groups
    assert rows is not None and rows.keys is not None
    shares = (term.weight * torch.as_tensor(tally.contributions())).tolist()
    counts, totals = _list(rows.count), _list(rows.total)
    whole = float(term.contribution)
    classes = len({name for name, _ in rows.keys})
    found = [
        Group(
            f"class {named(name, classes)}" + (f" {presence}" if presence else ""),
            share,
            share / whole if whole else None,
            int(count),
            total / count if count and tally.form == "linear" else None,
        )
        for (name, presence), share, count, total in zip(rows.keys, shares, counts, totals, strict=True)
    ]
    return tuple(sorted(found, key=lambda group: -abs(group.contribution)))


def _list(values: Tensor) -> list[float]:
    return [float(value) for value in torch.as_tensor(values).reshape(-1)]
