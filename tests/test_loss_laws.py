"""The laws of DESIGN, over every loss × reduction × weights × masks × unequal parts, with value and gradient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lossledger as ll
import oracles
from checks import as_tensor, case, close, value_and_gradient
from declarations import MATRIX, NAMES, REDUCTIONS, ROWS

TOLERANCE = 1e-12
rows = st.sampled_from(ROWS)
reductions = st.sampled_from(REDUCTIONS)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_value_is_that_of_the_oracle(row, reduction, weights, masks):
    y, p, w, m = case(row, 7, weights=weights, masks=masks, zeros=True)
    loss = row.make(reduction=reduction)
    expected = oracles.reduce_entries(
        row.elements(y, p), reduction, None if w is None else w[..., None], None if m is None else m[..., None]
    )
    got = loss(torch.as_tensor(y), torch.as_tensor(p), as_tensor(w), as_tensor(m))
    assert abs(float(got) - expected) <= 1e-9 * max(1, abs(expected))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_no_reduction_keeps_one_value_an_entry(row):
    y, p, w, m = case(row, 3)
    got = row.make(reduction="none")(torch.as_tensor(y), torch.as_tensor(p), as_tensor(w), as_tensor(m))
    expected = row.elements(y, p).mean(-1) * w * m
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


@given(rows, reductions, seeds, st.booleans(), st.booleans())
def test_unequal_parts_add_up_to_the_whole(row, reduction, seed, weights, masks):
    """Any partition into unequal parts: one value, one gradient; an empty part is neutral."""
    y, p, w, m = case(row, seed, weights=weights, masks=masks)
    loss = row.make(reduction=reduction)
    whole, gradient = value_and_gradient(loss, y, p, w, m)
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.integers(0, len(p) + 1, int(rng.integers(1, 4)))), len(p)]
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def part(s):
        return tuple(None if a is None else a[s] for a in (y, p, w, m))

    tallies = [loss.tally(*(as_tensor(a) for a in part(s))) for s in parts if s.stop > s.start]
    total = sum(tallies)
    assert close(total.value, whole.value.detach())
    window = ll.Tally.zero() + total
    pieces = []
    for s in parts:
        if s.stop > s.start:
            yy, pp, ww, mm = part(s)
            _, piece = loss.backprop(as_tensor(yy), as_tensor(pp), as_tensor(ww), as_tensor(mm), window=window)
            pieces.append(piece)
    split = torch.cat(pieces)
    assert float((split - gradient).norm()) <= TOLERANCE * sum(float(g.norm()) for g in pieces) + 1e-14


@given(rows, reductions, seeds)
def test_closed_form_gradient_is_that_of_autograd(row, reduction, seed):
    y, p, w, m = case(row, seed)
    loss = row.make(reduction=reduction)
    whole, gradient = value_and_gradient(loss, y, p, w, m)
    tally, closed = loss.backprop(as_tensor(y), as_tensor(p), as_tensor(w), as_tensor(m))
    assert close(closed, gradient)
    assert close(tally.value, whole.value.detach())
    assert not tally.numerator.requires_grad


@given(rows, reductions, seeds)
def test_order_of_samples_does_not_matter(row, reduction, seed):
    y, p, w, m = case(row, seed)
    loss = row.make(reduction=reduction)
    order = np.random.default_rng(seed).permutation(len(p))
    a = loss.tally(*map(as_tensor, (y, p, w, m))).value
    b = loss.tally(*map(as_tensor, (y[order], p[order], w[order], m[order]))).value
    assert close(a, b)


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.name)
@pytest.mark.parametrize("seed", [1, 2])
def test_counted_and_masked_elements_are_all_that_were_shown(row, seed):
    y, p, w, m = case(row, seed, weights=seed == 1, zeros=True)
    loss = row.make()
    plain, tally = loss.tally(*map(as_tensor, (y, p, w))), loss.tally(*map(as_tensor, (y, p, w, m)))
    assert tally.shown == plain.shown
    assert tally.masked + tally.count == tally.shown
    # What a loss leaves out by itself, as anchors without partners, a mask leaves out too.
    assert tally.masked >= plain.masked >= 0
    if row in ROWS:
        each = plain.shown // m.size
        assert (plain.masked, tally.masked) == (0, each * int((~m).sum()))
    cut = int(np.random.default_rng(seed).integers(1, len(p))) if loss.additive else 0
    parts = [
        loss.tally(*(as_tensor(a if a is None else a[s]) for a in (y, p, w, m)))
        for s in (slice(cut), slice(cut, None))
        if cut
    ]
    assert not parts or (sum(parts).shown, int(sum(parts).masked)) == (tally.shown, int(tally.masked))
    if loss.additive:
        exact = loss.tally(*map(as_tensor, (y, p, w, m)), reproducible=True)
        assert (exact.shown, int(exact.masked)) == (tally.shown, int(tally.masked))


def test_ignored_labels_are_masked_and_weights_of_0_are_not():
    labels, logits = torch.tensor([[0, 2, -1], [1, -1, 0]]), torch.zeros(2, 3, 3)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    head = torch.nn.Linear(5, 3)
    for loss, output in (
        (ll.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1), logits),
        (ll.losses.LinearCrossentropy(head, ignore_class=-1), torch.zeros(2, 3, 5)),
    ):
        assert (loss.tally(labels, output).shown, int(loss.tally(labels, output).masked)) == (6, 2)
        assert int(loss.tally(labels, output, mask=mask).masked) == 3
        assert int(loss.tally(labels, output, sample_weight=[0.0, 1.0]).masked) == 2
        with torch.enable_grad():
            tally, _ = loss.backprop(labels, output, mask=mask)
        assert (tally.shown, int(tally.masked)) == (6, 3)


REPEAT_IS_WEIGHT = {"sum", "mean_with_sample_weight"}
MASK_IS_DELETE = set(REDUCTIONS) - {"sum_over_all_entries"}
ZERO_IS_DELETE = {"sum", "mean_with_sample_weight", "sum_over_nonzero_weights"}


def holds(row, reduction, change):
    """Whether a law holds on inputs where a violation must show."""
    y, p, w, _ = case(row, 11, samples=5, masks=False)
    loss = row.make(reduction=reduction)
    left, right = change(y, p, w)
    a = float(loss(*map(as_tensor, left)))
    b = float(loss(*map(as_tensor, right)))
    return abs(a - b) <= 1e-9 * max(1, abs(b))


def repeated(y, p, w):
    twice = np.array([0, 1, 1, 2, 3, 4])
    heavy = w.copy()
    heavy[1] *= 2
    return (y[twice], p[twice], w[twice], None), (y, p, heavy, None)


def masked(y, p, w):
    mask = np.ones_like(w, dtype=bool)
    mask[2] = False
    return (y, p, w, mask), (np.delete(y, 2, 0), np.delete(p, 2, 0), np.delete(w, 2, 0), None)


def weightless(y, p, w):
    light = w.copy()
    light[2] = 0
    return (y, p, light, None), (np.delete(y, 2, 0), np.delete(p, 2, 0), np.delete(w, 2, 0), None)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_table_of_laws(row, reduction):
    """Laws that a reduction keeps hold; those it breaks are seen to break."""
    assert holds(row, reduction, repeated) == (reduction in REPEAT_IS_WEIGHT)
    assert holds(row, reduction, masked) == (reduction in MASK_IS_DELETE)
    assert holds(row, reduction, weightless) == (reduction in ZERO_IS_DELETE)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_entries_reach_neither_value_nor_gradient(row, reduction, poison):
    y, p, w, m = case(row, 5, samples=4)
    m[1] = False
    loss = row.make(reduction=reduction)
    clean, gradient = value_and_gradient(loss, y, p, w, m)
    p, w = p.copy(), w.copy()
    p[~m], w[~m] = poison, poison
    y = np.where(m.reshape(*m.shape, *(1,) * (y.ndim - m.ndim)), y, poison if y.dtype.kind == "f" else -100)
    dirty, dirty_gradient = value_and_gradient(loss, y, p, w, m)
    assert close(dirty.value, clean.value.detach())
    assert torch.isfinite(dirty_gradient).all() and close(dirty_gradient, gradient)
    assert int(dirty.nonfinite) == 0
    _, closed = loss.backprop(*map(as_tensor, (y, p, w, m)))
    assert close(closed, gradient)


@given(rows, st.sampled_from([r for r in REDUCTIONS]), seeds)
def test_groups_balance(row, reduction, seed):
    """The contributions of all groups sum to the value; counts and weights too."""
    y, p, w, m = case(row, seed)
    loss = row.make(reduction=reduction)
    ids = torch.as_tensor(np.random.default_rng(seed).integers(0, 3, len(p)))
    for by in (*row.kinds, ids):
        tally = loss.tally(*map(as_tensor, (y, p, w, m)), by=by)
        assert close(tally.contributions().sum(), tally.value)
        assert int(tally.groups.count.sum()) == int(tally.count)
        assert close(tally.groups.weight.sum(), tally.weight)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_groups_of_parts_add_up(row):
    y, p, w, m = case(row, 21, samples=7)
    loss = row.make()
    for by in row.kinds:
        whole = loss.tally(*map(as_tensor, (y, p, w, m)), by=by)
        parts = [loss.tally(*(as_tensor(a[s]) for a in (y, p, w, m)), by=by) for s in (slice(0, 1), slice(1, 7))]
        total = parts[0] + parts[1]
        assert close(total.contributions(), whole.contributions())


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "mean_per_sample"])
def test_gradcheck(row, reduction):
    y, p, w, m = case(row, 13, samples=3)
    loss = row.make(reduction=reduction)
    prediction = torch.as_tensor(p).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: loss(as_tensor(y), q, as_tensor(w), as_tensor(m)), (prediction,))


# Losses of straight pieces, whose second derivative is 0 wherever it exists.
STRAIGHT = ("mae", "mape", "hinge-zero-one", "hinge-signs", "quantile", "quantiles", "margin-ranking")


@pytest.mark.parametrize("row", [r for r in ROWS if r.closed and r.name not in STRAIGHT], ids=lambda r: r.name)
def test_second_derivative_of_public_elements(row):
    y, p, w, m = case(row, 13, samples=2)
    prediction = torch.as_tensor(p).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q: row.make()(as_tensor(y), q, as_tensor(w), as_tensor(m)), prediction)


@pytest.mark.parametrize(
    "row", [r for r in ROWS if "sparse" not in r.name and "custom" not in r.name], ids=lambda r: r.name
)
def test_weight_of_each_element(row):
    """A weight of the elements' shape, on losses whose elements are columns."""
    if "column" not in row.kinds:
        pytest.skip("no class axis in the elements")
    y, p, _, _ = case(row, 29)
    w = np.random.default_rng(1).uniform(0, 2, p.shape)
    expected = oracles.reduce_entries(row.elements(y, p), "sum_over_batch_size", w)
    assert abs(float(row.make()(as_tensor(y), as_tensor(p), as_tensor(w))) - expected) < 1e-9
    _, closed = row.make().backprop(as_tensor(y), as_tensor(p), as_tensor(w))
    _, gradient = value_and_gradient(row.make(), y, p, w, None)
    assert close(closed, gradient)
