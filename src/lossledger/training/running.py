"""Running tallies: sums over the batches of an epoch, on the device, read by the host only at log points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossledger.tally import GRID, Grid, Groups, Link, Tally


class Running:
    """Tallies of terms, added up in float64 and int64 without reading a value.

    Args:
        device: where the sums live.

    Example:
        >>> running = Running(torch.device("cpu"))
        >>> running.add({"mse": Tally(torch.tensor(6.0), 3, 3, 3)})
        >>> running.add({"mse": Tally(torch.tensor(8.0), 1, 1, 1)})
        >>> running.read()["mse"].value
        3.5
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._patterns: dict[str, Tally] = {}
        # The sums of each term, slot by slot; a plain number stays one until a batch brings a tensor in its place.
        self._sums: dict[str, list[Tensor | int | float]] = {}

    def add(self, tallies: dict[str, Tally]) -> None:
        """Add the tallies of a batch."""
        for name, tally in tallies.items():
            values = _slots(tally)
            if name not in self._patterns:
                self._patterns[name] = tally
                self._sums[name] = [
                    self._copy(v, tally, slot) if isinstance(v, Tensor) else v for slot, v in enumerate(values)
                ]
            else:
                self._accumulate(self._sums[name], values, tally)

    def _copy(self, value: Tensor, tally: Tally, slot: int) -> Tensor:
        # Sums of many batches need float64, and counts int64; what counts in this batch may weigh in the next.
        wide = torch.int64 if slot % _length(tally) in _COUNTS else torch.float64
        return value.detach().to(self._device, wide, copy=True)

    def _accumulate(self, sums: list[Tensor | int | float], values: list[Tensor | int | float], tally: Tally) -> None:
        targets, addends = [], []
        for slot, value in enumerate(values):
            known = sums[slot]
            if isinstance(known, Tensor) and isinstance(value, Tensor):
                targets.append(known)
                addends.append(value.detach())
            elif isinstance(value, Tensor):
                sums[slot] = self._copy(value, tally, slot) + known
            else:
                sums[slot] = known + value
        torch._foreach_add_(targets, addends)

    def state_dict(self) -> dict[str, Any]:
        """The sums, and what the tallies they belong to are like."""
        return {"sums": self._sums, "patterns": {name: _kind(tally) for name, tally in self._patterns.items()}}

    def load_state_dict(self, state: dict[str, Any], links: Mapping[str, Link | None]) -> None:
        """Go on from sums that `state_dict` told; the links of the terms are those of their losses."""
        self._patterns = {name: _pattern(**kind, link=links.get(name)) for name, kind in state["patterns"].items()}
        self._sums = {
            name: [v.to(self._device, copy=True) if isinstance(v, Tensor) else v for v in values]
            for name, values in ((n, _completed(state["patterns"][n], v)) for n, v in state["sums"].items())
        }

    def read(self) -> dict[str, Tally]:
        """The sums so far, on the host as NumPy values: one transfer for all terms."""
        flat = [v.reshape(-1).double() for sums in self._sums.values() for v in sums if isinstance(v, Tensor)]
        host = torch.cat(flat).cpu().numpy() if flat else np.zeros(0)
        found: dict[str, Tally] = {}
        start = 0
        for name, sums in self._sums.items():
            values: list[Any] = []
            for value in sums:
                if not isinstance(value, Tensor):
                    values.append(value)
                    continue
                part = host[start : start + value.numel()].reshape(tuple(value.shape))
                values.append(part if value.ndim else part.item())
                start += value.numel()
            found[name] = _rebuild(self._patterns[name], values)
        return found


def added(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `Running.state_dict` would tell of all that several have told of."""
    sums: dict[str, list[Any]] = {}
    patterns: dict[str, Any] = {}
    for state in states:
        for name, values in state["sums"].items():
            known = sums.get(name)
            sums[name] = list(values) if known is None else [a + b for a, b in zip(known, values, strict=True)]
            patterns.setdefault(name, state["patterns"][name])
    return {"sums": sums, "patterns": patterns}


def _kind(tally: Tally) -> dict[str, Any]:
    """What does not add up in a tally."""
    groups = tally.groups
    found = {"coefficient": tally.coefficient, "offset": tally.offset, "form": tally.form}
    rows = None if groups is None else (groups.kind, groups.keys, groups.cell)
    return found | {"groups": rows, "shown": True} | ({} if tally.grid is None else {"grid": True})


def _pattern(
    coefficient: Any,
    offset: Any,
    form: Any,
    groups: tuple[Any, ...] | None,
    link: Link | None,
    grid: bool = False,
    shown: bool = True,
) -> Tally:
    empty = None if groups is None else Groups(groups[0], groups[1], 0, 0, 0, 0, groups[2])
    statistics = None if link is None or form != "ratio" else 0
    plain = Tally(0, 0, 0, 0, coefficient, offset, form, groups=empty, statistics=statistics, link=link)
    return replace(plain, grid=Grid((plain,) * len(GRID), 0, 0)) if grid else plain


def described(tally: Tally) -> dict[str, Any]:
    """A tally on the host as plain values and arrays; `rebuilt` is the way back."""
    return {"kind": _kind(tally), "sums": _slots(tally)}


def rebuilt(told: dict[str, Any], link: Link | None) -> Tally:
    """The tally that `described` told."""
    return _rebuild(_pattern(**told["kind"], link=link), _completed(told["kind"], told["sums"]))


def _completed(kind: Mapping[str, Any], sums: list[Any]) -> list[Any]:
    """The sums as this version has them: those of older checkpoints do not know how many elements were shown."""
    if kind.get("shown"):
        return sums
    rest = sums[-2:] if kind.get("grid") else []
    length = (len(sums) - len(rest)) // (len(GRID) if rest else 1)
    parts = (sums[start : start + length] for start in range(0, len(sums) - len(rest), length))
    return [*(value for part in parts for value in (*part[:5], math.nan, *part[5:])), *rest]


# Positions of the counts among the slots: count, nonfinite, and the counts of the groups.
_COUNTS = (2, 4, 8)


def _slots(tally: Tally) -> list[Tensor | int | float]:
    if tally.grid is not None:
        parts = (value for part in tally.grid.parts for value in _slots(part))
        return [*parts, tally.grid.size, tally.grid.entries]
    groups = tally.groups
    rows = [] if groups is None else [groups.numerator, groups.total, groups.count, groups.weight]
    extra = [] if tally.statistics is None else [tally.statistics]
    # Nothing that is added to NaN makes it a number again.
    shown = math.nan if tally.shown is None else tally.shown
    return [tally.numerator, tally.divisor, tally.count, tally.weight, tally.nonfinite, shown, *rows, *extra]


def _length(tally: Tally) -> int:
    """Number of slots of a tally; on a grid, of each of its parts."""
    return 6 + 4 * (tally.groups is not None) + (tally.statistics is not None)


def _rebuild(pattern: Tally, values: list[Any]) -> Tally:
    """A tally like the pattern, with the summed statistics."""
    if pattern.grid is not None:
        length = (len(values) - 2) // len(GRID)
        parts = tuple(
            _rebuild(part, values[i * length : (i + 1) * length]) for i, part in enumerate(pattern.grid.parts)
        )
        return Grid(parts, *values[-2:]).tally()
    groups = pattern.groups
    if groups is not None:
        groups = Groups(groups.kind, groups.keys, values[6], values[7], values[8], values[9], groups.cell)
    numerator, divisor, count, weight, nonfinite, shown = values[:6]
    return replace(
        pattern,
        numerator=numerator,
        divisor=divisor,
        count=count,
        weight=weight,
        nonfinite=nonfinite,
        groups=groups,
        statistics=None if pattern.statistics is None else values[-1],
        shown=None if math.isnan(shown) else int(shown),
    )
