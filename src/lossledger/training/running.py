"""Running tallies: sums over the batches of an epoch, on the device, read by the host only at log points."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lossledger.tally import Groups, Tally


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
        self._sums: dict[str, list[Tensor]] = {}
        self._numbers: dict[str, list[int | float]] = {}
        self.batches = 0

    def add(self, tallies: dict[str, Tally]) -> None:
        """Add the tallies of a batch."""
        self.batches += 1
        for name, tally in tallies.items():
            tensors, numbers = _fields(tally)
            if name not in self._patterns:
                self._patterns[name] = tally
                self._sums[name] = [t.detach().to(self._device, _wide(t), copy=True) for t in tensors]
                self._numbers[name] = numbers
                continue
            torch._foreach_add_(self._sums[name], [t.detach() for t in tensors])
            self._numbers[name] = [a + b for a, b in zip(self._numbers[name], numbers, strict=True)]

    def read(self) -> dict[str, Tally]:
        """The sums so far, on the host as NumPy values: one transfer for all terms."""
        flat = [t.reshape(-1).double() for sums in self._sums.values() for t in sums]
        host = torch.cat(flat).cpu().numpy() if flat else None
        found: dict[str, Tally] = {}
        start = 0
        for name, pattern in self._patterns.items():
            values = []
            for tensor in self._sums[name]:
                assert host is not None
                part = host[start : start + tensor.numel()].reshape(tensor.shape)
                values.append(part if tensor.ndim else part.item())
                start += tensor.numel()
            found[name] = _rebuild(pattern, values, self._numbers[name])
        return found


def _wide(tensor: Tensor) -> torch.dtype:
    """Sums of many batches need float64, and counts int64."""
    return torch.float64 if tensor.is_floating_point() else torch.int64


def _slots(tally: Tally) -> list[object]:
    groups = tally.groups
    rows = [] if groups is None else [groups.numerator, groups.total, groups.count, groups.weight]
    return [tally.numerator, tally.divisor, tally.count, tally.weight, tally.nonfinite, *rows]


def _fields(tally: Tally) -> tuple[list[Tensor], list[int | float]]:
    """The statistics that are tensors, and those that are plain numbers, each in the order of the slots."""
    slots = _slots(tally)
    tensors = [s for s in slots if isinstance(s, Tensor)]
    return tensors, [s for s in slots if isinstance(s, int | float)]


def _rebuild(pattern: Tally, tensors: list[object], numbers: list[int | float]) -> Tally:
    """A tally like the pattern, with the summed statistics in the places they came from."""
    from_tensors, from_numbers = iter(tensors), iter(numbers)
    values = [next(from_tensors) if isinstance(s, Tensor) else next(from_numbers) for s in _slots(pattern)]
    groups = pattern.groups
    if groups is not None:
        groups = Groups(groups.kind, groups.keys, *values[5:9], cell=groups.cell)
    numerator, divisor, count, weight, nonfinite = values[:5]
    return replace(
        pattern,
        numerator=numerator,
        divisor=divisor,
        count=count,
        weight=weight,
        nonfinite=nonfinite,
        groups=groups,
    )
