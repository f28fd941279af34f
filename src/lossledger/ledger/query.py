"""SQL on a ledger: one SELECT, on copies of its tables in memory, by a DuckDB that reaches nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lossledger.errors import InputError, UnknownNameError
from lossledger.ledger.columns import Columns
from lossledger.ledger.segments import connected, connection_errors, load
from lossledger.ledger.table import Table

if TYPE_CHECKING:
    import duckdb

# In this order: without external access the folder for temporary files cannot be set, and the lock is last.
_CLOSED = (
    "SET python_enable_replacements = false",
    "SET temp_directory = ''",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)
# What DuckDB says first of a table that does not exist; what follows suggests tables of its own.
_NO_TABLE = re.compile(r'Catalog Error: Table with name "?(.+?)"? does not exist')


def answer(
    sql: str, tables: Mapping[str, Columns], views: Mapping[str, str] | None = None, others: Iterable[str] = ()
) -> Table:
    """The result of one SELECT on `tables`, and on `views` over them by name; see `Ledger.query`.

    `others` are tables that exist and that this query does not name.
    """
    with connected() as connection:
        for name, columns in tables.items():
            load(connection, name, columns)
        for name, view in (views or {}).items():
            connection.execute(f'CREATE VIEW "{name}" AS {view}')
        for setting in _CLOSED:
            connection.execute(setting)
        try:
            result = connection.execute(_select(connection, sql))
            names = tuple(column[0] for column in result.description or ())
            records = result.fetchall()
        except connection_errors() as error:
            if isinstance(error, InputError):
                raise
            if unknown := _NO_TABLE.match(str(error)):
                known = {*tables, *(views or ()), *others}
                raise UnknownNameError("table", unknown[1], known, keras="query: unknown table") from error
            raise InputError(f"query: DuckDB refuses {sql!r}: {error}") from error
    if len(set(names)) < len(names):
        raise InputError(f"query: each column needs a name of its own; received {', '.join(names)}. Name them with AS.")
    return Table(names, [dict(zip(names, record, strict=True)) for record in records])


def _select(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    import duckdb

    statements = connection.extract_statements(sql)
    found = [statement.type for statement in statements]
    if found != [duckdb.StatementType.SELECT]:
        received = ", ".join(kind.name for kind in found) or "nothing"
        raise InputError(f"query: expected one SELECT (or WITH … SELECT); received {received} in {sql!r}.")
    return statements[0]
