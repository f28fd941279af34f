"""Divisors of your own: positives in the targets, a count given with each sample; and weights of classes and steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lossledger as ll
from lossledger.errors import InputError, InputTypeError

L = ll.losses


def positive_anchors(weighting, y_true):
    """Anchors of any class; masked ones have the target 0."""
    return (y_true.amax(-1) > 0.5).sum()


def focal(reduction):
    return L.BinaryFocalCrossentropy(True, 0.25, 2.0, from_logits=True, reduction=reduction)


ANCHORS = ll.Reduction("positive_anchors", positive_anchors)


def detections(seed, images=6, anchors=7, classes=3):
    """Targets, logits, a weight for each image, and a mask of the anchors that are neither object nor background."""
    rng = np.random.default_rng(seed)
    y = np.eye(classes)[rng.integers(0, classes, (images, anchors))] * (rng.random((images, anchors, 1)) < 0.3)
    y[0] = 0  # an image without objects
    return y, rng.normal(0, 2, (images, anchors, classes)), rng.uniform(0.3, 2, images), rng.random(y.shape[:2]) < 0.7


def retinanet(y, z, w, m):
    """Σ over images, anchors and classes of the focal loss, divided by the anchors that have an object."""
    total, positives = 0.0, 0
    for b, a in np.ndindex(y.shape[:2]):
        if not m[b, a]:
            continue
        positives += int(y[b, a].max() > 0.5)
        for c in range(y.shape[2]):
            p = 1 / (1 + math.exp(-z[b, a, c]))
            p_t, alpha = (p, 0.25) if y[b, a, c] == 1 else (1 - p, 0.75)
            total -= w[b] * alpha * (1 - p_t) ** 2 * math.log(p_t)
    return total / positives if positives else 0.0


def tensors(*arrays):
    return [torch.as_tensor(a) for a in arrays]


# --- the divisor is in the targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_focal_loss_over_the_positive_anchors(seed):
    y, z, w, m = detections(seed)
    value = focal(ANCHORS)(*tensors(y, z, w, m))
    assert float(value) == pytest.approx(retinanet(y, z, w, m), rel=1e-11)


@given(st.integers(0, 2**32 - 1))
def test_unequal_parts_add_up_with_value_and_gradient(seed):
    arrays = tensors(*detections(seed))
    loss = focal(ANCHORS)
    whole, gradient = loss.backprop(*arrays)
    cuts = [0, *sorted(np.random.default_rng(seed).integers(0, 7, 2)), 6]
    parts = [[a[s:e] for a in arrays] for s, e in itertools.pairwise(cuts) if e > s]
    window = sum(loss.tally(*part) for part in parts)
    assert float(window.value) == pytest.approx(float(whole.value), rel=1e-12)
    split = torch.cat([loss.backprop(*part, window=window)[1] for part in parts])
    torch.testing.assert_close(split, gradient, rtol=1e-11, atol=1e-14)
    # Means of parts are another number: the first image has no object at all.
    assert window.form == "linear"


def test_the_divisor_is_known_before_the_model_has_run():
    y, z, w, m = tensors(*detections(2))
    loss = focal(ANCHORS)
    known = loss.divisor_aligned(loss.align(y, torch.zeros_like(z), w, m))
    assert int(known.divisor) == int(loss.tally(y, z, w, m).divisor) == int(((y.amax(-1) > 0) & m).sum()) > 0


def test_an_empty_divisor_gives_zero_with_zero_gradient():
    """Images without objects say nothing here; dividing by max(1, n), as some detectors do, would not add up."""
    y, z, w, _ = tensors(*detections(1))
    empty = torch.zeros_like(y)
    tally, gradient = focal(ANCHORS).backprop(empty, z, w)
    assert float(tally.numerator) > 0 and float(tally.value) == 0 and not gradient.any()
    leaf = z.clone().requires_grad_()
    focal(ANCHORS)(empty, leaf, w).backward()
    assert not leaf.grad.any()
    # Beside images with objects they count in full.
    both = focal(ANCHORS).tally(torch.cat((empty, y)), torch.cat((z, z)), torch.cat((w, w)))
    alone = focal(ANCHORS).tally(y, z, w)
    assert float((tally + alone).value) == pytest.approx(float(both.value), rel=1e-12)
    assert float(both.value) > float(alone.value)


def test_masked_targets_are_zero_for_the_divisor_whatever_they_hold():
    y, z, w, m = tensors(*detections(3))
    clean = focal(ANCHORS).tally(y, z, w, m)
    y[~m], z[~m] = math.nan, math.inf
    dirty, gradient = focal(ANCHORS).backprop(y, z, w, m)
    assert float(dirty.value) == float(clean.value) and torch.isfinite(gradient).all()


def test_labels_of_a_sparse_loss_divide():
    """Class 0 is the background."""
    foreground = ll.Reduction("foreground", lambda weighting, y_true: (y_true > 0).sum())
    loss = L.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, reduction=foreground)
    labels, z = torch.tensor([[0, 2, 1, -1]]), torch.zeros(1, 4, 3, dtype=torch.float64)
    assert float(loss(labels, z)) == pytest.approx(3 * math.log(3) / 2, rel=1e-12)
    assert float(loss(labels, z, mask=[[1, 1, 0, 1]])) == pytest.approx(2 * math.log(3), rel=1e-12)


def test_groups_of_a_divisor_of_your_own_balance():
    arrays = tensors(*detections(5))
    for by in ("class", "sample", "column"):
        tally = focal(ANCHORS).tally(*arrays, by=by)
        assert float(tally.contributions().sum()) == pytest.approx(float(tally.value), rel=1e-12)


def test_the_divisor_in_fit_and_evaluate():
    """History and evaluate give the loss of the whole data over its objects, whatever the batch size."""
    y, z, _, _ = detections(6, images=10)
    x, targets = tensors(z, y)
    net = nn.Linear(3, 3).double()
    model = ll.Model(net)
    model.compile(optimizer="sgd", loss=focal(ANCHORS))
    expected = retinanet(y, net(x).detach().numpy(), np.ones(10), np.ones(y.shape[:2], bool))
    for size in (3, 4, 10):
        assert float(model.evaluate(x, targets, batch_size=size, verbose=0)) == pytest.approx(expected, rel=1e-9)


# --- a count that the data gives with each sample ------------------------------------------------------------------


class BoxError(L.Loss):
    """Absolute error of K boxes an image; the last column of the target is how many boxes the image counts."""

    def call(self, y_true, y_pred):
        return (y_true[..., :-1] - y_pred).abs().sum(-1)


COUNTS = ll.Reduction("boxes", lambda weighting, y_true: y_true[..., -1].sum())


@given(st.integers(0, 2**32 - 1))
def test_a_count_given_per_sample_divides(seed):
    rng = np.random.default_rng(seed)
    y, p = rng.normal(size=(6, 5)), rng.normal(size=(6, 4))
    y[:, -1] = rng.integers(0, 4, 6)
    y[0, -1] = 3
    w, m = rng.uniform(0.2, 2, 6), rng.random(6) < 0.7
    m[0] = True
    loss = BoxError(reduction=COUNTS)
    total = sum(w[b] * np.abs(y[b, :-1] - p[b]).sum() for b in range(6) if m[b])
    arrays = tensors(y, p, w, m)
    whole, gradient = loss.backprop(*arrays)
    assert float(whole.value) == pytest.approx(total / sum(y[b, -1] for b in range(6) if m[b]), rel=1e-11)
    parts = [[a[s] for a in arrays] for s in (slice(0, 1), slice(1, 6))]
    window = sum(loss.tally(*part) for part in parts)
    assert float(window.value) == pytest.approx(float(whole.value), rel=1e-12)
    split = torch.cat([loss.backprop(*part, window=window)[1] for part in parts])
    torch.testing.assert_close(split, gradient, rtol=1e-11, atol=1e-14)
    none = y.copy()
    none[:, -1] = 0
    empty, still = loss.backprop(*tensors(none, p, w, m))
    assert float(empty.value) == 0 and not still.any()


def test_statistics_of_one_argument_read_the_weighting():
    per_row = ll.Reduction("rows", lambda weighting: weighting.shape[0])
    assert float(L.MeanSquaredError(reduction=per_row)([[0.0, 0.0]], [[1.0, 3.0]])) == 10.0
    weights = ll.Reduction("weights", lambda weighting, _: weighting.total_weight())
    same = L.MeanSquaredError(reduction="mean_with_sample_weight")
    y, p, w = [[0.0], [0.0]], [[1.0], [2.0]], [0.5, 1.0]
    assert float(L.MeanSquaredError(reduction=weights)(y, p, w)) == float(same(y, p, w))


@pytest.mark.parametrize("statistic", [3, "count", lambda: 1, lambda a, b, c: 1])
def test_a_statistic_that_cannot_be_one_is_refused(statistic):
    with pytest.raises(InputTypeError, match=r"'mine'.*weighting and the targets"):
        ll.Reduction("mine", statistic)


# --- class weights on every output, with weights of samples and steps ---------------------------------------------

STEPS, NAMES = 4, ("cat", "dog", "emu")
CLASS_WEIGHTS = {
    "index": ({1: 3.0, 2: 0.5}, [1.0, 3.0, 0.5]),
    "name": ({"dog": 3.0, "emu": 0.5}, [1.0, 3.0, 0.5]),
    "list": ([2.0, 3.0, 0.5], [2.0, 3.0, 0.5]),
}
SAMPLE_WEIGHTS = {"none": None, "sample": (5,), "step": (5, STEPS)}


def outputs(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (5, STEPS))
    y = {"mask": (rng.random((5, STEPS, 3)) < 0.4) * 1.0, "label": labels, "soft": np.eye(3)[labels]}
    return y, {name: rng.normal(0, 1, (5, STEPS, 3)) for name in y}


def entry(name, y, z):
    """The loss of one step, as a list of one number a class that its class weight multiplies."""
    if name == "mask":
        return [(math.log1p(math.exp(v)) - t * v) / 3 for t, v in zip(y, z, strict=True)]
    label = int(y) if name == "label" else int(np.argmax(y))
    return [math.log(sum(math.exp(v) for v in z)) - z[k] if k == label else 0.0 for k in range(3)]


@pytest.mark.parametrize("how", CLASS_WEIGHTS)
@pytest.mark.parametrize("weight_shape", SAMPLE_WEIGHTS.values(), ids=SAMPLE_WEIGHTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["mask", "label", "soft", "all"])
def test_class_weights_multiply_weights_of_samples_and_steps(how, weight_shape, masked, where):
    y, z = outputs(3)
    given_, vector = CLASS_WEIGHTS[how]
    chosen = list(y) if where == "all" else [where]
    rng = np.random.default_rng(9)
    w = None if weight_shape is None else rng.uniform(0.2, 2, weight_shape)
    m = rng.random((5, STEPS)) < 0.7 if masked else None
    losses = {
        "mask": L.BinaryCrossentropy(from_logits=True),
        "label": L.SparseCategoricalCrossentropy(from_logits=True),
        "soft": L.CategoricalCrossentropy(from_logits=True),
    }
    objective = ll.Objective(losses, class_weight=dict.fromkeys(chosen, given_), class_names=NAMES)
    breakdown = objective(
        {k: torch.as_tensor(v) for k, v in y.items()},
        {k: torch.as_tensor(v) for k, v in z.items()},
        sample_weight=None if w is None else torch.as_tensor(w),
        mask=None if m is None else torch.as_tensor(m),
    )
    for name, term in zip(y, breakdown.terms.values(), strict=True):
        classes, total, count = vector if name in chosen else [1.0] * 3, 0.0, 0
        for b, t in np.ndindex(5, STEPS):
            if m is None or m[b, t]:
                scale = 1.0 if w is None else w[b] if w.ndim == 1 else w[b, t]
                total += scale * sum(
                    c * v for c, v in zip(classes, entry(name, y[name][b, t], z[name][b, t]), strict=True)
                )
                count += 1
        assert float(term.value) == pytest.approx(total / count, rel=1e-11)


def test_class_weights_of_a_regression_output_are_refused_by_name():
    objective = ll.Objective({"size": "mse"}, class_weight={"size": {0: 2.0}})
    with pytest.raises(InputError, match=r"size/mean_squared_error.*class_weight needs classes"):
        objective({"size": torch.zeros(2, 1)}, {"size": torch.zeros(2, 1)})
