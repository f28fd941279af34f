"""What a contender is: a few functions, made once for a workload and kept warm."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Run = Callable[[], Any]


class NotOfferedError(Exception):
    """The contender is not installed here, or cannot do this."""


class Clock:
    """When the first step of a run could begin, and when the last was over; told by callbacks of the contenders.

    Some prepare a call of `fit` for longer than our runs have steps to share it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.first = self.last = None

    def begin(self, *_: Any, **__: Any) -> None:
        self.first = time.perf_counter()

    def end(self, *_: Any, **__: Any) -> None:
        self.last = time.perf_counter()


CLOCK = Clock()


@dataclass(frozen=True)
class Task:
    """What a contender is asked for.

    Args:
        net: the kind of network.
        batch: samples of a batch.
        precision: `"float32"` or `"bfloat16"`.
        x, y: the samples of a run.
        weights: for Keras, by layer.
        options: of the contender.
        folder: an empty one of its own.
    """

    net: str
    batch: int
    precision: str
    x: np.ndarray
    y: np.ndarray
    weights: Mapping[str, list[np.ndarray]]
    folder: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Racer:
    """A contender with its network.

    Args:
        loss: of the first batch, from the weights as they are.
        train: prepares an epoch, and gives the function that is timed, from `CLOCK.begin` to `CLOCK.end` if it calls
            them, and as a whole.
        evaluate: the loss of all samples.
        predict: the outputs of all samples, as NumPy.
    """

    loss: Callable[[], float]
    train: Callable[[], Run]
    evaluate: Run | None = None
    predict: Run | None = None

    def prepare(self, what: str) -> Run:
        run = self.train() if what == "train" else getattr(self, what)
        if run is None:
            raise NotOfferedError(f"no {what}")
        return run
