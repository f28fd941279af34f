"""What `fit` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lossledger.ledger import Ledger


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """What `fit` returns.

    Args:
        history: numbers by name, one an epoch: `loss`, metrics, and `val_…`.
        epoch: the epochs, from 0.
        ledger: what each loss is made of.
        params: `epochs`, `steps`, `seed`.
    """

    history: dict[str, list[float]]
    epoch: list[int]
    ledger: Ledger
    params: dict[str, Any] = field(default_factory=dict)


def as_keras(logs: dict[str, float], by_name: bool) -> Any:
    """What `evaluate` and the single-batch methods return: one number, a list of them, or all by name."""
    values = list(logs.values())
    return logs if by_name else values[0] if len(values) == 1 else values
