"""Training: every input form, the numbers of History and the ledger, and steps equal to a hand-written torch loop."""

from __future__ import annotations

import copy
import csv
import functools
import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import lossledger as ll
from lossledger.training import checking, sums

L, C = ll.losses, ll.callbacks
N = 22


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(columns=1, dtype=torch.float64, seed=0):
    g = generator(seed)
    return torch.randn(N, 3, generator=g, dtype=dtype), torch.randn(N, columns, generator=g, dtype=dtype)


class Two(nn.Module):
    """Two outputs: classes of each of 4 positions, and columns; as a dict or a list."""

    def __init__(self, form=dict, aux=None):
        super().__init__()
        self.body = nn.Linear(3, 6)
        self.a, self.b = nn.Linear(6, 12), nn.Linear(6, 2)
        self.form, self.aux = form, aux

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if self.aux in ("add", "both"):
            ll.add_loss("kl", h.square().mean(1))
        found = {"a": self.a(h).reshape(-1, 4, 3), "b": self.b(h)}
        outputs = found if self.form is dict else list(found.values())
        return ll.Outputs(outputs, {"router": self.body.weight.square().mean()}) if self.aux == "both" else outputs


def two_targets(dtype=torch.float64, seed=3):
    g = generator(seed)
    return {
        "a": torch.randint(0, 3, (N, 4), generator=g),
        "b": (torch.rand(N, 2, generator=g) < 0.4).to(dtype),
    }


def mlp(outputs=1, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).to(dtype)


def compiled(net=None, loss="mse", optimizer="sgd", **options):
    model = ll.Model(mlp() if net is None else net)
    model.compile(optimizer, loss, **options)
    return model


def fit(model, x, y=None, **options):
    sizes = {} if y is None else {"batch_size": 5}
    return model.fit(x, y, **{"verbose": 0, "shuffle": False, **sizes, **options})


def squared(net, x, y):
    with torch.no_grad():
        return float(F.mse_loss(net(x), y))


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


def same(a, b, tolerance=1e-12):
    return all(torch.allclose(p, q, rtol=tolerance, atol=tolerance) for p, q in zip(a, b, strict=True))


def parts(size=5, count=N):
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


# --- forms of inputs -----------------------------------------------------------------------------------------------


class Restarting:
    """An iterable without a length that starts over."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return ((self.x[s], self.y[s]) for s in parts())


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, image, *, shift):
        return self.net(image) + shift


class Positional(Keyword):
    def forward(self, image, shift):
        return self.net(image) + shift


FORMS = {
    "tensors": lambda x, y: (x, y),
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "lists of numbers": lambda x, y: (x.tolist(), y.tolist()),
    "loader": lambda x, y: (DataLoader(TensorDataset(x, y), 5), None),
    "list of tuples": lambda x, y: ([(x[s], y[s]) for s in parts()], None),
    "list of numpy tuples": lambda x, y: ([(x[s].numpy(), y[s].numpy()) for s in parts()], None),
    "list of batches": lambda x, y: ([ll.Batch(x[s], y[s]) for s in parts()], None),
    "restarting": lambda x, y: (Restarting(x, y), None),
    "weights of one": lambda x, y: ([(x[s], y[s], torch.ones(len(x[s]))) for s in parts()], None),
    "list of lists": lambda x, y: (list(DataLoader(TensorDataset(x, y), 5)), None),
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
def test_every_form_of_the_data_trains_to_the_same_weights(form):
    x, y = data()
    expected = compiled()
    history = fit(expected, x, y, epochs=2)
    model = compiled()
    got = fit(model, *FORMS[form](x, y), epochs=2)
    # Lists of numbers are float32 on the way.
    tolerance = 1e-6 if form == "lists of numbers" else 1e-12
    assert same(parameters(model.net), parameters(expected.net), tolerance)
    assert got.history["loss"] == pytest.approx(history.history["loss"], rel=tolerance)


@forms
def test_every_form_of_the_data_can_be_evaluated_and_predicted(form):
    x, y = data()
    model = compiled()
    got_x, got_y = FORMS[form](x, y)
    assert model.evaluate(got_x, got_y, verbose=0) == pytest.approx(
        squared(model.net, x, y), rel=1e-6 if form == "lists of numbers" else 1e-12
    )
    if form != "list of numpy tuples":
        np.testing.assert_allclose(model.predict(FORMS[form](x, y)[0]), model.net(x).detach().numpy(), rtol=1e-5)


def test_a_batch_of_numpy_arrays_can_be_predicted():
    x, _ = data()
    assert compiled(mlp(dtype=torch.float32)).predict([ll.Batch(x.numpy())]).shape == (N, 1)


def test_a_loader_of_inputs_alone_can_be_predicted():
    x, _ = data()
    assert compiled().predict(DataLoader(TensorDataset(x), 5)).shape == (N, 1)


@pytest.mark.parametrize(
    ("net", "wrap"),
    [
        (Keyword, lambda x, s: {"image": x, "shift": s}),
        (Positional, lambda x, s: (x, s)),
        (Positional, lambda x, s: {"shift": s, "image": x}),
        (Positional, lambda x, s: [x, s]),
    ],
)
def test_dicts_go_by_keyword_and_tuples_by_position(net, wrap):
    x, y = data()
    shift = torch.full_like(y, 0.5)
    torch.manual_seed(0)
    model = compiled(net())
    expected = compiled(copy.deepcopy(model.net.net))
    fit(model, wrap(x, shift), y)
    fit(expected, x, y - 0.5)
    assert same(parameters(model.net), parameters(expected.net))
    np.testing.assert_allclose(model.predict(wrap(x, shift)), expected.predict(x) + 0.5, rtol=1e-12)


class Both(Positional):
    def forward(self, image, shift):
        return self.net(image), self.net(shift.expand(-1, 3))


def test_a_list_of_batches_may_hold_several_inputs_and_targets():
    x, y = data()
    fit(compiled(Both(), ["mse", "mae"]), [((x, y), (y, y))] * 2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_validation_data_may_be_a_list_of_batches(count):
    x, y = data()
    history = fit(compiled(), x, y, validation_data=[(x[:5], y[:5])] * count)
    assert len(history.history["val_loss"]) == 1


@pytest.mark.parametrize("kind", ["weights", "masks"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "mean_with_sample_weight", "mean_per_sample"])
def test_only_some_batches_may_carry_a_weight_or_a_mask(kind, first, reduction):
    """A batch without one counts as a batch of ones."""
    x, y = data()
    some = torch.rand(5) if kind == "weights" else torch.rand(5) < 0.6
    loss = L.MeanSquaredError(reduction)

    def batch(s, values):
        return (x[s], y[s], values) if kind == "weights" else ll.Batch(x[s], y[s], mask=values)

    mixed = [batch(slice(0, 5), some), (x[5:], y[5:])]
    full = [batch(slice(0, 5), some), batch(slice(5, N), torch.ones(N - 5))]
    found = []
    for batches in (mixed, full):
        model = compiled(loss=loss, weighted_metrics=["mae"])
        history = fit(model, batches if first == 0 else batches[::-1])
        assert history.ledger.balance() == []
        found.append(([v[0] for v in history.history.values()], parameters(model.net)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("output", ["", "b"])
def test_a_metric_with_and_without_weights_has_the_names_of_keras(output):
    x, y = data()
    w = torch.linspace(0, 2, N).double()
    names = ["mae", "weighted_mae"] if not output else ["b_mae", "b_weighted_mae"]
    loss, metrics = ("mse", ["mae"]) if not output else ({"b": "mse"}, {"b": ["mae"]})
    model = compiled(Two(dict).double() if output else None, loss, metrics=metrics, weighted_metrics=metrics)
    numbers = model.evaluate(
        x, {"b": two_targets()["b"]} if output else y, sample_weight=w, verbose=0, return_dict=True
    )
    found = model.predict(x)[output] if output else model.predict(x)
    off = np.abs(found - (two_targets()[output] if output else y).numpy()).mean(1)
    wanted = [off.mean(), (off * w.numpy()).sum() / w.numpy().sum()]
    assert [numbers[name] for name in names] == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ll.errors.InputError, match="used twice"):
        compiled(loss="mse", weighted_metrics=["mae", "mae"])


@pytest.mark.parametrize("wrap", [tuple, list])
def test_the_target_of_an_output_without_a_loss_may_be_none(wrap):
    x, _ = data()
    y = two_targets()
    model = compiled(Two(list).double(), [None, L.BinaryCrossentropy(from_logits=True)])
    history = fit(model, x, wrap([None, y["b"]]), sample_weight=wrap([None, torch.ones(N)]))
    assert list(history.history) == ["loss", "output_1_loss"]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "float32", "uint16", "uint32"])
def test_labels_of_every_integer_dtype_train(dtype):
    x, _ = data()
    labels = (np.arange(N) % 3).astype(dtype)
    loss = L.SparseCategoricalCrossentropy(from_logits=True)
    expected = fit(compiled(mlp(3), loss), x, torch.arange(N) % 3).history
    got = fit(compiled(mlp(3), loss), x, labels).history
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-12)


def test_read_only_arrays_train_without_a_warning():
    x, y = data()
    xs, ys = x.numpy(), y.numpy()
    ys.setflags(write=False)
    fit(compiled(), xs, ys)


# --- one number for every batch size -------------------------------------------------------------------------------


def seg(dtype):
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 1)).to(dtype)


class Last(nn.Module):
    """The class axis of a convolution moved to the end."""

    def __init__(self, dtype):
        super().__init__()
        self.net = seg(dtype)

    def forward(self, x):
        return self.net(x).movedim(1, -1)


def sequences(dtype, seed=4):
    g = generator(seed)
    x = torch.randn(N, 2, 6, generator=g, dtype=dtype)
    labels = torch.randint(0, 3, (N, 6), generator=g)
    lengths = torch.randint(1, 7, (N, 1), generator=g)
    mask = torch.arange(6) < lengths
    weight = torch.rand(N, 6, generator=g, dtype=dtype) * 3
    return x, labels, mask, weight


LOGITS = {"from_logits": True}
EVALUATED = {
    "sparse": (lambda: L.SparseCategoricalCrossentropy(**LOGITS), False),
    "sparse ignoring": (lambda: L.SparseCategoricalCrossentropy(ignore_class=1, **LOGITS), False),
    "sparse per sample": (lambda: L.SparseCategoricalCrossentropy(reduction="mean_per_sample", **LOGITS), False),
    "sparse by weight": (lambda: L.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight", **LOGITS), False),
    "dice over the batch": (lambda: L.Dice(from_logits="softmax"), True),
    "dice by class": (lambda: L.Dice(axis=(0, 1), from_logits="softmax"), True),
    "tversky a sample": (lambda: L.Tversky(0.3, 0.7, axis=(1, 2), from_logits="softmax"), True),
    "expression": (lambda: 0.5 * L.CategoricalCrossentropy(**LOGITS) + L.Jaccard(from_logits="softmax"), True),
    "sum": (lambda: L.CategoricalCrossentropy(reduction="sum", **LOGITS), True),
}


@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("given", ["", "mask", "weight", "mask weight"])
def test_evaluate_is_the_same_for_every_batch_size(name, dtype, tolerance, given):
    make, one_hot = EVALUATED[name]
    x, labels, mask, weight = sequences(dtype)
    y = F.one_hot(labels, 3).to(dtype) if one_hot else labels
    if name.endswith("a sample"):
        weight = weight[:, 0]
    model = compiled(Last(dtype), make(), metrics=["categorical_accuracy" if one_hot else "accuracy"])
    options = {
        "mask": mask if "mask" in given else None,
        "sample_weight": weight if "weight" in given else None,
        "verbose": 0,
    }
    values = [model.evaluate(x, y, batch_size=size, **options) for size in (N, 1, 2, 5)]
    for other in values[1:]:
        np.testing.assert_allclose(other, values[0], rtol=tolerance)
    assert model.ledger.balance(1e-6) == []


def test_evaluate_of_several_outputs_with_weights_is_the_same_for_every_batch_size():
    x, _ = data()
    y = two_targets()
    weight = {"a": torch.rand(N, 4), "b": torch.rand(N)}
    mask = {"a": torch.rand(N, 4) < 0.6}
    model = compiled(
        Two(aux="both").double(),
        {
            "a": L.SparseCategoricalCrossentropy(**LOGITS),
            "b": 2 * L.BinaryCrossentropy(**LOGITS) + L.Dice(from_logits="sigmoid"),
        },
        loss_weights={"a": 0.3, "kl": 0.1},
        regularizers={"*.weight": "l2"},
    )
    values = [
        model.evaluate(x, y, batch_size=b, sample_weight=weight, mask=mask, verbose=0, return_dict=True)
        for b in (N, 1, 2, 5)
    ]
    for other in values[1:]:
        assert list(other) == list(values[0])
        np.testing.assert_allclose(list(other.values()), list(values[0].values()), rtol=1e-12)


# --- History, ledger, moving loss ----------------------------------------------------------------------------------


def test_history_has_the_keys_of_keras():
    x, _ = data()
    y = two_targets()
    one = fit(compiled(metrics=["mae"]), *data(), validation_split=0.2).history
    assert list(one) == ["loss", "mae", "val_loss", "val_mae"]
    losses = {"a": L.SparseCategoricalCrossentropy(**LOGITS), "b": L.BinaryCrossentropy(**LOGITS)}
    model = compiled(Two().double(), losses, metrics={"a": ["accuracy"], "b": "accuracy"})
    many = fit(model, x, y, validation_data=(x, y)).history
    keys = ["loss", "a_loss", "b_loss", "a_accuracy", "b_accuracy"]
    assert list(many) == keys + [f"val_{key}" for key in keys]
    listed = fit(compiled(Two(list).double(), list(losses.values())), x, (y["a"], y["b"])).history
    assert list(listed) == ["loss", "output_0_loss", "output_1_loss"]


def random_run(seed):
    """A configuration drawn at random: loss, reduction, weights, masks, class weights, penalties, added losses."""
    rng = np.random.default_rng(seed)
    x, _ = data(dtype=torch.float32, seed=seed)
    y = two_targets(torch.float32, seed)
    reduction = rng.choice(["mean", "sum", "mean_with_sample_weight", "mean_per_sample", "sum_over_nonzero_weights"])
    b = [
        L.BinaryCrossentropy(reduction=str(reduction), **LOGITS),
        0.5 * L.BinaryFocalCrossentropy(**LOGITS) + L.Dice(axis=0, from_logits="sigmoid"),
        L.Tversky(axis=-1, from_logits="sigmoid") + 2 * L.Jaccard(from_logits="sigmoid"),
        lambda t, p: (t - p).square().sum(),
        "mae",
    ][int(rng.integers(5))]
    a = L.SparseCategoricalCrossentropy(
        ignore_class=[None, 1][int(rng.integers(2))], reduction=str(rng.choice(["mean", "sum"])), **LOGITS
    )
    weighted = rng.random() < 0.5
    model = compiled(
        Two(aux=[None, "add", "both"][int(rng.integers(3))]),
        {"a": a, "b": b if rng.random() < 0.9 else None},
        "adam",
        loss_weights={"a": 0.7} if rng.random() < 0.5 else None,
        regularizers={"*.weight": "l2", "body*": ll.regularizers.L1(0.001)} if rng.random() < 0.5 else None,
        metrics={"a": "accuracy"},
        class_names=["x", "y", "z"] if rng.random() < 0.5 else None,
        clip_norm=1.0 if rng.random() < 0.3 else None,
    )
    options = {
        "sample_weight": {"a": torch.rand(N, 4)} if weighted else None,
        "mask": {"a": torch.rand(N, 4) < 0.7} if rng.random() < 0.5 else None,
        "class_weight": {"a": {0: 2.0, 2: 0.5}} if rng.random() < 0.5 else None,
        "batch_size": int(rng.integers(1, N + 1)),
        "shuffle": bool(rng.random() < 0.5),
        "validation_data": (x, y) if rng.random() < 0.5 else None,
        "epochs": 2,
    }
    return fit(model, x, y, **options)


@pytest.mark.parametrize("seed", range(24))
def test_the_books_balance_and_give_the_printed_loss(seed):
    torch.manual_seed(seed)
    history = random_run(seed)
    assert history.ledger.balance() == []
    for split, key in (("training", "loss"), ("validation", "val_loss")):
        for epoch, value in enumerate(history.history.get(key, ())):
            assert history.ledger.loss(split, epoch + 1) == value
            assert math.isfinite(value)


def test_the_moving_loss_is_the_total_over_the_divisor_so_far():
    """Unequal batches with masks: divisors differ, so neither the mean of means nor a weight by size is right."""
    x, labels, mask, weight = sequences(torch.float64)
    loss = L.SparseCategoricalCrossentropy(**LOGITS)
    model = compiled(Last(torch.float64), loss, lambda p: torch.optim.SGD(p, 0.5))
    sizes = [3, 1, 8, 7, 3]
    starts = np.cumsum([0, *sizes])
    batches = [ll.Batch(x[a:b], labels[a:b], weight[a:b], mask[a:b]) for a, b in itertools.pairwise(starts)]
    total, divisor, expected, seen = 0.0, 0, [], []

    def before(batch, logs):
        nonlocal total, divisor
        b = batches[batch]
        entries = F.cross_entropy(model.net(b.x).detach().movedim(-1, 1), b.y, reduction="none")
        total += float((entries * b.sample_weight * b.mask).sum())
        divisor += int(b.mask.sum())
        expected.append(total / divisor)

    watch = C.LambdaCallback(
        on_train_batch_begin=before, on_train_batch_end=lambda batch, logs: seen.append(logs["loss"])
    )
    history = fit(model, batches, callbacks=[watch])
    assert seen == pytest.approx(expected, rel=1e-12)
    assert history.history["loss"] == pytest.approx(expected[-1:], rel=1e-12)


# --- equal to a loop written by hand -------------------------------------------------------------------------------


def sparse_mean(z, t, mask, weight, class_weight=None):
    entries = F.cross_entropy(z.movedim(-1, 1), t, reduction="none") * weight * mask
    return (entries if class_weight is None else entries * class_weight[t]).sum() / mask.sum()


def hand(net, x, y, extra, b):
    """The loss of batch `b` of the configuration of the test below, written with torch alone."""
    h = torch.tanh(net.body(x[b]))
    a, c = net.a(h).reshape(-1, 4, 3), net.b(h)
    total = 0.3 * sparse_mean(a, y["a"][b], extra["mask"][b], extra["weight"][b], extra["class_weight"])
    total = total + 2 * F.binary_cross_entropy_with_logits(c, y["b"][b])
    total = total + sum(0.01 * p.square().sum() for n, p in net.named_parameters() if n.endswith(".weight"))
    return total + 0.1 * h.square().mean() + net.body.weight.square().mean()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.001, eps=1e-7),
    "adamw": lambda p: torch.optim.AdamW(p, 0.001, eps=1e-7, weight_decay=0.004),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.001, initial_accumulator_value=0.1, eps=1e-7),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, alpha=0.9, eps=1e-7),
}


@pytest.mark.parametrize("form", [dict, list])
@pytest.mark.parametrize("class_weight", [None, [2.0, 1.0, 0.5]])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "instance", "clipped"])
def test_fit_is_the_loop_written_by_hand(form, class_weight, optimizer):
    """Two outputs, masks and weights by entry, class weights, a penalty, two added losses, an uneven last batch."""
    x, _ = data()
    y = two_targets()
    extra = {
        "mask": torch.rand(N, 4) < 0.7,
        "weight": torch.rand(N, 4, dtype=torch.float64),
        "class_weight": None if class_weight is None else torch.tensor(class_weight, dtype=torch.float64),
    }
    torch.manual_seed(5)
    net = Two(form, aux="both").double()
    by_hand = copy.deepcopy(net)
    make = OPTIMIZERS.get(optimizer, lambda p: torch.optim.Adam(p, 0.01))
    losses = {"a": L.SparseCategoricalCrossentropy(**LOGITS), "b": L.BinaryCrossentropy(**LOGITS)}
    names = ["a", "b"] if form is dict else ["output_0", "output_1"]
    model = ll.Model(net)
    model.compile(
        optimizer if optimizer in OPTIMIZERS else make,
        losses if form is dict else list(losses.values()),
        loss_weights={names[0]: 0.3, names[1]: 2.0, "kl": 0.1},
        regularizers={"*.weight": "l2"},
        clip_norm=0.05 if optimizer == "clipped" else None,
    )

    def structured(a, b=None):
        return {"a": a, "b": b} if form is dict else (a, b)

    history = fit(
        model,
        x,
        structured(y["a"], y["b"]),
        sample_weight=structured(extra["weight"]),
        mask=structured(extra["mask"]),
        class_weight=None if class_weight is None else {names[0]: class_weight},
        epochs=2,
    )
    own = make(by_hand.parameters())
    for _ in range(2):
        for b in parts():
            own.zero_grad()
            hand(by_hand, x, y, extra, b).backward()
            if optimizer == "clipped":
                torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05)
            own.step()
    assert same(parameters(net), parameters(by_hand))
    assert math.isfinite(history.history["loss"][-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name_carry_the_defaults_of_keras(name):
    x, y = data()
    model = compiled(optimizer=name)
    by_hand = copy.deepcopy(model.net)
    fit(model, x, y, epochs=3)
    own = OPTIMIZERS[name](by_hand.parameters())
    for b in parts() * 3:
        own.zero_grad()
        F.mse_loss(by_hand(x[b]), y[b]).backward()
        own.step()
    assert same(parameters(model.net), parameters(by_hand))


@pytest.mark.parametrize("call", ["fit", "train_on_batch"])
def test_gradients_that_somebody_left_do_not_enter_the_first_step(call):
    x, y = data()
    model = compiled()
    clean = compiled(copy.deepcopy(model.net))
    model.net(x).sum().backward()
    for one in (model, clean):
        fit(one, x, y) if call == "fit" else one.train_on_batch(x, y)
    assert same(parameters(model.net), parameters(clean.net))


def test_fit_with_binary_cross_entropy_and_dice_is_the_loop_written_by_hand():
    x, _ = data()
    y = two_targets()["b"]
    model = compiled(mlp(2), 0.5 * L.BinaryCrossentropy(**LOGITS) + L.Dice(from_logits="sigmoid"), "adam")
    by_hand = copy.deepcopy(model.net)
    fit(model, x, y, epochs=2)
    own = OPTIMIZERS["adam"](by_hand.parameters())
    for b in parts() * 2:
        own.zero_grad()
        z = by_hand(x[b])
        p = z.sigmoid()
        dice = 1 - (2 * (p * y[b]).sum() + 1e-7) / (p.sum() + y[b].sum() + 1e-7)
        (0.5 * F.binary_cross_entropy_with_logits(z, y[b]) + dice).backward()
        own.step()
    assert same(parameters(model.net), parameters(by_hand), 1e-10)


@pytest.mark.parametrize(
    ("loss", "columns", "target"),
    [
        (nn.CrossEntropyLoss(), 3, lambda: torch.arange(N) % 3),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)), 3, lambda: torch.arange(N) % 3),
        (nn.BCEWithLogitsLoss(), 2, lambda: two_targets()["b"]),
        (nn.MSELoss(), 1, lambda: data()[1]),
        (F.smooth_l1_loss, 1, lambda: data()[1]),
    ],
)
def test_fit_with_a_loss_of_torch_is_the_loop_written_by_hand(loss, columns, target):
    x, y = data()[0], target()
    model = compiled(mlp(columns), loss)
    by_hand = copy.deepcopy(model.net)
    fit(model, x, y, epochs=2)
    own = OPTIMIZERS["sgd"](by_hand.parameters())
    for b in parts() * 2:
        own.zero_grad()
        loss(by_hand(x[b]), y[b]).backward()
        own.step()
    assert same(parameters(model.net), parameters(by_hand))


# --- class weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["index", "name", "list", "loader"])
@pytest.mark.parametrize("with_weight", [False, True])
def test_class_weight_is_a_sample_weight_by_class_times_the_given_one(how, with_weight):
    x, _ = data()
    y = torch.arange(N) % 3
    table = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    weight = torch.rand(N, dtype=torch.float64) if with_weight else torch.ones(N, dtype=torch.float64)
    loss = L.SparseCategoricalCrossentropy(**LOGITS)
    expected = compiled(mlp(3), loss)
    want = fit(expected, x, y, sample_weight=weight * table[y], epochs=2).history["loss"]
    model = compiled(mlp(3), loss, class_names=["cat", "dog", "emu"])
    given = {"name": {"cat": 0.5, "emu": 4.0}, "list": [0.5, 1.0, 4.0]}.get(how, {0: 0.5, 2: 4.0})
    if how == "loader":
        got = fit(model, DataLoader(TensorDataset(x, y, weight), 5), class_weight=given, epochs=2)
    else:
        got = fit(model, x, y, class_weight=given, sample_weight=weight, epochs=2)
    assert got.history["loss"] == pytest.approx(want, rel=1e-12)
    assert same(parameters(model.net), parameters(expected.net))


def test_class_weights_of_a_float64_model_are_float64():
    x, _ = data()
    y = torch.arange(N) % 3
    got = fit(compiled(mlp(3), L.SparseCategoricalCrossentropy(**LOGITS)), x, y, class_weight=[0.1] * 3, batch_size=N)
    want = fit(compiled(mlp(3), L.SparseCategoricalCrossentropy(**LOGITS)), x, y, batch_size=N)
    assert got.history["loss"][0] == pytest.approx(0.1 * want.history["loss"][0], rel=1e-12)


def test_validation_does_not_use_class_weights():
    x, _ = data()
    y = torch.arange(N) % 3
    model = compiled(mlp(3), L.SparseCategoricalCrossentropy(**LOGITS))
    history = fit(model, x, y, class_weight={0: 50.0}, validation_data=(x, y)).history
    assert history["val_loss"] == [pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-12)]
    assert history["loss"][0] > 3 * history["val_loss"][0]


# --- averages, precision, what does not train ----------------------------------------------------------------------


def test_the_average_of_the_weights_is_that_of_keras():
    """Keras 3: momentum 0 at the first step, so that the random initial weights do not stay in the average."""
    x, y = data()
    model, plain = compiled(ema=0.9), compiled()
    fit(model, x, y, epochs=2)
    average = None

    def after(batch, logs):
        nonlocal average
        now = parameters(plain.net)
        average = now if average is None else [0.9 * a + 0.1 * p for a, p in zip(average, now, strict=True)]

    fit(plain, x, y, epochs=2, callbacks=[C.LambdaCallback(on_train_batch_end=after)])
    assert same(parameters(model.net), average)


def test_fit_ends_with_the_average_of_the_weights():
    x, y = data()
    model, plain = compiled(ema=0.9), compiled()
    average = parameters(plain.net)
    fit(model, x, y, epochs=2)

    def after(batch, logs):
        for a, p in zip(average, plain.net.parameters(), strict=True):
            a.lerp_(p.detach(), 0.1)

    fit(plain, x, y, epochs=2, callbacks=[C.LambdaCallback(on_train_batch_end=after)])
    # Whichever weights start the average, ten steps later it is this close.
    assert same(parameters(model.net), average, 1e-1)
    assert not same(parameters(model.net), parameters(plain.net), 1e-6)


def test_bfloat16_trains_close_to_float32():
    x, y = data(dtype=torch.float32)
    runs = [
        fit(compiled(mlp(dtype=torch.float32), "mse", "adam", precision=p), x, y, epochs=5).history["loss"]
        for p in ("float32", "bfloat16")
    ]
    assert runs[1] == pytest.approx(runs[0], rel=0.02) and runs[0] != runs[1]


@pytest.mark.parametrize("optimizer", ["adam", lambda p: torch.optim.SGD(p, 0.1)])
def test_frozen_parameters_stay(optimizer):
    x, y = data()
    net = mlp()
    net[0].requires_grad_(False)
    before = parameters(net)
    fit(compiled(net, optimizer=optimizer, regularizers={"*": "l2"}, clip_norm=1.0, ema=0.5), x, y, epochs=2)
    after = parameters(net)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert not torch.equal(before[2], after[2])


class Halves(nn.Module):
    """Two outputs, the second of a frozen branch; optionally an added loss that depends on no parameter."""

    def __init__(self, aux=False):
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(3, 1).double(), nn.Linear(3, 1).double().requires_grad_(False), aux

    def forward(self, x):
        if self.aux:
            ll.add_loss("norm", x.square().mean())
            return self.a(x)
        return self.a(x), self.b(x)


@pytest.mark.parametrize("aux", [False, True])
def test_a_term_that_depends_on_no_trainable_parameter_is_shown_and_not_trained(aux):
    x, y = data()
    fit(compiled(Halves(aux), "mse" if aux else ["mse", "mse"]), x, y if aux else (y, y))


class OnlyInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1).double()

    def forward(self, x):
        if self.training:
            ll.add_loss("router", self.linear.weight.square().mean())
        return self.linear(x)


@pytest.mark.parametrize("weight", [None, {"router": 0.1}])
def test_a_loss_that_is_only_added_in_training_does_not_stop_validation(weight):
    x, y = data()
    history = fit(compiled(OnlyInTraining(), loss_weights=weight), x, y, validation_split=0.2).history
    assert list(history) == ["loss", "router", "val_loss"]


def test_a_weight_of_a_loss_that_the_model_does_not_add_is_named():
    x, y = data()
    for rows in (2, N):
        with pytest.raises(ll.errors.UnknownNameError, match=r"loss_weights.*'kl'"):
            fit(compiled(loss_weights={"kl": 0.1}), x[:rows], y[:rows])


def test_sparse_gradients_train():
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))
    fit(compiled(net), torch.zeros(N, 2).long(), torch.zeros(N, 1))


def test_batch_norm_uses_batches_in_training_and_running_statistics_otherwise():
    x, y = data()
    torch.manual_seed(0)
    model = compiled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double())
    by_hand = copy.deepcopy(model.net)
    fit(model, x, y, batch_size=11, epochs=2)
    own = OPTIMIZERS["sgd"](by_hand.parameters())
    for b in parts(11) * 2:
        own.zero_grad()
        F.mse_loss(by_hand(x[b]), y[b]).backward()
        own.step()
    assert same(model.net.state_dict().values(), by_hand.state_dict().values())
    by_hand.eval()
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    assert model.evaluate(x, y, verbose=0, batch_size=3) == pytest.approx(squared(by_hand, x, y), rel=1e-12)
    model.predict(x)
    model.test_on_batch(x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.net.state_dict().items())


def test_dropout_is_off_in_evaluation_and_on_in_training():
    x, y = data()
    model = compiled(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 1)).double())
    assert model.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    np.testing.assert_array_equal(model.predict(x), model.predict(x))
    losses = [compiled(copy.deepcopy(model.net)).train_on_batch(x, y) for _ in range(2)]
    assert losses[0] != losses[1]


CALLS = {
    "evaluate": lambda m, x, y: m.evaluate(x, y, verbose=0),
    "predict": lambda m, x, y: m.predict(x),
    "test_on_batch": lambda m, x, y: m.test_on_batch(x, y),
    "predict_on_batch": lambda m, x, y: m.predict_on_batch(x),
    "fit": lambda m, x, y: fit(m, x, y),
    "train_on_batch": lambda m, x, y: m.train_on_batch(x, y),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_module_is_restored(call, training):
    model = compiled()
    model.net.train(training)
    CALLS[call](model, *data())
    assert model.net.training is training


@pytest.mark.parametrize("call", CALLS)
def test_a_submodule_that_was_put_in_eval_mode_stays_there(call):
    model = compiled()
    model.net.train()
    model.net[1].eval()
    CALLS[call](model, *data())
    assert model.net[1].training is False


@pytest.mark.parametrize("call", CALLS)
def test_a_train_method_that_keeps_batch_norm_frozen_is_called(call):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = mlp(), nn.BatchNorm1d(1, dtype=torch.float64)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x):
            return self.norm(self.body(x))

    model = compiled(Frozen())
    CALLS[call](model, *data())
    assert int(model.net.norm.num_batches_tracked) == 0
    # As it was found.
    assert model.net.norm.training is model.net.training is True


# --- callbacks -----------------------------------------------------------------------------------------------------


def falling_then_rising(model, best=2):
    """A callback that sets the bias so that the validation loss is least after epoch `best`."""

    def set_bias(epoch, logs):
        with torch.no_grad():
            model.net.bias.fill_(float(abs(epoch - best)))

    return C.LambdaCallback(on_train_batch_end=lambda b, logs: None, on_epoch_begin=set_bias)


def flat():
    """A model whose loss is its bias squared, and whose training does not move it."""
    net = nn.Linear(3, 1).double()
    with torch.no_grad():
        net.weight.zero_()
    return compiled(net, optimizer=lambda p: torch.optim.SGD(p, 0.0))


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_early_stopping_stops_and_restores(restore, patience):
    x, _ = data()
    model = flat()
    stop = C.EarlyStopping("val_loss", patience=patience, restore_best_weights=restore)
    y = torch.zeros(N, 1)
    history = fit(model, x, y, epochs=10, validation_data=(x, y), callbacks=[falling_then_rising(model), stop])
    last = 2 + max(patience, 1)
    assert history.epoch == list(range(last + 1))
    assert (stop.best_epoch, stop.stopped_epoch) == (2, last)
    assert model.net.bias.item() == (0.0 if restore else last - 2)


@pytest.mark.parametrize(
    ("monitor", "mode", "best"), [("loss", "auto", 2), ("loss", "max", 9), ("loss", "min", 2), ("mae", "auto", 2)]
)
def test_model_checkpoint_keeps_the_best(tmp_path, monitor, mode, best):
    x, _ = data()
    model = flat()
    model.compile(lambda p: torch.optim.SGD(p, 0.0), "mse", metrics=["mae"])
    keep = C.ModelCheckpoint(tmp_path / "best", monitor=monitor, mode=mode, save_best_only=True)
    every = C.ModelCheckpoint(tmp_path / "{epoch:02d}-{loss:.0f}")
    fit(model, x, torch.zeros(N, 1), epochs=10, callbacks=[falling_then_rising(model), keep, every])
    model.load_weights(tmp_path / "best")
    assert model.net.bias.item() == abs(best - 2)
    assert (tmp_path / "01-4").is_file() and (tmp_path / "10-49").is_file()


@pytest.mark.parametrize("callback", ["csv", "stop", "checkpoint"])
def test_callbacks_live_with_epochs_without_validation(tmp_path, callback):
    x, y = data()
    made = {
        "csv": lambda: C.CSVLogger(tmp_path / "log.csv"),
        "stop": lambda: C.EarlyStopping(patience=3),
        "checkpoint": lambda: C.ModelCheckpoint(tmp_path / "w", save_best_only=True),
    }[callback]()
    history = fit(compiled(), x, y, epochs=4, validation_split=0.2, validation_freq=2, callbacks=[made])
    assert len(history.history["loss"]) == 4


def test_the_csv_file_has_empty_cells_for_epochs_without_validation(tmp_path):
    path = tmp_path / "log.csv"
    model = compiled(metrics=["mae"])
    options = {"epochs": 4, "validation_split": 0.2, "validation_freq": 2, "callbacks": C.CSVLogger(path)}
    history = fit(model, *data(), **options).history
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["epoch", "loss", "mae", "val_loss", "val_mae"]
    assert [line["val_loss"] for line in lines] == ["", str(history["val_loss"][0]), "", str(history["val_loss"][1])]


def test_epochs_without_validation_do_not_count_for_patience(tmp_path):
    x, _ = data()
    model = flat()
    y = torch.zeros(N, 1)
    stop, keep = C.EarlyStopping(patience=2), C.ModelCheckpoint(tmp_path / "{epoch}-{val_loss:.0f}")
    options = {"epochs": 12, "validation_data": (x, y), "validation_freq": 2}
    fit(model, x, y, callbacks=[falling_then_rising(model, best=1), stop, keep], **options)
    assert (stop.best_epoch, stop.stopped_epoch) == (1, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2-0", "4-4", "6-16"]


def test_masked_samples_may_have_a_weight_that_is_not_finite():
    x, y = data()
    weight, mask = torch.ones(N, dtype=torch.float64), torch.ones(N, dtype=torch.bool)
    weight[3], mask[3] = math.nan, False
    model, expected = compiled(), compiled()
    fit(model, x, y, sample_weight=weight, mask=mask)
    fit(expected, x, y, mask=mask)
    assert same(parameters(model.net), parameters(expected.net))


def test_validation_freq_counts_epochs_from_one():
    history = fit(compiled(), *data(), epochs=5, validation_split=0.2, validation_freq=2)
    assert len(history.history["val_loss"]) == 2
    assert {row.epoch for row in history.ledger.rows if row.split == "validation"} == {2, 4}


def rates(callback, epochs=4, **options):
    model, seen = compiled(optimizer=lambda p: torch.optim.SGD(p, 0.1)), []
    watch = C.LambdaCallback(on_train_batch_end=lambda b, logs: seen.append(model.optimizer.param_groups[0]["lr"]))
    made = callback(model) if getattr(callback, "__name__", "") == "<lambda>" else callback
    fit(model, *data(), epochs=epochs, batch_size=N, callbacks=[made, watch], **options)
    return seen


lr = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (C.LearningRateScheduler(lambda epoch, rate: 0.1 / (epoch + 1)), [0.1, 0.05, 0.1 / 3, 0.025]),
        (C.LearningRateScheduler(lambda epoch, rate: rate * 0.5), [0.05, 0.025, 0.0125, 0.00625]),
        (C.LearningRateScheduler(lambda o: lr.ExponentialLR(o, 0.5)), [0.1, 0.05, 0.025, 0.0125]),
        (C.LearningRateScheduler(lambda o, g=0.5: lr.ExponentialLR(o, g)), [0.1, 0.05, 0.025, 0.0125]),
        (C.LearningRateScheduler(functools.partial(lr.ExponentialLR, gamma=0.5)), [0.1, 0.05, 0.025, 0.0125]),
        (lambda model: lr.ExponentialLR(model.optimizer, 0.5), [0.1, 0.05, 0.025, 0.0125]),
        (C.LearningRateScheduler(lambda o: lr.ReduceLROnPlateau(o, "max", 0.5, 0), "loss"), [0.1, 0.1, 0.05, 0.025]),
    ],
    ids=[
        "function",
        "of-the-rate",
        "made-from-optimizer",
        "made-with-an-option",
        "partial",
        "torch-scheduler",
        "plateau",
    ],
)
def test_learning_rates_follow_the_schedule(callback, expected):
    assert rates(callback) == pytest.approx(expected)


@pytest.mark.parametrize("callback", [lambda s: s, C.LearningRateScheduler], ids=["as-it-is", "wrapped"])
def test_a_scheduler_of_another_optimizer_is_refused(callback):
    model = compiled()
    stale = lr.ExponentialLR(model.optimizer, 0.5)
    model.compile("sgd", "mse")
    with pytest.raises(ll.errors.InputError, match=r"ExponentialLR has another optimizer than this model"):
        fit(model, *data(), callbacks=[callback(stale)])


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(lambda epoch: 0.1, id="one-argument"),
        pytest.param(lambda epoch, rate=None: 0.1, id="optional-rate"),
        pytest.param(lambda epoch, rate: np.float32(0.1), id="numpy-number"),
    ],
)
def test_schedules_that_keras_takes_are_taken(schedule):
    assert rates(C.LearningRateScheduler(schedule)) == pytest.approx([0.1] * 4)


def test_one_callback_needs_no_list():
    fit(compiled(), *data(), callbacks=C.EarlyStopping("loss"))


def test_csv_logger_writes_and_appends(tmp_path):
    path = tmp_path / "log.csv"
    model = compiled(metrics=["mae"])
    first = fit(model, *data(), epochs=2, callbacks=[C.CSVLogger(path)])
    second = fit(model, *data(), epochs=3, initial_epoch=2, callbacks=[C.CSVLogger(path, append=True)])
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["epoch"]) for line in lines] == [0, 1, 2]
    for key in ("loss", "mae"):
        assert [float(line[key]) for line in lines] == first.history[key] + second.history[key]
    fit(model, *data(), callbacks=[C.CSVLogger(path, separator=";")])
    assert path.read_text().splitlines()[0] == "epoch;loss;mae"


def test_hooks_are_called_in_order():
    seen = []
    hooks = {
        name: (lambda *a, n=name: seen.append((n, *a[:-1])))
        for name in (
            *("on_train_begin", "on_epoch_begin", "on_train_batch_begin"),
            *("on_train_batch_end", "on_epoch_end", "on_train_end"),
        )
    }
    fit(compiled(), *data(), batch_size=11, epochs=3, initial_epoch=2, callbacks=[C.LambdaCallback(**hooks)])
    assert seen == [
        ("on_train_begin",),
        ("on_epoch_begin", 2),
        ("on_train_batch_begin", 0),
        ("on_train_batch_end", 0),
        ("on_train_batch_begin", 1),
        ("on_train_batch_end", 1),
        ("on_epoch_end", 2),
        ("on_train_end",),
    ]


# --- epochs, order, seeds ------------------------------------------------------------------------------------------


class Recorder(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(x[:, 0].int().tolist())
        return super().forward(x)


def order(**options):
    model = compiled(Recorder())
    x = torch.arange(N).float().reshape(N, 1)
    fit(model, x, x / N, **{"batch_size": 8, "epochs": 2, **options})
    return model.net.seen


def test_without_shuffling_the_order_is_that_of_the_data():
    one = [list(range(8)), list(range(8, 16)), list(range(16, N))]
    assert order() == one * 2


def test_shuffling_draws_every_sample_once_in_a_new_order_every_epoch():
    batches = order(shuffle=True, seed=3)
    first, second = (list(itertools.chain(*part)) for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(N))
    assert first != second and first != list(range(N))
    assert order(shuffle=True, seed=3) == batches != order(shuffle=True, seed=4)


def test_a_run_in_two_parts_is_the_run_in_one():
    x, y = data()
    whole, halves = compiled(), compiled()
    full = fit(whole, x, y, shuffle=True, seed=9, epochs=4)
    parts_ = [fit(halves, x, y, shuffle=True, seed=9, epochs=e, initial_epoch=i) for i, e in ((0, 2), (2, 4))]
    assert [v for p in parts_ for v in p.history["loss"]] == full.history["loss"]
    assert [p.epoch for p in parts_] == [[0, 1], [2, 3]]
    assert same(parameters(whole.net), parameters(halves.net), 0)


def test_one_seed_gives_one_run():
    runs = [fit(compiled(optimizer="adam"), *data(), shuffle=True, epochs=3, seed=7).history for _ in range(2)]
    assert runs[0] == runs[1]
    torch.manual_seed(11)
    a = fit(compiled(), *data(), shuffle=True)
    assert fit(compiled(), *data(), shuffle=True, seed=a.params["seed"]).history == a.history


def test_steps_per_epoch_ends_an_epoch_and_a_generator_goes_on_in_the_next():
    x, y = data()
    assert len(order(steps_per_epoch=2)) == 4
    endless = ((x, y) for _ in iter(int, 1))
    history = fit(compiled(), endless, steps_per_epoch=3, epochs=2)
    assert len(history.history["loss"]) == 2 and history.params["steps"] == 3
    assert compiled().evaluate(((x, y) for _ in iter(int, 1)), steps=2, verbose=0) > 0
    assert compiled().predict((x for _ in iter(int, 1)), steps=2).shape == (2 * N, 1)


def test_steps_per_epoch_below_the_length_starts_over_in_every_epoch():
    """Unlike Keras, which goes on: an epoch is a function of the seed and its number, so that runs can be resumed."""
    assert order(steps_per_epoch=2)[2] == list(range(8))


# --- one batch, weights, files, output -----------------------------------------------------------------------------


def test_train_on_batch_is_one_step_and_reports_the_loss_before_it():
    x, y = data()
    model, expected = compiled(metrics=["mae"]), compiled()
    before = squared(model.net, x, y)
    got = model.train_on_batch(x, y, return_dict=True)
    fit(expected, x, y, batch_size=N)
    assert got["loss"] == pytest.approx(before, rel=1e-12) and list(got) == ["loss", "mae"]
    assert same(parameters(model.net), parameters(expected.net))
    loss, mae = model.test_on_batch(x, y)
    assert loss == pytest.approx(squared(model.net, x, y), rel=1e-12)
    assert model.evaluate(x, y, verbose=0) == pytest.approx([loss, mae], rel=1e-12)
    np.testing.assert_array_equal(model.predict_on_batch(x), model.predict(x, batch_size=N))


def test_train_on_batch_takes_weights_masks_and_class_weights():
    x, _ = data()
    y = torch.arange(N) % 3
    model = compiled(mlp(3), L.SparseCategoricalCrossentropy(**LOGITS))
    weight, mask = torch.rand(N, dtype=torch.float64), torch.rand(N) < 0.5
    z = model.net(x).detach()
    got = model.train_on_batch(x, y, weight, mask, class_weight={1: 3.0})
    own = weight * torch.tensor([1.0, 3.0, 1.0])[y] * mask
    assert got == pytest.approx(float((F.cross_entropy(z, y, reduction="none") * own).sum() / mask.sum()), rel=1e-12)
    unweighted = model.test_on_batch(x, y, mask=mask)
    z = model.net(x).detach()
    assert unweighted == pytest.approx(float(F.cross_entropy(z[mask], y[mask])), rel=1e-12)


def test_predict_keeps_the_structure_of_the_outputs():
    x, _ = data()
    for form in (dict, list):
        net = Two(form).double()
        found = ll.Model(net).predict(x, batch_size=5)
        expected = net(x)
        assert type(found) is form
        for key in expected if form is dict else range(2):
            np.testing.assert_allclose(found[key], expected[key].detach().numpy(), rtol=1e-12)


def test_predict_joins_what_is_beside_the_outputs():
    """None stays None, and a number without samples comes as one a batch."""
    net = Named(lambda a: {"a": a, "none": None, "number": a.sum(), "nested": [a, None]})
    x, _ = data()
    found = ll.Model(net).predict(x, batch_size=11)
    expected = net.linear(x).detach()
    np.testing.assert_allclose(found["a"], expected.numpy(), rtol=1e-12)
    np.testing.assert_allclose(found["number"], [float(part.sum()) for part in expected.split(11)], rtol=1e-12)
    assert found["none"] is None and found["nested"][1] is None and found["nested"][0].shape == (N, 1)


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class Named(nn.Module):
    """Outputs in a form that models of other libraries have."""

    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(3, 1).double(), make

    def forward(self, x):
        return self.make(self.linear(x))


def test_a_named_tuple_of_outputs_trains():
    x, y = data()
    fit(compiled(Named(lambda a: Pair(a, a * 2)), ["mse", "mae"]), x, (y, y))


def test_a_named_tuple_of_outputs_can_be_predicted():
    assert isinstance(ll.Model(Named(lambda a: Pair(a, a * 2))).predict(data()[0]), Pair)


@pytest.mark.parametrize("extra", [None, torch.tensor(2.0)])
def test_a_value_beside_the_outputs_that_has_no_loss_does_not_matter(extra):
    """Models of transformers return None, scalars, caches beside their outputs."""
    x, y = data()
    fit(compiled(Named(lambda a: {"a": a, "extra": extra}), {"a": "mse"}), x, {"a": y})


def test_weights_go_to_a_file_and_back(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model = compiled(net)
    model.train_on_batch(torch.randn(5, 3), torch.zeros(5, 4))
    model.save_weights(tmp_path / "deep" / "w.safetensors")
    other = ll.Model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    other.load_weights(tmp_path / "deep" / "w.safetensors")
    state = net.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in other.net.state_dict().items())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"], "no partial file is left"
    with pytest.raises(ll.errors.InputError, match="does not fit this model"):
        ll.Model(nn.Linear(3, 4)).load_weights(tmp_path / "deep" / "w.safetensors")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ll.errors.InputError, match=r"expected a safetensors file.*model\.net\.load_weights"):
        other.load_weights(tmp_path / "w.pt")


def test_tied_weights_go_to_a_file_and_back(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    model = ll.Model(net)
    model.save_weights(tmp_path / "w")
    value = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.zero_()
    model.load_weights(tmp_path / "w")
    assert torch.equal(net[1].weight, value)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_weights_have_the_same_names_with_and_without_torch_compile(tmp_path):
    """Nothing is compiled before a forward."""

    def made():
        net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        net[1] = torch.compile(net[1])
        return net

    plain, compiled = ll.Model(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))), ll.Model(torch.compile(made()))
    for one in (plain, compiled):
        one.compile("sgd", "mse")
    compiled.save_weights(tmp_path / "w")
    assert set(safetensors.torch.load_file(str(tmp_path / "w"))) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    plain.load_weights(tmp_path / "w")
    other = ll.Model(torch.compile(made()))
    other.compile("sgd", "mse")
    plain.save_weights(tmp_path / "plain")
    other.load_weights(tmp_path / "plain")
    # Files of before have the names of torch.compile.
    safetensors.torch.save_file(compiled.net.state_dict(), str(tmp_path / "old"))
    plain.load_weights(tmp_path / "old")
    for own, loaded, back in zip(*(list(one.net.parameters()) for one in (compiled, plain, other)), strict=True):
        assert torch.equal(own, loaded) and torch.equal(own, back)


def test_summary_names_modules_and_counts_parameters(capsys):
    net = mlp()
    net[0].requires_grad_(False)
    ll.Model(net).summary()
    text = capsys.readouterr().out
    assert "Sequential" in text and "26 parameters, 6 trainable" in text
    lines = []
    ll.Model(net).summary(print_fn=lines.append)
    assert lines[0] == text.rstrip("\n")


@pytest.mark.parametrize(("verbose", "lines"), [(0, 0), (2, 3), ("auto", 3)])
def test_verbose_two_prints_one_line_an_epoch_and_zero_nothing(capsys, verbose, lines):
    model = compiled()
    model.fit(*data(), epochs=3, verbose=verbose, validation_split=0.2)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == lines and err == ""
    for number, line in enumerate(out.splitlines(), 1):
        assert line.startswith(f"epoch {number}/3") and " loss " in line and " val_loss " in line
    model.evaluate(*data(), verbose=verbose)
    assert len(capsys.readouterr().out.splitlines()) == (1 if lines else 0)


def test_verbose_one_draws_a_bar_that_ends_with_the_numbers(capsys):
    compiled().fit(*data(), epochs=2, verbose=1)
    assert "epoch 2/2" in capsys.readouterr().out


def test_a_run_folder_opens_to_an_equal_ledger(tmp_path):
    model = compiled(metrics=["mae"], regularizers={"*": "l2"})
    history = fit(model, *data(), epochs=3, validation_split=0.2, run_dir=tmp_path / "run")
    book = ll.Ledger.open(tmp_path / "run")
    assert book.rows == history.ledger.rows and book.metrics == history.ledger.metrics
    assert book.loss("validation") == history.history["val_loss"][-1]
    assert list((tmp_path / "run" / "ledger").glob("*.parquet"))
    assert book.balance() == []


# --- batches that are not finite -----------------------------------------------------------------------------------


def bad_batches():
    x, y = data(dtype=torch.float32)
    bad = x.clone()
    bad[6] = math.nan
    return x, bad, y


@pytest.mark.parametrize("optimizer", ["sgd", "adam", lambda p: torch.optim.SGD(p, 0.01)])
def test_skipping_leaves_bad_steps_out_of_weights_and_history(optimizer):
    x, bad, y = bad_batches()
    model = compiled(mlp(dtype=torch.float32), "mse", optimizer, on_nonfinite="skip", regularizers={"*": "l2"})
    expected = compiled(mlp(dtype=torch.float32), "mse", optimizer, regularizers={"*": "l2"})
    history = fit(model, bad, y)
    good = [(x[s], y[s]) for s in parts() if s.start != 5]
    want = fit(expected, good)
    assert same(parameters(model.net), parameters(expected.net), 1e-7)
    assert history.history["loss"] == pytest.approx(want.history["loss"], rel=1e-6)
    assert history.ledger.balance() == []
    assert sum(row.nonfinite for row in history.ledger.rows if row.role == "data") > 0


def test_skipping_leaves_bad_steps_out_of_metrics():
    _, bad, y = bad_batches()
    history = fit(compiled(mlp(dtype=torch.float32), on_nonfinite="skip", metrics=["mae"]), bad, y).history
    assert math.isfinite(history["mae"][0])


def test_an_epoch_of_skipped_steps_has_no_loss():
    x, y = data(dtype=torch.float32)
    history = fit(compiled(mlp(dtype=torch.float32), on_nonfinite="skip"), x * math.nan, y).history
    assert math.isnan(history["loss"][0])


def test_recording_goes_on_and_counts():
    _, bad, y = bad_batches()
    history = fit(compiled(mlp(dtype=torch.float32), on_nonfinite="record"), bad, y, epochs=2)
    assert math.isnan(history.history["loss"][0]) and len(history.history["loss"]) == 2
    assert history.ledger.rows[0].nonfinite > 0


# --- cost: no host read a step, few Python calls -------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts operations that make the host wait for a value, or whose shape depends on one."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused and func.overloadpacket.__name__ in self.NAMES:
            self.count += 1
        return func(*args, **(kwargs or {}))


def reads_of(monkeypatch, optimizer, steps, loss=None, net=None, y=None, **options):
    """Reads of one epoch of so many steps; those inside torch's optimizer are torch's own."""
    monkeypatch.setattr(sums, "LOG_SECONDS", 1e9)
    x = torch.randn(steps * 4, 3)
    y = (torch.rand(steps * 4, 1) < 0.5).float() if y is None else y(steps * 4)
    model = compiled(
        mlp(dtype=torch.float32) if net is None else net(),
        L.BinaryCrossentropy(**LOGITS) if loss is None else loss(),
        optimizer,
        **{k: v for k, v in options.items() if k in ("metrics", "regularizers", "clip_norm", "ema")},
    )
    mode = Reads()
    model.optimizer.register_step_pre_hook(lambda *_: setattr(mode, "paused", True))
    model.optimizer.register_step_post_hook(lambda *_: setattr(mode, "paused", False))
    for name in ("cpu", "numpy", "tolist"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, **kwargs):
            mode.count += not mode.paused
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    # The checks read the first batch, once: what they read depends on its values, and is no read of a step.
    checks = checking.Checking._batch

    def unseen(self, *args):
        mode.paused = True
        checks(self, *args)
        mode.paused = False

    monkeypatch.setattr(checking.Checking, "_batch", unseen)
    extra = {k: v for k, v in options.items() if k in ("class_weight", "samples")}
    extra |= {k: torch.ones(steps * 4) for k in ("sample_weight",) if options.get(k)}
    extra |= {k: torch.rand(steps * 4) < 0.5 for k in ("mask",) if options.get(k)}
    with mode:
        fit(model, x, y, batch_size=4, shuffle=True, **extra)
    monkeypatch.undo()
    return mode.count


STEPS = {
    "plain": {},
    "weights": {"sample_weight": True},
    "mask": {"mask": True},
    "metrics": {"metrics": ["accuracy", "iou"]},
    "penalty, clipping, average": {"regularizers": {"*": "l2"}, "clip_norm": 1.0, "ema": 0.9},
    "dice": {"loss": lambda: L.BinaryCrossentropy(**LOGITS) + L.Dice(from_logits="sigmoid")},
    "probabilities": {"net": lambda: nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()), "loss": L.BinaryCrossentropy},
    "sparse": {
        "net": lambda: mlp(3, torch.float32),
        "loss": lambda: L.SparseCategoricalCrossentropy(ignore_class=1, **LOGITS),
        "y": lambda n: torch.arange(n) % 3,
    },
    "torch loss": {
        "net": lambda: mlp(3, torch.float32),
        "loss": lambda: nn.CrossEntropyLoss(weight=torch.ones(3)),
        "y": lambda n: torch.arange(n) % 3,
    },
    "function": {"loss": lambda: lambda y, p: (y - p).square().mean(-1)},
    "class weight": {"class_weight": {1: 2.0}},
    "samples": {
        "loss": lambda: L.BinaryCrossentropy(**LOGITS) + L.Dice(axis=(0, 1), from_logits="sigmoid"),
        "mask": True,
        "samples": True,
    },
    "samples of labels": {
        "net": lambda: mlp(3, torch.float32),
        "loss": lambda: L.SparseCategoricalCrossentropy(**LOGITS),
        "y": lambda n: torch.arange(n) % 3,
        "samples": True,
    },
}


@pytest.mark.parametrize("optimizer", ["adam", "sgd", lambda p: torch.optim.Adam(p)], ids=["adam", "sgd", "torch"])
@pytest.mark.parametrize("case", STEPS)
def test_a_step_reads_nothing_on_the_host(monkeypatch, optimizer, case):
    """Twenty more steps of an epoch make no more reads: those at the boundary and at its end are allowed."""
    counts = [reads_of(monkeypatch, optimizer, steps, **STEPS[case]) for steps in (5, 25)]
    assert counts[1] - counts[0] == 0


CALL_BUDGET = 94


def test_a_step_makes_few_python_calls():
    """The cost of a small model is Python's."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("calls.py"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= CALL_BUDGET


def test_warnings_of_a_plain_fit_are_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(compiled(optimizer="adam"), *data(), validation_split=0.2, epochs=2)
