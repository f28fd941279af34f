"""Names from elsewhere: the error says which losses they may mean, and each of these exists."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lossledger as ll
from lossledger.errors import UnknownNameError
from lossledger.losses.meant import _MEANT, meant

L = ll.losses
LOGITS = "(from_logits=True)"
CLASSES = [f"SparseCategoricalCrossentropy{LOGITS}", f"CategoricalCrossentropy{LOGITS}", f"BinaryCrossentropy{LOGITS}"]
DICE = ["Dice()", "Dice(from_logits='sigmoid')", "Dice(from_logits='softmax')"]
NAMES = {
    "cross_entropy": CLASSES,
    "crossentropy": CLASSES,
    "ce": CLASSES,
    "CrossEntropyLoss": CLASSES,
    "nll": [CLASSES[0], "GaussianNegativeLogLikelihood()", "PoissonNegativeLogLikelihood()"],
    "bce_loss": ["BinaryCrossentropy()", CLASSES[2]],
    "BCEWithLogitsLoss": [CLASSES[2]],
    "dice_loss": DICE,
    "DiceLoss": DICE,
    "L1Loss": ["MeanAbsoluteError()"],
    "MSELoss": ["MeanSquaredError()"],
}


def suggested(name):
    with pytest.raises(UnknownNameError) as caught:
        L.get(name)
    said = str(caught.value)
    assert said.startswith("Could not interpret loss identifier: expected one of ") and f"received {name!r}" in said
    assert "Did you mean" not in said
    return re.findall(r"[A-Z]\w+\([^)]*\)", said.partition("it may mean ")[2])


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_that_a_name_may_mean(name):
    assert suggested(name) == NAMES[name]


@pytest.mark.parametrize("name", _MEANT)
def test_each_of_them_can_be_made(name):
    losses = re.findall(r"[A-Z]\w+\([^)]*\)", meant(name))
    assert len(losses) == len(_MEANT[name]) in (1, 2, 3)
    for loss in losses:
        assert isinstance(eval(loss, vars(L)), L.Loss)


def test_what_torch_calls_so_is_the_first_of_them():
    torch.manual_seed(0)
    logits, column = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    labels, binary = torch.arange(8) % 3, (torch.arange(8) % 2)[:, None].double()
    cases = [
        (nn.CrossEntropyLoss(), labels, logits),
        (nn.NLLLoss(), labels, logits.log_softmax(-1)),
        (nn.BCELoss(), binary, column.sigmoid()),
        (nn.BCEWithLogitsLoss(), binary, column),
        (nn.L1Loss(), binary, column * 4),
        (nn.MSELoss(), binary, column),
        (nn.SmoothL1Loss(), binary, column * 4),
    ]
    for theirs, y, prediction in cases:
        (first, *_) = suggested(type(theirs).__name__)
        torch.testing.assert_close(eval(first, vars(L))(y, prediction), theirs(prediction, y))


def test_other_names_are_judged_by_their_letters():
    with pytest.raises(UnknownNameError, match="Did you mean 'binary_crossentropy'"):
        L.get("binary_crosentropy")
