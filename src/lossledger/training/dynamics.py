"""What training dynamics need of each sample: how sure the model was of the true classes, and by how much."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from lossledger.losses import backward, summing
from lossledger.losses.aligned import Aligned
from lossledger.losses.groups import present
from lossledger.losses.loss import Loss
from lossledger.losses.ratio import EPSILON
from lossledger.values import streams
from lossledger.weighting import Weighting


def look(losses: Mapping[str, Loss], part: Aligned) -> dict[str, Tensor]:
    """What `measures` begins with, of some samples: sums by sample; nothing of terms that are not measured.

    Args:
        losses: by term, those that are measured.
        part: whole samples, aligned.
    """
    loss = losses.get(part.where)
    return {} if loss is None or loss.classes_are != "column" else _column_sums(loss, part)


def measures(loss: Loss, batch: Aligned, seen: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """By sample, the mean over its unmasked entries of the confidence, of being right, and of the margin.

    Args:
        loss: one whose `classes_are` is "label" (exclusive classes) or "column" (each column yes or no).
        batch: aligned for it.
        seen: what `look` has told of all of its samples, if it was asked.

    Returns:
        `confidence`, the probability of the true class, of losses that read probabilities or logits of them;
        `correct`, the share of entries whose true class has the largest output; `margin`, the logit of the true class
        minus the largest other; and, where a sample has one entry, its `label` and what was `predicted`.
    """
    return _of_labels(loss, batch) if loss.classes_are == "label" else _of_columns(loss, batch, seen)


def _of_columns(loss: Loss, batch: Aligned, seen: dict[str, Tensor] | None) -> dict[str, Tensor]:
    raw, weights = batch.given.prediction.raw, batch.weighting
    if seen is None:
        parts = [_column_sums(loss, part) for part in summing.parts_of(batch)]
        seen = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    result = _means(seen, weights.mask, raw)
    if raw.numel() == len(raw):
        predicted = batch.prediction.raw > (0 if loss.space == "logits" else 0.5)
        result |= {"label": (batch.y_true > 0.5).flatten().long(), "predicted": predicted.flatten().long()}
    return result


def _column_sums(loss: Loss, part: Aligned) -> dict[str, Tensor]:
    z, weights = part.prediction.raw, part.weighting
    if loss.space != "logits":
        z = torch.logit(z, EPSILON, out=weights.kept(z))
    # Arithmetic on floats is several times faster than a choice by a mask.
    sign = present(part.y_true, weights).to(z.dtype).mul_(2).sub_(1)
    inside = Weighting(weights.shape, weights.mask, None, weights._scratch).product_for(z)
    if inside is not None:
        # Masked outputs are finite, or the sums show it.
        sign.mul_(inside)
    margin = sign.mul_(z)
    found = {"margin": _row_sums(margin), "correct": _row_sums(torch.gt(margin, 0, out=weights.passing(margin)))}
    if hasattr(loss, "from_logits"):
        confidence = torch.sigmoid(margin, out=weights.passing(margin))
        found["confidence"] = _row_sums(confidence if inside is None else confidence.mul_(inside))
    return found


def _of_labels(loss: Loss, batch: Aligned) -> dict[str, Tensor]:
    raw, logits = batch.prediction.raw, loss.space == "logits"
    samples, classes = len(raw), raw.shape[-1]
    index = loss._labels(batch)[1].reshape(-1, 1).clamp(0, classes - 1)
    flat = batch.prediction.map(lambda values: values.reshape(-1, classes))
    large = streams(raw)
    length = max(backward.PART // classes, 1) if large else max(len(index), 1)
    margins: list[Tensor] = []
    confidences: list[Tensor] = []
    for start in range(0, max(len(index), 1), length):
        rows = slice(start, start + length)
        prediction, own = flat.map(operator.itemgetter(rows)), index[rows]
        # Differences of logarithms of probabilities are differences of logits.
        z = prediction.raw if logits else _log(prediction.raw)
        true = z.gather(-1, own)
        scratch = backward.scratch_of_thread().passing(z) if large else None
        others = z.clone() if scratch is None else scratch.copy_(z)
        margins.append(true - others.scatter_(-1, own, -torch.inf).amax(-1, keepdim=True))
        if hasattr(loss, "from_logits"):
            logarithms = prediction.own_log_softmax(others) if logits else z
            confidences.append(logarithms.gather(-1, own).exp_())
    mask, margin = batch.weighting.mask, torch.cat(margins)
    entries = {"margin": margin, "correct": margin > 0}
    if confidences:
        entries["confidence"] = torch.cat(confidences)
    if mask is not None:
        inside = mask.expand(*raw.shape[:-1], 1).reshape(-1, 1)
        # The margin of the only class is infinite.
        entries = {n: torch.where(inside, values, torch.zeros_like(values)) for n, values in entries.items()}
    result = _means({n: _row_sums(values.reshape(samples, -1)) for n, values in entries.items()}, mask, raw[..., :1])
    if margin.numel() == samples:
        result |= {"label": index.flatten(), "predicted": raw.argmax(-1).flatten()}
    return result


def _log(probabilities: Tensor) -> Tensor:
    return (probabilities / probabilities.sum(-1, keepdim=True)).clamp_(EPSILON, 1).log_()


def _row_sums(values: Tensor) -> Tensor:
    """Σ by sample; of bools, how many are set."""
    if values.dtype == torch.bool:
        return values.flatten(1).view(torch.uint8).sum(1, dtype=torch.int32)
    return values.flatten(1).sum(1)


def _means(sums: dict[str, Tensor], mask: Tensor | None, like: Tensor) -> dict[str, Tensor]:
    """Sums by sample over the number of unmasked elements, of which there are as many as numbers in `like`."""
    if mask is None:
        return {name: total / prod(like.shape[1:]) for name, total in sums.items()}
    count = summing.counted(mask, tuple(like.shape), (0,), like).clamp(min=1)
    return {name: total / count for name, total in sums.items()}
