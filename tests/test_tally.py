"""The laws of tallies, exactly: fractions, then NumPy and torch, with unequal parts and groups of other names."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lossledger as ll
from lossledger.errors import InputError
from lossledger.tally import Groups, Spread, Tally, divide

fractions = st.fractions(-5, 5, max_denominator=7)
counts = st.integers(0, 9)
# Of elements that were masked; None where nobody says how many elements there were.
lacking = st.one_of(st.none(), counts)


@st.composite
def tallies(draw, cells=0, groups=()):
    """A tally of fractions with the given groups; its numerator is the sum of theirs."""
    names = draw(st.lists(st.sampled_from(groups), unique=True, min_size=1)) if groups else []
    shares = [draw(fractions) for _ in names]
    number = [draw(counts) for _ in names]
    rows = None
    if names:
        row = np.array(shares, dtype=object)
        rows = Groups("class", tuple((n, "") for n in names), row, row, np.array(number), np.array(number))
    total = sum(shares, Fraction(0)) if names else draw(fractions)
    count = sum(number) if names else draw(counts)
    masked = draw(lacking)
    shown = None if masked is None else count + masked
    if cells:
        numerator = np.array([draw(fractions) for _ in range(cells)], dtype=object)
        divisor = np.array([Fraction(draw(counts)) for _ in range(cells)], dtype=object)
        return Tally(numerator, divisor, count, count, Fraction(1, cells), Fraction(1, 9), "ratio", shown=shown)
    return Tally(total, Fraction(count), count, count, groups=rows, shown=shown)


def content(tally):
    """Everything that a tally holds, comparable; rows in the order of their names."""
    rows = None
    if tally.groups is not None:
        columns = (tally.groups.numerator, tally.groups.total, tally.groups.count, tally.groups.weight)
        rows = sorted(zip(tally.groups.keys, *(list(c) for c in columns), strict=True))
    fields = (
        tally.numerator,
        tally.divisor,
        tally.count,
        tally.weight,
        tally.coefficient,
        tally.offset,
        tally.form,
        tally.shown,
    )
    return [f.tolist() if isinstance(f, np.ndarray) else f for f in fields], rows


grouped = tallies(groups=("cat", "dog", "eel"))


@pytest.mark.parametrize("kind", [tallies(), tallies(cells=3), grouped], ids=["one divisor", "cells", "groups"])
def test_addition_is_associative_and_commutative_with_zero(kind):
    @given(kind, kind, kind)
    def law(a, b, c):
        assert content((a + b) + c) == content(a + (b + c))
        assert content(a + b) == content(b + a)
        assert content(a + Tally.zero()) == content(a) == content(Tally.zero() + a)
        assert content(sum([a, b, c])) == content(a + b + c)

    law()


def test_zero_plus_zero_is_zero_and_has_the_value_0():
    assert (Tally.zero() + Tally.zero()).value == 0
    assert content(Tally.zero() + Tally.zero()) == content(Tally.zero())


@given(st.lists(grouped, min_size=1, max_size=5))
def test_contributions_of_groups_sum_to_the_value_exactly(parts):
    whole = sum(parts)
    assert sum(whole.contributions()) == whole.value


@given(st.lists(tallies(), min_size=1, max_size=6))
def test_value_of_the_whole_is_total_over_divisor(parts):
    whole = sum(parts)
    total, divisor = sum(p.numerator for p in parts), sum(p.divisor for p in parts)
    assert whole.value == (total / divisor if divisor else 0)


@given(st.lists(tallies(), max_size=6))
def test_masked_elements_add_up_where_every_part_knows_them(parts):
    whole = sum(parts, Tally.zero())
    known = [part.masked for part in parts]
    assert whole.masked == (None if None in known else sum(known))
    assert whole.masked is None or whole.masked + whole.count == whole.shown


@st.composite
def spreads(draw):
    """The spread of some elements, and the elements."""
    elements = draw(st.lists(fractions, max_size=4))
    if not elements:
        return Spread.zero(), elements
    return Spread(min(elements), max(elements), sum(e * e for e in elements)), elements


def reach(one):
    return one.minimum, one.maximum, one.squares


@given(spreads(), spreads(), spreads())
def test_spreads_merge_in_any_order_and_grouping_to_that_of_the_whole(a, b, c):
    merged = (a[0] + b[0]) + c[0]
    assert reach(merged) == reach(a[0] + (b[0] + c[0])) == reach(c[0] + b[0] + a[0])
    assert reach(merged + Spread.zero()) == reach(Spread.zero() + merged) == reach(merged)
    every = [*a[1], *b[1], *c[1]]
    if every:
        assert reach(merged) == (min(every), max(every), sum(e * e for e in every))


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@given(parts=st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=1, max_size=4))
def test_spreads_of_arrays_are_those_of_numpy(array, parts):
    whole = Spread.zero()
    for part in parts:
        rows = array(np.array(part))
        whole = whole + Spread(rows, rows, rows * rows)
    stacked = np.array(parts)
    assert np.asarray(whole.minimum).tolist() == stacked.min(0).tolist()
    assert np.asarray(whole.maximum).tolist() == stacked.max(0).tolist()
    np.testing.assert_allclose(np.asarray(whole.squares), (stacked**2).sum(0), rtol=1e-14)


@pytest.mark.parametrize("array", [float, np.asarray, torch.as_tensor], ids=["number", "numpy", "torch"])
def test_a_spread_shows_what_is_not_a_number(array):
    bad, good = Spread(*[array(float("nan"))] * 3), Spread(*[array(1.0)] * 3)
    for whole in (bad + good, good + bad):
        assert all(value != value for value in reach(whole))


@given(tallies(), tallies())
def test_operands_are_not_changed(a, b):
    before = content(a), content(b)
    _ = a + b
    assert (content(a), content(b)) == before


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_arrays_add_like_numbers(array):
    keys = ((0, "present"), (1, "present"))

    def make(a, b):
        row = array([a, b])
        groups = Groups("class", keys, row, row, array([1, 2]), array([1.0, 2.0]))
        return Tally(array(a + b), array(3.0), array(3), array(3.0), groups=groups)

    whole = make(1.0, 2.0) + make(4.0, 5.0)
    assert float(whole.value) == 2.0
    assert [float(v) for v in whole.contributions()] == pytest.approx([5 / 6, 7 / 6], rel=1e-6)


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_groups_of_other_names_join_by_name(array):
    def make(keys, values):
        row = array(values)
        return Tally(array(sum(values)), 1, 1, 1.0, groups=Groups("group", keys, row, row, row, row))

    whole = make(((7, ""), (3, "")), [1.0, 2.0]) + make(((3, ""), (5, "")), [10.0, 20.0])
    assert whole.groups.keys == ((7, ""), (3, ""), (5, ""))
    assert whole.groups.total.tolist() == [1.0, 12.0, 20.0]


def test_samples_are_appended():
    mse = ll.losses.MeanSquaredError()
    a, b = mse.tally([[0.0], [0.0]], [[1.0], [2.0]], by="sample"), mse.tally([[0.0]], [[3.0]], by="sample")
    assert (a + b).groups.total.tolist() == [1.0, 4.0, 9.0]


def test_cells_divide_their_own_rows():
    row = torch.tensor([1.0, 6.0])
    groups = Groups("class", ((0, ""), (1, "")), row, row, torch.tensor([2, 3]), torch.tensor([2.0, 3.0]), (0, 1))
    tally = Tally(row, torch.tensor([2.0, 3.0]), 5, 5.0, 0.5, 0.0, "ratio", groups=groups)
    assert tally.contributions().tolist() == [0.25, 1.0] and float(tally.value) == 1.25
    assert (tally + tally).contributions().tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    "zero", [0, 0.0, Fraction(0), np.float64(0), torch.tensor(0.0)], ids=lambda z: type(z).__name__
)
def test_nothing_counted_is_0_not_nan(zero):
    assert float(divide(zero, zero)) == 0


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (Tally(1, 1, 1, 1), Tally(1, 1, 1, 1, coefficient=2), "different losses"),
        (Tally(1, 1, 1, 1), Tally(1, 1, 1, 1, offset=1), "different losses"),
        (Tally(1, 1, 1, 1), Tally(1, 1, 1, 1, form="ratio"), "different losses"),
    ],
)
def test_tallies_of_different_losses_do_not_add(a, b, words):
    with pytest.raises(InputError, match=words):
        _ = a + b


def test_a_tally_with_groups_and_one_without_do_not_add():
    mse = ll.losses.MeanSquaredError()
    whole, divided = mse.tally([[0.0]], [[1.0]]), mse.tally([[0.0]], [[1.0]], by="sample")
    with pytest.raises(InputError, match="without"):
        _ = whole + divided
    with pytest.raises(InputError, match="different groups"):
        _ = divided + mse.tally([[0.0]], [[1.0]], by="column")
    with pytest.raises(InputError, match="no groups"):
        whole.contributions()
    with pytest.raises(TypeError):
        _ = whole + 1


def test_a_thousand_ranks_are_one():
    """Merging the tallies of simulated ranks of unequal size gives the number of one process."""
    rng = np.random.default_rng(0)
    y, z = (rng.random((5000, 3)) < 0.3).astype(float), rng.normal(size=(5000, 3))
    loss = ll.losses.Dice(axis=0, from_logits="sigmoid")
    bce = ll.losses.BinaryCrossentropy(from_logits=True)
    cuts = np.unique(rng.integers(0, 5001, 1000))
    for one in (loss, bce):
        parts = [one.tally(y[a:b], z[a:b], by="class") for a, b in zip([0, *cuts], [*cuts, 5000], strict=True) if b > a]
        whole = one.tally(y, z, by="class")
        assert abs(float(sum(parts).value) - float(whole.value)) < 1e-12
        assert float((sum(parts).contributions() - whole.contributions()).abs().max()) < 1e-12


NAMED = {
    "labels": (lambda: ll.losses.SparseCategoricalCrossentropy(from_logits=True), torch.arange(12) % 4),
    "columns": (lambda: ll.losses.BinaryCrossentropy(from_logits=True), torch.eye(4).repeat(3, 1)),
    "outputs": (lambda: ll.losses.Dice(grouping="class"), torch.eye(4).repeat(3, 1)),
    "one-hot": (lambda: ll.losses.CategoricalCrossentropy(from_logits=True), torch.eye(4).repeat(3, 1)),
}


@pytest.mark.parametrize("case", NAMED)
def test_the_names_of_the_groups_are_made_once(case):
    """With thousands of classes they would be most of a step."""
    make, targets = NAMED[case]
    keys = [make().tally(targets, torch.full((12, 4), 0.5), by="class").groups.keys for _ in range(2)]
    assert keys[0] is keys[1] and len({group for group, _ in keys[0]}) == 4
