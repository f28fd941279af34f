"""The same model, batches and initial weights through keras.Model.fit and through lossledger: loss and weights, step
by step; and where the conventions differ, the exact difference."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import lossledger as ll
from lossledger import callbacks

# Keras's own: how its variables become NumPy arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

N, BATCH = 20, 6
# Float32 sums in another order: a few units in the last place of numbers near 1, grown over the steps.
WEIGHTS = {"rtol": 3e-5, "atol": 2e-6}


def rng():
    return np.random.default_rng(0)


# --- the models ----------------------------------------------------------------------------------------------------


def dense():
    x = keras.Input((5,))
    h = layers.Dense(8, activation="relu", kernel_regularizer="l2")(x)
    h = layers.BatchNormalization()(h)
    h = layers.Dense(4, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.7))(h)
    return keras.Model(x, layers.Dense(1)(h))


def dense_data():
    x = rng().normal(size=(N, 5)).astype("float32")
    return x, (x[:, :1] - x[:, 1:2] ** 2).astype("float32")


def unet(filters=(4, 8), classes=5, size=8):
    """A U-Net written with keras.layers: two convolutions a level, transposed convolutions on the way up."""

    def twice(h, width):
        for _ in range(2):
            h = layers.Conv2D(width, 3, padding="same", activation="relu")(h)
        return h

    x = h = keras.Input((size, size, 3))
    kept = []
    for width in filters[:-1]:
        h = twice(h, width)
        kept.append(h)
        h = layers.MaxPooling2D()(h)
    h = twice(h, filters[-1])
    for width, finer in zip(filters[-2::-1], kept[::-1], strict=True):
        h = layers.Conv2DTranspose(width, 2, strides=2)(h)
        h = twice(layers.Concatenate()([finer, h]), width)
    return keras.Model(x, layers.Conv2D(classes, 1, activation="sigmoid")(h))


def unet_data():
    x = rng().normal(size=(N, 8, 8, 3)).astype("float32")
    return x, (x.mean(-1, keepdims=True) > np.linspace(-0.8, 0.8, 5)).astype("float32")


def masked():
    x = keras.Input((7,), dtype="int32")
    h = layers.Embedding(11, 6, mask_zero=True)(x)
    h = layers.GRU(5, return_sequences=True)(h)
    return keras.Model(x, layers.Dense(3, activation="softmax")(h))


def masked_data():
    r = rng()
    x = r.integers(1, 11, size=(N, 7))
    x[np.arange(7) >= r.integers(2, 8, size=(N, 1))] = 0
    return x.astype("int32"), (x % 3).astype("int32")


def two_outputs():
    x = keras.Input((5,))
    h = layers.Dense(8, activation="relu", activity_regularizer="l2")(x)
    return keras.Model(x, [layers.Dense(1, name="price")(h), layers.Dense(3, activation="softmax", name="kind")(h)])


def two_data():
    x = rng().normal(size=(N, 5)).astype("float32")
    return x, {"price": x[:, :1].copy(), "kind": x[:, :3].argmax(1).astype("int32")}


CASES = {
    "dense": (dense, dense_data, {"loss": "mse"}),
    "unet": (unet, unet_data, {"loss": "binary_crossentropy"}),
    "masked": (masked, masked_data, {"loss": "sparse_categorical_crossentropy"}),
    "two outputs": (
        two_outputs,
        two_data,
        {
            "loss": {"price": "mse", "kind": "sparse_categorical_crossentropy"},
            "loss_weights": {"price": 0.3, "kind": 2.0},
        },
    ),
}

OPTIMIZERS = {
    "sgd": lambda: "sgd",
    "adam": lambda: "adam",
    "rmsprop": lambda: "rmsprop",
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adamw": lambda: "adamw",
    "adam object": lambda: keras.optimizers.Adam(0.01, amsgrad=True, clipnorm=0.1),
    "global_clipnorm, decay": lambda: keras.optimizers.SGD(0.05, weight_decay=0.1, global_clipnorm=0.2),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)),
    "centered": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "lion": lambda: "lion",
}


# --- both trainings ------------------------------------------------------------------------------------------------


def twins(make):
    keras.utils.set_random_seed(1)
    one, two = make(), make()
    two.set_weights(one.get_weights())
    return one, two


def size_of(batch):
    return min(BATCH, N - batch % (-(-N // BATCH)) * BATCH)


def by_keras(net, x, y, optimizer, given, epochs=2, **fit):
    """Loss of each batch and the weights after it, by keras.Model.fit."""
    losses, weights = [], []

    class Record(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.total = self.seen = 0.0

        def on_train_batch_end(self, batch, logs=None):
            # Keras logs the mean so far, weighted by batch size.
            seen = self.seen + size_of(batch)
            total = logs["loss"] * seen
            losses.append((total - self.total) / size_of(batch))
            self.total, self.seen = total, seen
            weights.append(net.get_weights())

    net.compile(optimizer=optimizer, **given)
    history = net.fit(x, y, BATCH, epochs, verbose=0, shuffle=False, callbacks=[Record()], **fit)
    return losses, weights, history.history


def by_lossledger(net, x, y, optimizer, given, epochs=2, **fit):
    losses, weights = [], []

    def record(batch, logs):
        losses.append(logs["last"])
        weights.append(net.get_weights())

    model = ll.Model(net)
    model.compile(optimizer=optimizer, **given)
    record = callbacks.LambdaCallback(on_train_batch_end=record)
    history = model.fit(x, y, BATCH, epochs, verbose=0, shuffle=False, callbacks=record, **fit)
    return losses, weights, history.history


def assert_same_steps(a, b):
    assert len(a[0]) == len(b[0]) > 0
    # The running mean of Keras is float32: a batch's loss comes back from it with its rounding times the steps.
    assert b[0] == pytest.approx(a[0], rel=2e-5, abs=1e-5)
    for mine, theirs in zip(b[1], a[1], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one, other, **WEIGHTS)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "momentum"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_keras(case, optimizer):
    make, data, given = CASES[case]
    one, two = twins(make)
    x, y = data()
    theirs = by_keras(one, x, y, OPTIMIZERS[optimizer](), given)
    start = [w.copy() for w in two.get_weights()]
    mine = by_lossledger(two, x, y, OPTIMIZERS[optimizer](), given)
    assert_same_steps(theirs, mine)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(start, mine[1][-1], strict=True))


@pytest.mark.parametrize(
    "optimizer", [name for name in OPTIMIZERS if name not in ("sgd", "adam", "rmsprop", "momentum")]
)
def test_an_optimizer_makes_the_steps_of_keras(optimizer):
    one, two = twins(dense)
    x, y = dense_data()
    given = {"loss": "mse"}
    theirs = by_keras(one, x, y, OPTIMIZERS[optimizer](), given)
    assert_same_steps(theirs, by_lossledger(two, x, y, OPTIMIZERS[optimizer](), given))


# --- weights, masks, epochs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "weight"), [("dense", "sample"), ("masked", "sample"), ("masked", "entry"), ("masked", "class")]
)
def test_weights_enter_the_steps_as_in_keras(case, weight):
    make, data, given = CASES[case]
    x, y = data()
    r = rng()
    options = {
        "sample": lambda: {"sample_weight": r.uniform(0.1, 2, N).astype("float32")},
        "entry": lambda: {"sample_weight": r.uniform(0.1, 2, (N, 7)).astype("float32")},
        "class": lambda: {"class_weight": {0: 0.5, 1: 2.0, 2: 1.0}},
    }[weight]()
    theirs = dict(options)
    if case == "masked" and weight == "sample":
        # Keras on torch cannot align one weight a sample with a mask by step: written out, it can.
        with pytest.raises(RuntimeError, match=r"must match the size|broadcast"):
            by_keras(make(), x, y, "sgd", given, **options)
        theirs["sample_weight"] = np.repeat(options["sample_weight"][:, None], 7, 1)
    if weight == "class":
        # Keras looks class weights up in the last axis of the labels, which is time here: written out again.
        theirs = {"sample_weight": np.array([0.5, 2.0, 1.0], "float32")[y]}
    one, two = twins(make)
    a = by_keras(one, x, y, "sgd", given, **theirs)
    assert_same_steps(a, by_lossledger(two, x, y, "sgd", given, **options))


def test_the_epoch_of_two_outputs_has_the_numbers_of_keras():
    make, data, given = CASES["two outputs"]
    one, two = twins(make)
    x, y = data()
    theirs = by_keras(one, x, y, "adam", given)[2]
    mine = by_lossledger(two, x, y, "adam", given)[2]
    assert set(theirs) < set(mine)
    for name, values in theirs.items():
        assert mine[name] == pytest.approx(values, rel=1e-5)
    # What Keras has in its loss only is a number of its own here.
    (added,) = set(mine) - set(theirs)
    assert added.endswith("/add_loss")
    total = [0.3 * p + 2 * k + a for p, k, a in zip(mine["price_loss"], mine["kind_loss"], mine[added], strict=True)]
    assert mine["loss"] == pytest.approx(total, rel=1e-6)


def test_an_epoch_with_regularizers_differs_from_keras_by_the_weight_of_the_last_batch():
    """The exact difference: Keras weighs the penalty of a step by the samples of its batch, lossledger counts steps."""
    one, two = twins(dense)
    x, y = dense_data()
    kernels = [one.get_weights()[0].astype("float64")]
    theirs = by_keras(one, x, y, keras.optimizers.SGD(0.3), {"loss": "mse"}, epochs=1)
    mine = by_lossledger(two, x, y, keras.optimizers.SGD(0.3), {"loss": "mse"}, epochs=1)
    kernels += [w[0].astype("float64") for w in theirs[1][:-1]]
    penalties = np.array([0.01 * (k**2).sum() for k in kernels])
    sizes = np.array([size_of(b) for b in range(len(penalties))])
    (name,) = [key for key in mine[2] if key.startswith("l2/")]
    assert mine[2][name] == pytest.approx([penalties.mean()], rel=1e-5)
    difference = np.average(penalties, weights=sizes) - penalties.mean()
    assert abs(difference) > 1e-4
    assert theirs[2]["loss"][0] - mine[2]["loss"][0] == pytest.approx(difference, rel=1e-2)


def test_masked_training_epochs_differ_from_keras_by_the_weight_of_a_batch():
    """The exact difference: the same steps; Keras means the batches by their samples, lossledger by what counted."""
    make, data, given = CASES["masked"]
    one, two = twins(make)
    x, y = data()
    theirs = by_keras(one, x, y, "sgd", given, epochs=1)
    mine = by_lossledger(two, x, y, "sgd", given, epochs=1)
    parts = range(len(mine[0]))
    counts = [int((x[b * BATCH : (b + 1) * BATCH] != 0).sum()) for b in parts]
    assert mine[2]["loss"] == pytest.approx([np.average(mine[0], weights=counts)], rel=1e-5)
    assert theirs[2]["loss"] == pytest.approx([np.average(mine[0], weights=[size_of(b) for b in parts])], rel=1e-5)
