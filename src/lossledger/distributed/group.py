"""What the processes of a training need of each other: a handful of sums and agreements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Group(Protocol):
    """Processes that share the windows of a training, each with micro-batches of its own.

    Every method is called by all of them, in the same order.
    """

    @property
    def size(self) -> int:
        """Number of processes."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    def sum_(self, flat: Tensor) -> Tensor:
        """The sum over the processes of a flat tensor, in its place; it stays on the device."""

    def agree(self, *numbers: int) -> list[list[int]]:
        """The whole numbers that each process gives, in the order of the ranks; on the host."""

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, on the host, in the order of the ranks."""

    def first(self, value: Any) -> Any:
        """What rank 0 gives, on the host of each process; what the others give is not looked at."""

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Fill the tensors of all processes with those of rank 0."""

    def fail(self, error: BaseException) -> None:
        """This process leaves with an error: the others hear of it in their next call."""


class OneProcess:
    """A training in this process alone."""

    size = 1
    rank = 0

    def sum_(self, flat: Tensor) -> Tensor:
        """The tensor itself."""
        return flat

    def agree(self, *numbers: int) -> list[list[int]]:
        """The numbers of the one process."""
        return [list(numbers)]

    def gather(self, value: Any) -> list[Any]:
        """The value of the one process."""
        return [value]

    def first(self, value: Any) -> Any:
        """The value of the one process."""
        return value

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to do."""

    def fail(self, error: BaseException) -> None:
        """Nobody to tell."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a process in one window.

    Args:
        group: the processes.
        counts: number of micro-batches of each, in the order of the ranks.
    """

    group: Group
    counts: tuple[int, ...]

    @classmethod
    def agreed(cls, group: Group, count: int) -> Share:
        """What every process has, asked of all."""
        return cls(group, tuple(n for (n,) in group.agree(count)))

    @property
    def leads(self) -> bool:
        """Whether this process is the first that has data: what enters once a window is counted there."""
        return self.group.rank == next((rank for rank, n in enumerate(self.counts) if n), 0)


ALONE = OneProcess()
LONE_SHARE = Share(ALONE, (1,))


def cut(start: int, stop: int, group: Group) -> tuple[int, int]:
    """The contiguous part of a process in the samples from `start` to `stop`; parts differ by one sample at most.

    >>> cut(0, 7, ALONE)
    (0, 7)
    """
    length = stop - start
    low, high = (start + length * rank // group.size for rank in (group.rank, group.rank + 1))
    return low, high


def bits(flags: Sequence[bool]) -> list[int]:
    """Flags as whole numbers of 62 bits each.

    >>> bits([True, False, True])
    [5]
    """
    chunks = [flags[i : i + 62] for i in range(0, len(flags), 62)]
    return [sum(1 << i for i, flag in enumerate(chunk) if flag) for chunk in chunks]


def any_of(rows: Sequence[Sequence[int]], length: int) -> list[bool]:
    """Which flags are set in any of the rows that `bits` made.

    >>> any_of([[1], [4]], 3)
    [True, False, True]
    """
    words = [0] * len(rows[0])
    for row in rows:
        words = [word | other for word, other in zip(words, row, strict=True)]
    return [bool(words[i // 62] >> (i % 62) & 1) for i in range(length)]
