"""Batches that are worked through in parts, in place, give what the plain calculation gives, on every loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from held import Held
from moved import Moved

import lossledger as ll
from checks import as_tensor, case, close, tensors, value_and_gradient
from declarations import REDUCTIONS, ROWS
from lossledger import values
from lossledger.losses import backward
from lossledger.losses.groups import AndSamples, column_sums
from lossledger.objective.breakdown import Whole
from lossledger.values import zeroed

CLOSED = [pytest.param(row, id=row.name) for row in ROWS if row.closed]
# By what is given: operations, and passes over the output.
COSTS = [("nothing", 72, 34), ("weights", 92, 38), ("mask", 98, 38), ("everything", 117, 39)]
NUMBERS = ("numerator", "divisor", "count", "weight", "nonfinite")
ROWS_OF_GROUPS = ("numerator", "total", "count", "weight")


@pytest.fixture(params=[24, 10**6], ids=["parts", "whole"])
def large(request, monkeypatch):
    """Everything counts as large; parts of a few samples, or one part."""

    def start():
        monkeypatch.setattr(values, "LARGE", 1)
        monkeypatch.setattr(backward, "PART", request.param)

    return start


def same(found, plain):
    for name in NUMBERS:
        assert close(torch.as_tensor(getattr(found, name)).double(), torch.as_tensor(getattr(plain, name)).double())
    assert (found.groups is None) == (plain.groups is None)
    if plain.groups is not None:
        assert (found.groups.kind, found.groups.keys) == (plain.groups.kind, plain.groups.keys)
        for name in ROWS_OF_GROUPS:
            assert close(getattr(found.groups, name).double(), getattr(plain.groups, name).double()), name


@pytest.mark.parametrize("row", CLOSED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", ["nothing", "weights", "mask", "both"])
def test_parts_are_the_whole(row, reduction, given, large):
    arrays = case(row, 3, samples=13, weights=given in ("weights", "both"), masks=given in ("mask", "both"))
    loss = row.make(reduction=reduction)
    plain, gradient = value_and_gradient(loss, *arrays)
    y, p, w, m = map(as_tensor, arrays)
    kinds = (None, *row.kinds)
    expected = [loss.tally(y, p, w, m, by=by) for by in kinds]
    large()
    for by, tally in zip(kinds, expected, strict=True):
        found, pulled = loss.backprop(y, p, w, m, by=by)
        assert close(pulled, gradient)
        same(found, tally)
    window = loss.tally(y, p, w, m) + loss.tally(y, p, w, m)
    assert close(loss.backprop(y, p, w, m, window=window)[1], gradient * (1 if reduction == "sum" else 0.5))
    assert close(plain.value, found.value)


@pytest.mark.parametrize("row", CLOSED)
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_per_sample"])
@pytest.mark.parametrize("given", ["mask", "both"])
@pytest.mark.parametrize("window", [False, True])
def test_an_objective_takes_pieces_to_the_whole(row, reduction, given, window, large):
    y, p, w, m = tensors(case(row, 3, samples=13, weights=given != "mask", masks=given != "weights"))
    p = torch.as_tensor(p).requires_grad_()
    loss = row.make(reduction=reduction)
    objective = ll.Objective(loss)
    tally = loss.tally(y, p.detach(), w, m)
    whole = Whole({loss.name: tally + tally}, 26) if window else None
    kinds = (None, *row.kinds)
    plain = [objective.backprop(y, p, w, m, by, whole=whole) for by in kinds]
    large()
    for by, one in zip(kinds, plain, strict=True):
        found = objective.backprop(y, p, w, m, by, whole=whole)
        assert found.roots[0] is p and close(found.gradients[0], one.gradients[0])
        same(found.tallies[loss.name], one.tallies[loss.name])


@pytest.mark.parametrize("given", ["nothing", "weights", "mask", "both"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_class_weights_and_axes_of_pieces(given, axis, large):
    y, p = (torch.rand(13, 4, 5, 3) < 0.4).double(), torch.randn(13, 4, 5, 3).double()
    w, m = torch.rand(13, 4).double(), torch.rand(13, 4, 5) < 0.7
    if axis == 1:
        y, p, w, m = y.movedim(-1, 1), p.movedim(-1, 1), w, m
    w, m = w if given in ("weights", "both") else None, m if given in ("mask", "both") else None
    loss = ll.losses.BinaryCrossentropy(from_logits=True, axis=axis, label_smoothing=0.1)
    objective = ll.Objective(loss, class_weight={0: 3.0, 2: 0.5})
    plain = objective.backprop(y, p.requires_grad_(), w, m)
    large()
    found = objective.backprop(y, p, w, m)
    assert close(found.gradients[0], plain.gradients[0])
    same(found.tallies[loss.name], plain.tallies[loss.name])
    assert not objective.backprop(y, p.detach(), w, m).roots


@pytest.mark.parametrize("row", CLOSED)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_entries_of_parts_reach_nothing(row, poison, large):
    y, p, w, m = case(row, 5, samples=13)
    m[1] = False
    loss = row.make()
    clean, gradient = value_and_gradient(loss, y, p, w, m)
    p, w = p.copy(), w.copy()
    p[~m], w[~m] = poison, poison
    y = np.where(m.reshape(*m.shape, *(1,) * (y.ndim - m.ndim)), y, poison if y.dtype.kind == "f" else -100)
    large()
    tally, pulled = loss.backprop(*map(as_tensor, (y, p, w, m)))
    assert close(tally.value, clean.value) and close(pulled, gradient) and int(tally.nonfinite) == 0


def test_samples_beside_classes_are_those_of_the_whole(large):
    y, p = (torch.rand(13, 4, 3) < 0.4).double(), torch.randn(13, 4, 3).double()
    w = torch.rand(13).double()
    loss = ll.losses.BinaryCrossentropy(from_logits=True)
    expected, by_class = loss.tally(y, p, w, by="sample"), loss.tally(y, p, w, by="class")
    large()
    by = AndSamples("class")
    found, _ = loss.backprop(y, p, w, by=by)
    same(found, by_class)
    groups, batch = by.taken[loss.name]
    assert close(groups.numerator, expected.groups.numerator) and close(groups.weight, expected.groups.weight)
    assert len(batch.prediction.raw) == 13


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_elements_of_parts_that_are_not_finite_are_counted(bad, large):
    y, p = torch.zeros(13, 4, 3), torch.randn(13, 4, 3)
    p[2, 1, 1] = p[12, 3, 0] = bad
    loss = ll.losses.MeanSquaredError()
    large()
    assert int(loss.backprop(y, p)[0].nonfinite) == 2


def test_losses_that_share_an_output_share_its_activations(large):
    y, p = (torch.rand(13, 4, 3) < 0.4).double(), torch.randn(13, 4, 3).double()
    binary, dice = ll.losses.BinaryCrossentropy(from_logits=True), ll.losses.Dice(from_logits="sigmoid")
    output = p.clone().requires_grad_()
    objective = ll.Objective(binary + dice)
    objective(y, output).backward()
    large()
    found = objective.backprop(y, p.clone().requires_grad_())
    assert close(found.gradients[0], output.grad)


def test_targets_and_outputs_of_the_caller_stay_as_they_are(large):
    large()
    for loss, y in (
        (ll.losses.BinaryCrossentropy(from_logits=True), (torch.rand(13, 4, 3) < 0.4).double()),
        (ll.losses.CategoricalCrossentropy(from_logits=True), torch.eye(3).double()[torch.randint(3, (13, 4))]),
        (ll.losses.SparseCategoricalCrossentropy(from_logits=True), torch.randint(3, (13, 4))),
        (ll.losses.MeanSquaredError(), torch.randn(13, 4, 3).double()),
    ):
        p, w, m = torch.randn(13, 4, 3).double(), torch.rand(13, 4).double(), torch.rand(13, 4) < 0.7
        before = [t.clone() for t in (y, p, w, m)]
        for given in ((None, None), (w, None), (None, m), (w, m)):
            loss.backprop(y, p, *given, by="class")
        assert all(torch.equal(a, b) for a, b in zip(before, (y, p, w, m), strict=True))


def test_outputs_with_gaps_in_memory(large):
    p = torch.randn(13, 3, 4).double().movedim(1, 2)
    y = (torch.rand(13, 3, 4) < 0.4).double().movedim(1, 2)
    m = torch.rand(13, 4) < 0.7
    large()
    for loss in (ll.losses.BinaryCrossentropy(from_logits=True), ll.losses.CategoricalCrossentropy(from_logits=True)):
        one, other = (loss.backprop(a, b, mask=m, by="class") for a, b in ((y, p), (y.contiguous(), p.contiguous())))
        assert close(one[1], other[1])
        same(one[0], other[0])


def test_sums_of_columns_are_as_exact_as_those_of_torch():
    x = torch.rand(64 * 4096, 3)
    exact = x.double().sum(0)
    error = (column_sums(x).double() - exact).abs() / exact
    assert float(error.max()) < 1e-6
    assert column_sums(x[:-1]).shape == (3,)


def test_confident_elements_keep_their_precision():
    """Torch's own formula takes the difference of two large numbers where a class is rightly held to be absent."""
    z = torch.linspace(-30, 30, 2**15).reshape(-1, 1)
    y = (z > 0).float()
    tally, _ = ll.losses.BinaryCrossentropy(from_logits=True).backprop(y, z, by="sample")
    exact = z.abs().neg().double().exp().log1p()
    assert float(((tally.groups.numerator[:, None].double() - exact) / exact).abs().max()) < 1e-5


def test_buffers_made_in_inference_mode_serve_outside_of_it(large):
    y, p = (torch.rand(13, 4, 3) < 0.4).double(), torch.randn(13, 4, 3).double()
    loss = ll.losses.BinaryCrossentropy(from_logits=True)
    expected = loss.backprop(y, p)[1]
    large()
    backward._KEPT.scratch = None
    with torch.inference_mode():
        loss.backprop(y, p)
    assert close(loss.backprop(y, p)[1], expected)


def test_results_do_not_lie_in_buffers_that_are_used_again(large):
    y, p = (torch.rand(13, 4, 3) < 0.4).double(), torch.randn(13, 4, 3).double()
    w = torch.rand(13).double()
    large()
    for by in (None, "class", "sample", AndSamples("class")):
        loss = ll.losses.BinaryCrossentropy(from_logits=True)
        tally, gradient = loss.backprop(y, p, w, by=by)
        kept = [gradient.clone(), tally.numerator.clone()]
        kept += [] if tally.groups is None else [tally.groups.numerator.clone(), tally.groups.weight.clone()]
        loss.backprop(1 - y, -3 * p, by=by)
        after = [gradient, tally.numerator]
        after += [] if tally.groups is None else [tally.groups.numerator, tally.groups.weight]
        assert all(map(torch.equal, kept, after))


@pytest.mark.parametrize("shape", [(13, 4, 3), (200, 70), (7, 1)])
def test_what_is_not_chosen_becomes_zero_whatever_it_holds(shape, large, monkeypatch):
    monkeypatch.setattr(values, "_SLICE", 40)
    large()
    mask = torch.rand(*shape[:-1], 1) < 0.5
    for dtype in (torch.float32, torch.float64, torch.float16):
        one, other = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        dirty = torch.where(mask, one, float("nan"))
        for given in (mask, mask.expand(shape), mask[:1]):
            found = zeroed(given, [one, other])
            assert torch.equal(found[0], torch.where(given, one, 0.0))
            assert torch.equal(found[1], torch.where(given, other, 0.0))
        assert torch.equal(zeroed(mask, [dirty])[0], torch.where(mask, one, 0.0))


def test_the_first_of_equal_targets_is_the_label():
    y = torch.zeros(2**13, 4)
    y[1, 2:] = 0.5
    y[2, 3] = float("nan")
    assert torch.equal(values.largest(y), y.argmax(-1)) and values.largest(y)[:3].tolist() == [0, 2, 3]


# --- what masked elements hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("where", ["targets", "outputs", "weights"])
@pytest.mark.parametrize("columns", [1, 3, 70])
@pytest.mark.parametrize("classes", [False, True])
def test_what_is_masked_in_unequal_parts_has_no_influence(poison, where, columns, classes, large):
    """17 samples, 29 entries each: no number of entries divides them, one part has nothing but masked entries."""
    y, p = (torch.rand(17, 29, columns) < 0.4).double(), torch.randn(17, 29, columns).double()
    w, m = torch.rand(17, 29).double(), torch.rand(17, 29) < 0.7
    m[3:5] = False
    vector = torch.rand(max(columns, 2)).tolist() if classes else None
    objective = ll.Objective(ll.losses.BinaryCrossentropy(from_logits=True), class_weight=vector)
    clean = [torch.where(m.unsqueeze(-1), v, 0.0) for v in (y, p)]
    plain = objective.backprop(*[v.requires_grad_(i == 1) for i, v in enumerate(clean)], w, m)
    dirty = {"targets": y, "outputs": p, "weights": w}
    dirty[where][~m] = poison
    large()
    found = objective.backprop(y, p.requires_grad_(), w, m)
    assert close(found.gradients[0], plain.gradients[0])
    same(found.tallies["binary_crossentropy"], plain.tallies["binary_crossentropy"])
    assert not found.gradients[0][~m].any() and int(found.tallies["binary_crossentropy"].nonfinite) == 0


@pytest.mark.parametrize("given", ["weights", "mask", "both"])
def test_a_batch_that_is_masked_whole_is_0(given, large):
    y, p = (torch.rand(13, 4, 3) < 0.4).double(), torch.randn(13, 4, 3).double()
    w, m = torch.rand(13, 4).double(), torch.zeros(13, 4, dtype=torch.bool)
    w, m = (None if given == "mask" else w, m) if given != "weights" else (torch.zeros_like(w), None)
    large()
    tally, gradient = ll.losses.BinaryCrossentropy(from_logits=True).backprop(y, p, w, m, by="class")
    assert float(tally.value) == 0 and not gradient.any() and float(tally.weight) == 0
    assert int(tally.count) == (0 if m is not None else y.numel())


@pytest.mark.parametrize("shape", [(13,), (13, 1), (13, 4), (13, 1, 1), (13, 4, 1), (13, 4, 3)])
@pytest.mark.parametrize("what", ["sample_weight", "mask"])
def test_weights_and_masks_of_fewer_axes(shape, what, large):
    y, p = (torch.rand(13, 4, 3) < 0.4).double(), torch.randn(13, 4, 3).double().requires_grad_()
    value = torch.rand(shape).double() if what == "sample_weight" else torch.rand(shape) < 0.6
    objective = ll.Objective(ll.losses.BinaryCrossentropy(from_logits=True), class_weight=[1.0, 2.0, 0.0])
    plain = objective.backprop(y, p, **{what: value})
    large()
    found = objective.backprop(y, p, **{what: value})
    assert close(found.gradients[0], plain.gradients[0])
    same(found.tallies["binary_crossentropy"], plain.tallies["binary_crossentropy"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("one_hot", [False, True])
def test_what_counts_and_is_not_finite_stays_where_it_is(bad, one_hot, large):
    """As without parts: neighbours of an entry that is not finite keep their gradients."""
    y, p = torch.randint(3, (13, 4)), torch.randn(13, 4, 3).double()
    m = torch.rand(13, 4) < 0.7
    m[2, 1] = True
    p[2, 1, 1] = bad
    labels = torch.eye(3).double()[y]
    exclusive = ll.losses.CategoricalCrossentropy if one_hot else ll.losses.SparseCategoricalCrossentropy
    problems = [(exclusive(from_logits=True), labels if one_hot else y)]
    problems += [(ll.losses.BinaryCrossentropy(from_logits=True), labels)]
    plain = [loss.backprop(true, p, mask=m, by="class") for loss, true in problems]
    large()
    for (loss, true), (tally, gradient) in zip(problems, plain, strict=True):
        found, pulled = ll.Objective(loss).terms[0].loss.backprop(true, p, mask=m, by="class")
        assert torch.allclose(pulled, gradient, equal_nan=True) and int(found.nonfinite) == int(tally.nonfinite)


@pytest.mark.parametrize("kind", ["binary", "labels", "one-hot"])
@pytest.mark.parametrize("holds", ["numbers", "NaN"])
def test_what_is_masked_is_made_safe_where_it_must_be(kind, holds, large, monkeypatch):
    """Once a part had to be, the following ones are so at once."""
    y, p, m = torch.randint(3, (13, 4)), torch.randn(13, 4, 3).double(), torch.rand(13, 4) < 0.7
    m[0, 0] = m[12, 3] = False
    exclusive = ll.losses.CategoricalCrossentropy if kind == "one-hot" else ll.losses.SparseCategoricalCrossentropy
    loss = (ll.losses.BinaryCrossentropy if kind == "binary" else exclusive)(from_logits=True)
    if holds == "NaN":
        p[~m] = float("nan")
    calls = {name: [] for name in ("_slopes", "_safe")}
    for name, seen in calls.items():
        original = getattr(type(loss), name)

        def counted(self, *given, original=original, seen=seen):
            seen.append(len(given))
            return original(self, *given)

        monkeypatch.setattr(type(loss), name, counted)
    large()
    monkeypatch.setattr(backward, "PART", 39)
    batch = loss.align(y if kind == "labels" else torch.eye(3).double()[y], p, mask=m, checked=True)
    loss.backprop_aligned(batch, None, 1.0, "class")
    tries, safe = len(calls["_slopes"]), len(calls["_safe"])
    assert (safe == 0 and tries > 1) if holds == "numbers" else safe == tries - 1 > 1


@pytest.mark.parametrize("by", [None, "class", "column", "sample", AndSamples("class")])
@pytest.mark.parametrize("reproducible", [False, True])
def test_several_terms_of_one_masked_output(by, reproducible, large):
    """One that is calculated with whatever masked elements hold, one that is not, and a ratio."""
    y, p = (torch.rand(13, 4, 3) < 0.4).double(), torch.randn(13, 4, 3).double().requires_grad_()
    w, m = torch.rand(13).double(), torch.rand(13, 4) < 0.7
    binary, focal = ll.losses.BinaryCrossentropy(from_logits=True), ll.losses.BinaryFocalCrossentropy(from_logits=True)
    loss = binary + 0.5 * focal + ll.losses.Dice(from_logits="sigmoid", axis=(1, 2))
    objective = ll.Objective(loss, class_weight=[1.0, 2.0, 3.0], reproducible=reproducible)
    kind = by if by != "column" or not reproducible else None
    plain = objective.backprop(y, p, w, m, kind)
    y[~m] = float("nan")
    with torch.no_grad():
        p[~m] = float("inf")
    large()
    found = objective.backprop(y, p, w, m, kind)
    assert close(found.gradients[0], plain.gradients[0])
    for name, tally in plain.tallies.items():
        assert close(found.tallies[name].value, tally.value) and close(found.tallies[name].count, tally.count)


def test_masked_elements_are_replaced_when_they_are_read_and_not_before(large):
    y, p, m = torch.rand(13, 4, 3), torch.full((13, 4, 3), float("nan")), torch.zeros(13, 4, dtype=torch.bool)
    loss = ll.losses.BinaryCrossentropy(from_logits=True)
    large()
    batch = loss.align(y, p, mask=m, checked=True)
    assert batch.given.prediction.raw is p and batch.given.y_true is y
    assert not batch.prediction.raw.any() and not batch.y_true.any() and batch.prediction is batch.prediction
    with pytest.raises(AttributeError):
        _ = batch.nothing


# --- what large batches cost, by count -------------------------------------------------------------------------------


def exclusive(one_hot):
    labels = torch.randint(1000, (2, 1024))
    if one_hot:
        return ll.losses.CategoricalCrossentropy(from_logits=True), torch.eye(1000)[labels]
    return ll.losses.SparseCategoricalCrossentropy(from_logits=True), labels


def problem(kind):
    if kind == "binary":
        return ll.losses.BinaryCrossentropy(from_logits=True), (torch.rand(64, 128, 64, 4) < 0.2).float()
    return exclusive(kind == "one-hot")


@pytest.mark.parametrize("kind", ["binary", "labels", "one-hot"])
@pytest.mark.parametrize("given", ["nothing", "everything"])
def test_large_batches_hold_the_gradient_and_little_else(kind, given):
    """In numbers of the output; torch's own losses hold two (binary) or three of them, without weights or masks."""
    loss, y = problem(kind)
    shape = y.shape if kind != "labels" else (*y.shape, 1000)
    p = torch.randn(shape).requires_grad_()
    w, m = torch.rand(shape[:-1]), torch.rand(shape[:-1]) < 0.9
    everything = given == "everything"
    objective = ll.Objective(loss, class_weight=torch.rand(shape[-1]).tolist() if everything else None)
    backward._KEPT.scratch = None
    with Held() as held:
        objective.backprop(y, p, *((w, m) if everything else ()), by="class")
    assert held.most <= p.numel() * 4 + 8 * backward.PART * 4


@pytest.mark.parametrize(("given", "calls", "passes"), COSTS)
def test_operations_and_passes_of_a_large_batch(given, calls, passes):
    """Of the U-Net's output, 16 × 64 × 64 × 5, by class; passes are bytes read and written, in outputs."""
    y, p = (torch.rand(16, 64, 64, 5) < 0.2).float(), torch.randn(16, 64, 64, 5, requires_grad=True)
    w = torch.rand(16, 64, 64) if given in ("weights", "everything") else None
    m = torch.rand(16, 64, 64) < 0.9 if given in ("mask", "everything") else None
    classes = [1.0, 2.0, 3.0, 4.0, 5.0] if given == "everything" else None
    objective = ll.Objective(ll.losses.BinaryCrossentropy(from_logits=True), class_weight=classes)
    objective.backprop(y, p, w, m)
    with Moved() as moved:
        objective.backprop(y, p, w, m)
    assert moved.calls <= calls and moved.bytes <= passes * p.numel() * 4, (moved.calls, moved.bytes / p.numel() / 4)
