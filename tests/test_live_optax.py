"""Random cases against the installed optax; needs the extra `live`, so it is a part of the slow tests."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live import BINARY, COUNT, HOT, LABEL, LOGIT, PROBABILITY, REAL, SIGN, Problem, close, numbers, often, quiet
from lossledger.conventions import outcome

pytestmark = pytest.mark.slow
os.environ.setdefault("JAX_PLATFORMS", "cpu")
LOG = "log-probability"

# How targets and predictions look, and the arguments that a loss takes.
AXES = {"axis": (-1, 0)}
LOSSES = {
    "squared_error": (REAL, REAL, {}),
    "l2_loss": (REAL, REAL, {}),
    "huber_loss": (REAL, REAL, {"delta": (0.3, 2.0)}),
    "log_cosh": (REAL, REAL, {}),
    "cosine_similarity": (REAL, REAL, {"epsilon": (0.0, 0.001, 1.0), **AXES}),
    "cosine_distance": (REAL, REAL, {"epsilon": (0.0, 0.001, 1.0), **AXES}),
    "hinge_loss": (SIGN, REAL, {}),
    "perceptron_loss": (SIGN, REAL, {}),
    "multiclass_hinge_loss": (LABEL, LOGIT, {}),
    "multiclass_perceptron_loss": (LABEL, LOGIT, {}),
    "sparsemax_loss": (BINARY, REAL, {}),
    "sigmoid_binary_cross_entropy": (PROBABILITY, LOGIT, {}),
    "sigmoid_focal_loss": (PROBABILITY, LOGIT, {"alpha": (0.25,), "gamma": (0.0, 1.0)}),
    "softmax_cross_entropy": (PROBABILITY, LOGIT, {"where": (True,), **AXES}),
    "safe_softmax_cross_entropy": (HOT, LOGIT, {}),
    "softmax_cross_entropy_with_integer_labels": (LABEL, LOGIT, {"where": (True,)}),
    "poly_loss_cross_entropy": (PROBABILITY, LOGIT, {"epsilon": (1.0,), **AXES}),
    "kl_divergence": (PROBABILITY, LOG, AXES),
    "kl_divergence_with_log_targets": (LOG, LOG, AXES),
    "generalized_kl_divergence": (COUNT, LOG, AXES),
    "dice_loss": (BINARY, LOGIT, {"smooth": (0.5,), "alpha": (0.3,), "beta": (0.7,), "ignore_background": (True,)}),
    "binary_dice_loss": (BINARY, LOGIT, {"smooth": (0.5,)}),
}


@pytest.fixture(scope="module")
def losses():
    with quiet():
        return pytest.importorskip("optax").losses


@st.composite
def problems(draw):
    name = draw(st.sampled_from(sorted(LOSSES)))
    target, kind, known = LOSSES[name]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))

    def array(what):
        return -np.abs(numbers(rng, REAL, shape)) if what == LOG else numbers(rng, what, shape)

    y, p = array(target if target != LABEL else REAL), array(kind)
    if target == LABEL:
        wide = draw(often(0.2))
        y = rng.integers(-1 - wide, shape[-1] + wide, shape[:-1])
    elif draw(often(0.15)):
        y = draw(st.sampled_from([y[0], y[..., :1]]))
    given = {k: draw(st.sampled_from(v)) for k, v in known.items() if draw(often(0.4))}
    if "where" in given:
        given["where"] = rng.random(draw(st.sampled_from([shape, (*shape[:-1], 1)]))) < 0.6
        given["axis"] = -1
    return Problem(name, given, y, p)


@quiet()
def of_optax(losses, problem):
    import jax.numpy as jnp

    try:
        arrays = jnp.asarray(problem.y_pred), jnp.asarray(problem.y_true)
        return np.asarray(getattr(losses, problem.loss)(*arrays, **problem.kwargs))
    except Exception as error:
        return error


@given(problems())
@settings(max_examples=2000)
def test_losses_of_the_convention_are_those_of_optax(losses, problem):
    expected, found = of_optax(losses, problem), outcome(problem.case("optax"))
    if isinstance(expected, Exception):
        assert "error" in found, (found, expected)
        return
    assert "value" in found, (found, expected)
    # Terms are as large as logits, also where their difference is small; powers amplify a rounding by the exponent.
    size = float(np.abs(np.nan_to_num(problem.y_pred)).max(initial=1.0)) ** (2 if problem.loss.endswith("error") else 1)
    assert close(found["value"], expected, size), (found, expected)
