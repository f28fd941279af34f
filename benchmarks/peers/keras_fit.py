"""Keras 3 on torch: `fit` and `evaluate`, `gradient_accumulation_steps` of the optimizer, the mask of an Embedding.

Keras's `fit` on torch does not divide data over ranks in this version.
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch

from peers.common import (
    ACCUMULATE,
    COUNT,
    LABELS,
    SIZE,
    WORDS,
    Reported,
    collate,
    dice_loss,
    flat,
    pictures,
    sequences,
    stacked,
    steps,
    token_loss,
)

PACKAGES = ("keras", "torch")
TASKS = ("tokens", "dice")
keras.config.disable_interactive_logging()


class Recorder(keras.optimizers.SGD):
    """SGD that keeps the gradients of each update."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self.__dict__.setdefault("seen", []).append(flat(grads))
        return super()._backend_update_step(grads, trainable_variables, learning_rate)


def tokens(seed):
    batch = collate(sequences(seed))
    keras.utils.set_random_seed(seed)
    net = keras.Sequential(
        [
            # As large as those of torch, so that the losses of sentences differ before any training.
            keras.layers.Embedding(WORDS, 16, keras.initializers.RandomNormal(0.0, 1.0), mask_zero=True),
            keras.layers.Dense(32, activation="gelu"),
            keras.layers.Dense(LABELS),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return net, loss, batch["input_ids"].numpy(), batch["labels"].clamp(min=0).numpy(), batch["labels"]


def dice(seed):
    images, masks = stacked(pictures(seed))
    keras.utils.set_random_seed(seed)
    net = keras.Sequential(
        [
            keras.layers.Conv2D(8, 3, padding="same", activation="relu", data_format="channels_first"),
            keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid", data_format="channels_first"),
        ]
    )
    return net, keras.losses.Dice(), images.numpy(), masks.numpy(), masks


def report(name, seed):
    """What Keras says, and what is right, which the same weights in float64 say."""
    net, loss, x, y, targets = {"tokens": tokens, "dice": dice}[name](seed)
    recorder = Recorder(0.0, gradient_accumulation_steps=ACCUMULATE)
    net.compile(recorder, loss)
    history = net.fit(x, y, batch_size=SIZE, epochs=1, shuffle=False, verbose=0)
    evaluated = net.evaluate(x, y, batch_size=SIZE, verbose=0)
    said = Reported(history.history["loss"][0], float(evaluated), recorder.seen)
    return said, right(name, net, torch.as_tensor(x), targets)


def right(name, net, x, targets):
    weights = [torch.as_tensor(w).double().requires_grad_() for w in net.get_weights()]

    def value(ids):
        if name == "tokens":
            words, first, bias, second, shift = weights
            hidden = torch.nn.functional.gelu(words[x[ids]] @ first + bias)
            return token_loss(hidden @ second + shift, targets[ids])
        first, bias, second, shift = (w.permute(3, 2, 0, 1) if w.ndim == 4 else w for w in weights)
        hidden = torch.relu(torch.nn.functional.conv2d(x[ids].double(), first, bias, padding=1))
        return dice_loss(torch.nn.functional.conv2d(hidden, second, shift, padding=1), targets[ids].double())

    found = []
    for ids in steps(SIZE * ACCUMULATE):
        found.append(flat(torch.autograd.grad(value(list(ids)), weights)))
    whole = float(value(list(range(COUNT))).detach())
    return Reported(whole, whole, found)
