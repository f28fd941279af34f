"""Alignment, masks and weights: the rules of DESIGN as a table, and the arithmetic against plain broadcasting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lossledger as ll
from lossledger.errors import InputError, InputTypeError, UnknownNameError
from lossledger.values import check_labels, check_probabilities, check_targets
from lossledger.weighting import align, argmax_weights, as_mask, as_tensor, class_vector, expand, weighting

sides = st.integers(1, 4)


# --- targets and predictions ---------------------------------------------------------------------------------------

ALIGNED = [
    ((4,), (4,), (4, 1)),
    ((4,), (4, 1), (4, 1)),
    ((4, 1), (4,), (4, 1)),
    ((4, 1), (4, 1), (4, 1)),
    ((4, 3), (4, 3), (4, 3)),
    ((4, 3), (4, 3, 1), (4, 3, 1)),
    ((4, 3, 1), (4, 3), (4, 3, 1)),
    ((4, 4), (4, 4, 1), (4, 4, 1)),
    ((1,), (1, 1), (1, 1)),
    ((0, 3), (0, 3), (0, 3)),
    ((), (1,), (1, 1)),
]
REFUSED = [
    ((4,), (4, 2)),
    ((4, 2), (4,)),
    ((4, 1), (4, 2)),
    ((4, 2), (4, 1)),
    ((1, 2), (4, 2)),
    ((4,), (3,)),
    ((3,), (4, 3)),
    ((3, 3), (3, 1, 3)),
    ((4, 1, 1), (4,)),
    ((4,), (4, 1, 1)),
    ((4, 3), (4, 1, 3)),
    ((), ()),
    ((2, 3, 4, 5), (2, 5, 3, 4)),
]


@pytest.mark.parametrize(("true", "pred", "shape"), ALIGNED)
def test_shapes_that_differ_in_a_last_axis_of_one_are_aligned(true, pred, shape):
    y, p = torch.rand(true), torch.rand(pred)
    a, b = align(y, p)
    assert tuple(a.shape) == tuple(b.shape) == shape
    assert torch.equal(a.flatten(), y.flatten()) and torch.equal(b.flatten(), p.flatten())


@pytest.mark.parametrize(("true", "pred"), REFUSED)
def test_every_other_mismatch_is_refused_naming_both_shapes(true, pred):
    with pytest.raises(InputError) as caught:
        align(torch.zeros(true), torch.zeros(pred), "here")
    assert "here" in str(caught.value) and str(true) in str(caught.value) and str(pred) in str(caught.value)


@given(st.lists(sides, min_size=0, max_size=4), st.lists(sides, min_size=0, max_size=4))
def test_alignment_never_broadcasts(true, pred):
    """Whatever is accepted holds as many numbers as before, in the same order, on both sides."""
    y, p = torch.rand(true), torch.rand(pred)
    try:
        a, b = align(y, p)
    except InputError:
        assert y.shape != p.shape or y.ndim == 0
        return
    assert a.shape == b.shape and a.numel() == y.numel() and b.numel() == p.numel()
    assert a.ndim >= 2 and len(a) == (len(y) if y.ndim else 1) == (len(p) if p.ndim else 1)


# --- weights and masks ---------------------------------------------------------------------------------------------

# Entries, columns, shape of the weight, what it becomes (None: refused).
EXPANDED = [
    ((4,), 1, (), (1, 1)),
    ((4,), 1, (4,), (4, 1)),
    ((4,), 1, (4, 1), (4, 1)),
    ((4,), 3, (4, 3), (4, 3)),
    ((4,), 3, (4, 1), (4, 1)),
    ((4,), 4, (4,), (4, 1)),
    ((4, 5), 1, (4,), (4, 1, 1)),
    ((4, 5), 1, (4, 5), (4, 5, 1)),
    ((4, 5), 1, (4, 1), (4, 1, 1)),
    ((4, 5), 3, (4, 5, 3), (4, 5, 3)),
    ((4, 5), 3, (4, 1, 3), (4, 1, 3)),
    ((4, 4), 1, (4,), (4, 1, 1)),
    ((4, 4), 4, (4, 4), (4, 4, 1)),
    ((4, 5, 6), 2, (4, 5), (4, 5, 1, 1)),
    ((1,), 1, (1,), (1, 1)),
    ((4,), 1, (1,), None),
    ((4,), 1, (3,), None),
    ((4,), 3, (3,), None),
    ((4,), 3, (1, 3), None),
    ((4, 5), 1, (5,), None),
    ((4, 5), 1, (1, 5), None),
    ((4, 5), 3, (4, 3), None),
    ((4, 5), 1, (5, 4), None),
    ((4, 5), 1, (4, 5, 2), None),
    ((4, 5), 1, (4, 5, 1, 1), None),
]


@pytest.mark.parametrize(("entries", "columns", "given_", "shape"), EXPANDED)
def test_weights_are_expanded_from_the_leading_axes(entries, columns, given_, shape):
    values = torch.rand(given_)
    if shape is None:
        with pytest.raises(InputError) as caught:
            expand(values, entries, columns, "here: mask")
        assert "here: mask" in str(caught.value) and str(given_) in str(caught.value)
        assert str(entries[:1]) in str(caught.value)
    else:
        got = expand(values, entries, columns, "here")
        assert tuple(got.shape) == shape and torch.equal(got.flatten(), values.flatten())


@given(st.lists(sides, min_size=1, max_size=3), sides, st.data())
def test_counts_and_weights_are_those_of_plain_broadcasting(entries, columns, data):
    """`count`, `total_weight` and `product` against NumPy, for a weight and a mask of any accepted shape."""
    full = (*entries, columns)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))

    def draw():
        depth = data.draw(st.integers(0, len(full)))
        shape = [n if i == 0 or data.draw(st.booleans()) else 1 for i, n in enumerate(full[:depth])]
        return rng.integers(0, 3, shape) * 0.5, (*shape, *[1] * (len(full) - depth))

    (w, w_shape), (m, m_shape) = draw(), draw()
    m = m > 0.4
    got = weighting(tuple(entries), columns, torch.as_tensor(w), torch.as_tensor(m))
    dense_w, dense_m = np.broadcast_to(w.reshape(w_shape), full), np.broadcast_to(m.reshape(m_shape), full)
    assert int(got.count()) == dense_m.sum()
    assert float(got.total_weight()) == pytest.approx((dense_w * dense_m).sum(), abs=1e-12)
    np.testing.assert_array_equal(np.broadcast_to(got.product.numpy(), full), dense_w * dense_m)


def test_without_weights_and_masks_every_element_counts_one():
    plain = weighting((2, 3), 4)
    assert (plain.count(), plain.total_weight(), plain.product) == (24, 24, None)
    values = torch.rand(2, 3, 4)
    assert plain.select(values, 0.0) is values


def test_a_masked_weight_is_zero_also_where_it_is_nan():
    got = weighting((2,), 1, torch.tensor([torch.nan, 2.0]), torch.tensor([False, True]))
    assert got.product.tolist() == [[0.0], [2.0]] and float(got.total_weight()) == 2.0


def test_a_mask_selects_and_never_multiplies():
    values = torch.tensor([[torch.nan], [torch.inf], [3.0]])
    got = weighting((3,), 1, mask=torch.tensor([0, 0, 1])).select(values, 0.5)
    assert got.tolist() == [[0.5], [0.5], [3.0]]
    assert torch.isnan(values[0, 0]), "the caller's tensor is not written to"


def test_a_class_weight_multiplies_a_sample_weight():
    got = weighting((2, 2), 3, torch.tensor([1.0, 2.0]), None, torch.tensor([1.0, 10.0, 100.0]))
    assert got.product.expand(2, 2, 3)[1, 0].tolist() == [2.0, 20.0, 200.0]
    assert float(got.total_weight()) == 2 * 111 + 2 * 222


def test_whole_numbers_are_weights():
    assert weighting((2,), 1, torch.tensor([1, 3])).product.dtype == torch.get_default_dtype()
    mse = ll.losses.MeanSquaredError()
    assert float(mse([[0.0], [0.0]], [[1.0], [1.0]], sample_weight=[1, 3])) == 2.0
    assert float(mse([[0.0], [0.0]], [[1.0], [1.0]], sample_weight=[True, False])) == 0.5


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.float16])
def test_masks_of_every_dtype_are_bool(dtype):
    assert as_mask(torch.tensor([1, 0, 1]).to(dtype), "mask").tolist() == [True, False, True]


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan"), float("inf"), 1e-9])
def test_a_mask_of_other_numbers_is_refused(value):
    with pytest.raises(InputError, match=r"m: .*sample_weight"):
        as_mask(torch.tensor([1.0, value]), "m")


# --- class weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_weight", "names", "expected"),
    [
        ({}, None, [1, 1, 1]),
        ({1: 4.0}, None, [1, 4, 1]),
        ({np.int64(2): 4}, None, [1, 1, 4]),
        ({"b": 4.0, 0: 2.0}, ["a", "b", "c"], [2, 4, 1]),
        ([1, 2, 3], None, [1, 2, 3]),
        ((0.0, 2.0, 3.0), None, [0, 2, 3]),
        (np.array([1.0, 2.0, 3.0]), None, [1, 2, 3]),
        (torch.tensor([1, 2, 3]), None, [1, 2, 3]),
    ],
)
def test_class_weights_become_a_vector(class_weight, names, expected):
    got = class_vector(class_weight, 3, names)
    assert got.tolist() == expected and got.is_floating_point()


@pytest.mark.parametrize(
    ("class_weight", "names", "error", "words"),
    [
        ({3: 1.0}, None, UnknownNameError, "3"),
        ({-1: 1.0}, None, UnknownNameError, "-1"),
        ({"cat": 1.0}, None, UnknownNameError, "'cat'"),
        ({"dgo": 1.0}, ["cat", "dog", "emu"], UnknownNameError, "Did you mean 'dog'"),
        ([1.0, 2.0], None, InputError, r"\(3,\).*\(2,\)"),
        (5.0, None, InputError, r"\(3,\).*\(\)"),
        ({0: -1.0}, None, InputError, "not negative"),
        ({0: float("nan")}, None, InputError, "finite"),
        ([1.0, 2.0, float("inf")], None, InputError, "finite"),
        ("balanced", None, InputTypeError, "class_weight"),
    ],
)
def test_class_weights_that_cannot_be_right_are_refused(class_weight, names, error, words):
    with pytest.raises(error, match=words) as caught:
        class_vector(class_weight, 3, names, "mask")
    assert "mask" in str(caught.value)


@pytest.mark.parametrize("class_weight", [{0: 0.1, 1: 0.1}, [0.1, 0.1]])
def test_class_weights_keep_float64(class_weight):
    loss = ll.losses.BinaryCrossentropy(from_logits=True)
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    value = float(loss.tally(zeros, zeros, class_weight=class_weight).value)
    assert value == pytest.approx(0.1 * np.log(2), rel=1e-14)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_argmax_weights_are_looked_up_by_the_largest_target(labels):
    table = torch.tensor([0.5, 1.0, 4.0])
    y = torch.eye(3)[torch.tensor(labels)]
    assert torch.equal(argmax_weights(table, y), table[torch.tensor(labels)])
    assert torch.equal(argmax_weights(table, y.reshape(1, -1, 3))[0], table[torch.tensor(labels)])


def test_argmax_weights_go_in_as_sample_weights():
    y = torch.eye(3)[torch.tensor([[0, 1], [2, 2]])]
    p = torch.full((2, 2, 3), 0.5)
    weight = argmax_weights([1.0, 2.0, 6.0], y)
    assert weight.shape == (2, 2)
    got = ll.losses.BinaryCrossentropy()(y, p, weight)
    assert float(got) == pytest.approx(np.log(2) * (1 + 2 + 6 + 6) / 4, rel=1e-6)


def test_a_row_of_zeros_counts_as_the_first_class():
    assert argmax_weights([5.0, 1.0], torch.zeros(2, 2)).tolist() == [5.0, 5.0]
    with pytest.raises(InputError, match="argmax_weights"):
        argmax_weights([1.0, 2.0], torch.zeros(2, 3))


# --- value checks --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 8), min_size=1, max_size=12), st.sampled_from([None, -1, 7]))
def test_labels_are_refused_exactly_when_one_is_out_of_range(labels, ignore):
    bad = [v for v in labels if not 0 <= v < 5 and v != ignore]
    for tensor in (torch.tensor(labels), torch.tensor(labels, dtype=torch.float64)):
        if bad:
            position = labels.index(bad[0])
            with pytest.raises(InputError) as caught:
                check_labels(tensor, 5, "here", ignore)
            assert f"{bad[0]} at position ({position},)" in str(caught.value)
            assert f"({len(bad)} such" in str(caught.value)
        else:
            check_labels(tensor, 5, "here", ignore)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 1 + 5e-7, -5e-7, float("nan")])
def test_probabilities_may_be_rounded_past_the_ends(value):
    check_probabilities(torch.tensor([value], dtype=torch.float64), "here")


@pytest.mark.parametrize("value", [1.01, -0.01, float("inf"), -float("inf")])
def test_other_numbers_are_no_probabilities(value):
    with pytest.raises(InputError, match="from_logits"):
        check_probabilities(torch.tensor([0.5, value]), "here")


def test_targets_are_checked_against_their_upper_end():
    check_targets(torch.tensor([0.0, 2.0]), "here", upper=2.0)
    for value in (2.1, -0.1, float("nan")):
        with pytest.raises(InputError, match=r"\[0, 2\]"):
            check_targets(torch.tensor([value]), "here", upper=2.0)


def test_tensors_share_memory_with_what_they_came_from():
    array = np.zeros(3)
    as_tensor(array, "x")[0] = 1
    assert array[0] == 1
    tensor = torch.zeros(2)
    assert as_tensor(tensor, "x") is tensor
