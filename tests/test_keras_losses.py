"""Losses of Keras beyond the table of laws: sequences, pairs, edges, and every name."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lossledger as ll
import oracles
from lossledger.errors import InputError, InputTypeError, UnknownNameError

L = ll.losses

# Names and arguments of keras.losses 3.15; all end with reduction, name, dtype.
SIGNATURES = {
    "MeanAbsolutePercentageError": ("mean_absolute_percentage_error", {}),
    "MeanSquaredLogarithmicError": ("mean_squared_logarithmic_error", {}),
    "CosineSimilarity": ("cosine_similarity", {"axis": -1}),
    "LogCosh": ("log_cosh", {}),
    "Hinge": ("hinge", {}),
    "SquaredHinge": ("squared_hinge", {}),
    "CategoricalHinge": ("categorical_hinge", {}),
    "KLDivergence": ("kl_divergence", {}),
    "Poisson": ("poisson", {}),
    "CategoricalGeneralizedCrossEntropy": ("categorical_generalized_cross_entropy", {"q": 0.5}),
    "CTC": ("ctc", {}),
    "Circle": ("circle", {"gamma": 80.0, "margin": 0.4, "remove_diagonal": True}),
}
ALIASES = {
    "MeanSquaredError": ("mse", "MSE", "mean_squared_error"),
    "MeanAbsoluteError": ("mae", "MAE", "mean_absolute_error"),
    "MeanAbsolutePercentageError": ("mape", "MAPE"),
    "MeanSquaredLogarithmicError": ("msle", "MSLE"),
    "BinaryCrossentropy": ("bce", "BCE", "binary_crossentropy"),
    "KLDivergence": ("kld", "KLD", "kl_divergence"),
    "LogCosh": ("logcosh", "log_cosh"),
    "Huber": ("huber",),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_arguments_and_defaults_are_those_of_keras(name):
    function, arguments = SIGNATURES[name]
    parameters = inspect.signature(getattr(L, name)).parameters
    expected = {**arguments, "reduction": "sum_over_batch_size", "name": function, "dtype": None}
    assert {p.name: p.default for p in parameters.values()} == expected
    assert list(parameters) == list(expected)
    assert type(L.get(name)) is type(L.get(function)) is getattr(L, name)
    assert callable(getattr(L, function))


def test_short_names():
    for name, aliases in ALIASES.items():
        assert {type(L.get(alias)).__name__ for alias in aliases} == {name}


def test_arguments_survive_the_configuration():
    for loss in (
        L.CosineSimilarity(axis=1),
        L.CategoricalGeneralizedCrossEntropy(q=0.3),
        L.Circle(gamma=5.0, margin=0.2, remove_diagonal=False),
        L.CTC(reduction="sum"),
    ):
        again = L.deserialize(L.serialize(loss))
        assert type(again) is type(loss) and again.get_config() == loss.get_config()


def test_functions_keep_one_value_an_entry():
    rng = np.random.default_rng(0)
    y, p = rng.random((4, 3)), rng.random((4, 3))
    for name, (function, _) in SIGNATURES.items():
        if name in ("CTC", "Circle", "CategoricalGeneralizedCrossEntropy"):
            continue
        got = getattr(L, function)(y, p)
        assert got.shape == (4,)
        assert torch.equal(got, getattr(L, name)(reduction="none")(y, p))
    labels, unit = np.array([0, 0, 1, 2]), p / np.linalg.norm(p, axis=1, keepdims=True)
    assert L.circle(labels, unit, gamma=2.0).shape == L.categorical_generalized_cross_entropy(labels, p).shape == (4,)
    assert L.ctc(labels[:, None], rng.random((4, 2, 3))).shape == (4,)


# --- edges ---------------------------------------------------------------------------------------------------------


def test_a_zero_vector_has_no_direction():
    prediction = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    loss = L.CosineSimilarity(reduction="none")(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), prediction)
    loss.sum().backward()
    assert torch.allclose(loss, torch.tensor([0.0, -0.6, 0.0]))
    assert torch.isfinite(prediction.grad).all() and not prediction.grad[0].any()


def test_axis_of_the_cosine():
    rng = np.random.default_rng(1)
    y, p = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))
    got = L.cosine_similarity(y, p, axis=1)
    np.testing.assert_allclose(got, oracles.minus_cosine(y.swapaxes(1, 2), p.swapaxes(1, 2))[..., 0])
    _, gradient = L.CosineSimilarity(axis=1).backprop(y, torch.as_tensor(p))
    assert gradient.shape == p.shape


def test_log_cosh_is_exact_for_large_errors():
    error = torch.tensor([[-800.0], [-11.0], [0.0], [11.0], [800.0]], dtype=torch.float64)
    expected = np.logaddexp(error.numpy(), -error.numpy())[:, 0] - np.log(2)
    np.testing.assert_allclose(L.log_cosh(torch.zeros_like(error), error), expected, rtol=1e-14, atol=1e-15)


def test_hinge_reads_each_label_by_itself():
    """A zero is −1 whatever else the batch holds, so parts add up; Keras would leave it 0 beside a −1."""
    y, p = torch.tensor([[0.0], [-1.0], [1.0]]), torch.tensor([[0.5], [0.5], [0.5]])
    whole = L.hinge(y, p)
    assert whole.tolist() == [1.5, 1.5, 0.5]
    assert torch.equal(whole, torch.cat([L.hinge(y[i : i + 1], p[i : i + 1]) for i in range(3)]))
    groups = L.Hinge().tally(y, p, by="class").groups
    assert groups.keys == ((0, "present"), (0, "absent")) and groups.count.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["Hinge", "SquaredHinge"])
def test_class_weights_of_a_margin_go_by_label(name):
    loss = getattr(L, name)()
    y, p = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0], [0.0]])
    assert float(loss.tally(y, p, class_weight={1: 3.0}).value) == 2.0


@pytest.mark.parametrize(
    ("loss", "y", "p", "says"),
    [
        (L.Hinge(), [[2.0]], [[0.0]], "expected labels 0 and 1"),
        (L.KLDivergence(), [[0.5, 0.5]], [[1.5, 0.0]], "probabilities"),
        (L.CategoricalGeneralizedCrossEntropy(), [0], [[2.0, -1.0]], "probabilities"),
        (L.CategoricalGeneralizedCrossEntropy(), [2], [[0.5, 0.5]], "from 0 to 1"),
        (L.CTC(), [[3]], [[[0.0, 0.0]]], "from 0 to 1"),
        (L.CTC(), [[0, 1]], [[[0.0, 0.0]] * 3], "no label after a 0"),
        (L.CTC(), [[1, 1]], [[[0.0, 0.0]] * 2], "at least 3 steps"),
        (L.CTC(), [1], [[[0.0, 0.0]] * 2], "Targets `y_true`"),
        (L.Circle(), [[0, 1]], [[0.0, 1.0]], "one label a sample"),
    ],
)
def test_bad_values_are_named(loss, y, p, says):
    with pytest.raises(InputError, match=says):
        loss(y, p)


def test_losses_without_classes_take_no_class_weight():
    for loss in (L.CTC(), L.Circle(), L.CosineSimilarity(), L.LogCosh()):
        y, p = ([[1]], [[[0.0, 1.0]]]) if isinstance(loss, L.CTC) else ([[1.0]], [[1.0]])
        with pytest.raises(InputError, match="class_weight needs classes"):
            loss.tally(y, p, class_weight={0: 2.0})


# --- CTC -----------------------------------------------------------------------------------------------------------


def sequences(seed, samples=4, steps=5, classes=3):
    rng = np.random.default_rng(seed)
    labels = np.zeros((samples, 3), int)
    for row, length in zip(labels, rng.integers(0, 4, samples), strict=True):
        row[:length] = rng.integers(1, classes, length)
    return labels, rng.normal(0, 2, (samples, steps, classes)), rng.uniform(0.2, 2, samples), rng.random(samples) < 0.7


@pytest.mark.parametrize("seed", range(5))
def test_ctc_is_the_sum_over_all_paths(seed):
    labels, logits, weight, mask = sequences(seed)
    each = np.array([oracles.ctc(y, z) for y, z in zip(labels, logits, strict=True)])
    np.testing.assert_allclose(L.ctc(labels, logits), each, rtol=1e-9)
    got = float(L.CTC()(labels, logits, weight, mask))
    assert got == pytest.approx(
        oracles.reduce_entries(each[:, None], "sum_over_batch_size", weight[:, None], mask[:, None])
    )


# --- circle --------------------------------------------------------------------------------------------------------


def embeddings(seed, samples=8):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(samples, 3))
    labels = rng.integers(0, 3, samples)
    labels[0] = 7  # without a positive
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return labels, vectors, rng.uniform(0.2, 2, samples), rng.random(samples) < 0.7


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("remove_diagonal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_circle_is_the_formula_pair_by_pair(seed, remove_diagonal, masked):
    labels, vectors, weight, mask = embeddings(seed)
    present = mask if masked else None
    losses, counts = oracles.circle(labels, vectors, 20.0, 0.3, remove_diagonal, present)
    arguments = {"gamma": 20.0, "margin": 0.3, "remove_diagonal": remove_diagonal}
    expected = (losses * weight)[counts].sum() / counts.sum()
    assert float(L.Circle(**arguments)(labels, vectors, weight, present)) == pytest.approx(expected, rel=1e-9)
    each = L.Circle(**arguments, reduction="none")(labels[:, None], vectors, None, present)
    np.testing.assert_allclose(each, losses, rtol=1e-9, atol=1e-12)
    tally = L.Circle(**arguments).tally(labels, vectors, weight, present, by="sample")
    assert int(tally.count) == counts.sum()
    assert float(tally.contributions().sum()) == pytest.approx(expected, rel=1e-9)


def test_circle_is_coupled_to_its_batch_and_says_so():
    labels, vectors, _, _ = embeddings(1)
    loss = L.Circle(gamma=5.0)
    whole = loss.tally(labels, vectors)
    parts = loss.tally(labels[:4], vectors[:4]) + loss.tally(labels[4:], vectors[4:])
    assert abs(float(parts.value) - float(whole.value)) > 0.1
    assert L.Circle.additive is False and "batch-coupled" in L.Circle.__doc__


def test_circle_without_pairs_is_zero_with_zero_gradient():
    for labels in ([0, 0, 0], [0, 1, 2]):
        vectors = torch.eye(3, requires_grad=True)
        loss = L.Circle()(labels, vectors)
        loss.backward()
        assert float(loss.detach()) == 0 and not vectors.grad.any()


def test_circle_gradient_and_masked_samples():
    labels, vectors, weight, mask = map(torch.as_tensor, embeddings(2))
    loss = L.Circle(gamma=5.0, margin=0.3)
    assert torch.autograd.gradcheck(lambda v: loss(labels, v, weight, mask), (vectors.clone().requires_grad_(),))
    tally, gradient = loss.backprop(labels, vectors, weight, mask)
    left = loss.tally(labels[mask], vectors[mask], weight[mask])
    assert float(tally.value) == pytest.approx(float(left.value), rel=1e-12)
    bad = vectors.clone()
    bad[~mask] = torch.nan
    weight[~mask] = torch.nan
    dirty, same = loss.backprop(labels, bad, weight, mask)
    assert torch.equal(same, gradient) and int(dirty.nonfinite) == 0 and not gradient[~mask].any()


def test_order_of_a_circle_does_not_matter():
    labels, vectors, weight, _ = map(torch.as_tensor, embeddings(5))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    a, b = L.Circle()(labels, vectors, weight), L.Circle()(labels[order], vectors[order], weight[order])
    assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_circle_among_a_reference():
    labels, vectors, _, _ = embeddings(3)
    others, embedded, _, _ = embeddings(4, samples=5)
    both, everything = np.concatenate([labels, others]), np.concatenate([vectors, embedded])
    for remove_diagonal in (True, False):
        arguments = {"gamma": 5.0, "remove_diagonal": remove_diagonal}
        alone = L.circle(labels, vectors, **arguments)
        assert torch.equal(L.circle(labels, vectors, labels, vectors, **arguments), alone)
        # Anchors first among the reference: the diagonal then is the anchors themselves.
        expected, _ = oracles.circle(both, everything, 5.0, 0.4, remove_diagonal)
        got = L.circle(labels, vectors, ref_labels=both, ref_embeddings=everything, **arguments)
        np.testing.assert_allclose(got, expected[: len(labels)], rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match="together"):
        L.circle(labels, vectors, ref_labels=others)
    with pytest.raises(InputError, match="length 3"):
        L.circle(labels, vectors, others, embedded[:, :2])


# --- configuration and copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ll.reduction.NAMES)
def test_copies_reduce_alike(reduction):
    loss = L.MeanSquaredError(reduction)
    y, p, w = [[0.0], [0.0], [0.0]], [[1.0], [2.0], [4.0]], [1.0, 0.0, 3.0]
    for again in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert again.reduction is loss.reduction
        assert torch.equal(again(y, p, w), loss(y, p, w))


def test_reduction_is_its_name():
    loss = L.MeanSquaredError("sum")
    assert loss.reduction == "sum" and loss.reduction != "none" and {loss.reduction: 1}["sum"] == 1
    assert ll.reduction.get("mean") == ll.reduction.get("sum_over_batch_size")
    own = ll.Reduction("sum", None)
    assert copy.copy(own) == own == ll.reduction.get("sum") and own != ll.Reduction("sum", len)


def test_dtype_is_fixed_and_saved_only_if_given():
    assert "dtype" not in L.MeanSquaredError().get_config()
    loss = L.MeanSquaredError(dtype="float16")
    assert loss.get_config()["dtype"] == "float16" and L.deserialize(L.serialize(loss)).dtype == torch.float16
    assert loss([[0.0]], [[1.0]]).dtype == torch.float16
    policy = SimpleNamespace(compute_dtype="bfloat16")
    assert L.MeanSquaredError(dtype=policy).dtype == torch.bfloat16
    with pytest.raises(AttributeError):
        loss.dtype = torch.float32
    for wrong in (32, "nothing", "cat"):
        with pytest.raises(InputTypeError):
            L.MeanSquaredError(dtype=wrong)


def test_classes_of_the_caller_are_deserialized_too():
    class Mine(L.Loss):
        def call(self, y_true, y_pred):
            return (y_true - y_pred).abs().mean(-1)

    config = L.serialize(Mine(reduction="sum"))
    again = L.deserialize(config, custom_objects={"Mine": Mine})
    assert type(again) is Mine and again.get_config() == config["config"]
    both = L.deserialize(L.serialize(0.5 * Mine() + L.MeanSquaredError()), custom_objects={"Mine": Mine})
    assert type(both.terms[0][1]) is Mine
    with pytest.raises(UnknownNameError, match="Mine"):
        L.deserialize(config)
