"""What a row of the loss suites declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Declaration:
    """A loss under test.

    Args:
        name: of the row.
        make: makes the loss from a reduction.
        inputs: from a generator and entry shape (B, d…) to (y_true, y_pred) in float64.
        elements: oracle of the elements, [B, d…, C] (C = 1 where the loss has no class axis).
        closed: whether the gradient has a closed form of its own.
        kinds: groups that the tally can divide into.
    """

    name: str
    make: Callable[..., Any]
    inputs: Callable[[np.random.Generator, tuple[int, ...]], tuple[np.ndarray, np.ndarray]]
    elements: Callable[[np.ndarray, np.ndarray], np.ndarray]
    closed: bool = True
    kinds: tuple[str, ...] = ("class", "sample", "column")
    options: dict[str, Any] = field(default_factory=dict)
