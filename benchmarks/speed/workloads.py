"""The data of each workload, in NumPy alone: some contenders run where there is no torch.

Every contender trains the same module on the same arrays, in batches of the same size, with Adam at its defaults and a
learning rate of 0.001.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray]

CLASSES, PIXELS, PICTURES = 10, 784, 60_000
VOCABULARY, LENGTH, SHORTEST = 2_000, 64, 8
PADDING = 0


@dataclass(frozen=True)
class Workload:
    """What every contender is given.

    Args:
        name: on the command line.
        title: in the tables.
        net: the kind of network, and of its loss: `"dense"`, `"mlp"`, `"unet"` or `"language"`.
        batch: samples of a batch.
        steps: of a run, which is one call of `fit` for one epoch.
        rows: makes the arrays `x` and `y` of as many samples; y holds 0 where a word is padding.
        milliseconds: of a step, roughly, for the estimate before anything was measured.
        precisions: in which it is trained.
        whole: whether a call of `fit` is measured, and not its steps alone.
    """

    name: str
    title: str
    net: str
    batch: int
    steps: int
    rows: Callable[[int], Arrays]
    milliseconds: float
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    whole: bool = False

    def arrays(self, steps: int | None = None) -> Arrays:
        """The samples of a run; the last batch of all pictures is smaller than the others."""
        count = (steps or self.steps) * self.batch
        return self.rows(min(count, PICTURES) if self.net == "mlp" else count)


def dense(count: int) -> Arrays:
    x = np.random.default_rng(0).random((count, 3), dtype=np.float32)
    return {"x": x, "y": 10 * x + np.float32(2.5)}


def pictures(count: int) -> Arrays:
    """Noise around one picture a class."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, count)
    means = rng.random((CLASSES, PIXELS), dtype=np.float32)
    return {"x": means[y] + rng.standard_normal((count, PIXELS), dtype=np.float32), "y": y}


def scenes(size: int) -> Callable[[int], Arrays]:
    """Scenes of the demo, of 64 × 64 pixels; larger ones are those enlarged."""

    def rows(count: int) -> Arrays:
        from lossledger.demo.scenes import make_scenes

        made, times = make_scenes(count, min(size, 64)), max(size // 64, 1)
        return {
            "x": made.images.repeat(times, axis=2).repeat(times, axis=3),
            "y": made.masks.repeat(times, axis=1).repeat(times, axis=2),
        }

    return rows


def sentences(count: int) -> Arrays:
    """Sentences of 8 to 64 words, each word to be told from the one before it; the rest is padding."""
    rng = np.random.default_rng(0)
    words = np.zeros((count, LENGTH + 1), dtype=np.int64)
    words[:, 0] = rng.integers(1, VOCABULARY, count)
    for place in range(1, LENGTH + 1):
        words[:, place] = 1 + (words[:, place - 1] * 7 + rng.integers(0, 4, count)) % (VOCABULARY - 1)
    lengths = rng.integers(SHORTEST, LENGTH + 1, count)
    words[np.arange(LENGTH + 1) > lengths[:, None]] = PADDING
    # A sentence whose last word has no next one: neither is there.
    x, y = words[:, :-1].copy(), words[:, 1:]
    x[y == PADDING] = PADDING
    return {"x": x, "y": np.ascontiguousarray(y)}


def unet(size: int, steps: int, milliseconds: float) -> Workload:
    title = f"U-Net of the demo, 16 × {size} × {size}, binary cross-entropy of 5 masks"
    return Workload(f"unet-{size}", title, "unet", 16, steps, scenes(size), milliseconds)


_ALL = (
    Workload("dense", "Dense(3), 32 × 3, mean squared error", "dense", 32, 1000, dense, 0.9, ("float32",)),
    Workload("call", "One step of Dense(3): what a call of fit costs", "dense", 32, 1, dense, 40, ("float32",), True),
    Workload("mlp", "MLP 784–512–512–10, 60,000 samples, batches of 128", "mlp", 128, 469, pictures, 5),
    unet(64, 32, 60),
    unet(128, 12, 220),
    unet(256, 4, 850),
    Workload(
        "language",
        "Language model, 16 × 64 words of 2,000, sentences of 8 to 64, two layers of 128",
        *("language", 16, 24, sentences, 60),
    ),
)
WORKLOADS: Mapping[str, Workload] = {workload.name: workload for workload in _ALL}
