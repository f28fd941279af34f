"""The tests that Keras publishes for its losses, read from the installed wheel and run against our classes.

`losses_test.py` and `loss_test.py` are loaded as they are; what their names `losses`, `Loss` and so on refer to is
replaced by our classes behind a small adapter. Keras's cases are methods of `unittest` classes; each is a case here.
The adapter adds what Keras keeps outside of a loss: the mask that travels on the output, `floatx` as the default dtype,
results as arrays, and its registry of classes.
"""

from __future__ import annotations

import functools
import importlib.util
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import lossledger as ll
from lossledger import weighting
from lossledger.losses.registry import CLASSES

# Keras asks for a deprecated alias of NumPy when it is imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("keras")
    from keras.src import backend, saving
    from keras.src.saving.keras_saveable import KerasSaveable

# Cases in which Keras is wrong, each with the reason; a case of this list that passes is an error.
_LOST = "the configuration loses the argument that the loss was made with, so its copy is another loss"
_SWAPPED = "alpha multiplies false negatives and beta false positives, against the paper and Keras's later versions"
_NO_PROBABILITY = "predictions of 4 and 6 are no probabilities: the loss is below that of a perfect prediction"
_BLANK = "a label 0 before the last label is the blank: Keras cuts the sequence behind it and scores a blank as a label"
_BATCH_AXIS = "axis 0 is the batch: Keras reads it as the class axis with torch only, its other backends refuse"
_NAME = "a name gives a function without a reduction, so what weights do depends on who wraps it; ours gives the loss"
EXCEPTIONS = {
    "CosineSimilarityTest.test_config": _LOST,
    "HuberLossTest.test_config": _LOST,
    "SparseCategoricalCrossentropyTest.test_binary_segmentation_different_axis": _BATCH_AXIS,
    "SparseCategoricalCrossentropyTest.test_multi_class_segmentation_different_axis": _BATCH_AXIS,
    "CTCTest.test_correctness": _BLANK,
    "CTCTest.test_dtype_arg": _BLANK,
    "DiceTest.test_correctness": _NO_PROBABILITY,
    "DiceTest.test_dtype_arg": _NO_PROBABILITY,
    "TverskyTest.test_correctness": _NO_PROBABILITY,
    "TverskyTest.test_dtype_arg": _NO_PROBABILITY,
    "TverskyTest.test_correctness_custom_coefficients": f"{_NO_PROBABILITY}; and {_SWAPPED}",
    "TverskyTest.test_binary_segmentation_custom_coefficients": _SWAPPED,
    "TverskyTest.test_binary_segmentation_custom_coefficients_with_axis": _SWAPPED,
    "LossTest.test_get_method": _NAME,
    "LossTest.test_pickle": _NAME,
    "LossTest.test_reduction": "(N,) with (N,) is one column of N samples; Keras takes the batch for the class axis",
    "LossTest.test_squeeze_or_expand": "a target (B, T) with an output (B, T, 1): Keras makes time the class axis",
}


# --- the adapter ---------------------------------------------------------------------------------------------------


def array(result: Any) -> Any:
    """A result as an array; bfloat16, which NumPy does not have, stays a tensor."""
    result = result.detach()
    return result if result.dtype == torch.bfloat16 else result.numpy()


def adapted(base: type[ll.losses.Loss]) -> type[ll.losses.Loss]:
    """Our class, called and saved as Keras calls and saves its own."""

    @functools.wraps(base.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.floatx = getattr(torch, backend.floatx())

    def call(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        found = base.__call__(self, y_true, y_pred, sample_weight, mask=backend.get_keras_mask(y_pred))
        return array(found if self.dtype is not None else found.to(self.floatx))

    members = {"__init__": init, "__call__": call, "_obj_type": lambda self: "Loss"}
    cls = type(base.__name__, (base, KerasSaveable), members)
    return saving.register_keras_serializable("lossledger")(cls)


def adapted_function(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(function)(lambda *args, **kwargs: array(function(*args, **kwargs)))


def namespace() -> types.SimpleNamespace:
    """What the tests call `losses`."""
    classes = {name: adapted(cls) for name, cls in CLASSES.items()}
    functions = {
        name: adapted_function(function)
        for name, function in vars(ll.losses).items()
        if isinstance(function, types.FunctionType) and name not in ("get", "serialize", "deserialize")
    }
    return types.SimpleNamespace(**classes, **functions, get=ll.losses.get)


def module(name: str, **names: Any) -> types.ModuleType:
    """A module of Keras's tests, a copy of its own that nobody else imports, with some of its names replaced."""
    spec = importlib.util.find_spec(f"keras.src.losses.{name}")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    vars(found).update(names)
    return found


def modules() -> Iterator[types.ModuleType]:
    losses = namespace()
    yield module("losses_test", losses=losses)
    found = module("loss_test", losses_module=losses, squeeze_or_expand_to_same_rank=weighting.align)
    # The loss of these tests is a subclass; ours has the same `call`, over our base.
    own = type("ExampleLoss", (ll.losses.Loss,), {"call": found.ExampleLoss.call})
    found.ExampleLoss = adapted(own)
    yield found


def cases() -> Iterator[Any]:
    for found in modules():
        for cls in vars(found).values():
            if isinstance(cls, type) and issubclass(cls, unittest.TestCase):
                for method in unittest.defaultTestLoader.getTestCaseNames(cls):
                    yield pytest.param(cls, method, id=f"{cls.__name__}.{method}")


CASES = list(cases())


def test_exceptions_name_cases_that_exist():
    assert EXCEPTIONS.keys() <= {case.id for case in CASES}
    assert len(CASES) > 10 * len(EXCEPTIONS)


@pytest.mark.parametrize(("cls", "method"), CASES)
def test_case_of_keras(cls, method):
    identity = f"{cls.__name__}.{method}"
    result = unittest.TestResult()
    cls(method).run(result)
    assert result.testsRun == 1 and not result.skipped
    problems = "\n".join(trace for _, trace in (*result.errors, *result.failures))
    if identity in EXCEPTIONS:
        assert problems, f"{identity} passes now: take it off the list"
    else:
        assert not problems, problems
