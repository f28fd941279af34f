"""Models of Keras 3 in ll.Model: each trap of a foreign loop, what is understood, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lossledger as ll
from lossledger import errors
from lossledger import losses as L
from lossledger.training import sums

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def data(n=12, columns=4):
    x = np.random.default_rng(0).normal(size=(n, columns)).astype("float32")
    return x, x[:, :1].copy()


def compiled(net, loss="mse", optimizer="sgd", **options):
    model = ll.Model(net)
    model.compile(optimizer, loss, **options)
    return model


def fit(model, x, y, **options):
    return model.fit(x, y, **{"verbose": 0, "shuffle": False, "batch_size": 4, **options})


def python(code, **environment):
    """Runs code in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Spy(layers.Layer):
    """Notes with which flag it was called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x, training=None):
        self.seen.append(training)
        return x


class Subclassed(keras.Model):
    """A model whose call has no training argument."""

    def __init__(self):
        super().__init__()
        self.spy, self.drop, self.head = Spy(), layers.Dropout(0.5), layers.Dense(1)

    def call(self, x):
        return self.head(self.drop(self.spy(x)))


class Nested(nn.Module):
    """Layers of Keras inside a torch module."""

    def __init__(self):
        super().__init__()
        self.spy = Spy()
        self.inner = keras.Sequential([layers.Dense(3, activity_regularizer="l2"), layers.BatchNormalization()])
        self.torch = nn.Linear(3, 1)

    def forward(self, x):
        return self.torch(self.inner(self.spy(x)))


# --- the training flag ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["functional", "sequential", "subclassed", "nested"])
def test_the_training_flag_reaches_every_layer(kind):
    spy = Spy()
    if kind == "functional":
        i = keras.Input((4,))
        net = keras.Model(i, layers.Dense(1)(spy(layers.Dense(4)(i))))
    elif kind == "sequential":
        net = keras.Sequential([spy, layers.Dense(1)])
    else:
        net = Subclassed() if kind == "subclassed" else Nested()
        spy = net.spy
    x, y = data()
    model = compiled(net)
    model.predict(x)
    spy.seen.clear()
    fit(model, x, y)
    assert spy.seen.count(True) == 3
    assert spy.seen[-3:] == [True] * 3
    for call in (lambda: model.predict(x), lambda: model.evaluate(x, y, verbose=0), lambda: model.test_on_batch(x, y)):
        spy.seen.clear()
        call()
        assert spy.seen
        assert set(spy.seen) == {False}


def test_a_layer_that_is_told_otherwise_does_not_tell_the_next():
    """A frozen backbone in inference, and a head that trains."""

    class Transfer(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = (
                keras.Sequential([Spy(), layers.Dense(2)]),
                keras.Sequential([Spy(), layers.Dense(1)]),
            )

        def forward(self, x):
            return self.head(self.backbone(x, training=False))

    net = Transfer()
    x, y = data()
    fit(compiled(net), x, y)
    assert set(net.backbone.layers[0].seen) == {False}
    assert net.head.layers[0].seen[-3:] == [True] * 3
    assert not net.head._forward_hooks


def test_dropout_without_a_training_argument_is_on_here_and_off_in_keras():
    """The exact difference: Keras's fit passes no flag to such a model, so its dropout never drops."""
    x = np.ones((512, 4), "float32")
    net = Subclassed()
    net(x)
    dropped = []
    net.drop.register_forward_hook(lambda module, inputs, output: dropped.append(float((output == 0).float().mean())))
    net.compile("sgd", "mse")
    net.fit(x, x[:, :1], verbose=0, batch_size=512)
    assert set(dropped) == {0.0}
    fit(compiled(net), x, x[:, :1], batch_size=512)
    assert dropped[-1] == pytest.approx(0.5, abs=0.1)


def test_batch_norm_learns_in_training_only_also_inside_a_torch_module():
    for net, norm in (
        (lambda: keras.Sequential([layers.BatchNormalization(), layers.Dense(1)]), lambda n: n.layers[0]),
        (Nested, lambda n: n.inner.layers[1]),
    ):
        net = net()
        x, y = data()
        x += 5
        model = compiled(net)
        model.evaluate(x, y, verbose=0)
        before = norm(net).moving_mean.value.detach().clone()
        model.predict(x)
        assert torch.equal(norm(net).moving_mean.value, before)
        fit(model, x, y)
        assert not torch.equal(norm(net).moving_mean.value, before)


def test_a_torch_module_in_a_keras_model_is_not_left_in_train_mode():
    i = keras.Input((4,))
    wrapped = keras.layers.TorchModuleWrapper(nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 1)), output_shape=(None, 1))
    net = keras.Model(i, wrapped(i))
    x, y = data()
    model = compiled(net)
    fit(model, x, y)
    assert np.array_equal(model.predict(x), model.predict(x))
    assert np.array_equal(model.predict(x)[:, 0], wrapped.module[1](torch.tensor(x)).detach().numpy()[:, 0])
    assert len({model.evaluate(x, y, verbose=0) for _ in range(3)}) == 1


def test_a_frozen_batch_norm_keeps_its_statistics_and_a_frozen_layer_its_weights():
    net = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(3), layers.Dense(1)])
    net.layers[0].trainable = False
    net.layers[1].trainable = False
    before = [w.copy() for w in net.get_weights()]
    x, y = data()
    fit(compiled(net, optimizer="adamw"), x, y)
    changed = [not np.array_equal(a, b) for a, b in zip(before, net.get_weights(), strict=True)]
    # Kernels and biases come last in each layer: only those of the last layer moved.
    assert [v.path.split("/")[-2] for v, c in zip(net.weights, changed, strict=True) if c] == [net.layers[2].name] * 2


# --- unbuilt models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fit", "generator", "evaluate", "train_on_batch", "test_on_batch", "predict"])
def test_an_unbuilt_model_is_built_by_its_first_batch(call):
    net = keras.Sequential([layers.Dense(3), layers.Dense(1)])
    x, y = data()
    model = compiled(net)
    if call == "fit":
        assert len(fit(model, x, y).history["loss"]) == 1
    elif call == "generator":
        seen: list[float] = []
        batches = ((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8))

        def note(module, inputs, output):
            if isinstance(output, torch.Tensor):
                seen.append(inputs[0][0, 0].item())

        net.layers[0].register_forward_hook(note)
        model.fit(batches, verbose=0)
        # Once to be built, then each batch once: the first was not lost.
        assert seen == pytest.approx([x[0, 0], x[0, 0], x[4, 0], x[8, 0]])
    elif call == "evaluate":
        assert np.isfinite(model.evaluate(x, y, verbose=0))
    elif call == "predict":
        assert model.predict(x).shape == (12, 1)
        fit(model, x, y)
    else:
        assert np.isfinite(getattr(model, call)(x, y))
    assert len(list(model.optimizer.param_groups[0]["params"])) == 4


def test_without_a_batch_there_are_no_weights_to_save_or_train(tmp_path):
    model = compiled(keras.Sequential([layers.Dense(1)]))
    for call in (lambda: model.optimizer, lambda: model.save_weights(tmp_path / "w.safetensors")):
        with pytest.raises(errors.InputError, match="before it has seen a batch"):
            call()


def test_a_wrong_recipe_is_refused_before_the_model_is_built():
    with pytest.raises(errors.UnknownNameError, match="mean_sqared"):
        compiled(keras.Sequential([layers.Dense(1)]), "mean_sqared_error")


# --- losses that the model brings ----------------------------------------------------------------------------------


class Adds(layers.Layer):
    def call(self, x):
        self.add_loss(0.5 * keras.ops.mean(keras.ops.square(x)))
        return x


def with_losses():
    i = keras.Input((4,))
    h = layers.Dense(3, name="a", kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.1))(i)
    h = Adds(name="adds")(h)
    return keras.Model(i, layers.Dense(1, name="b", bias_regularizer=lambda w: 0.3 * keras.ops.sum(w + 1))(h))


def test_the_losses_of_the_model_are_terms_of_their_own():
    net = with_losses()
    x, y = data()
    model = compiled(net)
    kernel, bias = net.get_layer("a").kernel, net.get_layer("b").bias
    history = fit(model, x, y, batch_size=12)
    rows = {r["term"]: r for r in history.ledger.table(by=["term", "role"])}
    assert {(name, row["role"]) for name, row in rows.items()} == {
        ("mean_squared_error", "data"),
        ("l2/a/kernel", "regularizer"),
        ("<lambda>/b/bias", "regularizer"),
        ("a/add_loss", "auxiliary"),
        ("adds/add_loss", "auxiliary"),
    }
    # The values, from the formulas, at the weights that evaluate sees.
    result = model.evaluate(x, y, batch_size=12, verbose=0, return_dict=True)
    w, c = kernel.numpy().astype("float64"), net.get_layer("a").bias.numpy().astype("float64")
    h = x.astype("float64") @ w + c
    assert result["l2/a/kernel"] == pytest.approx(0.01 * (w**2).sum(), rel=1e-5)
    assert result["<lambda>/b/bias"] == pytest.approx(0.3 * (bias.numpy() + 1).sum(), rel=1e-5)
    assert result["a/add_loss"] == pytest.approx(0.1 * np.abs(h).sum() / len(x), rel=1e-5)
    assert result["adds/add_loss"] == pytest.approx(0.5 * (h**2).mean(), rel=1e-5)
    # The whole is the number of Keras's evaluate.
    net.compile("sgd", "mse")
    assert result["loss"] == pytest.approx(net.evaluate(x, y, batch_size=12, verbose=0), rel=1e-5)


def test_added_losses_count_once_a_batch_and_do_not_pile_up():
    net = with_losses()
    x, y = data()
    model = compiled(net)
    values = [model.test_on_batch(x, y, return_dict=True)["adds/add_loss"] for _ in range(3)]
    assert values[0] == values[1] == values[2]


def test_the_losses_of_layers_inside_a_torch_module_are_terms_too():
    net = Nested()
    x, y = data()
    model = compiled(net)
    history = fit(model, x, y).history
    (name,) = [key for key in history if key.endswith("add_loss")]
    first = model.test_on_batch(x, y, return_dict=True)[name]
    h = net.inner.layers[0](torch.tensor(x)).detach()
    assert first == pytest.approx(0.01 * float(h.square().sum()) / 12, rel=1e-4)
    assert model.test_on_batch(x, y, return_dict=True)[name] == pytest.approx(first, rel=1e-6)


def test_added_losses_can_be_weighed_by_name():
    net = with_losses()
    x, y = data()
    plain = compiled(net).test_on_batch(x, y, return_dict=True)
    weighed = compiled(net, loss_weights={"adds/add_loss": 3.0}).test_on_batch(x, y, return_dict=True)
    assert weighed["loss"] == pytest.approx(plain["loss"] + 2 * plain["adds/add_loss"], rel=1e-5)


def test_patterns_name_variables_by_their_paths_and_only_those_without_a_regularizer():
    net = with_losses()
    x, y = data()
    model = compiled(net, regularizers={"*/bias": "l1"})
    result = model.evaluate(x, y, verbose=0, return_dict=True)
    biases = [net.get_layer(name).bias.numpy() for name in "ab"]
    assert result["l1/*/bias"] == pytest.approx(0.01 * sum(np.abs(b).sum() for b in biases))
    with pytest.raises(errors.InputError, match="regularizer of its own"):
        compiled(net, regularizers={"a/kernel": "l1"})


# --- masks ---------------------------------------------------------------------------------------------------------


def recurrent():
    i = keras.Input((5,), dtype="int32")
    return keras.Model(
        i, layers.Dense(2)(layers.LSTM(3, return_sequences=True)(layers.Embedding(6, 4, mask_zero=True)(i)))
    )


def sequences():
    x = np.array([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 4, 3, 2, 1]], "int32")
    return x, np.random.default_rng(1).normal(size=(3, 5, 2)).astype("float32")


@pytest.mark.parametrize("weight", [None, "sample", "step"])
@pytest.mark.parametrize("given", [None, "sample", "step"])
def test_the_mask_of_the_layers_and_the_given_one_both_count(given, weight):
    net = recurrent()
    x, y = sequences()
    m = {"sample": np.array([True, True, False]), "step": np.arange(15).reshape(3, 5) % 2 == 0}.get(given)
    w = {"sample": np.array([1.0, 2.0, 3.0]), "step": np.arange(15.0).reshape(3, 5)}.get(weight)
    found = compiled(net).evaluate(x, y, verbose=0, mask=m, sample_weight=w, batch_size=2)
    entries = ((net.predict(x, verbose=0).astype("float64") - y) ** 2).mean(-1)
    inside = (x != 0) & (True if m is None else m[:, None] if m.ndim == 1 else m)
    weights = 1.0 if w is None else w[:, None] if w.ndim == 1 else w
    assert found == pytest.approx((entries * weights * inside).sum() / inside.sum(), rel=1e-5)


def test_masked_epochs_differ_from_keras_by_the_weight_of_a_batch():
    """The exact difference: Keras weighs the mean of each batch by its samples, not by what its mask lets count."""
    net = recurrent()
    x, y = sequences()
    entries = ((net.predict(x, verbose=0) - y) ** 2).mean(-1)
    inside = x != 0
    parts = [slice(0, 2), slice(2, 3)]
    means = [float((entries * inside)[p].sum() / inside[p].sum()) for p in parts]
    net.compile("sgd", "mse")
    assert net.evaluate(x, y, batch_size=2, verbose=0) == pytest.approx((2 * means[0] + means[1]) / 3, rel=1e-5)
    exact = float((entries * inside).sum() / inside.sum())
    assert compiled(net).evaluate(x, y, batch_size=2, verbose=0) == pytest.approx(exact, rel=1e-5)
    assert abs(exact - (2 * means[0] + means[1]) / 3) > 1e-3


def test_targets_under_the_mask_of_the_layers_may_be_anything():
    i = keras.Input((5,), dtype="int32")
    net = keras.Model(i, layers.Dense(3, activation="softmax")(layers.Embedding(6, 4, mask_zero=True)(i)))
    x, _ = sequences()
    labels = np.where(x != 0, x % 3, -7)
    model = compiled(net, "sparse_categorical_crossentropy", metrics=["accuracy"])
    fit(model, x, labels)
    found = model.evaluate(x, labels, verbose=0, return_dict=True)
    p = net.predict(x, verbose=0)
    inside = x != 0
    chosen = np.take_along_axis(p, (x % 3)[..., None], -1)[..., 0]
    assert found["loss"] == pytest.approx(-np.log(chosen[inside]).mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((p.argmax(-1) == labels)[inside].mean())
    labels[0, 0] = -7
    with pytest.raises(errors.InputError, match="-7"):
        fit(model, x, labels)


class Masks(nn.Module):
    """A torch module that leaves a mask where Keras's layers do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        y = self.head(x)
        y._keras_mask = x[..., 0] > 0
        return y


def test_a_torch_module_may_leave_a_mask_on_its_output():
    x = torch.randn(6, 3, 2)
    y = torch.where(x[..., :1] > 0, x[..., 1:], torch.nan)
    model = compiled(Masks())
    inside = x[..., 0] > 0
    expected = (model.net(x) - y)[inside].square().mean().detach()
    assert model.evaluate(x, y, verbose=0, batch_size=4) == pytest.approx(float(expected), rel=1e-5)
    fit(model, x, y)
    b = ll.Objective("mse")(y, model.net(x))
    assert b.value == pytest.approx(float((model.net(x) - y)[inside].square().mean().detach()), rel=1e-5)
    out = model.net(x)
    loss = L.MeanSquaredError()
    assert float(loss(y, out).detach()) == pytest.approx(b.value)
    _, gradient = loss.backprop(y, out)
    assert bool((gradient[..., 0] != 0).eq(inside).all())
    with pytest.raises(errors.InputError, match="mask"):
        model.evaluate(x, y, verbose=0, mask=torch.ones(6, 2, dtype=torch.bool))


# --- windows of several batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["masked", "losses"])
def test_a_window_of_batches_has_the_gradient_of_one_batch(case):
    """Unequal counts under the mask of the layers; penalties once a window; what layers add as means of samples."""
    x, y = sequences() if case == "masked" else data(6)
    make = recurrent if case == "masked" else with_losses
    one, two = make(), make()
    two.set_weights(one.get_weights())
    whole, parts = (compiled(net, optimizer=lambda p: torch.optim.SGD(p, 0.5)) for net in (one, two))
    fit(whole, x, y, batch_size=len(x), epochs=2)
    fit(parts, x, y, batch_size=len(x) // 3, accumulate=3, epochs=2)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_window_of_ones_own_loop_sees_the_mask_and_the_training_flag():
    net = recurrent()
    x, y = (torch.tensor(a) for a in sequences())
    b = ll.Objective("mse").step([(x[:1], y[:1]), (x[1:], y[1:])], net)
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    inside = x != 0
    loss = (net(x) - y)[inside].square().mean()
    loss.backward()
    assert float(b.total) == pytest.approx(float(loss.detach()), rel=1e-5)
    for a, p in zip(found, [p for p in net.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)
    spied = keras.Sequential([Spy(), layers.Dense(1)])
    ll.Objective("mse").step([data()], spied)
    assert spied.layers[0].seen[-1] is True


# --- constraints, averages, gates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", ["sgd", "rmsprop", lambda p: torch.optim.SGD(p, 1.0), lambda p: torch.optim.Adagrad(p, 1.0)]
)
def test_constraints_hold_after_every_step(optimizer):
    net = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(1, kernel_initializer=keras.initializers.Constant(-0.5), kernel_constraint="non_neg"),
        ]
    )
    x, y = data()
    lowest = []
    record = ll.callbacks.LambdaCallback(
        on_train_batch_end=lambda b, logs: lowest.append(net.layers[0].kernel.numpy().min())
    )
    model = compiled(net, optimizer=optimizer)
    # A second compile does not leave the constraints of the first behind.
    model.compile(optimizer, "mse")
    fit(model, x, -y, callbacks=record, epochs=2)
    assert len(lowest) == 6
    assert min(lowest) == 0.0


def test_a_second_compile_with_the_same_optimizer_applies_constraints_once():
    calls = []

    def constraint(w):
        calls.append(1)
        return w

    net = keras.Sequential([keras.Input((4,)), layers.Dense(1, kernel_constraint=constraint)])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = compiled(net, optimizer=optimizer)
    model.compile(optimizer, "mse")
    model.train_on_batch(*data())
    assert len(calls) == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", lambda p: torch.optim.Adagrad(p, 0.1)])
def test_a_step_that_is_not_finite_changes_nothing(optimizer):
    """Weights, running statistics, the state of Keras's optimizer, and weights that a constraint would change."""
    net = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(), layers.Dense(1, kernel_constraint="non_neg")]
    )
    x, y = data()
    model = compiled(net, optimizer=optimizer, on_nonfinite="skip")
    bad = x.copy()
    bad[0, 0] = np.nan
    before = net.get_weights()
    slots = [v.numpy().copy() for v in model.optimizer.keras.variables] if optimizer == "rmsprop" else []
    model.train_on_batch(bad, y)
    for a, b in zip(before, net.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, v in zip(slots, model.optimizer.keras.variables if slots else [], strict=True):
        np.testing.assert_array_equal(a, v.numpy())
    model.train_on_batch(x, y)
    assert any(not np.array_equal(a, b) for a, b in zip(before, net.get_weights(), strict=True))


def test_statistics_of_a_torch_module_inside_are_put_back_too():
    net = wrapping()
    x, y = data()
    model = compiled(net, on_nonfinite="skip")
    norm = net.layers[1].module[1]
    x[0, 0] = np.inf
    model.train_on_batch(x, y)
    assert bool((norm.running_mean == 0).all())
    x[0, 0] = 0.0
    model.train_on_batch(x, y)
    assert bool((norm.running_mean != 0).all())


def test_averages_and_decay_leave_statistics_and_seeds_alone():
    net = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(), layers.Dropout(0.1, seed=7), layers.Dense(1)]
    )
    x, y = data()
    model = compiled(net, optimizer="adamw", ema=0.5)
    held = {id(p) for group in model.optimizer.param_groups for p in group["params"]}
    assert held == {id(v.value) for v in net.trainable_variables}
    fit(model, x + 3, y, epochs=3)
    seed = next(v for v in net.variables if "seed" in v.path)
    assert seed.value.dtype == torch.int32
    # 0.99 of the old mean a step, from 0: the statistics themselves, not an average of them.
    mean = np.zeros(4)
    for _ in range(3):
        for i in (0, 4, 8):
            mean = 0.99 * mean + 0.01 * (x + 3)[i : i + 4].mean(0)
    np.testing.assert_allclose(net.layers[0].moving_mean.numpy(), mean, rtol=1e-4)


# --- weights -------------------------------------------------------------------------------------------------------


def convolutional():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.2, seed=1),
            layers.Dense(1),
        ]
    )


def wrapping():
    """A torch module with buffers inside a Keras model."""
    i = keras.Input((4,))
    h = keras.layers.TorchModuleWrapper(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), output_shape=(None, 3))(i)
    return keras.Model(i, layers.Dense(1)(h))


@pytest.mark.parametrize("make", [convolutional, Nested, wrapping], ids=["keras", "nested", "wrapping"])
def test_weights_go_into_another_instance(make, tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 2) if make is convolutional else (8, 4)).astype("float32")
    y = x.reshape(8, -1)[:, :1]
    first, second = compiled(make()), compiled(make())
    first.predict(x)
    second.predict(x)
    fit(first, x, y)
    assert not np.allclose(first.predict(x), second.predict(x))
    first.save_weights(tmp_path / "w.safetensors")
    second.load_weights(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(first.predict(x), second.predict(x))
    # Keras's own names hold for one instance only.
    with pytest.raises(RuntimeError):
        second.net.load_state_dict(first.net.state_dict())


def test_weights_of_another_architecture_are_refused(tmp_path):
    one, deeper, wider = (
        compiled(keras.Sequential([keras.Input((4,)), *extra, layers.Dense(1)]))
        for extra in ([], [layers.Dense(4)], [layers.Dense(3)])
    )
    one.save_weights(tmp_path / "w.safetensors")
    with pytest.raises(errors.InputError, match="not in the file"):
        deeper.load_weights(tmp_path / "w.safetensors")
    wider.save_weights(tmp_path / "w.safetensors")
    with pytest.raises(errors.InputError, match="expected shape"):
        deeper.load_weights(tmp_path / "w.safetensors")


def test_the_best_weights_come_back():
    net = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(1)])
    x, y = data()
    stop = ll.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True)
    model = compiled(net, optimizer=lambda p: torch.optim.SGD(p, 5.0), on_nonfinite="record")
    seen = []
    record = ll.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: seen.append(net.get_weights()))
    fit(model, x, y, epochs=4, callbacks=[record, stop])
    for a, b in zip(seen[stop.best_epoch], net.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# --- speed ---------------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")
        return func(*args, **(kwargs or {}))


def test_a_step_of_a_keras_model_reads_nothing_on_the_host(monkeypatch):
    monkeypatch.setattr(sums, "LOG_SECONDS", 1e9)

    def reads(steps):
        i = keras.Input((4,))
        h = layers.Dense(3, kernel_constraint="non_neg", activity_regularizer="l2", bias_regularizer="l1")(i)
        net = keras.Model(i, layers.Dense(1)(layers.BatchNormalization()(h)))
        x, y = data(4 * steps)
        model = compiled(net, optimizer="adam")
        with Reads() as mode:
            fit(model, x, y)
        return mode.count

    assert reads(25) == reads(5)


# --- outputs and inputs --------------------------------------------------------------------------------------------


def two(structure):
    i = keras.Input((4,))
    # Layer names in the other order than the keys.
    p, q = layers.Dense(1, name="zeta")(i), layers.Dense(2, name="alpha")(i)
    # Keras orders a dict by its keys.
    return keras.Model(i, {"q": q, "p": p} if structure == "dict" else [p, q])


@pytest.mark.parametrize("structure", ["list", "dict"])
@pytest.mark.parametrize("by", ["layers", "keys", "list", "one"])
def test_outputs_are_named_by_the_model(structure, by):
    net = two(structure)
    x, y = data()
    names = ["p", "q"] if structure == "dict" else ["zeta", "alpha"]
    given = {"layers": ["zeta", "alpha"], "keys": names}.get(by)
    losses = {"list": ["mse", "mae"], "one": "mse"}.get(by) or dict(zip(reversed(given), ["mae", "mse"], strict=True))
    weights = None if given is None else {given[0]: 2.0}
    model = compiled(net, losses, loss_weights=weights, metrics=None if given is None else {given[1]: ["mse"]})
    targets = dict(zip(names, [y, np.concatenate([y + 1, y + 2], 1)], strict=True))
    found = model.evaluate(x, targets if structure == "dict" else list(targets.values()), verbose=0, return_dict=True)
    out = net.predict(x, verbose=0)
    p, q = (out["p"], out["q"]) if structure == "dict" else out
    squares = {names[0]: ((p - y) ** 2).mean(), names[1]: ((q - targets[names[1]]) ** 2).mean()}
    second = squares[names[1]] if by == "one" else np.abs(q - targets[names[1]]).mean()
    assert found[f"{names[0]}_loss"] == pytest.approx(squares[names[0]], rel=1e-5)
    assert found[f"{names[1]}_loss"] == pytest.approx(second, rel=1e-5)
    assert found["loss"] == pytest.approx((2 if weights else 1) * squares[names[0]] + second, rel=1e-5)
    if given is not None:
        assert found[f"{names[1]}_mse"] == pytest.approx(squares[names[1]], rel=1e-5)


def test_an_output_that_does_not_exist_is_named():
    with pytest.raises(errors.UnknownNameError, match="zeto"):
        compiled(two("list"), {"zeto": "mse"})


def test_the_output_of_a_sequential_model_has_the_name_of_its_last_layer():
    x, y = data()
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1, name="out")])
    model = compiled(net, {"out": "mse"}, loss_weights={"out": 3.0}, metrics={"out": ["mae"]})
    error = net.predict(x, verbose=0) - y
    assert model.evaluate(x, y, verbose=0) == pytest.approx([3 * (error**2).mean(), abs(error).mean()], rel=1e-5)
    with pytest.raises(errors.UnknownNameError, match="'out'; received 'ouch'"):
        compiled(net, {"ouch": "mse"})


def test_a_dict_of_targets_goes_by_name_in_any_order():
    net = two("list")
    x, y = data()
    a, b = y, np.concatenate([y, y], 1)
    model = compiled(net, {"alpha": "mae", "zeta": "mse"})
    assert model.evaluate(x, {"alpha": b, "zeta": a}, verbose=0) == model.evaluate(x, [a, b], verbose=0)


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_a_model_takes_one_structure_of_inputs(form):
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    inputs = {"a": a, "b": b} if form is dict else [a, b]
    net = keras.Model(inputs, layers.Dense(1)(layers.Concatenate()([a, b])))
    x, y = data()
    parts = {"a": x, "b": x[:, :2]} if form is dict else form((x, x[:, :2]))
    model = compiled(net)
    fit(model, parts, y)
    expected = net.predict(parts if form is dict else [x, x[:, :2]], verbose=0)
    np.testing.assert_allclose(model.predict(parts), expected, rtol=1e-6)


def test_summary_is_that_of_keras(capsys):
    compiled(two("list")).summary()
    assert "zeta" in capsys.readouterr().out


def test_summary_of_a_torch_module_names_the_layers_of_keras(capsys):
    net = Nested()
    model = compiled(net)
    model.predict(data()[0])
    model.summary()
    text = capsys.readouterr().out
    rows = [line.split()[0] for line in text.splitlines()[2:-1] if line.split()[0] not in ("n",)]
    assert rows[-1] == "torch"
    assert "Dense" in text
    assert "BatchNormalization" in text
    # 4·3 + 3 of the dense layer, 4·3 of the norm (of which 2·3 are statistics), 3 + 1 of torch's layer.
    assert text.splitlines()[-1] == "31 parameters, 25 trainable"


def test_a_change_of_what_is_trainable_needs_another_compile():
    net = keras.Sequential([keras.Input((4,)), layers.Dense(2), layers.Dense(1)])
    net.layers[0].trainable = False
    x, y = data()
    model = compiled(net)
    fit(model, x, y)
    net.layers[0].trainable = True
    with pytest.warns(UserWarning, match="2 thawed"):
        fit(model, x, y)
    before = net.layers[0].kernel.numpy()
    model.compile("sgd", "mse")
    fit(model, x, y)
    assert not np.array_equal(before, net.layers[0].kernel.numpy())
    net.trainable = False
    net.layers[1].trainable = True
    with pytest.warns(UserWarning, match="2 parameters were frozen"):
        fit(model, x, y)


def test_a_mixed_policy_trains_and_its_losses_are_float32():
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1, dtype="mixed_bfloat16")])
    x, y = data()
    history = fit(compiled(net, optimizer="adam"), x, y, epochs=2).history
    assert history["loss"][1] < history["loss"][0]
    assert net.layers[0].kernel.value.dtype == torch.float32


# --- losses and metrics of Keras -----------------------------------------------------------------------------------

K = keras.losses
LOSSES = {
    "mse": K.MeanSquaredError(),
    "mae": K.MeanAbsoluteError(reduction="sum"),
    "mape": K.MeanAbsolutePercentageError(),
    "msle": K.MeanSquaredLogarithmicError(),
    "huber": K.Huber(delta=0.3),
    "log_cosh": K.LogCosh(),
    "cosine": K.CosineSimilarity(axis=-1),
    "hinge": K.Hinge(),
    "squared_hinge": K.SquaredHinge(),
    "categorical_hinge": K.CategoricalHinge(),
    "kld": K.KLDivergence(),
    "poisson": K.Poisson(),
    "bce": K.BinaryCrossentropy(label_smoothing=0.2, name="mine"),
    "bce logits": K.BinaryCrossentropy(from_logits=True),
    "focal": K.BinaryFocalCrossentropy(apply_class_balancing=True, alpha=0.3, gamma=1.5),
    "cce": K.CategoricalCrossentropy(label_smoothing=0.1),
    "categorical focal": K.CategoricalFocalCrossentropy(alpha=0.4, gamma=1.0),
    "dice": K.Dice(),
    "dice by class": K.Dice(axis=(0,)),
    "tversky": K.Tversky(alpha=0.3, beta=0.7),
    "function": K.mean_absolute_error,
    "function with arguments": K.huber,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_keras_is_the_same_loss(name):
    r = np.random.default_rng(3)
    y = np.eye(3, dtype="float32")[r.integers(0, 3, 8)]
    # Rows that sum to 1 would hide which errors alpha and beta of Tversky weigh.
    p = (r.uniform(0.1, 0.9, (8, 3)) if name in ("tversky", "bce") else r.dirichlet(np.ones(3), 8)).astype("float32")
    w = r.uniform(size=8).astype("float32")
    loss = LOSSES[name]
    ours = L.get(loss)
    if not isinstance(loss, K.Loss):
        loss = K.get(loss.__name__)
        assert float(ours(y, p)) == pytest.approx(float(loss(y, p).mean()), rel=1e-5)
        return
    assert type(ours).__name__ == type(loss).__name__
    assert ours.name == loss.name
    assert float(ours(y, p)) == pytest.approx(float(loss(y, p)), rel=1e-5)
    if "dice" not in name and name != "tversky":
        assert float(ours(y, p, sample_weight=w)) == pytest.approx(float(loss(y, p, sample_weight=w)), rel=1e-5)


def test_sparse_losses_of_keras_keep_their_arguments():
    y, p = np.array([0, 1, 2, 2]), np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    loss = K.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2)
    assert float(L.get(loss)(y, p)) == pytest.approx(float(loss(y, p)), rel=1e-5)
    other = K.CategoricalGeneralizedCrossEntropy(q=0.3)
    q = torch.softmax(torch.tensor(p), -1)
    assert float(L.get(other)(y, q)) == pytest.approx(float(other(y, q)), rel=1e-5)


class Quartic(K.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(keras.ops.square(y_true - y_pred)), axis=-1)


def test_a_loss_of_ones_own_gives_its_entries():
    x, y = data()
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model = compiled(net, Quartic(name="fourth"), class_names=None)
    found = model.evaluate(x, y, verbose=0, batch_size=5, sample_weight=np.arange(12.0))
    entries = (net.predict(x, verbose=0) - y)[:, 0].astype("float64") ** 4
    assert found == pytest.approx((entries * np.arange(12)).sum() / 12, rel=1e-5)
    fit(model, x, y)


def test_losses_that_cannot_be_taken_apart_are_refused():
    class Whole(K.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):
            return keras.ops.mean(y_true - y_pred)

    with pytest.raises(errors.InputError, match="overrides __call__"):
        L.get(Whole())
    with pytest.raises(errors.InputTypeError, match="dtype"):
        L.get(K.MeanSquaredError(dtype="float16"))
    with pytest.raises(errors.InputTypeError, match="Make an instance"):
        L.get(K.MeanSquaredError)
    with pytest.raises(errors.InputTypeError, match="expected a loss of Keras"):
        L.get(layers.Dense(1))


def test_crossentropy_is_resolved_by_the_output_or_refused():
    i = keras.Input((4,))
    one = compiled(keras.Model(i, layers.Dense(1, activation="sigmoid")(i)), "crossentropy")
    assert one.objective.terms[0].name == "binary_crossentropy"
    with pytest.raises(errors.InputError, match="by the shape of the targets"):
        compiled(keras.Model(i, layers.Dense(3)(i)), "ce")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "metric",
    [
        "accuracy",
        "mae",
        "mse",
        "auc",
        "precision",
        "cosine_similarity",
        lambda: keras.metrics.MeanAbsoluteError(name="own"),
        lambda: keras.metrics.AUC(num_thresholds=50, name="area"),
        lambda: keras.metrics.R2Score(name="r2"),
        lambda: keras.metrics.F1Score(threshold=0.5, name="f1"),
    ],
)
def test_a_metric_of_keras_is_the_number_of_keras(metric, weighted):
    x, _ = data(40)
    y = (x[:, :1] > 0.2).astype("float32")
    w = np.random.default_rng(0).uniform(0.1, 1, 40).astype("float32")
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
    kind = "weighted_metrics" if weighted else "metrics"
    make = metric if callable(metric) else lambda: metric
    model = compiled(net, "binary_crossentropy", **{kind: [make()]})
    mine = [model.evaluate(x, y, 7, sample_weight=w, verbose=0, return_dict=True) for _ in range(2)]
    net.compile("sgd", "binary_crossentropy", **{kind: [make()]})
    theirs = net.evaluate(x, y, batch_size=7, sample_weight=w, verbose=0, return_dict=True)
    (name,) = set(theirs) - {"loss"}
    expected = np.mean(theirs[name])
    assert mine[0][name] == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    # The state is reset for every pass.
    assert mine[0] == mine[1]


def test_a_metric_with_several_thresholds_has_no_one_number():
    # Its values would stand beside the classes 0 and 1, and their mean is nobody's recall.
    with pytest.raises(errors.InputError, match=r"one threshold, received \[0\.2, 0\.8\]"):
        ll.metrics.get(keras.metrics.Recall(thresholds=[0.2, 0.8]))
    assert ll.metrics.get(keras.metrics.Precision(thresholds=[0.2], name="p")).name == "p"


class Hits(keras.metrics.Metric):
    def __init__(self):
        super().__init__(name="hits")
        self.hits = self.add_weight(name="hits", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.hits.assign_add(keras.ops.sum(keras.ops.cast((y_pred > 0.5) == (y_true > 0.5), "float32")))

    def result(self):
        return self.hits


class HitsTwice(Hits):
    def result(self):
        return {"once": self.hits, "twice": 2 * self.hits}


def test_a_metric_may_return_its_variable_but_only_one_number():
    x, _ = data(40)
    y = (x[:, :1] > 0.2).astype("float32")
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
    mine = compiled(net, "binary_crossentropy", metrics=[Hits()]).evaluate(x, y, 7, verbose=0, return_dict=True)
    assert mine["hits"] == ((net.predict(x, verbose=0) > 0.5) == (y > 0.5)).sum()
    with pytest.raises(errors.InputTypeError, match=r"hits: expected a scalar.*\['once', 'twice'\].*a metric for each"):
        compiled(net, "binary_crossentropy", metrics=[HitsTwice()]).evaluate(x, y, verbose=0)


def test_a_mask_counts_in_every_metric():
    """The exact difference: Keras ignores the mask in AUC and the like; here masked entries have weight 0."""
    i = keras.Input((5,), dtype="int32")
    net = keras.Model(i, layers.Dense(1, activation="sigmoid")(layers.Embedding(6, 4, mask_zero=True)(i)))
    x, y = sequences()
    y = (y[..., :1] > 0).astype("float32")
    model = compiled(
        net, "binary_crossentropy", metrics=[keras.metrics.Precision(name="p"), keras.metrics.BinaryAccuracy(name="a")]
    )
    mine = model.evaluate(x, y, verbose=0, return_dict=True)
    right, inside = net.predict(x, verbose=0) > 0.5, (x != 0)[..., None]
    hit = right & (y > 0.5)
    precision = lambda m: (hit & m).sum() / max((right & m).sum(), 1)  # noqa: E731
    assert mine["p"] == pytest.approx(precision(inside), abs=1e-6)
    assert mine["a"] == pytest.approx((right == (y > 0.5))[inside].mean(), abs=1e-6)
    net.compile(
        "sgd",
        "binary_crossentropy",
        metrics=[keras.metrics.Precision(name="p"), keras.metrics.BinaryAccuracy(name="a")],
    )
    theirs = net.evaluate(x, y, verbose=0, return_dict=True)
    assert theirs["p"] == pytest.approx(precision(True), abs=1e-6)
    assert theirs["a"] == pytest.approx(mine["a"], abs=1e-6)


# --- optimizers ----------------------------------------------------------------------------------------------------


def net_of_one():
    return keras.Sequential([keras.Input((4,)), layers.Dense(1)])


def test_a_learning_rate_is_set_on_either_side():
    x, y = data()
    own = keras.optimizers.SGD(0.5, momentum=0.5)
    model = compiled(net_of_one(), optimizer=own)
    fit(model, x, y, epochs=2, callbacks=ll.callbacks.LearningRateScheduler(lambda epoch: 0.25 / (epoch + 1)))
    assert float(own.learning_rate) == 0.125
    own.learning_rate = 0.0
    before = model.net.get_weights()
    own.momentum = 0.0
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(before[0], model.net.get_weights()[0])
    scheduled = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))
    model = compiled(net_of_one(), optimizer=scheduled)
    with pytest.raises(errors.InputError, match="schedule"):
        fit(model, x, y, callbacks=ll.callbacks.LearningRateScheduler(lambda epoch: 0.25))


class Finishes(keras.optimizers.SGD):
    def finalize_variable_values(self, var_list):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: keras.optimizers.Adam(use_ema=True), "averages the weights"),
        (lambda: keras.optimizers.Adam(gradient_accumulation_steps=2), "accumulates"),
        (lambda: keras.optimizers.Adam(loss_scale_factor=8.0), "scales the loss"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "scales the loss"),
        (lambda: Finishes(0.1), "when training ends"),
    ],
)
def test_optimizers_that_are_more_than_a_step_are_refused(make, reason):
    with pytest.raises(errors.InputError, match=reason):
        compiled(net_of_one(), optimizer=make())


def test_an_optimizer_of_another_model_is_refused():
    own = keras.optimizers.Adam()
    compiled(net_of_one(), optimizer=own)
    with pytest.raises(errors.InputError, match="other variables"):
        compiled(net_of_one(), optimizer=own)
    with pytest.raises(errors.UnknownNameError, match="adem"):
        compiled(net_of_one(), optimizer="adem")


def test_the_state_of_an_applied_optimizer_goes_into_another():
    x, y = data()
    one = compiled(net_of_one(), optimizer=keras.optimizers.RMSprop(0.1, momentum=0.9))
    fit(one, x, y, epochs=2)
    two = compiled(net_of_one(), optimizer=keras.optimizers.RMSprop(0.1, momentum=0.9))
    two.net.set_weights(one.net.get_weights())
    two.optimizer.load_state_dict(one.optimizer.state_dict())
    for model in (one, two):
        fit(model, x, y, epochs=2)
    np.testing.assert_allclose(one.net.get_weights()[0], two.net.get_weights()[0], rtol=1e-6)


def test_a_keras_optimizer_trains_the_torch_part_of_a_nested_module():
    net = Nested()
    x, y = data()
    model = compiled(net, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    model.predict(x)
    before = net.torch.weight.detach().clone()
    fit(model, x, y)
    assert not torch.equal(before, net.torch.weight)


# --- compiled models -----------------------------------------------------------------------------------------------


def test_a_compiled_model_is_taken_over():
    i = keras.Input((4,))
    h = layers.Dense(4, activation="relu")(i)
    net = keras.Model(i, [layers.Dense(1, name="price")(h), layers.Dense(3, activation="softmax", name="kind")(h)])
    x, y = data()
    kinds = x[:, :3].argmax(1)
    net.compile(
        keras.optimizers.Adam(0.05),
        {"price": keras.losses.Huber(0.5), "kind": "crossentropy"},
        loss_weights={"price": 0.5, "kind": 2.0},
        metrics={"kind": ["accuracy"]},
        weighted_metrics={"price": ["mae"]},
    )
    with pytest.raises(errors.InputError, match=r"targets=y"):
        ll.Model.from_compiled(net)
    model = ll.Model.from_compiled(net, targets=[y, kinds])
    assert model.optimizer.keras is net.optimizer
    mine = model.evaluate(x, [y, kinds], verbose=0, return_dict=True)
    theirs = net.evaluate(x, [y, kinds], verbose=0, return_dict=True)
    assert mine == pytest.approx(theirs, rel=1e-5)
    before = mine["loss"]
    fit(model, x, [y, kinds], epochs=5)
    assert model.evaluate(x, [y, kinds], verbose=0, return_dict=True)["loss"] < before
    assert int(net.optimizer.iterations) == 15


def test_training_goes_on_where_keras_left_off():
    """The optimizer of a compiled model comes with its state: momentum, steps, rate."""
    x, y = data()
    one, two = net_of_one(), net_of_one()
    two.set_weights(one.get_weights())
    for net in (one, two):
        net.compile(keras.optimizers.Adam(0.05), "mse")
        net.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    one.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    fit(ll.Model.from_compiled(two), x, y, epochs=2)
    np.testing.assert_allclose(one.get_weights()[0], two.get_weights()[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "targets", "term"),
    [
        ("crossentropy", np.zeros(3, int), "sparse_categorical_crossentropy"),
        ("CE", np.zeros((3, 1), int), "sparse_categorical_crossentropy"),
        ("crossentropy", np.eye(3), "categorical_crossentropy"),
        (["mse"], None, "mean_squared_error"),
        ({"out": "mse"}, None, "mean_squared_error"),
    ],
)
def test_the_loss_of_a_compiled_model_of_one_output(loss, targets, term):
    i = keras.Input((4,))
    net = keras.Model(i, layers.Dense(3, activation="softmax", name="out")(i))
    net.compile("sgd", loss)
    assert ll.Model.from_compiled(net, targets).objective.terms[0].name == term


def test_averaged_weights_of_a_compiled_model_are_those_of_keras():
    x, y = data()
    one, two = net_of_one(), net_of_one()
    two.set_weights(one.get_weights())
    for net in (one, two):
        net.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8), "mse")
    one.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    fit(ll.Model.from_compiled(two), x, y, epochs=2)
    np.testing.assert_allclose(one.get_weights()[0], two.get_weights()[0], rtol=1e-5)


class OwnStep(keras.Model):
    def train_step(self, data):
        return {}

    def call(self, x):
        return x


class OwnLoss(keras.Sequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(y_pred)


class Tracks(keras.Model):
    def __init__(self):
        super().__init__()
        self.tracker, self.head = keras.metrics.Mean(name="kl"), layers.Dense(1)

    def call(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (OwnStep, {"loss": "mse"}, "'train_step'"),
        (lambda: OwnLoss([layers.Dense(1)]), {"loss": "mse"}, "'compute_loss'"),
        (Tracks, {"loss": "mse"}, "'kl'"),
        (net_of_one, {}, "without a loss"),
        (net_of_one, {"loss": ["mse", "mae"]}, "trains the first only"),
        (
            net_of_one,
            {"loss": "mse", "optimizer": keras.optimizers.SGD(use_ema=True, ema_overwrite_frequency=3)},
            "ema_overwrite_frequency",
        ),
        (net_of_one, {"loss": "mse", "optimizer": keras.optimizers.SGD(gradient_accumulation_steps=4)}, "accumulates"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_by_name(make, arguments, match):
    net = make()
    net.compile(**{"optimizer": "sgd", **arguments})
    with pytest.raises(errors.InputError, match=match):
        ll.Model.from_compiled(net)


def test_only_compiled_models_of_keras_can_be_taken_over():
    with pytest.raises(errors.InputError, match="not compiled"):
        ll.Model.from_compiled(net_of_one())
    with pytest.raises(errors.InputError, match="Linear"):
        ll.Model.from_compiled(nn.Linear(1, 1))


# --- callbacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [None, 0.4, 0.0, 9.0])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_training_stops_where_keras_stops(baseline, patience):
    drawn = np.random.default_rng(0)
    for _ in range(40):
        values = drawn.choice(np.linspace(0.1, 1, 10), 12)
        options = {"patience": patience, "baseline": baseline, "mode": "min", "min_delta": 0.05, "start_from_epoch": 1}
        ends = []
        for callbacks in (keras.callbacks, ll.callbacks):
            stop, model = callbacks.EarlyStopping("val_loss", **options), types.SimpleNamespace(stop_training=False)
            stop.set_model(model)
            stop.on_train_begin({})
            epoch = 0
            while epoch < 12 and not model.stop_training:
                stop.on_epoch_end(epoch, {"loss": 0.0, "val_loss": values[epoch]})
                epoch += 1
            ends.append((epoch, stop.best_epoch or 0, model.stop_training))
        assert ends[0] == ends[1], values


def test_the_best_epoch_is_kept_also_where_none_reaches_the_baseline():
    x, y = data()
    model = compiled(net_of_one(), "mse")
    stop = ll.callbacks.EarlyStopping("loss", baseline=-1.0, patience=2, restore_best_weights=True)
    losses = fit(model, x, y, epochs=4, batch_size=12, callbacks=stop).history["loss"]
    assert (len(losses), stop.best_epoch) == (4, 3)


@pytest.mark.parametrize(
    "metric",
    [
        *("binary_crossentropy", "BinaryCrossentropy", "mape", "MAE", "msle", "hinge", "kl_divergence", "poisson"),
        *("accuracy", "auc", "cosine_similarity", "precision"),
    ],
)
def test_a_metric_is_watched_in_the_direction_that_keras_has(metric):
    x, y = data()
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
    net.compile("sgd", "binary_crossentropy", metrics=[metric])
    stop = keras.callbacks.EarlyStopping(f"val_{metric}")
    net.fit(x, (y > 0).astype("float32"), validation_split=0.5, verbose=0, callbacks=[stop])
    falls = stop.monitor_op is keras.ops.less
    watched = ll.callbacks.EarlyStopping(f"val_{metric}", restore_best_weights=True)
    model = compiled(net_of_one())
    watched.set_model(model)
    watched.on_train_begin({})
    watched.on_epoch_end(0, {f"val_{metric}": 0.5})
    watched.on_epoch_end(1, {f"val_{metric}": 0.4})
    assert (watched.best_epoch == 1) is falls


# --- where the numbers differ --------------------------------------------------------------------------------------


def test_an_empty_dice_is_1_in_keras_and_0_here():
    """The exact difference: Keras adds its constant to the divisor only, so nothing found of nothing is an error."""
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1, kernel_initializer="zeros", activation="relu")])
    x, y = data()
    net.compile("sgd", keras.losses.Dice())
    assert net.evaluate(x, np.zeros_like(y), verbose=0) == 1.0
    assert ll.Model.from_compiled(net).evaluate(x, np.zeros_like(y), verbose=0) == 0.0


def test_an_epoch_of_dice_differs_from_keras_by_the_division():
    """The exact difference: Keras means the ratios of the batches, lossledger divides the sums of the epoch."""
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
    x, y = data()
    y = (y > 0).astype("float32")
    p = net.predict(x, verbose=0).astype("float64")
    dice = lambda s: 1 - (2 * (p[s] * y[s]).sum() + 1e-7) / (p[s].sum() + y[s].sum() + 1e-7)  # noqa: E731
    net.compile("sgd", keras.losses.Dice())
    batches = [slice(0, 5), slice(5, 10), slice(10, 12)]
    expected = np.average([dice(s) for s in batches], weights=[5, 5, 2])
    assert net.evaluate(x, y, batch_size=5, verbose=0) == pytest.approx(expected, rel=1e-5)
    assert ll.Model.from_compiled(net).evaluate(x, y, 5, verbose=0) == pytest.approx(dice(slice(None)), rel=1e-5)


@pytest.mark.parametrize("case", ["logits", "columns", "ignored"])
def test_accuracy_by_name_reads_the_loss_and_in_keras_the_shapes(case):
    """The exact difference: which accuracy Keras takes, its threshold and its divisor do not depend on the loss."""
    x, _ = data(40)
    y = (x[:, :1] > 0.2).astype("float32") if case == "logits" else (x[:, :3] > 0.2).astype("float32")
    loss = keras.losses.BinaryCrossentropy(from_logits=case == "logits")
    width = y.shape[1]
    if case == "ignored":
        y, loss = np.arange(40) % 3 - 1, keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    activation = {"logits": None, "columns": "sigmoid", "ignored": "softmax"}[case]
    net = keras.Sequential([keras.Input((4,)), layers.Dense(width, activation=activation)])
    net.compile("sgd", loss, metrics=["accuracy"])
    theirs = net.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    mine = ll.Model.from_compiled(net).evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    p = net.predict(x, verbose=0)
    expected = {
        "logits": lambda: (((p > 0.5) == (y > 0.5)).mean(), ((p > 0) == (y > 0.5)).mean()),
        "columns": lambda: ((p.argmax(-1) == y.argmax(-1)).mean(), ((p > 0.5) == (y > 0.5)).mean()),
        "ignored": lambda: ((p.argmax(-1) == y).mean(), (p.argmax(-1) == y)[y >= 0].mean()),
    }[case]()
    assert (theirs, mine) == pytest.approx(expected, rel=1e-5)
    assert abs(theirs - mine) > 0.01


def test_class_weights_are_by_column_here_and_by_the_largest_target_in_keras():
    """The exact difference: Keras makes sample weights of them, which weighted metrics then count as well."""
    x, _ = data(12)
    y = (x[:, :3] > 0.2).astype("float32")
    given = {0: 1.0, 1: 3.0, 2: 0.5}
    net = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="sigmoid")])
    p = net.predict(x, verbose=0).astype("float64")
    entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    by_column = np.array(list(given.values()))
    by_largest = by_column[y.argmax(-1)]
    hits = ((p > 0.5) == (y > 0.5)).mean(-1)
    net.compile("sgd", "binary_crossentropy", weighted_metrics=["binary_accuracy"])
    mine = ll.Model.from_compiled(net).train_on_batch(x, y, class_weight=given)
    assert mine == pytest.approx([(entropy * by_column).mean(), hits.mean()], rel=1e-5)
    other = keras.models.clone_model(net)
    other.compile("sgd", "binary_crossentropy", weighted_metrics=["binary_accuracy"])
    q = other.predict(x, verbose=0).astype("float64")
    entropy = -(y * np.log(q) + (1 - y) * np.log(1 - q)).mean(-1)
    hits = ((q > 0.5) == (y > 0.5)).mean(-1)
    theirs = other.train_on_batch(x, y, class_weight=given)
    assert theirs == pytest.approx([(entropy * by_largest).mean(), np.average(hits, weights=by_largest)], rel=1e-5)


def test_the_epoch_of_a_sum_is_a_sum():
    """The exact difference: Keras means the sums of the batches by their samples."""
    net = net_of_one()
    x, y = data()
    net.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
    squares = ((net.predict(x, verbose=0) - y) ** 2)[:, 0]
    parts = [squares[:5].sum(), squares[5:10].sum(), squares[10:].sum()]
    assert net.evaluate(x, y, batch_size=5, verbose=0) == pytest.approx(np.average(parts, weights=[5, 5, 2]), rel=1e-5)
    assert ll.Model.from_compiled(net).evaluate(x, y, 5, verbose=0) == pytest.approx(squares.sum(), rel=1e-5)


def test_a_metric_that_is_one_number_a_batch_counts_by_samples():
    """The exact difference: Keras means the batches, whatever their sizes."""
    net = net_of_one()
    x, y = data()
    net.compile("sgd", "mse", metrics=[lambda t, p: keras.ops.max(keras.ops.abs(t - p))])
    error = abs(net.predict(x, verbose=0) - y)
    parts = [error[:5].max(), error[5:10].max(), error[10:].max()]
    mine = ll.Model.from_compiled(net).evaluate(x, y, 5, verbose=0)[1]
    assert net.evaluate(x, y, batch_size=5, verbose=0)[1] == pytest.approx(np.mean(parts), rel=1e-5)
    assert mine == pytest.approx(np.average(parts, weights=[5, 5, 2]), rel=1e-5)


def test_what_a_model_computes_in_a_step_of_its_own_is_not_called():
    """`from_compiled` refuses it; `Model` computes the loss that `compile` names."""
    net = OwnLoss([keras.Input((4,)), layers.Dense(1)])
    x, y = data()
    out = net.predict(x, verbose=0)
    net.compile("sgd", "mse")
    assert net.evaluate(x, y, verbose=0) == pytest.approx(out.mean(), rel=1e-5)
    assert compiled(net).evaluate(x, y, verbose=0) == pytest.approx(((out - y) ** 2).mean(), rel=1e-5)


def test_without_a_name_the_optimizer_is_adam_here_and_rmsprop_in_keras():
    net = net_of_one()
    net.compile(loss="mse")
    model = ll.Model(net_of_one())
    model.compile(loss="mse")
    assert isinstance(net.optimizer, keras.optimizers.RMSprop)
    assert isinstance(model.optimizer, torch.optim.Adam)


def test_a_dataset_of_keras_is_read_in_its_order_and_its_hooks_are_not_called():
    x, y = data()

    class Batches(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()
            self.read, self.ends = [], 0

        def __len__(self):
            return 4

        def __getitem__(self, index):
            self.read.append(index)
            return x[3 * index : 3 * index + 3], y[3 * index : 3 * index + 3]

        def on_epoch_end(self):
            self.ends += 1

    mine, theirs = Batches(), Batches()
    compiled(net_of_one()).fit(mine, epochs=3, verbose=0, shuffle=True)
    assert (mine.read[-12:], mine.ends) == ([0, 1, 2, 3] * 3, 0)
    net = net_of_one()
    net.compile("sgd", "mse")
    net.fit(theirs, epochs=3, verbose=0, shuffle=True)
    assert theirs.read[-12:] != [0, 1, 2, 3] * 3  # by chance in one of 13,824 seeds
    assert theirs.ends >= 3


def test_unmasked_epochs_of_uneven_batches_are_those_of_keras():
    net = net_of_one()
    x, y = data()
    net.compile("sgd", "mse")
    mine = ll.Model.from_compiled(net).evaluate(x, y, 5, verbose=0)
    assert mine == pytest.approx(net.evaluate(x, y, batch_size=5, verbose=0), rel=1e-5)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_autocast_and_float16_are_refused():
    with pytest.raises(errors.InputError, match="set_dtype_policy"):
        compiled(net_of_one(), precision="bfloat16")
    half = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    half.dtype_policy = "mixed_float16"
    with pytest.raises(errors.InputError, match="float16"):
        compiled(half)


def test_ddp_is_seen_through_and_a_sharded_model_is_refused():
    code = """
import os, torch, keras
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
import lossledger as ll

# DistributedDataParallel has neither losses nor a training flag for the layers of Keras inside it.
dense = keras.layers.Dense(2, activity_regularizer="l2")
net = keras.Sequential([keras.Input((4,)), dense, keras.layers.BatchNormalization()])
x = torch.randn(8, 4) + 3
model = ll.Model(torch.nn.parallel.DistributedDataParallel(net))
model.compile("sgd", "mse")
history = model.fit(x, x[:, :2], verbose=0).history
print("parallel:", len(history), bool((net.layers[1].moving_mean.value != 0).all()))

net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
try:
    ll.Model(net)
except ll.errors.InputError as error:
    print("refused:", "FSDP2" in str(error) and "train nothing" in str(error))
dist.destroy_process_group()
"""
    found = python(code, KERAS_BACKEND="torch")
    assert "parallel: 2 True" in found
    assert "refused: True" in found


def test_another_backend_is_refused(monkeypatch):
    """Models of Keras inherit from torch's module on the torch backend only."""
    kind = type("Functional", (), {"__module__": "keras.src.models.functional"})
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(errors.InputTypeError, match=r"Functional on the 'jax' backend.*KERAS_BACKEND=torch"):
        ll.Model(kind())


def test_objects_of_tf_keras_are_refused():
    kind = type("Sequential", (), {"__module__": "tf_keras.src.engine.sequential"})
    for call in (ll.Model, L.get, ll.metrics.get):
        with pytest.raises(errors.InputTypeError, match="tf_keras"):
            call(kind())


def test_keras_is_not_imported_for_a_torch_model():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "keras": raise ImportError("no keras here")
sys.meta_path.insert(0, Absent())
import torch, lossledger as ll
model = ll.Model(torch.nn.Linear(2, 1))
model.compile("adam", "mse", metrics=["mae"])
model.fit(torch.zeros(4, 2), torch.zeros(4, 1), verbose=0)
model.evaluate(torch.zeros(4, 2), torch.zeros(4, 1), verbose=0)
print("keras" in sys.modules)
"""
    assert python(code).strip() == "False"


class Cut(ll.callbacks.Callback):
    """Raises in the middle of the second epoch."""

    def on_train_batch_end(self, batch, logs):
        if batch == 1 and len(self.model.ledger.rows) > 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["adam", lambda: keras.optimizers.RMSprop(0.01)], ids=["name", "object"])
def test_a_run_goes_on_in_another_instance(tmp_path, optimizer):
    """Layers have other names there, and seeds, statistics and slots of the optimizer are those of the first."""

    def make():
        keras.utils.set_random_seed(1)
        inner = [layers.Dense(5), layers.BatchNormalization(), layers.Dropout(0.4, seed=3), layers.Dense(1)]
        made = optimizer if isinstance(optimizer, str) else optimizer()
        return compiled(keras.Sequential([keras.Input((4,)), *inner]), optimizer=made)

    x, y = data()
    options = {"shuffle": True, "seed": 0, "epochs": 3}
    whole = make()
    expected = fit(whole, x, y, run_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        often = [Cut(), ll.callbacks.BackupAndRestore(1)]
        fit(make(), x, y, run_dir=tmp_path / "cut", callbacks=often, **options)
    again = make()
    found = fit(
        again, x, y, run_dir=tmp_path / "cut", resume=True, callbacks=[ll.callbacks.BackupAndRestore(1)], **options
    )
    assert found.history == expected.history
    for mine, theirs in zip(again.net.get_weights(), whole.net.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
