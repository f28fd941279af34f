"""Correct set-ups, on which every check must be silent: name -> arguments of `check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import lossledger as ll
from declarations import ROWS

L = ll.losses
F = nn.functional
LOGITS = {"from_logits": True}
Setup = Callable[[], dict[str, Any]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without_missing(y_true, y_pred):
    known = ~y_true.isnan()
    return (((y_pred - y_true.nan_to_num()) ** 2) * known).sum() / known.sum()


def missing():
    y_true = normal(64, 2)
    return torch.where(y_true > 1.0, torch.nan, y_true)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=seeded(seed)) * scale


def labels(*shape, classes, seed=1):
    return torch.randint(0, classes, shape, generator=seeded(seed))


def binary(*shape, share=0.4, seed=1):
    return (torch.rand(*shape, generator=seeded(seed)) < share).float()


def one_hot(*shape, classes, seed=1):
    return F.one_hot(labels(*shape, classes=classes, seed=seed), classes).float()


def given(loss, y_true, y_pred, **more):
    return {"loss_or_objective": loss, "y_true": y_true, "y_pred": y_pred, **more}


def of_row(row, entries) -> Setup:
    def make():
        y_true, y_pred = row.inputs(np.random.default_rng(3), entries)
        return given(row.make(), torch.as_tensor(y_true), torch.as_tensor(y_pred).float())

    return make


def fresh(width_in, width_out, *, seed=0, end=None):
    """What an untrained network says, attached to its graph."""
    torch.manual_seed(seed)
    parts = [nn.Linear(width_in, 32), nn.ReLU(), nn.Linear(32, width_out)]
    net = nn.Sequential(*parts, *([] if end is None else [end]))
    return net(torch.randn(64, width_in))


def conv(channels=3, *, zero=False):
    torch.manual_seed(0)
    net = nn.Conv2d(1, channels, 3, padding=1)
    if zero:
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
    return net(torch.randn(6, 1, 12, 12))


def rmse(y_true, y_pred):
    return (y_true - y_pred).square().mean().sqrt()


def quartic(y_true, y_pred):
    return ((y_true - y_pred) ** 4).mean(-1)


padded = torch.arange(7) < torch.tensor([7, 2, 4, 1, 6, 3, 5, 7]).unsqueeze(1)
pixels = torch.rand(6, 12, 12, generator=seeded(5)) < 0.7

# Class weights inside a smoothed sum move the optimum, which W4 says rightly.
LOUD = {"soft-crossentropy-smoothed"}
SEQUENCES = {"ctc"}

CORRECT: dict[str, Setup] = {
    **{f"{row.name}, samples": of_row(row, (48,)) for row in ROWS if row.name not in LOUD | SEQUENCES},
    **{f"{row.name}, steps": of_row(row, (12, 5)) for row in ROWS if row.name not in LOUD},
    # --- usual models, before training
    "regression": lambda: given("mse", normal(64, 1), fresh(8, 1)),
    "regression, flat targets": lambda: given("mae", normal(64), fresh(8, 1)),
    "regression, many outputs": lambda: given("huber", normal(64, 5), fresh(8, 5)),
    "regression of a small range": lambda: given("mse", normal(64, 1) * 0.01 + 0.5, fresh(8, 1) * 0.01 + 0.5),
    "classifier of torch": lambda: given(nn.CrossEntropyLoss(), labels(64, classes=10), fresh(8, 10)),
    "classifier of two": lambda: given(nn.CrossEntropyLoss(), labels(64, classes=2), fresh(8, 2)),
    "classifier, smoothed": lambda: given(
        nn.CrossEntropyLoss(label_smoothing=0.1), labels(64, classes=10), fresh(8, 10)
    ),
    "classifier, weighed": lambda: given(
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0])), labels(64, classes=3), fresh(8, 3)
    ),
    "classifier of Keras": lambda: given(
        L.SparseCategoricalCrossentropy(**LOGITS), labels(64, classes=10), fresh(8, 10)
    ),
    "classifier with a softmax": lambda: given(
        L.SparseCategoricalCrossentropy(), labels(64, classes=10), fresh(8, 10, end=nn.Softmax(-1))
    ),
    "one-hot with a softmax": lambda: given(
        L.CategoricalCrossentropy(), one_hot(64, classes=4), fresh(8, 4, end=nn.Softmax(-1))
    ),
    "log-softmax and its likelihood": lambda: given(
        nn.NLLLoss(), labels(64, classes=4), fresh(8, 4, end=nn.LogSoftmax(-1))
    ),
    "log-softmax into a cross-entropy": lambda: given(
        nn.CrossEntropyLoss(), labels(64, classes=4), fresh(8, 4, end=nn.LogSoftmax(-1))
    ),
    "a thousand classes, few samples": lambda: given(
        L.SparseCategoricalCrossentropy(**LOGITS), labels(64, classes=1000), fresh(8, 1000)
    ),
    "sigmoid and its cross-entropy": lambda: given(
        L.BinaryCrossentropy(), binary(64, 4), fresh(8, 4, end=nn.Sigmoid())
    ),
    "sigmoid and BCELoss": lambda: given(nn.BCELoss(), binary(64, 1), fresh(8, 1, end=nn.Sigmoid())),
    "many labels": lambda: given(L.BinaryCrossentropy(**LOGITS), binary(64, 20, share=0.1), fresh(8, 20)),
    "one logit": lambda: given(nn.BCEWithLogitsLoss(), binary(64, 1), fresh(8, 1)),
    "one logit near a half": lambda: given(
        nn.BCEWithLogitsLoss(), binary(64, 1), torch.rand(64, 1, generator=seeded(0)) * 0.3 + 0.4
    ),
    "a positive weight": lambda: given(
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])), binary(64, 1, share=0.2), fresh(8, 1)
    ),
    "rare label, fresh model": lambda: given(
        L.BinaryCrossentropy(**LOGITS), binary(2000, 1, share=0.005), normal(2000, 1, scale=0.1)
    ),
    "rare label, found": lambda: given(
        L.BinaryCrossentropy(**LOGITS),
        binary(4000, 1, share=0.005),
        binary(4000, 1, share=0.005) * 8 - 4 + normal(4000, 1, scale=0.1),
    ),
    "trained classifier": lambda: given(
        L.SparseCategoricalCrossentropy(**LOGITS),
        labels(200, classes=5),
        one_hot(200, classes=5) * 6 + normal(200, 5, seed=9),
    ),
    "zero end": lambda: given(nn.CrossEntropyLoss(), labels(6, 12, 12, classes=3), conv(zero=True) + 0.0),
    "balanced weights": lambda: given(
        L.SparseCategoricalCrossentropy(**LOGITS),
        labels(64, classes=2),
        fresh(8, 2),
        sample_weight=torch.where(labels(64, classes=2) == 1, 1.5, 0.5),
    ),
    "weights of a weighted mean": lambda: given(
        L.MeanSquaredError(reduction="mean_with_sample_weight"),
        normal(64, 1),
        fresh(8, 1),
        sample_weight=torch.rand(64, generator=seeded(4)) * 100,
    ),
    "class weights": lambda: given(
        ll.Objective(L.SparseCategoricalCrossentropy(**LOGITS), class_weight={2: 5.0}),
        labels(64, classes=3),
        fresh(8, 3),
    ),
    "smoothing and class weights of entries": lambda: given(
        ll.Objective(L.CategoricalCrossentropy(label_smoothing=0.1, **LOGITS), class_weight={2: 9.0}),
        one_hot(64, classes=3),
        fresh(8, 3),
    ),
    # --- images
    "segmentation": lambda: given(nn.CrossEntropyLoss(), labels(6, 12, 12, classes=3), conv()),
    "segmentation, ignored pixels": lambda: given(
        nn.CrossEntropyLoss(ignore_index=255), torch.where(pixels, labels(6, 12, 12, classes=3), 255), conv()
    ),
    "segmentation, class axis last": lambda: given(
        L.SparseCategoricalCrossentropy(**LOGITS), labels(6, 12, 12, classes=3), conv().movedim(1, -1)
    ),
    "segmentation, axis given": lambda: given(
        L.SparseCategoricalCrossentropy(axis=1, **LOGITS), labels(6, 12, 12, classes=3), conv()
    ),
    "masks with Dice": lambda: given(
        L.BinaryCrossentropy(**LOGITS) + L.Dice(axis=(0, 1, 2), from_logits="sigmoid"),
        binary(6, 12, 12, 3),
        conv().movedim(1, -1),
    ),
    "masks with Dice of samples": lambda: given(
        L.Dice(axis=(1, 2), from_logits="sigmoid"), binary(6, 12, 12, 3), conv().movedim(1, -1)
    ),
    "masks with a mask": lambda: given(
        L.BinaryCrossentropy(**LOGITS), binary(6, 12, 12, 3), conv().movedim(1, -1), mask=pixels
    ),
    "focal and Tversky": lambda: given(
        L.BinaryFocalCrossentropy(**LOGITS) + 0.5 * L.Tversky(from_logits="sigmoid"),
        binary(6, 12, 12, 3),
        conv().movedim(1, -1),
    ),
    "one-hot pixels, classes last": lambda: given(
        L.CategoricalCrossentropy(**LOGITS), one_hot(6, 12, 12, classes=3), conv().movedim(1, -1)
    ),
    "as many steps as classes, one-hot": lambda: given(
        L.CategoricalCrossentropy(**LOGITS), one_hot(9, 6, classes=6), normal(9, 6, 6)
    ),
    "autoencoder of pixels": lambda: given(
        L.BinaryCrossentropy(), torch.rand(8, 100, generator=seeded(1)), torch.rand(8, 100, generator=seeded(2))
    ),
    # --- sequences
    "own loss that leaves out missing targets": lambda: given(without_missing, missing(), fresh(8, 2)),
    "padded sequences": lambda: given("mse", normal(8, 7, 2), normal(8, 7, 2, seed=3), mask=padded),
    "padded with NaN": lambda: given(
        "mse",
        normal(8, 7, 2).masked_fill(~padded.unsqueeze(-1), float("nan")),
        normal(8, 7, 2, seed=3),
        mask=padded,
    ),
    "language model": lambda: given(
        nn.CrossEntropyLoss(),
        torch.where(padded, labels(8, 7, classes=50), -100),
        normal(8, 50, 7),
    ),
    "language model, class axis last": lambda: given(
        L.SparseCategoricalCrossentropy(ignore_class=0, **LOGITS),
        torch.where(padded, labels(8, 7, classes=49) + 1, 0),
        normal(8, 7, 50),
    ),
    "samples left out by a mask": lambda: given(
        "mse", normal(8, 7, 2), normal(8, 7, 2, seed=3), mask=[1, 1, 0, 1, 1, 0, 1, 1]
    ),
    "mean of sequences": lambda: given(
        L.MeanSquaredError(reduction="mean_per_sample"), normal(8, 7, 2), normal(8, 7, 2, seed=3), mask=padded
    ),
    # --- functions of the user's
    "function": lambda: given(quartic, normal(32, 3), normal(32, 3, seed=3)),
    "function with weights": lambda: given(
        quartic, normal(32, 3), normal(32, 3, seed=3), sample_weight=torch.rand(32, generator=seeded(6)) + 0.5
    ),
    "function with a mask": lambda: given(quartic, normal(32, 3), normal(32, 3, seed=3), mask=torch.arange(32) % 3 > 0),
    "scalar mean": lambda: given(lambda y, p: (y - p).square().mean(), normal(32, 1), normal(32, 1, seed=3)),
    "scalar root": lambda: given(rmse, normal(32, 1), normal(32, 1, seed=3)),
    "function that ignores targets": lambda: given(
        lambda y, p: p.square().mean(-1), normal(32, 3), normal(32, 3, seed=3)
    ),
    "function of floats in half": lambda: given(quartic, normal(32, 3), normal(32, 3, seed=3).bfloat16()),
    "partial of torch": lambda: given(F.smooth_l1_loss, normal(32, 3), normal(32, 3, seed=3)),
    "root kept away from 0": lambda: given(
        lambda y, p: ((y - p).square().sum(-1) + 1e-8).sqrt(), normal(32, 3), normal(32, 3)
    ),
    # --- several outputs
    "two heads": lambda: given(
        ll.Objective({"price": "mse", "sold": L.BinaryCrossentropy(**LOGITS)}),
        {"price": normal(64, 1), "sold": binary(64, 1)},
        {"price": fresh(8, 1), "sold": fresh(8, 1, seed=1)},
    ),
    "head without a loss": lambda: given(
        ll.Objective({"price": "mse", "extra": None}),
        {"price": normal(64, 1)},
        {"price": fresh(8, 1), "extra": fresh(8, 3)},
    ),
    "picture and latents, both summed": lambda: given(
        ll.Objective({"picture": "mse", "latent": L.FunctionLoss(latent_kl_of_sample, name="kl")}, {"latent": 1 / 30}),
        {"picture": normal(16, 30), "latent": torch.zeros(16, 2)},
        {"picture": normal(16, 30, seed=3), "latent": normal(16, 2, seed=4, scale=6.0)},
    ),
    "distillation": lambda: given(
        L.SoftCategoricalCrossentropy(name="hard") + 0.5 * L.KLDivergence(),
        torch.softmax(normal(32, 5), -1),
        torch.softmax(normal(32, 5, seed=3), -1),
    ),
    # --- losses of pairs
    "contrastive of views": lambda: given(L.InfoNCE(), torch.arange(16), normal(16, 2, 8)),
    "views of one sample": lambda: given(L.NTXent(), torch.arange(16), normal(16, 2, 8)),
    "hard triplets": lambda: given(L.TripletHard(), labels(32, classes=4), F.normalize(normal(32, 8), dim=-1)),
    "supervised pairs": lambda: given(
        L.SupervisedContrastive(), labels(32, classes=4), F.normalize(normal(32, 8), dim=-1)
    ),
    "circle": lambda: given(L.Circle(), labels(32, classes=4), F.normalize(normal(32, 8), dim=-1)),
    # --- other programs' numbers
    "the same number": lambda: (
        given("mse", torch.zeros(8, 1), torch.full((8, 1), 2.0) + 0, logged=4.0)
        | {"y_pred": torch.tensor([[1.0], [3.0]] * 4) + torch.arange(8).unsqueeze(1) / 8, "logged": 7.1484375}
    ),
    "equal micro-batches": lambda: given("mse", normal(32, 1), normal(32, 1, seed=3), accumulate=4),
}


def latent_kl_of_sample(y_true, y_pred):
    mean, log_variance = y_pred.unbind(-1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
