"""Roll-ups of ledger rows, and the table that holds one.

A roll-up is exact: it adds totals, counts and contributions, and divides once.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from lossledger.errors import InputError, UnknownNameError
from lossledger.ledger.columns import Columns, Groups, grouped
from lossledger.ledger.segments import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import pandas
    from numpy.typing import NDArray

SPLITS = ("training", "validation", "test")
SCOPE = ("run", "split", "epoch", "step")
ROW_DIMENSIONS = (*SCOPE, "term", "role", "presence")
GROUP_KINDS = ("class", "column", "label", "sample")
MEASURES = ("total", "count", "weight", "mean", "contribution", "share")
# Columns that a table has where some of its rows know them.
KEPT = ("masked", "minimum", "maximum", "squares")
DASH = "–"
SHORTEST_NAME = 10
# Signs of formatting that words of Persian or Hindi and joined emoji are written with; they take no column.
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"

_FIXED_ORDER = {
    "split": {name: position for position, name in enumerate(SPLITS)},
    "presence": {"present": 0, "absent": 1},
}


@dataclass(frozen=True)
class Table:
    """A roll-up of the ledger: one dict a row, keyed by the names in `columns`.

    >>> table = Table(("term", "count", "mean"), [{"term": "mse", "count": 4, "mean": 0.25}])
    >>> print(table)
    term  count    mean
    mse       4  0.2500
    """

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __str__(self) -> str:
        return aligned(self.columns, self._cells(), self._numeric())

    def _repr_html_(self) -> str:
        numeric = self._numeric()
        style = ["right" if right else "left" for right in numeric]
        head = "".join(f'<th style="text-align:{s}">{escape(c)}</th>' for s, c in zip(style, self.columns, strict=True))
        body = "".join(
            "<tr>"
            + "".join(f'<td style="text-align:{s}">{escape(c)}</td>' for s, c in zip(style, row, strict=True))
            + "</tr>"
            for row in self._cells()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_pandas(self) -> pandas.DataFrame:
        """The same table as a pandas DataFrame; pandas must be installed.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self.rows, columns=list(self.columns))

    def to_arrow(self) -> Any:
        """The same table as a `pyarrow.Table`; pyarrow must be installed.

        Raises:
            ImportError: pyarrow is not installed.
        """
        return importlib.import_module("lossledger.ledger.export").rows_to_arrow(self.columns, self.rows)

    def to_csv(self) -> str:
        """The table as CSV with a heading; numbers with every digit, nothing for None."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([row[column] for column in self.columns] for row in self.rows)
        return text.getvalue()

    def to_json(self) -> str:
        """The rows as a JSON list of objects; numbers that JSON lacks are text, such as "nan"."""
        return json.dumps(plain(self.rows), indent=1, ensure_ascii=False)

    def _cells(self) -> list[list[str]]:
        return [[_cell(column, row[column]) for column in self.columns] for row in self.rows]

    def _numeric(self) -> list[bool]:
        return [
            c in MEASURES or c in KEPT or (bool(self.rows) and all(_is_number(row[c]) for row in self.rows))
            for c in self.columns
        ]


def significant(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits, and more where fewer would make it look like 0 or 1.

    Args:
        value: any float; None and NaN have no value and become a dash.
        digits: significant digits, at least 1.

    Values within 1e-12 of 1 are 1: the difference is rounding noise.

    >>> significant(0.03125), significant(0.99996), significant(4.2e-7), significant(None)
    ('0.03125', '0.99996', '4.200e-7', '–')
    """
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(abs(value) - 1) <= 1e-12:
        return "1" if value > 0 else "-1"
    text = _rounded(value, digits)
    while abs(float(text.replace(",", ""))) == 1:
        digits += 1
        text = _rounded(value, digits)
    return text


def _rounded(value: float, digits: int) -> str:
    magnitude = abs(value)
    if magnitude >= 1e15 or magnitude < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(magnitude)))
    return f"{value:,.{decimals}f}"


def roll_up(records: Columns, by: Sequence[str], where: Mapping[str, Any]) -> Table:
    """Add up the rows that `where` selects, by the dimensions `by`; see `Ledger.table`.

    Args:
        records: the rows, with the column `run`.
        by: dimensions, in the order of the table's columns.
        where: accepted value, or collection of values, by dimension.

    Raises:
        UnknownNameError: a dimension or a split that no ledger has; a run, a term or a group that no row has.
        InputError: two group kinds at once, or a dimension twice.
    """
    kind = _group_kind(records, by, where)
    for split in _accepted(where.get("split", SPLITS)):
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
    with_step = "step" in by or "step" in where
    level = records["step"].among((None,)) ^ with_step
    accepted = {name: records[_column(name, kind)].among(_accepted(value)) for name, value in where.items()}
    for name in where.keys() & {"run", "term", kind}:
        _check_names(records, name, kind, _accepted(where[name]))
    in_scope, selected = level & records["kind"].among(("term",)), level & records["kind"].among((kind,))
    for name, mask in accepted.items():
        selected &= mask
        if name in SCOPE:
            in_scope &= mask
    scope = [name for name in by if name in SCOPE]
    whole, parts = _taken(records, in_scope), _taken(records, selected)
    of_wholes = _grouped(whole, scope)
    wholes = dict(zip(_keys(whole, scope, of_wholes), of_wholes.lists(whole["contribution"].values), strict=True))
    dimensions = [_column(name, kind) for name in by]
    groups = _grouped(parts, dimensions)
    cells = dict(zip(_keys(parts, dimensions, groups), _measures(parts, groups), strict=True))
    rows = []
    for key in _ordered(cells, by):
        names = dict(zip(by, key, strict=True))
        loss = exact_sum(wholes.get(tuple(names[name] for name in scope), []))
        cell = cells[key]
        rows.append({**names, **cell, "share": cell["contribution"] / loss if loss else None})
    return Table((*by, *MEASURES, *_known(parts)), rows)


def _column(name: str, kind: str) -> str:
    """The column that holds a dimension."""
    return "group" if name == kind != "term" else name


def _check_names(records: Columns, name: str, kind: str, chosen: Iterable[Any]) -> None:
    """Every value that is asked for is one of some row: one that is misspelt would be an empty table.

    Raises:
        UnknownNameError: a value that is not.
    """
    of_kind = slice(None) if name in ("run", "term") else records["kind"].among((kind,)).nonzero()[0]
    column = records[_column(name, kind)].taken(of_kind)
    known = set(column.taken(grouped([column], len(column.values)).first).listed())
    for value in chosen:
        if known and value not in known:
            raise UnknownNameError(name, value, known)


def _taken(records: Columns, mask: NDArray[np.bool_]) -> Columns:
    index = mask.nonzero()[0]
    return {name: column.taken(index) for name, column in records.items()}


def _grouped(records: Columns, names: Sequence[str]) -> Groups:
    return grouped([records[name] for name in names], len(records["total"].values))


def _keys(records: Columns, names: Sequence[str], groups: Groups) -> list[tuple[Any, ...]]:
    if not names:
        return [()] * len(groups.first)
    return list(zip(*(records[name].taken(groups.first).listed() for name in names), strict=True))


def _known(records: Columns) -> list[str]:
    """Those of the columns in `KEPT` that any record has a value of."""
    return [name for name in KEPT if (missing := records[name].missing) is None or not missing.all()]


def _measures(records: Columns, groups: Groups) -> Iterator[dict[str, Any]]:
    """The sums of each group, and its mean where it has one."""
    import numpy as np

    kept = {name: groups.lists(np.array(records[name].listed(), dtype=object)) for name in _known(records)}
    sums = [groups.lists(records[name].values) for name in ("total", "count", "weight", "contribution")]
    ratio = groups.lists(records["form"].among(("ratio",)))
    # One number a term and form: totals of two terms are in different units, and their quotient the mean of nothing.
    terms = np.asarray(records["term"].values, np.int64) * (len(records["form"].names) + 1) + records["form"].values
    lists = enumerate(zip(*sums, ratio, groups.lists(terms), strict=True))
    for position, (totals, counts, weights, contributions, ratios, term) in lists:
        total, count, weight = exact_sum(totals), sum(counts), exact_sum(weights)
        alone = min(term) == max(term)
        mean = mean_of(total, count, weight, ratios[0]) if alone else None
        values = (total, count, weight, mean, exact_sum(contributions), None)
        found = {name: merged(name, lists[position], counts, alone) for name, lists in kept.items()}
        yield dict(zip(MEASURES, values, strict=True)) | found


def merged(name: str, values: Sequence[Any], counts: Sequence[int], alone: bool = True) -> Any:
    """What rows have together of a column in `KEPT`; None where one that counts does not know it.

    Args:
        name: of the column.
        values: [N] of the rows.
        counts: [N] their counts: a row that counts nothing has no smallest element to know.
        alone: the rows are of one term. Elements of several are in different units, and none of them is the smallest.

    >>> merged("masked", [3, 4], [1, 0]), merged("minimum", [0.5, None], [4, 0]), merged("squares", [0.5, None], [4, 1])
    (7, 0.5, None)
    """
    if name == "masked":
        return None if None in values else sum(values)
    known = [value for value, count in zip(values, counts, strict=True) if count or value is not None]
    if not alone or not known or None in known:
        return None
    if name == "squares":
        return exact_sum(known)
    # A comparison with NaN is false: min and max would keep it or lose it by its place.
    if any(value != value for value in known):
        return math.nan
    return min(known) if name == "minimum" else max(known)


def mean_of(total: float, count: int, weight: float, ratio: bool) -> float | None:
    """The mean of the sums of rows of one term: over the count, for a ratio over the weight; None over nothing.

    >>> mean_of(6.0, 4, 3.0, ratio=False), mean_of(6.0, 4, 3.0, ratio=True), mean_of(0.0, 0, 0.0, ratio=False)
    (1.5, 2.0, None)
    """
    divisor = weight if ratio else count
    return total / divisor if divisor else None


def exact_sum(values: Iterable[float]) -> float:
    """The correctly rounded sum, whatever the order; follows IEEE rules where a value is not finite.

    >>> exact_sum([1e16, 1.0, -1e16])
    1.0
    """
    listed = list(values)
    try:
        return math.fsum(listed)
    except (ValueError, OverflowError):
        return sum(listed)


def _group_kind(records: Columns, by: Sequence[str], where: Mapping[str, Any]) -> str:
    kinds = dict.fromkeys((*GROUP_KINDS, *(name for name in records["kind"].names if name != "term")))
    for name in (*by, *where):
        if name not in ROW_DIMENSIONS and name not in kinds:
            raise UnknownNameError("dimension of the ledger", name, (*ROW_DIMENSIONS, *kinds))
    if len(set(by)) < len(by):
        raise InputError(f"A table has each dimension once; received by={list(by)!r}.")
    wanted = dict.fromkeys(name for name in (*by, *where) if name in kinds)
    if not wanted and ("presence" in by or "presence" in where):
        present = _taken(records, ~records["presence"].among(("",)))
        wanted = dict.fromkeys(name for (name,) in _keys(present, ["kind"], _grouped(present, ["kind"])))
    if len(wanted) > 1:
        names = ", ".join(wanted)
        raise InputError(f"Rows are grouped by one kind at a time; received {names}. Name one of them in `by`.")
    return next(iter(wanted), "term")


def _accepted(value: Any) -> Collection[Any]:
    if isinstance(value, range):
        return value
    return frozenset(value) if isinstance(value, list | tuple | set | frozenset) else frozenset((value,))


def _ordered(keys: Iterable[tuple[Any, ...]], by: Sequence[str]) -> list[tuple[Any, ...]]:
    """Epochs and steps by number, splits and presence in their usual order, the rest as first met."""
    listed = list(keys)
    ranks: list[dict[Any, Any]] = []
    for position, name in enumerate(by):
        met = dict.fromkeys(key[position] for key in listed)
        if name in ("epoch", "step"):
            ranks.append({value: -1 if value is None else value for value in met})
        else:
            fixed = _FIXED_ORDER.get(name, {})
            ranks.append({value: fixed.get(value, len(fixed) + order) for order, value in enumerate(met)})
    return sorted(listed, key=lambda key: tuple(rank[value] for rank, value in zip(ranks, key, strict=True)))


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool], width: int = 80) -> str:
    """Lay out cells as text in columns, numbers to the right; long names are shortened to stay within `width`.

    Args:
        columns: the headings.
        rows: cells, already text, one a column.
        numeric: whether a column holds numbers, which are never shortened.
        width: characters a line, kept where shortening names can keep it.

    >>> print(aligned(("class", "IoU"), [("road", "0.9"), ("sign", "0.06")], (False, True)))
    class   IoU
    road    0.9
    sign   0.06
    """
    lines = [[clean(cell) for cell in line] for line in (columns, *rows)]
    widths = [max(cell_width(line[i]) for line in lines) for i in range(len(columns))]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        longest = max((i for i, n in enumerate(numeric) if not n), key=lambda i: widths[i], default=None)
        if longest is None or widths[longest] <= SHORTEST_NAME:
            break
        widths[longest] -= 1
    laid = []
    for line in lines:
        cells = [_pad(cell, size, right) for cell, size, right in zip(line, widths, numeric, strict=True)]
        laid.append("  ".join(cells).rstrip())
    return "\n".join(laid)


def clean(text: str) -> str:
    """The text without control characters, which could move the cursor or hide what follows."""
    return "".join(c if c.isprintable() or c in _JOINERS else "\N{REPLACEMENT CHARACTER}" for c in text)


def cell_width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 or c in _JOINERS for c in text)


def shortened(text: str, width: int) -> str:
    """The text, cut in the middle where it is wider than `width`, so that names keep both ends.

    >>> shortened("binary_crossentropy", 12)
    'binary…tropy'
    """
    if cell_width(text) <= width:
        return text
    head, tail = text, ""
    for size in range(len(text), 0, -1):
        head, tail = text[: (size + 1) // 2], text[len(text) - size // 2 :]
        if cell_width(head) + 1 + cell_width(tail) <= width:
            break
    return f"{head}…{tail}"


def _pad(text: str, width: int, right: bool) -> str:
    short = text if right else shortened(text, width)
    space = " " * max(0, width - cell_width(short))
    return space + short if right else short + space


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return DASH
    if column in ("epoch", "step"):
        return str(value)
    return significant(value) if _is_number(value) else str(value)
