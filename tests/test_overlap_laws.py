"""The laws of the overlap losses, over every loss × grouping × policies: values of the oracle, splits, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lossledger as ll
import oracles
from declarations import AXES, OVERLAPS
from lossledger.errors import InputError
from rows_overlap import NAMES, ROWS

L = ll.losses
seeds = st.integers(0, 2**32 - 1)
ratios = [row for row in ROWS if row.ratio]


def tensor(a):
    return None if a is None else torch.as_tensor(a)


def close(a, b, tolerance=1e-11):
    a, b = torch.as_tensor(a).detach(), torch.as_tensor(b).detach()
    return float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1)


def case(seed, samples=5):
    """Masks [B, 4, 3] in which classes are absent from samples, and the last class from all but the last sample."""
    rng = np.random.default_rng(seed)
    y = (rng.random((samples, 4, 3)) < 0.5).astype(float)
    y *= rng.random((samples, 1, 3)) < 0.7
    y[:-1, :, 2] = 0
    y[-1, 0, 2] = 1
    z = rng.normal(0, 1.5, (samples, 4, 3))
    return y, z, rng.uniform(0.3, 2, (samples, 4)), rng.random((samples, 4)) < 0.7


def tally_of(loss, y, z, w=None, m=None, c=None, by=None):
    batch = loss.align(tensor(y), tensor(z), tensor(w), tensor(m), class_weight=c)
    return loss.tally_aligned(batch, by), batch


def autograd(loss, y, z, w=None, m=None, c=None):
    prediction = torch.as_tensor(z).clone().requires_grad_()
    tally, _ = tally_of(loss, y, prediction, w, m, c)
    (gradient,) = torch.autograd.grad(tally.value, prediction)
    return tally.value.detach(), gradient


VECTOR = [1.0, 3.0, 0.5]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_value_is_that_of_the_oracle(row):
    y, z, w, m = case(3)
    m[1] = False
    loss, p = row.make(from_logits="sigmoid"), oracles.sigmoid(z)
    for weight in (None, w, w[:, 0]):
        for mask in (None, m):
            for vector in (None, VECTOR):
                value = tally_of(loss, y, z, weight, mask, vector)[0].value
                assert abs(float(value) - row.value(y, p, weight, mask, vector)) < 1e-9
    without = [i for i in range(len(y)) if m[i].any()]
    if not row.ratio:
        values = row.make(from_logits="sigmoid", reduction="none")(tensor(y), tensor(z), mask=tensor(m))
        assert abs(float(values.sum()) - row.value(y[without], p[without], None, m[without]) * _cells(row, y, m)) < 1e-9


def _cells(row, y, m):
    """How many cells the mean of a loss by sample divides by."""
    loss = row.make(from_logits="sigmoid")
    divisor = loss.divisor_aligned(loss.align(tensor(y), tensor(np.zeros_like(y)), None, tensor(m))).divisor
    return float(divisor) / (3 if row.name.startswith("generalized") else 1)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_gradient(row):
    """Autograd agrees with differences, the closed form with autograd."""
    y, z, w, m = case(4, samples=3)
    loss = row.make(from_logits="softmax")
    prediction = torch.as_tensor(z).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: tally_of(loss, y, q, w, m, VECTOR)[0].value, (prediction,))
    for weight, vector in ((w, None), (w[:, 0], VECTOR)):
        value, gradient = autograd(loss, y, z, weight, m, vector)
        tally, closed = loss.backprop_aligned(tally_of(loss, y, z, weight, m, vector)[1], None, 1.0)
        assert close(tally.value, value) and close(closed, gradient)
        assert not torch.as_tensor(tally.numerator).requires_grad


def small_objects(seed):
    """Objects of 4 pixels in pictures of 400, hardly found: nearly all of the divisor is wrong. Exact in float32."""
    rng = np.random.default_rng(seed)
    y = np.zeros((6, 400, 3), dtype=np.float32)
    y[:, :4] = 1
    return y, rng.normal(0, 1, y.shape).astype(np.float32)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_float32_gradient_of_small_objects(row):
    """What all pixels of a kind are pulled by is off by rounding alone: it is multiplied by the size of the picture."""
    loss = row.make(from_logits="sigmoid")
    y, z = small_objects(15)
    exact = loss.backprop(tensor(y).double(), tensor(z).double())[1]
    leaf = tensor(z).requires_grad_()
    value = loss(tensor(y), leaf)
    value.backward()
    tally, closed = loss.backprop(tensor(y), tensor(z))
    assert value.dtype == closed.dtype == torch.float32
    assert abs(float(value.detach()) - float(tally.value)) <= 1e-7 * abs(float(value.detach()))
    for gradient in (closed, leaf.grad):
        for kind in (y == 0, y == 1):
            off = (gradient.double() - exact)[torch.as_tensor(kind)].sum()
            assert float(off.abs()) <= 5e-7 * float(exact[torch.as_tensor(kind)].abs().sum())


@given(st.sampled_from(ROWS), seeds, st.booleans(), st.booleans())
def test_unequal_parts_add_up(row, seed, class_weights, by_entry):
    """Parts of 1, 2 and 3 samples, whose classes are absent from some: one value, one gradient, one set of groups."""
    y, z, w, m = case(seed, samples=6)
    w = w if by_entry else w[:, 0]
    loss, vector = row.make(from_logits="sigmoid"), VECTOR if class_weights else None
    whole, batch = tally_of(loss, y, z, w, m, vector)
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    pieces = [tally_of(loss, y[s], z[s], w[s], m[s], vector) for s in parts]
    total = sum(t for t, _ in pieces)
    assert close(total.value, whole.value)
    _, gradient = loss.backprop_aligned(batch, None, 1.0)
    split = [loss.backprop_aligned(b, total, 1.0)[1] for _, b in pieces]
    assert close(torch.cat(split), gradient)
    grouped = [tally_of(loss, y[s], z[s], w[s], m[s], vector, "class")[0] for s in parts]
    contributions = sum(grouped).contributions()
    assert close(contributions, tally_of(loss, y, z, w, m, vector, "class")[0].contributions())
    assert close(contributions.sum(), whole.value)
    assert int(sum(grouped).count) == int(whole.count)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_groups_by_sample_balance(row):
    y, z, w, m = case(6)
    loss = row.make(from_logits="sigmoid")
    tally, _ = tally_of(loss, y, z, w, m, VECTOR, "sample")
    assert close(tally.contributions().sum(), tally.value)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_entries_reach_neither_value_nor_gradient(row, poison):
    y, z, w, m = case(7)
    m[1] = False
    loss = row.make(from_logits="softmax")
    clean, gradient = autograd(loss, y, z, w, m)
    y, z, w = y.copy(), z.copy(), w.copy()
    y[~m], z[~m], w[~m] = poison, poison, poison
    dirty, found = autograd(loss, y, z, w, m)
    assert close(dirty, clean) and close(found, gradient) and torch.isfinite(found).all()
    tally, closed = loss.backprop_aligned(tally_of(loss, y, z, w, m)[1], None, 1.0)
    assert close(closed, gradient) and int(tally.nonfinite) == 0


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_all_masked_is_zero_with_zero_gradient(row):
    y, z, w, m = case(8)
    value, gradient = autograd(row.make(from_logits="sigmoid"), y, z, w, np.zeros_like(m))
    assert float(value) == 0 and not gradient.any()


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_order_of_samples_does_not_matter(row):
    y, z, w, m = case(9)
    loss, order = row.make(from_logits="sigmoid"), np.array([3, 0, 4, 1, 2])
    a = tally_of(loss, y, z, w, m)[0].value
    assert close(a, tally_of(loss, y[order], z[order], w[order], m[order])[0].value)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_configuration_round_trip(row):
    loss = row.make(from_logits="sigmoid", reduction="sum")
    again = L.deserialize(L.serialize(loss))
    assert again.get_config() == loss.get_config() and repr(again) == repr(loss)
    y, z, w, m = case(10)
    assert float(again(*map(tensor, (y, z, w, m)))) == float(loss(*map(tensor, (y, z, w, m))))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_empty_target(row):
    """Against an empty prediction, and against pixels that are all found: finite, with a finite gradient."""
    y = np.zeros((2, 4, 3))
    loss = row.make()
    assert abs(float(loss(tensor(y), tensor(y))) - row.empty) < 1e-9
    full = y + 1.0
    expected = row.value(y, full)
    value, gradient = autograd(loss, y, full)
    assert abs(float(value) - expected) < 1e-9 and torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.name.endswith("-skip") or "-all-policies" in r.name], ids=lambda r: r.name
)
def test_sum_of_present_cells(row):
    """Absent cells are in neither the sum nor the mean."""
    y, z, _, _ = case(11)
    loss = row.make(from_logits="sigmoid", reduction="sum")
    mean = row.make(from_logits="sigmoid")
    first = 1 if not loss.include_background else 0
    shown = y[..., first:].any(1)
    cells = {"all": 1, "sample": shown.any(1).sum(), "class": shown.any(0).sum(), "sample_class": shown.sum()}
    ratio = float(loss(tensor(y), tensor(z))) / float(mean(tensor(y), tensor(z)))
    assert abs(ratio - cells[row.grouping]) < 1e-9


@pytest.mark.parametrize("row", ratios, ids=lambda r: r.name)
def test_statistics_survive_the_log_point(row):
    """What `fit` keeps: running sums in float64 on the host give the same value and contributions."""
    from lossledger.training.running import Running

    y, z, w, m = case(12, samples=4)
    loss, running = row.make(from_logits="sigmoid"), Running(torch.device("cpu"))
    whole, _ = tally_of(loss, y, z, w, m, VECTOR, "class")
    for s in (slice(0, 3), slice(3, 4)):
        running.add({"loss": tally_of(loss, y[s], z[s], w[s], m[s], VECTOR, "class")[0]})
    read = running.read()["loss"]
    assert abs(float(read.value) - float(whole.value)) < 1e-11
    assert close(np.asarray(read.contributions()), whole.contributions())


def test_presence_is_that_of_the_window():
    """A class that only the second part holds is present in the window, in both parts' gradients."""
    y, p = np.zeros((2, 2, 2)), np.full((2, 2, 2), 0.5)
    y[:, 0, 0] = 1
    y[1, 0, 1] = 1
    loss = L.Dice(grouping="class", absent="skip")
    parts = [tally_of(loss, y[s], p[s]) for s in (slice(0, 1), slice(1, 2))]
    alone, window = parts[0][0], parts[0][0] + parts[1][0]
    assert abs(float(alone.value) - 0.5) < 1e-6
    assert abs(float(window.value) - (0.5 + 2 / 3) / 2) < 1e-6
    _, gradient = loss.backprop_aligned(parts[0][1], window, 1.0)
    assert (gradient[..., 1] > 0).all()
    assert not loss.backprop_aligned(parts[0][1], alone, 1.0)[1][..., 1].any()


def test_background_is_read_by_the_softmax_only():
    y, z, _, _ = case(13)
    for space in (False, "sigmoid"):
        loss = L.Dice(grouping="class", include_background=False, from_logits=space)
        p = z if space else oracles.sigmoid(z)
        dirty = p.copy()
        dirty[..., 0] = np.nan
        assert float(loss(tensor(y), tensor(dirty), mask=tensor(np.ones((5, 4))))) == float(loss(tensor(y), tensor(p)))
    loss = L.Dice(grouping="class", include_background=False, from_logits="softmax")
    prediction = torch.as_tensor(z).requires_grad_()
    loss(tensor(y), prediction).backward()
    assert prediction.grad[..., 0].abs().max() > 0
    tally, _ = tally_of(loss, y, z, by="class")
    assert float(tally.contributions()[0]) == 0 and int(tally.groups.count[0]) == 0
    assert int(tally.count) == 5 * 4 * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: L.Dice(axis=(1,), grouping="class"), "grouping"),
        (lambda: L.Dice(grouping="batch"), "sample_class"),
        (lambda: L.Dice(absent="drop"), "absent"),
        (lambda: L.Dice(smooth=0.1, smooth_numerator=0.2), "smooth_numerator"),
        (lambda: L.Dice(smooth_numerator=-0.1), "smooth_numerator"),
        (lambda: L.Tversky(0.3, 0.7, squared=True), "alpha = beta"),
        (lambda: L.FocalTversky(gamma=0.0), "gamma"),
        (lambda: L.GeneralizedDice("cubed"), "square"),
        (lambda: L.GeneralizedDice(grouping="class"), "'all'"),
        (lambda: L.AsymmetricFocalTversky(delta=2.0), "delta"),
        (lambda: L.AsymmetricFocalTversky(gamma=1.0), "gamma"),
        (lambda: L.AsymmetricFocalTversky(grouping="all"), "sample_class"),
        (lambda: L.AsymmetricFocal(delta=-1.0), "delta"),
        (lambda: L.AsymmetricUnifiedFocal(weight=2.0), "weight"),
        (lambda: L.Dice(include_background=False)(np.zeros((2, 1)), np.zeros((2, 1))), "two columns"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_policies_are_named_and_come_after_those_of_keras():
    with pytest.raises(TypeError):
        L.Dice("mean", "dice", None, None, False, 1.0, "class")


def test_unified_focal_is_two_terms():
    """The books show both, and the configuration is that of their sum."""
    y, z, _, _ = case(14)
    y = np.eye(3)[y.argmax(-1)]
    loss = L.AsymmetricUnifiedFocal(0.25, delta=0.6, gamma=0.5, from_logits=True)
    breakdown = ll.Objective(loss)(tensor(y), tensor(z))
    p = oracles.softmax(z)
    cross = -y * np.log(np.clip(p, 1e-7, 1 - 1e-7))
    focal = (0.4 * (1 - p[..., 0]) ** 0.5 * cross[..., 0] + 0.6 * cross[..., 1:].sum(-1)).mean()
    tversky = next(r for r in ROWS if r.name == "asymmetric_focal_tversky-sample_class-keep").value(y, p)
    assert list(breakdown.terms) == ["asymmetric_focal", "asymmetric_focal_tversky"]
    assert abs(breakdown.value - (0.25 * focal + 0.75 * tversky)) < 1e-9
    again = L.deserialize(L.serialize(loss))
    assert float(again(tensor(y), tensor(z))) == float(loss(tensor(y), tensor(z)))
    assert [part.name for _, part in L.get("asymmetric_unified_focal").terms] == list(breakdown.terms)


# --- by axis, as in Keras -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
@pytest.mark.parametrize("space", [False, "sigmoid", "softmax"])
@pytest.mark.parametrize("weights", [False, True])
def test_overlap_value_and_gradient(name, axis, space, weights):
    make, coefficients = OVERLAPS[name]
    y, z, w, m = case(3)
    p = {False: oracles.sigmoid(z), "sigmoid": oracles.sigmoid(z), "softmax": oracles.softmax(z)}[space]
    given_ = p if space is False else z
    w, m = (w, m) if weights else (None, None)
    expected = oracles.overlap(
        y,
        p,
        *coefficients,
        axis,
        weight=None if w is None else w[..., None],
        mask=None if m is None else m[..., None],
    ).mean()
    loss = make(axis=axis, from_logits=space)
    value, gradient = autograd(loss, y, given_, w, m)
    assert abs(float(value) - expected) < 1e-9
    _, closed = loss.backprop(*map(tensor, (y, given_, w, m)))
    assert close(closed, gradient)
    prediction = torch.as_tensor(given_).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: loss(tensor(y), q, tensor(w), tensor(m)), (prediction,))


@given(
    st.sampled_from(list(OVERLAPS)),
    st.sampled_from(list(AXES.values())),
    seeds,
    st.booleans(),
)
def test_overlap_parts_add_up(name, axis, seed, class_weights):
    """Statistics of unequal parts add, and parts back-propagate with the statistics of the whole."""
    y, z, w, m = case(seed, samples=6)
    loss = OVERLAPS[name][0](axis=axis, from_logits="sigmoid")
    vector = [1.0, 3.0, 0.5] if class_weights else None

    def tally(s, by=None):
        batch = loss.align(*(tensor(a[s]) for a in (y, z, w, m)), class_weight=vector)
        return loss.tally_aligned(batch, by), batch

    whole, batch = tally(slice(0, 6))
    parts = [tally(s) for s in (slice(0, 1), slice(1, 3), slice(3, 6))]
    total = sum(t for t, _ in parts)
    assert close(total.value, whole.value)
    _, gradient = loss.backprop_aligned(batch, None, 1.0)
    pieces = [loss.backprop_aligned(b, total, 1.0)[1] for _, b in parts]
    assert close(torch.cat(pieces), gradient)
    for by in ("class", "sample"):
        if by == "sample" and axis is not None and 0 not in axis and 2 in axis:
            continue
        grouped, _ = tally(slice(0, 6), by)
        assert close(grouped.contributions().sum(), whole.value)


def test_overlap_with_class_weights_and_sample_weights():
    """A kept class axis multiplies the result, also beside sample weights; a reduced one enters the sums."""
    y, z, w, _ = case(5)
    p, c = oracles.sigmoid(z), np.array([1.0, 3.0, 0.5])
    kept = ll.losses.Dice(axis=(0, 1), from_logits="sigmoid").tally(*map(tensor, (y, z, w[:, 0])), class_weight=list(c))
    expected = (c * oracles.overlap(y, p, 2, 1, 1, (0, 1), weight=w[:, :1, None])).mean()
    assert abs(float(kept.value) - expected) < 1e-12
    pooled = ll.losses.Dice(from_logits="sigmoid").tally(*map(tensor, (y, z, w[:, 0])), class_weight=list(c))
    assert abs(float(pooled.value) - oracles.overlap(y, p, 2, 1, 1, None, weight=w[:, :1, None] * c)) < 1e-12


def test_sample_weights_of_one_batch_and_of_single_samples_agree():
    """A weight of 2 for every sample cancels in a ratio, whether the batch holds one sample or five."""
    y, z, _, _ = case(5)
    loss = ll.losses.Dice(from_logits="sigmoid")
    for samples in (1, 5):
        twos = np.full(samples, 2.0)
        a = float(loss(*map(tensor, (y[:samples], z[:samples], twos))))
        b = float(loss(*map(tensor, (y[:samples], z[:samples]))))
        assert abs(a - b) < 1e-7


def test_empty_target_and_prediction_has_no_dice_loss():
    assert float(ll.losses.Dice()(np.zeros((2, 3)), np.zeros((2, 3)))) == 0
