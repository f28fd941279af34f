"""What `samples=True` takes from a step: the same numbers in parts as at once, and few passes over the output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from held import Held
from moved import Moved

import lossledger as ll
from checks import close
from lossledger import values
from lossledger.batch import Batch
from lossledger.losses import backward
from lossledger.losses.groups import AndSamples
from lossledger.training.dynamics import measures
from lossledger.training.sampling import Sampling

L = ll.losses
SHAPE = (5, 8, 8, 3)
ROWS = ("numerator", "total", "count", "weight")

OVERLAPS = {
    "the batch": lambda: L.Dice(from_logits="sigmoid"),
    "by class": lambda: L.Dice(axis=(0, 1, 2), from_logits="sigmoid"),
    "squared": lambda: L.Dice(axis=(0, 1, 2), from_logits="sigmoid", squared=True),
    "Tversky": lambda: L.Tversky(alpha=0.3, beta=0.7, axis=(0, 1, 2)),
    "softmax, no background": lambda: L.Dice(grouping="class", from_logits="softmax", include_background=False),
    "focal": lambda: L.FocalTversky(grouping="class", from_logits="sigmoid"),
    "generalized": lambda: L.GeneralizedDice(grouping="all", from_logits="sigmoid"),
}
GIVEN = ("nothing", "mask", "weights", "everything")


def arrays(given: str, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(SHAPE, generator=g) < 0.3).double()
    p = torch.rand(SHAPE, generator=g).double() * 0.98 + 0.01
    w = torch.rand(SHAPE[:3], generator=g).double() + 0.5 if given in ("weights", "everything") else None
    m = torch.rand(SHAPE[:3], generator=g) < 0.7 if given in ("mask", "everything") else None
    if m is not None:
        m[2] = False
    return y, p, w, m, [0.5, 1.0, 2.0] if given == "everything" else None


@pytest.fixture(params=[1, 400, 10**6], ids=["a sample", "two samples", "whole"])
def large(request, monkeypatch):
    """Everything counts as large; how many numbers make a part."""
    monkeypatch.setattr(values, "LARGE", 1)
    monkeypatch.setattr(backward, "PART", request.param)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", OVERLAPS)
def test_samples_of_a_ratio_are_left_beside_its_classes(name, given, large, monkeypatch):
    y, p, w, m, classes = arrays(given)
    loss = OVERLAPS[name]()
    batch = loss.align(y, p, w, m, classes)
    by = AndSamples("class")
    found, gradient = loss.backprop_aligned(batch, None, 1.0, by)
    groups, whose = by.taken[loss.name]
    plain, other = loss.backprop_aligned(loss.align(y, p, w, m, classes), None, 1.0, "class")
    # Nothing changes because somebody looks.
    assert torch.equal(found.numerator, plain.numerator) and torch.equal(found.divisor, plain.divisor)
    assert torch.equal(gradient, other) and whose is batch
    monkeypatch.undo()
    expected = loss.tally_aligned(loss.align(y, p, w, m, classes), "sample")
    assert groups.keys == expected.groups.keys and groups.cell == expected.groups.cell
    for row in ROWS:
        assert close(getattr(groups, row).double(), getattr(expected.groups, row).double()), row
    by_class = loss.tally_aligned(loss.align(y, p, w, m, classes), "class")
    for row in ROWS:
        assert close(getattr(found.groups, row).double(), getattr(by_class.groups, row).double()), row
    assert close(found.value, expected.value) and int(found.count) == int(expected.count)


def test_short_samples_are_left_to_a_tally_of_their_own():
    y, p = (torch.rand(7, 3) < 0.4).double(), torch.rand(7, 3).double()
    by = AndSamples("class")
    L.Dice(axis=0).backprop(y, p, by=by)
    assert by.taken == {}


MEASURED = {
    "binary": lambda: L.BinaryCrossentropy(from_logits=True),
    "binary of probabilities": lambda: L.BinaryCrossentropy(),
    "hinge": lambda: L.Hinge(),
    "labels": lambda: L.SparseCategoricalCrossentropy(from_logits=True),
    "labels of probabilities": lambda: L.SparseCategoricalCrossentropy(),
    "one-hot": lambda: L.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", MEASURED)
def test_measures_in_parts_are_those_of_loops_in_numpy(name, given, large):
    y, p, w, m, _ = arrays(given, 1)
    logits = name in ("binary", "hinge", "labels", "one-hot")
    raw = (p * 6 - 3) if logits else p
    columns = name.startswith(("binary", "hinge"))
    if not columns:
        label = (p * 7919).long().sum(-1) % 3
        y = torch.nn.functional.one_hot(label, 3).double() if name == "one-hot" else label
    loss = MEASURED[name]()
    before = [raw.clone(), y.clone()]
    found = measures(loss, loss.align(y, raw, w, m))
    assert torch.equal(before[0], raw) and torch.equal(before[1], y)
    assert set(found) == {"margin", "correct"} | ({"confidence"} if name != "hinge" else set())
    for sample in range(SHAPE[0]):
        margins, confidences = [], []
        for place in np.ndindex(*SHAPE[1:3]):
            if m is not None and not m[sample][place]:
                continue
            z = raw[sample][place].numpy()
            if columns:
                z = z if logits else np.log(z / (1 - z))
                own = np.where(y[sample][place].numpy() > 0.5, z, -z)
                margins += own.tolist()
                confidences += (1 / (1 + np.exp(-own))).tolist()
                continue
            q = np.exp(z) / np.exp(z).sum() if logits else z / z.sum()
            true = int(label[sample][place])
            margins.append(np.log(q[true]) - np.log(np.delete(q, true)).max())
            confidences.append(q[true])
        expected = {"margin": margins, "correct": np.array(margins) > 0, "confidence": confidences}
        for kind, numbers in found.items():
            mean = np.mean(expected[kind]) if len(margins) else 0.0
            assert np.isclose(float(numbers[sample]), mean, rtol=1e-10 if kind != "correct" else 1e-6, atol=1e-12), kind


COLUMNS = {
    "binary": lambda: L.BinaryCrossentropy(from_logits=True),
    "by weight": lambda: L.BinaryCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
    "per sample": lambda: L.BinaryCrossentropy(from_logits=True, reduction="mean_per_sample"),
    "squared hinge": lambda: L.SquaredHinge(),
    "absolute error": lambda: L.MeanAbsoluteError(),
}


@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", COLUMNS)
def test_samples_beside_columns_change_nothing_and_are_those_of_a_tally(name, given, poison, large, monkeypatch):
    y, p, w, m, classes = arrays(given, 2)
    loss, clean = COLUMNS[name](), p.clone()
    classes = classes if loss.classes_are == "column" else None
    if poison is not None:
        if m is None:
            pytest.skip("nothing is masked")
        p[~m] = poison
    objective = ll.Objective(loss, class_weight=classes)
    pred = p.requires_grad_()
    plain = objective.backprop(y, pred, w, m, "class")
    sampling = Sampling(objective)
    found = objective.backprop(y, pred, w, m, sampling.by)
    by = sampling.by
    groups, batch = by.taken[loss.name]
    one, other = found.tallies[loss.name], plain.tallies[loss.name]
    # Larger samples take another way, of whole samples.
    if SHAPE[1] * SHAPE[2] * SHAPE[3] <= backward.PART:
        assert torch.equal(found.gradients[0], plain.gradients[0])
        assert torch.equal(one.numerator, other.numerator)
        assert torch.equal(one.groups.numerator, other.groups.numerator)
    assert close(found.gradients[0], plain.gradients[0])
    assert close(one.numerator, other.numerator) and close(one.groups.numerator, other.groups.numerator)
    seen = by.seen.get(loss.name)
    assert (seen is None) == (name == "absolute error")
    monkeypatch.undo()
    whole = loss.align(y, clean, w, m, classes)
    expected = loss.tally_aligned(whole, "sample").groups
    for row in ROWS:
        assert close(getattr(groups, row).double(), getattr(expected, row).double()), row
    assert groups.count.dtype == expected.count.dtype and groups.weight.dtype == expected.weight.dtype
    if seen is not None:
        told = measures(loss, batch, seen)
        for kind, numbers in measures(loss, whole).items():
            # Shares of small outputs are float32.
            assert torch.allclose(told[kind].double(), numbers.double(), rtol=1e-6 if kind == "correct" else 1e-12)


# --- what it costs, by count -----------------------------------------------------------------------------------------

# By what is given: operations that samples add to a step, and passes over the output.
COSTS = [("nothing", 54, 20), ("mask", 97, 29)]


@pytest.mark.parametrize(("given", "calls", "passes"), COSTS)
def test_operations_and_passes_that_samples_add_to_a_step(given, calls, passes):
    """Of the U-Net's output, 16 × 64 × 64 × 5, and two terms; passes are bytes read and written, in outputs."""
    y, p = (torch.rand(16, 64, 64, 5) < 0.2).float(), torch.randn(16, 64, 64, 5, requires_grad=True)
    m = torch.rand(16, 64, 64) < 0.9 if given == "mask" else None
    objective = ll.Objective(
        L.BinaryCrossentropy(from_logits=True) + L.Dice(axis=(0, 1, 2), from_logits="sigmoid"),
    )
    counts = []
    for samples in (False, True):
        sampling = Sampling(objective)

        def step(sampling=sampling, samples=samples):
            objective.backprop(y, p, None, m, sampling.by if samples else "class")
            if samples:
                sampling.collect(Batch(None, y, mask=m), p.detach())

        step()
        with Moved() as moved:
            step()
        counts.append((moved.calls, moved.bytes / p.numel() / 4))
    more = [b - a for a, b in zip(*counts, strict=True)]
    assert more[0] <= calls and more[1] <= passes, more


def test_measures_of_a_large_output_hold_nothing_of_its_size():
    y, p = (torch.rand(16, 64, 64, 5) < 0.2).float(), torch.randn(16, 64, 64, 5)
    loss = L.BinaryCrossentropy(from_logits=True)
    batch = loss.align(y, p)
    measures(loss, batch)
    with Held() as held:
        measures(loss, batch)
    assert held.most < p.numel() * 4 / 100
