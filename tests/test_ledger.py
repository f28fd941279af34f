"""The ledger: exact roll-ups, books that balance, and run folders that lose nothing."""

from __future__ import annotations

import contextlib
import doctest
import hashlib
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossledger.errors import InputError, LedgerError, UnknownNameError
from lossledger.ledger import Imbalance, Ledger, MetricRow, Row, Table
from lossledger.ledger.table import aligned, cell_width, significant


def row(total: float, count: int, weight: float | None = None, **fields: Any) -> Row:
    """A linear row of the term "bce" in epoch 1 whose divisor is 8, unless said otherwise."""
    values: dict[str, Any] = dict(split="training", epoch=1, step=None, term="bce", role="data", form="linear")
    values |= dict(kind="term", group="", presence="", coefficient=1.0, divisor=8.0, nonfinite=0)
    values |= dict(total=total, count=count, weight=float(count) if weight is None else weight) | fields
    return Row(**({"contribution": values["coefficient"] * total / values["divisor"]} | values))


def known() -> Ledger:
    """Two epochs of a linear term by class and presence, a ratio term and a regularizer; loss 1.25, then 0.75."""
    ledger = Ledger("known", {"seed": 3})
    for epoch, scale in ((1, 1.0), (2, 0.5)):
        shared: dict[str, Any] = {"epoch": epoch}
        a = {**shared, "kind": "class", "group": "a"}
        b = {**shared, "kind": "class", "group": "b"}
        rows = [
            row(4 * scale, 8, 10.0, **shared),
            row(1 * scale, 3, presence="present", **a),
            row(1 * scale, 3, presence="absent", **a),
            row(2 * scale, 1, 3.0, presence="present", **b),
            row(0.0, 1, presence="absent", **b),
        ]
        dice: dict[str, Any] = {"term": "dice", "form": "ratio"}
        rows += [
            row(3 * scale, 8, 6.0, **shared, **dice, contribution=0.5 * scale),
            row(1 * scale, 4, 4.0, **a, **dice, contribution=0.125 * scale),
            row(2 * scale, 4, 2.0, **b, **dice, contribution=0.375 * scale),
            row(0.25, 0, 0.0, **shared, term="l2", role="regularizer", divisor=1.0),
        ]
        iou = [MetricRow("training", epoch, "iou", "a", 0.5), MetricRow("training", epoch, "iou", "b", math.nan)]
        ledger.append(rows, iou)
    return ledger


def test_loss_is_the_sum_of_the_terms() -> None:
    ledger = known()
    assert ledger.loss("training", 1) == 1.25
    assert ledger.loss("training", 2) == ledger.loss() == 0.75
    with pytest.raises(InputError, match="its epochs of this split: 1, 2"):
        ledger.loss("training", 3)
    with pytest.raises(InputError, match=r"'test' loss .* none"):
        ledger.loss("test")


def test_loss_is_added_from_left_to_right() -> None:
    ledger = Ledger()
    ledger.append(row(0.0, 1, term=str(i), contribution=c) for i, c in enumerate((1e16, 1.0, 1.0, -1e16)))
    assert ledger.loss() == ((1e16 + 1.0) + 1.0) - 1e16 == 0.0


def test_table_by_term() -> None:
    table = known().table(by=["epoch", "term"], epoch=1)
    assert table.columns == ("epoch", "term", "total", "count", "weight", "mean", "contribution", "share")
    assert [line["term"] for line in table] == ["bce", "dice", "l2"]
    bce, dice, l2 = table
    assert (bce["total"], bce["count"], bce["weight"], bce["mean"]) == (4.0, 8, 10.0, 0.5)
    assert (dice["mean"], dice["contribution"], dice["share"]) == (0.5, 0.5, 0.4)
    assert l2["mean"] is None and l2["contribution"] == 0.25
    assert math.fsum(line["share"] for line in table) == 1.0


def test_table_by_class_and_presence() -> None:
    ledger = known()
    by_class = {line["class"]: line for line in ledger.table(by=["class"], term="bce", epoch=1)}
    assert by_class["a"]["mean"] == 2 / 6 and by_class["b"]["mean"] == 2 / 2
    assert by_class["b"]["weight"] == 4.0
    assert by_class["a"]["share"] == 0.25 / 1.25
    present = ledger.table(by=["class", "presence"], term="bce", epoch=2)
    assert [(line["class"], line["presence"], line["mean"]) for line in present] == [
        ("a", "present", 0.5 / 3),
        ("a", "absent", 0.5 / 3),
        ("b", "present", 1.0),
        ("b", "absent", 0.0),
    ]
    assert ledger.table(by=["presence"], term="bce", epoch=1).rows[0]["total"] == 3.0
    assert ledger.table(by=["class"], term="dice", epoch=1).rows[1]["mean"] == 1.0


def test_roll_up_over_epochs_divides_once() -> None:
    (line,) = known().table(by=["term"], term="bce")
    assert (line["total"], line["count"], line["mean"], line["contribution"]) == (6.0, 16, 0.375, 0.75)
    assert line["share"] == 0.75 / 2.0


def test_a_mean_over_different_terms_is_no_number() -> None:
    (line,) = known().table(by=["epoch"], epoch=1)
    assert line["mean"] is None and line["contribution"] == 1.25 and line["share"] == 1.0


def test_where_takes_values_collections_and_class_() -> None:
    ledger = known()
    assert len(ledger.table(by="term", term=["bce", "l2"])) == 2
    assert len(ledger.table(by=["epoch"], class_="a", term="bce")) == 2
    assert len(ledger.table(by=["term"], role="regularizer")) == 1
    assert len(ledger.table(by=["class"], **{"class": ("a", "b")}, epoch=range(1, 2))) == 2
    assert len(ledger.table(by=["class"], term="l2")) == 0


def test_rows_are_chosen_step_by_step() -> None:
    ledger = known()
    assert ledger.by("epoch", "term").rows == ledger.table(["epoch", "term"]).rows
    chosen = ledger.where(term=["bce", "l2"]).where(epoch=1)
    assert chosen.by("class").rows == ledger.table("class", term=["bce", "l2"], epoch=1).rows
    assert ledger.where(class_="a").by("epoch").rows == ledger.table("epoch", class_="a").rows
    with pytest.raises(InputError, match="each dimension once, received class again"):
        ledger.where(class_="a").where(class_="b")
    with pytest.raises(UnknownNameError, match="Did you mean 'class'"):
        ledger.where(split="training").by("clas")


def test_steps_are_apart_from_epochs() -> None:
    ledger = known()
    ledger.append([row(8.0, 4, step=5), row(2.0, 4, step=10)])
    assert ledger.loss("training", 1) == 1.25
    assert len(ledger.table(by=["epoch", "term"])) == 6
    steps = ledger.table(by=["step"])
    assert [(line["step"], line["contribution"], line["share"]) for line in steps] == [(5, 1.0, 1.0), (10, 0.25, 1.0)]
    assert ledger.table(by=["term"], step=10).rows[0]["mean"] == 0.5


def test_other_group_kinds() -> None:
    ledger = Ledger()
    ledger.append([row(4.0, 8), row(1.0, 2, kind="site", group="north"), row(3.0, 6, kind="site", group="south")])
    assert [line["site"] for line in ledger.table(by=["site"])] == ["north", "south"]
    assert len(ledger.table(by=["label"])) == 0


def test_a_name_that_no_row_has_is_no_empty_table() -> None:
    ledger = Ledger("run")
    sums = (2.0, 4, 4.0, 1.0, 4.0, 0.5, 0)
    parts = [Row("training", 1, None, "bce", "data", "linear", "class", name, "", *sums) for name in ("car", "sign")]
    ledger.append([Row("training", 1, None, "bce", "data", "linear", "term", "", "", *sums), *parts])
    assert [row["class"] for row in ledger.table(by=["class"], class_="sign", term="bce", run="run")] == ["sign"]
    assert len(ledger.table(by=["class"], class_=["car", "sign"], epoch=7)) == 0
    for where, known in (
        ({"class_": "sing"}, "class: expected one of 'car', 'sign'; received 'sing'. Did you mean 'sign'?"),
        ({"class_": ["car", "bus"]}, "class: expected one of 'car', 'sign'; received 'bus'"),
        ({"term": "dice"}, "term: expected one of 'bce'; received 'dice'"),
        ({"run": "other"}, "run: expected one of 'run'; received 'other'"),
    ):
        with pytest.raises(UnknownNameError, match=re.escape(known)):
            ledger.table(by=["class"], **where)


def test_unknown_and_clashing_dimensions() -> None:
    ledger = known()
    with pytest.raises(UnknownNameError, match="Did you mean 'epoch'"):
        ledger.table(by=["epcoh"])
    with pytest.raises(UnknownNameError, match="dimension"):
        ledger.table(by=["term"], total=3)
    with pytest.raises(UnknownNameError, match=r"split.*'training'.*received 'train'"):
        ledger.table(by=["term"], split=["train", "test"])
    with pytest.raises(InputError, match="one kind at a time"):
        ledger.table(by=["class", "sample"])
    with pytest.raises(InputError, match="once"):
        ledger.table(by=["term", "term"])


def test_share_of_nothing_is_a_dash() -> None:
    ledger = Ledger()
    ledger.append([row(0.0, 0)])
    (line,) = ledger.table(by=["term"])
    assert line["mean"] is None and line["share"] is None
    assert "–" in str(ledger.table(by=["term"]))


@given(st.lists(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 9)), min_size=1, max_size=5), min_size=1))
def test_roll_ups_do_not_depend_on_how_rows_were_split(parts: list[list[tuple[int, int]]]) -> None:
    whole, split = Ledger(), Ledger()
    values = [value for part in parts for value in part]
    whole.append([row(sum(t for t, _ in values) / 8, sum(c for _, c in values))])
    for part in parts:
        split.append(row(total / 8, count) for total, count in part)
    assert whole.table(by=["term"]).rows == split.table(by=["term"]).rows


def test_books_balance_and_an_imbalance_is_found() -> None:
    ledger = known()
    assert ledger.balance() == []
    ledger.append([row(1.0, 4, kind="column", group="0")])
    assert ledger.balance() == [Imbalance("training", 1, None, "bce", "column", -0.375)]
    ledger.append([row(3.0, 4, kind="column", group="1")])
    assert ledger.balance() == []
    ledger.append([row(1.0, 1, term="lost", kind="class", group="a")])
    assert [entry.term for entry in ledger.balance()] == ["lost"]


def test_balance_forgives_rounding_and_not_more() -> None:
    for error, wrong in ((1e-9, 0), (1e-3, 1)):
        ledger = Ledger()
        ledger.append(
            [row(1.0, 8, contribution=0.125), row(1.0, 8, kind="class", group="a", contribution=0.125 + error)]
        )
        assert len(ledger.balance()) == wrong


def test_balance_of_what_is_not_finite() -> None:
    for whole, part, wrong in (
        (math.nan, math.nan, 0),
        (math.inf, math.inf, 0),
        (math.inf, 1.0, 1),
        (1.0, math.nan, 1),
    ):
        ledger = Ledger()
        ledger.append([row(1.0, 1, contribution=whole), row(1.0, 1, kind="class", group="a", contribution=part)])
        assert len(ledger.balance()) == wrong


def same(one: Ledger, other: Ledger) -> bool:
    return repr((one.rows, one.metrics)) == repr((other.rows, other.metrics))


@pytest.mark.parametrize("name", ["run", "it's", 'a "quoted" run', "epoch=3", "x[1]*?", "läuft 道路", "a{b}%20"])
def test_save_and_open_give_back_everything(tmp_path: Path, name: str) -> None:
    ledger = known()
    ledger.append(
        [
            row(
                math.nan,
                2**40,
                -math.inf,
                term='it\'s "so"; DROP TABLE x --',
                group="道路\n\t\x00\U0001f600",
                kind="class",
            )
        ],
        [MetricRow("validation", 0, "", "", -math.inf)],
    )
    folder = ledger.save(tmp_path / name)
    opened = Ledger.open(folder)
    assert same(ledger, opened)
    assert (opened.run, opened.info, opened.path) == ("known", {"seed": 3}, folder)
    assert type(opened.rows[0]) is Row and opened.rows[0].step is None


def test_each_save_adds_one_segment_and_changes_none(tmp_path: Path) -> None:
    ledger = known()
    ledger.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    assert len(before) == 2
    ledger.flush()
    assert set(tmp_path.rglob("*.parquet")) == set(before)
    ledger.append([row(1.0, 8, epoch=3)])
    ledger.flush()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    assert len(after) == 3 and before.items() <= after.items()
    assert same(Ledger.open(tmp_path), ledger)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger", "metrics", "run.json"]


def test_an_opened_ledger_goes_on_where_it_stopped(tmp_path: Path) -> None:
    known().save(tmp_path / "a")
    resumed = Ledger.open(tmp_path / "a")
    resumed.info["resumed"] = True
    resumed.append([row(1.0, 8, epoch=3)])
    resumed.flush()
    resumed.save(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert len(Ledger.open(folder)) == 19
        assert Ledger.open(folder).info == {"seed": 3, "resumed": True}


def test_two_writers_of_one_folder_lose_nothing(tmp_path: Path) -> None:
    one, two = Ledger("run", {"a": 1}), Ledger("run", {"b": [2]})
    for epoch in (1, 2):
        for writer in (one, two):
            writer.append([row(1.0, 8, epoch=epoch)])
            writer.save(tmp_path)
    opened = Ledger.open(tmp_path)
    assert len(opened) == 4 and opened.loss("training", 2) == 0.25
    assert opened.info == {"a": 1, "b": [2]}


def test_segment_names_carry_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    known().save(tmp_path)
    (path,) = (tmp_path / "ledger").iterdir()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"rank3-process{os.getpid()}-000001-{digest}.parquet"
    (columns,) = [duckdb.connect().execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(path)]).fetchall()]
    assert [column[0] for column in columns][:5] == ["split", "epoch", "step", "term", "role"]


def test_a_crash_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    known().save(tmp_path)
    sealed = next((tmp_path / "ledger").iterdir())
    (tmp_path / "ledger" / f".{sealed.name[:-9]}000002.parquet.tmp").write_bytes(b"PAR1 half a seg")
    assert same(Ledger.open(tmp_path), known())
    resumed = Ledger.open(tmp_path)
    resumed.append([row(1.0, 8, epoch=3)])
    resumed.flush()
    assert len(Ledger.open(tmp_path)) == 19


def test_a_failed_write_keeps_the_rows_for_later(tmp_path: Path) -> None:
    ledger = known()
    (tmp_path / "ledger").write_text("a file where the folder should be")
    with pytest.raises(LedgerError, match="Cannot write a segment"):
        ledger.save(tmp_path)
    (tmp_path / "ledger").unlink()
    ledger.save(tmp_path)
    assert same(Ledger.open(tmp_path), ledger)


def test_a_row_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.append([row(1.0, 8, epoch="first")])
    with pytest.raises(LedgerError, match="types"):
        ledger.save(tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_info_keeps_what_json_can_hold(tmp_path: Path) -> None:
    info = {"path": Path("x"), "limit": math.inf, 3: (1, 2), "nested": {"a": {"b"}}, "odd": "\udc80 道"}
    assert Ledger.open(Ledger("run", info).save(tmp_path)).info == {
        "path": "x",
        "limit": "inf",
        "3": [1, 2],
        "nested": {"a": ["b"]},
        "odd": "\udc80 道",
    }


def segment(folder: Path) -> Path:
    known().save(folder)
    return next((folder / "ledger").iterdir())


@pytest.mark.parametrize("kept", [0, 3, 4, 11, 100, -1])
def test_a_truncated_segment_is_named(tmp_path: Path, kept: int) -> None:
    path = segment(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LedgerError, match=r"000001-[0-9a-f]*.parquet is not a whole ledger segment.*move this file"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize("content", [b"hello", b"PAR1" + bytes(40) + b"PAR1", b"\xff" * 500, b"SELECT 1;" * 50])
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    segment(tmp_path)
    (tmp_path / "ledger" / "z'.parquet").write_bytes(content)
    with pytest.raises(LedgerError, match=r"z'.parquet"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ("1 AS x", "lacks the columns split, epoch"),
        ("* EXCLUDE (total)", "lacks the columns total"),
        ("* REPLACE ('many' AS count)", "not a whole ledger segment"),
        ("* REPLACE (NULL AS term)", "NULL in the column 'term'"),
        ("* REPLACE ([1] AS total)", "not a whole ledger segment"),
    ],
)
def test_other_columns_are_named(tmp_path: Path, columns: str, reason: str) -> None:
    path = segment(tmp_path)
    foreign = path.with_name("foreign.parquet")
    duckdb.connect().execute(f"COPY (SELECT {columns} FROM '{path}') TO '{foreign}' (FORMAT parquet)")
    with pytest.raises(LedgerError, match=f"foreign.parquet.*{reason}"):
        Ledger.open(tmp_path)


def test_a_segment_with_other_integer_types_and_more_columns_is_read(tmp_path: Path) -> None:
    path = segment(tmp_path)
    other = path.with_name("other.parquet")
    columns = "* REPLACE (CAST(epoch AS TINYINT) AS epoch, CAST(weight AS FLOAT) AS weight), 1 AS more"
    duckdb.connect().execute(f"COPY (SELECT {columns} FROM '{path}') TO '{other}' (FORMAT parquet)")
    assert len(Ledger.open(tmp_path)) == 36


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "as JSON"),
        ("{", "as JSON"),
        ("[1]", "not the file of a run"),
        ('{"run": "x"}', "not the file of a run"),
        ('{"schema": 1, "run": 3, "info": {}}', "string 'run'"),
        ('{"schema": 99, "run": "x", "info": {}}', "Upgrade lossledger"),
        ("[" * 100_000, "as JSON"),
    ],
)
def test_bad_run_files_are_named_and_not_overwritten(tmp_path: Path, content: str, reason: str) -> None:
    segment(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(LedgerError, match=f"run.json.*{reason}"):
        Ledger.open(tmp_path)
    with pytest.raises(LedgerError, match=f"run.json.*{reason}"):
        known().save(tmp_path)
    assert (tmp_path / "run.json").read_text() == content


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no folder"):
        Ledger.open(tmp_path / "missing")
    with pytest.raises(LedgerError, match=r"no run\.json"):
        Ledger.open(tmp_path)


def test_a_folder_of_runs(tmp_path: Path) -> None:
    known().save(tmp_path / "lr=0.1")
    known().save(tmp_path / "lr=1")
    (tmp_path / "notes").mkdir()
    ledger = Ledger.open(tmp_path)
    assert ledger.runs == ("lr=0.1", "lr=1") and ledger.info["lr=1"] == {"seed": 3}
    assert [line["run"] for line in ledger.table(by=["run", "term"], epoch=1)] == ["lr=0.1"] * 3 + ["lr=1"] * 3
    assert ledger.table(by=["run"], run="lr=1", epoch=2).rows[0]["share"] == 1.0
    assert ledger.select("lr=1").loss() == 0.75 and ledger.balance() == []
    for change in (lambda: ledger.append([]), lambda: ledger.save(tmp_path), lambda: ledger.loss()):
        with pytest.raises(InputError, match="several runs"):
            change()
    with pytest.raises(UnknownNameError):
        ledger.select("lr=2")


def test_flush_needs_a_folder() -> None:
    with pytest.raises(InputError, match="save"):
        Ledger().flush()


def test_table_as_text() -> None:
    table = known().table(by=["epoch", "term"])
    lines = str(table).splitlines()
    assert len(lines) == 7 and max(map(len, lines)) <= 80
    assert lines[0].split() == list(table.columns)
    assert lines[1].split() == ["1", "bce", "4", "8", "10", "0.5000", "0.5000", "0.4000"]
    assert len(table) == 6 and [line["epoch"] for line in table] == [1, 1, 1, 2, 2, 2]


def test_joiners_of_words_and_emoji_stay_and_take_no_column() -> None:
    persian, family = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f469\u200d\U0001f467"
    assert (cell_width(persian), cell_width(family)) == (7, 4)
    text = aligned(("class",), [(persian,), (family,), ("turned\u202eround",)], (False,))
    assert persian in text and family in text
    # What turns the order of the letters that follow is no part of a word.
    assert "turned\ufffdround" in text


def test_table_shortens_names_and_not_numbers() -> None:
    table = Table(
        ("term", "total"), [{"term": "a_very_long_name_" * 8, "total": 1.5}, {"term": "x\x1b[31m", "total": None}]
    )
    assert max(map(cell_width, str(table).splitlines())) == 80
    assert "\x1b" not in str(table) and "1.500" in str(table) and "–" in str(table)
    assert aligned(("道路", "n"), [("x", "1")], (False, True)) == "道路  n\nx     1"


def test_table_as_html_is_escaped() -> None:
    table = Table(("term", "total"), [{"term": "<script>alert('x')</script>&", "total": 1e-9}])
    assert "<script>" not in table._repr_html_() and "&lt;script&gt;" in table._repr_html_()


def test_table_as_a_data_frame() -> None:
    frame = known().table(by=["epoch", "term"]).to_pandas()
    assert isinstance(frame, pd.DataFrame) and frame.shape == (6, 8)
    assert frame["contribution"].sum() == 2.0


def test_numbers_of_a_table() -> None:
    shown = [significant(value) for value in (0.0, 0.99999999, 1 - 1e-15, 1e20, 123456.7, 0.00012346, -2.0)]
    assert shown == ["0", "0.99999999", "1", "1.000e20", "123,457", "0.0001235", "-2"]


@pytest.mark.parametrize("module", ["columns", "ledger", "query", "segments", "table"])
def test_examples_in_the_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"lossledger.ledger.{module}")).failed == 0


@pytest.mark.parametrize("seed", range(25))
def test_a_segment_with_flipped_bytes_never_crashes(tmp_path: Path, seed: int) -> None:
    path = segment(tmp_path)
    content = bytearray(path.read_bytes())
    source = random.Random(seed)
    for _ in range(4):
        content[source.randrange(len(content))] = source.randrange(256)
    path.write_bytes(bytes(content))
    with contextlib.suppress(LedgerError):
        Ledger.open(tmp_path)


def test_import_needs_the_standard_library_only() -> None:
    code = (
        "import sys, lossledger.ledger;"
        "print(sorted({'torch', 'numpy', 'duckdb', 'pandas', 'lossledger.report'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_ledger_saved_and_opened_imports_no_torch(tmp_path: Path) -> None:
    known().save(tmp_path)
    opening = f"import sys; from lossledger.ledger import Ledger; Ledger.open({str(tmp_path)!r})"
    code = f"{opening}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert json.loads((tmp_path / "run.json").read_text())["schema"] == 1
