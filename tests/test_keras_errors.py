"""Each mistake in Keras and here: one class of errors, one set of key words. Where the two differ, the reason.

Keras's calls are really run. Code and tests that match on its errors go on to work with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras.src.trainers.compile_utils import CompileLoss
from torch import nn

import lossledger as ll

K, L = keras.losses, ll.losses
X, Y = np.linspace(-1, 1, 30, dtype="float32").reshape(10, 3), np.linspace(0, 1, 10, dtype="float32").reshape(10, 1)
ONE_HOT, FOUR = np.eye(3, dtype="float32"), np.full((3, 4), 0.25, "float32")
BY_NAME = {"a": Y, "b": Y}


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": self.a(x), "b": self.b(x)}


class Unwritten(L.Loss):
    """A loss without `call`."""


class UnwrittenKeras(K.Loss):
    """The same."""


def keras_model(outputs=1, loss="mse", **options):
    start = keras.Input((3,))
    made = {name: keras.layers.Dense(1, name=name)(start) for name in ("a", "b")[:outputs]}
    model = keras.Model(start, made["a"] if outputs == 1 else made)
    model.compile("sgd", loss, **options)
    return model


def our_model(outputs=1, loss="mse", **options):
    model = ll.Model(nn.Linear(3, 1) if outputs == 1 else TwoOutputs())
    model.compile("sgd", loss, **options)
    return model


def fit(model, x=X, y=Y, **options):
    return model.fit(x, y, verbose=0, **options)


def batches(*parts):
    yield parts


@dataclass(frozen=True)
class Pair:
    """A mistake in Keras and the same one here.

    Args:
        name: of the mistake.
        keras: makes it in Keras.
        ours: makes it here.
        error: class of both errors.
        match: regular expression that finds the key words in both messages.
    """

    name: str
    keras: Callable[[], Any]
    ours: Callable[[], Any]
    error: type[Exception]
    match: str


def of_losses(name, make, error, match):
    """The same call on `keras.losses` and on ours."""
    return Pair(name, lambda: make(K), lambda: make(L), error, match)


def of_models(name, make, error, match):
    """The same call on a Keras model and on ours."""
    return Pair(name, lambda: make(keras_model), lambda: make(our_model), error, match)


SAME_SHAPE = "must have the same shape"
REDUCTION = "Invalid value for argument `reduction`"
INTERVAL = r"q must be in the interval \(0, 1\)"
LOSSES = [
    *(
        of_losses(f"reduction-of-{name}", lambda k, n=name: getattr(k, n)(reduction="abc"), ValueError, REDUCTION)
        for name in ("Hinge", "SquaredHinge", "CategoricalHinge", "MeanSquaredError", "BinaryCrossentropy", "Dice")
    ),
    of_losses("name", lambda k: k.get("typo"), ValueError, "Could not interpret loss identifier.*typo"),
    of_losses("number", lambda k: k.get(5), ValueError, "Could not interpret loss identifier.*5"),
    Pair("no-call", lambda: UnwrittenKeras()(Y, Y), lambda: Unwritten()(Y, Y), NotImplementedError, ""),
    of_losses("q-0", lambda k: k.CategoricalGeneralizedCrossEntropy(q=0), ValueError, INTERVAL),
    of_losses("q-1", lambda k: k.CategoricalGeneralizedCrossEntropy(q=1), ValueError, INTERVAL),
    of_losses("classes", lambda k: k.CategoricalCrossentropy()(ONE_HOT, FOUR), ValueError, SAME_SHAPE),
    of_losses(
        "classes-of-logits",
        lambda k: k.CategoricalCrossentropy(from_logits=True)(ONE_HOT, FOUR),
        ValueError,
        SAME_SHAPE,
    ),
    of_losses("columns", lambda k: k.BinaryCrossentropy()(ONE_HOT, FOUR), ValueError, SAME_SHAPE),
    of_losses(
        "one-hot-labels",
        lambda k: k.SparseCategoricalCrossentropy()(ONE_HOT.astype("int64"), FOUR),
        ValueError,
        "must have the same shape up until the last dimension",
    ),
    *(
        of_losses(
            f"axis-of-{function}",
            lambda k, f=function: getattr(k, f)(ONE_HOT, ONE_HOT, axis=True),
            ValueError,
            "`axis` must be of type `int`",
        )
        for function in ("categorical_crossentropy", "categorical_focal_crossentropy")
    ),
    of_losses(
        "ctc-targets",
        lambda k: k.CTC()(np.ones(2, "int64"), np.zeros((2, 4, 3), "float32")),
        ValueError,
        r"Targets `y_true` are expected to be a tensor of shape `\(batch_size, max_length\)`",
    ),
    of_losses(
        "ctc-logits",
        lambda k: k.CTC()(np.ones((2, 1), "int64"), np.zeros((2, 4), "float32")),
        ValueError,
        r"Logits `y_pred` are expected to be a tensor of shape `\(batch_size, max_length, num_classes\)`",
    ),
]

WEIGHTS = "Expected `loss_weights` argument to be a float"
NUMBER = "`loss_weights` must match the number of losses"
MISSING = r"can't be found in .*the model's output \(`y_pred`\)"
STRUCTURES = "y_true and y_pred have different structures"
OBJECTIVES = [
    Pair("loss-weights-text", lambda: CompileLoss("mse", "2"), lambda: ll.Objective("mse", "2"), ValueError, WEIGHTS),
    Pair(
        "loss-weights-number",
        lambda: CompileLoss(["mse", "mae"], [1.0], output_names=["a", "b"])([Y, Y], [Y, Y]),
        lambda: ll.Objective(["mse", "mae"], [1.0], output_names=["a", "b"])([Y, Y], [Y, Y]),
        ValueError,
        NUMBER,
    ),
    Pair(
        "loss-of-no-output",
        lambda: CompileLoss({"a": {"z": "mse"}}, output_names=["a", "b"])({"a": BY_NAME}, {"a": BY_NAME}),
        lambda: ll.Objective({"z": "mse"})({"z": Y}, BY_NAME),
        KeyError,
        MISSING,
    ),
    of_models(
        "loss-of-no-output-in-fit",
        lambda make: fit(make(2, {"a": "mse", "z": "mse"}), y={"a": Y, "z": Y}),
        (ValueError, KeyError),
        "Expected keys .* in loss dict|can't be found in",
    ),
    Pair(
        "fewer-targets",
        lambda: CompileLoss(["mse", "mse"], output_names=["a", "b"])([Y], [Y, Y]),
        lambda: ll.Objective(["mse", "mse"], output_names=["a", "b"])([Y], [Y, Y]),
        ValueError,
        STRUCTURES,
    ),
    Pair(
        "one-target-for-two",
        lambda: CompileLoss({"a": "mse", "b": "mse"}, output_names=["a", "b"])(Y, BY_NAME),
        lambda: ll.Objective({"a": "mse", "b": "mse"})(Y, BY_NAME),
        ValueError,
        STRUCTURES,
    ),
]

NO_LOSS = r"No loss to compute. Provide a `loss` argument in `compile\(\)`"
LENGTHS = "Data cardinality is ambiguous"
FORMAT = "Data is expected to be in format"
FEW = "Training data contains 10 samples, which is not sufficient to split it"
ARRAYS_ONLY = "Argument `validation_split` is only supported for tensors or NumPy arrays"
MODELS = [
    of_models("no-loss", lambda make: fit(make(loss=None)), ValueError, NO_LOSS),
    Pair(
        "not-compiled",
        lambda: fit(keras.Sequential([keras.layers.Dense(1)])),
        lambda: fit(ll.Model(nn.Linear(3, 1))),
        ValueError,
        r"You must call `compile\(\)` before using the model",
    ),
    of_models("fewer-targets", lambda make: fit(make(), y=Y[:3]), ValueError, LENGTHS),
    of_models("fewer-weights", lambda make: fit(make(), sample_weight=np.ones(3)), ValueError, LENGTHS),
    of_models("split-leaves-nothing", lambda make: fit(make(), validation_split=0.999), ValueError, FEW),
    of_models(
        "split-of-batches", lambda make: fit(make(), batches(X, Y), None, validation_split=0.5), ValueError, ARRAYS_ONLY
    ),
    of_models("batch-of-four", lambda make: fit(make(), batches(X, Y, Y, Y), None, shuffle=False), ValueError, FORMAT),
    of_models("loss-weights-text", lambda make: make(loss_weights="2"), ValueError, WEIGHTS),
]


@pytest.mark.parametrize("pair", [pytest.param(p, id=p.name) for p in LOSSES + OBJECTIVES + MODELS])
def test_the_same_class_and_key_words(pair):
    for make in (pair.keras, pair.ours):
        with pytest.raises(pair.error, match=f"(?s){pair.match}"):
            make()


def test_ours_can_be_caught_as_ours_too():
    for pair in LOSSES + OBJECTIVES + MODELS:
        if pair.name != "no-call":
            with pytest.raises(ll.errors.LossledgerError):
                pair.ours()


@dataclass(frozen=True)
class Difference:
    """What only one of the two refuses, and why.

    Args:
        name: of the difference.
        keras: the call in Keras.
        ours: the call here.
        reason: why ours is otherwise.
    """

    name: str
    keras: Callable[[], Any]
    ours: Callable[[], Any]
    reason: str


def both(name, make, reason):
    return Difference(name, lambda: make(K), lambda: make(L), reason)


def both_models(name, make, reason):
    return Difference(name, lambda: make(keras_model), lambda: make(our_model), reason)


ONES = np.ones(10, "float32")
ONLY_KERAS_REFUSES = [
    both_models("whole-loss-weight", lambda make: make(loss_weights=2), "2 is as good a factor as 2.0"),
    both_models("one-metric", lambda make: make(metrics="mae"), "one metric needs no list"),
    both_models(
        "class-and-sample-weight",
        lambda make: fit(make(loss="hinge"), y=Y.round(), class_weight={0: 1.0, 1: 2.0}, sample_weight=ONES),
        "the two multiply",
    ),
    Difference(
        "class-weight-of-two",
        lambda: fit(
            keras_model(2, {"a": "hinge", "b": "mse"}), y={"a": Y.round(), "b": Y}, class_weight={0: 1.0, 1: 2.0}
        ),
        lambda: fit(our_model(2, {"a": "hinge", "b": "mse"}), y={"a": Y.round(), "b": Y}, class_weight={"a": {1: 2.0}}),
        "class weights go by output",
    ),
]
ONLY_OURS_REFUSES = [
    both("get-none", lambda k: k.get(None), "an output without a loss is said in the objective, not by a loss None"),
    both("get-class", lambda k: k.get(k.Dice), "an instance shows its arguments; the message says Dice()"),
    both("broadcast", lambda k: k.MeanSquaredError()(Y, X), "each prediction would be compared with several targets"),
    both(
        "logits", lambda k: k.BinaryCrossentropy()(Y, Y + 3), "clipped logits train nothing: from_logits was forgotten"
    ),
    both("targets", lambda k: k.CategoricalCrossentropy()(ONE_HOT + 3, ONE_HOT), "the loss is then unbounded below"),
    both("labels", lambda k: k.Hinge()(Y + 3, Y), "labels of a margin are 0 and 1, or -1 and 1"),
    both(
        "axis-is-bool",
        lambda k: k.BinaryFocalCrossentropy(axis=True),
        "Keras refuses it in two functions; the mistake is the same in all",
    ),
    both(
        "class-axis-0",
        lambda k: k.SparseCategoricalCrossentropy(axis=0)(np.zeros(3, "int64"), np.full((2, 3), 0.5, "float32")),
        "axis 0 is the batch; so say the TensorFlow and JAX backends of Keras",
    ),
    both("alpha", lambda k: k.Tversky(alpha=-1.0), "a negative weight rewards mistakes"),
    both("weights", lambda k: k.MeanSquaredError()(X[:3], X[:3], np.ones((3, 3, 1))), "no weight fits two ways"),
    both_models(
        "list-for-one", lambda make: fit(make(loss=["mse", "mae"])), "several losses on one output are added: a + b"
    ),
]
# Of the other errors of Keras, in losses and trainers/compile_utils.py of 3.15:
# - "must be at least rank 1": an earlier line of Keras fails first, with an IndexError; ours is an InputError.
# - a label out of range: an error of the backend, an IndexError in torch; ours is an InputError.
# - "Unsupported type … in the `loss` configuration": for nested containers that are no dict, list or tuple; outputs
#   here are one tensor, a list or a dict.


@pytest.mark.parametrize("difference", [pytest.param(d, id=d.name) for d in ONLY_KERAS_REFUSES])
def test_what_only_keras_refuses(difference):
    with pytest.raises((ValueError, AttributeError)):
        difference.keras()
    difference.ours()
    assert difference.reason


@pytest.mark.parametrize("difference", [pytest.param(d, id=d.name) for d in ONLY_OURS_REFUSES])
def test_what_only_ours_refuses(difference):
    difference.keras()
    with pytest.raises(ll.errors.LossledgerError):
        difference.ours()
    assert difference.reason
