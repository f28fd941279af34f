"""Models of which nothing is trained are compiled and evaluated; training them is the error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lossledger as ll
import pretended
from lossledger.errors import EmptyDataError

X = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(10, 3)
Y = X.sum(1, keepdim=True)


class Filter(nn.Module):
    """A fixed filter: a buffer, and no parameter."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.register_buffer("kernel", torch.tensor([[1.0], [2.0], [0.5]], dtype=dtype))

    def forward(self, x):
        return x @ self.kernel


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


def by_hand(net):
    with torch.no_grad():
        return float((net(X) - Y).square().mean())


NETS = {"frozen": lambda: linear().requires_grad_(False), "buffer": Filter}
OPTIMIZERS = {"name": "adam", "function": lambda parameters: torch.optim.SGD(parameters, 0.1)}


@pytest.mark.parametrize("options", [{}, {"jit": True, "clip_norm": 1.0, "ema": 0.9}], ids=["plain", "options"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_a_model_without_trainable_parameters_is_evaluated(make, optimizer, options):
    net = make()
    model = ll.Model(net)
    model.compile(optimizer, "mse", metrics=["mae"], **options)
    loss, error = model.evaluate(X.numpy(), Y.numpy(), batch_size=4, verbose=0)
    assert loss == pytest.approx(by_hand(net), rel=1e-12)
    assert error > 0
    assert model.evaluate([(X[:7], Y[:7]), (X[7:], Y[7:])], verbose=0)[0] == pytest.approx(loss, rel=1e-12)
    assert model.test_on_batch(X, Y)[0] == pytest.approx(loss, rel=1e-12)
    assert model.predict(X.numpy()).shape == (10, 1)
    assert model.ledger.info["parameters"] == 0


def test_a_module_without_any_tensor_is_evaluated():
    model = ll.Model(nn.Flatten())
    model.compile("sgd", "mse")
    assert model.evaluate(X.numpy().reshape(10, 3, 1), torch.zeros(10, 3), verbose=0) == pytest.approx(
        float(X.square().mean()), rel=1e-6
    )


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("call", ["fit", "train_on_batch"])
def test_training_it_is_refused(make, call, tmp_path):
    net = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = ll.Model(net)
    model.compile("adam", "mse")
    options = {"verbose": 0, "run_dir": tmp_path / "run", "resume": True} if call == "fit" else {}
    with pytest.raises(EmptyDataError, match="no trainable parameter; expected at least one with requires_grad=True"):
        getattr(model, call)(X, Y, **options)
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_frozen_after_training_it_gives_the_numbers_of_before():
    net = linear()
    model = ll.Model(net)
    model.compile("adam", "mse")
    model.fit(X, Y, epochs=2, verbose=0, seed=0)
    trained = model.evaluate(X, Y, verbose=0)
    net.requires_grad_(False)
    model.compile("adam", "mse")
    assert model.evaluate(X, Y, verbose=0) == trained


def test_thawed_it_trains_once_it_is_compiled_again():
    net = linear().requires_grad_(False)
    model = ll.Model(net)
    model.compile("adam", "mse")
    net.requires_grad_(True)
    with pytest.raises(EmptyDataError, match="call compile again"):
        model.fit(X, Y, verbose=0)
    model.compile("adam", "mse")
    before = model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, epochs=2, verbose=0, seed=0)
    assert model.evaluate(X, Y, verbose=0) < before


def test_an_optimizer_object_of_a_frozen_model_stays():
    net = linear()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = ll.Model(net.requires_grad_(False))
    model.compile(optimizer, "mse")
    assert model.optimizer is optimizer
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(by_hand(net), rel=1e-12)


def test_a_loss_that_is_not_finite_is_explained():
    """A second forward is made, on the device of the model."""
    model = ll.Model(Filter())
    model.compile("sgd", ll.losses.BinaryCrossentropy())
    with pytest.raises(ll.errors.InputError, match="probabilities"):
        model.evaluate(X, (Y > 0).double(), verbose=0)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_it_is_evaluated_where_it_lies(make):
    """Device and dtype are those of the buffers where there is no parameter."""
    with pretended.device():
        model = ll.Model(pretended.placed(make()))
        model.compile("adam", "mse")
        assert model.evaluate(X.numpy(), Y.numpy(), batch_size=4, verbose=0) == pytest.approx(
            by_hand(make()), rel=1e-12
        )


@pytest.mark.parametrize("optimizer", ["adam", "lion"])
def test_a_frozen_model_of_keras_is_evaluated(optimizer):
    keras = pytest.importorskip("keras")
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    net.trainable = False
    model = ll.Model(net)
    model.compile(optimizer, "mse")
    x, y = X.float().numpy(), Y.float().numpy()
    expected = float(((model.predict(x) - y) ** 2).mean())
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(EmptyDataError, match="no trainable"):
        model.fit(x, y, verbose=0)
