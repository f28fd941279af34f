"""Losses whose samples are compared with each other: oracles in plain loops, and the laws that hold within a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lossledger as ll
import oracles
from lossledger.errors import InputError
from rows_coupled import LOSSES, distance, labelled, partners, semi_hard, views

L = ll.losses
REDUCTIONS = ("sum_over_batch_size", "sum", "mean_with_sample_weight", "mean_per_sample", "sum_over_nonzero_weights")


every = pytest.mark.parametrize("row", LOSSES.values(), ids=LOSSES)


def case(row, seed, samples=9):
    rng = np.random.default_rng(seed + 100)
    mask = rng.random(samples) < 0.7
    mask[:2] = True
    return (*row.inputs(seed, samples), rng.uniform(0.2, 2, samples), mask)


def tensors(*arrays):
    return [None if a is None else torch.as_tensor(a) for a in arrays]


def expected(row, reduction, labels, vectors, weight, mask):
    losses = row.oracle(labels, vectors, np.ones(len(labels), bool) if mask is None else mask)
    counts = np.array([loss is not None for loss in losses])
    elements = np.array([0.0 if loss is None else loss for loss in losses])
    given = None if weight is None else weight[:, None]
    return oracles.reduce_entries(elements[:, None], reduction, given, counts[:, None]), elements, counts


# --- the laws ------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", ["plain", "weights", "masks", "both"])
def test_value_is_that_of_the_loops(row, seed, reduction, given):
    labels, vectors, weight, mask = case(row, seed)
    weight = weight if given in ("weights", "both") else None
    mask = mask if given in ("masks", "both") else None
    value, elements, counts = expected(row, reduction, labels, vectors, weight, mask)
    tally = row.make(reduction=reduction).tally(*tensors(labels, vectors, weight, mask), by="sample")
    assert float(tally.value) == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert int(tally.count) == counts.sum() > 0 and int(tally.nonfinite) == 0
    assert float(tally.contributions().sum()) == pytest.approx(value, rel=1e-9, abs=1e-12)
    each = row.make(reduction="none")(*tensors(labels, vectors, None, mask))
    np.testing.assert_allclose(each, elements, rtol=1e-9, atol=1e-12)


@every
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_gradcheck_and_the_gradient_of_a_step(row, reduction):
    labels, vectors, weight, mask = tensors(*case(row, 3))
    loss = row.make(reduction=reduction)
    leaf = vectors.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(labels, v, weight, mask), (leaf,))
    tally, gradient = loss.backprop(labels, vectors, weight, mask)
    (plain,) = torch.autograd.grad(loss(labels, leaf, weight, mask), leaf)
    assert torch.allclose(gradient, plain, rtol=1e-12, atol=1e-14) and plain.abs().sum() > 0
    assert not tally.numerator.requires_grad


@every
def test_order_of_samples_does_not_matter(row):
    arrays = tensors(*case(row, 5))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    a, b = row.make().tally(*arrays).value, row.make().tally(*(v[order] for v in arrays)).value
    assert float(a) == pytest.approx(float(b), rel=1e-12)


@every
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_masked_sample_is_a_deleted_one(row, reduction):
    """Neither anchor nor partner."""
    labels, vectors, weight, mask = tensors(*case(row, 2))
    assert not mask.all()
    loss = row.make(reduction=reduction)
    masked = loss.tally(labels, vectors, weight, mask)
    deleted = loss.tally(labels[mask], vectors[mask], weight[mask])
    assert float(masked.value) == pytest.approx(float(deleted.value), rel=1e-12)
    whole = loss.tally(labels, vectors, weight)
    assert float(whole.value) != pytest.approx(float(deleted.value), rel=1e-6)


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_samples_reach_neither_value_nor_gradient(row, poison):
    labels, vectors, weight, mask = tensors(*case(row, 2))
    loss = row.make()
    clean, gradient = loss.backprop(labels, vectors, weight, mask)
    bad, heavy = vectors.clone(), weight.clone()
    bad[~mask], heavy[~mask] = poison, poison
    dirty, same = loss.backprop(labels, bad, heavy, mask)
    assert torch.equal(same, gradient) and not gradient[~mask].any()
    assert float(dirty.value) == float(clean.value) and int(dirty.nonfinite) == 0


@every
def test_a_split_changes_the_value_and_the_class_says_so(row):
    """The flag is honest: no reduction of the parts gives the whole, not even where each part is whole in itself."""
    labels, vectors, _, _ = tensors(*case(row, 1))
    loss = row.make()
    whole = float(loss.tally(labels, vectors).value)
    parts = sum(loss.tally(labels[s], vectors[s]) for s in (slice(0, 4), slice(4, 9)))
    assert abs(float(parts.value) - whole) > 1e-3 * abs(whole)
    assert type(loss).additive is False
    assert "batch-coupled" in type(loss).__doc__.lower()


@every
def test_the_same_batch_twice_is_not_the_batch(row):
    """A duplicated batch has other partners; two tallies of the same batch add up to its value."""
    labels, vectors, _, _ = tensors(*case(row, 1))
    loss = row.make()
    once = loss.tally(labels, vectors)
    assert float((once + once).value) == pytest.approx(float(once.value), rel=1e-12)
    twice = loss.tally(torch.cat((labels, labels)), torch.cat((vectors, vectors)))
    assert abs(float(twice.value) - float(once.value)) > 1e-3


@every
def test_without_partners_value_and_gradient_are_zero(row):
    labels, vectors, weight, _ = tensors(*case(row, 4))
    alone = torch.zeros(9, dtype=torch.bool)
    alone[3] = True
    for chosen in (alone, torch.zeros_like(alone)):
        tally, gradient = row.make().backprop(labels, vectors, weight, chosen)
        assert float(tally.value) == 0 and int(tally.count) == 0 and not gradient.any()
    empty = row.make().tally(labels[:0], vectors[:0])
    assert float(empty.value) == 0 and int(empty.count) == 0
    single = row.make().tally(labels[:1], vectors[:1])
    assert float(single.value) == 0 and int(single.count) == 0
    assert float((single + row.make().tally(labels, vectors)).value) > 0


@every
def test_equal_and_zero_vectors_have_finite_gradients(row):
    """Distance 0 between positives, between an anchor and its negative, and vectors without a direction."""
    labels, vectors, _, _ = tensors(*case(row, 6))
    for same in (vectors[:1].expand_as(vectors), torch.zeros_like(vectors)):
        leaf = same.clone().requires_grad_()
        value = row.make()(labels, leaf)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(leaf.grad).all()


@every
def test_configuration_round_trip(row):
    loss = row.make(reduction="sum")
    again = L.deserialize(L.serialize(loss))
    assert type(again) is type(loss) and again.get_config() == loss.get_config()
    labels, vectors, weight, mask = tensors(*case(row, 7))
    assert float(again(labels, vectors, weight, mask)) == float(loss(labels, vectors, weight, mask))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_at_least_float32(row, dtype):
    labels, vectors, _, _ = tensors(*case(row, 8))
    low = vectors.to(dtype)
    got = row.make()(labels, low)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(row.make()(labels, low.double())), rel=2e-5)


@every
def test_class_weights_are_refused(row):
    labels, vectors, _, _ = tensors(*case(row, 8))
    with pytest.raises(InputError, match="class_weight needs classes"):
        row.make().tally(labels, vectors, class_weight={0: 2.0})


# --- edges ---------------------------------------------------------------------------------------------------------


def test_large_similarities_do_not_overflow():
    """exp(1 / 1e-3) is beyond float32; the logarithm of the sum is not."""
    _, vectors = views(0)
    got = L.InfoNCE(1e-3)(np.zeros(9), torch.as_tensor(vectors, dtype=torch.float32))
    assert torch.isfinite(got)
    exact = L.InfoNCE(1e-3)(np.zeros(9), vectors)
    assert float(got) == pytest.approx(float(exact), rel=1e-3, abs=1e-3)


def test_chance_of_info_nce_grows_with_the_batch():
    for samples in (2, 8, 32):
        same = np.ones((samples, 2, 3))
        assert float(L.InfoNCE()(np.zeros(samples), same)) == pytest.approx(math.log(samples), rel=1e-6)
        assert float(L.NTXent()(np.zeros(samples), same)) == pytest.approx(math.log(2 * samples - 1), rel=1e-6)


def test_nt_xent_is_supervised_contrastive_with_the_sample_as_label():
    _, pair = views(3)
    flat = np.concatenate((pair[:, 0], pair[:, 1]))
    labels = np.tile(np.arange(9), 2)
    a, b = L.NTXent(0.3)(np.zeros(9), pair), L.SupervisedContrastive(0.3)(labels, flat)
    assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_a_negative_as_far_as_the_positive_is_not_farther():
    labels, points = np.array([0, 0, 1, 1]), np.array([[0.0], [1.0], [-1.0], [5.0]])
    losses = semi_hard(1.0, 1)(labels, points, np.ones(4, bool))
    assert losses[0] == 0.0  # with the tied negative it would be 1
    np.testing.assert_allclose(L.triplet_semi_hard(labels, points), losses)


def test_hard_triplets_are_those_of_torch():
    """Each anchor's triplet, found by hand, through torch.nn.TripletMarginLoss."""
    labels, vectors = labelled(4, 8)
    labels[-1] = 1
    v = torch.as_tensor(vectors)
    anchors, positives, negatives = [], [], []
    for a in range(8):
        near, far = partners(labels, np.ones(8, bool), a)
        if near and far:
            anchors.append(a)
            positives.append(max(near, key=lambda p: distance(vectors[a], vectors[p])))
            negatives.append(min(far, key=lambda n: distance(vectors[a], vectors[n])))
    theirs = torch.nn.TripletMarginLoss(margin=2.0, eps=0.0)(v[anchors], v[positives], v[negatives])
    assert float(L.TripletHard(2.0)(labels, v)) == pytest.approx(float(theirs), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: L.InfoNCE(temperature=0.0), "temperature must be positive"),
        (lambda: L.NTXent(temperature=-1.0), "temperature must be positive"),
        (lambda: L.SupervisedContrastive(temperature=math.nan), "temperature must be positive"),
        (lambda: L.TripletHard(margin=-0.1), "margin >= 0"),
        (lambda: L.TripletSemiHard(margin=math.nan), "margin >= 0"),
        (lambda: L.InfoNCE()([0, 0], torch.zeros(2, 3)), r"\[B, 2, D\].*torch.stack"),
        (lambda: L.NTXent()([0], torch.zeros(2, 2, 3)), r"\[B, 2, D\].*\(1,\).*\(2, 2, 3\)"),
        (lambda: L.TripletHard()([0, 1], torch.zeros(3, 2)), r"\[B, D\].*\(2,\).*\(3, 2\)"),
        (lambda: L.SupervisedContrastive()(torch.eye(3), torch.zeros(3, 2)), "argmax"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(InputError, match=says):
        make()


@every
def test_fit_lowers_the_loss(row):
    """Through objective and step, which take their gradient from the aligned batch."""
    labels, vectors, weight, mask = tensors(*case(row, 12))
    net = torch.nn.Linear(4, 4).double()
    torch.nn.init.eye_(net.weight)
    model = ll.Model(net)
    model.compile(optimizer=torch.optim.SGD(net.parameters(), 0.02), loss=row.make())
    options = {"sample_weight": weight, "mask": mask, "batch_size": 9}
    before = model.evaluate(vectors, labels, **options, verbose=0)
    history = model.fit(vectors, labels, **options, epochs=8, verbose=0).history
    assert history["loss"][0] == pytest.approx(float(before), rel=1e-9)
    assert history["loss"][-1] < history["loss"][0]
