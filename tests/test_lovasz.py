"""Lovász losses: the sets of mistakes written out, deletion by mask, splits, and what is not additive."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lossledger as ll
from lossledger.errors import InputError
from rows_lovasz import MAKES, image

L = ll.losses


def case(seed, samples=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (samples, 6))
    labels[-1, 0] = 2
    return np.eye(3)[labels], rng.normal(0, 1.5, (samples, 6, 3)), rng.random((samples, 6)) < 0.7


def tensors(*arrays):
    return [torch.as_tensor(a) for a in arrays]


@pytest.mark.parametrize("name", MAKES)
def test_value_is_that_of_the_sets_of_mistakes(name):
    y, z, m = case(1)
    m[1] = False
    loss = MAKES[name]()
    whole = np.mean([image(name, a, b) for a, b in zip(y, z, strict=True)])
    assert abs(float(loss(*tensors(y, z))) - whole) < 1e-9
    valid = [image(name, a[i], b[i]) for a, b, i in zip(y, z, m, strict=True) if i.any()]
    assert abs(float(loss(*tensors(y, z), mask=torch.as_tensor(m))) - np.mean(valid)) < 1e-9
    weights = np.array([1.0, 0.5, 2.0, 0.0])
    expected = sum(w * image(name, a, b) for w, a, b in zip(weights, y, z, strict=True)) / 4
    assert abs(float(loss(*tensors(y, z, weights))) - expected) < 1e-9
    pooled = MAKES[name](per_image=False)
    assert abs(float(pooled(*tensors(y, z))) - image(name, y.reshape(-1, 3), z.reshape(-1, 3))) < 1e-9
    assert abs(float(pooled(*tensors(y, z), mask=torch.as_tensor(m))) - image(name, y[m], z[m])) < 1e-9


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("per_image", [True, False])
def test_gradient(name, per_image):
    y, z, m = case(2, samples=2)
    loss = MAKES[name](per_image=per_image)
    prediction = torch.as_tensor(z).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: loss(torch.as_tensor(y), q, mask=torch.as_tensor(m)), (prediction,))
    loss(torch.as_tensor(y), prediction, mask=torch.as_tensor(m)).backward()
    _, found = loss.backprop(*tensors(y, z), mask=torch.as_tensor(m))
    assert torch.allclose(found, prediction.grad, atol=1e-12)


@pytest.mark.parametrize("name", MAKES)
def test_unequal_parts_add_up(name):
    y, z, m = case(3, samples=6)
    loss, weight = MAKES[name](), np.linspace(0.5, 2, 6)
    vector, parts = [1.0, 3.0, 0.5], [slice(0, 1), slice(1, 3), slice(3, 6)]

    def align(s):
        return loss.align(*tensors(y[s], z[s], weight[s], m[s]), class_weight=vector)

    whole = loss.tally_aligned(align(slice(0, 6)), "class")
    total = sum(loss.tally_aligned(align(s), "class") for s in parts)
    assert abs(float(total.value - whole.value)) < 1e-12
    assert torch.allclose(total.contributions(), whole.contributions(), atol=1e-12)
    assert abs(float(whole.contributions().sum() - whole.value)) < 1e-12
    divisors = sum(loss.divisor_aligned(align(s)) for s in parts)
    assert float(divisors.divisor) == float(whole.divisor)
    _, gradient = loss.backprop_aligned(align(slice(0, 6)), None, 1.0)
    pieces = [loss.backprop_aligned(align(s), total, 1.0)[1] for s in parts]
    assert torch.allclose(torch.cat(pieces), gradient, atol=1e-12)


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_pixels_are_not_there(name, per_image, poison):
    y, z, m = case(4)
    m[1] = False
    loss = MAKES[name](per_image=per_image)
    clean, gradient = loss.backprop(*tensors(y, z), mask=torch.as_tensor(m))
    y, z = y.copy(), z.copy()
    y[~m], z[~m] = poison, poison
    dirty, found = loss.backprop(*tensors(y, z), mask=torch.as_tensor(m))
    assert float(dirty.value) == float(clean.value) and torch.equal(found, gradient)
    nothing, zero = loss.backprop(*tensors(y, z), mask=torch.zeros(4, 6, dtype=torch.bool))
    assert float(nothing.value) == 0 and not zero.any()


def test_a_batch_sorted_as_one_image_is_not_additive():
    y, z, _ = case(5)
    pooled, single = L.LovaszHinge(per_image=False), L.LovaszHinge()
    assert single.additive and not pooled.additive
    parts = pooled.tally(*tensors(y[:1], z[:1])) + pooled.tally(*tensors(y[1:], z[1:]))
    assert abs(float(parts.value - pooled.tally(*tensors(y, z)).value)) > 1e-3
    with pytest.raises(InputError, match="sorted as one image"):
        pooled.tally(*tensors(y, z), by="sample")
    with pytest.raises(InputError, match="sample_weight"):
        pooled(*tensors(y, z, np.ones(4)))
    with pytest.raises(InputError, match="one weight an image"):
        single(*tensors(y, z, np.ones((4, 6))))
    with pytest.raises(InputError, match="classes"):
        L.LovaszSoftmax(classes="some")


@pytest.mark.parametrize("name", MAKES)
def test_configuration_round_trip(name):
    loss = MAKES[name](per_image=False, reduction="sum")
    assert L.deserialize(L.serialize(loss)).get_config() == loss.get_config()
    y, z, _ = case(6)
    assert MAKES[name](reduction="none")(*tensors(y, z)).shape == (4,)


def test_an_image_without_any_class():
    """Present classes: none, so nothing is wrong; all classes: every false pixel counts."""
    y, p = torch.zeros(1, 4, 2), torch.full((1, 4, 2), 0.25)
    assert float(L.LovaszSoftmax()(y, p)) == 0
    assert float(L.LovaszSoftmax(classes="all")(y, p)) == 0.25
