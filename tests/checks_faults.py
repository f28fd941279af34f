"""Seeded faults: name -> the code that must be found, and the arguments of `check`. And near misses by code."""

from __future__ import annotations

import torch
from torch import nn

import lossledger as ll
from checks_correct import (
    LOGITS,
    F,
    L,
    Setup,
    binary,
    conv,
    fresh,
    given,
    labels,
    latent_kl_of_sample,
    normal,
    one_hot,
    padded,
    quartic,
)

NAN = float("nan")


def bad_at(values, *positions, value=NAN):
    values = values.clone()
    for position in positions:
        values[position] = value
    return values


def all_pairs(y_true, y_pred):
    return (y_true.squeeze(-1) - y_pred).square().mean()


def all_pairs_by_index(y_true, y_pred):
    return (y_true - y_pred[:, 0]).abs().mean(-1)


def poisson_pairs(y_true, y_pred):
    return F.poisson_nll_loss(y_pred, y_true.squeeze(-1))


def summed(y_true, y_pred):
    return (y_true - y_pred).square().sum()


def half(y_true, y_pred):
    return (y_true - y_pred).square().mean(-1).to(torch.bfloat16)


def latent_kl(y_true, y_pred):
    mean, log_variance = y_pred.chunk(2, -1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def spread(y_true, y_pred):
    """Grows with the square of the batch: similarities of all pairs."""
    return (y_pred @ y_pred.T - y_true @ y_true.T).square().sum()


class Nce(L.Loss):
    """Each sample against all of its batch, written as a loss of one's own."""

    def call(self, y_true, y_pred):
        return -torch.log_softmax(y_pred @ y_true.T * 4, -1).diagonal()


def softmax(*shape, seed=3, scale=1.0):
    return torch.softmax(normal(*shape, seed=seed, scale=scale), -1)


def repeated(values, count):
    return torch.cat((values, values[:count]))


def heads(first, second, weights=None):
    return ll.Objective({"a": first, "b": second}, weights)


rare = torch.zeros(2000, 4)
rare[:16, 3] = 1.0
rare[:, 0] = binary(2000, seed=2)
hidden_logits = torch.where(rare > 0, 4.0, -4.0) + normal(2000, 4, scale=0.1)
hidden_logits[:, 3] = -5.0
few = (torch.arange(2000) < 16).long() * 2 + (torch.arange(2000) % 2) * (torch.arange(2000) >= 16)
few_logits = F.one_hot(few, 3).float() * 8 + normal(2000, 3, scale=0.1)
few_logits[:16, 2] = -8.0


def ended(samples, steps):
    """Labels of 1 to 4, then 0 for the end and for the padding after it."""
    lengths = torch.arange(samples) % (steps - 2) + 2
    return torch.where(torch.arange(steps) < lengths.unsqueeze(1), labels(samples, steps, classes=4) + 1, 0)


def sequences(loss, end, **more):
    return given(loss, ended(8, 7), normal(8, 7, 5), end_of_sequence=end, **more)


FAULTS: dict[str, tuple[str, Setup]] = {
    # --- shapes
    "another number of samples": ("SHAPE1", lambda: given("mse", normal(7, 1), normal(8, 1))),
    "one target for three outputs": ("SHAPE1", lambda: given("mae", normal(8, 1), normal(8, 3))),
    "labels where one-hot is meant": (
        "SHAPE1",
        lambda: given(L.CategoricalCrossentropy(**LOGITS), labels(8, classes=3), normal(8, 3)),
    ),
    "one-hot where labels are meant": (
        "SHAPE1",
        lambda: given(L.SparseCategoricalCrossentropy(**LOGITS), one_hot(8, classes=3), normal(8, 3)),
    ),
    "channels first and last": ("SHAPE1", lambda: given("mse", normal(2, 5, 5, 3), normal(2, 3, 5, 5))),
    "all pairs by a squeeze": ("SHAPE2", lambda: given(all_pairs, normal(32, 1), normal(32, 1, seed=3))),
    "all pairs by an index": ("SHAPE2", lambda: given(all_pairs_by_index, normal(32, 1), normal(32, 1, seed=3))),
    "all pairs in a likelihood": ("SHAPE2", lambda: given(poisson_pairs, normal(32, 1), normal(32, 1, seed=3))),
    "all pairs of distances": (
        "SHAPE2",
        lambda: given(lambda y, p: torch.cdist(p, y).mean(), normal(32, 2), normal(32, 2, seed=3)),
    ),
    # --- class axis
    "classes on axis 1, read last": (
        "AXIS1",
        lambda: given(
            L.CategoricalCrossentropy(**LOGITS), one_hot(4, 6, 5, classes=3).movedim(-1, 1), normal(4, 3, 6, 5)
        ),
    ),
    "classes last, read on axis 1": (
        "AXIS1",
        lambda: given(L.CategoricalCrossentropy(axis=1, **LOGITS), one_hot(4, 6, classes=3), normal(4, 6, 3)),
    ),
    "square: classes on axis 1, read last": (
        "AXIS1",
        lambda: given(L.CategoricalCrossentropy(**LOGITS), one_hot(9, 6, classes=6).movedim(-1, 1), normal(9, 6, 6)),
    ),
    "as many steps as classes, labels": (
        "AXIS1",
        lambda: given(nn.CrossEntropyLoss(), labels(9, 6, classes=6), normal(9, 6, 6)),
    ),
    "as many steps as classes, probabilities": (
        "AXIS1",
        lambda: given(L.SparseCategoricalCrossentropy(axis=1), labels(9, 6, classes=6), softmax(9, 6, 6)),
    ),
    "one-hot masks on axis 1": (
        "AXIS1",
        lambda: given(
            L.Dice(axis=(0, 1, 2), from_logits="sigmoid"),
            one_hot(4, 6, 5, classes=3).movedim(-1, 1),
            normal(4, 3, 6, 5),
        ),
    ),
    # --- logits and probabilities
    **{
        f"softmax twice, torch, {classes} classes": (
            "SPACE1",
            lambda classes=classes: given(nn.CrossEntropyLoss(), labels(64, classes=classes), softmax(64, classes)),
        )
        for classes in (2, 4, 10, 1000)
    },
    "softmax twice, labels": (
        "SPACE1",
        lambda: given(L.SparseCategoricalCrossentropy(**LOGITS), labels(64, classes=5), softmax(64, 5)),
    ),
    "softmax twice, one-hot": (
        "SPACE1",
        lambda: given(L.CategoricalCrossentropy(**LOGITS), one_hot(64, classes=5), softmax(64, 5)),
    ),
    "softmax twice, focal": (
        "SPACE1",
        lambda: given(L.CategoricalFocalCrossentropy(**LOGITS), one_hot(64, classes=5), softmax(64, 5)),
    ),
    "softmax twice, pixels of torch": (
        "SPACE1",
        lambda: given(nn.CrossEntropyLoss(), labels(6, 12, 12, classes=3), torch.softmax(conv(), 1)),
    ),
    "softmax twice, half precision": (
        "SPACE1",
        lambda: given(nn.CrossEntropyLoss(), labels(64, classes=5), softmax(64, 5).bfloat16()),
    ),
    "softmax twice, masked steps": (
        "SPACE1",
        lambda: given(
            L.SparseCategoricalCrossentropy(**LOGITS), labels(8, 7, classes=5), softmax(8, 7, 5), mask=padded
        ),
    ),
    "sigmoid twice, in the graph": (
        "SPACE1",
        lambda: given(L.BinaryCrossentropy(**LOGITS), binary(64, 1), fresh(8, 1, end=nn.Sigmoid())),
    ),
    "sigmoid twice, torch, in the graph": (
        "SPACE1",
        lambda: given(nn.BCEWithLogitsLoss(), binary(64, 1), fresh(8, 1, end=nn.Sigmoid())),
    ),
    "sigmoid twice, as arrays": (
        "SPACE1",
        lambda: given(L.BinaryCrossentropy(**LOGITS), binary(64, 4), torch.sigmoid(normal(64, 4, scale=3.0))),
    ),
    "sigmoid twice, Dice": (
        "SPACE1",
        lambda: given(L.Dice(from_logits="sigmoid"), binary(64, 4), torch.sigmoid(normal(64, 4, scale=3.0))),
    ),
    "sigmoid twice, focal": (
        "SPACE1",
        lambda: given(L.BinaryFocalCrossentropy(**LOGITS), binary(64, 4), fresh(8, 4, end=nn.Sigmoid())),
    ),
    "softmax into a sigmoid": (
        "SPACE1",
        lambda: given(L.BinaryCrossentropy(**LOGITS), one_hot(64, classes=4), fresh(8, 4, end=nn.Softmax(-1))),
    ),
    "logits as probabilities": ("SPACE2", lambda: given(L.BinaryCrossentropy(), binary(64, 1), normal(64, 1))),
    "logits as probabilities, labels": (
        "SPACE2",
        lambda: given(L.SparseCategoricalCrossentropy(), labels(64, classes=5), normal(64, 5)),
    ),
    "logits as probabilities, torch": ("SPACE2", lambda: given(nn.BCELoss(), binary(64, 1), normal(64, 1))),
    "logits as probabilities, Dice": ("SPACE2", lambda: given(L.Dice(), binary(64, 3), normal(64, 3))),
    "probabilities as logarithms": (
        "SPACE2",
        lambda: given(nn.NLLLoss(), labels(64, classes=5), softmax(64, 5)),
    ),
    "logits as logarithms": ("SPACE2", lambda: given(nn.NLLLoss(), labels(64, classes=5), normal(64, 5))),
    "sigmoid for exclusive classes": (
        "SPACE3",
        lambda: given(L.CategoricalCrossentropy(), one_hot(64, classes=4), torch.sigmoid(normal(64, 4))),
    ),
    "sigmoid for labels": (
        "SPACE3",
        lambda: given(L.SparseCategoricalCrossentropy(), labels(64, classes=4), torch.sigmoid(normal(64, 4))),
    ),
    # --- floors
    "at the floor of smoothing": (
        "FLOOR1",
        lambda: given(
            L.CategoricalCrossentropy(label_smoothing=0.1, **LOGITS),
            one_hot(64, classes=10),
            (one_hot(64, classes=10) * 0.9 + 0.01).log() + normal(64, 10, scale=0.01),
        ),
    ),
    "at the floor of binary smoothing": (
        "FLOOR1",
        lambda: given(L.BinaryCrossentropy(label_smoothing=0.2), binary(64, 2), binary(64, 2) * 0.8 + 0.1),
    ),
    "one output for all, regression": ("FLOOR2", lambda: given("mse", normal(64, 1), torch.full((64, 1), 0.1))),
    "one output for all, classes": (
        "FLOOR2",
        lambda: given(L.BinaryCrossentropy(), binary(64, 2), torch.full((64, 2), 0.4)),
    ),
    # --- reductions
    "a declared sum": (
        "RED1",
        lambda: given(L.MeanSquaredError(reduction="sum"), normal(64, 1), normal(64, 1, seed=3)),
    ),
    "torch's sum": ("RED1", lambda: given(nn.MSELoss(reduction="sum"), normal(64, 1), normal(64, 1, seed=3))),
    "a declared scalar sum": (
        "RED1",
        lambda: given(L.FunctionLoss(summed, scalar="sum"), normal(64, 1), normal(64, 1, seed=3)),
    ),
    "a scalar that sums": ("RED2", lambda: given(summed, normal(64, 1), normal(64, 1, seed=3))),
    "a scalar that sums, torch": (
        "RED2",
        lambda: given(lambda y, p: F.l1_loss(p, y, reduction="sum"), normal(100, 1), normal(100, 1, seed=3)),
    ),
    "a scalar of all samples": ("RED3", lambda: given(spread, normal(16, 3), normal(16, 3, seed=3))),
    "own contrastive loss": ("RED3", lambda: given(Nce(), normal(16, 8), normal(16, 8, seed=3))),
    # --- divisors
    "weights of a mask": (
        "DEN1",
        lambda: given("mse", normal(8, 7, 2), normal(8, 7, 2, seed=3), sample_weight=padded.float()),
    ),
    "weights of missing samples": (
        "DEN1",
        lambda: given(L.BinaryCrossentropy(**LOGITS), binary(8, 2), normal(8, 2), sample_weight=[1.0, 0.0] * 4),
    ),
    "all masked": ("DEN2", lambda: given("mse", normal(8, 1), normal(8, 1, seed=3), mask=torch.zeros(8))),
    "all ignored": (
        "DEN2",
        lambda: given(nn.CrossEntropyLoss(), torch.full((8, 5), -100), normal(8, 3, 5)),
    ),
    "all weights 0": ("DEN2", lambda: given("mse", normal(8, 1), normal(8, 1, seed=3), sample_weight=torch.zeros(8))),
    "mask reversed": (
        "DEN2",
        lambda: given(
            "mse", normal(4, 200, 1), normal(4, 200, 1, seed=3), mask=(torch.arange(200) == 7).expand(4, 200)
        ),
    ),
    # --- weights
    "one weight for all": (
        "W1",
        lambda: given(
            L.MeanSquaredError(reduction="mean_with_sample_weight"),
            normal(8, 1),
            normal(8, 1, seed=3),
            sample_weight=torch.full((8,), 3.0),
        ),
    ),
    "one class, weighed": (
        "W1",
        lambda: given(
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0])), torch.ones(8, dtype=torch.long), normal(8, 2)
        ),
    ),
    "batch of one, weighed": (
        "W1",
        lambda: given(
            nn.CrossEntropyLoss(weight=torch.tensor([2.0, 9.0])), torch.ones(1, dtype=torch.long), normal(1, 2)
        ),
    ),
    "scalar with weights": ("W2", lambda: given(summed, normal(8, 1), normal(8, 1), sample_weight=torch.arange(8) / 8)),
    "scalar with a mask": (
        "W2",
        lambda: given(lambda y, p: (y - p).abs().mean(), normal(8, 1), normal(8, 1), mask=torch.arange(8) > 2),
    ),
    "weights in the hundreds": (
        "W3",
        lambda: given("mse", normal(8, 1), normal(8, 1, seed=3), sample_weight=torch.arange(8) * 10.0 + 100),
    ),
    "tiny class weights": (
        "W3",
        lambda: given(
            ll.Objective(L.SparseCategoricalCrossentropy(**LOGITS), class_weight=[0.01, 0.02]),
            labels(64, classes=2),
            fresh(8, 2),
        ),
    ),
    "smoothing and weights, torch": (
        "W4",
        lambda: given(
            nn.CrossEntropyLoss(weight=torch.tensor([1.0] * 9 + [100.0]), label_smoothing=0.1),
            labels(64, classes=10),
            fresh(8, 10),
        ),
    ),
    "smoothing and weights, soft targets": (
        "W4",
        lambda: given(
            L.SoftCategoricalCrossentropy(class_weights=[1.0, 5.0, 1.0], label_smoothing=0.2, **LOGITS),
            one_hot(64, classes=3),
            fresh(8, 3),
        ),
    ),
    # --- accumulation and other programs
    "unequal micro-batches": (
        "GA1",
        lambda: given(
            "mse",
            normal(8, 7, 1),
            normal(8, 7, 1, seed=3) * torch.arange(8).reshape(8, 1, 1),
            mask=padded,
            accumulate=4,
        ),
    ),
    "short last micro-batch": (
        "GA1",
        lambda: given("mse", torch.zeros(9, 1), torch.arange(9.0).unsqueeze(1), accumulate=2),
    ),
    "Dice, accumulated": (
        "GA2",
        lambda: given(
            L.Dice(axis=(0, 1), from_logits="sigmoid"), binary(8, 9, 2, share=0.1), normal(8, 9, 2), accumulate=4
        ),
    ),
    "pairs, accumulated": ("GA2", lambda: given(L.InfoNCE(), torch.arange(16), normal(16, 2, 8), accumulate=4)),
    "logged over accumulation steps": (
        "SCALE1",
        lambda: given("mse", torch.zeros(8, 3), torch.ones(8, 3) + torch.arange(8).unsqueeze(1), logged=25.5 / 4),
    ),
    "logged times samples": (
        "SCALE1",
        lambda: given("mse", torch.zeros(9, 3), torch.ones(9, 3) * torch.arange(9).unsqueeze(1), logged=204.0),
    ),
    "logged, not known": (
        "SCALE1",
        lambda: given("mse", torch.zeros(9, 3), torch.ones(9, 3) * torch.arange(9).unsqueeze(1), logged=37.123),
    ),
    # --- terms
    "a head in millions": (
        "TERM1",
        lambda: given(
            heads("mse", "mse"),
            {"a": normal(32, 1), "b": normal(32, 1) * 1000},
            {"a": fresh(8, 1)[:32], "b": fresh(8, 1)[:32]},
        ),
    ),
    "a weight too small": (
        "TERM1",
        lambda: given(
            heads("mse", "mae", {"b": 1e-4}),
            {"a": normal(32, 1), "b": normal(32, 1)},
            {"a": fresh(8, 1)[:32], "b": fresh(8, 1)[:32]},
        ),
    ),
    "a gradient too small": (
        "TERM2",
        lambda: given(L.MeanSquaredError() + 1e-3 * L.MeanAbsoluteError(), normal(32, 1) * 10, normal(32, 1, seed=3)),
    ),
    "a steep and a flat term": (
        "TERM2",
        lambda: given(
            L.MeanAbsoluteError() + L.MeanSquaredLogarithmicError(),
            torch.full((32, 1), 900.0) + torch.arange(32.0).unsqueeze(1),
            torch.full((32, 1), 890.0) - torch.arange(32.0).unsqueeze(1),
        ),
    ),
    "a sum beside a mean": (
        "TERM3",
        lambda: given(
            L.MeanSquaredError(reduction="sum") + L.MeanAbsoluteError(), normal(8, 20), normal(8, 20, seed=3)
        ),
    ),
    "pixels and latents": (
        "TERM3",
        lambda: given(
            heads("mse", L.FunctionLoss(latent_kl, name="kl")),
            {"a": normal(16, 784), "b": torch.zeros(16, 20)},
            {"a": normal(16, 784, seed=3), "b": normal(16, 40, seed=4)},
        ),
    ),
    # --- values
    "NaN in a target": ("NAN1", lambda: given("mse", bad_at(normal(8, 1), (3, 0)), normal(8, 1))),
    "infinity in the output": (
        "NAN1",
        lambda: given(L.BinaryCrossentropy(**LOGITS), binary(8, 2), bad_at(normal(8, 2), (5, 1), value=float("inf"))),
    ),
    "NaN in a weight": (
        "NAN1",
        lambda: given("mse", normal(8, 1), normal(8, 1, seed=3), sample_weight=bad_at(torch.ones(8) * 2, 4)),
    ),
    "logarithm of 0": (
        "NAN1",
        lambda: given(lambda y, p: -(y * p.log()).mean(-1), torch.ones(8, 2), torch.zeros(8, 2)),
    ),
    "mask that leaves a NaN": (
        "NAN2",
        lambda: given("mse", bad_at(normal(8, 7, 1), (1, 6), (4, 0)), normal(8, 7, 1, seed=3), mask=padded),
    ),
    "weight 0 at a NaN": (
        "NAN2",
        lambda: given(
            "mse", bad_at(normal(8, 1), (3, 0)), normal(8, 1, seed=3), sample_weight=(torch.arange(8) != 3) * 2.0
        ),
    ),
    "root at 0": ("NAN3", lambda: given(lambda y, p: (y - p).square().sum(-1).sqrt(), normal(8, 2), normal(8, 2))),
    "where on one side": (
        "NAN3",
        lambda: given(
            lambda y, p: torch.where(p > 0, p.clamp(min=0).sqrt(), p).mean(-1), normal(8, 2), normal(8, 2).clamp(min=0)
        ),
    ),
    # --- classes
    "rare mask, owns the loss": (
        "CLS1",
        lambda: given(L.BinaryCrossentropy(**LOGITS), rare, hidden_logits * 1.5),
    ),
    "rare label, owns the loss": (
        "CLS1",
        lambda: given(L.SparseCategoricalCrossentropy(**LOGITS), few, few_logits),
    ),
    "rare mask, hidden": (
        "CLS2",
        lambda: given(
            L.BinaryCrossentropy(**LOGITS), rare, torch.where(rare > 0, 2.5, -2.5).index_fill(1, torch.tensor(3), -3.5)
        ),
    ),
    "rare label, hidden": (
        "CLS2",
        lambda: given(
            L.SparseCategoricalCrossentropy(**LOGITS),
            few,
            F.one_hot(few, 3) * torch.where(few == 2, -1.0, 3.0).unsqueeze(1),
        ),
    ),
    "labels from 1": (
        "CLS3",
        lambda: given(L.SparseCategoricalCrossentropy(**LOGITS), labels(200, classes=4) + 1, normal(200, 5)),
    ),
    "a mask nobody has": (
        "CLS3",
        lambda: given(L.BinaryCrossentropy(**LOGITS), binary(200, 3) * torch.tensor([1.0, 1.0, 0.0]), normal(200, 3)),
    ),
    # --- samples
    "padded by a sampler": (
        "DUP1",
        lambda: given("mse", repeated(normal(21, 1), 1), repeated(normal(21, 1, seed=3), 1)),
    ),
    "padded by a sampler, classes": (
        "DUP1",
        lambda: given(nn.CrossEntropyLoss(), repeated(labels(20, classes=3), 4), repeated(normal(20, 3), 4)),
    ),
    "a function in half": ("PREC1", lambda: given(half, normal(32, 3), normal(32, 3, seed=3))),
    "a result in half": (
        "PREC1",
        lambda: given(L.MeanSquaredError(dtype="float16"), normal(32, 3), normal(32, 3, seed=3)),
    ),
    "sequences without targets": (
        "TOK1",
        lambda: given(nn.CrossEntropyLoss(), bad_at(labels(8, 7, classes=5), 2, 6, value=-100), normal(8, 5, 7)),
    ),
    "ends masked with the padding": (
        "TOK2",
        lambda: sequences(L.SparseCategoricalCrossentropy(**LOGITS), 0, mask=ended(8, 7) != 0),
    ),
    "ends ignored with the padding": (
        "TOK2",
        lambda: sequences(L.SparseCategoricalCrossentropy(ignore_class=0, **LOGITS), 0),
    ),
    "ends of weight 0": (
        "TOK2",
        lambda: sequences(L.SparseCategoricalCrossentropy(**LOGITS), 0, sample_weight=(ended(8, 7) != 0).float()),
    ),
    "ends that are no label, torch": (
        "TOK2",
        lambda: given(
            nn.CrossEntropyLoss(),
            torch.where(ended(8, 7) == 0, -100, ended(8, 7)),
            normal(8, 5, 7),
            end_of_sequence=0,
        ),
    ),
    "images without labels": (
        "TOK1",
        lambda: given(
            L.SparseCategoricalCrossentropy(ignore_class=255, **LOGITS),
            bad_at(
                torch.where(
                    torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3,
                    255,
                    labels(6, 8, 8, classes=3),
                ),
                4,
                value=255,
            ),
            normal(6, 8, 8, 3),
        ),
    ),
}

# By code, a set-up that is close to the fault and right: the check must not say the code.
NEAR: dict[str, Setup] = {
    "SHAPE1": lambda: given("mse", normal(8), normal(8, 1)),
    "SHAPE2": lambda: given(
        lambda y, p: (y.squeeze(-1) - p.squeeze(-1)).square().mean(), normal(32, 1), normal(32, 1, seed=3)
    ),
    "AXIS1": lambda: given(L.CategoricalCrossentropy(**LOGITS), one_hot(9, 6, classes=6), normal(9, 6, 6)),
    "SPACE1": lambda: given(nn.CrossEntropyLoss(), labels(64, classes=4), torch.rand(64, 4)),
    "SPACE2": lambda: given(L.BinaryCrossentropy(), binary(64, 1), torch.rand(64, 1)),
    "SPACE3": lambda: given(L.CategoricalCrossentropy(), one_hot(64, classes=4), softmax(64, 4).half().float()),
    "FLOOR1": lambda: given(
        L.CategoricalCrossentropy(label_smoothing=0.1), one_hot(64, classes=4), one_hot(64, classes=4) * 0.8 + 0.05
    ),
    "FLOOR2": lambda: given("mse", normal(64, 1), torch.full((64, 1), 0.1) + normal(64, 1, scale=1e-3)),
    "RED1": lambda: given(L.MeanSquaredError(reduction="sum"), normal(1, 1), normal(1, 1, seed=3)),
    "RED2": lambda: given(lambda y, p: (y - p).square().sum() / len(y), normal(32, 3), normal(32, 3, seed=3)),
    "RED3": lambda: given(lambda y, p: (y - p).square().mean().sqrt(), normal(32, 3), normal(32, 3, seed=3)),
    "DEN1": lambda: given("mse", normal(8, 7, 2), normal(8, 7, 2, seed=3), mask=padded),
    "DEN2": lambda: given("mse", normal(4, 50, 1), normal(4, 50, 1, seed=3), mask=(torch.arange(50) < 2).expand(4, 50)),
    "W1": lambda: given(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0])), torch.tensor([0, 1, 1, 1]), normal(4, 2)),
    "W2": lambda: given(quartic, normal(8, 1), normal(8, 1, seed=3), sample_weight=torch.arange(8) / 8),
    "W3": lambda: given(
        L.MeanSquaredError(reduction="mean_with_sample_weight"),
        normal(8, 1),
        normal(8, 1, seed=3),
        sample_weight=torch.arange(8) + 100.0,
    ),
    "W4": lambda: given(
        nn.CrossEntropyLoss(weight=torch.tensor([2.0, 2.0, 2.0]), label_smoothing=0.1),
        labels(64, classes=3),
        fresh(8, 3),
    ),
    "GA1": lambda: given("mse", normal(32, 1), normal(32, 1, seed=3), accumulate=4),
    "GA2": lambda: given(
        L.Dice(axis=(1, 2), from_logits="sigmoid"), binary(8, 9, 2, 3), normal(8, 9, 2, 3), accumulate=4
    ),
    "SCALE1": lambda: given("mse", torch.zeros(4, 1), torch.arange(4.0).unsqueeze(1), logged=3.5),
    "TERM1": lambda: given(L.MeanSquaredError() + 0.5 * L.MeanAbsoluteError(), normal(32, 1), normal(32, 1, seed=3)),
    "TERM2": lambda: given(L.MeanSquaredError() + 0.5 * L.MeanAbsoluteError(), normal(32, 1), normal(32, 1, seed=3)),
    "TERM3": lambda: given(
        heads("mse", L.FunctionLoss(latent_kl_of_sample, name="kl"), {"b": 1 / 784}),
        {"a": normal(16, 784), "b": torch.zeros(16, 2)},
        {"a": normal(16, 784, seed=3), "b": normal(16, 2, seed=4)},
    ),
    "NAN1": lambda: given("mse", bad_at(normal(8, 1), (3, 0)), normal(8, 1, seed=3), mask=torch.arange(8) != 3),
    "NAN2": lambda: given("mse", bad_at(normal(8, 7, 1), (1, 6)), normal(8, 7, 1, seed=3), mask=padded),
    "NAN3": lambda: given(lambda y, p: (y - p).square().sum(-1).sqrt(), normal(8, 2), normal(8, 2, seed=3)),
    "CLS1": lambda: given(L.BinaryCrossentropy(**LOGITS), rare, normal(2000, 4, scale=0.1)),
    "CLS2": lambda: given(L.BinaryCrossentropy(**LOGITS), rare, torch.where(rare > 0, 2.5, -2.5)),
    "CLS2 of a class with a weight": lambda: given(
        ll.Objective(L.BinaryCrossentropy(**LOGITS), class_weight=[1.0, 1.0, 1.0, 2.0]),
        rare,
        torch.where(rare > 0, 2.5, -2.5).index_fill(1, torch.tensor(3), -3.5),
    ),
    "CLS3": lambda: given(L.SparseCategoricalCrossentropy(**LOGITS), labels(60, classes=4) + 1, normal(60, 5)),
    "DUP1": lambda: given(
        "mse", repeated(normal(21, 1), 1), repeated(normal(21, 1, seed=3), 1) + torch.arange(22).unsqueeze(1) / 1e3
    ),
    "PREC1": lambda: given("mse", normal(32, 3).bfloat16(), normal(32, 3, seed=3).bfloat16()),
    "TOK1": lambda: given("mse", normal(8, 7, 2), normal(8, 7, 2, seed=3), mask=torch.arange(8) != 3),
    # Masked by length, the ends stay.
    "TOK2": lambda: sequences(
        L.SparseCategoricalCrossentropy(**LOGITS),
        0,
        mask=torch.arange(7) <= (ended(8, 7) != 0).sum(1, keepdim=True),
    ),
    "TOK2 columns": lambda: (
        given(L.CategoricalCrossentropy(**LOGITS), nn.functional.one_hot(ended(8, 7), 5).float(), normal(8, 7, 5))
        | {"end_of_sequence": 9}
    ),
    "TOK2 without positions": lambda: given(
        nn.CrossEntropyLoss(), labels(32, classes=4), normal(32, 4), end_of_sequence=9
    ),
}
