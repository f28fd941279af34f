"""One row a loss: how to make it, sample inputs, its oracle, its mistakes. The suites go through the rows.

`ROWS` are losses made of elements, on which all laws run; `COUPLED` are those whose value is no mean of elements of
their own. `MATRIX` is both: what every loss of the library must bear.
"""

from __future__ import annotations

import functools

import inputs
import lossledger as ll
import oracles
import rows_beyond
import rows_coupled
import rows_keras
import rows_lovasz
import rows_overlap
import rows_segmentation
from declaration import Declaration

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


def overlap(name, axis):
    """The row of an overlap loss over some axes, with weights and masks in its sums."""
    make, coefficients = OVERLAPS[name]
    return Declaration(
        f"{name}-{axis}",
        functools.partial(make, axis=AXES[axis]),
        inputs.binary_probabilities,
        None,
        kinds=("class", "sample") if axis != "sample" else ("sample",),
        whole=lambda y, p, w, m: oracles.overlap(
            y, p, *coefficients, AXES[axis], weight=w[..., None], mask=m[..., None]
        ).mean(),
        refused=(("smooth", 0), ("from_logits", True), ("reduction", "abc")),
    )


def grouped(row):
    """The row of an overlap loss with its policies, whose suite of its own is `test_overlap_laws.py`."""
    kinds = ("class", "sample") if "class" in row.grouping or row.ratio else ("sample",)
    return Declaration(row.name, row.make, inputs.binary_probabilities, None, kinds=kinds, whole=row.value)


COUPLED = [
    *(overlap(name, axis) for name in OVERLAPS for axis in AXES),
    *(grouped(row) for row in rows_overlap.ROWS if not row.name.endswith(rows_overlap.ALONE)),
    *rows_lovasz.ROWS,
    *rows_coupled.ROWS,
]
MATRIX = [*ROWS, *COUPLED]
