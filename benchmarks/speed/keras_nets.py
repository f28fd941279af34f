"""The same networks as a Keras user writes them, on any backend; the channels last."""

from __future__ import annotations

import keras
from keras import layers, ops

from speed.workloads import CLASSES, LENGTH, PIXELS, VOCABULARY

FILTERS = (8, 16, 32, 64, 128)
WIDTH, HEADS, INNER, LAYERS = 128, 4, 512, 2
# Of torch.
EPSILON = 1e-5


def dense():
    return keras.Sequential([keras.Input((3,)), layers.Dense(3, name="head")])


def mlp():
    return keras.Sequential(
        [
            keras.Input((PIXELS,)),
            layers.Dense(512, activation="relu", name="dense-0"),
            layers.Dense(512, activation="relu", name="dense-1"),
            *head(layers.Dense(CLASSES, name="head")),
        ]
    )


def head(layer):
    """With its logits in float32, as the guide of mixed precision asks for."""
    mixed = keras.config.dtype_policy().name != "float32"
    return [layer, layers.Activation("linear", dtype="float32")] if mixed else [layer]


def convolutions(x, filters, name):
    for index in range(2):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"{name}-{index}")(x)
    return x


def unet(size):
    inputs = x = keras.Input((size, size, 3))
    kept = []
    for level, filters in enumerate(FILTERS):
        x = convolutions(x if level == 0 else layers.MaxPooling2D()(x), filters, f"down-{level}")
        kept.append(x)
    for level, (filters, finer) in enumerate(zip(FILTERS[-2::-1], kept[-2::-1], strict=True)):
        x = layers.Conv2DTranspose(filters, 2, strides=2, name=f"enlarge-{level}")(x)
        x = convolutions(layers.Concatenate()([finer, x]), filters, f"up-{level}")
    for layer in head(layers.Conv2D(5, 1, name="head")):
        x = layer(x)
    return keras.Model(inputs, x)


class Places(layers.Layer):
    """Adds an embedding of the place."""

    def __init__(self, **options):
        super().__init__(**options)
        self.supports_masking = True
        self.table = layers.Embedding(LENGTH, WIDTH)

    def build(self, shape):
        self.table.build((LENGTH,))

    def call(self, x):
        return x + self.table(ops.arange(LENGTH))


def language():
    inputs = keras.Input((LENGTH,), dtype="int32")
    # The mask goes with the words, through all layers to the loss.
    x = layers.Embedding(VOCABULARY, WIDTH, mask_zero=True, name="words")(inputs)
    x = Places(name="places")(x)
    for index in range(LAYERS):
        found = layers.LayerNormalization(epsilon=EPSILON, name=f"norm-a-{index}")(x)
        attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"attention-{index}")
        # Layers of their own, and no `+`, which would lose the mask.
        x = layers.Add()([x, attention(found, found, use_causal_mask=True)])
        found = layers.LayerNormalization(epsilon=EPSILON, name=f"norm-b-{index}")(x)
        found = layers.Dense(INNER, activation="relu", name=f"inner-{index}")(found)
        x = layers.Add()([x, layers.Dense(WIDTH, name=f"outer-{index}")(found)])
    for layer in head(layers.Dense(VOCABULARY, name="head")):
        x = layer(x)
    return keras.Model(inputs, x)


def loss(net):
    return {
        "dense": lambda: keras.losses.MeanSquaredError(),
        "mlp": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "unet": lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        "language": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }[net]()


def make(net, x, weights):
    """The network for such inputs, with the weights given by layer."""
    made = {"dense": dense, "mlp": mlp, "unet": lambda: unet(x.shape[1]), "language": language}[net]()
    given = {layer.name for layer in made.layers if layer.weights}
    if given != set(weights):
        raise ValueError(f"layers {sorted(given ^ set(weights))} are in one network and not in the other")
    for name, arrays in weights.items():
        made.get_layer(name).set_weights(arrays)
    return made
