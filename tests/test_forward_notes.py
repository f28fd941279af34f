"""Errors of the model stay what they are; a note says what it was called with, and what often helps."""

import pytest
import torch
from torch import nn

import lossledger as ll

X = torch.ones(9, 3)
Y = torch.ones(9, 1)


def model(net: nn.Module | None = None) -> ll.Model:
    made = ll.Model(nn.Linear(3, 1) if net is None else net)
    made.compile("sgd", "mse")
    return made


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: model().fit(X.long(), Y, verbose=0), ["torch.int64 (2, 3)", "two samples", "convert", "float32"]),
        (lambda: model().predict(X.double()), ["torch.float64 (9, 3)", "Tensors keep their dtype"]),
        (lambda: model().evaluate({"foo": X}, Y, verbose=0), ["{'foo': 'torch.float32 (2, 3)'}"]),
        (lambda: model(normed()).fit(X, Y, batch_size=4, verbose=0), ["torch.float32 (1, 3)", "batch_size"]),
        (lambda: model(normed()).fit(X, Y, batch_size=1, accumulate=2, verbose=0), ["torch.float32 (1, 3)", "norm"]),
    ],
)
def test_a_note_says_what_a_model_was_called_with(call, words):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        call()
    assert not isinstance(caught.value, ll.errors.LossledgerError)
    (note,) = caught.value.__notes__
    assert all(word in note for word in words), note


def test_errors_of_the_library_have_no_note():
    class Twice(nn.Linear):
        def forward(self, x):
            ll.add_loss("size", x.sum())
            ll.add_loss("size", x.sum())
            return super().forward(x)

    with pytest.raises(ll.errors.InputError, match="already used") as caught:
        model(Twice(3, 1)).fit(X, Y, verbose=0)
    assert not hasattr(caught.value, "__notes__")
