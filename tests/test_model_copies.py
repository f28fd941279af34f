"""Copies of a `Model`: each trains its own weights with its own optimizer, and leaves the other alone."""

import copy
import pickle

import pytest
import torch

import lossledger as ll

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def fitted(**settings) -> ll.Model:
    torch.manual_seed(0)
    model = ll.Model(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)))
    model.compile("adam", "mse", metrics=["mae"], **settings)
    model.fit(X, Y, batch_size=8, verbose=0, seed=0)
    return model


def weights(model: ll.Model) -> list[torch.Tensor]:
    return [value.clone() for value in model.net.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "clip_norm": 1.0}])
def test_a_copy_trains_its_own_weights_as_the_original_would(copied, settings):
    model = fitted(**settings)
    again = copied(model)
    before = weights(model)
    history = again.fit(X, Y, batch_size=8, epochs=2, verbose=0, seed=1)
    assert same(before, weights(model))
    assert not same(before, weights(again))
    # The moments of the optimizer were copied too.
    assert model.fit(X, Y, batch_size=8, epochs=2, verbose=0, seed=1).history == history.history
    assert same(weights(model), weights(again))
    assert model.evaluate(X, Y, verbose=0) == again.evaluate(X, Y, verbose=0)


def test_a_copy_predicts_with_its_own_weights():
    model = fitted()
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.net[2].bias.add_(1.0)
    assert abs(again.predict(X) - model.predict(X) - 1.0).max() < 1e-5


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_model_of_keras_is_not_copied_half():
    keras = pytest.importorskip("keras")
    model = ll.Model(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
    model.compile("adam", "mse")
    with pytest.raises(ll.errors.InputError, match="clone_model"):
        copy.deepcopy(model)
    with pytest.raises(ll.errors.InputError, match="clone_model"):
        pickle.dumps(model)
