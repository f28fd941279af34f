"""Tallies of every n steps of an epoch, for the rows of steps in the ledger; their sums are the epoch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lossledger.tally import Link, Tally
from lossledger.training.running import Running, added, described, rebuilt
from lossledger.window import merged

Closed = list[tuple[int, dict[str, Tally]]]


class Intervals:
    """Sums over `every` steps at a time; the end of an interval is a log point, where the host reads.

    Args:
        every: steps of an interval; the last one of an epoch may have fewer.
        device: where the sums live.

    Example:
        >>> intervals = Intervals(2, torch.device("cpu"))
        >>> for step in (1, 2, 3):
        ...     intervals.add(step, {"mse": Tally(torch.tensor(step), 1, 1, 1)})
        >>> [(step, tallies["mse"].value) for step, tallies in intervals.all(3)]
        [(2, 1.5), (3, 3.0)]
    """

    def __init__(self, every: int, device: torch.device) -> None:
        self._every, self._device = every, device
        self._open = Running(device)
        self._closed: Closed = []

    def add(self, step: int, tallies: dict[str, Tally]) -> None:
        """Add a step of the epoch, counted from 1."""
        self._open.add(tallies)
        if step % self._every == 0:
            self._closed.append((step, self._open.read()))
            self._open = Running(self._device)

    def all(self, steps: int) -> Closed:
        """Every interval by its last step, of which there are `steps` so far."""
        rest = [(steps, self._open.read())] if steps % self._every else []
        return [*self._closed, *rest]

    def state_dict(self) -> dict[str, Any]:
        """The sums, as plain values and tensors."""
        closed = [(step, {name: described(tally) for name, tally in part.items()}) for step, part in self._closed]
        return {"closed": closed, "open": self._open.state_dict()}

    def load_state_dict(self, state: dict[str, Any], links: Mapping[str, Link | None]) -> None:
        """Go on from sums that `state_dict` told."""
        self._open.load_state_dict(state["open"], links)
        self._closed = [
            (step, {name: rebuilt(told, links.get(name)) for name, told in part.items()})
            for step, part in state["closed"]
        ]


def added_up(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `Intervals.state_dict` would tell of all that several have told of, whose steps are the same."""
    closed = []
    for parts in zip(*(state["closed"] for state in states), strict=True):
        found: dict[str, Any] = {}
        for _, part in parts:
            for name, told in part.items():
                known = found.get(name)
                sums = (
                    told["sums"] if known is None else [a + b for a, b in zip(known["sums"], told["sums"], strict=True)]
                )
                found[name] = {"kind": told["kind"], "sums": sums}
        closed.append((parts[0][0], found))
    return {"closed": closed, "open": added([state["open"] for state in states])}


def of_all_ranks(parts: Iterable[Closed]) -> Closed:
    """The intervals of all ranks, whose steps are the same, added up."""
    return [(steps[0][0], merged(tallies for _, tallies in steps)) for steps in zip(*parts, strict=True)]
