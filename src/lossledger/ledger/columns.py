"""Records held as columns, in which a million rows open, add up and are written in about a second.

Text is held as codes into the names that occur, so that grouping compares integers only. NumPy is loaded when the
first column is made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, overload

from lossledger.errors import LedgerError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

R = TypeVar("R")
TEXT, INTEGER, REAL = "VARCHAR", "BIGINT", "DOUBLE"


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One column.

    Args:
        kind: SQL type: VARCHAR, BIGINT or DOUBLE.
        values: [N] numbers; for text the code of each record.
        names: the text of each code; empty for numbers.
        missing: [N] where the value is None; None where no value is.
    """

    kind: str
    values: NDArray[Any]
    names: tuple[str, ...] = ()
    missing: NDArray[np.bool_] | None = None

    def taken(self, index: NDArray[np.intp] | slice) -> Column:
        """The records at `index`."""
        missing = None if self.missing is None else self.missing[index]
        return Column(self.kind, self.values[index], self.names, missing)

    def listed(self) -> list[Any]:
        """The values as Python has them."""
        found: list[Any] = self.objects().tolist() if self.kind == TEXT else self.values.tolist()
        if self.missing is not None:
            for position in self.missing.nonzero()[0].tolist():
                found[position] = None
        return found

    def objects(self) -> NDArray[Any]:
        """[N] The text of every record, as an array of Python strings."""
        import numpy as np

        texts: NDArray[Any] = np.array([*self.names, ""], dtype=object)
        return texts.take(self.values)

    def among(self, accepted: Collection[Any]) -> NDArray[np.bool_]:
        """[N] Where the value is one of those accepted."""
        import numpy as np

        if self.kind == TEXT:
            named: NDArray[np.bool_] = np.array([*(_holds(accepted, name) for name in self.names), False])
            return named.take(self.values)
        distinct, inverse = np.unique(self.values, return_inverse=True)
        found = np.array([value in accepted for value in distinct.tolist()], dtype=bool)[inverse]
        return found if self.missing is None else np.where(self.missing, _holds(accepted, None), found)


def _holds(accepted: Collection[Any], value: Any) -> bool:
    # A range looks for anything but an integer by going through all of its numbers.
    return (isinstance(value, int) or not isinstance(accepted, range)) and value in accepted


def encoded(kind: str, values: Sequence[Any], name: str, optional: bool = False) -> Column:
    """A column of Python values.

    Raises:
        LedgerError: a value of another type; nothing is rounded or cast to text.
    """
    import numpy as np

    if kind == TEXT:
        _require(all(issubclass(found, str) for found in set(map(type, values))), name, kind, values)
        codes = {text: code for code, text in enumerate(dict.fromkeys(values))}
        return Column(kind, np.fromiter(map(codes.__getitem__, values), np.int64, len(values)), tuple(codes))
    missing = None
    if optional:
        missing = np.fromiter((value is None for value in values), bool, len(values))
        values = [0 if value is None else value for value in values]
    array = np.array(values) if len(values) else np.zeros(0, np.int64)
    _require(array.ndim == 1 and array.dtype.kind in ("iu" if kind == INTEGER else "iuf"), name, kind, values)
    _require(array.dtype != np.uint64 or bool((array < 2**63).all()), name, kind, values)
    return Column(kind, array.astype(np.int64 if kind == INTEGER else np.float64), (), missing)


def _require(holds: bool, name: str, kind: str, values: Collection[Any]) -> None:
    if not holds:
        found = sorted({type(value).__name__ for value in values})
        raise LedgerError(
            f"The column {name!r} of the ledger holds {kind} only; received {', '.join(found)}. "
            "Check the types of the rows' values."
        )


def joined(parts: Sequence[Column]) -> Column:
    """The records of all parts, one after another."""
    import numpy as np

    if len(parts) == 1:
        return parts[0]
    names = {name: code for code, name in enumerate(dict.fromkeys(name for part in parts for name in part.names))}
    arrays = [part.values for part in parts]
    if parts[0].kind == TEXT:
        arrays = [np.array([*map(names.get, part.names), 0], np.int64)[part.values] for part in parts]
    missing = None
    if any(part.missing is not None for part in parts):
        missing = np.concatenate(
            [np.zeros(len(part.values), bool) if part.missing is None else part.missing for part in parts]
        )
    return Column(parts[0].kind, np.concatenate(arrays), tuple(names), missing)


Columns = dict[str, Column]


class Records(Sequence[R]):
    """Records of one kind, append-only: read from files as columns, appended as objects.

    Args:
        make: the class of a record, whose fields are the columns.
        kinds: SQL type by column name.
        optional: columns in which None is allowed.
        opened: the records of files, if any.
    """

    def __init__(
        self, make: Callable[..., R], kinds: Mapping[str, str], optional: frozenset[str], opened: Columns | None = None
    ) -> None:
        self._make, self._kinds, self._optional = make, kinds, optional
        self._columns = opened
        self._encoded = 0 if opened is None else len(next(iter(opened.values())).values)
        # Objects of the first `_encoded` records are made when they are asked for.
        self._unmade = self._encoded
        self._objects: list[R] = []

    def extend(self, records: Collection[R]) -> None:
        """Add records at the end."""
        self._objects.extend(records)

    def __len__(self) -> int:
        return self._unmade + len(self._objects)

    def __iter__(self) -> Iterator[R]:
        return iter(self._all())

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[R]: ...
    def __getitem__(self, index: int | slice) -> R | Sequence[R]:
        return self._all()[index]

    def _all(self) -> list[R]:
        if self._unmade and self._columns is not None:
            read = {name: column.taken(slice(self._unmade)) for name, column in self._columns.items()}
            self._objects = [*self._made(read), *self._objects]
            self._unmade = 0
        return self._objects

    def _made(self, columns: Columns) -> list[R]:
        return list(map(self._make, *(columns[name].listed() for name in self._kinds)))

    def columns(self) -> Columns:
        """Every record, as columns.

        Raises:
            LedgerError: a record with a value of another type.
        """
        new = self._objects[self._encoded - self._unmade :]
        if new or self._columns is None:
            tail = {
                name: encoded(kind, list(map(operator.attrgetter(name), new)), name, name in self._optional)
                for name, kind in self._kinds.items()
            }
            known = self._columns
            self._columns = tail if known is None else {n: joined((known[n], tail[n])) for n in self._kinds}
            self._encoded += len(new)
        return self._columns

    def after(self, start: int) -> Columns:
        """The records from `start` on, as columns."""
        return {name: column.taken(slice(start, None)) for name, column in self.columns().items()}

    def where(self, **accepted: Any) -> list[R]:
        """The records that have these values."""
        import numpy as np

        columns = self.columns()
        mask = np.ones(len(self), bool)
        for name, value in accepted.items():
            mask &= columns[name].among((value,))
        index = np.flatnonzero(mask)
        if not self._unmade:
            return [self._objects[position] for position in index.tolist()]
        return self._made({name: column.taken(index) for name, column in columns.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Records that agree in some columns, group by group, in the order in which groups are first met.

    Args:
        first: [G] the first record of each group.
        order: [N] the records, sorted by group.
        starts: [G] where in `order` each group begins.
    """

    first: NDArray[np.intp]
    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    def lists(self, values: NDArray[Any]) -> list[list[Any]]:
        """The values of each group."""
        flat = values[self.order].tolist()
        return [flat[start:end] for start, end in pairwise((*self.starts.tolist(), len(flat)))]


def grouped(keys: Sequence[Column], size: int) -> Groups:
    """Groups of `size` records that have the same values in all `keys`."""
    import numpy as np

    combined, span = np.zeros(size, np.int64), 1
    for key in keys:
        codes, count = _codes(key)
        if span * count >= 2**62:
            distinct, combined = np.unique(combined, return_inverse=True)
            span = len(distinct)
        combined, span = combined * count + codes, span * count
    order = np.argsort(combined, kind="stable")
    ranked = combined[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if size else np.zeros(0, np.intp)
    met = np.argsort(order[starts])
    ends = np.r_[starts[1:], size]
    pieces = [order[starts[i] : ends[i]] for i in met]
    lengths = (ends - starts)[met] if size else starts
    new_order = np.concatenate(pieces) if pieces else order
    return Groups(order[starts][met], new_order, np.cumsum(lengths) - lengths)


def _codes(key: Column) -> tuple[NDArray[Any], int]:
    """A number from 0 for each value of a column, and a bound of these numbers."""
    import numpy as np

    if key.kind == TEXT:
        return key.values.astype(np.int64), max(len(key.names), 1)
    distinct, codes = np.unique(key.values, return_inverse=True)
    count = len(distinct)
    if key.missing is None:
        return codes, max(count, 1)
    return np.where(key.missing, count, codes), count + 1
