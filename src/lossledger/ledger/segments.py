"""The files of a run folder: `run.json` and append-only Parquet segments.

A file is written under a temporary name in its own folder, synced to the disk and renamed, so that a reader sees
whole files only and a crash loses at most what was never saved. A segment's name ends in the checksum of its bytes:
name and content appear in one rename, and a damaged file is found before its content is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossledger.errors import LedgerError
from lossledger.ledger.columns import REAL, TEXT, Column, Columns

if TYPE_CHECKING:
    import duckdb

# Of run.json.
SCHEMA_VERSION = 1
# Of a segment: version 1 had no checksum in its name, and did not say its version; 2 had no spread of the elements, 3
# no count of what was masked.
SEGMENT_VERSION = 4
# Columns that came later, with the first version that has them; in older segments they have no value.
LATER = {"minimum": 3, "maximum": 3, "squares": 3, "masked": 4}
RUN_FILE = "run.json"
# More than a run of years writes at once; a hostile file may declare any number.
MOST_RECORDS = 10**8
_NAME = re.compile(r"(?P<writer>.*)-(?P<number>\d+)-(?P<digest>[0-9a-f]{64})\.parquet", re.DOTALL)
_OLD_NAME = re.compile(r".*-(?P<number>\d+)\.parquet", re.DOTALL)
_MOVE = "The other segments are sound; move this file out of the folder to read them."


def write_segment(folder: Path, columns: Columns) -> Path:
    """Write records as one new Parquet segment in `folder`, and return its path.

    Args:
        folder: where segments of this kind lie; made if missing.
        columns: the records, at least one, by column name.

    Raises:
        LedgerError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary, stem = _reserve(folder)
        try:
            _copy_to_parquet(temporary, columns)
            final = folder / f"{stem}-{_digest(temporary)}.parquet"
            publish(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LedgerError(
            f"Cannot write a segment in {folder}: {error}. Check the disk and the permissions."
        ) from error
    return final


def read_segments(folder: Path, kinds: Mapping[str, str], optional: frozenset[str] = frozenset()) -> Columns | None:
    """Read every segment of `folder`, in the order of writing.

    Args:
        folder: where segments of one kind lie; a missing folder holds none.
        kinds: SQL type by column name.
        optional: the columns in which NULL is allowed.

    Returns:
        the records by column name; None where there is no segment.

    Raises:
        LedgerError: a file that is not a whole Parquet segment of this schema; the message names it.
    """
    paths = [folder / name for name in segment_names(folder)]
    if not paths:
        return None
    typed = ", ".join(f'"{name}" {kind}{"" if name in optional else " NOT NULL"}' for name, kind in kinds.items())
    with connected() as connection:
        connection.execute(f"CREATE TABLE records ({typed})")
        for path in paths:
            _refuse_damage(path)
            _insert(connection, path, kinds)
        try:
            return {name: _column(connection, name, kind, name in optional) for name, kind in kinds.items()}
        except connection_errors() as error:
            raise LedgerError(f"Cannot read the segments in {folder}: {error}. {_MOVE}") from error


def connection_errors() -> tuple[type[Exception], ...]:
    """What DuckDB raises."""
    import duckdb

    return (duckdb.Error, ValueError, RuntimeError, MemoryError, OSError)


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
    merged = {**(known["info"] if known else {}), **plain(info)}
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


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_damage(path: Path) -> None:
    """Refuse a file whose bytes are not those that were sealed, before anything reads them."""
    name = _NAME.fullmatch(path.name)
    if name is None:
        return
    try:
        found = _digest(path)
    except OSError as error:
        raise LedgerError(f"{path} is not a whole ledger segment: {error}. {_MOVE}") from error
    if found != name["digest"]:
        raise LedgerError(
            f"{path} is not a whole ledger segment: its content has the SHA-256 {found[:12]}…, its name says "
            f"{name['digest'][:12]}…, so that it was damaged or renamed. {_MOVE}"
        )


def _insert(connection: duckdb.DuckDBPyConnection, path: Path, kinds: Mapping[str, str]) -> None:
    """Add the records of one file to the table `records`; columns that came later have no values in older files."""
    import duckdb

    quoted = quote_path(path)
    # hive_partitioning would turn a folder named `lr=0.1` into a column.
    source = f"read_parquet({quoted}, hive_partitioning = false)"
    wrong = ""
    try:
        said = dict(connection.execute(f"SELECT key, value FROM parquet_kv_metadata({quoted})").fetchall())
        version = said.get(b"lossledger_segment", b"1")
        wrong = _refused(path, version)
        described = connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
        lacking = set(kinds) - {column[0] for column in described}
        number = SEGMENT_VERSION if wrong else int(version)
        missing = [name for name in kinds if name in lacking and number >= LATER.get(name, 1)]
        (records,) = connection.execute(f"SELECT sum(num_rows) FROM parquet_file_metadata({quoted})").fetchall()[0]
        if missing and not wrong:
            wrong = f"it lacks the columns {', '.join(missing)}"
        elif records > MOST_RECORDS:
            wrong = wrong or f"it declares {records} records, more than {MOST_RECORDS}"
        elif not wrong:
            values = {name: "NULL" if name in lacking else f'"{name}"' for name in kinds}
            casts = ", ".join(f"CAST({values[name]} AS {kind})" for name, kind in kinds.items())
            connection.execute(f"INSERT INTO records SELECT {casts} FROM {source}")
    except duckdb.ConstraintException as error:
        column = str(error).rpartition("records.")[2].split()[0]
        wrong = f"NULL in the column {column!r}"
    except connection_errors() as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LedgerError(f"{path} is not a whole ledger segment: {reason} {_MOVE}") from error
    if wrong:
        raise LedgerError(
            f"{path} is not a ledger segment: {wrong}. Move this file out of the folder to read the others."
        )


def _refused(path: Path, version: bytes) -> str:
    """Why a segment of this version cannot be read; empty if it can."""
    if not version.isdigit() or int(version) > SEGMENT_VERSION:
        said = version.decode(errors="replace")[:20]
        return f"it has version {said!r}, and this lossledger reads up to {SEGMENT_VERSION}; upgrade lossledger"
    if int(version) > 1 and not _NAME.fullmatch(path.name):
        return "it was renamed, so that its checksum is lost; give it back its name"
    return ""


def _column(connection: duckdb.DuckDBPyConnection, name: str, kind: str, optional: bool) -> Column:
    """One column of the table `records`."""
    if kind == TEXT:
        connection.execute(f'CREATE TYPE "names of {name}" AS ENUM (SELECT DISTINCT "{name}" FROM records)')
        found = connection.execute(f'SELECT unnest(enum_range(NULL::"names of {name}"))').fetchall()
        codes = f'enum_code(CAST("{name}" AS "names of {name}"))'
        values = connection.execute(f"SELECT {codes} AS x FROM records").fetchnumpy()["x"]
        return Column(kind, values, tuple(text for (text,) in found))
    read = connection.execute(f'SELECT coalesce("{name}", 0) AS x, "{name}" IS NULL AS m FROM records').fetchnumpy()
    return Column(kind, read["x"], (), read["m"] if optional else None)


def load(connection: duckdb.DuckDBPyConnection, table: str, columns: Columns) -> None:
    """Make a DuckDB table of records."""
    arrays, selected = {}, []
    for name, column in columns.items():
        arrays[name] = column.objects() if column.kind == TEXT else column.values
        value = f'"{name}"'
        if column.missing is not None:
            arrays[f"{name} missing"] = column.missing
        if column.kind == REAL:
            # DuckDB takes a NaN of NumPy for NULL.
            value = f"coalesce({value}, 'nan')"
        if column.missing is not None:
            value = f'CASE WHEN NOT "{name} missing" THEN {value} END'
        selected.append(f'CAST({value} AS {column.kind}) AS "{name}"')
    connection.register("loaded", arrays)
    connection.execute(f'CREATE TABLE "{table}" AS SELECT {", ".join(selected)} FROM loaded')
    connection.unregister("loaded")


def _copy_to_parquet(path: Path, columns: Columns) -> None:
    # The name is reserved already, so DuckDB must not add a temporary file of its own.
    options = (
        f"FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false, KV_METADATA {{lossledger_segment: '{SEGMENT_VERSION}'}}"
    )
    try:
        with connected() as connection:
            load(connection, "segment", columns)
            connection.execute(f"COPY segment TO {quote(str(path))} ({options})")
    except connection_errors() as error:
        raise LedgerError(
            f"Cannot write a segment in {path.parent}: {error}. Check the types of the rows' values, and the disk."
        ) from error


@contextmanager
def connected() -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB in memory that never fetches an extension."""
    import duckdb

    # A segment must never make DuckDB fetch an extension from the network.
    config: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    connection = duckdb.connect(":memory:", config=config)
    try:
        yield connection
    finally:
        connection.close()


def _reserve(folder: Path) -> tuple[Path, str]:
    """A temporary name that is ours alone, and the beginning of the segment's name that goes with it."""
    # Later segments have higher numbers, whichever process writes them.
    for number in count(1 + max(map(_number, segment_names(folder)), default=0)):
        stem = f"{_writer()}-{number:06d}"
        if _published(folder, stem):
            continue
        temporary = folder / f".{stem}.parquet.tmp"
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        # Another writer of this name may have published between the two lines above.
        if not _published(folder, stem):
            return temporary, stem
        temporary.unlink()
    raise AssertionError("unreachable: numbers do not end")


def _published(folder: Path, stem: str) -> bool:
    return any(name.startswith((f"{stem}-", f"{stem}.")) for name in segment_names(folder))


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
    """The number in a segment's name; 0 for a name that is not ours."""
    found = _NAME.fullmatch(name) or _OLD_NAME.fullmatch(name)
    return int(found["number"]) if found else 0


def _writer() -> str:
    rank = os.environ.get("RANK", "0")
    return f"rank{rank if rank.isdecimal() else '0'}-process{os.getpid()}"


def quote(text: str) -> str:
    """A text as a SQL string."""
    return "'" + text.replace("'", "''") + "'"


def quote_path(path: Path) -> str:
    """A path as a SQL string for DuckDB's readers, in which `*`, `?` and `[` mean themselves."""
    return quote("".join(f"[{c}]" if c in "*?[" else c for c in str(path)))


def plain(value: Any) -> Any:
    """The nearest JSON value: keys become text, arrays lists, numbers that JSON lacks text."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)
