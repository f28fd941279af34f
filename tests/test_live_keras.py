"""Random cases against the installed Keras 3 on torch: our convention's numbers, and our losses with their gradients.

A number may differ by 64 roundings of float32 at the size of the terms: sums of a few dozen terms in another order, and
logarithms of numbers near 1.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

import lossledger as ll
from live import KERAS_LOSSES, PROBABILITY, Problem, assert_same, close, keras_problems, quiet, size_of_terms
from lossledger.conventions import outcome
from lossledger.errors import InputError

# Keras asks for a deprecated alias of NumPy when it is imported.
with quiet():
    keras = pytest.importorskip("keras")
    from keras.src import backend

REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none", None)
ANY = keras_problems(tuple(KERAS_LOSSES), REDUCTIONS)


def options(problem):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in problem.kwargs.items()}


def weights(problem):
    # A copy: Keras on torch scales the caller's weights in place.
    return None if problem.sample_weight is None else np.array(problem.sample_weight)


def output(problem, requires_grad=False):
    found = torch.tensor(problem.y_pred, requires_grad=requires_grad)
    if problem.mask is not None:
        backend.set_keras_mask(found, torch.tensor(problem.mask))
    return found


@quiet()
def of_keras(problem):
    try:
        loss = getattr(keras.losses, problem.loss)(**options(problem))
        return backend.convert_to_numpy(loss(problem.y_true.copy(), output(problem), weights(problem)))
    except Exception as error:
        return error


def scale_of(problem):
    unreduced = of_keras(dataclasses.replace(problem, kwargs={**problem.kwargs, "reduction": "none"}))
    return 0.0 if isinstance(unreduced, Exception) else size_of_terms(unreduced, problem.kwargs["reduction"])


def check_convention(problem):
    assert_same(outcome(problem.case("keras3")), of_keras(problem), scale_of(problem))


@given(ANY)
@settings(max_examples=400)
def test_number_of_the_convention_is_that_of_keras(problem):
    check_convention(problem)


@pytest.mark.slow
@given(ANY)
@settings(max_examples=5000)
def test_number_of_the_convention_is_that_of_keras_thousands_of_times(problem):
    check_convention(problem)


# --- an epoch of fit -----------------------------------------------------------------------------------------------


class Same(keras.Model):
    """A model whose output is its input, with a mask on it."""

    def __init__(self):
        super().__init__()
        self.zero = self.add_weight(shape=(), initializer="zeros")

    def call(self, inputs):
        found = inputs["x"] + 0 * self.zero
        if "mask" in inputs:
            backend.set_keras_mask(found, inputs["mask"])
        return found


@quiet()
def fit_of_keras(problem, batch_size, class_weight):
    x = {"x": problem.y_pred} | ({} if problem.mask is None else {"mask": problem.mask})
    try:
        model = Same()
        loss = getattr(keras.losses, problem.loss)(**options(problem))
        model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss, run_eagerly=True)
        by_index = None if class_weight is None else {int(k): v for k, v in class_weight.items()}
        rest = {"sample_weight": weights(problem), "class_weight": by_index, "batch_size": batch_size}
        history = model.fit(x, problem.y_true.copy(), **rest, shuffle=False, verbose=0).history
        return {name: values[0] for name, values in history.items()}
    except Exception as error:
        return error


def check_fit(problem, seed):
    rng = np.random.default_rng(seed)
    lengths = [np.shape(a)[:1] for a in (problem.y_true, problem.sample_weight, problem.mask) if a is not None]
    assume(all(length == problem.y_pred.shape[:1] for length in lengths))
    batch_size = int(rng.integers(1, 4))
    class_weight = None
    if rng.random() < 0.3:
        class_weight = {str(i): float(rng.choice([0, 1, 2.5])) for i in range(rng.integers(1, 4))}
    expected = fit_of_keras(problem, batch_size, class_weight)
    asked = problem.case("keras3", scope="fit", class_weight=class_weight)
    found = outcome({**asked, "kwargs": {**problem.kwargs, "batch_size": batch_size}})
    # A kernel of torch that Keras calls with labels (B, T) fails in the backward pass.
    assume("contiguous" not in str(expected))
    if isinstance(expected, Exception):
        # Of two errors `fit` raises that of the shapes first.
        assert "error" in found, (found, expected)
    else:
        assert "value" in found and found["value"].keys() == expected.keys(), (found, expected)
        # An infinite gradient makes Keras's weight NaN even at the learning rate 0, and with it the next batches.
        assume(np.isfinite(expected["loss"]) or len(problem.y_pred) <= batch_size)
        scale = 4 * scale_of(dataclasses.replace(problem, sample_weight=None, mask=None)) or 1.0
        assert close(found["value"]["loss"], expected["loss"], scale), (found, expected)


FITTED = keras_problems(tuple(name for name in KERAS_LOSSES if name != "Circle"), REDUCTIONS)


@pytest.mark.parametrize("seed", range(3))
@given(FITTED)
@settings(max_examples=20)
def test_epoch_of_the_convention_is_that_of_fit(seed, problem):
    check_fit(problem, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@given(FITTED)
@settings(max_examples=100)
def test_epoch_of_the_convention_is_that_of_fit_a_thousand_times(seed, problem):
    check_fit(problem, seed)


# --- our losses, value and gradient ---------------------------------------------------------------------------------

# Not compared: Circle, whose pairs and divisor are others in ours (see its docstring).
TIDY = keras_problems(
    tuple(name for name in KERAS_LOSSES if name != "Circle"), ("sum_over_batch_size", "sum", "none"), tidy=True
)


OVERLAPS = ("Dice", "Tversky")


def unweighted(problem):
    return dataclasses.replace(problem, kwargs={**problem.kwargs, "reduction": "none"}, sample_weight=None, mask=None)


def ours(problem):
    given = options(problem)
    if problem.loss == "Tversky":
        # Keras up to 3.15.1 has alpha on false negatives.
        given |= {"alpha": given.get("beta", 0.5), "beta": given.get("alpha", 0.5)}
    return getattr(ll.losses, problem.loss)(**given)


def refused(problem):
    """What Keras takes and ours refuses: numbers that are no probabilities, targets that no path of a CTC spells."""
    if problem.loss == "CTC":
        return not np.isfinite(of_keras(unweighted(problem))).all()
    probabilities = KERAS_LOSSES[problem.loss][1] == PROBABILITY and not problem.kwargs.get("from_logits", False)
    return probabilities and bool(((problem.y_pred < 0) | (problem.y_pred > 1)).any())


def different(problem):
    """Where Keras is wrong or less exact.

    - The binary focal loss of logits clips their sigmoid; ours is exact at any logit.
    - Label smoothing counts the classes on the last axis, also when the classes are on another.
    - Probabilities that are all 0 are divided by their sum, 0/0; ours clips them.
    - An overlap of nothing with nothing is a loss of 1; ours is 0, and falls to it as ε = 1e-7 comes to count in the
      divisor: a cell of less than 0.1 in all shows it in float32.
    """
    if problem.loss in OVERLAPS:
        axis = options(problem).get("axis")
        return bool((np.sum(problem.y_true + problem.y_pred, axis=axis) < 0.1).any())
    divided = "Categorical" in problem.loss and not problem.kwargs.get("from_logits", False)
    if divided and bool((problem.y_pred.sum(problem.kwargs.get("axis", -1)) == 0).any()):
        return True
    if problem.loss == "BinaryFocalCrossentropy":
        return bool(np.abs(problem.y_pred).max() > 5)
    return (
        problem.loss.startswith("Categorical")
        and "label_smoothing" in problem.kwargs
        and (problem.kwargs.get("axis", -1) != -1)
    )


@quiet()
def with_gradient(loss, y, p, weight, mask):
    leaf = torch.tensor(p, requires_grad=True)
    if mask is not None:
        backend.set_keras_mask(leaf, torch.tensor(mask))
    value = loss(y.copy(), leaf, weight) if isinstance(loss, keras.Loss) else loss(y, leaf, weight, mask)
    try:
        value.sum().backward()
    except RuntimeError as error:
        # A kernel of torch that Keras calls with labels (B, T).
        assert "contiguous" in str(error) and isinstance(loss, keras.Loss)
        return value.detach().numpy(), np.full_like(p, np.nan)
    return value.detach().numpy(), np.zeros_like(p) if leaf.grad is None else leaf.grad.numpy()


def check_ours(problem):
    assume(not refused(problem) and not different(problem))
    entries = np.shape(of_keras(unweighted(problem)))
    # Keras expands no weights, so that only full shapes mean the same in both.
    assume(all(np.shape(a) == entries for a in (problem.sample_weight, problem.mask) if a is not None))
    # Ours leads with the samples where an overlap keeps another axis than theirs.
    assume(problem.loss not in OVERLAPS or len(entries) < 2 or problem.sample_weight is problem.mask is None)
    theirs = getattr(keras.losses, problem.loss)(**options(problem))
    expected, slope = with_gradient(theirs, problem.y_true, problem.y_pred, weights(problem), problem.mask)
    found, gradient = with_gradient(ours(problem), problem.y_true, problem.y_pred, weights(problem), problem.mask)
    scale = scale_of(problem) + size_of_terms(of_keras(unweighted(problem)), problem.kwargs["reduction"])
    # An overlap loss is 1 minus a quotient in Keras, rounded at 1; ε is in the numerator of ours.
    scale = max(scale, 1.0) if problem.loss in OVERLAPS else scale
    assert close(found.reshape(expected.shape), expected, scale), (found, expected)
    finite = np.isfinite(slope)
    # Not where Keras itself has none: at a zero vector, or a probability 0 under a power below 1.
    # Predictions are of the order of 1, so that a gradient is rounded at its own size and at that of the value.
    size = size_of_terms(slope[finite], None) + scale
    assert close(gradient[finite], slope[finite], size, ulps=512), (gradient, slope)


@given(TIDY)
@settings(max_examples=200)
def test_our_value_and_gradient_are_those_of_keras(problem):
    check_ours(problem)


@pytest.mark.slow
@given(TIDY)
@settings(max_examples=3000)
def test_our_value_and_gradient_are_those_of_keras_thousands_of_times(problem):
    check_ours(problem)


def test_what_keras_broadcasts_by_coincidence_ours_refuses():
    """Each of these gives a number in Keras that mixes samples; ours names the shapes, or takes (B,) as samples."""
    square, mse = np.arange(9, dtype=np.float32).reshape(3, 3), {"reduction": "sum_over_batch_size"}
    for y, p, weight in (
        (np.zeros(3, np.float32), square, None),  # one target a column
        (np.zeros((1, 3), np.float32), square, None),  # one target for all samples
        (np.zeros((3, 1), np.float32), square, None),  # one target a sample, for every column
        (np.zeros((2, 3), np.float32), square[:2], np.ones((2, 3, 4), np.float32)),
        (np.zeros((3, 3), np.float32), square, np.ones((1, 3), np.float32)),
    ):
        assert not isinstance(of_keras(Problem("MeanSquaredError", mse, y, p, weight)), ValueError)
        with pytest.raises(InputError):
            ll.losses.MeanSquaredError()(y, p, weight)
    y, p, weight = np.zeros((3, 3, 1), np.float32), square[..., None], np.array([1, 10, 100], np.float32)
    by_step = of_keras(Problem("MeanSquaredError", mse, y, p, weight))
    assert float(by_step) == pytest.approx(float((square**2 * weight).mean()))
    assert float(ll.losses.MeanSquaredError()(y, p, weight)) == pytest.approx(
        float((square**2 * weight[:, None]).mean())
    )
