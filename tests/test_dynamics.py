"""Statistics of samples across epochs, the measures of training dynamics, exports, and labels that are wrong."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import lossledger as ll
from lossledger.cli import main
from lossledger.errors import InputError, LedgerError
from lossledger.ledger import Ledger
from lossledger.ledger.samples import sample_columns

EPOCHS, N = 7, 11


def known(seed: int = 0) -> tuple[Ledger, dict[str, np.ndarray]]:
    """A ledger of known numbers, `[EPOCHS, N]`; a loss of sample 3 was not finite once, sample 4 was masked once."""
    source = np.random.default_rng(seed)
    values = {
        "mean": source.exponential(size=(EPOCHS, N)),
        "confidence": source.random((EPOCHS, N)),
        "margin": source.normal(size=(EPOCHS, N)),
        "correct": (source.random((EPOCHS, N)) < 0.6).astype(float),
        "label": np.tile(source.integers(0, 5, N), (EPOCHS, 1)),
        "predicted": source.integers(0, 5, (EPOCHS, N)),
    }
    values["mean"][2, 3] = np.inf
    count = np.ones((EPOCHS, N), int)
    count[1, 4] = 0
    ledger = Ledger("known")
    for epoch in range(EPOCHS):
        rest = {
            "sample": np.arange(N),
            "count": count[epoch],
            "coefficient": np.ones(N),
            "total": values["mean"][epoch],
        }
        sums = {"weight": np.ones(N), "contribution": values["mean"][epoch] / N}
        columns = {name: found[epoch] for name, found in values.items()}
        ledger.append_samples(sample_columns("ce", "training", epoch + 1, {**columns, **rest, **sums}))
    return ledger, {**values, "count": count}


def per_sample(ledger: Ledger, view: str, column: str) -> list[float]:
    rows = ledger.query(f"SELECT sample, {column} AS x FROM {view} ORDER BY sample").rows
    assert [row["sample"] for row in rows] == list(range(N))
    return [row["x"] for row in rows]


def test_every_view_says_what_its_definition_does():
    """Against a loop over each sample's epochs, in NumPy."""
    ledger, values = known()
    asked: dict[tuple[str, str], list[float]] = {}
    for sample in range(N):
        counted = values["count"][:, sample] > 0
        epochs = np.arange(1, EPOCHS + 1)
        own = {name: found[counted, sample] for name, found in values.items()}
        finite = np.isfinite(own["mean"])
        mean, when = own["mean"][finite], epochs[counted][finite]
        right = own["correct"] > 0.5
        expected = {
            ("sample_losses", "mean"): mean.mean(),
            ("sample_losses", "deviation"): mean.std(),
            ("sample_losses", "trend"): np.polyfit(when, mean, 1)[0],
            ("sample_losses", "highest"): mean.max(),
            ("sample_losses", "last"): own["mean"][-1],
            ("sample_losses", "nonfinite"): (~finite).sum(),
            ("sample_losses", "epochs"): counted.sum(),
            ("dynamics_confidence", "confidence"): own["confidence"].mean(),
            ("dynamics_variability", "variability"): own["confidence"].std(),
            ("dynamics_margin", "margin"): own["margin"].mean(),
            ("dynamics_forgetting", "forgetting"): (right[:-1] & ~right[1:]).sum(),
            ("dynamics_forgetting", "learned"): right.sum(),
        }
        for (view, column), number in expected.items():
            if sample == 0:
                asked[view, column] = per_sample(ledger, view, column)
            found = asked[view, column][sample]
            assert math.isclose(found, number, rel_tol=1e-10, abs_tol=1e-12), (view, column, sample)


def test_statistics_count_the_epochs_above_a_loss():
    ledger, values = known()
    table = ledger.samples.statistics(above=0.7)
    means = np.where(values["count"] > 0, values["mean"], -np.inf)
    assert [row["above"] for row in table] == (means > 0.7).sum(0).tolist()
    assert table.columns[:-1] == ledger.samples.statistics().columns
    for wrong in (math.nan, "1", True):
        with pytest.raises(InputError, match="above"):
            ledger.samples.statistics(above=wrong)


def test_one_epoch_has_no_trend():
    ledger, _ = known()
    one = ledger.samples.where(epoch=1)
    assert {row["trend"] for row in one.statistics()} == {None}
    assert {row["deviation"] for row in one.statistics()} == {0.0}


def test_queries_reach_samples_beside_the_rest(tmp_path: Path):
    ledger, values = known()
    (row,) = ledger.query("SELECT count(*) AS n, sum(contribution) AS loss FROM samples WHERE epoch = 1").rows
    assert row["n"] == N and math.isclose(row["loss"], values["mean"][0].mean())
    assert ledger.query("SELECT count(*) AS n FROM ledger").rows == [{"n": 0}]
    ledger.save(tmp_path / "run")
    sql = "SELECT sample FROM dynamics_margin ORDER BY margin LIMIT 2"
    done = CliRunner().invoke(main, ["query", str(tmp_path / "run"), sql, "--csv"])
    assert done.exit_code == 0
    assert [int(line) for line in done.output.split()[1:]] == [row["sample"] for row in ledger.query(sql)]
    both = Ledger.open(tmp_path)
    assert both.query("SELECT DISTINCT run FROM dynamics_margin").rows == [{"run": "run"}]
    assert len(Ledger().query("SELECT * FROM dynamics_forgetting")) == 0


# --- exports -------------------------------------------------------------------------------------------------------


def test_exports_to_pandas_and_csv_keep_every_digit(tmp_path: Path):
    samples = known()[0].samples
    frame = samples.to_pandas()
    lines = list(csv.DictReader(io.StringIO(samples.to_csv(tmp_path / "it's.csv").read_text())))
    assert list(frame.columns) == list(lines[0]) == list(samples.columns) and len(lines) == len(frame) == len(samples)
    for name in samples.columns:
        values = samples[name]
        if values.dtype == object:
            assert frame[name].tolist() == [line[name] for line in lines] == values.tolist()
            continue
        assert np.array_equal(frame[name].to_numpy(float), values, equal_nan=True)
        assert np.array_equal([float(line[name] or "nan") for line in lines], values, equal_nan=True)
    assert sum(line["mean"] == "" for line in lines) == 1 and sum(line["mean"] == "inf" for line in lines) == 1
    with pytest.raises(LedgerError, match="Cannot write"):
        samples.to_csv(tmp_path / "none" / "file.csv")


def test_exports_to_arrow():
    pytest.importorskip("pyarrow")
    samples = known()[0].samples
    found = samples.to_arrow()
    assert found.column_names == list(samples.columns)
    for name in samples.columns:
        column = found[name]
        assert column.to_pylist() == samples.as_columns()[name].listed(), name
    assert found["mean"].null_count == 1
    table = samples.statistics()
    assert table.to_arrow().to_pylist() == table.rows


def test_without_pyarrow_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"lossledger\[arrow\]"):
        known()[0].samples.to_arrow()


def test_the_file_for_tools_that_look_for_wrong_labels():
    ledger, values = known()
    table = ledger.samples.labels()
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [int(row["id"]) for row in rows] == list(range(N))
    assert [int(row["label"]) for row in rows] == values["label"][0].tolist()
    assert [int(row["predicted"]) for row in rows] == values["predicted"][-1].tolist()
    assert math.isclose(float(rows[0]["confidence"]), values["confidence"][:, 0].mean())


# --- wrong labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_wrong_labels_are_among_the_worst(seed):
    """3 % of the digits get another label; at least 80 % of them are in the worst 5 % by the area under the margin."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    source = np.random.default_rng(seed)
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), digits.target.copy()
    planted = source.choice(len(y), round(0.03 * len(y)), replace=False)
    y[planted] = (y[planted] + source.integers(1, 10, len(planted))) % 10
    torch.manual_seed(seed)
    model = ll.Model(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    loss = ll.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(lambda p: torch.optim.Adam(p, lr=0.005), loss)
    ledger = model.fit(
        x, torch.tensor(y), batch_size=64, epochs=10, samples=True, verbose=0, seed=seed, checks="off"
    ).ledger
    most = round(0.05 * len(y))
    for view, worst in (("dynamics_margin", "margin"), ("sample_losses", "mean DESC")):
        found = ledger.query(f"SELECT sample FROM {view} ORDER BY {worst} LIMIT {most}")
        hits = len({row["sample"] for row in found} & set(planted.tolist()))
        assert hits >= 0.8 * len(planted), (view, hits, len(planted))


@pytest.mark.slow
def test_a_million_samples_take_seconds(tmp_path: Path):
    size = 10**6
    source = np.random.default_rng(0)
    names = ("mean", "total", "contribution", "confidence", "margin", "correct")
    values = {name: source.random(size) for name in names} | {"weight": np.ones(size), "coefficient": np.ones(size)}
    values |= {"sample": np.arange(size), "count": np.ones(size, int)}
    ledger = Ledger("many")
    ledger.append_samples(sample_columns("ce", "training", 1, values))
    began = time.perf_counter()
    ledger.save(tmp_path)
    opened = Ledger.open(tmp_path)
    assert len(opened.samples) == size
    worst = opened.top_losses(5)
    assert worst.rows[0]["sample"] == int(values["mean"].argmax())
    assert len(opened.query("SELECT * FROM dynamics_margin ORDER BY margin LIMIT 3")) == 3
    assert time.perf_counter() - began < 60
