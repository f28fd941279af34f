"""What a loss reduces to, found by calling it: torch's losses, Keras's, ours, and wrong ones written by hand.

The expected name is what the documentation of each loss says that it divides by.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import declarations
import lossledger as ll
from lossledger.errors import InputError, InputTypeError
from lossledger.explain.evidence import NAMES

B, C, T = 10, 4, 5
LENGTHS = torch.tensor([5, 4, 3, 2, 1, 5, 2, 3, 4, 1])
MASK = torch.arange(T) < LENGTHS[:, None]


def normal(*shape):
    return torch.randn(*shape)


def labels(*shape):
    # Every class occurs, in another mix in each sample.
    return torch.randint(0, C, shape)


def signs(*shape):
    return torch.randint(0, 2, shape).float() * 2 - 1


def soft(*shape):
    return torch.randn(*shape).softmax(-1)


def mask_labels():
    return torch.where(MASK, labels(B, T), -100)


# --- torch.nn: (loss as called, targets, predictions, name for reduction mean, name for sum) ------------------------


def bind(module, call):
    return lambda y_true, y_pred: call(module, y_true, y_pred)


def ctc(module, y, p):
    lengths = torch.full((len(p),), p.shape[1]), torch.full((len(p),), y.shape[1])
    return module(p.log_softmax(-1).transpose(0, 1), y, *lengths)


def multi_label(*_):
    """Class indices, ended by -1."""
    return torch.tensor([[0, -1, -1, -1], [1, 2, -1, -1], [3, -1, -1, -1], [2, 0, 1, -1], [1, -1, -1, -1]] * 2)


TORCH = {
    "L1Loss": (lambda r: nn.L1Loss(reduction=r), lambda: (normal(B, C), normal(B, C)), "mean"),
    "MSELoss": (lambda r: nn.MSELoss(reduction=r), lambda: (normal(B, C), normal(B, C)), "mean"),
    "SmoothL1Loss": (lambda r: nn.SmoothL1Loss(reduction=r), lambda: (normal(B, C), normal(B, C)), "mean"),
    "HuberLoss": (lambda r: nn.HuberLoss(reduction=r), lambda: (normal(B, C), normal(B, C)), "mean"),
    "BCELoss": (lambda r: nn.BCELoss(reduction=r), lambda: (normal(B, C).sigmoid(), normal(B, C).sigmoid()), "mean"),
    "BCEWithLogitsLoss": (
        lambda r: nn.BCEWithLogitsLoss(reduction=r),
        lambda: (normal(B, C).sigmoid(), normal(B, C)),
        "mean",
    ),
    "SoftMarginLoss": (lambda r: nn.SoftMarginLoss(reduction=r), lambda: (signs(B, C), normal(B, C)), "mean"),
    "PoissonNLLLoss": (
        lambda r: nn.PoissonNLLLoss(reduction=r),
        lambda: (torch.randint(0, 4, (B, C)).float(), normal(B, C)),
        "mean",
    ),
    # Its documentation: mean divides by all elements, which is not the divergence; batchmean by the batch size.
    "KLDivLoss": (lambda r: nn.KLDivLoss(reduction=r), lambda: (soft(B, C), soft(B, C).log()), "mean"),
    "HingeEmbeddingLoss": (lambda r: nn.HingeEmbeddingLoss(reduction=r), lambda: (signs(B, C), normal(B, C)), "mean"),
    "CrossEntropyLoss": (lambda r: nn.CrossEntropyLoss(reduction=r), lambda: (labels(B), normal(B, C)), "mean"),
    "NLLLoss": (lambda r: nn.NLLLoss(reduction=r), lambda: (labels(B), soft(B, C).log()), "mean"),
    "NLLLoss2d": (
        lambda r: nn.NLLLoss(reduction=r),
        lambda: (labels(B, 2, 3), normal(B, C, 2, 3).log_softmax(1)),
        "mean",
    ),
    "MultiMarginLoss": (lambda r: nn.MultiMarginLoss(reduction=r), lambda: (labels(B), normal(B, C)), "mean"),
    "MultiLabelMarginLoss": (
        lambda r: nn.MultiLabelMarginLoss(reduction=r),
        lambda: (multi_label(), normal(B, C)),
        "mean",
    ),
    "MultiLabelSoftMarginLoss": (
        lambda r: nn.MultiLabelSoftMarginLoss(reduction=r),
        lambda: (torch.randint(0, 2, (B, C)).float(), normal(B, C)),
        "mean",
    ),
    "GaussianNLLLoss": (
        lambda r: bind(nn.GaussianNLLLoss(reduction=r), lambda m, y, p: m(p[..., 0], y, p[..., 1].exp())),
        lambda: (normal(B, C), normal(B, C, 2)),
        "mean",
    ),
    "CosineEmbeddingLoss": (
        lambda r: bind(nn.CosineEmbeddingLoss(reduction=r), lambda m, y, p: m(p[:, 0], p[:, 1], y)),
        lambda: (signs(B), normal(B, 2, C)),
        "mean",
    ),
    "MarginRankingLoss": (
        lambda r: bind(nn.MarginRankingLoss(0.5, reduction=r), lambda m, y, p: m(p[:, 0], p[:, 1], y)),
        lambda: (signs(B), normal(B, 2)),
        "mean",
    ),
    "TripletMarginLoss": (
        lambda r: bind(nn.TripletMarginLoss(reduction=r), lambda m, y, p: m(p[:, 0], p[:, 1], p[:, 2])),
        lambda: (torch.zeros(B), normal(B, 3, C)),
        "mean",
    ),
    "TripletMarginWithDistanceLoss": (
        lambda r: bind(nn.TripletMarginWithDistanceLoss(reduction=r), lambda m, y, p: m(p[:, 0], p[:, 1], p[:, 2])),
        lambda: (torch.zeros(B), normal(B, 3, C)),
        "mean",
    ),
    # Each sample over the length of its target, then the mean over samples.
    "CTCLoss": (
        lambda r: bind(nn.CTCLoss(reduction=r), ctc),
        lambda: (torch.randint(1, C, (B, 3)), normal(B, 9, C)),
        "mean",
    ),
}


def linear_cross_entropy(reduction):
    module = nn.LinearCrossEntropyLoss(C, 6, reduction=reduction)
    return bind(module.double(), lambda m, y, p: m(p.double(), y))


TORCH["LinearCrossEntropyLoss"] = (linear_cross_entropy, lambda: (torch.randint(0, 6, (B,)), normal(B, C)), "mean")


def test_every_loss_of_torch_is_here():
    assert set(nn.modules.loss.__all__) == set(TORCH)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", TORCH)
def test_losses_of_torch(name, reduction):
    make, inputs, mean = TORCH[name]
    y_true, y_pred = inputs()
    found = ll.fingerprint(make(reduction), y_true, y_pred)
    # The loss of a sample is a mean over its classes, says the documentation of the last.
    total = "mean × batch size" if name == "MultiLabelSoftMarginLoss" else "sum"
    assert found.name == (mean if reduction == "mean" else total), str(found)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.KLDivLoss(reduction="batchmean"), "sum / batch size"),
        (nn.MSELoss(reduction="none"), "unreduced"),
    ],
)
def test_other_reductions_of_torch(loss, name):
    assert ll.fingerprint(loss, soft(B, C), soft(B, C).log()).name == name


def test_functions_of_torch_are_called_input_first():
    y_true, y_pred = torch.rand(B, C), normal(B, C)
    found = ll.fingerprint(F.binary_cross_entropy_with_logits, y_true, y_pred)
    assert found.name == "mean"
    assert found.value == pytest.approx(float(F.binary_cross_entropy_with_logits(y_pred, y_true)))


def test_class_weights_are_recovered():
    weight = torch.tensor([1.0, 2.0, 5.0, 0.5])
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 2, 1])
    found = ll.fingerprint(nn.CrossEntropyLoss(weight=weight), y, normal(B, C))
    assert found.name == "class-weighted mean"
    assert dict(found.weights) == pytest.approx({0: 2.0, 1: 4.0, 2: 10.0, 3: 1.0})


def test_class_weights_of_pixels_are_recovered():
    weight = torch.tensor([1.0, 4.0, 2.0, 1.0])
    found = ll.fingerprint(nn.CrossEntropyLoss(weight=weight), labels(B, T), normal(B, C, T))
    assert found.name == "class-weighted mean"
    assert dict(found.weights) == pytest.approx({0: 1.0, 1: 4.0, 2: 2.0, 3: 1.0}, rel=1e-5)


def test_ignored_labels_are_a_token_mean():
    found = ll.fingerprint(nn.CrossEntropyLoss(), mask_labels(), normal(B, C, T), MASK)
    assert found.name == "token mean"


def test_adaptive_softmax():
    module = nn.AdaptiveLogSoftmaxWithLoss(C, 8, [3, 5], div_value=1.0)
    assert (
        ll.fingerprint(lambda y, p: module(p.float(), y).loss, torch.randint(0, 8, (B,)), normal(B, C)).name == "mean"
    )


# --- keras.losses ---------------------------------------------------------------------------------------------------


def one_hot():
    return torch.eye(C)[labels(B)]


def unit(values):
    return values / values.norm(dim=-1, keepdim=True)


def binary():
    return torch.randint(0, 2, (B, C)).float(), torch.rand(B, C) * 0.9 + 0.05


def positive():
    return torch.rand(B, C) + 0.2, torch.rand(B, C) + 0.2


KERAS = {
    "BinaryCrossentropy": (binary, "mean"),
    "BinaryFocalCrossentropy": (binary, "mean"),
    "CategoricalCrossentropy": (lambda: (one_hot(), soft(B, C)), "mean"),
    "CategoricalFocalCrossentropy": (lambda: (one_hot(), soft(B, C)), "mean"),
    "SparseCategoricalCrossentropy": (lambda: (labels(B), soft(B, C)), "mean"),
    "CategoricalGeneralizedCrossEntropy": (lambda: (labels(B), soft(B, C)), "mean"),
    "CategoricalHinge": (lambda: (one_hot(), normal(B, C)), "mean"),
    "CosineSimilarity": (lambda: (normal(B, C), normal(B, C)), "mean"),
    "Hinge": (lambda: (signs(B, C), normal(B, C)), "mean"),
    "SquaredHinge": (lambda: (signs(B, C), normal(B, C)), "mean"),
    "Huber": (lambda: (normal(B, C), normal(B, C)), "mean"),
    "LogCosh": (lambda: (normal(B, C), normal(B, C)), "mean"),
    "MeanAbsoluteError": (lambda: (normal(B, C), normal(B, C)), "mean"),
    "MeanAbsolutePercentageError": (positive, "mean"),
    "MeanSquaredError": (lambda: (normal(B, C), normal(B, C)), "mean"),
    "MeanSquaredLogarithmicError": (positive, "mean"),
    "Poisson": (positive, "mean"),
    # A sum over the last axis, which on [B, C] is all that a sample has; then the mean over samples.
    "KLDivergence": (lambda: (soft(B, C), soft(B, C)), "sum / batch size"),
    "CTC": (lambda: (torch.randint(1, C, (B, 3)), normal(B, 9, C)), "mean"),
    # axis=None: sums over everything, the batch too.
    "Dice": (binary, "batch-coupled"),
    "Tversky": (binary, "batch-coupled"),
    "Circle": (lambda: (torch.arange(B) % 3, unit(normal(B, C))), "batch-coupled"),
}
# The documentation of each: mean(…, axis=-1) by sample, which "sum" then adds up.
MEAN_OVER_CLASSES = [
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "CosineSimilarity",
    "Hinge",
    "SquaredHinge",
    "Huber",
    "LogCosh",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "MeanSquaredError",
    "MeanSquaredLogarithmicError",
    "Poisson",
]


def test_keras_sums_over_steps(keras):
    for name in MEAN_OVER_CLASSES:
        y_true, y_pred = torch.rand(B, T, C).round(), torch.rand(B, T, C) * 0.9 + 0.05
        assert ll.fingerprint(getattr(keras.losses, name)(reduction="sum"), y_true, y_pred).name == "sum", name


@pytest.fixture(scope="module")
def keras():
    return pytest.importorskip("keras")


def test_every_loss_of_keras_is_here(keras):
    classes = {name for name, value in vars(keras.losses).items() if inspect.isclass(value)}
    assert classes - {"Loss"} == set(KERAS)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("name", KERAS)
def test_losses_of_keras(keras, name, reduction):
    inputs, mean = KERAS[name]
    y_true, y_pred = inputs()
    found = ll.fingerprint(getattr(keras.losses, name)(reduction=reduction), y_true, y_pred)
    expected = {"sum_over_batch_size": mean, "sum": "sum", "mean_with_sample_weight": "weighted mean"}[reduction]
    if mean == "batch-coupled" or (name == "KLDivergence" and reduction == "mean_with_sample_weight"):
        expected = mean
    if reduction == "sum" and name in MEAN_OVER_CLASSES:
        expected = "mean × batch size"
    assert found.name == expected, str(found)


# --- ours -----------------------------------------------------------------------------------------------------------

OURS = {row.name: row for row in declarations.ROWS}
PLAIN = {
    "sum_over_batch_size": "mean",
    "sum": "sum",
    "mean_with_sample_weight": "weighted mean",
    "sum_over_all_entries": "mean",
    "sum_over_nonzero_weights": "mean",
    "mean_per_sample": "mean",
}
MASKED = {
    "sum_over_batch_size": "token mean",
    "sum": "sum",
    "mean_with_sample_weight": "token mean",
    "sum_over_all_entries": "mean over masked entries too",
    "sum_over_nonzero_weights": "token mean",
    "mean_per_sample": "sequence mean",
}


@pytest.mark.parametrize("reduction", PLAIN)
@pytest.mark.parametrize("name", OURS)
def test_our_losses(name, reduction):
    row = OURS[name]
    y_true, y_pred = row.inputs(np.random.default_rng(3), (B, T))
    found = ll.fingerprint(row.make(reduction=reduction), y_true, y_pred)
    assert found.name == PLAIN[reduction], str(found)


@pytest.mark.parametrize("reduction", MASKED)
@pytest.mark.parametrize("name", ["mse", "bce-logits", "cce-logits", "sparse-logits", "huber", "kl-divergence"])
def test_our_losses_under_a_mask(name, reduction):
    row = OURS[name]
    y_true, y_pred = row.inputs(np.random.default_rng(3), (B, T))
    found = ll.fingerprint(row.make(reduction=reduction), y_true, y_pred, MASK)
    assert found.name == MASKED[reduction], str(found)
    assert not found.warnings


COUPLED = {
    "Circle": (ll.losses.Circle(gamma=2.0), lambda: (torch.arange(B) % 3, unit(normal(B, C)))),
    "InfoNCE": (ll.losses.InfoNCE(temperature=1.0), lambda: (torch.zeros(B), normal(B, 2, C))),
    "NTXent": (ll.losses.NTXent(temperature=1.0), lambda: (torch.zeros(B), normal(B, 2, C))),
    "SupervisedContrastive": (
        ll.losses.SupervisedContrastive(temperature=1.0),
        lambda: (torch.arange(B) % 3, normal(B, C)),
    ),
    "TripletHard": (ll.losses.TripletHard(), lambda: (torch.arange(B) % 3, normal(B, C))),
    "TripletSemiHard": (ll.losses.TripletSemiHard(), lambda: (torch.arange(B) % 3, normal(B, C))),
    **{name: (getattr(ll.losses, name)(), binary) for name in ("Dice", "Jaccard", "Tversky")},
}


def of_pixels():
    return torch.eye(C)[labels(B, T)], soft(B, T, C)


# Losses of areas: what the documentation of each says of its axes.
AREAS = {
    "FocalTversky": "batch-coupled",
    "LogCoshDice": "batch-coupled",
    "AsymmetricFocalTversky": "mean",
    "AsymmetricUnifiedFocal": "mean",
    "GeneralizedDice": "mean",
    "LovaszHinge": "mean",
    "LovaszSoftmax": "mean",
}


@pytest.mark.parametrize("name", AREAS)
def test_our_losses_of_areas(name):
    found = ll.fingerprint(getattr(ll.losses, name)(), *of_pixels())
    assert found.name == AREAS[name], str(found)


@pytest.mark.parametrize("reduction", MASKED)
def test_a_loss_of_hidden_states(reduction):
    loss = ll.losses.LinearCrossentropy(nn.Linear(C, 6), reduction=reduction)
    y_true, y_pred = torch.randint(0, 6, (B, T)), normal(B, T, C)
    assert ll.fingerprint(loss, y_true, y_pred).name == PLAIN[reduction]
    assert ll.fingerprint(loss, y_true, y_pred, MASK).name == MASKED[reduction]


def test_every_loss_of_ours_is_here():
    probed = {type(row.make()) for row in OURS.values()} | {type(loss) for loss, _ in COUPLED.values()}
    named = {getattr(ll.losses, name) for name in ll.losses.__all__ if name[0].isupper()}
    missing = {one.__name__ for one in named - probed} - set(AREAS)
    # The base class, sums of losses (below), hidden states and torch's own losses (above).
    assert missing == {"Loss", "Expression", "TorchLoss", "LinearCrossentropy"}


@pytest.mark.parametrize("name", COUPLED)
def test_our_losses_that_couple_the_batch(name):
    loss, inputs = COUPLED[name]
    found = ll.fingerprint(loss, *inputs())
    assert found.name == "batch-coupled", str(found)


def test_dice_of_each_sample_is_a_mean():
    y_true, y_pred = torch.randint(0, 2, (B, T, C)).float(), torch.rand(B, T, C)
    assert ll.fingerprint(ll.losses.Dice(axis=(1,)), y_true, y_pred).name == "mean"


def test_an_expression():
    loss = 0.5 * ll.losses.MeanSquaredError() + ll.losses.MeanAbsoluteError()
    assert ll.fingerprint(loss, normal(B, C), normal(B, C)).name == "mean"


# --- wrong ones, by hand --------------------------------------------------------------------------------------------


def standardised(y_true, y_pred):
    return (((y_pred - y_pred.mean(0)) / y_pred.std(0) - y_true) ** 2).mean()


def valid_of(y_true):
    return y_true > -100


def entries(y_true, y_pred):
    """Cross-entropy by entry `[B, T]`, 0 at ignored labels."""
    return F.cross_entropy(y_pred, y_true, reduction="none", ignore_index=-100)


def regression():
    return normal(B, C), normal(B, C)


def sequences():
    return mask_labels(), normal(B, C, T), MASK


def own_weights(y_true, y_pred):
    weight = 1 + y_true.abs().sum(-1)
    return (weight * (y_true - y_pred).square().mean(-1)).sum() / weight.sum()


WRONG = {
    "mean of means": (
        lambda y_true, y_pred: (entries(y_true, y_pred).sum(1) / valid_of(y_true).sum(1)).mean(),
        sequences,
        "sequence mean",
    ),
    "mask forgotten in the divisor": (
        lambda y_true, y_pred: entries(y_true, y_pred).mean(),
        sequences,
        "mean over masked entries too",
    ),
    "divided twice": (
        lambda y_true, y_pred: F.cross_entropy(y_pred, y_true) / len(y_true),
        sequences,
        "mean / batch size",
    ),
    "a mean divided by the batch size": (
        lambda y_true, y_pred: F.mse_loss(y_pred, y_true) / len(y_true),
        regression,
        "mean / batch size",
    ),
    "sum over the batch size": (
        lambda y_true, y_pred: (y_true - y_pred).square().sum() / len(y_true),
        regression,
        "sum / batch size",
    ),
    "mean times batch size": (
        lambda y_true, y_pred: F.mse_loss(y_pred, y_true) * len(y_true),
        regression,
        "mean × batch size",
    ),
    "token mean times batch size": (
        lambda y_true, y_pred: F.cross_entropy(y_pred, y_true) * len(y_true),
        sequences,
        "mean × batch size",
    ),
    "sum over a constant": (lambda y_true, y_pred: (y_true - y_pred).square().sum() / 32, regression, "sum"),
    "(N, 1) against (N,)": (
        lambda y_true, y_pred: (y_true - y_pred).abs().mean(),
        lambda: (normal(B), normal(B, 1)),
        "all-pairs broadcast",
    ),
    "(N,) against (N, 1), summed": (
        lambda y_true, y_pred: (y_true - y_pred).square().sum(),
        lambda: (normal(B, 1), normal(B)),
        "all-pairs broadcast",
    ),
    "torch's gaussian likelihood of (N, 1) against (N,)": (
        lambda y_true, y_pred: F.gaussian_nll_loss(y_pred, y_true, torch.ones_like(y_pred)),
        lambda: (normal(B, 1), normal(B)),
        "all-pairs broadcast",
    ),
    "dropout inside": (
        lambda y_true, y_pred: F.mse_loss(F.dropout(y_pred, 0.5), y_true),
        regression,
        "stochastic",
    ),
    "noise of NumPy": (
        lambda y_true, y_pred: F.mse_loss(y_pred, y_true) * float(np.random.default_rng().uniform()),
        regression,
        "stochastic",
    ),
    "standardised by the batch": (standardised, regression, "batch-coupled"),
    "root of the mean": (lambda y_true, y_pred: F.mse_loss(y_pred, y_true).sqrt(), regression, "batch-coupled"),
    "softmax over the batch": (
        lambda y_true, y_pred: -(y_true * y_pred.log_softmax(0)).sum(-1).mean(),
        lambda: (one_hot(), normal(B, C)),
        "batch-coupled",
    ),
    "differences of neighbours": (
        lambda y_true, y_pred: (y_true - y_pred)[1:].mul((y_true - y_pred)[:-1]).sum(),
        regression,
        "batch-coupled",
    ),
    "in-batch negatives": (
        lambda y_true, y_pred: F.cross_entropy(y_pred @ y_true.T, torch.arange(len(y_true))),
        regression,
        "batch-coupled",
    ),
    "weights of its own": (own_weights, regression, "weighted mean"),
    "class-weighted": (
        lambda y_true, y_pred: F.cross_entropy(y_pred, y_true, torch.tensor([1.0, 3.0, 3.0, 9.0]).to(y_pred)),
        lambda: (torch.arange(B) % C, normal(B, C)),
        "class-weighted mean",
    ),
    "whole division": (
        lambda y_true, y_pred: (100 * (y_true - y_pred).square()).sum() // len(y_true),
        regression,
        "rounded",
    ),
}


def test_rounding_is_not_taken_for_weights():
    # Of these rounded values, weights can be found that fit all batches by accident.
    torch.manual_seed(0)
    assert ll.fingerprint(WRONG["whole division"][0], normal(9, 5), normal(9, 5)).name == "rounded"


def test_a_function_may_write_to_its_arguments():
    def overwrites(y_true, y_pred):
        loss = F.mse_loss(y_pred, y_true)
        y_true.zero_()
        return loss

    y_true, y_pred = regression()
    found = ll.fingerprint(overwrites, y_true, y_pred)
    assert found.name == "mean" and found.value == pytest.approx(float(F.mse_loss(y_pred, y_true)), rel=1e-6)


@pytest.mark.parametrize("name", WRONG)
def test_hand_written_losses(name):
    fn, inputs, expected = WRONG[name]
    found = ll.fingerprint(fn, *inputs())
    assert found.name == expected, str(found)
    assert found.evidence


def said(found, word):
    return any(word in text for text in found.warnings)


@pytest.mark.parametrize(
    "fn",
    [
        lambda y_true, y_pred: F.mse_loss(y_pred.detach(), y_true),
        lambda y_true, y_pred: float(F.mse_loss(y_pred, y_true)),
        lambda y_true, y_pred: np.square(y_true.numpy() - y_pred.detach().numpy()).mean(),
    ],
)
def test_a_lost_gradient_is_said(fn):
    found = ll.fingerprint(fn, *regression())
    assert found.name == "mean" and said(found, "gradient")
    assert not said(ll.fingerprint(nn.MSELoss(), *regression()), "gradient")


def test_a_mask_that_only_weighs_the_wrong_thing_is_said():
    def leaky(y_true, y_pred, mask):
        return ((y_true - y_pred).square().mean((1, 2)) * mask.sum(1)).sum() / mask.sum()

    found = ll.fingerprint(leaky, normal(B, T, 2), normal(B, T, 2), MASK)
    assert found.name == "token mean" and said(found, "masked positions reach")


def test_samples_that_are_all_alike_tell_nothing():
    found = ll.fingerprint(nn.MSELoss(), torch.zeros(B, 1), torch.ones(B, 1))
    assert found.name == "undetermined"


def test_a_function_that_fails_is_reported():
    def broken(y_true, y_pred):
        raise RuntimeError("no such thing")

    found = ll.fingerprint(broken, *regression())
    assert found.name == "undetermined" and found.failed[0].text == "RuntimeError: no such thing"
    assert "cannot be probed: RuntimeError: no such thing" in str(found)


def test_a_function_that_takes_no_single_samples_is_judged_by_parts():
    def at_least_two(y_true, y_pred):
        if len(y_true) < 2:
            raise ValueError("two samples at least")
        return F.mse_loss(y_pred, y_true)

    found = ll.fingerprint(at_least_two, *regression())
    assert found.name == "mean"
    assert [probe.probe for probe in found.failed] == ["single samples"]


def test_nothing_of_the_caller_changes():
    # float64, so that nothing is copied on the way by a change of the dtype.
    y_true, y_pred = (values.double() for values in regression())
    before, state = (y_true.clone(), y_pred.clone()), torch.random.get_rng_state()
    norm = nn.BatchNorm1d(C)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, input, target):
            target.zero_()
            return F.mse_loss(self.norm(input), target)

    assert ll.fingerprint(Normed(), y_true, y_pred).name == "batch-coupled"
    assert torch.equal(y_true, before[0]) and torch.equal(y_pred, before[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert int(norm.num_batches_tracked) == 0


def test_the_order_of_the_arguments():
    def asymmetric(a, b):
        return (a.exp() - a * b).mean()

    y_true, y_pred = regression()
    first = ll.fingerprint(asymmetric, y_true, y_pred)
    second = ll.fingerprint(asymmetric, y_true, y_pred, order="input, target")
    assert first.value == pytest.approx(float(asymmetric(y_true, y_pred)), rel=1e-6)
    assert second.value == pytest.approx(float(asymmetric(y_pred, y_true)), rel=1e-6)

    def named(input, target):
        return asymmetric(input, target)

    assert ll.fingerprint(named, y_true, y_pred).value == second.value


def test_numbers_of_the_evidence():
    y_true, y_pred = regression()
    found = ll.fingerprint(nn.MSELoss(reduction="sum"), y_true, y_pred)
    measured = {evidence.probe: evidence.measured for evidence in found.evidence}
    assert measured["duplicate"] == pytest.approx(2.0)
    assert found.value == pytest.approx(float((y_true - y_pred).square().sum()))
    assert found.samples == B


def test_forms():
    found = ll.fingerprint(nn.MSELoss(), *regression())
    assert all(len(line) <= 80 for line in str(found).splitlines())
    assert found.to_dict()["name"] == "mean" and found.meaning == NAMES["mean"]
    assert "<script" not in ll.fingerprint(lambda y, p: 1 / 0, *regression())._repr_html_()


def test_hostile_messages_are_escaped():
    def broken(y_true, y_pred):
        raise ValueError("<script>alert(1)</script>")

    assert "<script>" not in ll.fingerprint(broken, *regression())._repr_html_()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ll.fingerprint(nn.MSELoss, *regression()), InputTypeError, "the class MSELoss"),
        (lambda: ll.fingerprint("mse", *regression()), InputTypeError, "received str"),
        (lambda: ll.fingerprint(nn.MSELoss(), normal(2, 1), normal(2, 1)), InputError, "at least 4 samples"),
        (lambda: ll.fingerprint(nn.MSELoss(), normal(5, 1), normal(6, 1)), InputError, "as many targets"),
        (lambda: ll.fingerprint(nn.MSELoss(), normal(5, 1), normal(5, 1), torch.ones(4)), InputError, "mask must have"),
        (lambda: ll.fingerprint(nn.MSELoss(), normal(5, 1), normal(5, 1), order="yx"), InputError, "order must be"),
    ],
)
def test_what_cannot_be_probed(call, error, message):
    with pytest.raises(error, match=message):
        call()
