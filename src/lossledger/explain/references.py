"""Levels to compare a loss with, and what metrics say that it must be at least.

A level is the same loss, with the same weights, mask and divisor, at other predictions: all classes alike, the
frequencies of the targets, the targets themselves. So no formula is written twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lossledger.losses.aligned import Aligned
from lossledger.losses.classification import (
    BinaryCrossentropy,
    CategoricalCrossentropy,
    SparseCategoricalCrossentropy,
)
from lossledger.losses.contrastive import InfoNCE, NTXent
from lossledger.losses.custom import TorchLoss
from lossledger.losses.loss import Loss
from lossledger.losses.overlap import Dice
from lossledger.losses.prediction import Prediction
from lossledger.losses.regression import MeanAbsoluteError
from lossledger.report.numbers import display
from lossledger.tally import Tally

# Beyond this a logit is certainty, in float64 too: exp(-10000) is 0.
CERTAIN = 1e4


@dataclass(frozen=True, slots=True)
class Reference:
    """A level.

    Args:
        name: `"chance"`, `"base rate"`, `"floor"`, `"double softmax"`, …
        value: of the loss at that level.
        meaning: which predictions it belongs to.
    """

    name: str
    value: float
    meaning: str


@dataclass(frozen=True, slots=True)
class _Classes:
    """A loss of classes: its targets as probabilities, class axis last, and how it reads predictions."""

    targets: Tensor
    exclusive: bool
    logits: bool
    axis: int = -1

    def raw(self, probabilities: Tensor) -> Tensor:
        """Probabilities as the loss expects its output."""
        if not self.logits:
            return probabilities
        odds = probabilities.log() if self.exclusive else probabilities.logit()
        return odds.clamp(-CERTAIN, CERTAIN)


def levels(loss: Loss, batch: Aligned) -> tuple[Reference, ...]:
    """The levels of a loss on a batch; empty for a loss of which nothing is known.

    Args:
        loss: any.
        batch: aligned.
    """
    if isinstance(loss, InfoNCE | NTXent):
        return (_at(loss, batch, torch.ones_like(batch.prediction.raw), "chance", _contrastive_words(loss, batch)),)
    classes = _classes(loss, batch)
    if classes is not None:
        return _class_levels(loss, batch, classes)
    if isinstance(loss, Dice) or loss.space is not None:
        return _overlap_levels(loss, batch)
    if loss.classes_are == "output" and batch.y_true.shape == batch.prediction.raw.shape:
        return _regression_levels(loss, batch)
    return ()


def _at(loss: Loss, batch: Aligned, raw: Tensor, name: str, meaning: str) -> Reference:
    other = replace(batch, prediction=Prediction(raw.to(batch.prediction.raw)))
    return Reference(name, float(torch.as_tensor(loss.tally_aligned(other).value)), meaning)


def _contrastive_words(loss: Loss, batch: Aligned) -> str:
    samples = batch.prediction.raw.shape[0]
    count = samples if isinstance(loss, InfoNCE) else 2 * samples - 1
    return f"All embeddings alike (ln N with N = {count:,} choices, less those that are masked)"


def _classes(loss: Loss, batch: Aligned) -> _Classes | None:
    y, raw = batch.y_true, batch.prediction.raw
    if isinstance(loss, BinaryCrossentropy):
        return _Classes(y, False, loss.from_logits)
    if isinstance(loss, SparseCategoricalCrossentropy):
        return _Classes(_one_hot(y, raw.shape[-1]).to(raw), True, loss.from_logits)
    if isinstance(loss, CategoricalCrossentropy):
        return _Classes(y, True, loss.from_logits)
    if isinstance(loss, TorchLoss) and isinstance(loss.module, nn.BCEWithLogitsLoss):
        return _Classes(y, False, True)
    if isinstance(loss, TorchLoss) and isinstance(loss.module, nn.CrossEntropyLoss):
        targets = y.movedim(1, -1) if y.is_floating_point() else _one_hot(y, raw.shape[1]).to(raw)
        return _Classes(targets, True, True, 1)
    return None


def _one_hot(labels: Tensor, count: int) -> Tensor:
    # Ignored labels carry weight 0; here they only must be some class.
    return torch.nn.functional.one_hot(labels.long().clamp(0, count - 1), count)


def _entry_weights(loss: Loss, batch: Aligned, shape: torch.Size) -> Tensor:
    """What multiplies each element, in float64."""
    product = loss._entry_weight(batch)
    if product is None:
        return torch.ones(shape, dtype=torch.float64, device=batch.prediction.raw.device)
    return product.double().expand(shape)


def _frequencies(targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the targets, by column; ½ where nothing counts."""
    flat, weight = targets.double().reshape(-1, targets.shape[-1]), weights.reshape(-1, targets.shape[-1])
    total = weight.sum(0)
    return torch.where(total > 0, (flat * weight).sum(0) / total.where(total > 0, 1.0), 0.5)


def _smoothed(loss: Loss, classes: _Classes) -> Tensor:
    s = float(getattr(loss, "label_smoothing", 0.0))
    if isinstance(loss, TorchLoss):
        s = float(getattr(loss.module, "label_smoothing", 0.0))
    count = classes.targets.shape[-1] if classes.exclusive else 2
    return classes.targets * (1 - s) + s / count


def _class_levels(loss: Loss, batch: Aligned, classes: _Classes) -> tuple[Reference, ...]:
    targets = _smoothed(loss, classes)
    shape, count = targets.shape, targets.shape[-1]

    def at(probabilities: Tensor, name: str, meaning: str) -> Reference:
        raw = classes.raw(probabilities.to(batch.prediction.raw)).expand(shape)
        return _at(loss, batch, raw.movedim(-1, classes.axis), name, meaning)

    even = torch.full((count,), 1 / count if classes.exclusive else 0.5, dtype=torch.float64)
    chance = f"ln K with K = {count:,} classes" if classes.exclusive else "ln 2: probability ½ everywhere"
    if classes.exclusive and len(shape) == 2 and shape[0] == count and bool((targets.argmax(-1).diff() == 1).all()):
        chance = f"ln N with N = {count:,} samples, each the class of one (in-batch negatives)"
    found = [at(even, "chance", f"All classes alike ({chance} without weights)")]
    rates = _frequencies(targets, _entry_weights(loss, batch, shape))
    found.append(at(rates, "base rate", "Always predicting how often each class occurs"))
    # Of a focal loss the minimum lies elsewhere than at the targets; so with class weights inside of smoothed labels.
    torch_plain = isinstance(loss, TorchLoss) and classes.exclusive and loss.module.weight is None
    if torch_plain or type(loss) in (BinaryCrossentropy, CategoricalCrossentropy, SparseCategoricalCrossentropy):
        soft = bool(((targets > 0) & (targets < 1)).any())
        words = (
            "The entropy of soft or smoothed labels, which no prediction gets below" if soft else "Certain and right"
        )
        found.append(at(targets, "floor", words))
    if classes.logits:
        hard = torch.nn.functional.one_hot(targets.argmax(-1), count) if classes.exclusive else classes.targets.round()
        name = "double softmax" if classes.exclusive else "double sigmoid"
        words = "Probabilities taken for logits, all certain and right" + (
            "; the output here looks like probabilities" if _looks_like_probabilities(batch, classes) else ""
        )
        found.append(_at(loss, batch, hard.movedim(-1, classes.axis), name, words))
    return tuple(found)


def _looks_like_probabilities(batch: Aligned, classes: _Classes) -> bool:
    raw = batch.prediction.raw
    inside = bool(((raw >= 0) & (raw <= 1)).all())
    return inside and (not classes.exclusive or bool(((raw.sum(classes.axis) - 1).abs() < 1e-3).all()))


def _overlap_levels(loss: Loss, batch: Aligned) -> tuple[Reference, ...]:
    if batch.y_true.shape != batch.prediction.raw.shape or not hasattr(loss, "smooth"):
        return ()
    y, kind = batch.y_true, getattr(loss, "from_logits", False)
    classes = _Classes(y, kind == "softmax", bool(kind))
    mask = batch.weighting.mask
    inside = torch.ones(y.shape) if mask is None else mask.expand(y.shape)
    rates = _frequencies(y, inside.double().to(y.device)).to(y)
    found = [
        _at(
            loss,
            batch,
            classes.raw(rates).expand(y.shape),
            "base rate",
            "Always predicting how often each class occurs",
        )
    ]
    if kind != "softmax":
        empty = classes.raw(torch.zeros_like(y))
        found.append(_at(loss, batch, empty, "nothing found", "Predicting no class anywhere"))
    return tuple(found)


def _regression_levels(loss: Loss, batch: Aligned) -> tuple[Reference, ...]:
    y = batch.y_true
    weights = _entry_weights(loss, batch, y.shape)
    if isinstance(loss, MeanAbsoluteError):
        constant, word = _medians(y, weights), "median"
    else:
        constant, word = _frequencies(y, weights), "mean"
    return (
        _at(loss, batch, constant.to(y).expand(y.shape), "base rate", f"Always predicting the {word} of the targets"),
    )


def _medians(targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted median of the targets, by column."""
    flat, weight = targets.double().reshape(-1, targets.shape[-1]), weights.reshape(-1, targets.shape[-1])
    ordered, places = flat.sort(0)
    below = weight.gather(0, places).cumsum(0)
    first = (below < below[-1:] / 2).sum(0).clamp(max=len(flat) - 1)
    return ordered.gather(0, first.unsqueeze(0)).squeeze(0)


# --- consistency with metrics -------------------------------------------------------------------------------------


def consistency(loss: Loss, batch: Aligned, tally: Tally) -> tuple[str, ...]:
    """What accuracy or IoU of the same batch say about the value.

    Args:
        loss: that made the tally.
        batch: aligned.
        tally: of the batch.
    """
    if isinstance(loss, Dice):
        return _dice_and_iou(loss, batch, tally)
    classes = _classes(loss, batch)
    if classes is None or type(loss) not in (
        BinaryCrossentropy,
        CategoricalCrossentropy,
        SparseCategoricalCrossentropy,
    ):
        return ()
    targets = _smoothed(loss, classes)
    if bool(((targets > 0) & (targets < 1)).any()) or bool(
        (targets.sum(-1) != 1).any() if classes.exclusive else False
    ):
        return ()
    return _cost_of_errors(loss, batch, tally, classes)


def _cost_of_errors(loss: Loss, batch: Aligned, tally: Tally, classes: _Classes) -> tuple[str, ...]:
    """A wrong decision gives the truth at most ½, and so costs at least ln 2."""
    raw = batch.prediction.raw
    if classes.exclusive:
        wrong = (raw.argmax(-1) != classes.targets.argmax(-1)).unsqueeze(-1)
    else:
        wrong = (raw > (0 if classes.logits else 0.5)) != (classes.targets > 0.5)
    weights = _entry_weights(loss, batch, wrong.shape)
    if bool((weights < 0).any()):
        return ()
    whole = torch.as_tensor(tally.divisor + tally.offset).double()
    share = float(torch.where(whole != 0, (weights * wrong).sum() / whole.where(whole != 0, 1.0), 0.0))
    value, bound = float(torch.as_tensor(tally.value)), share * math.log(2)
    counted = int(((weights != 0) & wrong).sum())
    unit = "entries" if classes.exclusive else "elements"
    return (
        f"{counted:,} {unit} are decided wrongly; each costs at least ln 2 times its weight, so the loss cannot be "
        f"below {display(bound, digits=4)} at this accuracy. It is {display(value, digits=4)}.",
    )


def _dice_and_iou(loss: Dice, batch: Aligned, tally: Tally) -> tuple[str, ...]:
    """Of hard predictions Dice loss is `(1 − IoU) / (1 + IoU)`, convex: its mean is at least its value at the mean."""
    if batch.weighting.weight is not None or batch.column_weight is not None or batch.weighting.mask is not None:
        return ()
    raw = batch.prediction.raw
    if loss.from_logits == "softmax":
        hard = torch.nn.functional.one_hot(raw.argmax(-1), raw.shape[-1]).to(raw)
    else:
        hard = (raw > (0 if loss.from_logits else 0.5)).to(raw)
    classes = _Classes(batch.y_true, loss.from_logits == "softmax", bool(loss.from_logits))
    cells = loss._elements(replace(batch, prediction=Prediction(classes.raw(hard)))).double().reshape(-1)
    iou = float(((1 - cells) / (1 + cells)).mean())
    bound, value = (1 - iou) / (1 + iou), float(torch.as_tensor(tally.value))
    decided = float(cells.mean())
    over = f"the mean IoU of {cells.numel():,} cells" if cells.numel() > 1 else "the IoU"
    return (
        f"Decided at ½, {over} is {display(iou, digits=4)}: a Dice loss of such masks cannot be below "
        f"{display(bound, digits=4)} = (1 − IoU) / (1 + IoU), and is {display(decided, digits=4)}. "
        f"With probabilities it is {display(value, digits=4)}.",
    )
