"""What the processes of a training add up: one place for everything that is a sum over ranks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Processes that share the windows of a training, each with micro-batches of its own.

    Args:
        size: number of processes.
    """

    @property
    def size(self) -> int:
        """Number of processes."""

    def sum_(self, flat: Tensor) -> Tensor:
        """The sum over the processes of a flat float64 tensor: divisors and statistics, once a window."""


class OneProcess:
    """A training in this process alone."""

    size = 1

    def sum_(self, flat: Tensor) -> Tensor:
        """The tensor itself."""
        return flat
