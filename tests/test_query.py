"""SQL on a ledger: exact roll-ups, and nothing beyond its tables."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lossledger.cli import main
from lossledger.errors import InputError, UnknownNameError
from lossledger.ledger import Ledger, MetricRow, Row


def row(epoch: int, total: float, count: int, group: str = "", step: int | None = None) -> Row:
    kind = "class" if group else "term"
    sums = (total, count, float(count), 1.0, 8.0, total / 8, 0)
    return Row("training", epoch, step, "bce", "data", "linear", kind, group, "", *sums)


def known(run: str = "known") -> Ledger:
    ledger = Ledger(run)
    parts = [row(1, 1.5, 3, "a"), row(1, 0.25, 5, "it's"), row(2, 0.5, 1, "a"), row(2, 2.0, 7, "it's")]
    ledger.append([row(1, 1.75, 8), *parts, row(2, 2.5, 8), row(2, 9.0, 1, step=7)])
    ledger.append([], [MetricRow("validation", 2, "iou", "a", 0.5), MetricRow("validation", 2, "iou", "b", math.nan)])
    return ledger


MEANS = """
SELECT "group", sum(total) / sum(count) AS mean, sum(count) AS n
FROM ledger WHERE kind = 'class' AND step IS NULL GROUP BY ALL ORDER BY 1
"""


def test_a_roll_up_is_that_of_the_table() -> None:
    ledger = known()
    found = ledger.query(MEANS)
    assert found.columns == ("group", "mean", "n")
    expected = [(line["class"], line["mean"], line["count"]) for line in ledger.table(by=["class"])]
    assert (
        [(line["group"], line["mean"], line["n"]) for line in found]
        == expected
        == [("a", 0.5, 4), ("it's", 0.1875, 12)]
    )


def test_steps_metrics_and_columns() -> None:
    ledger = known()
    assert ledger.query("SELECT step FROM ledger WHERE step IS NOT NULL").rows == [{"step": 7}]
    (iou,) = ledger.query("SELECT run, value FROM metrics WHERE NOT isnan(value)").rows
    assert iou == {"run": "known", "value": 0.5}
    names = [line["column_name"] for line in ledger.query("DESCRIBE ledger")]
    assert names[:5] == ["run", "split", "epoch", "step", "term"] and len(names) == 21
    assert len(ledger.query("WITH a AS (SELECT 1 AS x) SELECT x FROM a")) == 1
    assert len(Ledger().query("SELECT * FROM ledger")) == 0


def test_runs_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        known().save(tmp_path / name)
    found = Ledger.open(tmp_path).query("SELECT run, count(*) AS n FROM ledger GROUP BY run ORDER BY run")
    assert found.rows == [{"run": "one", "n": 7}, {"run": "two", "n": 7}]


@pytest.mark.parametrize(
    "sql",
    [
        "COPY ledger TO '{folder}/stolen.csv'",
        "ATTACH '{folder}/other.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA database_list",
        "SET enable_external_access = true",
        "RESET enable_external_access",
        "CALL pragma_version()",
        "CREATE TABLE x AS SELECT 1",
        "DROP TABLE ledger",
        "DELETE FROM ledger",
        "INSERT INTO metrics SELECT * FROM metrics",
        "EXPORT DATABASE '{folder}/all'",
        "EXPLAIN ANALYZE SELECT 1",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY ledger TO '{folder}/stolen.csv'",
        "",
        "-- nothing",
        "SELECT * FROM read_csv('{folder}/secret.csv')",
        "SELECT * FROM '{folder}/secret.csv'",
        "SELECT * FROM read_text('{folder}/secret.csv')",
        "SELECT * FROM read_blob('{folder}/secret.csv')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM read_parquet('https://example.com/x.parquet')",
        "SELECT * FROM sqlite_scan('{folder}/secret.csv', 'x')",
        "SELECT getenv('HOME')",
        "SELECT * FROM query('DROP TABLE ledger')",
        "SELECT * FROM columns",
        "SELECT * FROM tables",
        "SELEC 1",
        "SELECT nothing FROM ledger",
        "SELECT 1 AS a, 2 AS a",
        "SELECT error('x')",
    ],
)
def test_anything_else_is_refused(tmp_path: Path, sql: str) -> None:
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    ledger = known()
    with pytest.raises(InputError, match="query: "):
        ledger.query(sql.format(folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]
    assert ledger.query("SELECT count(*) AS n FROM ledger").rows == [{"n": 7}]


def test_what_a_query_changes_is_a_copy() -> None:
    ledger = known()
    before = ledger.rows
    with pytest.raises(InputError, match="expected one SELECT"):
        ledger.query("UPDATE ledger SET total = 0")
    assert ledger.rows == before


def test_the_reason_of_duckdb_is_given() -> None:
    with pytest.raises(InputError, match=r"totl.*\n.*total"):
        known().query("SELECT totl FROM ledger")


def test_an_unknown_table_names_those_that_exist(tmp_path: Path) -> None:
    ledger = known()
    for sql in ("SELECT * FROM nosuch", 'FROM "no such"', "WITH a AS (SELECT 1) SELECT * FROM a, samplez"):
        with pytest.raises(UnknownNameError) as caught:
            ledger.query(sql)
        said = str(caught.value)
        assert said.startswith("query: unknown table: expected one of ") and "\n" not in said
        listed = re.findall(r"'(\w+)'", said.partition(";")[0])
        assert {"ledger", "metrics", "groups", "samples", "sample_losses"} <= set(listed)
        for table in listed:
            ledger.query(f"SELECT * FROM {table}")
    with pytest.raises(UnknownNameError, match=r"received 'ledgr'\. Did you mean 'ledger'"):
        ledger.query("SELECT * FROM ledgr")
    ledger.save(tmp_path)
    refused = CliRunner().invoke(main, ["query", str(tmp_path), "SELECT * FROM nosuch"])
    assert refused.exit_code == 2 and refused.output.startswith("lossledger: query: unknown table: expected one of ")


def test_the_command(tmp_path: Path) -> None:
    known().save(tmp_path)
    run = CliRunner().invoke
    shown = run(main, ["query", str(tmp_path), MEANS])
    assert shown.exit_code == 0 and shown.output.splitlines()[0].split() == ["group", "mean", "n"]
    assert "0.1875" in shown.output
    text = run(main, ["query", str(tmp_path), MEANS, "--csv"]).output
    assert list(csv.reader(io.StringIO(text))) == [["group", "mean", "n"], ["a", "0.5", "4"], ["it's", "0.1875", "12"]]
    values = json.loads(run(main, ["query", str(tmp_path), "SELECT value, NULL AS x FROM metrics", "--json"]).output)
    assert values == [{"value": 0.5, "x": None}, {"value": "nan", "x": None}]
    refused = run(main, ["query", str(tmp_path), "DROP TABLE ledger"])
    assert refused.exit_code == 2 and "expected one SELECT" in refused.output


def test_the_package_is_the_command(tmp_path: Path) -> None:
    known().save(tmp_path)
    for arguments, expected in (
        (["--help"], "Usage: python -m lossledger [OPTIONS]"),
        (["query", str(tmp_path), "SELECT 1 AS one", "--csv"], "one\n1"),
        (["report", str(tmp_path), "--text"], "Loss report: known"),
    ):
        command = [sys.executable, "-m", "lossledger", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.startswith(expected)
    refused = subprocess.run(
        [sys.executable, "-m", "lossledger", "query", str(tmp_path), "DROP TABLE ledger"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and refused.stderr.startswith("lossledger: query: expected one SELECT")
