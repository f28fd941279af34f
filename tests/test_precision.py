"""bfloat16: the forward is torch's autocast, the loss is float32 of its outputs, weights and state stay float32."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossledger as ll

L = ll.losses
TARGETS = {
    "sparse": lambda n: torch.randint(0, 5, (n,)),
    "columns": lambda n: (torch.rand(n, 5) < 0.4).float(),
    "numbers": lambda n: torch.randn(n, 5),
}
# Ours, and the same written in plain torch, which also says the value in float64.
LOSSES = {
    "sparse": (L.SparseCategoricalCrossentropy(from_logits=True), F.cross_entropy),
    "columns": (L.BinaryCrossentropy(from_logits=True), F.binary_cross_entropy_with_logits),
    "numbers": (L.MeanSquaredError(), F.mse_loss),
}
each_loss = pytest.mark.parametrize("kind", LOSSES)


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(128, 5))


def batch(kind, n=24):
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8), TARGETS[kind](n)


def compiled(module, loss, precision="bfloat16", **options):
    model = ll.Model(module)
    model.compile(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), loss, precision=precision, **options)
    return model


def outputs(module, x):
    module.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return module(x)


def difference(a, b):
    return float((a - b).norm() / b.norm())


def gradients(module, x, y, loss, dtype):
    module.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        out = module(x)
    loss(out.float(), y).backward()
    found = torch.cat([p.grad.flatten() for p in module.parameters()])
    module.zero_grad()
    return found


@each_loss
def test_evaluate_is_the_float32_loss_of_the_outputs_of_autocast(kind):
    x, y = batch(kind)
    ours, plain = LOSSES[kind]
    model = compiled(net(), ours)
    out = outputs(model.net, x)
    assert out.dtype == torch.bfloat16
    exact = plain(out.double(), y.double() if y.is_floating_point() else y)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(float(exact), rel=2e-7)
    # A loss in bfloat16 would be another number: the test can tell.
    assert float(plain(out, y.bfloat16() if y.is_floating_point() else y)) != pytest.approx(float(exact), rel=1e-5)


@each_loss
def test_a_step_has_the_gradient_of_autocast(kind):
    x, y = batch(kind)
    ours, plain = LOSSES[kind]
    model = compiled(net(), ours)
    before = torch.cat([p.detach().clone().flatten() for p in model.net.parameters()])
    model.fit(x, y, batch_size=24, shuffle=False, verbose=0, checks="off")
    after = torch.cat([p.detach().flatten() for p in model.net.parameters()])
    made = (before - after) / 0.5
    full, half = (gradients(net(), x, y, plain, dtype) for dtype in (None, torch.bfloat16))
    # Rounding of the gradient of the outputs to bfloat16 is all that may differ; float32 is ten times as far.
    assert difference(made, half) < 4e-3
    assert difference(made, full) > 1.5 * difference(made, half)


@each_loss
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_gradients_and_state_stay_float32(kind, accumulate):
    x, y = batch(kind)
    seen = set()

    class Look(ll.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            state = self.model.optimizer.state.values()
            seen.update(v.dtype for s in state for v in s.values() if isinstance(v, torch.Tensor))

    model = compiled(net(), LOSSES[kind][0])
    grads = set()
    for parameter in model.net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: grads.add(p.grad.dtype))
    history = model.fit(x, y, batch_size=6, accumulate=accumulate, epochs=4, verbose=0, seed=0, callbacks=[Look()])
    assert {p.dtype for p in model.net.parameters()} == grads == seen == {torch.float32}
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_a_loss_of_your_own_sees_float32_and_another_dtype_if_it_asks():
    seen = []

    class Mine(L.Loss):
        def call(self, y_true, y_pred):
            seen.append((y_true.dtype, y_pred.dtype))
            return (y_true - y_pred).square().mean(-1)

    x, y = batch("numbers")
    model = compiled(net(), Mine())
    model.fit(x, y, verbose=0, validation_split=0.25, checks="off")
    assert set(seen) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("batch_size", [24, 7])
def test_predict_is_autocast_too_and_returns_float32(batch_size):
    x, _ = batch("numbers")
    model = compiled(net(), "mse")
    found = model.predict(x, batch_size=batch_size)
    assert found.dtype == np.float32
    expected = torch.cat([outputs(model.net, part) for part in x.split(batch_size)])
    np.testing.assert_array_equal(found, expected.float().numpy())
    np.testing.assert_array_equal(model.predict_on_batch(x), outputs(model.net, x).float().numpy())
    # Compiled otherwise, the same weights predict in float32.
    again = compiled(model.net, "mse", "float32").predict(x)
    assert 1e-4 < np.abs(again - found).max() < 0.1


def test_metrics_and_the_ledger_are_of_the_same_outputs():
    x, y = batch("sparse")
    loss = L.SparseCategoricalCrossentropy(from_logits=True)
    model = compiled(net(), loss, metrics=["accuracy"])
    numbers = model.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)
    out = torch.cat([outputs(model.net, part) for part in x.split(5)])
    assert numbers["accuracy"] == pytest.approx(float((out.argmax(1) == y).double().mean()))
    rows = model.ledger.table(by=["class"])
    assert sum(row["contribution"] for row in rows) == pytest.approx(numbers["loss"], rel=1e-6)
    assert numbers["loss"] == pytest.approx(float(F.cross_entropy(out.double(), y)), rel=2e-7)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_mixed_policy_of_keras_gives_float32_losses_of_its_own_outputs():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(5)]
    for layer in layers:
        layer.dtype_policy = "mixed_bfloat16"
    made = keras.Sequential([keras.Input((8,)), *layers])
    x, y = torch.randn(24, 8), torch.randint(0, 5, (24,))
    model = ll.Model(made)
    model.compile("adam", L.SparseCategoricalCrossentropy(from_logits=True))
    with torch.no_grad():
        out = made(x, training=False)
    assert out.dtype == torch.bfloat16
    assert model.evaluate(x, y, verbose=0) == pytest.approx(float(F.cross_entropy(out.double(), y)), rel=2e-7)
    np.testing.assert_array_equal(model.predict(x), out.float().numpy())
    losses = model.fit(x, y, epochs=3, batch_size=8, verbose=0, seed=0).history["loss"]
    assert losses[-1] < losses[0]
    assert {v.value.dtype for v in made.trainable_variables} == {torch.float32}
