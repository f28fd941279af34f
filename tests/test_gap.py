"""The gap between training and validation loss: parts that are known, errors that hold, nothing disturbed."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lossledger as ll
from lossledger.errors import InputError
from lossledger.report import as_text, build_view
from lossledger.report.gap import gap_view
from lossledger.training.waterfall import with_errors

NAMES = ["weights moved", "regularizers", "train mode", "augmentation", "counting", "data"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compiled(net, rate=0.1, loss="mse", **options):
    model = ll.Model(net)
    model.compile(lambda p: torch.optim.SGD(p, lr=rate), loss, **options)
    return model


def measured(model, x, y=None, *, batches=1000, epochs=1, plain=None, every=1, **options):
    """All batches are measured, if not told otherwise: then a part that is no draw is exact."""
    gap = ll.callbacks.Gap(batches=batches, plain=plain, every=every)
    history = model.fit(x, y, verbose=0, epochs=epochs, callbacks=gap, checks="off", **{"seed": 0, **options})
    return gap.found, history


def balanced(found, history):
    for one in found:
        assert one.loss == pytest.approx(history.history["loss"][one.epoch - 1], rel=1e-12, abs=1e-12)
        assert one.val_loss == pytest.approx(history.history["val_loss"][one.epoch - 1], rel=1e-12, abs=1e-12)
        parts = [part.value for part in one.parts if part.value is not None]
        assert sum(parts) == pytest.approx(one.difference, rel=1e-9, abs=1e-12)
        assert [part.name for part in one.parts] == NAMES


def only(found, *names, tolerance=1e-6):
    """Whatever is not named adds nothing."""
    for part in found.parts:
        if part.name not in names:
            assert part.value == pytest.approx(0, abs=tolerance), part.name


# --- parts that are known -------------------------------------------------------------------------------------------


def test_weights_that_moved():
    x, y = normal(40, 3).double(), normal(40, 1, seed=1).double()
    net = nn.Linear(3, 1).double()
    by_hand = nn.Linear(3, 1).double()
    by_hand.load_state_dict(net.state_dict())
    total = 0.0
    for start in range(0, 40, 4):
        loss = (by_hand(x[start : start + 4]) - y[start : start + 4]).square().mean()
        total += loss.item() * 4
        by_hand.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.05 * p.grad
    frozen = (by_hand(x) - y).square().mean().item()
    found, history = measured(
        compiled(net, 0.05), x, y, batch_size=4, shuffle=False, validation_data=(x[:8] + 1, y[:8])
    )
    balanced(found, history)
    assert found[0].loss == pytest.approx(total / 40)
    assert found[0]["weights moved"].value == pytest.approx(frozen - total / 40, rel=1e-9)
    assert found[0]["data"].value == pytest.approx(history.history["val_loss"][0] - frozen, rel=1e-9)
    only(found[0], "weights moved", "data", tolerance=0)


def test_dropout_explains_the_gap():
    net = nn.Sequential(nn.Dropout(0.4), nn.Linear(10, 1, bias=False))
    nn.init.constant_(net[1].weight, 0.1)
    x = torch.ones(2000, 10)
    found, history = measured(compiled(net, 0.0), x, x[:, :1], batch_size=20, validation_data=(x, x[:, :1]))
    balanced(found, history)
    part = found[0]["train mode"]
    # Σ w² x² p / (1 − p): the variance that dropout adds to a prediction.
    expected = -10 * 0.1**2 * 0.4 / 0.6
    assert part.value == pytest.approx(expected, abs=4 * part.error)
    assert 0 < part.error < 0.1 * abs(expected)
    for name in ("weights moved", "data"):
        # The epoch drew other random numbers than the measurement: only errors apart from nothing.
        assert abs(found[0][name].value) < 4 * found[0][name].error
    only(found[0], "train mode", "weights moved", "data")


def test_batch_normalization_is_train_mode():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(1, affine=False, momentum=0.0)
    net = nn.Sequential(norm, nn.Linear(1, 1))
    with torch.no_grad():
        net[1].weight.fill_(1.0), net[1].bias.fill_(0.0)
    # Running statistics stay (0, 1): eval mode is the identity, train mode makes mean 0 and variance 1.
    x = 3 * normal(4000, 1) + 2
    found, history = measured(compiled(net, 0.0), x, torch.zeros_like(x), batch_size=400, validation_split=0.5)
    balanced(found, history)
    part = found[0]["train mode"]
    assert part.value == pytest.approx((9 + 4) - 1, abs=4 * part.error)
    squares = x.square().mean(1)
    assert found[0]["data"].value == pytest.approx(float(squares[2000:].mean() - squares[:2000].mean()), abs=1e-4)
    only(found[0], "train mode", "data")


def test_regularizers_alone():
    net = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    start = 0.1 * 5.25
    x = torch.zeros(8, 3).double()
    found, history = measured(
        compiled(net, 0.5, regularizers={"weight": ll.regularizers.L2(0.1)}),
        x,
        x[:, :1],
        batch_size=2,
        validation_data=(x, x[:, :1]),
    )
    balanced(found, history)
    # w ← w − 0.5 · 2 · 0.1 w in each of 4 steps.
    penalties = [start * 0.9 ** (2 * step) for step in range(5)]
    assert found[0].loss == pytest.approx(sum(penalties[:4]) / 4)
    part = found[0]["regularizers"]
    assert (part.value, part.error) == (pytest.approx(penalties[4] - sum(penalties[:4]) / 4), 0.0)
    only(found[0], "regularizers", tolerance=0)


@pytest.mark.parametrize("kind", ["sample", "class", "both"])
def test_weights_that_only_the_training_counts(kind):
    x, y = normal(60, 3), normal(60, 3, seed=1).argmax(-1)
    weight = torch.arange(60) % 3 + 0.5 if kind != "class" else None
    classes = {0: 3.0, 1: 0.5} if kind != "sample" else None
    loss = ll.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = compiled(nn.Linear(3, 3), 0.0, loss)
    found, history = measured(
        model, x, y, batch_size=6, sample_weight=weight, class_weight=classes, validation_data=(x, y)
    )
    balanced(found, history)
    by_hand = loss(y, model.net(x)).item()
    vector = torch.tensor([3.0, 0.5, 1.0])[y] if kind != "sample" else torch.ones(60)
    weighted = loss(y, model.net(x), vector * (1.0 if weight is None else weight)).item()
    assert found[0]["counting"].value == pytest.approx(by_hand - weighted, rel=1e-5)
    only(found[0], "counting")


def test_weights_on_both_sides_stay():
    x, y = normal(60, 3), normal(60, 1, seed=1)
    weight = torch.arange(60) % 3 + 0.5
    found, history = measured(
        compiled(nn.Linear(3, 1), 0.0), x, y, batch_size=6, sample_weight=weight, validation_data=(x, y, weight)
    )
    balanced(found, history)
    only(found[0])
    assert "stay" in found[0].notes[0]
    loader = [ll.Batch(x[i : i + 6], y[i : i + 6], weight[i : i + 6]) for i in range(0, 60, 6)]
    found, history = measured(compiled(nn.Linear(3, 1), 0.0), loader, validation_data=loader, plain=lambda b: b)
    balanced(found, history)
    only(found[0])


class Noisy:
    """Batches with noise on the inputs, new in each epoch; ids say which samples they are."""

    def __init__(self, x, y, size, ids=True):
        self.x, self.y, self.size, self.ids = x, y, size, ids

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __iter__(self):
        for start in range(0, len(self.x), self.size):
            ids = torch.arange(start, min(start + self.size, len(self.x)))
            yield ll.Batch(self.x[ids] + torch.randn(self.x[ids].shape), self.y[ids], ids=ids if self.ids else None)


@pytest.mark.parametrize("whole", [False, True], ids=["inputs", "a batch"])
def test_augmentation_is_told_apart_where_plain_samples_are_given(whole):
    x, y = normal(600, 4), torch.zeros(600, 1)
    net = nn.Linear(4, 1, bias=False)
    nn.init.constant_(net.weight, 0.5)

    def plain(batch):
        return ll.Batch(x[batch.ids], batch.y) if whole else x[batch.ids]

    torch.manual_seed(3)
    found, history = measured(compiled(net, 0.0), Noisy(x, y, 20), validation_data=(x, y), plain=plain)
    balanced(found, history)
    part = found[0]["augmentation"]
    # The noise adds Σ w² = 1 to the square of a prediction.
    assert part.value == pytest.approx(-1.0, abs=4 * part.error)
    assert part.error < 0.2
    only(found[0], "augmentation", tolerance=1e-5)


def test_augmentation_is_not_told_apart_without():
    x, y = normal(60, 4), torch.zeros(60, 1)
    found, history = measured(compiled(nn.Linear(4, 1), 0.0), Noisy(x, y, 20, ids=False), validation_data=(x, y))
    balanced(found, history)
    assert (found[0]["augmentation"].value, found[0]["augmentation"].error) == (None, None)
    assert "plain=fn" in found[0].notes[0]


# --- errors ---------------------------------------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_its_standard_error():
    numbers = [3.0, 1.0, 4.0, 1.0, 5.0]
    units = [{"train": number} for number in numbers]

    def values(some):
        return [float(np.mean([unit["train"] for unit in some]))]

    ((value, error),) = with_errors(units, values)
    assert value == pytest.approx(np.mean(numbers))
    assert error == pytest.approx(np.std(numbers, ddof=1) / np.sqrt(len(numbers)))
    assert with_errors(units[:1], values) == [(3.0, None)]


def test_errors_hold_where_a_part_of_the_batches_is_measured():
    """Sample weights and dropout on few of many batches, against all of them, in units of the error."""
    distances = {"weights moved": [], "counting": [], "train mode": [], "data": []}
    trials = 40
    for seed in range(trials):
        x, y = normal(640, 4, seed=seed), normal(640, 1, seed=seed + 100)
        weight = torch.rand(640, generator=torch.Generator().manual_seed(seed)) * 2
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        found = {}
        for batches in (8, 1000):
            torch.manual_seed(seed)
            options = {"batch_size": 10, "sample_weight": weight, "validation_data": (x[:100], y[:100]), "seed": seed}
            (found[batches],), history = measured(compiled(net, 0.0), x, y, batches=batches, **options)
            balanced([found[batches]], history)
        for name, kept in distances.items():
            few, all_of_them = found[8][name], found[1000][name]
            # Nothing moved: apart from the noise of dropout that part is 0.
            known = 0.0 if name == "weights moved" else all_of_them.value
            kept.append((few.value - known) / few.error)
    for name, kept in distances.items():
        # Neither too small nor too large: of 40 ratios with 7 degrees of freedom the root of the mean square is near 1.
        assert 0.7 < np.sqrt(np.mean(np.square(kept))) < 1.6, (name, kept)
        assert np.mean(np.abs(kept) < 2) > 0.8, (name, kept)


# --- nothing is disturbed -------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """A buffer that the forward replaces, a whole number, and draws from three generators."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        self.hidden += 1
        scale = 1 + 0.01 * (random.random() + np.random.rand()) if self.training else 1.0
        return x * scale


def trained(callbacks, frozen=True):
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Counter(), nn.Dropout(0.3), nn.Linear(8, 1))
    if frozen:
        net[1].eval()
    model = ll.Model(net)
    model.compile("adam", "mse", ema=0.9, metrics=["mae"])
    x, y = normal(64, 4), normal(64, 1, seed=1)
    history = model.fit(
        x, y, batch_size=8, epochs=3, seed=0, verbose=0, validation_split=0.25, callbacks=callbacks, accumulate=2
    )
    modes = [module.training for module in net.modules()]
    states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    tensors = {**net.state_dict(), "hidden": net[2].hidden}
    return {k: v.clone() for k, v in tensors.items()}, history.history, modes, states


@pytest.mark.parametrize("frozen", [False, True])
def test_training_goes_on_as_if_nothing_had_been_measured(frozen):
    gap = ll.callbacks.Gap(batches=3)
    plain, watched = trained(None, frozen), trained(gap, frozen)
    assert len(gap.found) == 3
    for name, value in plain[0].items():
        assert torch.equal(value, watched[0][name]), name
    assert plain[1:] == watched[1:]


def test_the_function_disturbs_nothing():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)).eval()
    model = compiled(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    x, y = normal(64, 4), normal(64, 1, seed=1)
    found = ll.gap(model, x, y, (x[:16], y[:16]), batch_size=8, batches=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert not any(module.training for module in net.modules())
    assert found["train mode"].value != 0


def test_a_keras_model_is_left_alone():
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend")

    def run(callbacks):
        keras.utils.set_random_seed(2)
        layers = [keras.layers.Dense(6), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
        net = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])
        model = compiled(net, 0.01)
        x, y = normal(64, 4), normal(64, 1, seed=1)
        model.fit(x, y, batch_size=8, epochs=2, seed=0, verbose=0, validation_split=0.25, callbacks=callbacks)
        seeds = [np.asarray(v.value.detach()) for layer in net.layers for v in layer.variables]
        return [*seeds, *(np.asarray(v.value.detach()) for v in net.non_trainable_variables)]

    gap = ll.callbacks.Gap(batches=3)
    for plain, watched in zip(run(None), run(gap), strict=True):
        np.testing.assert_array_equal(plain, watched)
    assert all(abs(found["train mode"].value) > found["train mode"].error / 10 for found in gap.found)


# --- forms of data and losses ---------------------------------------------------------------------------------------


class Stream:
    """Batches without a length."""

    def __init__(self, x, y, size):
        self.parts = (x, y, size)

    def __iter__(self):
        x, y, size = self.parts
        for start in range(0, len(x), size):
            yield x[start : start + size], y[start : start + size]


@pytest.mark.parametrize("count", [2, 5, 8, 100])
def test_data_without_a_length(count):
    x, y = normal(90, 3), normal(90, 1, seed=1)
    found, history = measured(compiled(nn.Linear(3, 1)), Stream(x, y, 3), validation_data=(x, y), batches=count)
    balanced(found, history)
    assert min(count, 30) / 2 <= found[0].batches <= count


def test_a_loader_and_windows():
    x, y = normal(90, 3), normal(90, 1, seed=1)
    loader = DataLoader(list(zip(x, y, strict=True)), batch_size=4)
    found, history = measured(compiled(nn.Linear(3, 1)), loader, validation_data=(x, y), accumulate=3, epochs=2)
    balanced(found, history)
    # 23 batches are 8 windows, the last of them smaller.
    assert [one.batches for one in found] == [8, 8]
    only(found[1], "weights moved", "data", "augmentation")


def test_ratios_several_outputs_and_auxiliary_losses():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

        def forward(self, x):
            z = self.layer(self.drop(x))
            ll.add_loss("activity", z.square().mean())
            return {"mask": z, "size": z[:, :1]}

    x, mask = normal(64, 3), (normal(64, 2, seed=1) > 0).float()
    losses = {"mask": ll.losses.BinaryCrossentropy(from_logits=True) + ll.losses.Dice(from_logits="sigmoid", axis=(0,))}
    model = compiled(Two(), 0.1, {**losses, "size": "mse"}, loss_weights={"size": 0.3, "activity": 0.2})
    y = {"mask": mask, "size": normal(64, 1, seed=2)}
    found, history = measured(model, x, y, batch_size=16, epochs=2, validation_data=(x, y))
    balanced(found, history)
    assert all(found[1][name].value for name in ("weights moved", "train mode"))


def test_steps_that_are_not_finite_are_not_measured():
    x, y = normal(64, 3), normal(64, 1, seed=1)
    x[5] = float("nan")
    model = compiled(nn.Linear(3, 1), 0.01, on_nonfinite="skip")
    found, history = measured(model, x, y, batch_size=8, validation_data=(x[8:], y[8:]), shuffle=False)
    balanced(found, history)
    assert found[0].batches == 7


# --- the interface --------------------------------------------------------------------------------------------------


def test_text_dict_and_ledger(tmp_path):
    x, y = normal(64, 3), normal(64, 1, seed=1)
    said = []
    gap = ll.callbacks.Gap(batches=4, every=2, show=said.append)
    model = compiled(nn.Linear(3, 1))
    model.fit(x, y, batch_size=8, epochs=5, validation_split=0.5, verbose=0, callbacks=gap, run_dir=tmp_path / "run")
    assert [found.epoch for found in gap.found] == [2, 4]
    assert said == [str(found) for found in gap.found]
    assert all(len(line) <= 80 for text in said for line in text.splitlines())
    kept = ll.Ledger.open(tmp_path / "run").info["gaps"]
    assert kept == json.loads(json.dumps([found.to_dict() for found in gap.found]))
    assert sum(part["value"] for part in kept[1]["parts"]) == pytest.approx(kept[1]["val_loss"] - kept[1]["loss"])
    with pytest.raises(KeyError):
        gap.found[0]["luck"]


def test_the_report_shows_the_last_measurement(tmp_path):
    x, y = normal(64, 3), normal(64, 1, seed=1)
    gap = ll.callbacks.Gap(batches=4)
    model = compiled(nn.Linear(3, 1))
    history = model.fit(
        Stream(x, y, 8), epochs=2, validation_data=(x, y), verbose=0, callbacks=gap, run_dir=tmp_path / "run"
    )
    page = ll.report(tmp_path / "run", tmp_path / "report.html").read_text(encoding="utf-8")
    plain = as_text(build_view(history.ledger))
    for text in (page, plain):
        assert "After epoch 2 the training loss is" in text
        assert all(name in text for name in NAMES)
        assert "plain=fn" in text
    view = build_view(history.ledger).runs[0]
    assert [line.value for line in view.gap.lines] == [part.value for part in gap.found[1].parts]
    assert view.gap.lines[-1].level == pytest.approx(gap.found[1].val_loss)
    assert "gaps" not in dict(view.provenance)


@pytest.mark.parametrize("kept", [3, [], [1], [{"loss": "much"}], [{"loss": 1.0, "parts": [{}]}]])
def test_a_run_file_of_somebody_else_has_no_gap(kept):
    assert gap_view(kept) is None


def test_epochs_without_a_validation_are_not_measured():
    x, y = normal(64, 3), normal(64, 1, seed=1)
    found, _ = measured(compiled(nn.Linear(3, 1)), x, y, epochs=4, validation_data=(x, y), validation_freq=3)
    assert [one.epoch for one in found] == [3]


class Stop(ll.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        if batch == 2 and self.epoch == 1:
            raise KeyboardInterrupt

    def on_epoch_begin(self, epoch, logs):
        self.epoch = epoch


def test_a_resumed_epoch_is_not_measured_in_part(tmp_path):
    x, y = normal(64, 3), normal(64, 1, seed=1)

    def run(*callbacks, resume=False):
        gap = ll.callbacks.Gap(batches=4)
        each = ll.callbacks.BackupAndRestore(save_freq=1)
        options = {"batch_size": 8, "epochs": 3, "verbose": 0, "validation_data": (x, y), "seed": 0}
        return compiled(nn.Linear(3, 1)).fit(
            x, y, **options, run_dir=tmp_path / "run", callbacks=[gap, each, *callbacks], resume=resume
        )

    with pytest.raises(KeyboardInterrupt):
        run(Stop())
    history = run(resume=True)
    assert [one["epoch"] for one in history.ledger.info["gaps"]] == [1, 3]


def test_the_function_starts_at_the_loss_of_a_step():
    x, y = normal(256, 3), normal(256, 1, seed=1)
    model = compiled(nn.Linear(3, 1), regularizers={"weight": "l2"})
    found = ll.gap(model, x, y, (x[:64], y[:64]), batches=100)
    frozen, held = (model.evaluate(x[:n], y[:n], verbose=0, return_dict=True)["loss"] for n in (256, 64))
    assert (found.loss, found.val_loss) == (pytest.approx(frozen), pytest.approx(held))
    assert [part.name for part in found.parts] == NAMES[1:]
    assert found["data"].value == pytest.approx(held - frozen, abs=1e-6)
    only(found, "data")
    weighted = ll.gap(model, x, y, (x, y), batches=100, sample_weight=torch.full((256,), 2.0))
    assert weighted["counting"].value == pytest.approx(-(frozen - 0.01 * model.net.weight.square().sum().item()), 1e-4)
    loader = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 256, 8)]
    assert ll.gap(model, loader, validation_data=(x[:64], y[:64]), batches=100)["augmentation"].value is None


def test_what_cannot_be_measured_is_refused():
    x, y = normal(16, 3), normal(16, 1)
    for options in ({"batches": 1}, {"every": 0}, {"batches": True}):
        with pytest.raises(InputError, match="whole number"):
            ll.callbacks.Gap(**options)
    with pytest.raises(InputError, match="validation"):
        measured(compiled(nn.Linear(3, 1)), x, y)
    synchronized = nn.Sequential(nn.Linear(3, 1), nn.SyncBatchNorm(1))
    with pytest.raises(InputError, match="SyncBatchNorm"):
        measured(compiled(synchronized), x, y, validation_data=(x, y))
    with pytest.raises(InputError, match="same 8 samples"):
        measured(compiled(nn.Linear(3, 1)), Stream(x, y, 8), validation_data=(x, y), plain=lambda batch: batch.x[:3])
    model = compiled(nn.Linear(3, 1))
    with pytest.raises(InputError, match="validation_data"):
        ll.gap(model, x, y)
    with pytest.raises(InputError, match="batches"):
        ll.gap(model, x, y, (x, y), batches=1)
    with pytest.raises(InputError, match="finite"):
        ll.gap(model, x * float("nan"), y, (x, y))
