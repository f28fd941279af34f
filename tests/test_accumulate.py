"""fit(accumulate=k): the weights, the numbers and the ledger of batches k times as large."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import lossledger as ll
import test_training as tt
from lossledger.training import loop
from lossledger.training.data import order_of
from window_laws import Noise

L = ll.losses
LOGITS = {"from_logits": True}
N = tt.N


def masked_data(seed=4):
    x, labels, mask, weight = tt.sequences(torch.float64, seed)
    return x, nn.functional.one_hot(labels, 3).double(), mask, weight


LOSSES = {
    "mse and Dice": lambda: 0.5 * L.MeanSquaredError() + L.Dice(axis=(0, 1), from_logits="softmax"),
    "mse and Dice over all": lambda: L.MeanSquaredError() + L.Dice(from_logits="softmax"),
    "cross-entropy and Dice": lambda: L.CategoricalCrossentropy(**LOGITS) + L.Dice(axis=(0, 1), from_logits="softmax"),
    "mse": lambda: L.MeanSquaredError(),
    "cross-entropy per sample": lambda: L.CategoricalCrossentropy(reduction="mean_per_sample", **LOGITS),
    "sum": lambda: L.CategoricalCrossentropy(reduction="sum", **LOGITS) * 1e-3,
}


def trained(loss, batch_size, accumulate, given=("mask",), epochs=2, **options):
    x, y, mask, weight = masked_data()
    compiling = {k: options.pop(k) for k in list(options) if k in COMPILE}
    model = tt.compiled(tt.Last(torch.float64), loss(), compiling.pop("optimizer", "adam"), **compiling)
    history = model.fit(
        x,
        y,
        batch_size=batch_size,
        accumulate=accumulate,
        epochs=epochs,
        mask=mask if "mask" in given else None,
        sample_weight=weight if "weight" in given else None,
        seed=0,
        verbose=0,
        **options,
    )
    return model, history


COMPILE = ("optimizer", "clip_norm", "ema", "regularizers", "metrics", "on_nonfinite", "precision", "weighted_metrics")


def expect_same(a, b, tolerance=1e-12):
    for p, q in zip(a[0].net.parameters(), b[0].net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert list(a[1].history) == list(b[1].history)
    for name, values in a[1].history.items():
        np.testing.assert_allclose(values, b[1].history[name], rtol=tolerance * 10, err_msg=name)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("given", [(), ("mask",), ("mask", "weight")], ids="-".join)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 3), (1, 6), (3, 2)])
def test_accumulated_batches_train_as_one_of_their_size(loss, given, batch_size, accumulate):
    """22 samples in steps of 6: the last step of an epoch has 4, in batches that are smaller or fewer."""
    one = trained(LOSSES[loss], 6, 1, given, optimizer="sgd")
    expect_same(trained(LOSSES[loss], batch_size, accumulate, given, optimizer="sgd"), one)


OPTIONS = {
    "clipping": {"clip_norm": 0.05},
    "average": {"ema": 0.7},
    "regularizers": {"regularizers": {"*.weight": "l2", "*": "l1"}},
    "metrics": {"metrics": ["categorical_accuracy", "iou"], "weighted_metrics": ["mse"]},
    "record": {"on_nonfinite": "record"},
    "skip": {"on_nonfinite": "skip", "metrics": ["categorical_accuracy"]},
    "adam": {"optimizer": "adam"},
    "class weights": {"class_weight": {1: 3.0}, "loss": "cross-entropy and Dice"},
    "steps": {"steps_per_epoch": 8},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_act_on_optimizer_steps(case):
    options = dict(OPTIONS[case])
    loss = LOSSES[options.pop("loss", "mse and Dice")]
    accumulated = trained(loss, 2, 3, ("mask", "weight"), **options)
    if case == "steps":
        # 8 batches of 2 samples are 16 of the 22: steps of 6, 6 and 4.
        x, y, mask, weight = masked_data()
        model = tt.compiled(tt.Last(torch.float64), LOSSES["mse and Dice"](), "adam")
        for epoch in range(2):
            order = order_of(N, 0, epoch)
            for a, b in ((0, 6), (6, 12), (12, 16)):
                i = order[a:b]
                model.train_on_batch(x[i], y[i], weight[i], mask[i])
        assert tt.same(tt.parameters(accumulated[0].net), tt.parameters(model.net))
        assert accumulated[1].params["steps"] == 3
        return
    # The root of the variance in Adam turns rounding of tiny gradients into steps.
    expect_same(accumulated, trained(loss, 6, 1, ("mask", "weight"), **options), 1e-9)


def test_several_outputs_with_auxiliary_losses_accumulate():
    x, _ = tt.data()
    y = tt.two_targets()
    weight = {"a": torch.rand(N, 4), "b": torch.rand(N)}
    mask = {"a": torch.rand(N, 4) < 0.6}

    def run(batch_size, accumulate):
        torch.manual_seed(1)
        model = tt.compiled(
            tt.Two(aux="both").double(),
            {
                "a": L.SparseCategoricalCrossentropy(ignore_class=1, **LOGITS),
                "b": 2 * L.BinaryCrossentropy(**LOGITS) + L.Dice(from_logits="sigmoid"),
            },
            loss_weights={"a": 0.3, "kl": 0.1},
            regularizers={"*.weight": "l2"},
        )
        return model, model.fit(
            x, y, batch_size=batch_size, accumulate=accumulate, sample_weight=weight, mask=mask, verbose=0, seed=0
        )

    one = run(6, 1)
    for split in ((2, 3), (1, 6), (3, 2)):
        expect_same(run(*split), one)


def test_an_iterable_of_unequal_batches_accumulates():
    x, y = tt.data()
    stops = (0, 1, 4, 9, 10, 12, 17, 22)
    batches = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(stops)]
    joined = [(x[a:b], y[a:b]) for a, b in ((0, 9), (9, 17), (17, 22))]
    models = [tt.compiled(loss="mse"), tt.compiled(loss="mse")]
    histories = [
        models[0].fit(batches, accumulate=3, epochs=2, verbose=0),
        models[1].fit(joined, epochs=2, verbose=0),
    ]
    expect_same(*zip(models, histories, strict=True))
    assert histories[0].params["steps"] == 3


def test_the_books_of_accumulated_steps_balance():
    _, history = trained(LOSSES["mse and Dice"], 2, 3, ("mask", "weight"))
    _, one = trained(LOSSES["mse and Dice"], 6, 1, ("mask", "weight"))
    assert history.ledger.balance(1e-9) == []
    key = ["epoch", "term", "class"]
    mine, theirs = history.ledger.table(by=key), one.ledger.table(by=key)
    assert [[r[k] for k in key] for r in mine] == [[r[k] for k in key] for r in theirs]
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(
            [a["total"], a["count"], a["contribution"]], [b["total"], b["count"], b["contribution"]], rtol=1e-9
        )


def test_callbacks_and_steps_count_optimizer_steps():
    seen = []
    callback = ll.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((batch, logs["last"])))
    _, history = trained(LOSSES["mse"], 2, 3, (), epochs=1, callbacks=callback)
    assert [batch for batch, _ in seen] == [0, 1, 2, 3]
    assert history.params["steps"] == 4
    assert seen[-1][1] != seen[0][1]


def test_metrics_see_each_batch_once():
    seen = []

    def error(y_true, y_pred):
        seen.append(len(y_true))
        return (y_true - y_pred).abs().mean(-1)

    trained(LOSSES["mse and Dice"], 4, 2, epochs=1, metrics=[error])
    assert seen == [4, 4, 4, 4, 4, 2]


def test_pairs_are_refused_under_accumulation_and_train_without():
    g = tt.generator()
    x, labels = torch.randn(12, 3, generator=g), torch.arange(12) % 3
    model = ll.Model(tt.mlp(4, torch.float32))
    model.compile("sgd", L.Circle(gamma=1.0))
    model.fit(x, labels, batch_size=6, verbose=0)
    before = [p.detach().clone() for p in model.net.parameters()]
    with pytest.raises(ll.errors.InputError, match="compares the samples of a batch"):
        model.fit(x, labels, batch_size=6, accumulate=2, verbose=0)
    assert all(torch.equal(p, q) for p, q in zip(before, model.net.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [0, 1.5, True, "2"])
def test_a_number_of_batches_that_is_none_is_refused(accumulate):
    with pytest.raises(ll.errors.InputError, match="accumulate"):
        tt.fit(tt.compiled(), *tt.data(), accumulate=accumulate)


@pytest.mark.parametrize("bad", [0, 7, 21])
def test_a_bad_sample_stops_the_step_of_its_window(bad):
    x, y = tt.data()
    x[bad] = torch.nan
    model = tt.compiled(loss=L.MeanSquaredError() + L.Dice(from_logits="sigmoid"))
    y = (y > 0).double()
    with pytest.raises(ll.errors.NonFiniteError, match=rf"step {bad // 6 + 1}.*data set indices {bad}\)"):
        tt.fit(model, x, y, batch_size=2, accumulate=3)
    assert all(bool(torch.isfinite(p).all()) for p in model.net.parameters())


def test_skipping_leaves_out_the_window_of_a_bad_sample():
    x, y = tt.data()
    broken = x.clone()
    broken[7] = torch.nan
    options = {"optimizer": "adam", "metrics": ["mae"], "on_nonfinite": "skip"}
    model = tt.compiled(**options)
    history = tt.fit(model, broken, y, batch_size=2, accumulate=3)
    good = torch.tensor([i for i in range(N) if i // 6 != 1])
    other = tt.compiled(**options)
    expected = tt.fit(other, [(x[i], y[i]) for i in good.split(6)])
    expect_same((model, history), (other, expected))
    assert int(history.ledger.rows[0].count) == N - 6


def test_dropout_and_batch_norm_train_in_two_rounds():
    """The random state after an epoch, and the running statistics, are those of one forward for each batch."""

    def net():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)).double()

    x, _ = tt.data()
    y = (torch.rand(N, 2, generator=tt.generator(1)) < 0.4).double()
    model = tt.compiled(net(), L.Dice(from_logits="sigmoid"), lambda p: torch.optim.SGD(p, lr=0.0))
    torch.manual_seed(9)
    model.fit(x, y, batch_size=6, accumulate=2, verbose=0, shuffle=False, seed=0)
    after, plain = torch.rand(2), net()
    torch.manual_seed(9)
    # `fit` looks at the shape of the outputs in evaluation mode, which draws nothing.
    for part in x.split(6):
        plain(part)
    assert torch.equal(after, torch.rand(2))
    assert torch.equal(model.net[1].running_mean, plain[1].running_mean)
    assert int(model.net[1].num_batches_tracked) == 4


def test_a_model_that_cannot_be_replayed_does_not_train():
    x, y = tt.data()
    net = nn.Sequential(Noise(), tt.mlp())
    model = tt.compiled(net, L.Dice(from_logits="sigmoid"))
    before = tt.parameters(net)
    with pytest.raises(ll.errors.ReplayError, match="second round"):
        tt.fit(model, x, (y > 0).double(), batch_size=4, accumulate=2)
    assert tt.same(before, tt.parameters(net), 0)


@pytest.mark.parametrize("case", ["plain", "mask", "dice", "penalty, clipping, average", "metrics", "sparse"])
def test_accumulated_steps_read_nothing_on_the_host(monkeypatch, case):
    fit, counts = tt.fit, []
    for steps in (6, 24):
        # What counts the reads also takes back all patches.
        monkeypatch.setattr(tt, "fit", lambda *args, **options: fit(*args, accumulate=3, **options))
        counts.append(tt.reads_of(monkeypatch, "adam", steps, **tt.STEPS[case]))
    assert counts[1] - counts[0] == 0


def test_bfloat16_accumulates_close_to_float32():
    def run(precision, accumulate):
        x, y = tt.data(dtype=torch.float32)
        model = tt.compiled(tt.mlp(dtype=torch.float32), precision=precision)
        tt.fit(model, x, y, batch_size=12 // accumulate, accumulate=accumulate, epochs=3)
        return tt.parameters(model.net)

    assert tt.same(run("bfloat16", 3), run("float32", 1), 1e-2)
    assert not tt.same(run("bfloat16", 3), run("float32", 3), 1e-7)


@pytest.mark.parametrize("given", [(), ("mask",), ("mask", "weight")], ids="-".join)
def test_evaluate_and_the_ledger_are_the_same_for_every_batch_size(given):
    x, y, mask, weight = masked_data()
    model = tt.compiled(tt.Last(torch.float64), LOSSES["mse and Dice"](), regularizers={"*": "l2"})
    options = {
        "mask": mask if "mask" in given else None,
        "sample_weight": weight if "weight" in given else None,
        "verbose": 0,
    }
    values, tables = [], []
    for size in range(1, N + 1):
        values.append(model.evaluate(x, y, batch_size=size, **options))
        tables.append([r["contribution"] for r in model.ledger.table(by=["term", "class"])])
    for value, table in zip(values, tables, strict=True):
        np.testing.assert_allclose(value, values[-1], rtol=1e-12)
        np.testing.assert_allclose(table, tables[-1], rtol=1e-12)


def test_the_loop_makes_windows_of_consecutive_batches(monkeypatch):
    seen = []
    step = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda plan, w, *args: seen.append([b.size for b in w]) or step(plan, w, *args)
    )
    x, y = tt.data()
    tt.fit(tt.compiled(), x, y, batch_size=4, accumulate=4)
    assert seen == [[4, 4, 4, 4], [4, 2]]
