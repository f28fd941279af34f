"""Rows of a ledger that are chosen step by step, before they are added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lossledger.errors import InputError
from lossledger.ledger.table import Table

if TYPE_CHECKING:
    from lossledger.ledger.ledger import Ledger


def dimensions_of(where: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dimension, of which `class` is written `class_` as an argument."""
    return {name.removesuffix("_"): value for name, value in where.items()}


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a ledger whose dimensions have some values; `Ledger.where` makes it.

    Args:
        ledger: whose rows they are.
        chosen: the value, or a list of the values, that each dimension may have.
    """

    ledger: Ledger = field(repr=False)
    chosen: Mapping[str, Any]

    def where(self, **where: Any) -> Selection:
        """Those of these rows that have further values; arguments as in `Ledger.table`.

        Raises:
            InputError: a dimension whose values were chosen before.
        """
        named = dimensions_of(where)
        twice = sorted(named.keys() & self.chosen.keys())
        if twice:
            raise InputError(
                f"where: expected each dimension once, received {', '.join(twice)} again. Give all values of a "
                "dimension in one list."
            )
        return Selection(self.ledger, {**self.chosen, **named})

    def by(self, *dimensions: str) -> Table:
        """Add these rows up by dimensions; see `Ledger.table`."""
        return self.ledger.table(dimensions, **self.chosen)
