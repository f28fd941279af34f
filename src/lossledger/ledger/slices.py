"""Which parts of the data are worse than the rest: groups and conjunctions of groups, tested honestly.

Each slice is compared with the samples outside of it by Welch's one-sided t-test. A conjunction must also be worse than
the rest of each of its parts: what the site alone explains is no finding of the site and the language. The largest of
these p-values counts, and Holm's correction over all slices that were tested bounds, whatever depends on what, the
chance that any slice is named where none is worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lossledger.errors import InputError
from lossledger.ledger.table import aligned, significant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

# Where the continued fraction of the incomplete beta function has come to rest.
_RESTING = 1e-15
_MOST_STEPS = 10_000
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Slice:
    """One part of the data and how its losses differ from the others.

    Args:
        groups: `(kind, group)`, one or several of which all hold.
        count: how many samples it has.
        share: how much of all samples that is.
        mean: mean loss in it.
        outside: mean loss of all other samples.
        effect: mean − outside.
        p: the chance that any slice looks this bad where none is worse: Holm's correction over all that were tested.
    """

    groups: tuple[tuple[str, str], ...]
    count: int
    share: float
    mean: float
    outside: float
    effect: float
    p: float

    def __str__(self) -> str:
        return " and ".join(f"{kind}={group}" for kind, group in self.groups)


@dataclass(frozen=True, slots=True)
class Slices:
    """The worst slices, those that are significant first, then by effect.

    Args:
        rows: the slices.
        tested: how many slices were tested; the p-values pay for all of them.
        significant: how many of those tested have a p-value of at most `level`.
        level: the chance of a false finding that was accepted.
        samples: how many samples were compared.
        left_out: how many were not, because their loss is not finite.
    """

    rows: tuple[Slice, ...]
    tested: int
    significant: int
    level: float
    samples: int
    left_out: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Slice]:
        return iter(self.rows)

    def __str__(self) -> str:
        numbers = ("count", "share", "mean", "outside", "effect", "p")
        cells = [[str(row), *(significant(getattr(row, name)) for name in numbers)] for row in self.rows]
        said = f"{self.significant} of {self.tested} slices tested are worse than the rest (level {self.level:g})"
        if self.left_out:
            said += f"; {self.left_out} samples whose loss is not finite were left out"
        return f"{aligned(('slice', *numbers), cells, (False, *(True,) * len(numbers)))}\n{said}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def worst_slices(
    losses: ArrayLike,
    groups: Mapping[str, Sequence[Any] | NDArray[Any]],
    k: int = 10,
    minimum_count: int = 30,
    depth: int = 2,
    level: float = 0.05,
) -> Slices:
    """The groups, and conjunctions of groups of different kinds, whose mean loss is worst.

    Args:
        losses: `[N]`, the loss of each sample.
        groups: by kind, the name or number of each sample's group, `[N]`.
        k: how many slices to return.
        minimum_count: fewest samples inside, outside, and in the rest of a part, with which a slice is tested.
        depth: how many kinds a slice may join, from 1 to 3.
        level: the chance of a false finding that is accepted, for `significant`.

    Raises:
        InputError: arrays of other lengths, or numbers out of range.

    Example:
        >>> site = ["a", "b", "c", "d"] * 100
        >>> losses = [1.0 + (s == "b") for s in site]
        >>> print(worst_slices(losses, {"site": site}, k=1))
        slice   count   share  mean  outside  effect  p
        site=b    100  0.2500     2        1       1  0
        1 of 4 slices tested are worse than the rest (level 0.05)
    """
    import numpy as np

    values = np.asarray(losses, np.float64)
    columns = _checked(values, groups, k, minimum_count, depth, level)
    finite = np.isfinite(values)
    values = values[finite]
    columns = {kind: (codes[finite], names) for kind, (codes, names) in columns.items()}
    centre = float(values.mean()) if len(values) else 0.0
    sums = _Sums(values - centre, columns)
    found = [
        (chosen, sums.of(chosen, cell), p)
        for size in range(1, depth + 1)
        for chosen in combinations(columns, size)
        for cell, p in sums.tested(chosen, minimum_count)
    ]
    adjusted = _holm([p for *_, p in found])
    whole = sums.whole
    slices = []
    for (chosen, inside, _), p in zip(found, adjusted, strict=True):
        outside = whole - inside
        names = tuple((kind, columns[kind][1][code]) for kind, code in zip(chosen, inside.codes, strict=True))
        means = inside.mean + centre, outside.mean + centre
        share = inside.count / whole.count
        slices.append(Slice(names, inside.count, share, *means, inside.mean - outside.mean, p))
    slices.sort(key=lambda one: (one.p > level, -one.effect, len(one.groups), one.groups))
    number = sum(one.p <= level for one in slices)
    return Slices(tuple(slices[:k]), len(slices), number, level, len(values), int((~finite).sum()))


Coded = tuple["NDArray[np.int64]", tuple[str, ...]]


def _checked(
    values: NDArray[Any], groups: Mapping[str, Any], k: int, minimum_count: int, depth: int, level: float
) -> dict[str, Coded]:
    """The groups of each kind as codes and names."""
    import numpy as np

    if values.ndim != 1:
        raise InputError(f"worst_slices: losses: expected one number a sample, received shape {values.shape}.")
    if not groups:
        raise InputError("worst_slices: groups: expected at least one kind of groups, received none. Pass a dict.")
    for name, number, least, most in (
        ("k", k, 1, None),
        ("minimum_count", minimum_count, 2, None),
        ("depth", depth, 1, 3),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least or (most and number > most):
            until = f" to {most}" if most else ""
            raise InputError(f"worst_slices: {name}: expected a whole number from {least}{until}, received {number!r}.")
    if not 0 < level < 1:
        raise InputError(f"worst_slices: level: expected a number between 0 and 1, received {level!r}.")
    found: dict[str, Coded] = {}
    for kind, given in groups.items():
        array = np.asarray(given)
        if array.shape != values.shape:
            raise InputError(
                f"worst_slices: groups[{kind!r}]: expected one group for each of {len(values)} samples, received shape "
                f"{array.shape}."
            )
        names, codes = np.unique(array.astype(str), return_inverse=True)
        found[kind] = codes.reshape(-1).astype(np.int64), tuple(names.tolist())
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """Sums of a part of the data: how many, Σ loss and Σ loss², and the codes of its groups."""

    count: int
    total: float
    squares: float
    codes: tuple[int, ...] = ()

    def __sub__(self, other: _Part) -> _Part:
        return _Part(self.count - other.count, self.total - other.total, self.squares - other.squares)

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def error(self) -> float:
        """The squared standard error of the mean."""
        spread = max(self.squares - self.total * self.mean, 0.0)
        return spread / (self.count - 1) / self.count


class _Sums:
    """Sums of every cell of every conjunction, each found by one pass over the samples."""

    def __init__(self, values: NDArray[np.float64], columns: Mapping[str, Coded]) -> None:
        self._values, self._columns = values, columns
        self._cells: dict[tuple[str, ...], dict[tuple[int, ...], _Part]] = {}
        self.whole = _Part(len(values), float(values.sum()), float((values * values).sum()))

    def of(self, chosen: tuple[str, ...], cell: tuple[int, ...]) -> _Part:
        return self.cells(chosen)[cell]

    def cells(self, chosen: tuple[str, ...]) -> dict[tuple[int, ...], _Part]:
        """The parts of a conjunction of kinds that occur, by the codes of their groups."""
        import numpy as np

        if chosen not in self._cells:
            codes = np.stack([self._columns[kind][0] for kind in chosen])
            met, inverse = np.unique(codes, axis=1, return_inverse=True)
            inverse, size = inverse.reshape(-1), met.shape[1]
            columns = (
                np.bincount(inverse, minlength=size).tolist(),
                np.bincount(inverse, self._values, size).tolist(),
                np.bincount(inverse, self._values**2, size).tolist(),
            )
            keys = [tuple(key) for key in met.T.tolist()]
            parts = zip(keys, *columns, strict=True)
            self._cells[chosen] = {key: _Part(count, total, squares, key) for key, count, total, squares in parts}
        return self._cells[chosen]

    def tested(self, chosen: tuple[str, ...], least: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """The cells of a conjunction that are large enough to be tested, with the p-value of each."""
        for cell, inside in self.cells(chosen).items():
            rests = [self.whole - inside]
            if len(chosen) > 1:
                for left in range(len(chosen)):
                    kinds, codes = chosen[:left] + chosen[left + 1 :], cell[:left] + cell[left + 1 :]
                    rests.append(self.of(kinds, codes) - inside)
            if inside.count >= least and all(rest.count >= least for rest in rests):
                yield cell, max(_welch(inside, rest) for rest in rests)


def _welch(inside: _Part, outside: _Part) -> float:
    """The chance of so large a difference of two means, or a larger one, where the first is not larger."""
    error = inside.error + outside.error
    difference = inside.mean - outside.mean
    if error == 0:
        return 0.0 if difference > 0 else 1.0
    freedom = error**2 / (inside.error**2 / (inside.count - 1) + outside.error**2 / (outside.count - 1))
    return student_tail(difference / math.sqrt(error), freedom)


def student_tail(t: float, freedom: float) -> float:
    """The chance that Student's t exceeds `t`.

    >>> round(student_tail(2.0, 10.0), 6), student_tail(0.0, 3.0)
    (0.036694, 0.5)
    """
    if t == 0:
        return 0.5
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return tail if t > 0 else 1 - tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    # The fraction converges fast below the mean of the distribution; above, its mirror image does.
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / a * _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 / (1 + d₁/(1 + d₂/(1 + …))), from the front (modified Lentz)."""
    value, above, below = 1.0, 1.0, 0.0
    for step in range(_MOST_STEPS):
        half = step // 2
        if step == 0:
            term = 1.0
        elif step % 2:
            term = -(a + half) * (a + b + half) * x / ((a + step - 1) * (a + step))
        else:
            term = half * (b - half) * x / ((a + step - 1) * (a + step))
        below = 1 / _away_from_0(1 + term * below)
        above = _away_from_0(1 + term / above)
        factor = above * below
        value *= factor
        if step and abs(factor - 1) < _RESTING:
            break
    # The first level was 1 + 1/(1 + …).
    return value - 1


def _away_from_0(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _holm(p: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, by Holm's steps down."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, least = [0.0] * len(p), 0.0
    for rank, position in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[position]))
        adjusted[position] = least
    return adjusted
