"""Models of Keras on several ranks: the weights, history and ledger of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

import lossledger as ll
from spawning import run_ranks

pytest.importorskip("keras")
N = 23


def samples():
    g = np.random.default_rng(0)
    x = g.normal(size=(N, 5)).astype("float32")
    labels = g.integers(0, 3, size=N)
    box = g.normal(size=(N, 2)).astype("float32")
    return (
        x,
        {"kind": labels, "box": box},
        {"kind": g.random(N).astype("float32"), "box": g.random(N).astype("float32")},
    )


def two_heads():
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    h = layers.Dense(8, activation="tanh", kernel_regularizer="l2", name="hidden")(inputs)
    h = layers.ActivityRegularization(l2=0.1, name="small")(h)
    return keras.Model(inputs, {"kind": layers.Dense(3, name="kind")(h), "box": layers.Dense(2, name="box")(h)})


def sequential():
    """Built by its first batch, with a constraint."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    return keras.Sequential([layers.Dense(6, activation="relu", kernel_constraint="max_norm"), layers.Dense(3)])


def dropping():
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((5,)), layers.Dropout(0.5), layers.Dense(3)])


def trained(case, group, **options):
    import keras

    x, y, weight = samples()
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    settings = {"batch_size": 7, "epochs": 2, "seed": 5, "verbose": 0, "checks": "off", **options}
    if case == "two heads":
        model = ll.Model(two_heads(), process_group=group)
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            {"kind": sparse, "box": "mse"},
            loss_weights={"kind": 1.0, "box": 0.5},
            metrics={"kind": ["accuracy"], "box": ["mae"]},
        )
        held = (x[:9], {name: part[:9] for name, part in y.items()})
        history = model.fit(x, y, sample_weight=weight, validation_data=held, accumulate=2, **settings)
    else:
        model = ll.Model(sequential(), process_group=group)
        metrics = [keras.metrics.SparseCategoricalAccuracy(name="hits")] if case == "metric of Keras" else ["accuracy"]
        model.compile(keras.optimizers.Adam(0.01), sparse, metrics=metrics)
        history = model.fit(x, y["kind"], sample_weight=weight["kind"], validation_split=0.3, **settings)
    return model, history


def fits(rank, size, case, out):
    alone = [dist.new_group([r]) for r in range(size)][rank]
    found, history = trained(case, None)
    expected, whole = trained(case, alone)
    for name, value in expected._forward.state().items():
        np.testing.assert_allclose(
            found._forward.state()[name].detach(), value.detach(), rtol=2e-5, atol=2e-6, err_msg=name
        )
    assert list(history.history) == list(whole.history)
    for name, values in whole.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=2e-5, err_msg=name)
    assert len(history.ledger.rows) == len(whole.ledger.rows)
    for mine, theirs in zip(history.ledger.rows, whole.ledger.rows, strict=True):
        assert (mine.term, mine.group, mine.count, mine.role) == (theirs.term, theirs.group, theirs.count, theirs.role)
        np.testing.assert_allclose(mine.contribution, theirs.contribution, rtol=1e-4, atol=1e-7)


def draws(rank, size, out):
    """Layers of Keras draw numbers of their own on each rank, though all ranks seed alike."""
    model = ll.Model(dropping())
    model.compile("sgd", "mse")
    x, y, _ = samples()
    model.fit(x, y["box"][:, [0, 0, 1]], batch_size=8, seed=0, verbose=0, checks="off")
    everyone = [None] * size
    dist.all_gather_object(everyone, model.net.layers[0](torch.ones(50), training=True).tolist())
    assert everyone[0] != everyone[1]


CASES = ("two heads", "built by its data", "metric of Keras")


def everything(rank, size, out):
    # One start of the processes for all: importing Keras takes longer than the fits.
    for case in CASES:
        fits(rank, size, case, out)
    draws(rank, size, out)


def test_a_fit_on_two_ranks_is_that_of_one_process_and_dropout_differs_by_rank():
    folder, codes = run_ranks(everything, 2)
    assert codes == [0, 0], [path.read_text() for path in folder.glob("error-*")]
