"""Metrics: the values of scikit-learn, the laws of additive statistics, and what a name is resolved to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lossledger import losses, metrics
from lossledger.errors import InputError, InputTypeError, UnknownNameError

CLASSES = 4
IGNORED = 9


def absolute(y_true: Tensor, y_pred: Tensor) -> Tensor:
    return (y_true - y_pred).abs().mean(-1)


# name: (metric, targets). Every metric takes an output [B, d, CLASSES].
CASES: dict[str, tuple[metrics.Metric, str]] = {
    "binary": (metrics.BinaryAccuracy(threshold=0.3), "columns"),
    "binary_logits": (metrics.BinaryAccuracy(from_logits=True), "columns"),
    "categorical": (metrics.CategoricalAccuracy(), "one_hot"),
    "sparse": (metrics.SparseCategoricalAccuracy(), "labels"),
    "sparse_ignore": (metrics.SparseCategoricalAccuracy(ignore_class=1), "labels"),
    "iou": (metrics.IoU(), "columns"),
    "iou_sigmoid": (metrics.IoU("sigmoid", threshold=0.4), "columns"),
    "iou_softmax": (metrics.IoU("softmax"), "one_hot"),
    "iou_sparse": (metrics.IoU(sparse_labels=True, ignore_class=2, absent="zero"), "labels"),
    "dice": (metrics.DiceScore("sigmoid"), "columns"),
    "dice_sparse": (metrics.DiceScore(sparse_labels=True), "labels"),
    "mae": (metrics.MeanAbsoluteError(), "real"),
    "mse": (metrics.MeanSquaredError(), "real"),
    "rmse": (metrics.RootMeanSquaredError(), "real"),
    "function": (metrics.MeanMetric(absolute), "real"),
}
every_case = pytest.mark.parametrize("case", CASES)


def make(case: str, seed: int, samples: int, positions: int = 3) -> tuple[metrics.Metric, Tensor, Tensor]:
    """A metric, targets and an output, float64, with probabilities where the metric reads them."""
    metric, kind = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, positions, CLASSES)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, shape[:-1], generator=generator)
    targets = {
        "columns": (torch.rand(shape, generator=generator) > 0.6).double(),
        "one_hot": nn.functional.one_hot(labels, CLASSES).double(),
        "labels": labels,
        "real": torch.randn(shape, generator=generator, dtype=torch.float64),
    }
    probabilities = case in ("binary", "iou")
    return metric, targets[kind], logits.sigmoid() if probabilities else logits


def same(one: metrics.Result, other: metrics.Result) -> None:
    np.testing.assert_allclose(one.value, other.value, rtol=1e-12, atol=1e-12)
    assert (one.by_class is None) == (other.by_class is None)
    if one.by_class is not None and other.by_class is not None:
        np.testing.assert_allclose(one.by_class, other.by_class, rtol=1e-12, atol=1e-12)


# --- values --------------------------------------------------------------------------------------------------------


def test_binary_accuracy_is_that_of_scikit_learn() -> None:
    _, y, p = make("binary", 1, 50)
    w = torch.rand(50, dtype=torch.float64)
    flat, decided = y.flatten() > 0.5, p.flatten() > 0.3
    each = w[:, None, None].expand(y.shape).flatten()
    metric = metrics.BinaryAccuracy(threshold=0.3)
    assert metric(y, p) == pytest.approx(sk.accuracy_score(flat, decided), rel=1e-12)
    assert metric(y, p, w) == pytest.approx(sk.accuracy_score(flat, decided, sample_weight=each), rel=1e-12)
    logits = torch.logit(p)
    assert metrics.BinaryAccuracy(threshold=0.3, from_logits=True)(y, logits) == metric(y, p)


def test_class_accuracies_are_those_of_scikit_learn() -> None:
    _, labels, z = make("sparse", 2, 50)
    w = torch.rand(50, 3, dtype=torch.float64)
    one_hot = nn.functional.one_hot(labels, CLASSES)
    chosen = z.argmax(-1).flatten()
    expected = sk.accuracy_score(labels.flatten(), chosen)
    weighted = sk.accuracy_score(labels.flatten(), chosen, sample_weight=w.flatten())
    assert metrics.SparseCategoricalAccuracy()(labels, z) == pytest.approx(expected, rel=1e-12)
    assert metrics.SparseCategoricalAccuracy()(labels, z, w) == pytest.approx(weighted, rel=1e-12)
    assert metrics.CategoricalAccuracy()(one_hot, z) == pytest.approx(expected, rel=1e-12)
    assert metrics.CategoricalAccuracy()(one_hot, z.softmax(-1), w) == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "reference"), [(metrics.IoU, sk.jaccard_score), (metrics.DiceScore, sk.f1_score)], ids=["iou", "dice"]
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_overlap_by_class_is_that_of_scikit_learn(kind: Any, reference: Callable[..., Any], weighted: bool) -> None:
    _, labels, z = make("iou_sparse", 3, 40)
    w = torch.rand(40, 3, dtype=torch.float64) if weighted else None
    flat = None if w is None else w.flatten()
    expected = reference(labels.flatten(), z.argmax(-1).flatten(), average=None, sample_weight=flat)
    one_hot = nn.functional.one_hot(labels, CLASSES)
    for metric, y in ((kind(sparse_labels=True), labels), (kind("softmax"), one_hot)):
        result = metric.result(metric.statistics(y, z, w))
        np.testing.assert_allclose(result.by_class, expected, rtol=1e-12)
        assert result.value == pytest.approx(float(np.mean(expected)), rel=1e-12)
        assert metric(y, z, w) == result.value


@pytest.mark.parametrize(
    ("kind", "reference"), [(metrics.IoU, sk.jaccard_score), (metrics.DiceScore, sk.f1_score)], ids=["iou", "dice"]
)
def test_overlap_of_columns_is_that_of_scikit_learn(kind: Any, reference: Callable[..., Any]) -> None:
    _, y, z = make("iou_sigmoid", 4, 40)
    w = torch.rand(40, dtype=torch.float64)
    decided = (z.sigmoid() > 0.4).flatten(0, 1)
    each = w[:, None].expand(40, 3).flatten()
    expected = reference(y.flatten(0, 1) > 0.5, decided, average=None, sample_weight=each)
    for metric, output in ((kind("sigmoid", threshold=0.4), z), (kind(threshold=0.4), z.sigmoid())):
        np.testing.assert_allclose(metric.result(metric.statistics(y, output, w)).by_class, expected, rtol=1e-12)


def test_errors_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(5)
    y, p, w = generator.normal(size=(60, 2)), generator.normal(size=(60, 2)), generator.uniform(size=60)
    for metric, reference in (
        (metrics.MeanAbsoluteError(), sk.mean_absolute_error),
        (metrics.MeanSquaredError(), sk.mean_squared_error),
    ):
        assert metric(y, p) == pytest.approx(reference(y, p), rel=1e-12)
        assert metric(y, p, w) == pytest.approx(reference(y, p, sample_weight=w), rel=1e-12)
    # scikit-learn takes the root of each column and then their mean; ours, as Keras's, is of the pooled mean.
    expected = sk.root_mean_squared_error(y.ravel(), p.ravel(), sample_weight=np.repeat(w, 2))
    assert metrics.RootMeanSquaredError()(y, p, w) == pytest.approx(expected, rel=1e-12)


def test_values_by_hand() -> None:
    assert metrics.BinaryAccuracy()([1, 0, 1, 0], [0.9, 0.9, 0.5, 0.1]) == 0.5
    assert metrics.IoU()([[1.0], [1.0], [0.0]], [[0.9], [0.1], [0.9]]) == pytest.approx(1 / 3)
    assert metrics.DiceScore()([[1.0], [1.0], [0.0]], [[0.9], [0.1], [0.9]]) == 0.5
    assert metrics.MeanAbsoluteError()(np.array([0, 4]), np.array([[1], [1]])) == 2.0
    assert metrics.RootMeanSquaredError()([0.0, 0.0], [3.0, 4.0]) == pytest.approx(math.sqrt(12.5))


def test_class_axis_may_be_anywhere() -> None:
    _, labels, z = make("sparse", 6, 8)
    w = torch.rand(8, 3, dtype=torch.float64)
    first = z.movedim(-1, 1)
    one_hot = nn.functional.one_hot(labels, CLASSES).movedim(-1, 1)
    accuracy = metrics.SparseCategoricalAccuracy()(labels, z, w)
    assert metrics.SparseCategoricalAccuracy(axis=1)(labels, first, w) == accuracy
    assert metrics.CategoricalAccuracy(axis=1)(one_hot, first, w) == accuracy
    expected = metrics.IoU(sparse_labels=True)(labels, z, w)
    assert metrics.IoU(sparse_labels=True, axis=1)(labels, first, w) == expected
    assert metrics.IoU("softmax", axis=1)(one_hot, first, w) == expected
    _, y, p = make("binary", 6, 8)
    assert metrics.BinaryAccuracy(axis=1)(y.movedim(-1, 1), p.movedim(-1, 1), w) == metrics.BinaryAccuracy()(y, p, w)


def test_ignored_labels_are_deleted() -> None:
    _, labels, z = make("sparse", 7, 30, 1)
    ignored = torch.arange(30) % 3 == 0
    marked = labels.squeeze(-1).where(~ignored, IGNORED)
    kept, output = labels[~ignored].squeeze(-1), z.squeeze(1)
    for kind in (metrics.SparseCategoricalAccuracy, lambda **o: metrics.IoU(sparse_labels=True, **o)):
        assert kind(ignore_class=IGNORED)(marked, output) == kind()(kept, output[~ignored])
        with pytest.raises(InputError, match="labels must be integers from 0 to 3"):
            kind()(marked, output)


@pytest.mark.parametrize("kind", [metrics.IoU, metrics.DiceScore])
def test_absent_classes_count_what_the_policy_says(kind: Any) -> None:
    labels, output = torch.tensor([0, 0, 1]), torch.eye(4)[[0, 0, 0]]
    # Classes 2 and 3 are in neither; class 1 is missed, which is 0 and no absence.
    first = 2 / 3 if kind is metrics.IoU else 4 / 5
    for policy, value, absent in (
        ("skip", first / 2, math.nan),
        ("zero", first / 4, 0.0),
        ("one", (first + 2) / 4, 1.0),
        ("nan", math.nan, math.nan),
    ):
        for metric, y in (
            (kind(sparse_labels=True, absent=policy), labels),
            (kind(absent=policy), torch.eye(4)[labels]),
        ):
            result = metric.result(metric.statistics(y, output))
            np.testing.assert_allclose(result.value, value)
            np.testing.assert_allclose(result.by_class, [first, 0.0, absent, absent])


@every_case
def test_nothing_counted_is_nan(case: str) -> None:
    metric, y, p = make(case, 8, 5)
    nothing = metric.statistics(y[:0], p[:0])
    masked = metric.statistics(y, p, mask=torch.zeros(5, dtype=torch.bool))
    for statistics in (nothing, masked):
        result = metric.result(statistics)
        assert not statistics.any()
        assert math.isnan(result.value)
        assert result.by_class is None or all(map(math.isnan, result.by_class))


def test_an_empty_class_is_not_no_data() -> None:
    assert metrics.IoU(absent="one")([[0.0]], [[0.1]]) == 1.0
    assert math.isnan(metrics.IoU(absent="one")([[0.0]], [[0.1]], mask=[False]))


# --- laws ----------------------------------------------------------------------------------------------------------


@st.composite
def weighted_batches(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """A seed, a number of samples, and the cuts of a partition into parts that are mostly unequal, some empty."""
    samples = draw(st.integers(2, 12))
    return draw(st.integers(0, 2**16)), samples, sorted(draw(st.lists(st.integers(0, samples), max_size=4)))


def weights_and_masks(seed: int, samples: int) -> list[tuple[Tensor | None, Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(samples, generator=generator, dtype=torch.float64)
    mask = torch.rand(samples, 3, generator=generator) > 0.3
    return [(None, None), (weight, None), (None, mask), (weight, mask)]


def cut(value: Tensor | None, part: Any) -> Tensor | None:
    return None if value is None else value[part]


@every_case
@settings(max_examples=15, deadline=None)
@given(drawn=weighted_batches())
def test_any_partition_gives_the_value_of_the_whole(case: str, drawn: tuple[int, int, list[int]]) -> None:
    seed, samples, cuts = drawn
    metric, y, p = make(case, seed, samples)
    for weight, mask in weights_and_masks(seed, samples):
        whole = metric.statistics(y, p, weight, mask)
        parts = [slice(a, b) for a, b in pairwise([0, *cuts, samples])]
        sums = [metric.statistics(y[s], p[s], cut(weight, s), cut(mask, s)) for s in parts]
        added = torch.stack(sums).sum(0)
        same(metric.result(added.numpy()), metric.result(whole))


@every_case
@settings(max_examples=8, deadline=None)
@given(drawn=weighted_batches())
def test_the_order_of_samples_does_not_matter(case: str, drawn: tuple[int, int, list[int]]) -> None:
    seed, samples, _ = drawn
    metric, y, p = make(case, seed, samples)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    for weight, mask in weights_and_masks(seed, samples):
        shuffled = metric.statistics(y[order], p[order], cut(weight, order), cut(mask, order))
        same(metric.result(shuffled), metric.result(metric.statistics(y, p, weight, mask)))


@every_case
@settings(max_examples=8, deadline=None)
@given(drawn=weighted_batches())
def test_a_mask_deletes_whatever_is_under_it(case: str, drawn: tuple[int, int, list[int]]) -> None:
    seed, samples, _ = drawn
    metric, y, p = make(case, seed, samples)
    weight, _ = weights_and_masks(seed, samples)[1]
    keep = torch.arange(samples) % 2 == 0
    dirty_p, dirty_y = p.clone(), y.clone()
    dirty_p[~keep] = torch.nan
    dirty_y[~keep] = torch.nan if y.is_floating_point() else 10**6
    for w in (None, weight):
        deleted = metric.statistics(y[keep], p[keep], cut(w, keep))
        masked = metric.statistics(dirty_y, dirty_p, w, keep)
        assert torch.equal(metric.statistics(dirty_y, dirty_p, w, keep.long()), masked)
        same(metric.result(masked), metric.result(deleted))
        np.testing.assert_equal(metric(dirty_y, dirty_p, w, keep), metric.result(masked).value)


@every_case
@settings(max_examples=8, deadline=None)
@given(drawn=weighted_batches())
def test_weight_two_is_repetition_and_weight_zero_deletion(case: str, drawn: tuple[int, int, list[int]]) -> None:
    seed, samples, _ = drawn
    metric, y, p = make(case, seed, samples)
    times = torch.randint(0, 4, (samples,), generator=torch.Generator().manual_seed(seed))
    repeated = metric.statistics(y.repeat_interleave(times, 0), p.repeat_interleave(times, 0))
    for weight in (times, times.double()):
        same(metric.result(metric.statistics(y, p, weight)), metric.result(repeated))


def test_the_laws_hold_for_float32_outputs() -> None:
    for case in CASES:
        metric, y, p = make(case, 11, 64)
        p = p.float()
        whole = metric.statistics(y, p)
        parts = (slice(0, 1), slice(1, 40), slice(40, 64))
        added = torch.stack([metric.statistics(y[s], p[s]) for s in parts]).sum(0)
        same(metric.result(added), metric.result(whole))


# --- what statistics are -------------------------------------------------------------------------------------------


class NoHostRead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to read a value of a tensor back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read on the host")
        return func(*args, **(kwargs or {}))


def test_the_guard_sees_a_host_read() -> None:
    with NoHostRead(), pytest.raises(AssertionError, match="read on the host"):  # type: ignore[no-untyped-call]
        bool(torch.ones(1).any())


@every_case
def test_statistics_read_nothing_on_the_host(case: str) -> None:
    metric, y, p = make(case, 9, 6)
    p = p.float().requires_grad_()
    for weight, mask in weights_and_masks(9, 6):
        with NoHostRead():  # type: ignore[no-untyped-call]
            statistics = metric.statistics(y, p, weight, mask)
        assert statistics.dtype == torch.float64
        assert not statistics.requires_grad
        # Tensors without values: nothing at all can be read.
        given = [None if t is None else t.to("meta") for t in (y, p, weight, mask)]
        assert metric.statistics(*given).shape == statistics.shape == metric.statistics(y[:1], p[:1]).shape  # type: ignore[arg-type]


def test_statistics_shape_is_that_of_the_classes() -> None:
    for case in CASES:
        metric, y, p = make(case, 9, 6)
        overlap = isinstance(metric, metrics.IoU | metrics.DiceScore)
        assert metric.statistics(y, p).shape == ((4, CLASSES) if overlap else (2,))


@every_case
def test_inputs_are_not_written_to(case: str) -> None:
    metric, y, p = make(case, 10, 6)
    before = y.clone(), p.clone()
    metric.statistics(y, p, torch.ones(6), torch.arange(6) > 2)
    assert torch.equal(y, before[0])
    assert torch.equal(p, before[1])


@every_case
def test_an_unmasked_nan_is_not_hidden(case: str) -> None:
    metric, y, p = make(case, 12, 4)
    clean = metric.statistics(y, p)
    # A whole sample: one of its labels may be the ignored one.
    p[0] = torch.nan
    assert math.isnan(metric.result(metric.statistics(y, p)).value)
    assert math.isnan(metric.result(metric.statistics(y, p) + clean).value)


def test_a_label_out_of_range_is_not_hidden() -> None:
    for case in ("sparse", "iou_sparse", "dice_sparse"):
        metric, y, p = make(case, 12, 4)
        for label in (-1, CLASSES):
            y[0, 0] = label
            assert math.isnan(metric.result(metric.statistics(y, p)).value)
            with pytest.raises(InputError, match="labels must be integers"):
                metric(y, p)


def test_half_precision_outputs_are_taken() -> None:
    y, p = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.75], [0.5]], dtype=torch.bfloat16)
    assert metrics.BinaryAccuracy()(y, p) == 1.0
    assert metrics.MeanAbsoluteError()(y, p) == 0.375


def test_results_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        metrics.Result(1.0).value = 2.0  # type: ignore[misc]


def test_the_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        metrics.Metric("m")  # type: ignore[abstract]


# --- refusals ------------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_refused_with_both_shapes() -> None:
    with pytest.raises(InputError, match=r"mean_absolute_error: .*\(4, 1\).*\(3, 1\)"):
        metrics.MeanAbsoluteError()(torch.zeros(3, 1), torch.zeros(4, 1))
    with pytest.raises(InputError, match="sample_weight must have one of the shapes"):
        metrics.BinaryAccuracy()(torch.zeros(4, 2), torch.zeros(4, 2), sample_weight=torch.ones(2))
    with pytest.raises(InputError, match="mask must have one of the shapes"):
        metrics.CategoricalAccuracy()(torch.eye(3), torch.eye(3), mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="one label for each entry"):
        metrics.SparseCategoricalAccuracy()(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(InputTypeError, match="expected a tensor"):
        metrics.MeanSquaredError()([[1.0], [1.0, 2.0]], [[1.0]])


def test_a_single_class_has_no_largest_output() -> None:
    with pytest.raises(InputError, match="at least 2 classes"):
        metrics.CategoricalAccuracy()(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(InputError, match="at least 2 classes"):
        metrics.IoU(sparse_labels=True)(torch.zeros(3, dtype=torch.long), torch.zeros(3, 1))


def test_a_call_checks_values() -> None:
    for metric in (metrics.BinaryAccuracy(), metrics.IoU(), metrics.DiceScore()):
        with pytest.raises(InputError, match="from_logits"):
            metric([[1.0]], [[3.0]])
        with pytest.raises(InputError, match="targets must be in"):
            metric([[2.0]], [[0.5]])
    with pytest.raises(InputError, match="mask: expected booleans"):
        metrics.MeanAbsoluteError()([[1.0]], [[3.0]], mask=[0.5])


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 2.0, math.nan])
def test_a_threshold_is_a_probability(threshold: float) -> None:
    for kind in (metrics.BinaryAccuracy, metrics.IoU, metrics.DiceScore):
        with pytest.raises(InputError, match="threshold must be between 0 and 1"):
            kind(threshold=threshold)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="from_logits must be False, 'sigmoid'"):
        metrics.IoU(from_logits=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="exclusive classes with sparse_labels"):
        metrics.IoU("sigmoid", sparse_labels=True)
    with pytest.raises(InputError, match="expected sparse_labels=True"):
        metrics.DiceScore(ignore_class=3)
    with pytest.raises(InputError, match="absent must be one of skip, zero, one, nan"):
        metrics.IoU(absent="drop")  # type: ignore[arg-type]


# --- functions -----------------------------------------------------------------------------------------------------


def test_a_function_may_return_entries_samples_or_a_scalar() -> None:
    y, p = torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    for fn in (lambda a, b: (a - b).abs(), lambda a, b: (a - b).abs().mean(-1), lambda a, b: (a - b).abs().mean()):
        metric = metrics.MeanMetric(fn, "mine")
        added = metric.statistics(y[:1], p[:1]) + metric.statistics(y[1:], p[1:])
        assert metric.result(added).value == 2.0
    assert metrics.MeanMetric(lambda a, b: (a - b).abs())(y, p, sample_weight=[1.0, 0.0, 1.0]) == 2.0


def test_a_function_of_numpy_or_python_numbers_works() -> None:
    assert metrics.MeanMetric(lambda a, b: float((b - a).max()))([0.0, 0.0], [1.0, 2.0]) == 2.0
    assert metrics.MeanMetric(lambda a, b: np.abs(b.numpy() - a.numpy()))([0.0, 0.0], [1.0, 2.0]) == 1.5


def test_a_function_may_be_undefined_under_a_mask() -> None:
    relative = metrics.MeanMetric(lambda a, b: (a - b).abs() / a.abs(), "relative")
    assert relative([[2.0], [0.0]], [[1.0], [3.0]], mask=[True, False]) == 0.5


def test_a_scalar_cannot_be_weighted() -> None:
    metric = metrics.MeanMetric(lambda a, b: (a - b).abs().mean(), "mine")
    with pytest.raises(InputError, match="mine: expected one value per sample or entry to go with the sample_weight"):
        metric([0.0, 0.0], [1.0, 1.0], sample_weight=[1.0, 2.0])
    with pytest.raises(InputError, match="to go with the mask"):
        metric([0.0, 0.0], [1.0, 1.0], mask=[True, False])


def test_values_that_are_not_per_sample_are_refused() -> None:
    with pytest.raises(InputError, match="first axis 3; received values of shape"):
        metrics.MeanMetric(lambda a, b: torch.zeros(2))(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(InputTypeError, match="value: expected a tensor"):
        metrics.MeanMetric(lambda a, b: "good")(torch.zeros(3, 2), torch.zeros(3, 2))


# --- torchmetrics --------------------------------------------------------------------------------------------------


def test_a_torchmetrics_object_is_called_its_own_way() -> None:
    labels, z = torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([[0.2], [0.9], [0.4]])
    metric = metrics.from_torchmetrics(torchmetrics.Accuracy(task="binary"))
    assert metric.name == "binary_accuracy"
    assert math.isnan(metric.compute().value)
    metric.update(labels[:1], z[:1])
    metric.update(labels[1:], z[1:])
    assert metric.compute().value == pytest.approx(2 / 3)
    metric.reset()
    assert math.isnan(metric.compute().value)


def test_a_torchmetrics_object_may_have_a_value_a_class() -> None:
    metric = metrics.from_torchmetrics(torchmetrics.classification.MulticlassRecall(3, average="none"), name="recall")
    metric.update([0, 1, 2, 2], torch.eye(3)[[0, 1, 2, 0]])
    result = metric.compute()
    assert result.value == pytest.approx(2.5 / 3)
    assert result.by_class == (1.0, 1.0, 0.5)


def test_what_torchmetrics_cannot_do_is_refused() -> None:
    metric = metrics.from_torchmetrics(torchmetrics.Accuracy(task="binary"))
    with pytest.raises(InputError, match="takes no sample_weight"):
        metric.update([1.0], [0.5], sample_weight=[1.0])
    with pytest.raises(InputError, match="takes no mask"):
        metric.update([1.0], [0.5], mask=[True])
    with pytest.raises(InputError, match="not whole numbers"):
        metric.update([0.7], [0.5])
    with pytest.raises(InputTypeError, match="MetricCollection"):
        metrics.from_torchmetrics(torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError()]))
    with pytest.raises(InputTypeError, match="Expected a metric object of torchmetrics"):
        metrics.from_torchmetrics(torchmetrics.MeanAbsoluteError)
    matrix = metrics.from_torchmetrics(torchmetrics.ConfusionMatrix(task="binary"))
    matrix.update([1.0], [0.5])
    with pytest.raises(InputTypeError, match="expected a scalar or one value a class"):
        matrix.compute()


def test_a_subclass_of_a_torchmetrics_metric_is_one() -> None:
    class Mine(torchmetrics.MeanAbsoluteError):
        pass

    assert isinstance(metrics.get(Mine()), metrics.TorchMetric)


# --- names ---------------------------------------------------------------------------------------------------------

BCE, CCE, SCCE = losses.BinaryCrossentropy, losses.CategoricalCrossentropy, losses.SparseCategoricalCrossentropy


def shown(metric: metrics.Metric | metrics.TorchMetric) -> dict[str, Any]:
    return {"kind": type(metric).__name__, **{k: v for k, v in vars(metric).items() if not k.startswith("_")}}


def named(value: Any) -> str:
    """Its `repr` without addresses: processes that share the tests have to agree on their names."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize(
    ("loss", "kind", "options"),
    [
        (BCE(), "BinaryAccuracy", {"from_logits": False}),
        (BCE(from_logits=True), "BinaryAccuracy", {"from_logits": True}),
        ("binary_focal_crossentropy", "BinaryAccuracy", {"from_logits": False}),
        (nn.BCEWithLogitsLoss(), "BinaryAccuracy", {"from_logits": True}),
        (nn.functional.binary_cross_entropy, "BinaryAccuracy", {"from_logits": False}),
        (CCE(axis=1), "CategoricalAccuracy", {"axis": 1}),
        (SCCE(ignore_class=255), "SparseCategoricalAccuracy", {"ignore_class": 255, "axis": -1}),
        (nn.CrossEntropyLoss(), "SparseCategoricalAccuracy", {"ignore_class": -100, "axis": 1}),
        (0.5 * losses.Dice(from_logits="sigmoid") + BCE(from_logits=True), "BinaryAccuracy", {"from_logits": True}),
        (losses.Dice() + CCE(), "CategoricalAccuracy", {}),
        (losses.Dice(from_logits="softmax"), "CategoricalAccuracy", {}),
        (losses.Dice(from_logits="sigmoid"), "BinaryAccuracy", {"from_logits": True}),
        (losses.LovaszSoftmax(from_logits=True), "CategoricalAccuracy", {}),
        (losses.LovaszHinge(), "BinaryAccuracy", {"from_logits": True}),
        (losses.AsymmetricUnifiedFocal(), "CategoricalAccuracy", {}),
        (SCCE() + losses.FunctionLoss(absolute), "SparseCategoricalAccuracy", {}),
    ],
    ids=named,
)
@pytest.mark.parametrize("name", ["accuracy", "acc", "Accuracy"])
def test_accuracy_is_chosen_by_the_loss(name: str, loss: Any, kind: str, options: dict[str, Any]) -> None:
    found = shown(metrics.get(name, loss))
    assert (found["kind"], found["name"]) == (kind, name)
    assert options.items() <= found.items()


@pytest.mark.parametrize(
    "loss",
    [None, "mse", losses.FunctionLoss(absolute), losses.Dice(), losses.GeneralizedDice(), BCE() + CCE()],
    ids=named,
)
def test_accuracy_is_refused_when_the_loss_does_not_tell(loss: Any) -> None:
    with pytest.raises(InputError, match=r"'binary_accuracy'.*'categorical_accuracy'.*'sparse_categorical_accuracy'"):
        metrics.get("accuracy", loss)


@pytest.mark.parametrize("name", ["iou", "dice"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (None, {"from_logits": False, "sparse_labels": False, "axis": -1}),
        ("mse", {"from_logits": False, "sparse_labels": False}),
        (BCE(), {"from_logits": False, "sparse_labels": False}),
        (BCE(from_logits=True, axis=1), {"from_logits": "sigmoid", "axis": 1}),
        (CCE(), {"from_logits": "softmax", "sparse_labels": False}),
        (SCCE(ignore_class=255), {"from_logits": "softmax", "sparse_labels": True, "ignore_class": 255}),
        (losses.Dice(axis=(1, 2), from_logits="softmax"), {"from_logits": "softmax", "axis": -1}),
        (losses.Tversky(from_logits="sigmoid"), {"from_logits": "sigmoid"}),
        (losses.Jaccard(), {"from_logits": False}),
        (nn.BCEWithLogitsLoss(), {"from_logits": "sigmoid", "axis": 1}),
        (nn.CrossEntropyLoss(), {"from_logits": "softmax", "sparse_labels": True, "axis": 1, "ignore_class": -100}),
    ],
    ids=named,
)
def test_overlap_names_read_the_loss(name: str, loss: Any, options: dict[str, Any]) -> None:
    found = shown(metrics.get(name, loss))
    assert (found["kind"], found["name"]) == ("IoU" if name == "iou" else "DiceScore", name)
    assert options.items() <= found.items()


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("binary_accuracy", "BinaryAccuracy"), metrics.BinaryAccuracy),
        (("categorical_accuracy", "CategoricalAccuracy"), metrics.CategoricalAccuracy),
        (("sparse_categorical_accuracy",), metrics.SparseCategoricalAccuracy),
        (("iou", "IoU"), metrics.IoU),
        (("dice", "DiceScore"), metrics.DiceScore),
        (("mae", "MAE", "mean_absolute_error", "MeanAbsoluteError"), metrics.MeanAbsoluteError),
        (("mse", "mean_squared_error"), metrics.MeanSquaredError),
        (("rmse", "root_mean_squared_error"), metrics.RootMeanSquaredError),
    ],
)
def test_names_of_keras_are_known_and_kept(names: Sequence[str], kind: type[metrics.Metric]) -> None:
    for name in names:
        found = metrics.get(name)
        assert type(found) is kind
        assert found.name == name


def test_explicit_accuracy_names_read_the_loss_that_fits() -> None:
    assert shown(metrics.get("binary_accuracy", BCE(from_logits=True)))["from_logits"] is True
    assert shown(metrics.get("binary_accuracy", "mse"))["from_logits"] is False
    assert shown(metrics.get("sparse_categorical_accuracy", SCCE(ignore_class=7)))["ignore_class"] == 7
    assert shown(metrics.get("categorical_accuracy", CCE(axis=1)))["axis"] == 1


def test_the_accuracy_of_torch_and_of_this_library_read_the_same_output() -> None:
    labels = torch.tensor([[0, 2, -100], [1, 1, 3]])
    z = torch.randn(2, CLASSES, 3, generator=torch.Generator().manual_seed(0))
    metric = metrics.get("accuracy", nn.CrossEntropyLoss())
    assert isinstance(metric, metrics.Metric)
    valid = labels != -100
    assert metric(labels, z) == pytest.approx(float((z.argmax(1) == labels)[valid].double().mean()))


def test_objects_and_functions_are_taken() -> None:
    metric = metrics.IoU(absent="one")
    assert metrics.get(metric) is metric
    adapted = metrics.get(torchmetrics.MeanAbsoluteError())
    assert isinstance(adapted, metrics.TorchMetric)
    assert metrics.get(adapted) is adapted
    assert metrics.get(absolute).name == "absolute"
    assert metrics.get(lambda a, b: a - b).name == "metric"
    of_loss = metrics.get(losses.MeanAbsoluteError())
    assert isinstance(of_loss, metrics.MeanMetric)
    assert of_loss.name == "mean_absolute_error"
    assert of_loss([[0.0], [0.0]], [[1.0], [5.0]], sample_weight=[3.0, 1.0]) == 2.0


@pytest.mark.parametrize("name", ["binary_crossentropy", "hinge", "kl_divergence", "msle", "poisson", "log_cosh"])
def test_names_of_losses_are_the_means_of_their_entries(name: str) -> None:
    """As in Keras; weights divide, since a metric is a mean."""
    torch.manual_seed(0)
    y, p = torch.rand(6, 3).round(), torch.rand(6, 3)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 3.0])
    entries = losses.get(name).call(y, p)  # type: ignore[union-attr]
    expected = float((entries * weight).sum() / weight.sum())
    assert metrics.get(name)(y, p, weight) == pytest.approx(expected, rel=1e-6)


def test_a_cross_entropy_by_name_reads_the_output_as_the_loss_does() -> None:
    y, logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[3.0, -2.0], [0.5, 9.0]])
    expected = float(nn.functional.binary_cross_entropy_with_logits(logits, y))
    named = losses.BinaryCrossentropy(from_logits=True) + losses.Dice(from_logits="sigmoid")
    assert metrics.get("bce", named)(y, logits) == pytest.approx(expected, rel=1e-6)
    labels = torch.tensor([1, 0, 1])
    scores = torch.randn(3, 2)
    sparse = metrics.get(
        "sparse_categorical_crossentropy", losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    )
    expected = float(nn.functional.cross_entropy(scores, labels, ignore_index=0))
    assert sparse(labels, scores) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "loss", "target"),
    [
        ("bce", nn.BCEWithLogitsLoss(), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])),
        ("sparse_categorical_crossentropy", nn.CrossEntropyLoss(), torch.tensor([2, 0])),
        ("sparse_categorical_crossentropy", nn.NLLLoss(), torch.tensor([2, 0])),
    ],
)
def test_a_cross_entropy_by_name_reads_the_output_as_a_loss_of_torch_does(
    name: str, loss: nn.Module, target: Tensor
) -> None:
    output = torch.tensor([[3.0, -2.0, 0.5], [0.5, 9.0, 1.0]])
    output = output.log_softmax(1) if isinstance(loss, nn.NLLLoss) else output
    assert metrics.get(name, loss)(target, output) == pytest.approx(float(loss(output, target)), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("auc", "keras.metrics.AUC"), ("F1", "keras.metrics.F1Score"), ("mean_iou", "Did you mean 'iou'")],
)
def test_metrics_of_other_libraries_are_pointed_to(name: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(meant)):
        metrics.get(name)


def test_what_is_no_metric_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'binary_accuracy'"):
        metrics.get("binary_acuracy")
    with pytest.raises(InputTypeError, match="Make an instance: IoU"):
        metrics.get(metrics.IoU)
    with pytest.raises(InputTypeError, match="A metric must be a name"):
        metrics.get(3)

    class KerasLike:
        def update_state(self, y_true: Any, y_pred: Any) -> None: ...

        def __call__(self, y_true: Any, y_pred: Any) -> float:
            return 0.0

    with pytest.raises(InputTypeError, match="KerasLike, which has an update_state"):
        metrics.get(KerasLike())
    with pytest.raises(InputTypeError, match="must be callable"):
        metrics.MeanMetric(3)  # type: ignore[arg-type]
