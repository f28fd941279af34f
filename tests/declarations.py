"""One row a loss: how to make it, sample inputs, the oracle of its elements. The suites go through the rows."""

from __future__ import annotations

import torch

import lossledger as ll
import rows_beyond
import rows_keras
import rows_segmentation

L = ll.losses
ROWS = [*rows_keras.ROWS, *rows_segmentation.ROWS, *rows_beyond.ROWS]
NAMES = [row.name for row in ROWS]

REDUCTIONS = (
    "sum_over_batch_size",
    "sum",
    "mean_with_sample_weight",
    "sum_over_all_entries",
    "sum_over_nonzero_weights",
    "mean_per_sample",
)

# (κ, α, β) of each overlap loss, and the axes of its sums on [B, d, C].
OVERLAPS = {
    "dice": (lambda **k: L.Dice(**k), (2.0, 1.0, 1.0)),
    "jaccard": (lambda **k: L.Jaccard(**k), (1.0, 1.0, 1.0)),
    "tversky": (lambda **k: L.Tversky(alpha=0.3, beta=0.7, **k), (1.0, 0.3, 0.7)),
}
AXES = {"all": None, "batch-by-class": (0, 1), "sample-by-class": (1,), "sample": (1, 2)}


def tensors(*arrays):
    return [torch.as_tensor(a) for a in arrays]
