"""The files of a run folder: `run.json` and append-only Parquet segments.

A file is written under a temporary name in its own folder, synced to the disk and renamed, so that a reader sees
whole files only and a crash loses at most what was never saved.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossledger.errors import LedgerError

if TYPE_CHECKING:
    import duckdb

SCHEMA_VERSION = 1
RUN_FILE = "run.json"


def write_segment(folder: Path, columns: Mapping[str, str], records: Sequence[tuple[Any, ...]]) -> Path:
    """Write records as one new Parquet segment in `folder`, and return its path.

    Args:
        folder: where segments of this kind lie; made if missing.
        columns: SQL type by column name, in the order of the records' fields.
        records: at least one tuple, one value a column.

    Raises:
        LedgerError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary, final = _reserve(folder)
        try:
            _copy_to_parquet(temporary, columns, records)
            publish(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LedgerError(
            f"Cannot write a segment in {folder}: {error}. Check the disk and the permissions."
        ) from error
    return final


def read_segments(
    folder: Path, columns: Mapping[str, str], optional: frozenset[str] = frozenset()
) -> list[tuple[Any, ...]]:
    """Read every segment of `folder`, in the order of writing, as tuples in the order of `columns`.

    Args:
        folder: where segments of one kind lie; a missing folder holds none.
        columns: SQL type by column name.
        optional: the columns in which NULL is allowed.

    Raises:
        LedgerError: a file that is not a whole Parquet segment of this schema; the message names it.
    """
    paths = [folder / name for name in segment_names(folder)]
    if not paths:
        return []
    records: list[tuple[Any, ...]] = []
    with _connection() as connection:
        for path in paths:
            records.extend(_read_segment(connection, path, columns, optional))
    return records


def segment_names(folder: Path) -> list[str]:
    """Names of the segments of `folder`, in the order of writing; a missing folder holds none."""
    names = (path.name for path in folder.glob("*.parquet")) if folder.is_dir() else ()
    return sorted((n for n in names if not n.startswith(".")), key=lambda name: (_number(name), name))


def set_aside(run: Path, kept: Mapping[str, Collection[str]]) -> Path | None:
    """Move the files that a resumed run supersedes to `superseded/<n>`; nothing is deleted.

    Args:
        run: folder of the run.
        kept: by folder inside it, the names of the files that stay.

    Returns:
        where they went; `None` if there were none.

    Raises:
        LedgerError: the folder cannot be written to.
    """
    inside = {kind: (run / kind).iterdir() if (run / kind).is_dir() else () for kind in kept}
    moving = [path for kind, paths in inside.items() for path in paths if path.name not in kept[kind]]
    if not moving:
        return None
    try:
        target = next(path for n in count(1) if not (path := run / "superseded" / f"{n:04d}").exists())
        for path in moving:
            (target / path.parent.name).mkdir(parents=True, exist_ok=True)
            os.replace(path, target / path.parent.name / path.name)
        _sync(*{path.parent for path in moving}, run)
    except OSError as error:
        raise LedgerError(f"Cannot move files in {run}: {error}. Check the disk and the permissions.") from error
    return target


def write_run_file(folder: Path, run: str, info: Mapping[str, Any]) -> None:
    """Write `run.json`, or add what is new in `info` to the one that is there; its other entries are kept.

    Raises:
        LedgerError: the file that is there cannot be read, or was written by a newer version.
    """
    path = folder / RUN_FILE
    known = read_run_file(folder) if path.exists() else None
    name = known["run"] if known else run
    merged = {**(known["info"] if known else {}), **_plain(info)}
    if known and merged == known["info"]:
        return
    content = json.dumps({"schema": SCHEMA_VERSION, "run": name, "info": merged}, indent=1, ensure_ascii=False)
    temporary = folder / f".{RUN_FILE}.{_writer()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content + "\n", encoding="utf-8", errors="backslashreplace")
        publish(temporary, path)
    except OSError as error:
        raise LedgerError(f"Cannot write {path}: {error}. Check the disk and the permissions.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Read `run.json`: a dict with `schema` (int), `run` (str) and `info` (dict).

    Raises:
        LedgerError: not JSON, not a run file, or written by a newer version of the library.
    """
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"Cannot read {path} as JSON: {error}. Restore the file or remove the folder.") from error
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise LedgerError(f"{path} is not the file of a run: expected an integer 'schema'. Is this a run folder?")
    if content["schema"] > SCHEMA_VERSION:
        raise LedgerError(
            f"{path} has schema {content['schema']}; this version of lossledger reads up to {SCHEMA_VERSION}. "
            "Upgrade lossledger to open it."
        )
    run, info = content.get("run"), content.get("info")
    if not isinstance(run, str) or not isinstance(info, dict):
        raise LedgerError(f"{path} is not the file of a run: expected a string 'run' and an object 'info'.")
    return {"schema": content["schema"], "run": run, "info": info}


def _read_segment(
    connection: duckdb.DuckDBPyConnection, path: Path, columns: Mapping[str, str], optional: frozenset[str]
) -> list[tuple[Any, ...]]:
    import duckdb

    # hive_partitioning would turn a folder named `lr=0.1` into a column.
    source = f"read_parquet({quote_path(path)}, hive_partitioning = false)"
    try:
        present = {row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
        missing = [name for name in columns if name not in present]
        if not missing:
            casts = ", ".join(f'CAST("{name}" AS {kind})' for name, kind in columns.items())
            records = connection.execute(f"SELECT {casts} FROM {source}").fetchall()
    except (duckdb.Error, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LedgerError(
            f"{path} is not a whole ledger segment: {reason} "
            "The other segments are sound; move this file out of the folder to read them."
        ) from error
    if missing:
        raise LedgerError(
            f"{path} is not a ledger segment: it lacks the columns {', '.join(missing)}. "
            "Move this file out of the folder to read the others."
        )
    _refuse_nulls(path, columns, optional, records)
    return records


def _refuse_nulls(
    path: Path, columns: Mapping[str, str], optional: frozenset[str], records: list[tuple[Any, ...]]
) -> None:
    for position, name in enumerate(columns):
        if name not in optional and any(record[position] is None for record in records):
            raise LedgerError(
                f"{path} is not a ledger segment: NULL in the column {name!r}. "
                "Move this file out of the folder to read the others."
            )


def _copy_to_parquet(path: Path, columns: Mapping[str, str], records: Sequence[tuple[Any, ...]]) -> None:
    import duckdb

    selected = ", ".join(f'unnest(CAST(? AS {kind}[])) AS "{name}"' for name, kind in columns.items())
    values = [list(column) for column in zip(*records, strict=True)]
    # The name is reserved already, so DuckDB must not add a temporary file of its own.
    options = "FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false"
    try:
        with _connection() as connection:
            connection.execute(f"CREATE TABLE segment AS SELECT {selected}", values)
            connection.execute(f"COPY segment TO {_quote(str(path))} ({options})")
    except (duckdb.Error, ValueError) as error:
        raise LedgerError(
            f"Cannot write a segment in {path.parent}: {error}. Check the types of the rows' values, and the disk."
        ) from error


@contextmanager
def _connection() -> Iterator[duckdb.DuckDBPyConnection]:
    import duckdb

    # A segment must never make DuckDB fetch an extension from the network.
    config: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    connection = duckdb.connect(":memory:", config=config)
    try:
        yield connection
    finally:
        connection.close()


def _reserve(folder: Path) -> tuple[Path, Path]:
    """A temporary name that is ours alone, and the segment name that goes with it."""
    # Later segments have higher numbers, whichever process writes them.
    for number in count(1 + max(map(_number, segment_names(folder)), default=0)):
        final = folder / f"{_writer()}-{number:06d}.parquet"
        if final.exists():
            continue
        temporary = folder / f".{final.name}.tmp"
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        # Another writer of this name may have published between the two lines above.
        if not final.exists():
            return temporary, final
        temporary.unlink()
    raise AssertionError("unreachable: numbers do not end")


def publish(temporary: Path, final: Path) -> None:
    """Put a complete file in its place: its content is on the disk before its name is."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    _sync(final.parent, final.parent.parent)


def _sync(*folders: Path) -> None:
    if os.name == "posix":
        for folder in folders:
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _number(name: str) -> int:
    """The number at the end of a segment's name; 0 for a name that is not ours."""
    digits = name.removesuffix(".parquet").rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _writer() -> str:
    rank = os.environ.get("RANK", "0")
    return f"rank{rank if rank.isdecimal() else '0'}-process{os.getpid()}"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def quote_path(path: Path) -> str:
    """A path as a SQL string for DuckDB's readers, in which `*`, `?` and `[` mean themselves."""
    return _quote("".join(f"[{c}]" if c in "*?[" else c for c in str(path)))


def _plain(value: Any) -> Any:
    """The nearest JSON value: keys become text, arrays lists, numbers that JSON lacks text."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
