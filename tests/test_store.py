"""Segments: damage is found before it is read, older ones still open, hostile ones end in a named error."""

from __future__ import annotations

import hashlib
import math
import random
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest

from lossledger.errors import LedgerError
from lossledger.ledger import Ledger, MetricRow, Row
from lossledger.ledger import segments as store
from lossledger.ledger.columns import encoded, grouped, joined
from lossledger.ledger.rows import ROW_COLUMNS


def row(epoch: int, total: float, group: str = "", step: int | None = None) -> Row:
    kind = "class" if group else "term"
    return Row("training", epoch, step, "bce", "data", "linear", kind, group, "", total, 4, 4.0, 1.0, 4.0, total / 4, 0)


def saved(folder: Path) -> Path:
    """A run of 30 rows in one segment, whose path is returned."""
    ledger = Ledger("run")
    ledger.append([row(e, e / 7, g, s) for e in range(1, 6) for g in ("", "a", "b") for s in (None, e)])
    ledger.save(folder)
    return next((folder / "ledger").iterdir())


FIRST = "* EXCLUDE (minimum, maximum, squares, masked)"


def as_version_1(path: Path) -> Path:
    """The segment as version 1 wrote it: without checksum, without version, without the spread of elements."""
    old = path.with_name("rank0-process1-000001.parquet")
    duckdb.connect().execute(f"COPY (SELECT {FIRST} FROM '{path}') TO '{old}' (FORMAT parquet, COMPRESSION zstd)")
    path.unlink()
    return old


def damaged(content: bytes, source: random.Random) -> bytes:
    """The content with bits flipped, cut, spliced, overwritten with huge numbers, or replaced."""
    data = bytearray(content)
    at = source.randrange(len(data))
    match source.randrange(6):
        case 0:
            data[at] ^= 1 << source.randrange(8)
        case 1:
            del data[at:]
        case 2:
            other = source.randrange(len(data))
            data[at : at + 40] = data[other : other + 40]
        case 3:
            data[at : at + 9] = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
        case 4:
            # In the footer, where sizes and types are declared.
            for _ in range(3):
                data[-source.randrange(9, min(1500, len(data)))] = source.randrange(256)
        case _:
            data = bytearray(b"PAR1" + source.randbytes(at) + len(content).to_bytes(4, "little") + b"PAR1")
    return bytes(data)


def damages_are_all_found(folder: Path, seeds: range) -> None:
    path = saved(folder)
    content = path.read_bytes()
    for seed in seeds:
        wrong = damaged(content, random.Random(seed))
        if wrong == content:
            continue
        path.write_bytes(wrong)
        with pytest.raises(LedgerError, match=path.name):
            Ledger.open(folder)
    path.write_bytes(content)
    assert len(Ledger.open(folder)) == 30


def test_no_damaged_file_is_read(tmp_path: Path) -> None:
    damages_are_all_found(tmp_path, range(300))


@pytest.mark.slow
def test_no_damaged_file_is_read_in_thousands(tmp_path: Path) -> None:
    damages_are_all_found(tmp_path, range(10_000, 13_000))


HOSTILE = """
import hashlib, random, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import LedgerError, Ledger, damaged
folder, path, sealed = Path({folder!r}), Path({path!r}), {sealed}
content, read = path.read_bytes(), 0
path.unlink()
for seed in range({first}, {last}):
    wrong = damaged(content, random.Random(seed))
    name = f"x-000001-{{hashlib.sha256(wrong).hexdigest()}}.parquet" if sealed else "x-000001.parquet"
    target = path.with_name(name)
    target.write_bytes(wrong)
    try:
        read += len(Ledger.open(folder).rows) >= 0
    except LedgerError as error:
        assert name in str(error) or str(path.parent) in str(error), error
    target.unlink()
print("done", read)
"""


def hostile_files_do_no_harm(folder: Path, sealed: bool, first: int, last: int) -> None:
    """Files that are damaged and yet carry a fitting checksum, or none, in a process that must survive them."""
    path = saved(folder) if sealed else as_version_1(saved(folder))
    names = dict(tests=str(Path(__file__).parent), folder=str(folder), path=str(path), sealed=sealed)
    code = HOSTILE.format(**names, first=first, last=last)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.startswith("done"), (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize("sealed", [True, False])
def test_hostile_files_do_no_harm(tmp_path: Path, sealed: bool) -> None:
    hostile_files_do_no_harm(tmp_path, sealed, 0, 150)


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [True, False])
def test_thousands_of_hostile_files_do_no_harm(tmp_path: Path, sealed: bool) -> None:
    hostile_files_do_no_harm(tmp_path, sealed, 20_000, 21_500)


def test_a_segment_of_version_1_opens_and_grows(tmp_path: Path) -> None:
    before = Ledger.open(saved(tmp_path).parent.parent).rows
    (path,) = (tmp_path / "ledger").iterdir()
    old = as_version_1(path)
    ledger = Ledger.open(tmp_path)
    assert ledger.rows == before
    ledger.append([row(6, 1.0)])
    ledger.flush()
    names = store.segment_names(tmp_path / "ledger")
    assert names[0] == old.name and "-000002-" in names[1]
    assert Ledger.open(tmp_path).rows == (*before, row(6, 1.0))


def test_a_segment_says_its_version(tmp_path: Path) -> None:
    path = saved(tmp_path)
    said = duckdb.connect().execute(f"SELECT key, value FROM parquet_kv_metadata('{path}')").fetchall()
    assert (b"lossledger_segment", b"4") in said


@pytest.mark.parametrize("version", [2, 3, 4])
def test_columns_that_came_later_have_no_value_in_older_segments_only(tmp_path: Path, version: int) -> None:
    path = saved(tmp_path)
    before = Ledger.open(tmp_path).rows
    old = path.with_name("old.parquet")
    options = f"FORMAT parquet, KV_METADATA {{lossledger_segment: '{version}'}}"
    columns = "* EXCLUDE (masked)" if version == 3 else FIRST
    duckdb.connect().execute(f"COPY (SELECT {columns} FROM '{path}') TO '{old}' ({options})")
    path.unlink()
    old.rename(old.with_name(f"old-000001-{hashlib.sha256(old.read_bytes()).hexdigest()}.parquet"))
    if version == 4:
        with pytest.raises(LedgerError, match="it lacks the columns minimum, maximum, squares, masked"):
            Ledger.open(tmp_path)
        return
    assert Ledger.open(tmp_path).rows == before
    # A new segment beside it has them.
    ledger = Ledger.open(tmp_path)
    new = Row(
        **{name: getattr(row(6, 1.0), name) for name in ROW_COLUMNS}
        | {"minimum": -1.5, "maximum": math.inf, "masked": 5}
    )
    ledger.append([new])
    ledger.flush()
    opened = Ledger.open(tmp_path)
    assert opened.rows == (*before, new)
    # What old rows do not know is never 0, not in a sum with new ones either.
    assert [row["masked"] for row in opened.table(["epoch"])] == [*[None] * 5, 5]
    assert opened.table(["term"]).rows[0]["masked"] is None
    known = opened.query("SELECT count(masked) AS known, count(*) AS rows FROM ledger").rows
    assert known == [{"known": 1, "rows": 31}]


def test_a_segment_without_its_checksum_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.rename(path.with_name("renamed-000001.parquet"))
    with pytest.raises(LedgerError, match=r"renamed-000001.parquet.*it was renamed"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize("version", ["5", "99", "new", "", "-1", "9" * 50])
def test_a_segment_of_another_version_is_refused(tmp_path: Path, version: str) -> None:
    path = saved(tmp_path)
    newer = path.with_name("newer-000002.parquet")
    options = f"FORMAT parquet, KV_METADATA {{lossledger_segment: '{version}'}}"
    duckdb.connect().execute(f"COPY (SELECT * FROM '{path}') TO '{newer}' ({options})")
    with pytest.raises(LedgerError, match=r"newer-000002.parquet.*upgrade lossledger"):
        Ledger.open(tmp_path)


def test_more_records_than_any_run_writes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.setattr(store, "MOST_RECORDS", 29)
    with pytest.raises(LedgerError, match="declares 30 records"):
        Ledger.open(tmp_path)


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_store import Ledger, row
ledger = Ledger("run")
for epoch in range(1, 31):
    ledger.append([row(epoch, 1.0), row(epoch, 1.0, "a")])
    ledger.save({folder!r})
"""


def test_a_reader_sees_a_prefix_of_what_another_process_writes(tmp_path: Path) -> None:
    code = WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", code])
    seen = []
    while writer.poll() is None:
        if (tmp_path / "run.json").exists():
            rows = Ledger.open(tmp_path).rows
            assert rows == tuple(row(e, 1.0, g) for e in range(1, len(rows) // 2 + 1) for g in ("", "a"))
            seen.append(len(rows))
    assert writer.returncode == 0 and seen == sorted(seen)
    assert len(Ledger.open(tmp_path)) == 60


def test_a_process_killed_while_it_writes_loses_no_sealed_segment(tmp_path: Path) -> None:
    code = WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path)).replace("31", "100000")
    writer = subprocess.Popen([sys.executable, "-c", code])
    while len(store.segment_names(tmp_path / "ledger")) < 5:
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    ledger = Ledger.open(tmp_path)
    assert len(ledger) >= 10 and ledger.balance() == [] and ledger.loss("training", 5) == 0.25


def test_opened_and_appended_rows_are_one_ledger(tmp_path: Path) -> None:
    saved(tmp_path)
    ledger = Ledger.open(tmp_path)
    first = ledger.table(by=["epoch", "class"]).rows
    ledger.append([row(1, 0.5, "new"), row(9, math.nan, "b")], [MetricRow("training", 1, "iou", "a", math.nan)])
    again = Ledger()
    again.append(ledger.rows)
    assert ledger.table(by=["epoch", "class"]).rows[: len(first) + 1] != first
    assert repr(ledger.table(by=["epoch", "class"]).rows) == repr(again.table(by=["epoch", "class"]).rows)
    assert [e.epoch for e in ledger.balance()] == [e.epoch for e in again.balance()] != []


def test_roll_ups_of_opened_rows_are_exact(tmp_path: Path) -> None:
    values = [1e16, 1.0, -1e16, 1.0, 1e-3]
    ledger = Ledger("run")
    ledger.append([row(1, value) for value in values])
    (line,) = Ledger.open(ledger.save(tmp_path)).table(by=["term"]).rows
    assert line["total"] == math.fsum(values) and line["count"] == 20 and type(line["count"]) is int


def test_a_range_of_any_size_selects() -> None:
    ledger = Ledger()
    ledger.append([row(1, 1.0, step=3), row(1, 2.0, step=4), row(1, 4.0)])
    (line,) = ledger.table(by=["term"], step=range(4, 10**12)).rows
    assert line["total"] == 2.0


@pytest.mark.parametrize("value", ["1", 1.5, 2**63, 2**70, None, [1], True])
def test_values_of_another_type_are_refused(value: object) -> None:
    with pytest.raises(LedgerError, match="'epoch' of the ledger holds BIGINT only"):
        encoded("BIGINT", [value], "epoch")
    if not isinstance(value, str):
        with pytest.raises(LedgerError, match="VARCHAR only"):
            encoded("VARCHAR", [value], "term")


def test_groups_come_as_first_met() -> None:
    text = joined((encoded("VARCHAR", ["b", "a"], "x"), encoded("VARCHAR", ["c", "b", "a"], "x")))
    number = encoded("BIGINT", [1, None, 1, 1, 0], "y", optional=True)
    assert text.listed() == ["b", "a", "c", "b", "a"] and number.listed() == [1, None, 1, 1, 0]
    found = grouped([text, number], 5)
    assert found.lists(np.arange(5)) == [[0, 3], [1], [2], [4]]


def test_the_name_is_the_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert path.stem.rpartition("-")[2] == hashlib.sha256(path.read_bytes()).hexdigest()
