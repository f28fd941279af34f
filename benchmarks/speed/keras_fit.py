"""Keras 3: `compile` and `fit` on NumPy arrays with the defaults, the policy `mixed_bfloat16`; images channels last.

The backend is that of KERAS_BACKEND.
"""

from __future__ import annotations

import keras
import numpy as np

from speed import keras_nets
from speed.racer import CLOCK, Racer, Task

PACKAGES = ("keras", {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow"}[keras.backend.backend()])


def make(task: Task) -> Racer:
    keras.config.set_dtype_policy("mixed_bfloat16" if task.precision == "bfloat16" else "float32")
    x = np.ascontiguousarray(task.x.transpose(0, 2, 3, 1)) if task.x.ndim == 4 else task.x
    net, y = keras_nets.make(task.net, x, task.weights), task.y
    clock = keras.callbacks.LambdaCallback(on_train_begin=CLOCK.begin, on_train_end=CLOCK.end)
    net.compile(keras.optimizers.Adam(1e-3), keras_nets.loss(task.net))

    def train() -> None:
        net.fit(x, y, batch_size=task.batch, verbose=0, callbacks=[clock])

    def evaluate() -> float:
        return net.evaluate(x, y, batch_size=task.batch, verbose=0)

    def predict() -> np.ndarray:
        return net.predict(x, batch_size=task.batch, verbose=0)

    def loss() -> float:
        return float(net.evaluate(x[: task.batch], y[: task.batch], batch_size=task.batch, verbose=0))

    return Racer(loss, lambda: train, evaluate, predict)
