"""Why the validation loss differs from the training loss, as a callback measured it: the last measurement of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GapLine:
    """One part: its name, what it adds, its standard error, the loss after it; `None` where it was not told apart."""

    name: str
    value: float | None
    error: float | None
    level: float | None


@dataclass(frozen=True, slots=True)
class GapView:
    """The way from the training loss to the validation loss of an epoch.

    Args:
        epoch: from 1.
        loss: where it starts.
        val_loss: where it ends.
        lines: the parts, in order.
        notes: what could not be measured.
    """

    epoch: int
    loss: float
    val_loss: float
    lines: tuple[GapLine, ...]
    notes: tuple[str, ...]


def gap_view(found: object) -> GapView | None:
    """The last measurement that a run file holds; `None` where it holds none, or something else by that name.

    Args:
        found: `gaps` of a run file.

    >>> part = {"name": "data", "value": 0.5, "error": 0.1, "meaning": "what remains"}
    >>> view = gap_view([{"epoch": 1, "loss": 1.0, "val_loss": 1.5, "parts": [part], "notes": []}])
    >>> view.lines[0].level
    1.5
    """
    last = found[-1] if isinstance(found, list) and found else None
    if not isinstance(last, Mapping):
        return None
    try:
        level = float(last["loss"])
        lines = []
        for part in last["parts"]:
            value, error = (None if part[key] is None else float(part[key]) for key in ("value", "error"))
            level += value or 0.0
            lines.append(GapLine(str(part["name"]), value, error, None if value is None else level))
        notes = tuple(str(note) for note in last["notes"])
        return GapView(int(last["epoch"]), float(last["loss"]), float(last["val_loss"]), tuple(lines), notes)
    except (KeyError, TypeError, ValueError):
        return None
