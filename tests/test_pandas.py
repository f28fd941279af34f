"""Columns and frames of pandas are arrays: their index, which a split leaves in any order, says nothing."""

import numpy as np
import pandas as pd
import pytest
import torch

import lossledger as ll

FRAME = pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "b": [0.5, 0.0, -1.0, 2.0]}, index=[7, 3, 11, 0])
TARGETS = pd.Series([1.0, 0.0, 2.0, 1.0], index=[7, 3, 11, 0])
WEIGHTS = pd.Series([1.0, 2.0, 0.0, 0.5], index=[7, 3, 11, 0])


def model() -> ll.Model:
    torch.manual_seed(0)
    made = ll.Model(torch.nn.Linear(2, 1))
    made.compile("sgd", "mse")
    return made


def test_frames_and_columns_give_the_numbers_of_their_values():
    ours, theirs = model(), model()
    x, y, w = FRAME.to_numpy(), TARGETS.to_numpy(), WEIGHTS.to_numpy()
    found = ours.fit(FRAME, TARGETS, sample_weight=WEIGHTS, validation_data=(FRAME, TARGETS), verbose=0, seed=0)
    expected = theirs.fit(x, y, sample_weight=w, validation_data=(x, y), verbose=0, seed=0)
    assert found.history == expected.history
    assert ours.evaluate([(FRAME, TARGETS)], verbose=0) == theirs.evaluate(x, y, verbose=0)
    assert np.array_equal(ours.predict(FRAME), theirs.predict(x))


def test_a_loss_takes_columns_in_their_order():
    loss = ll.losses.MeanSquaredError()
    found = loss(TARGETS, torch.zeros(4), sample_weight=WEIGHTS)
    assert float(found) == pytest.approx((TARGETS.to_numpy() ** 2 * WEIGHTS.to_numpy()).mean())


def test_columns_are_inputs_by_name_and_by_position():
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, a, b):
            return self.scale * (a + b)

    wanted = FRAME["a"] + FRAME["b"]
    for given in ({"a": FRAME["a"], "b": FRAME["b"]}, [FRAME["a"], FRAME["b"]], (FRAME["a"], FRAME["b"])):
        assert np.array_equal(ll.Model(Sum()).predict(given), wanted.to_numpy(np.float32))


def test_a_column_of_text_is_refused_by_name():
    with pytest.raises(ll.errors.InputTypeError, match=r"^x: expected a tensor, a NumPy array or numbers, received Da"):
        model().fit(FRAME.assign(a="text"), TARGETS, verbose=0)
