"""Independent oracles: NumPy in float64, written from the formulas, one number at a time where that is clearer."""

from __future__ import annotations

import itertools
import math

import numpy as np

EPSILON = 1e-7


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def bce(y, p):
    q = np.clip(p, EPSILON, 1 - EPSILON)
    return -(y * np.log(q) + (1 - y) * np.log(1 - q))


def bce_logits(y, z):
    return np.logaddexp(0, z) - z * y


def normalised(p):
    return np.clip(p / p.sum(-1, keepdims=True), EPSILON, 1 - EPSILON)


def minus_cosine(y, p):
    """Entry by entry, from the definition of the angle."""
    entries = np.empty((*y.shape[:-1], 1))
    for index in np.ndindex(y.shape[:-1]):
        entries[index] = -np.dot(y[index], p[index]) / (np.linalg.norm(y[index]) * np.linalg.norm(p[index]))
    return entries


def categorical_hinge(y, p):
    """By how much the score of the true class misses a lead of 1 over the best other class, or over 0."""
    entries = np.empty((*y.shape[:-1], 1))
    for index in np.ndindex(y.shape[:-1]):
        label = int(np.argmax(y[index]))
        best = max(0.0, *np.delete(p[index], label))
        entries[index] = max(0.0, best - p[index][label] + 1)
    return entries


def ctc(labels, logits):
    """−log of the summed probability of all paths that spell the labels, each path written out; [S], [T, C]."""
    p, wanted = softmax(logits), [label for label in labels if label]
    total = 0.0
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        joined = [label for label, _ in itertools.groupby(path)]
        if [label for label in joined if label] == wanted:
            total += np.prod([p[step, label] for step, label in enumerate(path)])
    return -np.log(total)


def circle(labels, vectors, gamma, margin, remove_diagonal, present=None):
    """The circle loss of each sample, and whether it has a positive and a negative; pair by pair."""
    samples = range(len(labels))
    losses, counts = np.zeros(len(labels)), np.zeros(len(labels), bool)
    for a in samples:
        near, far = [], []
        for b in samples:
            if present is not None and not (present[a] and present[b]):
                continue
            similarity = min(float(vectors[a] @ vectors[b]), 1.0)
            if labels[a] != labels[b]:
                far.append(gamma * max(similarity + margin, 0) * (similarity - margin))
            elif a != b or not remove_diagonal:
                near.append(-gamma * max(1 + margin - similarity, 0) * (similarity - (1 - margin)))
        if near and far:
            counts[a] = True
            losses[a] = np.logaddexp(0, np.logaddexp.reduce(near) + np.logaddexp.reduce(far))
    return losses, counts


def reduce_entries(elements, reduction, weight=None, mask=None):
    """The value of a reduction from elements [B, d…, C]; weight and mask broadcast to them.

    Written entry by entry: the loss of an entry is the mean over C of weighted elements.
    """
    elements = np.asarray(elements, dtype=float)
    w = np.broadcast_to(np.ones(()) if weight is None else weight, elements.shape)
    m = np.broadcast_to(np.ones((), bool) if mask is None else mask, elements.shape).astype(bool)
    columns = elements.shape[-1]
    total, valid, weights, nonzero = 0.0, 0, 0.0, 0
    for index in np.ndindex(elements.shape):
        if m[index]:
            total += w[index] * elements[index] / columns
            valid += 1
            weights += w[index]
            nonzero += w[index] != 0
    if reduction == "sum":
        return total
    if reduction == "mean_per_sample":
        means = [
            reduce_entries(elements[b : b + 1], "sum_over_batch_size", w[b : b + 1], m[b : b + 1])
            for b in range(len(elements))
            if m[b].any()
        ]
        return float(np.mean(means)) if means else 0.0
    divisor = {
        "sum_over_batch_size": valid / columns,
        "mean_with_sample_weight": weights / columns,
        "sum_over_all_entries": elements.size / columns,
        "sum_over_nonzero_weights": nonzero / columns,
    }[reduction]
    return total / divisor if divisor else 0.0


def overlap(y, p, kappa, alpha, beta, axis, smooth=EPSILON, weight=None, mask=None):
    """Dice, Jaccard, Tversky of each kept cell, then their mean; weights enter the sums."""
    w = np.broadcast_to(np.ones(()) if weight is None else weight, y.shape).astype(float)
    if mask is not None:
        w = w * np.broadcast_to(mask, y.shape)
        y, p = np.where(w == 0, 0, y), np.where(w == 0, 0, p)
    axes = tuple(range(y.ndim)) if axis is None else axis
    tp, fp, fn = ((w * v).sum(axes) for v in (y * p, (1 - y) * p, y * (1 - p)))
    wrong = alpha * fp + beta * fn
    return wrong / (kappa * tp + wrong + smooth)


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
