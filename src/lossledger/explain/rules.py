"""Rules that give the value of a batch from those of its samples, and what the weights of such a rule follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fit:
    """`value = n^power · Σ ω l / Σ ω` for every batch of `n` of the samples.

    Args:
        power: 0 for a mean, 1 for a sum.
        weights: ω, a sample.
        equal: whether all are the same.
    """

    power: int
    weights: tuple[float, ...]
    equal: bool


def loose(tolerance: float) -> float:
    """The relative error of weights that were read from small differences of values, which cost half of the digits.

    Args:
        tolerance: relative error of the values.
    """
    return min(4 * math.sqrt(tolerance), 2e-3)


def holds(
    fit: Fit, singles: Sequence[float], values: Iterable[tuple[Sequence[int], float]], tolerance: float, scale: float
) -> bool:
    """Whether a rule gives the value of each of these batches.

    Args:
        fit: the rule.
        singles: the values of the samples alone.
        values: the samples of each batch, and its value.
        tolerance: relative to the largest of the two values and `scale`.
        scale: a value of the usual size.
    """
    for batch, value in values:
        weights = [fit.weights[row] for row in batch]
        total = math.fsum(w * singles[row] for w, row in zip(weights, batch, strict=True))
        predicted = len(batch) ** fit.power * total / math.fsum(weights)
        if abs(predicted - value) > tolerance * max(abs(predicted), abs(value), scale):
            return False
    return True


def proportional(weights: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    """Whether two lists of positive weights are the same up to one factor.

    Args:
        weights: found from values.
        others: found from values, or numbers to compare with.
        tolerance: relative error of the values.
    """
    factor = math.fsum(weights) / math.fsum(others)
    slack = 10 * loose(tolerance)
    return all(abs(a - factor * b) <= slack * abs(factor * b) for a, b in zip(weights, others, strict=True))


def class_weights(
    weights: Sequence[float], counted: tuple[list[int], Tensor] | None, tolerance: float
) -> tuple[tuple[int, float], ...]:
    """Weights of classes of which the weights of samples are the sums, the smallest 1; empty where there are none.

    Args:
        weights: ω, a sample.
        counted: the classes and `[B, K]`, how many entries of each a sample holds.
        tolerance: relative error of the values.
    """
    if counted is None:
        return ()
    names, counts = counted
    counts = counts.cpu()
    solution = torch.linalg.lstsq(counts, torch.tensor(weights, dtype=torch.float64).unsqueeze(1)).solution.squeeze(1)
    if float(solution.min()) <= 0 or not proportional((counts @ solution).tolist(), weights, tolerance):
        return ()
    return tuple(zip(names, (solution / solution.min()).tolist(), strict=True))
