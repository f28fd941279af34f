"""What ranks must have in common with one process: run on every rank by test_distributed."""

from __future__ import annotations

import contextlib
import io
import itertools
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lossledger as ll
import window_laws
from lossledger.distributed import full
from lossledger.errors import CheckError, EmptyDataError, InputError, NonFiniteError, RankError

L = ll.losses
LOGITS = {"from_logits": True}
N = 23
CASES: dict[str, Any] = {}


@dataclass
class World:
    rank: int
    size: int
    solo: Any
    out: Path


def case(*variants):
    def register(fn):
        for variant in variants or [()]:
            given = variant if isinstance(variant, tuple) else (variant,)
            name = "-".join([fn.__name__, *map(str, given)])
            CASES[name] = lambda world, given=given: fn(world, *given)
        return fn

    return register


class Net(nn.Module):
    """Classes of 4 positions and two columns; a branch that only some inputs use, one that none does."""

    def __init__(self, wrapper="plain", aux=False):
        super().__init__()
        self.body = nn.Linear(3, 6)
        self.a, self.b = nn.Linear(6, 12), nn.Linear(6, 2)
        self.rare = nn.Linear(6, 2) if wrapper != "fsdp" else None
        self.never = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.aux = aux

    def forward(self, x):
        h = torch.tanh(self.body(x))
        b = self.b(h)
        if self.rare is not None and bool((x[:, 0] > 2).any()):
            b = b + torch.where(x[:, :1] > 2, self.rare(h), 0.0)
        # fully_shard warns of outputs that are views.
        found = {"a": self.a(h).reshape(-1, 4, 3).clone(), "b": b}
        if self.aux:
            ll.add_loss("kl", h.square().mean(1))
        return found


def wrapped(net, wrapper):
    if wrapper == "ddp":
        return DistributedDataParallel(net)
    if wrapper == "fsdp":
        for part in (net.body, net.a, net.b):
            fully_shard(part)
        return fully_shard(net)
    return net


def two(wrapper, seed=1, aux=False):
    """The same net twice: for the ranks, and for one process."""
    torch.manual_seed(seed)
    mine = Net(wrapper, aux).double()
    torch.manual_seed(seed)
    return wrapped(mine, wrapper), Net(wrapper, aux).double()


def data(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g).double()
    x[n // 2, 0] = 3.0  # the rare branch, on one rank
    y = {
        "a": torch.randint(0, 3, (n, 4), generator=g),
        "b": (torch.rand(n, 2, generator=g) < 0.4).double(),
    }
    weight = {"a": torch.rand(n, 4, generator=g).double(), "b": torch.rand(n, generator=g).double()}
    mask = {"a": torch.rand(n, 4, generator=g) < 0.6, "b": torch.rand(n, generator=g) < 0.8}
    return x, y, weight, mask


def bare(net):
    return net.module if isinstance(net, DistributedDataParallel) else net


def expect_gradients(net, other, tolerance=1e-12):
    scale = max(float(p.grad.abs().max()) for p in other.parameters() if p.grad is not None)
    for (name, p), q in zip(bare(net).named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            np.testing.assert_allclose(full(p.grad), q.grad, rtol=tolerance, atol=tolerance * scale, err_msg=name)


def expect_weights(net, other, tolerance=1e-12):
    for (name, p), q in zip(bare(net).named_parameters(), other.parameters(), strict=True):
        np.testing.assert_allclose(full(p.detach()), q.detach(), rtol=tolerance, atol=tolerance, err_msg=name)


LOSSES = {
    "several": lambda: {
        "a": L.SparseCategoricalCrossentropy(ignore_class=1, **LOGITS),
        "b": 2 * L.BinaryCrossentropy(**LOGITS) + L.Dice(axis=0, from_logits="sigmoid"),
    },
    "linear": lambda: {
        "a": L.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight", **LOGITS),
        "b": L.MeanSquaredError(reduction="sum_over_nonzero_weights"),
    },
}
# Micro-batches of each rank, as sizes; the rest of the samples go to the last rank that has some.
SPLITS = {
    "one": lambda r: [[3], [11], [9]][r],
    "several": lambda r: [[2, 5], [1], [4, 3, 8]][r],
    "idle": lambda r: [[7, 2], [], [14]][r],
    "alone": lambda r: [[], [4, 1, 18], []][r],
}


def share(world, split):
    sizes = [list(SPLITS[split](r)) for r in range(3)]
    if world.size == 2:
        sizes = [sizes[0], sizes[1] + sizes[2]]
    start = sum(map(sum, sizes[: world.rank]))
    stops = [start, *(start + s for s in itertools.accumulate(sizes[world.rank]))]
    return list(itertools.pairwise(stops))


def cut(value, a, b):
    return {k: v[a:b] for k, v in value.items()}


def batch(all_, a, b):
    x, y, weight, mask = all_
    return ll.Batch(x[a:b], cut(y, a, b), cut(weight, a, b), cut(mask, a, b))


@case(*itertools.product(["plain", "ddp", "fsdp"], LOSSES, SPLITS))
def step(world, wrapper, loss, split):
    """One window: value, terms, groups and gradient of one process."""
    all_ = data()
    net, other = two(wrapper, aux=True)
    objective = ll.Objective(
        LOSSES[loss](),
        loss_weights={"a": 0.3, "kl": 0.1},
        regularizers={"*.weight": "l2"},
        class_weight={"a": {0: 2.0}},
    )
    spans = share(world, split)
    mine = [batch(all_, a, b) for a, b in spans]
    expected = objective.step([batch(all_, 0, N)], other, process_group=world.solo)
    found = objective.step(mine, net)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12)
    assert set(found.terms) == set(expected.terms)
    for name, term in expected.terms.items():
        np.testing.assert_allclose(found.terms[name].value, term.value, rtol=1e-12, err_msg=name)
        if term.tally.groups is not None:
            theirs = found.terms[name].by("class")
            for key, value in term.by("class").items():
                np.testing.assert_allclose(theirs[key], value, rtol=1e-11, atol=1e-14, err_msg=f"{name} {key}")
    expect_gradients(net, other)
    # Gradients add up, as backward adds.
    objective.step([batch(all_, 0, N)], other, process_group=world.solo)
    objective.step(mine, net)
    expect_gradients(net, other)


@case("plain", "ddp", "fsdp")
def open_window(world, wrapper):
    """The caller calls the wrapper itself, which must neither average nor wait."""
    x, y = pairs()
    torch.manual_seed(2)
    net, other = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2))
    other.load_state_dict(net.state_dict())
    if wrapper == "ddp":
        net.register_buffer("held", torch.zeros(()))
        net = DistributedDataParallel(net)
    elif wrapper == "fsdp":
        fully_shard(net)
    objective = ll.Objective(L.BinaryCrossentropy(**LOGITS) + L.Dice(from_logits="sigmoid"))
    expected = objective.step([(x, y)], other, process_group=world.solo)
    with objective.window([(x[a:b], y[a:b]) for a, b in share(world, "idle")], net) as window:
        for one in window:
            window.backward(net(one.x))
    np.testing.assert_allclose(window.breakdown.value, expected.value, rtol=1e-12)
    expect_gradients(net, other)


class Synchronized(nn.SyncBatchNorm):
    """What torch's does on GPUs alone: sums over the ranks in train mode, in the forward and in the backward."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        sums = torch.cat([x.sum(0), x.square().sum(0), x.new_full((1,), len(x))])
        *sums, count = torch.distributed.nn.functional.all_reduce(sums).split([self.num_features] * 2 + [1])
        mean = sums[0] / count
        variance = sums[1] / count - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


@case()
def batch_norm_over_ranks_without_data(world):
    """A rank without data takes part in the statistics of the others with no sample: nobody waits, all are alike."""
    x, y = pairs()
    torch.manual_seed(2)
    net, other = (
        nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 2)).double()
        for norm in (Synchronized, nn.BatchNorm1d)
    )
    other.load_state_dict(net.state_dict())
    batches = [(x[:9], y[:9]), (x[9:], y[9:])]
    for loss in (L.BinaryCrossentropy(**LOGITS), L.Dice(from_logits="sigmoid")):
        objective = ll.Objective(loss)
        expected = objective.step(batches, other, process_group=world.solo)
        found = objective.step(batches if world.rank == world.size - 1 else [], net)
        np.testing.assert_allclose(found.value, expected.value, rtol=1e-10)
        expect_gradients(net, other, 1e-9)
        for mine, theirs in zip(net.buffers(), other.buffers(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-10)


@case()
def step_by_sample(world):
    """Rows by sample are numbered over the ranks."""
    x, y, _, _ = data()
    net, other = two("plain")
    objective = ll.Objective({"a": None, "b": L.BinaryCrossentropy(**LOGITS)})
    y = {"b": y["b"]}
    expected = objective.step([(x, y)], other, by="sample", process_group=world.solo)
    found = objective.step([(x[a:b], cut(y, a, b)) for a, b in share(world, "several")], net, by="sample")
    name = next(iter(expected.terms))
    mine, theirs = found.terms[name].by("sample"), expected.terms[name].by("sample")
    assert list(mine) == list(theirs)
    np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-12)


OPTIONS = {
    "uneven": {
        "groups": {"site": [("north", "south", "east")[i % 5 % 3] for i in range(N)], "length": np.arange(N) // 9}
    },
    "idle": {"batch_size": 11, "accumulate": 1, "ledger_steps": 1},
    "accumulate": {"batch_size": 2, "accumulate": 3, "ledger_steps": 3},
    "tiny": {"batch_size": 1, "spread": True, "ledger_steps": 5},
    "adam": {"optimizer": "adam"},
    "clip": {"clip_norm": 0.05, "ema": 0.7},
    "record": {"on_nonfinite": "record", "validation_split": 0.3},
    "steps": {"steps_per_epoch": 2},
}
COMPILE = ("optimizer", "clip_norm", "ema", "on_nonfinite")


def trained(net, group, options, aux=False, **more):
    options = {"batch_size": 7, "epochs": 2, "seed": 5, "verbose": 0, **options, **more}
    x, y, weight, mask = data()
    model = ll.Model(net, process_group=group)
    compiling = {name: options.pop(name) for name in COMPILE if name in options}
    model.compile(
        **{"optimizer": "sgd", **compiling},
        loss=LOSSES["several"](),
        loss_weights={"a": 0.3, "kl": 0.1} if aux else {"a": 0.3},
        regularizers={"*.weight": "l2"},
        metrics={"a": ["accuracy"], "b": ["binary_accuracy"]},
        weighted_metrics={"b": ["mse"]},
    )
    if "validation_split" not in options:
        options["validation_data"] = (x[:9], cut(y, 0, 9), cut(weight, 0, 9))
    history = model.fit(x, y, sample_weight=weight, mask=mask, class_weight={"a": {0: 2.0}}, **options)
    return model, history


def expect_history(found, expected, tolerance=1e-11):
    assert list(found.history) == list(expected.history)
    for name, values in expected.history.items():
        np.testing.assert_allclose(found.history[name], values, rtol=tolerance, err_msg=name)
    mine, theirs = found.ledger.rows, expected.ledger.rows
    assert len(mine) == len(theirs)
    for row, other in zip(mine, theirs, strict=True):
        for name in row.__dataclass_fields__:
            a, b = getattr(row, name), getattr(other, name)
            if isinstance(b, float):
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-13, err_msg=f"{row} {name}")
            else:
                assert a == b, (row, other)
    assert len(found.ledger.metrics) == len(expected.ledger.metrics)


class Hidden(nn.Module):
    """What goes into its head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 7)

    def forward(self, x):
        return torch.tanh(self.body(x))


@case("plain", "ddp")
def head_in_the_loss(world, wrapper):
    """The gradient of a head that only the loss calls is summed over the ranks too."""
    x = torch.randn(N, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.randint(7, (N, 2), generator=torch.Generator().manual_seed(2))
    y[3:9, 0] = -1
    fits = []
    for group in (None, world.solo):
        net = Hidden().double()
        wrapped = DistributedDataParallel(net) if group is None and wrapper == "ddp" else net
        model = ll.Model(wrapped, process_group=group)
        model.compile("sgd", L.LinearCrossentropy(net.head, ignore_class=-1))
        history = model.fit(x, y, batch_size=7, epochs=2, accumulate=2, seed=5, verbose=0)
        fits.append((net, history))
    expect_weights(fits[0][0], fits[1][0], 1e-12)
    expect_history(fits[0][1], fits[1][1])


@case("plain", "ddp")
def parameters_in_the_loss(world, wrapper):
    """Parameters that a loss reads beside the output get the sum of the gradients of all ranks, once."""
    x, y = pairs()
    fits = []
    for group in (None, world.solo):
        torch.manual_seed(0)
        net = nn.Linear(x.shape[1], y.shape[1]).double()
        net.spread = nn.Parameter(torch.full((y.shape[1],), 0.3, dtype=torch.float64))

        def likelihood(y_true, y_pred, net=net):
            wide = (y_true - y_pred).square() * torch.exp(-net.spread) + net.spread
            return wide.mean(-1) + 0.1 * net.weight.square().sum()

        wrapped = DistributedDataParallel(net) if group is None and wrapper == "ddp" else net
        model = ll.Model(wrapped, process_group=group)
        model.compile("sgd", likelihood)
        history = model.fit(x, y, batch_size=5, epochs=2, accumulate=2, seed=5, verbose=0)
        fits.append((net, history))
    assert not torch.equal(fits[0][0].spread, torch.full_like(fits[0][0].spread, 0.3))
    expect_weights(fits[0][0], fits[1][0], 1e-12)
    expect_history(fits[0][1], fits[1][1])


@case(*itertools.product(["plain", "ddp", "fsdp"], OPTIONS))
def fit(world, wrapper, option):
    """Weights, history and ledger of one process, with uneven shares, weights, masks, Dice over the batch."""
    aux = wrapper != "fsdp"
    net, other = two(wrapper, aux=aux)
    # The root of the variance in Adam turns rounding of tiny gradients into steps.
    tolerance = 1e-8 if option == "adam" else 1e-12
    expected = trained(other, world.solo, OPTIONS[option], aux)
    found = trained(net, None, OPTIONS[option], aux)
    expect_weights(net, other, tolerance)
    expect_history(found[1], expected[1], max(tolerance, 1e-11))
    x, y, weight, mask = data()
    for size in (4, 23, 1):
        options = {"batch_size": size, "sample_weight": weight, "mask": mask, "verbose": 0, "return_dict": True}
        mine, theirs = (model.evaluate(x, y, **options) for model in (found[0], expected[0]))
        assert list(mine) == list(theirs)
        np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=max(tolerance * 10, 1e-11))
    mine, theirs = found[0].predict(x, batch_size=5), expected[0].predict(x, batch_size=5)
    for name in theirs:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=tolerance * 10, atol=tolerance * 10)


def simple(net=None, loss="mse", group=None, **options):
    torch.manual_seed(1)
    model = ll.Model(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() if net is None else net, process_group=group
    )
    model.compile("sgd", loss, **options)
    return model


def pairs(n=N):
    x, y, _, _ = data(n)
    return x, y["b"]


@case("plain", "fsdp")
def loaders_of_other_lengths(world, wrapper):
    """Each rank has a loader of its own; those that end early wait for nobody, and nobody waits for them."""
    x, y = pairs()
    loss = L.BinaryCrossentropy(**LOGITS) + L.Dice(from_logits="sigmoid")
    count = 2 + 3 * world.rank
    spans = [(world.rank * 7 + 2 * i) % (N - 4) for i in range(count)]
    mine = [(x[a : a + 1 + i % 3], y[a : a + 1 + i % 3]) for i, a in enumerate(spans)]
    everything = [None] * world.size
    dist.all_gather_object(everything, mine)
    model, one = simple(loss=loss), simple(loss=loss, group=world.solo)
    if wrapper == "fsdp":
        fully_shard(model.net)
        model.compile("sgd", loss)
    # One process takes the windows as they were: in turn, two batches of each rank.
    windows = []
    for start in range(0, max(map(len, everything)), 2):
        parts = [b for batches in everything for b in batches[start : start + 2]]
        windows.append(tuple(torch.cat([p[i] for p in parts]) for i in range(2)))
    found = model.fit(mine, epochs=2, accumulate=2, verbose=0, validation_data=mine)
    expected = one.fit(windows, epochs=2, verbose=0, validation_data=[b for part in everything for b in part])
    expect_weights(model.net, one.net)
    expect_history(found, expected)


@case()
def groups_of_other_names(world):
    """Each rank has samples of its own site and of one that all have; rows are by name, and add up."""
    x, y = pairs()
    loss = L.BinaryCrossentropy(**LOGITS) + L.Dice(axis=(0,), from_logits="sigmoid")
    names = [f"site {world.rank}", "everywhere", f"site {world.rank}"]
    mine = [ll.Batch(x[a : a + 3], y[a : a + 3], groups={"site": names}) for a in range(0, 3 + 3 * world.rank, 3)]
    everything = [None] * world.size
    dist.all_gather_object(everything, mine)
    model, one = simple(loss=loss), simple(loss=loss, group=world.solo)
    model.evaluate(mine, verbose=0)
    one.evaluate([batch for part in everything for batch in part], verbose=0)
    found = {(row["term"], row["site"]): row for row in model.ledger.table(["term", "site"])}
    expected = {(row["term"], row["site"]): row for row in one.ledger.table(["term", "site"])}
    assert set(found) == set(expected)
    for key, row in expected.items():
        for name in ("total", "count", "weight", "contribution"):
            np.testing.assert_allclose(found[key][name], row[name], rtol=1e-11, err_msg=f"{key} {name}")
    assert not model.ledger.balance()


@case()
def groups_of_steps(world):
    """Rows of steps of named groups, of arrays that the ranks share."""
    x, y = pairs()
    loss = L.BinaryCrossentropy(**LOGITS) + L.Dice(axis=(0,), from_logits="sigmoid")
    options = {"batch_size": 4, "epochs": 2, "seed": 3, "verbose": 0, "ledger_steps": 2}
    options |= {"groups": {"site": [f"site {i % 3}" for i in range(N)]}}
    tables = []
    for group in ({}, {"group": world.solo}):
        ledger = simple(loss=loss, **group).fit(x, y, **options).ledger
        assert not ledger.balance()
        tables.append(ledger.table(["epoch", "step", "term", "site"]).rows)
    assert [row["step"] for row in tables[0]] == [row["step"] for row in tables[1]] and len(tables[0]) > 12
    key = operator.itemgetter("epoch", "step", "term", "site")
    for found, expected in zip(*(sorted(table, key=key) for table in tables), strict=True):
        assert key(found) == key(expected)
        for name in ("total", "count", "contribution"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, err_msg=f"{key(found)} {name}")


@case()
def counts_of_what_is_masked(world):
    """Counted and masked elements of all ranks are those of one process, in training and evaluation."""
    x, y = pairs()
    mask = torch.rand(N, generator=torch.Generator().manual_seed(5)) < 0.6
    loss = L.BinaryCrossentropy(**LOGITS) + L.Dice(axis=(0,), from_logits="sigmoid")
    options = {"batch_size": 5, "accumulate": 2, "epochs": 2, "seed": 3, "verbose": 0, "validation_split": 0.3}
    model, one = simple(loss=loss), simple(loss=loss, group=world.solo)
    for run in ("fit", "evaluate"):
        for made in (model, one):
            made.fit(x, y, mask=mask, **options) if run == "fit" else made.evaluate(x, y, mask=mask, verbose=0)
        found, expected = ([(r.term, r.count, r.masked) for r in made.ledger.rows] for made in (model, one))
        assert found == expected and any(masked for *_, masked in found)


@case("folder", "memory")
def slices_of_samples(world, where):
    """The groups of the samples of all ranks, in a run folder and in memory."""
    x, y = pairs()
    groups = {"site": np.arange(N) % 3, "length": [str(i // 12) for i in range(N)]}
    options = {"batch_size": 5, "epochs": 2, "seed": 1, "verbose": 0, "samples": True, "groups": groups}
    folder = {"run_dir": world.out / "sliced"} if where == "folder" else {}
    ledger = simple().fit(x, y, **options, **folder).ledger
    expected = simple(group=world.solo).fit(x, y, **options).ledger.worst_slices(99, minimum_count=2)
    dist.barrier()
    opened = ll.Ledger.open(world.out / "sliced") if folder else ledger
    found = opened.worst_slices(99, minimum_count=2)
    assert found.tested == expected.tested == 5 + 6
    sizes = {str(row): (row.count, round(row.mean, 9)) for row in found}
    assert sizes == {str(row): (row.count, round(row.mean, 9)) for row in expected}
    assert len(opened._groups().columns()["sample"].values) == 2 * N


@case("memory", "folder")
def samples_of_all_ranks(world, where):
    """Each rank keeps the samples that it has seen, a segment each in the folder; together they are all, once."""
    x, y = pairs()
    options = {"batch_size": 5, "epochs": 2, "seed": 3, "verbose": 0, "samples": True, "validation_split": 0.3}
    folder = {"run_dir": world.out / "sampled"} if where == "folder" else {}
    found = simple().fit(x, y, **options, **folder).ledger
    expected = simple(group=world.solo).fit(x, y, **options).ledger
    dist.barrier()
    if folder:
        segments = list((world.out / "sampled" / "samples").iterdir())
        assert len(segments) == 2 * world.size
        found = ll.Ledger.open(world.out / "sampled")
    for split in ("training", "validation"):
        for epoch in (1, 2):
            one, all_ = (ledger.samples.where(split=split, epoch=epoch) for ledger in (expected, found))
            order = np.argsort(all_["sample"])
            assert all_["sample"][order].tolist() == one["sample"].tolist()
            for name in ("mean", "total", "count", "contribution"):
                assert np.allclose(all_[name][order], one[name], rtol=1e-9, atol=1e-15), name
    model = simple()
    model.evaluate(x, y, batch_size=4, samples=True, verbose=0)
    assert sorted(model.ledger.samples["sample"].tolist()) == list(range(N))
    with pytest.raises(InputError, match="expected batches with ids"):
        model.evaluate([(x, y)], samples=True, verbose=0)


@case()
def nobody_has_data(world):
    model = simple()
    with pytest.raises(EmptyDataError):
        model.fit((b for b in ()), verbose=0)
    with pytest.raises(EmptyDataError):
        simple().evaluate((b for b in ()), verbose=0)
    with pytest.raises(EmptyDataError):
        model.objective.step([], model.net)


@case("raise", "skip")
def not_finite(world, policy):
    """A bad sample of one rank: all leave the step out, or stop with its number."""
    x, y = pairs()
    x[21] = torch.nan
    weight = torch.ones(N).double()
    model, one = simple(on_nonfinite=policy), simple(group=world.solo, on_nonfinite=policy)
    options = {"batch_size": 6, "epochs": 2, "seed": 3, "verbose": 0, "sample_weight": weight}
    if policy == "raise":
        with pytest.raises(NonFiniteError, match="data set indices 21"):
            one.fit(x, y, **options)
        with pytest.raises(NonFiniteError, match="data set indices 21"):
            model.fit(x, y, **options)
    else:
        expect_history(model.fit(x, y, **options), one.fit(x, y, **options))
    expect_weights(model.net, one.net)


@case()
def the_record_of_a_bad_sample_names_its_rank(world):
    """The first NaN is traced by the rank that has the sample; all ranks keep the same record, rank 0 writes it."""
    x, y = pairs()
    y[N - 1, 1] = torch.inf
    folder = world.out / "nonfinite"
    model = simple(class_names=["left", "right"])
    with pytest.raises(NonFiniteError) as caught:
        # The last sample of an unshuffled batch of all is in the share of the last rank.
        model.fit(x, y, batch_size=N, seed=3, verbose=0, shuffle=False, run_dir=folder)
    last = world.size - 1
    assert str(caught.value).startswith(f"rank {last}: ") is (world.rank != last)
    records = [None] * world.size
    dist.all_gather_object(records, model.ledger.info["nonfinite"])
    dist.barrier()
    for record in (*records, ll.Ledger.open(folder).info["nonfinite"]):
        assert (record["step"], record["rank"], record["samples"]) == (1, last, [N - 1])
        assert (record["classes"], record["already_bad"]) == (["right"], ["y"])


@case("warn", "error", "off")
def checks_find_what_one_rank_sees(world, policy):
    """A fault in the part of the last rank: found once, recorded and printed by rank 0; no rank waits for another."""
    size = 16 * world.size
    x, y = (torch.randn(size, width, generator=torch.Generator().manual_seed(width)).double() for width in (3, 2))
    weight = torch.ones(size).double()
    # Weights that scale the loss, in the share of the last rank.
    weight[-16:] = torch.arange(16) + 50.0
    said = io.StringIO()
    options = {"batch_size": size, "epochs": 3, "shuffle": False, "sample_weight": weight, "verbose": 2, "seed": 0}
    model = simple()
    with contextlib.redirect_stdout(said):
        if policy == "error":
            # The rank that found it says what, and takes the others with it.
            with pytest.raises(CheckError if world.rank == world.size - 1 else RankError, match="W3"):
                model.fit(x, y, checks=policy, **options)
            return
        history = model.fit(x, y, checks=policy, **options)
    found = [(f["code"], f["data"].get("rank")) for f in history.ledger.info.get("findings", ())]
    lines = [line for line in said.getvalue().splitlines() if line.startswith("W3 warning")]
    last = world.size - 1
    assert found == ([] if policy == "off" else [("W3", None if world.rank == last else last)])
    assert len(lines) == (1 if policy == "warn" and world.rank == 0 else 0)


@case()
def the_gap_is_that_of_one_process(world):
    """Train and validation loss in parts, measured by each rank on its own batches."""
    x, y = pairs()
    weight = torch.linspace(0, 2, N).double()
    found = []
    for group in (None, world.solo):
        gap = ll.callbacks.Gap(batches=99)
        model = simple(group=group, regularizers={"*weight": "l2"})
        options = {"batch_size": 5, "epochs": 2, "seed": 3, "verbose": 0, "checks": "off"}
        model.fit(x, y, sample_weight=weight, validation_data=(x[:4], y[:4]), callbacks=gap, **options)
        assert len(gap.found) == 2
        found.append(gap.found)
    for mine, one in zip(*found, strict=True):
        np.testing.assert_allclose([mine.loss, mine.val_loss], [one.loss, one.val_loss], rtol=1e-11)
        for part, other in zip(mine.parts, one.parts, strict=True):
            np.testing.assert_allclose((part.value, part.error), (other.value, other.error), atol=1e-12)
        assert all(mine[name].value for name in ("weights moved", "regularizers", "counting", "data"))


@case()
def weights_of_rank_0_are_the_start(world):
    """Ranks that begin elsewhere, as with other seeds, train one model; unseeded orders are one order."""
    x, y = pairs()
    torch.manual_seed(100 + world.rank)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    net.register_buffer("where", torch.tensor(float(world.rank)))
    model = ll.Model(net)
    model.compile("adam", "mse")
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    everyone = [None] * world.size
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    dist.all_gather_object(everyone, (state, history.history, history.params))
    for other, numbers, params in everyone:
        assert numbers == history.history
        assert params == history.params
        for name, value in other.items():
            np.testing.assert_array_equal(value, state[name])


@case()
def dropout_differs_by_rank(world):
    """Even where a script seeds all ranks alike."""
    masks = []

    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(3, 2).double()

        def forward(self, x):
            if self.training:
                masks.append(torch.rand(4).tolist())
            return self.line(x)

    torch.manual_seed(0)
    simple(Drop()).fit(*pairs(), verbose=0, seed=0)
    everyone = [None] * world.size
    dist.all_gather_object(everyone, masks[0])
    assert len({tuple(m) for m in everyone}) == world.size


@case()
def files_are_written_once(world):
    """Callbacks run on all ranks with the same numbers; rank 0 writes the files, the ledger among them."""
    folder = world.out / "files"
    seen = []
    model, one = simple(), simple(group=world.solo)
    calls = ll.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    history = (
        model.fit(
            *pairs(),
            epochs=3,
            verbose=0,
            seed=0,
            run_dir=folder / "run",
            callbacks=[
                calls,
                ll.callbacks.CSVLogger(folder / "log.csv"),
                ll.callbacks.ModelCheckpoint(folder / "w{epoch}.safetensors"),
                ll.callbacks.EarlyStopping("loss", patience=9),
            ],
        )
        if (folder.mkdir(exist_ok=True), dist.barrier())[1] is None
        else None
    )
    one.fit(*pairs(), epochs=3, verbose=0, seed=0)
    assert [log["loss"] for log in seen] == history.history["loss"]
    dist.barrier()
    book = ll.Ledger.open(folder / "run")
    assert book.rows == history.ledger.rows
    assert len(list((folder / "run" / "ledger").glob("*.parquet"))) == 3
    assert len((folder / "log.csv").read_text().splitlines()) == 4
    fresh = simple()
    fresh.load_weights(folder / "w3.safetensors")
    expect_weights(fresh.net, one.net)


@case()
def one_rank_may_end_the_training(world):
    class Stop(ll.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            self.model.stop_training = world.rank == 1 and epoch == 1

    history = simple().fit(*pairs(), epochs=5, verbose=0, callbacks=[Stop()])
    assert history.epoch == [0, 1]


@case("plain", "fsdp")
def single_batches_and_weights(world, wrapper):
    x, y = pairs()
    model, one = simple(metrics=["mae"]), simple(group=world.solo, metrics=["mae"])
    if wrapper == "fsdp":
        fully_shard(model.net)
        model.compile("sgd", "mse", metrics=["mae"])
    for n in (5, 1, 23):
        np.testing.assert_allclose(model.train_on_batch(x[:n], y[:n]), one.train_on_batch(x[:n], y[:n]), rtol=1e-12)
        np.testing.assert_allclose(model.test_on_batch(x[:n], y[:n]), one.test_on_batch(x[:n], y[:n]), rtol=1e-12)
    expect_weights(model.net, one.net)
    path = world.out / f"{wrapper}.safetensors"
    model.save_weights(path)
    other = simple(group=world.solo)
    other.load_weights(path)
    expect_weights(other.net, one.net)
    model.fit(x, y, verbose=0)
    model.load_weights(path)
    expect_weights(model.net, one.net)


@case()
def torchmetrics_over_ranks(world):
    torchmetrics = pytest.importorskip("torchmetrics")
    x, y = pairs()
    found = []
    for group in (None, world.solo):
        model = simple(group=group, metrics=[torchmetrics.MeanAbsoluteError()])
        if group is not None:
            # torchmetrics asks the default group unless it is told another.
            model = simple(group=group, metrics=[torchmetrics.MeanAbsoluteError(process_group=group)])
        found.append(model.fit(x, y, batch_size=world.size * 4 - 3, epochs=2, seed=0, verbose=0).history)
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-6, err_msg=name)


@case()
def refused(world):
    x, y = pairs()
    labels = torch.arange(N) % 3
    with pytest.raises(InputError, match="compares the samples"):
        simple(loss=L.SupervisedContrastive()).fit(x, labels, verbose=0)
    with pytest.raises(InputError, match="compares the samples"):
        simple(loss=L.SupervisedContrastive()).evaluate(x, labels, verbose=0)
    with pytest.raises(InputError, match="declared scalar"):
        simple(loss=lambda a, b: (a - b).square().mean()).fit(x, y, verbose=0)
    with pytest.raises((InputError, RankError), match="the same arrays on every rank"):
        simple().fit(x[world.rank :], y[world.rank :], verbose=0)
    with pytest.raises(ll.errors.InputTypeError, match="process_group"):
        ll.Model(nn.Linear(1, 1), process_group=3).fit(x, y)


@case("arrays", "targets", "weights", "validation", "batch_size", "steps_per_epoch", "epochs", "shuffle", "none")
def ranks_that_were_given_something_else_are_refused(world, what):
    """Shares of equal length, by hand, would train on a part of the data; other sizes on some of it twice."""
    (x, y), later = pairs(), world.rank > 0
    batches, given = [(x, y)], {"x": x, "y": y, "verbose": 0}
    given |= {
        "arrays": {"x": x.roll(int(later), 0)},
        "targets": {"y": y.roll(int(later), 0)},
        "weights": {"sample_weight": torch.arange(1.0, N + 1).roll(int(later))},
        "validation": {"validation_data": (x.roll(int(later), 0), y)},
        "batch_size": {"batch_size": 4 + later},
        "steps_per_epoch": {"batch_size": 4, "steps_per_epoch": 1 + later},
        "epochs": {"x": batches, "y": None, "epochs": 1 + later},
        "shuffle": {"shuffle": later},
        "none": {"validation_data": None if later else batches},
    }[what]
    named = {"arrays": "x", "targets": "x", "weights": "x", "validation": "validation data", "none": "validation data"}
    model = simple()
    with pytest.raises((InputError, RankError), match=f"{named.get(what, what)}: expected the same"):
        model.fit(**given)
    if what in ("arrays", "targets", "weights"):
        with pytest.raises((InputError, RankError), match="x: expected the same arrays on every rank"):
            model.evaluate(**given)


@case()
def arrays_that_differ_by_rounding_are_the_same(world):
    x, y = pairs()
    x = x * (1 + 1e-7 * world.rank)
    x[0, 0], x[-1, 1] = float("nan"), float("inf")
    simple(on_nonfinite="skip").fit(x, y, sample_weight=torch.ones(N, dtype=torch.bool), verbose=0)


@case()
def batch_normalization_warns(world):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    model = ll.Model(net)
    model.compile("sgd", "mse")
    if world.rank == 0:
        with pytest.warns(UserWarning, match="SyncBatchNorm"):
            model.fit(*pairs(), batch_size=12, steps_per_epoch=1, verbose=0)
    else:
        model.fit(*pairs(), batch_size=12, steps_per_epoch=1, verbose=0)
    everyone = [None] * world.size
    dist.all_gather_object(everyone, net[1].running_mean.tolist())
    assert all(found == everyone[0] for found in everyone)


@case("loader", "model")
def a_rank_that_fails_ends_all(world, where):
    """The error is on its rank, its text on the others, at once; then a new fit works."""
    x, y = pairs()
    last = world.size - 1

    def batches():
        for i in range(4):
            if where == "loader" and world.rank == last and i == 2:
                raise ValueError("the disk is full")
            yield x[i : i + 3], y[i : i + 3]

    class Fragile(nn.Linear):
        calls = 0

        def forward(self, x):
            Fragile.calls += 1
            if where == "model" and world.rank == last and Fragile.calls == 3:
                raise ValueError("the disk is full")
            return super().forward(x)

    model = simple(Fragile(3, 2).double(), loss=L.Dice(from_logits="sigmoid"))
    with pytest.raises(ValueError if world.rank == last else RankError, match="the disk is full"):
        model.fit(batches(), verbose=0)
    again, one = simple(), simple(group=world.solo)
    again.fit(x, y, seed=0, verbose=0)
    one.fit(x, y, seed=0, verbose=0)
    expect_weights(again.net, one.net)


@case("all", "part")
def refusals_follow_each_other(world, which):
    """A rank that leaves at once does not cut off those that are still connecting; a part of the ranks may return."""
    x, y = pairs()
    group = None if which == "all" else dist.new_group([0, 1])
    if which == "part" and world.rank > 1:
        return
    for _ in range(40):
        with pytest.raises(InputError, match="compares the samples"):
            simple(loss=L.SupervisedContrastive(), group=group).fit(x, torch.arange(N) % 3, verbose=0)
    model, one = simple(group=group), simple(group=world.solo)
    model.fit(x, y, seed=0, verbose=0)
    one.fit(x, y, seed=0, verbose=0)
    expect_weights(model.net, one.net)


@case(0, 1)
def laws_of_windows(world, start):
    """Forty random objectives, cut at random, are those of one batch; thousands more run in test_window_laws."""
    for seed in range(start, 80, 2):
        rng = np.random.default_rng(seed)
        rows = [window_laws.ADDITIVE[i] for i in rng.integers(0, len(window_laws.ADDITIVE), rng.integers(1, 4))]
        kinds = ["", "samples", "entries"]
        empty, hidden, classes, more = (bool(flag) for flag in rng.random(4) < 0.5)
        problem = window_laws.random_problem(
            seed,
            rows,
            world.size,
            torch.float64 if seed % 4 < 2 else torch.float32,
            weights=str(rng.choice(kinds)),
            masks=str(rng.choice(kinds)),
            empty=empty,
            hidden=hidden,
            classes=classes,
            more=more,
        )
        mine = window_laws.in_window(problem, None, world.rank)
        everyone = [None] * world.size
        dist.all_gather_object(everyone, mine)
        window_laws.expect_one_batch(problem, everyone)
