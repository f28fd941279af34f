"""The sums of compiled steps: one row of numbers a step, whose places are known, added up row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lossledger.tally import Link, Tally
from lossledger.training.running import described, rebuilt


class UnfitError(Exception):
    """Why a step cannot be one compiled program, in words that end a sentence."""


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A tally without its sums: where each of them lies in a row, or the number that it is in every step.

    Args:
        name: of the term.
        kind: what does not add up.
        link: of the tally.
        slots: by sum its start in the row, its shape, and whether it is a whole number; or the number.
    """

    name: str
    kind: dict[str, Any]
    link: Link | None
    slots: tuple[tuple[int, tuple[int, ...], bool] | int | float, ...]

    def tally(self, row: Tensor, steps: int) -> Tally:
        """The tally of the sums of so many steps."""
        values: list[Any] = []
        for slot in self.slots:
            if isinstance(slot, tuple):
                start, shape, whole = slot
                part = row[start : start + prod(shape)].view(shape)
                values.append(part.long() if whole else part)
            else:
                values.append(slot * steps)
        return rebuilt({"kind": self.kind, "sums": values}, self.link)

    def like(self, other: Form) -> bool:
        """Whether rows of both add up."""
        # A number that stands for none is not equal to itself.
        return (self.name, self.kind, repr(self.slots)) == (other.name, other.kind, repr(other.slots))


def packed(tallies: Mapping[str, Tally]) -> tuple[Tensor, tuple[Form, ...]]:
    """All sums of a step in one row, and where each of them lies.

    Raises:
        UnfitError: a constant that is a tensor.
    """
    parts: list[Tensor] = []
    forms, start = [], 0
    for name, tally in tallies.items():
        if isinstance(tally.coefficient, Tensor) or isinstance(tally.offset, Tensor):
            raise UnfitError(f"the loss {name!r} has a constant that is a tensor")
        told = described(tally)
        slots: list[Any] = []
        for value in told["sums"]:
            if isinstance(value, Tensor):
                slots.append((start, tuple(value.shape), not value.is_floating_point()))
                parts.append(value.detach().reshape(-1).to(torch.float64))
                start += value.numel()
            else:
                slots.append(value)
        forms.append(Form(name, told["kind"], tally.link, tuple(slots)))
    return torch.cat(parts), tuple(forms)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The sums of one step.

    Args:
        forms: of its tallies.
        row: the sums.
    """

    forms: tuple[Form, ...]
    row: Tensor

    def tallies(self, objective: Any = None, by: str | None = None) -> dict[str, Tally]:
        """By term; the groups are those that the step has summed."""
        return {form.name: form.tally(self.row, 1) for form in self.forms}


class PackedSums:
    """The sums of many steps, in float64, one addition a step.

    Example:
        >>> sums, (row, forms) = PackedSums(), packed({"mse": Tally(torch.tensor(6.0), 3, 3, 3)})
        >>> for _ in range(2):
        ...     _ = sums.add(Packed(forms, row))
        >>> tally = sums.tallies()["mse"]
        >>> float(tally.numerator), tally.count
        (12.0, 6)
    """

    def __init__(self) -> None:
        self._forms: tuple[Form, ...] = ()
        self._row = torch.zeros(0)
        self._steps = 0

    def __bool__(self) -> bool:
        return self._steps > 0

    def add(self, step: Packed) -> dict[str, Tally]:
        """One more step; the tallies of all before it where its row is another."""
        if step.forms is not self._forms:
            return self._other(step)
        self._row.add_(step.row)
        self._steps += 1
        return {}

    def _other(self, step: Packed) -> dict[str, Tally]:
        pairs = zip(self._forms, step.forms, strict=False)
        if len(self._forms) == len(step.forms) and all(one.like(other) for one, other in pairs):
            self._forms = step.forms
            return self.add(step)
        found = self.tallies()
        self._forms, self._row, self._steps = step.forms, step.row.clone(), 1
        return found

    def tallies(self) -> dict[str, Tally]:
        """The sums so far, by term."""
        return {form.name: form.tally(self._row, self._steps) for form in self._forms}

    def state_dict(self) -> dict[str, Any]:
        """The sums, and where each of them lies."""
        forms = [(form.name, form.kind, form.slots) for form in self._forms]
        return {"forms": forms, "row": self._row.clone(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any], links: Mapping[str, Link | None], device: torch.device) -> None:
        """Go on from sums that `state_dict` told; the links of the terms are those of their losses."""
        forms: Sequence[Any] = state["forms"]
        self._forms = tuple(Form(name, kind, links.get(name), tuple(slots)) for name, kind, slots in forms)
        self._row, self._steps = state["row"].to(device, copy=True), state["steps"]
