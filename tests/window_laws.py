"""What the laws of windows are checked on: a random objective, its data, and how these are cut over ranks and batches.

One process and one batch say what is right. The same code runs in threads and in processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import lossledger as ll
from declarations import MATRIX, REDUCTIONS
from lossledger.errors import LossledgerError
from lossledger.forward import run_forward
from lossledger.losses.coupled import BatchCoupled

POSITIONS = 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
COUPLED = [row for row in MATRIX if isinstance(row.make(), BatchCoupled)]
ADDITIVE = [row for row in MATRIX if not isinstance(row.make(), BatchCoupled)]


class Table(nn.Module):
    """Outputs looked up by sample, times a parameter that all samples share; and auxiliary losses."""

    def __init__(self, outputs, aux=False):
        super().__init__()
        self.rows = nn.ParameterDict({name: nn.Parameter(values.clone()) for name, values in outputs.items()})
        self.shared = nn.Parameter(torch.ones((), dtype=next(iter(outputs.values())).dtype))
        self.aux = aux

    def forward(self, x):
        found = {name: rows[x] * self.shared for name, rows in self.rows.items()}
        if self.aux:
            first = next(iter(found.values()))
            ll.add_loss("size", first.square().flatten(1).mean(1))
            return ll.Outputs(found, {"scale": self.shared.square()})
        return found


def gradients(net):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def norm(tensors):
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def gap(left, right):
    return norm([a - b for a, b in zip(left, right, strict=True)])


def accepted(row):
    """The reductions that a loss takes."""
    found = []
    for reduction in REDUCTIONS:
        try:
            row.make(reduction=reduction)
        except LossledgerError:
            continue
        found.append(reduction)
    return found


class Noise(nn.Module):
    """Randomness that torch's state does not hold."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x):
        return x * (1 + 0.1 * float(self.rng.random()))


@dataclass(frozen=True)
class Problem:
    """An objective with its data, and the samples of each micro-batch of each rank.

    Args:
        objective: what is minimized.
        outputs: of the model, by name; so are `y`, `weight` and `mask`.
        parts: indices of samples, by rank and micro-batch.
        aux: whether the model adds losses of its own.
    """

    objective: ll.Objective
    outputs: dict[str, torch.Tensor]
    y: dict[str, torch.Tensor]
    weight: dict[str, torch.Tensor]
    mask: dict[str, torch.Tensor]
    parts: tuple[tuple[torch.Tensor, ...], ...]
    aux: bool = False

    @property
    def dtype(self):
        return next(iter(self.outputs.values())).dtype

    def batch(self, ids):
        """The batch of some samples."""
        cut = [{n: v[ids] for n, v in field.items()} or None for field in (self.y, self.weight, self.mask)]
        return ll.Batch(ids, *cut)

    def net(self):
        return Table(self.outputs, self.aux)


@dataclass(frozen=True)
class Found:
    """What a window gave on a rank: gradients, the size of each micro-batch's part, values and counts of the terms."""

    gradients: list[torch.Tensor]
    parts: list[float]
    values: dict[str, float]
    total: float
    counts: dict[str, tuple[int, int]]


def values_of(b):
    """Values of the terms and of the total, and how many elements counted and were masked."""
    values = {name: float(term.value) for name, term in b.terms.items()}
    # A penalty on the weights is counted where it is added.
    tallies = {name: term.tally for name, term in b.terms.items() if term.role != "regularizer"}
    counts = {name: (int(tally.count), int(tally.masked)) for name, tally in tallies.items()}
    return {"values": values, "total": b.value, "counts": counts}


@dataclass(frozen=True)
class Expected(Found):
    """What one batch gives, and what its numbers are rounded by: the parts of samples, which may cancel.

    Args:
        sizes: Σ |part of a sample| of the value of each term.
        size: the same of the total.
    """

    sizes: dict[str, float]
    size: float


def size_of(term):
    if term.role != "data":
        return abs(float(term.value))
    return float(term.grouped("sample").contributions().abs().sum())


def at_once(problem):
    """One process, one batch, without a window."""
    net, whole = problem.net(), problem.batch(torch.cat([ids for parts in problem.parts for ids in parts]))
    outputs = run_forward(net, whole.x, None, "cpu")
    b = problem.objective(whole.y, outputs, whole.sample_weight, whole.mask, model=net)
    b.backward()
    sizes = {name: size_of(term) for name, term in b.terms.items()}
    size = sum(abs(term.weight) * sizes[name] for name, term in b.terms.items())
    return Expected(gradients(net), [], **values_of(b), sizes=sizes, size=size)


def in_window(problem, group, rank):
    """This rank's micro-batches in a window that all ranks share."""
    net = problem.net()
    before, parts = gradients(net), []
    batches = [problem.batch(ids) for ids in problem.parts[rank]]
    with problem.objective.window(batches, model=net, process_group=group) as window:
        for batch in window:
            window.backward(net(batch.x))
            after = gradients(net)
            parts.append(gap(after, before))
            before = after
    return Found(gradients(net), parts, **values_of(window.breakdown))


def size_of_penalties(problem):
    """The norm of what regularizers give, which is a part of its own."""
    net = problem.net()
    found = [penalty.tally().numerator for penalty in problem.objective.bound(net)]
    if not found:
        return 0.0
    sum(found).backward()
    return norm(gradients(net))


def expect_one_batch(problem, ranks):
    """The law: every rank has the value and the gradient of one batch in one process."""
    expected, tolerance = at_once(problem), TOLERANCE[problem.dtype]
    # The gradient of a ratio is a difference of parts of the size of the loss, and is rounded as they are.
    scale = sum(sum(found.parts) for found in ranks) + size_of_penalties(problem) + expected.size
    for found in ranks:
        assert gap(found.gradients, expected.gradients) <= tolerance * scale
        assert list(found.values) == list(expected.values)
        for name, value in found.values.items():
            assert abs(value - expected.values[name]) <= 2 * tolerance * expected.sizes[name], name
        assert abs(found.total - expected.total) <= 2 * tolerance * expected.size
        assert found.counts == expected.counts


# --- random problems -----------------------------------------------------------------------------------------------


def cut(rng, sizes):
    """Samples in random order over ranks and their micro-batches, whose sizes are given."""
    order = torch.as_tensor(rng.permutation(sum(map(sum, sizes))))
    pieces = iter(torch.split(order, [n for rank in sizes for n in rank]))
    return tuple(tuple(next(pieces) for _ in rank) for rank in sizes)


def random_sizes(rng, ranks, empty):
    """Micro-batches of one to four samples, zero to three on a rank, at least one in all; some empty."""
    low = 0 if empty else 1
    sizes = [[int(n) for n in rng.integers(low, 5, rng.integers(0, 4))] for _ in range(ranks)]
    if not sum(map(sum, sizes)):
        sizes[int(rng.integers(ranks))].append(int(rng.integers(1, 5)))
    return sizes


def random_problem(seed, rows, ranks, dtype, *, weights, masks, empty=False, hidden=False, classes=False, more=False):
    """A problem with an output for each row of the declarations.

    Args:
        seed: of everything that is drawn.
        rows: the losses, one an output.
        ranks: how many there are.
        dtype: of outputs, targets and weights.
        weights: "", "samples" or "entries"; masks alike.
        masks: see `weights`.
        empty: micro-batches may have no samples.
        hidden: one micro-batch is fully masked.
        classes: with class weights, where the loss has classes.
        more: with regularizers, auxiliary losses and loss weights.
    """
    rng = np.random.default_rng(seed)
    parts = cut(rng, random_sizes(rng, ranks, empty))
    samples = sum(len(ids) for rank in parts for ids in rank)
    losses: dict[str, Any] = {}
    y, outputs, weight, mask, class_weight = {}, {}, {}, {}, {}
    for name, row in zip("abc", rows, strict=False):
        losses[name] = row.make(reduction=str(rng.choice(accepted(row))))
        true, pred = (torch.as_tensor(v) for v in row.inputs(rng, (samples, POSITIONS)))
        y[name] = true.to(dtype) if true.is_floating_point() else true
        outputs[name] = pred.to(dtype)

        def shape(kind, row=row):
            return (samples, POSITIONS) if kind == "entries" and not row.per_sample else (samples,)

        if weights:
            drawn = rng.uniform(0.2, 3, shape(weights)) * (rng.random(shape(weights)) < 0.8)
            weight[name] = torch.as_tensor(drawn).to(dtype)
        if masks or hidden:
            mask[name] = torch.as_tensor(rng.random(shape(masks)) < (0.7 if masks else 2))
        if hidden:
            chosen = [ids for rank in parts for ids in rank if len(ids)]
            mask[name][chosen[int(rng.integers(len(chosen)))]] = False
        if classes and getattr(losses[name], "classes_are", None) in ("column", "label"):
            class_weight[name] = {0: 2.0, 2: 0.5}
    objective = ll.Objective(
        losses,
        loss_weights={"a": 0.3} | ({"size": 0.1} if more else {}),
        regularizers={"*": "l2"} if more else None,
        class_weight=class_weight or None,
    )
    return Problem(objective, outputs, y, weight, mask, parts, more)
