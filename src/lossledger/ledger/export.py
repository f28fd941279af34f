"""Columns and rows in the forms of other libraries: pandas, Arrow, CSV. Each is loaded when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossledger.errors import LedgerError
from lossledger.ledger.columns import TEXT, Columns
from lossledger.ledger.segments import connected, connection_errors, load, quote

if TYPE_CHECKING:
    import pandas


def to_pandas(columns: Columns) -> pandas.DataFrame:
    """Columns as a DataFrame: text as categories, NaN where a number has no value."""
    import numpy as np
    import pandas

    found: dict[str, Any] = {}
    for name, column in columns.items():
        if column.kind == TEXT:
            found[name] = pandas.Categorical.from_codes(column.values, categories=list(column.names))
        elif column.missing is None:
            found[name] = column.values
        else:
            found[name] = np.where(column.missing, np.nan, column.values)
    return pandas.DataFrame(found, copy=False)


def to_arrow(columns: Columns) -> Any:
    """Columns as a `pyarrow.Table`: text as a dictionary, null where there is no value.

    Raises:
        ImportError: pyarrow is not installed.
    """
    arrow = _pyarrow()
    found = {}
    for name, column in columns.items():
        if column.kind == TEXT:
            found[name] = arrow.DictionaryArray.from_arrays(column.values, arrow.array(column.names, arrow.string()))
        else:
            found[name] = arrow.array(column.values, mask=column.missing, from_pandas=False)
    return arrow.table(found)


def rows_to_arrow(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Any:
    """The rows of a table as a `pyarrow.Table`.

    Raises:
        ImportError: pyarrow is not installed.
    """
    return _pyarrow().table({name: [row[name] for row in rows] for name in columns})


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("to_arrow: pyarrow is not installed. Install it: pip install 'lossledger[arrow]'.") from error
    return pyarrow


def to_csv(columns: Columns, path: Path) -> Path:
    """Columns as CSV with a heading: numbers with every digit, nothing where there is no value.

    Raises:
        LedgerError: the file cannot be written.
    """
    try:
        with connected() as connection:
            load(connection, "exported", columns)
            connection.execute(f"COPY exported TO {quote(str(path))} (FORMAT csv, HEADER, USE_TMP_FILE true)")
    except connection_errors() as error:
        raise LedgerError(f"Cannot write {path}: {error}. Check the folder, the disk and the permissions.") from error
    return path
