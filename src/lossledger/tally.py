"""Additive statistics: what a part of the data adds up to.

A loss is never stored as a mean. A part of the data (a batch, a micro-batch, the share of a rank, an epoch) is
described by sums that add with `+`, and one formula turns the sums of any whole into its loss:

    value = coefficient · Σ_g numerator_g / (divisor_g + offset)

* A mean has one cell `g`: the numerator is the weighted sum of the elements, the divisor what the reduction divides by.
* A sum has the divisor 0 and the offset 1 (or the length of the class axis): nothing that depends on the data divides.
* Dice, Jaccard and Tversky whose statistics run over the batch have a cell for each kept class, a divisor that
  depends on the predictions, and the smoothing constant as the offset.
* A loss that is no plain quotient of its statistics (a power of it, a class left out when it is absent) names the
  *link* that turns the sums of the whole into the loss of each cell: `value = coefficient · Σ_g link_g`.

Because statistics add, the same `+` merges micro-batches, ranks and epochs, in any order and any grouping.

Nothing here imports torch: statistics may be Python numbers, fractions, NumPy arrays or torch tensors, which is also
how the laws are tested exactly.

Sums of floating-point numbers depend on their order in the last bits. A tally on a *grid* does not: its numbers are
held as multiples of fixed powers of two, which add without rounding.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import numpy as np

from lossledger.errors import InputError

GRID = (2.0**-6, 2.0**-24, 2.0**-42, 2.0**-60)
"""The steps of the grids, coarse to fine. What one leaves of a number is at most half of its step, so that 2^36 rests
add up to less than 2^53 steps of the next, and float64 adds them without rounding; the coarse grid reaches to 2^47."""

GRID_LIMIT = 2.0**47
GRID_ENTRIES = 2**36

Number = Any
"""A Python number, a fraction, a NumPy scalar or array, or a torch tensor."""

GroupKey = tuple[Hashable, str]
"""Name of a group, and "present", "absent" or "" (a binary loss splits each class by what the target says)."""


class Link(Protocol):
    """From the additive statistics of a whole to the loss of each of its cells; two links compare with `==`."""

    def __call__(self, numerator: Number, divisor: Number, statistics: Number) -> Number:
        """The loss of each cell, `[G]`.

        Args:
            numerator: `[G]`.
            divisor: `[G]`, with the offset.
            statistics: `[K, G]`, what else of the cells the link needs.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """How a tally divides over groups (classes, samples, columns); every row adds up over the parts of the data.

    Args:
        kind: what the groups are: `"class"`, `"label"`, `"sample"`, `"column"` or a name of the caller's.
        keys: one `(name, presence)` a row, or `None` when the rows are positions, in order: then `+` appends.
        numerator: `[R]`, the share of the row in the numerator of its cell.
        total: `[R]`, Σ weight · element. The numerator, except where a reduction rescales entries.
        count: `[R]`, number of unmasked elements.
        weight: `[R]`, Σ weight · mask; for a ratio the share of the row in the divisor.
        cell: `R` positions of the divisor that divides each row, or `None` when there is one divisor.
    """

    kind: str
    keys: tuple[GroupKey, ...] | None
    numerator: Number
    total: Number
    count: Number
    weight: Number
    cell: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.numerator)

    def __add__(self, other: Groups) -> Groups:
        if self.kind != other.kind or (self.keys is None) != (other.keys is None):
            raise InputError(
                f"Tallies with different groups cannot be added: expected groups by {self.kind!r} on both sides, "
                f"received {other.kind!r}. Compute both tallies with the same `by`."
            )
        if self.keys is not None and self.keys == other.keys and self.cell == other.cell:
            keys: tuple[GroupKey, ...] | None = self.keys
            cell = self.cell

            def merge(mine: Number, theirs: Number) -> Number:
                return mine + theirs

        else:
            here, there, keys, cell = _places(self, other)
            size = 1 + max(here + there, default=-1)

            def merge(mine: Number, theirs: Number) -> Number:
                return _spread(mine, here, size) + _spread(theirs, there, size)

        return Groups(
            self.kind,
            keys,
            merge(self.numerator, other.numerator),
            merge(self.total, other.total),
            merge(self.count, other.count),
            merge(self.weight, other.weight),
            cell,
        )


def _places(a: Groups, b: Groups) -> tuple[list[int], list[int], tuple[GroupKey, ...] | None, tuple[int, ...] | None]:
    """Where the rows of `a` and of `b` go in their union."""
    cells = None if a.cell is None or b.cell is None else (a.cell, b.cell)
    if a.keys is None or b.keys is None:
        here, there = list(range(len(a))), list(range(len(a), len(a) + len(b)))
        return here, there, None, None if cells is None else cells[0] + cells[1]
    position: dict[GroupKey, int] = {key: i for i, key in enumerate(a.keys)}
    for key in b.keys:
        position.setdefault(key, len(position))
    cell = None
    if cells is not None:
        by_key = dict(zip(a.keys, cells[0], strict=True)) | dict(zip(b.keys, cells[1], strict=True))
        cell = tuple(by_key[key] for key in position)
    return [position[k] for k in a.keys], [position[k] for k in b.keys], tuple(position), cell


def _spread(values: Number, places: list[int], size: int) -> Number:
    """`values` at `places` of a row of zeros: an array of the same kind (NumPy of any dtype, torch)."""
    zeros = values.new_zeros(size) if hasattr(values, "new_zeros") else np.zeros(size, dtype=np.asarray(values).dtype)
    zeros[places] = values
    return zeros


def divide(numerator: Number, divisor: Number) -> Number:
    """`numerator / divisor`, and 0 where the divisor is 0: a part that counted nothing says nothing.

    >>> divide(3.0, 2.0), divide(0.0, 0.0)
    (1.5, 0.0)
    """
    empty = divisor == 0
    if isinstance(empty, bool):
        return numerator * 0 if empty else numerator / divisor
    # Comparisons of arrays stay on their device: no branch here may read a value.
    return numerator * (divisor != 0) / (divisor + empty)


def _like(array: Number, values: list[float]) -> Number:
    """`values` as an array of the kind of `array`."""
    return array.new_tensor(values) if hasattr(array, "new_tensor") else np.asarray(values)


def _sum(values: Number) -> Number:
    return values.sum() if hasattr(values, "sum") else values


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The sums of a tally on fixed grids: the same bits in any order and any grouping of the additions.

    Args:
        parts: a tally for each of `GRID`, whose numbers are multiples of its step; the tally is their sum.
        size: Σ |number| of the coarse part, over all its numbers; the sums are exact while it is below `GRID_LIMIT`.
        entries: how many numbers were added in each place; the sums are exact while it is below `GRID_ENTRIES`.
    """

    parts: tuple[Tally, ...]
    size: Number
    entries: int

    def __add__(self, other: Grid) -> Grid:
        parts = tuple(map(operator.add, self.parts, other.parts))
        return Grid(parts, self.size + other.size, self.entries + other.entries)

    def map(self, change: Callable[[Tally], Tally], number: Callable[[Number], Number] | None = None) -> Grid:
        """The grid with other parts, and another size."""
        size = self.size if number is None else number(self.size)
        return Grid(tuple(map(change, self.parts)), size, self.entries)

    def tally(self) -> Tally:
        """The tally that the parts add up to: fine parts first, always in this order."""
        first = self.parts[0].groups
        if first is None or first.keys is not None:
            return replace(functools.reduce(operator.add, reversed(self.parts)), grid=self)
        # Rows without keys would be appended: here the same row of every part is one row.
        named = tuple((row, "") for row in range(len(first)))
        whole = self.map(lambda part: _keyed(part, named)).tally()
        return replace(_keyed(whole, None), grid=self)

    def check(self) -> None:
        """The sums are exact; reads a value.

        Raises:
            InputError: they are too large, so that their last bits may depend on the order.
        """
        size, entries = float(self.size), int(self.entries)
        if (size < GRID_LIMIT and entries < GRID_ENTRIES) or size != size or self.parts[0].nonfinite > 0:
            return
        raise InputError(
            f"reproducible=True: expected sums below 2^47 (1.4e14) in magnitude and fewer than 2^36 samples, received "
            f"{size:.3g} and {entries}; beyond, bits depend on the order of the additions. Rescale the loss or "
            "the weights, or compile with reproducible=False."
        )


def _keyed(tally: Tally, keys: tuple[GroupKey, ...] | None) -> Tally:
    """The tally with other keys of its rows."""
    return tally if tally.groups is None else replace(tally, groups=replace(tally.groups, keys=keys))


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """How far the elements of a part reach, without weights; spreads of parts merge with `+` to that of the whole.

    Args:
        minimum: the smallest element, infinite where there is none; `[R]` for groups.
        maximum: the largest element, minus infinity where there is none.
        squares: Σ element².

    Example:
        >>> whole = Spread(-1.0, 2.0, 5.0) + Spread(0.5, 3.0, 9.25) + Spread.zero()
        >>> whole.minimum, whole.maximum, whole.squares
        (-1.0, 3.0, 14.25)
    """

    minimum: Number
    maximum: Number
    squares: Number

    @classmethod
    def zero(cls) -> Spread:
        """The spread of no element: `zero() + s` and `s + zero()` are `s`."""
        return _NO_SPREAD

    def __add__(self, other: Spread) -> Spread:
        if self is _NO_SPREAD:
            return other
        if other is _NO_SPREAD:
            return self
        return Spread(
            _extreme("minimum", self.minimum, other.minimum),
            _extreme("maximum", self.maximum, other.maximum),
            self.squares + other.squares,
        )


_NO_SPREAD = Spread(float("inf"), float("-inf"), 0)


def _extreme(which: str, a: Number, b: Number) -> Number:
    """The smaller or larger of two numbers or arrays; NaN where either is."""
    if hasattr(a, which) and hasattr(b, which):
        return getattr(a, which)(b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return getattr(np, which)(a, b)
    if a != a or b != b:
        return a if a != a else b
    return min(a, b) if which == "minimum" else max(a, b)


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """What a part of the data adds up to; tallies of unequal parts add with `+` to the tally of the whole.

    `value = coefficient · Σ_g numerator_g / (divisor_g + offset)`, and 0 where a divisor is 0.

    Args:
        numerator: a scalar, or `[G]` with one entry a cell.
        divisor: additive statistic that divides, of the same shape.
        count: number of unmasked elements.
        weight: Σ weight · mask over the elements.
        coefficient: constant factor, the same for every part.
        offset: constant added to the divisor, the same for every part.
        form: `"linear"` when the divisor is a function of masks, weights and labels only; `"ratio"` when it depends on
            the predictions.
        nonfinite: number of NaN or infinite elements.
        groups: how the tally divides over groups.
        statistics: `[K, G]`, further sums of the cells that the link reads; `None` without a link.
        link: what makes the losses of the cells from the sums, where it is not the quotient.
        grid: the same sums on fixed grids, where they are to be bitwise the same for any split; then the others are
            made from them.
        shown: number of elements before any was masked, known from shapes alone; `None` where nobody said it.

    Returns of `value` and `contributions()` have the kind of the statistics: a torch tensor stays differentiable.

    Example:
        >>> first, second = Tally(6.0, 3, 3, 3.0), Tally(8.0, 1, 1, 1.0)
        >>> (first + second).value            # not (2 + 8) / 2
        3.5
        >>> sum([first, second]).count
        4
        >>> (Tally(6.0, 3, 3, 3.0, shown=5) + Tally(8.0, 1, 1, 1.0, shown=2)).masked
        3
    """

    numerator: Number
    divisor: Number
    count: Number
    weight: Number
    coefficient: Number = 1
    offset: Number = 0
    form: Literal["linear", "ratio"] = "linear"
    nonfinite: Number = 0
    groups: Groups | None = field(default=None)
    statistics: Number = None
    link: Link | None = None
    grid: Grid | None = None
    shown: Number = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the tally of no data is still the neutral one.
        if self is _ZERO:
            return Tally.zero, ()
        return Tally, tuple(getattr(self, one.name) for one in fields(self))

    @classmethod
    def zero(cls) -> Tally:
        """The tally of no data: `zero() + t` and `t + zero()` are `t`."""
        return _ZERO

    @property
    def masked(self) -> Number:
        """Number of elements that do not count: masked, of an ignored label or absent class; `None` if not known."""
        return None if self.shown is None else self.shown - self.count

    @property
    def value(self) -> Number:
        """The loss of the part: numerator over divisor, 0 when nothing counted.

        Raises:
            InputError: sums on a grid that are too large for it.
        """
        if self.grid is not None:
            self.grid.check()
        return self.coefficient * _sum(self._cells())

    def _cells(self) -> Number:
        """The loss of each cell."""
        divisor = self.divisor + self.offset
        if self.link is None:
            return divide(self.numerator, divisor)
        return self.link(self.numerator, divisor, self.statistics)

    def contributions(self) -> Number:
        """`[R]`, the share of each group in `value`; they sum to it.

        Raises:
            InputError: the tally was made without groups.
        """
        if self.groups is None:
            raise InputError(
                "This tally has no groups: expected one computed with `by`, received one without. "
                'Ask for them: loss.tally(y_true, y_pred, by="class").'
            )
        if self.link is not None:
            return self._linked(self.groups)
        divisor = self.divisor + self.offset
        if self.groups.cell is not None:
            divisor = divisor[list(self.groups.cell)]
        return self.coefficient * divide(self.groups.numerator, divisor)

    def _linked(self, groups: Groups) -> Number:
        """The loss of each cell, divided over its rows as its numerator is; evenly where that is 0."""
        cell = list(groups.cell) if groups.cell is not None else [0] * len(groups)
        rows = Counter(cell)
        whole = self.numerator[cell]
        share = divide(groups.numerator, whole) + (whole == 0) * _like(groups.numerator, [1 / rows[c] for c in cell])
        return self.coefficient * self._cells()[cell] * share

    def __add__(self, other: Tally) -> Tally:
        if not isinstance(other, Tally):
            return NotImplemented
        if self is _ZERO:
            return other
        if other is _ZERO:
            return self
        if self._constants != other._constants:
            raise InputError(
                "Tallies of different losses cannot be added: expected coefficient, offset, form and link "
                f"{self._constants}, received {other._constants}. Add tallies of one loss; add values of several."
            )
        if self.grid is not None and other.grid is not None:
            return (self.grid + other.grid).tally()
        if self.grid is not None or other.grid is not None:
            raise InputError(
                "A tally on a grid and one without cannot be added: the sum would depend on the split again. Compute "
                "both with reproducible=True, or neither."
            )
        if (self.groups is None) != (other.groups is None):
            raise InputError(
                "A tally with groups and one without cannot be added: the groups would no longer sum to the total. "
                "Compute both with the same `by`."
            )
        return Tally(
            self.numerator + other.numerator,
            self.divisor + other.divisor,
            self.count + other.count,
            self.weight + other.weight,
            self.coefficient,
            self.offset,
            self.form,
            self.nonfinite + other.nonfinite,
            None if self.groups is None or other.groups is None else self.groups + other.groups,
            None if self.statistics is None else self.statistics + other.statistics,
            self.link,
            # What one of two did not say, their sum does not know either.
            shown=None if self.shown is None or other.shown is None else self.shown + other.shown,
        )

    @property
    def _constants(self) -> tuple[Number, Number, str, Link | None]:
        """What all parts of a whole have in common."""
        return self.coefficient, self.offset, self.form, self.link

    def __radd__(self, other: object) -> Tally:
        # sum() starts from the integer 0.
        return self if other == 0 and isinstance(other, int) else NotImplemented


_ZERO = Tally(0, 0, 0, 0, shown=0)
