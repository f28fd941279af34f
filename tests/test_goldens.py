"""Numbers of the real Keras, from the same arrays: goldens/frameworks.json names library and version of each case.

Where ours differs on purpose, the case is in DIFFERENT with our number and the reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lossledger.errors import InputError
from lossledger.losses.registry import CLASSES

CASES = [
    case
    for case in json.loads((Path(__file__).parent / "goldens" / "frameworks.json").read_text())
    if case["convention"] == "keras3" and case["scope"] == "loss" and case["loss"] in CLASSES
]

DIFFERENT = {
    "k3-Tversky-sw": (0.345794, "Keras 3.15 swaps alpha and beta, and one weight a sample only scales the result"),
    "k3-red-mean_with_sample_weight-sw21": (23.757576, "Keras divides by the weights before they are broadcast"),
    "k3-sw-B-on-BT-error": (130.666667, "one weight a sample is one weight a sample; Keras raises unless B equals T"),
    "k3-rank-N-vs-N": ([0.0, 0.0, 0.0, 4.0], "the only axis is the batch, not the class axis"),
    "k3-rank-N-vs-N-sw": (4.0, "the only axis is the batch, so weights weigh samples"),
    "k3-rank-BT-vs-BT1-mask": (3.333333, "the target is expanded, so time is not averaged as the last axis"),
    "k3-CE-unnormalized": (InputError, "values above 1 are no probabilities"),
    "k3-SCE-unnormalized": (InputError, "values above 1 are no probabilities"),
    "k3-SCE-oob": (InputError, "a label out of range, in our error tree"),
    "k3-sw-elementwise-square-silent": (5.75, "a weight an element weighs the element; Keras broadcasts by accident"),
}


def ours(case):
    loss = CLASSES[case["loss"]](**case["kwargs"])
    # NaN and infinity are written as text in JSON.
    given = [None if case[k] is None else np.array(case[k]) for k in ("y_true", "y_pred", "sample_weight", "mask")]
    given = [a.astype(float) if a is not None and a.dtype.kind == "U" else a for a in given]
    return loss(*given).numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_the_number_is_that_of_keras(case):
    expected, _ = DIFFERENT.get(case["id"], (case["expected"], ""))
    if expected is InputError:
        with pytest.raises(InputError):
            ours(case)
        return
    np.testing.assert_allclose(ours(case), np.array(expected, float), rtol=case["rtol"], atol=case["atol"])


def test_every_difference_is_one():
    """A case that agrees with Keras has no place in the list of differences."""
    for case in CASES:
        if case["id"] in DIFFERENT and DIFFERENT[case["id"]][0] is not InputError:
            keras = np.array(np.nan if isinstance(case["expected"], str) else case["expected"], float)
            shape = np.broadcast_shapes(keras.shape, ours(case).shape)
            assert not np.allclose(np.broadcast_to(ours(case), shape), keras, rtol=case["rtol"], atol=case["atol"])
    assert set(DIFFERENT) <= {case["id"] for case in CASES} and len(CASES) > 60
