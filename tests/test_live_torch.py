"""Random cases against torch.nn: the rows of the convention with their divisors, and our losses with their gradients.

Torch computes these from the same float32 arrays, in another order: a number may differ by 64 roundings at the size of
the terms.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lossledger as ll
from live import BINARY, LOGIT, PROBABILITY, REAL, Problem, close, numbers, often
from lossledger.conventions import outcome

ELEMENTWISE = {
    "MSELoss": (REAL, REAL, {}),
    "L1Loss": (REAL, REAL, {}),
    "SmoothL1Loss": (REAL, REAL, {"beta": (0.5, 2.0)}),
    "HuberLoss": (REAL, REAL, {"delta": (0.5, 2.0)}),
    "BCELoss": (BINARY, PROBABILITY, {}),
    "BCEWithLogitsLoss": (PROBABILITY, LOGIT, {}),
    "SoftMarginLoss": (REAL, REAL, {}),
    "PoissonNLLLoss": (PROBABILITY, PROBABILITY, {"log_input": (False,), "full": (True,)}),
}
# Our loss with the same elements.
OURS = {
    "MSELoss": lambda given: ll.losses.MeanSquaredError(),
    "L1Loss": lambda given: ll.losses.MeanAbsoluteError(),
    "HuberLoss": lambda given: ll.losses.Huber(given.get("delta", 1.0)),
    "BCEWithLogitsLoss": lambda given: ll.losses.BinaryCrossentropy(from_logits=True),
}


@st.composite
def elementwise(draw):
    name = draw(st.sampled_from(sorted(ELEMENTWISE)))
    target, kind, known = ELEMENTWISE[name]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    given = {k: draw(st.sampled_from(v)) for k, v in known.items() if draw(often(0.5))}
    given["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    weight = None
    if name.startswith("BCE") and draw(st.booleans()):
        weight = rng.uniform(0, 2, draw(st.sampled_from([shape, (shape[0], *(1,) * (len(shape) - 1)), shape[-1:]])))
    return Problem(name, given, numbers(rng, target, shape), numbers(rng, kind, shape), weight)


def check_elementwise(problem):
    p = torch.tensor(problem.y_pred, requires_grad=True)
    weight = {} if problem.sample_weight is None else {"weight": torch.tensor(problem.sample_weight).float()}
    value = getattr(nn, problem.loss)(**problem.kwargs, **weight)(p, torch.tensor(problem.y_true))
    expected = value.detach().numpy()
    scale = float(np.abs(expected).max()) * (problem.y_pred.size if problem.kwargs["reduction"] == "mean" else 1)
    assert close(outcome(problem.case("torch"))["value"], expected, scale)
    if problem.loss not in OURS or problem.kwargs["reduction"] == "none" or weight:
        return
    # Ours divides a sum by nothing; torch's sum is over elements, ours over entries, the mean of their columns.
    columns = problem.y_pred.shape[-1] if problem.kwargs["reduction"] == "sum" else 1
    loss = OURS[problem.loss](problem.kwargs)
    loss.reduction = ll.reduction.get(problem.kwargs["reduction"])
    tally, gradient = loss.backprop(problem.y_true, p)
    value.backward()
    assert close(float(tally.value) * columns, expected, scale)
    assert close(gradient.numpy() * columns, p.grad.numpy(), float(p.grad.abs().max()))


@given(elementwise())
@settings(max_examples=300)
def test_elementwise_losses(problem):
    check_elementwise(problem)


@pytest.mark.slow
@given(elementwise())
@settings(max_examples=4000)
def test_elementwise_losses_thousands_of_times(problem):
    check_elementwise(problem)


@st.composite
def labelled(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, classes = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    space = draw(st.lists(st.integers(1, 3), max_size=2))
    y = rng.integers(0, classes, (batch, *space))
    if draw(often(0.5)):
        y = np.where(rng.random(y.shape) < draw(st.sampled_from([0.3, 1.1])), -100, y)
    given = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if draw(often(0.3)):
        given["label_smoothing"] = 0.1
    weight = rng.uniform(0, 2, classes).astype(np.float32) if draw(st.booleans()) else None
    return given, y, numbers(rng, LOGIT, (batch, classes, *space)), weight


def check_labelled(drawn):
    """CrossEntropyLoss: what divides is the class weights of the labels that are not ignored; 0/0 is NaN."""
    given, y, p, weight = drawn
    leaf = torch.tensor(p, requires_grad=True)
    classes = {} if weight is None else {"weight": torch.tensor(weight)}
    value = nn.CrossEntropyLoss(**given, **classes)(leaf, torch.tensor(y))
    expected, scale = value.detach().numpy(), float(np.abs(p).max()) * (p.size if given["reduction"] == "sum" else 1)
    case = Problem("CrossEntropyLoss", given, y, p).case("torch", class_weight=weight)
    assert close(outcome(case)["value"], expected, scale)
    if given["reduction"] != "mean" or "label_smoothing" in given:
        return
    ours = ll.losses.SparseCategoricalCrossentropy(from_logits=True, axis=1)
    table = ll.compare(
        ll.losses.SparseCategoricalCrossentropy(from_logits=True),
        y.clip(0),
        np.moveaxis(p, 1, -1),
        mask=y >= 0,
        class_weight=weight,
    )
    assert close(table["torch"].value, expected, scale)
    if weight is None and (y >= 0).any():
        tally, gradient = ours.backprop(y.clip(0), leaf, mask=y >= 0)
        value.backward()
        assert close(float(tally.value), expected, scale)
        assert close(gradient.numpy(), leaf.grad.numpy(), 1.0)


@given(labelled())
@settings(max_examples=300)
def test_labelled_losses(drawn):
    check_labelled(drawn)


@pytest.mark.slow
@given(labelled())
@settings(max_examples=4000)
def test_labelled_losses_thousands_of_times(drawn):
    check_labelled(drawn)


@given(elementwise().filter(lambda problem: problem.loss in ("MSELoss", "L1Loss", "HuberLoss")))
@settings(max_examples=150)
def test_weights_of_functions_divide_as_the_convention_says(problem):
    rng = np.random.default_rng(problem.y_pred.size)
    weight = rng.uniform(0, 2, problem.y_pred.shape).astype(np.float32)
    name = {"MSELoss": "mse_loss", "L1Loss": "l1_loss", "HuberLoss": "huber_loss"}[problem.loss]
    given = {"reduction": "mean"}
    value = getattr(F, name)(*map(torch.tensor, (problem.y_pred, problem.y_true)), weight=torch.tensor(weight), **given)
    case = Problem(f"F.{name}", given, problem.y_true, problem.y_pred, weight).case("torch")
    assert close(outcome(case)["value"], float(value), float(value))
    reduction = "mean" if name == "huber_loss" else "mean_with_sample_weight"
    ours = {
        "mse_loss": ll.losses.MeanSquaredError,
        "l1_loss": ll.losses.MeanAbsoluteError,
        "huber_loss": ll.losses.Huber,
    }
    assert close(
        float(ours[name](reduction=reduction)(problem.y_true, problem.y_pred, weight)), float(value), float(value)
    )
