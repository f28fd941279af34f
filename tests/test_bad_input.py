"""Every mistake has an error of the library's own tree that says what was expected, what came, where, and what to do.

A row is a mistake: what makes it, the class of its error, and what the message must contain. The mistakes that every
loss refuses follow from its declaration (`declaration.py`, `test_loss_matrix.py`); here are those of single losses, of
objectives, models and data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossledger as ll
from lossledger.errors import (
    EmptyDataError,
    InputError,
    InputTypeError,
    LossledgerError,
    NonFiniteError,
    UnknownNameError,
)

L, C = ll.losses, ll.callbacks
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], Any]
    error: type[LossledgerError]
    fragments: tuple[str, ...]


def row(name, make, error, *fragments):
    return Row(name, make, error, fragments)


def parametrize(rows):
    return pytest.mark.parametrize(
        "row",
        [pytest.param(r, id=r.name) for r in rows],
    )


def check(row):
    with pytest.raises(row.error) as caught:
        row.make()
    error, message = caught.value, str(caught.value)
    assert isinstance(error, LossledgerError)
    assert isinstance(error, ValueError | TypeError | ArithmeticError), "callers catch the built-in classes too"
    missing = [f for f in row.fragments if f not in message]
    assert not missing, f"{missing} not in: {message}"


def zeros(*shape):
    return torch.zeros(shape)


def labels(*values):
    return torch.tensor(values)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


class Adding(nn.Module):
    """A layer whose forward adds a loss."""

    def __init__(self, name, value):
        super().__init__()
        self.linear, self.name, self.value = nn.Linear(3, 1), name, value

    def forward(self, x):
        ll.add_loss(self.name, self.value(self.linear.weight))
        return self.linear(x)


X, Y = torch.linspace(-1, 1, 30).reshape(10, 3), torch.linspace(0, 1, 10).reshape(10, 1)
Y2 = {"a": labels(0, 1, 2, 0, 1, 2, 0, 1, 2, 0), "b": zeros(10, 2)}
SPARSE = L.SparseCategoricalCrossentropy(from_logits=True)
BCE = L.BinaryCrossentropy(from_logits=True)
mse, mae = L.MeanSquaredError(), L.MeanAbsoluteError()


def model(net=None, loss="mse", optimizer="sgd", **options):
    made = ll.Model(nn.Linear(3, 1) if net is None else net)
    made.compile(optimizer, loss, **options)
    return made


def two(loss=None, **options):
    return model(TwoOutputs(), {"a": SPARSE, "b": "mse"} if loss is None else loss, **options)


def fit(made=None, x=X, y=Y, **options):
    return (model() if made is None else made).fit(x, y, **{"verbose": 0, **options})


def sparse_fit(targets, **options):
    return fit(model(nn.Linear(3, 3), SPARSE), X, targets, **options)


# --- shapes, ranks, dtypes -----------------------------------------------------------------------------------------

SHAPES = [
    row("no-broadcast", lambda: mse(zeros(3), zeros(3, 2)), InputError, "mean_squared_error", "(3, 2)", "(3,)"),
    row("batch", lambda: mse(zeros(4, 2), zeros(3, 2)), InputError, "(3, 2)", "(4, 2)", "as many targets"),
    row("column", lambda: mse(zeros(3, 1), zeros(3, 2)), InputError, "(3, 2)", "(3, 1)"),
    row("rank", lambda: mse(zeros(3, 2, 2), zeros(3, 2)), InputError, "(3, 2)", "(3, 2, 2)"),
    row("scalars", lambda: mse(1.0, 2.0), InputError, "()", "first axis is the batch"),
    row("empty-axis", lambda: mse(zeros(3, 0), zeros(3, 0)), EmptyDataError, "(3, 0)", "empty axis"),
    row("nchw-output", lambda: mse(zeros(2, 4, 5, 3), zeros(2, 3, 4, 5)), InputError, "NCHW", "movedim(1, -1)"),
    row(
        "nchw-target",
        lambda: mse(zeros(2, 3, 4, 5), zeros(2, 4, 5, 3)),
        InputError,
        "NCHW",
        "permute",
    ),
    row("nchw-labels", lambda: SPARSE(zeros(2, 4, 5), zeros(2, 3, 4, 5)), InputError, "(2, 4, 5)", "NCHW", "axis=1"),
    row("labels-to-categorical", lambda: L.CategoricalCrossentropy()([0, 1], [[0.5, 0.5]] * 2), InputError, "Sparse"),
    row("one-hot-to-sparse", lambda: SPARSE(torch.eye(3), zeros(3, 3)), InputError, "one-hot", "argmax(-1)"),
    row("sparse-rank-1", lambda: SPARSE(zeros(3), zeros(3)), InputError, "(3,)", "one number for each class"),
    row("class-axis-is-batch", lambda: L.BinaryCrossentropy(axis=0)(zeros(3, 2), zeros(3, 2)), InputError, "axis=0"),
    row("class-axis-too-far", lambda: L.BinaryCrossentropy(axis=2)(zeros(3, 2), zeros(3, 2)), InputError, "axis=2"),
    row(
        "dice-keeps-an-axis-of-the-image",
        lambda: L.Dice(axis=(0, 2, 3)).tally(zeros(2, 3, 4, 4), zeros(2, 3, 4, 4), by="class"),
        InputError,
        *("axis=(0, 2, 3) keeps axis 1", "the last, the classes", "permute targets and output to (0, 2, 3, 1)"),
    ),
    row("logits-to-kl", lambda: L.KLDivergence()([[1.0, 0.0]], [[2.0, -1.0]]), InputError, "takes no logits"),
    row(
        "logits-to-dice",
        lambda: L.Dice()([[1.0, 0.0]], [[2.0, -1.0]]),
        InputError,
        "from_logits='sigmoid' or 'softmax'",
    ),
    row("report-of-a-history", lambda: ll.report(fit(model()), "r.html"), InputTypeError, "History", "history.ledger"),
    row("dice-axis", lambda: L.Dice(axis=3)(zeros(3, 2), zeros(3, 2)), InputError, "dice", "axis 3"),
    row("objects", lambda: mse(zeros(1, 1), np.array([[None]])), InputTypeError, "y_pred", "rectangular"),
]

# --- weights, masks, class weights ---------------------------------------------------------------------------------

WEIGHTS = [
    row(
        "weight-by-time",
        lambda: mse(zeros(2, 3, 1), zeros(2, 3, 1), sample_weight=torch.ones(3)),
        InputError,
        *("sample_weight", "(2,)", "(2, 3)", "(3,)", "mean_squared_error"),
    ),
    row("mask-by-time", lambda: mse(zeros(2, 3, 1), zeros(2, 3, 1), mask=torch.ones(3)), InputError, "mask", "(3,)"),
    row("weight-rank", lambda: mse(zeros(2, 1), zeros(2, 1), torch.ones(2, 1, 1)), InputError, "(2, 1, 1)"),
    row("mask-of-halves", lambda: mse(zeros(2, 1), zeros(2, 1), mask=[0.5, 1]), InputError, "mask", "sample_weight"),
    row("mask-of-two", lambda: mse(zeros(2, 1), zeros(2, 1), mask=[2, 1]), InputError, "0 and 1"),
    row("mask-of-nan", lambda: mse(zeros(2, 1), zeros(2, 1), mask=[NAN, 1]), InputError, "0 and 1"),
    row("fit-mask-of-halves", lambda: fit(mask=torch.full((10,), 0.5)), InputError, "mask", "sample_weight"),
    row("mask-is-text", lambda: mse(zeros(1, 1), zeros(1, 1), mask="ones"), InputTypeError, "mask", "str"),
    row(
        "weight-is-nan",
        lambda: fit(sample_weight=[NAN] + [1.0] * 9),
        LossledgerError,
        "sample_weight",
    ),
    row(
        "weight-is-infinite",
        lambda: fit(sample_weight=[float("inf")] + [1.0] * 9),
        LossledgerError,
        "sample_weight",
    ),
    row(
        "weight-is-nan-in-a-batch",
        lambda: fit(x=[(X, Y), (X, Y, [1.0] * 9 + [NAN])], y=None),
        InputError,
        *("batch 1", "sample_weight", "nan at sample 9"),
    ),
    row(
        "weight-is-nan-in-evaluate",
        lambda: model().evaluate(X, Y, sample_weight=[NAN] + [1.0] * 9, verbose=0),
        InputError,
        *("sample_weight", "sample 0"),
    ),
    row(
        "weight-is-nan-in-validation",
        lambda: fit(validation_data=(X, Y, [1.0, NAN, NAN, *[1.0] * 7])),
        InputError,
        *("validation data", "sample_weight", "sample 1", "2 such"),
    ),
    row(
        "weight-is-nan-where-another-is-masked",
        lambda: fit(sample_weight=[NAN, NAN] + [1.0] * 8, mask=[False] + [True] * 9),
        InputError,
        *("sample 1", "1 such"),
    ),
    row("fit-complex-weight", lambda: fit(sample_weight=np.ones(10) + 1j), InputTypeError, "sample_weight", "real"),
    row("class-tensor-nan", lambda: sparse_fit(Y2["a"], class_weight=torch.tensor([1.0, NAN, 1])), InputError, "nan"),
    row("class-count", lambda: BCE.tally(zeros(1, 2), zeros(1, 2), class_weight=[1.0] * 3), InputError, "(2,)", "(3,)"),
    row("class-scalar", lambda: BCE.tally(zeros(1, 2), zeros(1, 2), class_weight=3.0), InputError, "(2,)", "()"),
    row("class-text", lambda: sparse_fit(Y2["a"], class_weight="balanced"), InputTypeError, "class_weight", "str"),
    row("class-negative", lambda: sparse_fit(Y2["a"], class_weight={0: -1.0}), InputError, "not negative", "-1.0"),
    row("class-nan", lambda: sparse_fit(Y2["a"], class_weight={0: NAN}), InputError, "class_weight", "nan"),
    row("class-index", lambda: sparse_fit(Y2["a"], class_weight={7: 1.0}), UnknownNameError, "class_weight", "7"),
    row("class-index-negative", lambda: sparse_fit(Y2["a"], class_weight={-1: 1.0}), UnknownNameError, "-1"),
    row(
        "class-name-without-names",
        lambda: sparse_fit(Y2["a"], class_weight={"cat": 1.0}),
        UnknownNameError,
        *("'cat'", "without class_names"),
    ),
    row(
        "class-number-as-text",
        lambda: sparse_fit(Y2["a"], class_weight={"1": 1.0}),
        UnknownNameError,
        *("without class_names a class is a whole number", "'1'"),
    ),
    row(
        "class-name",
        lambda: fit(
            model(nn.Linear(3, 3), SPARSE, class_names=["cat", "dog", "emu"]), X, Y2["a"], class_weight={"dgo": 2.0}
        ),
        UnknownNameError,
        *("class_weight", "'dgo'", "Did you mean 'dog'"),
    ),
    row(
        "class-key-is-fraction",
        lambda: sparse_fit(Y2["a"], class_weight={1.7: 2.0}),
        UnknownNameError,
        "1.7",
    ),
    row(
        "class-value-is-text",
        lambda: sparse_fit(Y2["a"], class_weight={1: "a"}),
        InputTypeError,
        "class_weight",
    ),
    row("class-on-regression", lambda: fit(class_weight={0: 1.0}), InputError, "regression", "sample_weight"),
    row("class-flat-for-two", lambda: fit(two(), X, Y2, class_weight={0: 1.0}), InputError, "'a'", "by output"),
    row("class-unknown-output", lambda: fit(two(), X, Y2, class_weight={"z": {0: 1.0}}), UnknownNameError, "'z'"),
    row(
        "class-on-regression-output",
        lambda: fit(two(), X, Y2, class_weight={"b": {0: 1.0}}),
        InputError,
        *("b/mean_squared_error", "class_weight"),
    ),
]

# --- values --------------------------------------------------------------------------------------------------------

OUTSIDE = zeros(10, 1)
OUTSIDE[9] = 7.0


def steep():
    """A model without a sigmoid whose output leaves [0, 1] on the later half of the data only."""
    made = model(loss="bce")
    with torch.no_grad():
        made.net.weight.fill_(1.0)
        made.net.bias.zero_()
    return made


LATER = torch.cat((torch.full((5, 3), 0.1), torch.full((5, 3), 5.0)))

VALUES = [
    row("label", lambda: SPARSE([0, 5], zeros(2, 3)), InputError, "0 to 2", "5 at position (1,)", "ignore_class"),
    row("label-of-pixel", lambda: SPARSE([[0, 3]], zeros(1, 2, 3)), InputError, "3 at position (0, 1)", "(1 such"),
    row("label-minus-100", lambda: SPARSE([0, -100], zeros(2, 3)), InputError, "-100", "ignore_class"),
    row("label-in-fit", lambda: sparse_fit(labels(*[0] * 9, 3)), InputError, "3 at position (9,)", "0 to 2"),
    row(
        "label-in-validation-data",
        lambda: sparse_fit(Y2["a"], validation_data=(X, labels(*[0] * 9, 3))),
        InputError,
        "0 to 2",
    ),
    row(
        "label-in-validation-split",
        lambda: sparse_fit(labels(*[0] * 9, 3), validation_split=0.2),
        InputError,
        "0 to 2",
    ),
    row(
        "target-in-validation-data",
        lambda: fit(model(loss=BCE), X, zeros(10, 1), validation_data=(X, OUTSIDE)),
        InputError,
        "[0, 1]",
    ),
    row(
        "torch-label",
        lambda: L.get(nn.CrossEntropyLoss())(labels(0, 3), zeros(2, 3)),
        InputError,
        "3 at position",
    ),
    row(
        "torch-label-in-fit",
        lambda: fit(model(nn.Linear(3, 3), nn.CrossEntropyLoss()), X, labels(*[0] * 9, 3)),
        InputError,
        "3 at position",
    ),
    row("torch-axis", lambda: L.get(nn.CrossEntropyLoss())(zeros(2, 4), zeros(2, 4, 3)), InputError, "position 1"),
    row(
        "probability-categorical",
        lambda: L.CategoricalCrossentropy()([[0.0, 1.0]], [[2.0, 3.0]]),
        InputError,
        "from_logits=True",
    ),
    row(
        "probability-torch",
        lambda: L.get(nn.BCELoss())(zeros(1, 1), zeros(1, 1) + 3),
        InputError,
        "BCEWithLogitsLoss",
    ),
    row("probability-in-fit", lambda: fit(steep(), LATER, zeros(10, 1)), InputError, "from_logits", "15"),
    row("probability-on-batch", lambda: steep().test_on_batch(LATER, zeros(10, 1)), InputError, "from_logits"),
    row(
        "probability-in-evaluate",
        lambda: steep().evaluate(LATER, zeros(10, 1), verbose=0),
        InputError,
        "from_logits",
    ),
    row("target-in-fit", lambda: fit(model(loss=BCE), X, OUTSIDE), InputError, "binary_crossentropy", "received 7"),
    row("target-nan", lambda: fit(model(loss=BCE), X, Y * NAN), InputError, "received nan"),
]

# --- names ---------------------------------------------------------------------------------------------------------

NAMES = [
    row("loss", lambda: L.get("binary_crosentropy"), UnknownNameError, "loss", "Did you mean 'binary_crossentropy'"),
    row("loss-of-torch", lambda: model(loss="BCEWithLogitsLoss"), UnknownNameError, "from_logits=True) for logits."),
    row("loss-in-compile", lambda: model(loss="msee"), UnknownNameError, "loss", "'msee'", "Did you mean 'mse'"),
    row("optimizer", lambda: model(optimizer="adamm"), UnknownNameError, "optimizer", "Did you mean 'adam'"),
    row("metric", lambda: model(metrics=["acuracy"]), UnknownNameError, "metric", "Did you mean 'accuracy'"),
    row("regularizer", lambda: model(regularizers={"*": "l22"}), UnknownNameError, "regularizer", "Did you mean 'l2'"),
    row("pattern", lambda: model(regularizers={"wieght": "l2"}), UnknownNameError, "pattern", "Did you mean 'weight'"),
    row("precision", lambda: model(precision="bf16"), UnknownNameError, "precision", "Did you mean 'bfloat16'"),
    row("policy", lambda: model(on_nonfinite="raises"), UnknownNameError, "on_nonfinite", "Did you mean 'raise'"),
    row("mode", lambda: C.EarlyStopping(mode="mni"), UnknownNameError, "EarlyStopping", "Did you mean 'min'"),
    row(
        "monitor",
        lambda: fit(validation_split=0.2, callbacks=[C.EarlyStopping("val_los")]),
        UnknownNameError,
        *("EarlyStopping", "'val_los'", "Did you mean 'val_loss'"),
    ),
    row(
        "monitor-of-checkpoint",
        lambda: fit(callbacks=[C.ModelCheckpoint("never", monitor="los", save_best_only=True)]),
        UnknownNameError,
        *("ModelCheckpoint", "Did you mean 'loss'"),
    ),
    row(
        "name-in-checkpoint-path",
        lambda: fit(callbacks=[C.ModelCheckpoint("never/{los}")]),
        UnknownNameError,
        *("filepath", "Did you mean 'loss'"),
    ),
    row(
        "monitor-of-plateau",
        lambda: fit(callbacks=[C.LearningRateScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau)]),
        UnknownNameError,
        *("LearningRateScheduler", "val_loss"),
    ),
    row("output-in-y", lambda: fit(two(), X, {**Y2, "bb": Y2["b"]}), UnknownNameError, "y_true", "Did you mean 'b'"),
    row(
        "output-in-weights",
        lambda: fit(two(), X, Y2, sample_weight={"aa": torch.ones(10)}),
        UnknownNameError,
        *("sample_weight", "Did you mean 'a'"),
    ),
    row("output-in-mask", lambda: fit(two(), X, Y2, mask={"aa": torch.ones(10)}), UnknownNameError, "mask"),
    row("output-of-loss", lambda: fit(two({"z": "mse"}), X, {"z": Y}), InputError, "y_pred", "'z'", "['a', 'b']"),
    row("output-in-metrics", lambda: two(metrics={"aa": "mae"}), UnknownNameError, "metrics", "Did you mean 'a'"),
    row("output-in-loss-weights", lambda: fit(two(loss_weights={"aa": 2.0}), X, Y2), UnknownNameError, "loss_weights"),
    row(
        "class-names-twice",
        lambda: model(nn.Linear(3, 2), "mse", class_names=["cat", "cat"]),
        InputError,
        *("class_names", "'cat'"),
    ),
    row(
        "class-names-empty",
        lambda: model(nn.Linear(3, 2), "mse", class_names=["cat", ""]),
        InputError,
        *("class_names", "empty", "['cat', '']"),
    ),
    row(
        "class-names-by-output",
        lambda: model(nn.Linear(3, 2), "mse", class_names={"left": ["cat"], "right": ["dog"]}),
        InputTypeError,
        *("class_names", "a list of names", "'left'"),
    ),
    row("class-names-text", lambda: model(class_names="cat"), InputTypeError, "class_names", "'cat'"),
    row("precision-list", lambda: model(precision=[]), UnknownNameError, "precision", "[]"),
    row("policy-list", lambda: model(on_nonfinite=[]), UnknownNameError, "on_nonfinite", "[]"),
    row(
        "monitor-of-an-epoch-without-validation",
        lambda: fit(validation_split=0.2, validation_freq=2, epochs=2, callbacks=C.EarlyStopping("val_los")),
        UnknownNameError,
        *("EarlyStopping", "Did you mean 'val_loss'"),
    ),
    row("loss-config", lambda: L.deserialize({"class_name": "Dic", "config": {}}), UnknownNameError, "'Dice'"),
    row("group", lambda: BCE.tally(zeros(1, 2), zeros(1, 2), by="clas"), InputError, "'clas'", "class"),
    row("missing-output", lambda: fit(two(), X, {"a": Y2["a"]}), InputError, "y_true", "'b'", "received only ['a']"),
    row(
        "output-of-one",
        lambda: model(metrics={"a": "mae"}),
        LossledgerError,
        "one output",
    ),
]

# --- what a loss, an objective and a model are made of -------------------------------------------------------------


def batch_mean(y_true, y_pred):
    return (y_true - y_pred).square().mean(0)


def not_differentiable(y_true, y_pred):
    return (y_true != y_pred.round()).float().mean(-1)


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class Mean(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean()


def frozen():
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.requires_grad_(False)
    return model(net, optimizer=optimizer)


MAKING = [
    row("loss-class", lambda: L.get(L.Dice), InputTypeError, "class Dice", "Dice()"),
    row("torch-loss-class", lambda: L.get(nn.MSELoss), InputTypeError, "MSELoss()"),
    row("loss-number", lambda: L.get(5), InputTypeError, "int"),
    row("loss-none", lambda: ll.Model(nn.Linear(3, 1)).compile("adam"), InputError, "loss", "None"),
    row("net-class", lambda: ll.Model(nn.Linear), InputTypeError, "torch.nn.Module", "instance"),
    row("metric-class", lambda: model(metrics=[ll.metrics.IoU]), InputTypeError, "IoU()"),
    row("accuracy-of-regression", lambda: model(metrics=["accuracy"]), InputError, "binary_accuracy"),
    row("metric-twice", lambda: model(metrics=["mae", "mae"]), InputError, "'mae'", "twice"),
    row("optimizer-number", lambda: model(optimizer=5), InputTypeError, "optimizer", "5"),
    row("optimizer-function", lambda: model(optimizer=lambda p: 3), InputTypeError, "torch optimizer", "int"),
    row("nothing-to-train", lambda: fit(model(nn.ReLU())), EmptyDataError, "requires_grad"),
    row("clip-text", lambda: model(clip_norm="1"), InputTypeError, "clip_norm", "'1'"),
    row("ema-nan", lambda: model(ema=NAN), InputError, "ema", "nan"),
    row("expression-by-zero", lambda: (1.0 * mse) / 0, InputError, "0"),
    row("expression-by-text", lambda: (1.0 * mse) / "2", InputTypeError, "str"),
    row("config-without-config", lambda: L.deserialize({"class_name": "Dice"}), InputError, "class_name", "config"),
    row("config-is-number", lambda: L.deserialize({"class_name": "Dice", "config": 3}), InputError, "'Dice'", "int"),
    row(
        "config-of-terms",
        lambda: L.deserialize({"class_name": "Expression", "config": {"terms": [3]}}),
        InputError,
        *("pairs", "3"),
    ),
    row("loss-weights-of-one", lambda: model(loss_weights=[1.0, 2.0]), InputError, "one number", "2"),
    row(
        "sparse-gradients-of-adam",
        lambda: model(nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 1)), optimizer="adam"),
        InputError,
        *("'adam'", "sparse", "'sgd'"),
    ),
    row("clip", lambda: model(clip_norm=0), InputError, "clip_norm", "0"),
    row("ema", lambda: model(ema=1), InputError, "ema", "1"),
    row("names-and-losses", lambda: ll.Objective(["mse"], output_names=["a", "b"]), InputError, "'a', 'b'", "1"),
    row("no-term", lambda: ll.Objective({"a": None}), EmptyDataError, "None"),
    row("same-term-twice", lambda: mse + L.MeanSquaredError(), InputError, "mean_squared_error", "another"),
    row(
        "spaces", lambda: L.BinaryCrossentropy() + L.Dice(from_logits="sigmoid"), InputError, "logits", "probabilities"
    ),
    row("product-of-losses", lambda: mse * mae, InputTypeError, "number", "MeanAbsoluteError"),
    row("factor-is-text", lambda: "x" * mse, InputTypeError, "number", "str"),
    row(
        "factor-is-nan",
        lambda: NAN * mse,
        LossledgerError,
        "nan",
    ),
    row(
        "loss-weight-infinite",
        lambda: model(loss_weights=float("inf")),
        LossledgerError,
        "loss_weights",
    ),
    row("loss-weight-nan", lambda: model(loss_weights=NAN), InputError, "loss_weights", "nan"),
    row("loss-weight-text", lambda: model(loss_weights="2"), InputTypeError, "loss_weights", "'2'"),
    row("loss-weights-short", lambda: two(loss_weights=[1.0]), InputError, "2 numbers", "'a', 'b'"),
    row("loss-weight-for-two", lambda: two(loss_weights=1.0), InputError, "dict or list", "'a', 'b'"),
    row("regularizers-list", lambda: model(regularizers=["l2"]), InputTypeError, "dict", "list"),
    row("regularizer-negative", lambda: ll.regularizers.L2(-1), InputError, "l2", "-1"),
    row("orthogonal-vector", lambda: fit(model(regularizers={"bias": "orthogonal"})), InputError, "matrix", "(1,)"),
    row("regularizers-without-model", lambda: regularized_call(), InputError, "model=net"),
    row("dice-from-logits", lambda: L.Dice(from_logits=True), InputError, "'sigmoid'", "'softmax'"),
    row("focal-alphas", lambda: L.BinaryFocalCrossentropy(alpha=[0.1, 0.9]), InputTypeError, "alpha", "[0.1, 0.9]"),
    row(
        "focal-alphas-short",
        lambda: L.CategoricalFocalCrossentropy([0.25, 0.75])(torch.eye(3), torch.eye(3)),
        InputError,
        *("alpha", "3 classes", "[0.25, 0.75]"),
    ),
    row("tversky-alpha", lambda: L.Tversky(alpha=-1), InputError, "alpha", "-1"),
    row("tally-of-none", lambda: L.Huber(reduction="none").tally(zeros(1, 1), zeros(1, 1)), InputError, "'none'"),
    row("fit-of-none", lambda: fit(model(loss=L.Huber(reduction=None))), InputError, "'none'", "Choose"),
    row("not-compiled", lambda: ll.Model(nn.Linear(3, 1)).fit(X, Y), InputError, "compile"),
    row("objective-call-dict", lambda: ll.Objective("mse")(Y, {"a": Y}), InputError, "one tensor", "dict"),
    row("torch-loss-of-three", lambda: L.TorchLoss(nn.TripletMarginLoss()), InputTypeError, "TripletMarginLoss"),
    row(
        "torch-loss-of-three-by-get",
        lambda: L.get(nn.GaussianNLLLoss())(Y, Y),
        InputTypeError,
        *("GaussianNLLLoss", "lambda"),
    ),
    row(
        "optimizer-needs-closure",
        lambda: fit(model(optimizer=torch.optim.LBFGS)),
        LossledgerError,
        "closure",
    ),
    row(
        "optimizer-of-another-model",
        lambda: model(optimizer=torch.optim.SGD(nn.Linear(3, 1).parameters(), 0.1)),
        LossledgerError,
        "optimizer",
    ),
    row(
        "all-frozen",
        lambda: fit(frozen()),
        LossledgerError,
        "requires_grad",
    ),
    row(
        "output-detached",
        lambda: fit(model(Detached(3, 1))),
        LossledgerError,
        "gradient",
    ),
    row(
        "loss-not-differentiable",
        lambda: fit(model(loss=not_differentiable)),
        LossledgerError,
        "not_differentiable",
    ),
    row("loss-returns-float", lambda: L.get(lambda y, p: 3.0)(Y, Y), InputTypeError, "tensor", "float"),
    row(
        "loss-means-over-batch",
        lambda: L.get(batch_mean)(zeros(4, 3), zeros(4, 3)),
        InputError,
        *("batch_mean", "(3,)"),
    ),
    row(
        "class-config",
        lambda: L.deserialize({"class_name": "Dice", "config": {"axiss": 1}}),
        LossledgerError,
        "axiss",
    ),
]


def regularized_call():
    return ll.Objective("mse", regularizers={"*": "l2"})(Y, Y)


def scalar(y_true, y_pred):
    return (y_true - y_pred).square().sum()


CUSTOM = [
    row(f"scalar-with-{name}", lambda o=options: ll.losses.get(scalar).tally(Y, Y, **o), InputError, "scalar", name)
    for name, options in {
        "sample_weight": {"sample_weight": torch.ones(10)},
        "mask": {"mask": torch.ones(10)},
        "class_weight": {"class_weight": {0: 1.0}},
    }.items()
] + [
    row("scalar-by-sample", lambda: L.get(scalar).tally(Y, Y, by="sample"), InputError, "one number", "per sample"),
    row("scalar-word", lambda: L.FunctionLoss(scalar, scalar="avg"), InputError, "'mean'", "'avg'"),
    row("scalar-weights-in-fit", lambda: fit(model(loss=scalar), sample_weight=torch.ones(10)), InputError, "scalar"),
    row("aux-shape", lambda: fit(model(Adding("kl", lambda w: w))), InputError, "'kl'", "(1, 3)", "all axes but"),
    row("aux-number", lambda: fit(model(Adding("kl", lambda w: 3.0))), InputError, "'kl'", "float"),
    row(
        "aux-named-as-term",
        lambda: fit(model(Adding("mean_squared_error", lambda w: w.sum()))),
        InputError,
        "mean_squared_error",
    ),
    row(
        "aux-named-loss",
        lambda: fit(model(Adding("loss", lambda w: w.sum()))),
        InputError,
        "'loss'",
    ),
    row(
        "metric-named-loss",
        lambda: model(metrics=[ll.metrics.MeanMetric(scalar, "loss")]),
        InputError,
        "'loss'",
    ),
]

# --- data ----------------------------------------------------------------------------------------------------------

DATA = [
    row("no-samples", lambda: fit(x=X[:0], y=Y[:0]), EmptyDataError, "x", "length 0"),
    row("empty-list", lambda: fit(x=[], y=None), EmptyDataError, "x", "length 0"),
    row("empty-generator", lambda: fit(x=(b for b in ()), y=None), EmptyDataError, "no batch", "__iter__"),
    row("exhausted", lambda: fit(x=iter([(X, Y)]), y=None, epochs=2), EmptyDataError, "exhausted", "DataLoader"),
    row("empty-evaluate", lambda: model().evaluate(iter(()), verbose=0), EmptyDataError, "evaluate", "no batch"),
    row("empty-predict", lambda: model().predict([]), EmptyDataError, "predict", "no batch"),
    row("predict-no-samples", lambda: model().predict(X[:0]), EmptyDataError, "length 0"),
    row("x-none", lambda: fit(x=None), EmptyDataError, "x", "None"),
    row("x-text", lambda: fit(x="data.csv", y=None), InputTypeError, "x", "str"),
    row("x-dataset", lambda: fit(x=torch.utils.data.TensorDataset(X, Y), y=None), InputTypeError, "TensorDataset"),
    row("y-none", lambda: fit(y=None), InputError, "y", "None"),
    row("y-short", lambda: fit(y=Y[:3]), InputError, "y", "10", "3"),
    row("weight-short", lambda: fit(sample_weight=torch.ones(3)), InputError, "sample_weight", "10", "3"),
    row("weight-scalar", lambda: fit(sample_weight=2.0), InputError, "sample_weight", "scalar"),
    row("batch-lengths", lambda: fit(x=[(X, Y[:3])], y=None), InputError, "y", "10", "3"),
    row("batch-of-four", lambda: fit(x=[(X, Y, Y, Y)], y=None), InputTypeError, "batch 0", "(x, y, sample_weight)"),
    row("y-beside-batches", lambda: fit(x=iter([(X, Y)])), InputError, "y", "iterable of batches"),
    row("mask-beside-batches", lambda: fit(x=[(X, Y)], y=None, mask=[True]), InputError, "mask", "lossledger.Batch"),
    row("y-dtype", lambda: fit(y=np.array([["a"]] * 10)), InputTypeError, "y", "rectangular"),
    row("y-complex", lambda: fit(y=Y.numpy() + 1j), InputTypeError, "complex"),
    row("y-shape", lambda: fit(y=zeros(10, 2)), InputError, "(10, 1)", "(10, 2)"),
    row("y-not-by-output", lambda: fit(two(), X, Y2["a"]), InputError, "dict", "'a', 'b'", "Tensor"),
    row("y-list-length", lambda: fit(two(), X, (Y, Y, Y)), InputError, "2 outputs", "3"),
    row("dict-output-one-loss", lambda: fit(model(TwoOutputs())), InputError, "dict of 2", "each output"),
    row(
        "y-dict-one-output",
        lambda: fit(y={"a": Y}),
        LossledgerError,
        "y",
    ),
    row("y-list-one-output", lambda: fit(y=[Y]), InputError, "y", "one output", "list of 1"),
    row("tuple-of-batches", lambda: fit(x=((X, Y), (X, Y)), y=None), InputError, "list (not a tuple) of batches"),
    row("validation-without-y", lambda: fit(validation_data=(X,)), InputError, "validation data: y"),
    row("schedule-of-nothing", lambda: C.LearningRateScheduler(lambda: 0.1), InputTypeError, "fn(epoch)"),
    row("rate-none", lambda: fit(callbacks=C.LearningRateScheduler(lambda e: None)), InputError, "None"),
    row("predict-steps", lambda: model().predict(X, steps=0), InputError, "steps"),
    row("predict-text", lambda: model().predict("data.csv"), InputTypeError, "x", "str"),
    row("output-is-scalar", lambda: fit(model(Mean(3, 1))), InputError, "shape ()", "batch"),
    row("split-of-batches", lambda: fit(x=iter([(X, Y)]), y=None, validation_split=0.2), InputError, "arrays"),
    row("split-and-data", lambda: fit(validation_split=0.2, validation_data=(X, Y)), InputError, "choose one"),
    row("split-of-one", lambda: fit(validation_split=1.0), InputError, "validation_split", "1.0"),
    row("split-negative", lambda: fit(validation_split=-0.1), InputError, "-0.1"),
    row("split-leaves-nothing", lambda: fit(validation_split=0.999), EmptyDataError, "nothing to train on"),
    row(
        "split-text",
        lambda: fit(validation_split="0.5"),
        LossledgerError,
        "validation_split",
    ),
    row("batch-size-zero", lambda: fit(batch_size=0), InputError, "batch_size", "0"),
    row("batch-size-fraction", lambda: fit(batch_size=2.5), InputError, "batch_size", "2.5"),
    row("batch-size-in-evaluate", lambda: model().evaluate(X, Y, batch_size=0), InputError, "batch_size"),
    row("batch-size-in-predict", lambda: model().predict(X, batch_size=0), InputError, "batch_size"),
    *(
        row(f"batch-size-beside-{name}", make, InputError, "batch_size", "iterable", "received 4", "Leave it out")
        for name, make in (
            ("a-list", lambda: fit(x=[(X, Y)], y=None, batch_size=4)),
            ("a-loader", lambda: fit(x=DataLoader(TensorDataset(X, Y), 2), y=None, batch_size=4)),
            ("a-generator", lambda: fit(x=(pair for pair in [(X, Y)]), y=None, batch_size=4)),
            ("lists", lambda: fit(x=[(X, Y)], y=None, validation_data=[(X, Y)], batch_size=4)),
            ("a-list-in-evaluate", lambda: model().evaluate([(X, Y)], batch_size=4, verbose=0)),
            ("a-list-in-predict", lambda: model().predict([(X, Y)], batch_size=4)),
            ("lists-in-gap", lambda: ll.gap(model(), [(X, Y)] * 2, validation_data=[(X, Y)], batch_size=4)),
        )
    ),
    row("epochs-zero", lambda: fit(epochs=0), InputError, "epochs", "0"),
    row("verbose", lambda: fit(verbose=3), InputError, "verbose", "3"),
    row("callback", lambda: fit(callbacks=[3]), InputTypeError, "callbacks", "int", "Callback"),
    row("scheduler", lambda: C.LearningRateScheduler(5), InputTypeError, "fn(epoch, lr)", "5"),
    row("rate", lambda: fit(callbacks=[C.LearningRateScheduler(lambda e, r: -1)]), InputError, "rate >= 0", "-1"),
    *(
        row(
            f"{name}={value!r}",
            lambda n=name, v=value: fit(**{n: v}, **({"validation_split": 0.2} if n == "validation_freq" else {})),
            LossledgerError,
            name,
        )
        for name, value in (
            ("steps_per_epoch", 0),
            ("steps_per_epoch", -1),
            ("steps_per_epoch", 2.5),
            ("validation_freq", 0),
            ("initial_epoch", -1),
            ("seed", "a"),
        )
    ),
    row(
        "evaluate-steps",
        lambda: model().evaluate(X, Y, verbose=0, steps=-1),
        LossledgerError,
        "steps",
    ),
    *(row(f"predict-{v!r}", lambda v=v: model().predict(v), LossledgerError, "x") for v in (None, 5)),
    row("weights-file-missing", lambda: model().load_weights("nowhere"), InputError, "load_weights", "nowhere"),
    row("train-on-batch-short", lambda: model().train_on_batch(X, Y[:2]), InputError, "y", "10", "2"),
    row("test-on-batch-no-y", lambda: model().test_on_batch(X, None), InputTypeError, "y_true", "NoneType"),
]


@parametrize(SHAPES + WEIGHTS + VALUES)
def test_wrong_arrays_are_refused_by_name(row):
    check(row)


@parametrize(NAMES)
def test_unknown_names_are_refused_with_a_suggestion(row):
    check(row)


@parametrize(MAKING + CUSTOM)
def test_wrong_parts_are_refused(row):
    check(row)


@parametrize(DATA)
def test_wrong_data_and_arguments_are_refused(row):
    check(row)


@pytest.mark.parametrize(("a", "b"), [((4,), (4, 1)), ((4, 1), (4,)), ((4,), (4,)), ((2, 3), (2, 3, 1))])
def test_shapes_that_only_lack_a_last_axis_of_one_are_aligned(a, b):
    assert float(mse(zeros(*a), zeros(*b) + 2)) == 4.0


def test_a_weight_of_length_batch_is_per_sample_also_when_it_equals_the_time_axis():
    y, p = zeros(3, 3, 1), torch.arange(9.0).reshape(3, 3, 1)
    rows = p.square().mean((1, 2))
    weight = labels(1.0, 2.0, 4.0)
    assert float(mse(y, p, weight)) == pytest.approx(float((rows * weight).mean()), rel=1e-6)
    assert float(mse(y, p, mask=labels(True, False, False))) == pytest.approx(float(rows[0]), rel=1e-6)


def test_a_batch_size_beside_batches_divides_arrays_of_the_other_side():
    made = model()
    sizes = []
    made.net.register_forward_hook(lambda net, given, output: sizes.append(len(output)))
    fit(made, [(X, Y)], None, validation_data=(X, Y), batch_size=1, checks="off")
    assert sizes.count(len(X)) == 1 and sizes.count(1) == len(X)
    sizes.clear()
    fit(made, X, Y, validation_data=[(X, Y)], batch_size=1, checks="off")
    assert sizes.count(len(X)) == 1 and sizes.count(1) == len(X)


def test_without_a_batch_size_arrays_are_divided_by_32():
    made, x = model(), torch.zeros(70, 3)
    sizes = []
    made.predict(x)
    made.net.register_forward_hook(lambda net, given, output: sizes.append(len(output)))
    made.predict(x, batch_size=None)
    assert sizes == [32, 32, 6]
    sizes.clear()
    assert made.evaluate([(x[:5], x[:5, :1]), (x[:3], x[:3, :1])], verbose=0) >= 0
    assert sizes == [5, 3]


# --- a loss that is not finite -------------------------------------------------------------------------------------


def spoiled(index=7):
    x = X.clone()
    x[index] = NAN
    return x


def test_the_first_bad_step_is_named_however_many_come_before_the_next_log_point(monkeypatch):
    monkeypatch.setattr("lossledger.training.sums.LOG_SECONDS", 1e9)
    monkeypatch.setattr("lossledger.training.loop.RECENT", 4)
    with pytest.raises(NonFiniteError, match=r"step 2: .*data set indices 1"):
        fit(model(), spoiled(1), batch_size=1, shuffle=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", lambda p: torch.optim.SGD(p, 0.1)])
def test_a_nan_names_step_term_samples_and_what_was_already_bad(optimizer):
    made = model(optimizer=optimizer)
    with pytest.raises(NonFiniteError) as caught:
        fit(made, spoiled(), batch_size=4, shuffle=False, epochs=2)
    for fragment in ("step 2", "'mean_squared_error'", "1 of 4", "data set indices 7", "Already not finite: x", "clip"):
        assert fragment in str(caught.value)
    assert isinstance(caught.value, ArithmeticError)
    assert all(bool(torch.isfinite(p).all()) for p in made.net.parameters())


def test_a_nan_names_only_the_term_and_output_that_it_is_in():
    made = two()
    y = {**Y2, "b": Y2["b"] + 0}
    y["b"][3, 1] = NAN
    with pytest.raises(NonFiniteError, match="'b/mean_squared_error'") as caught:
        fit(made, X, y, batch_size=4, shuffle=False)
    assert "a/" not in str(caught.value) and "Already not finite: y" in str(caught.value)


def test_the_sample_is_named_by_its_index_in_the_data_also_in_a_shuffled_epoch():
    with pytest.raises(NonFiniteError, match="data set indices 3"):
        fit(model(), spoiled(3), batch_size=2, seed=5)


def test_without_indices_the_position_in_the_batch_is_named():
    with pytest.raises(NonFiniteError, match=r"step 2: .*positions in the batch 1"):
        fit(model(), [(X[:5], Y[:5]), (spoiled(6)[5:], Y[5:])], None)


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd",
        "adam",
        "adamw",
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.Adam(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
        "nadam",
    ],
)
def test_a_bad_step_leaves_the_weights_as_they_were(optimizer):
    made = model(optimizer=optimizer)
    for _ in range(3):
        made.train_on_batch(X, Y)
    before = [p.detach().clone() for p in made.net.parameters()]
    with pytest.raises(NonFiniteError):
        made.train_on_batch(spoiled(), Y)
    assert all(torch.equal(a, b) for a, b in zip(before, made.net.parameters(), strict=True))


def test_a_bad_step_leaves_the_running_statistics_as_they_were():
    made = model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), on_nonfinite="skip")
    fit(made, spoiled(), batch_size=5, shuffle=False)
    assert all(bool(torch.isfinite(b).all()) for b in made.net.buffers())


def root(y_true, y_pred):
    """The square root whose derivative at 0 is infinite, times 0: NaN."""
    return (y_true - y_pred).square().sum(-1).sqrt()


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights():
    made = model(loss=root)
    with torch.no_grad():
        for parameter in made.net.parameters():
            parameter.zero_()
    with pytest.raises(NonFiniteError, match="step 1"):
        fit(made, X, zeros(10, 1))
    assert all(bool(torch.isfinite(p).all()) for p in made.net.parameters())


def test_a_sum_that_overflows_is_not_finite():
    made = model()
    with torch.no_grad():
        made.net.weight.fill_(1.0)
    with pytest.raises(NonFiniteError):
        fit(made, torch.full((10, 3), 5e18), zeros(10, 1))


def test_an_optimizer_of_the_caller_works_after_a_bad_step():
    net = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    with pytest.raises(NonFiniteError):
        fit(model(net, optimizer=optimizer), spoiled())
    before = net.weight.detach().clone()
    net(X).sum().backward()
    optimizer.step()
    assert not torch.equal(before, net.weight)


def test_every_class_of_the_tree_is_also_a_built_in_class():
    for error in (InputError, EmptyDataError, InputTypeError, UnknownNameError, NonFiniteError, ll.errors.LedgerError):
        assert issubclass(error, LossledgerError) and issubclass(error, ValueError | TypeError | ArithmeticError)


def test_a_partial_of_a_torch_loss_with_an_unknown_option_names_it():
    with pytest.raises(TypeError, match="wieght"):
        L.get(functools.partial(nn.functional.mse_loss, wieght=1))
