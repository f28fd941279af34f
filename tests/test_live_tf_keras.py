"""Random cases against the installed tf_keras; needs the extra `live`, so it is a part of the slow tests."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given, settings

from live import KERAS_LOSSES, assert_same, keras_problems, quiet, size_of_terms
from lossledger.conventions import outcome
from lossledger.conventions.common import key
from lossledger.conventions.elements import ONLY_KERAS3

pytestmark = pytest.mark.slow
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture(scope="module")
def tf_keras():
    with quiet():
        return pytest.importorskip("tf_keras")


LOSSES = tuple(name for name in KERAS_LOSSES if key(name) not in ONLY_KERAS3 | {"categoricalgeneralizedcrossentropy"})
REDUCTIONS = ("auto", "sum_over_batch_size", "sum", "none")


@quiet()
def of_tf_keras(tf_keras, problem):
    import tensorflow as tf

    try:
        loss = getattr(tf_keras.losses, problem.loss)(**problem.kwargs)
        output = tf.constant(problem.y_pred)
        if problem.mask is not None:
            output._keras_mask = tf.constant(problem.mask)
        # Targets as tensors: tf_keras does not align arrays.
        weight = None if problem.sample_weight is None else tf.constant(problem.sample_weight)
        return loss(tf.constant(problem.y_true), output, weight).numpy()
    except Exception as error:
        return error


@given(keras_problems(LOSSES, REDUCTIONS))
@settings(max_examples=3000)
def test_number_of_the_convention_is_that_of_tf_keras(tf_keras, problem):
    expected, found = of_tf_keras(tf_keras, problem), outcome(problem.case("tf_keras"))
    if isinstance(expected, Exception) and 0 in (problem.y_true.ndim, problem.y_pred.ndim - 1):
        # Outputs of one axis: any of several errors, whichever of its checks comes first.
        assert "error" in found, (found, expected)
        return
    none = {**problem.kwargs, "reduction": "none"}
    unreduced = of_tf_keras(tf_keras, dataclasses.replace(problem, kwargs=none))
    scale = 0.0 if isinstance(unreduced, Exception) else size_of_terms(unreduced, problem.kwargs["reduction"])
    assert_same(found, expected, scale)


def test_batch_without_valid_entries_is_nan(tf_keras):
    from live import Problem

    y, p = np.zeros((2, 3, 1), np.float32), np.ones((2, 3, 1), np.float32)
    problem = Problem("MeanSquaredError", {"reduction": "auto"}, y, p, None, np.zeros((2, 3), bool))
    assert np.isnan(of_tf_keras(tf_keras, problem)) and outcome(problem.case("tf_keras"))["value"] == "nan"
