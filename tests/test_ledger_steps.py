"""Rows of steps: sums of intervals, which add up to the epochs and never join them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lossledger as ll
from interrupted import KillBefore, Killed
from lossledger.errors import InputError

L = ll.losses
N, SIZE = 22, 4
SUMS = ("total", "count", "weight", "divisor", "nonfinite")


def data():
    g = torch.Generator().manual_seed(3)
    return torch.randn(N, 3, generator=g), (torch.rand(N, 2, generator=g) < 0.5).float()


def model(loss=None, **options):
    torch.manual_seed(0)
    made = ll.Model(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 2)))
    loss = loss or L.BinaryCrossentropy(from_logits=True) + L.Dice(from_logits="sigmoid")
    made.compile("sgd", loss, regularizers={"*.weight": "l2"}, **options)
    return made


def fitted(loss=None, compiling=None, **options):
    x, y = data()
    made = model(loss, **(compiling or {}))
    given = {"batch_size": SIZE, "epochs": 2, "seed": 1, "verbose": 0, "validation_data": (x, y), **options}
    return made.fit(x, y, **given).ledger


def name_of(row):
    return row.split, row.epoch, row.term, row.kind, row.group, row.presence


@pytest.mark.parametrize("every", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_rows_of_steps_add_up_to_the_rows_of_their_epoch(every, accumulate):
    ledger = fitted(ledger_steps=every, accumulate=accumulate)
    steps = -(-6 // accumulate)
    parts, wholes = {}, {}
    for row in ledger.rows:
        if row.split == "training":
            (wholes if row.step is None else parts).setdefault(name_of(row), []).append(row)
    assert set(parts) == set(wholes)
    for name, rows in parts.items():
        (whole,) = wholes[name]
        first = (whole.epoch - 1) * steps
        assert [row.step - first for row in rows] == sorted({*range(every, steps + 1, every), steps})
        for column in SUMS:
            found = math.fsum(getattr(row, column) for row in rows)
            # The constant that smooths the Dice of an interval is in each of them.
            if not (column == "divisor" and whole.form == "ratio"):
                assert found == pytest.approx(getattr(whole, column), rel=1e-12, abs=1e-12), (name, column)
    assert not ledger.balance()


def test_rows_of_steps_change_no_number_of_epochs():
    plain, steps = fitted(), fitted(ledger_steps=2)
    assert [row for row in steps.rows if row.step is None] == list(plain.rows)
    for by in (["epoch", "term"], ["split"], ["class"], ["epoch", "class", "presence"], ["term", "role"]):
        assert steps.table(by, split="training").rows == plain.table(by, split="training").rows
    assert steps.loss("training") == plain.loss("training")
    assert str(steps.diff(epoch=1, other_epoch=2, split="training")) == str(
        plain.diff(epoch=1, other_epoch=2, split="training")
    )
    assert len(steps.table(["step"], split="training")) == 6
    sql = "SELECT count(*) AS n FROM ledger WHERE step IS NULL"
    assert steps.query(sql).rows == [{"n": len(plain.rows)}]


def test_a_step_alone_is_the_loss_of_its_batch():
    x, y = data()
    seen = []

    class Last(ll.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            seen.append(logs["last"])

    ledger = model().fit(x, y, batch_size=SIZE, epochs=2, seed=1, verbose=0, callbacks=[Last()], ledger_steps=1).ledger
    found = [row["contribution"] for row in ledger.table(["step"])]
    assert found == pytest.approx(seen, rel=1e-6)


def test_steps_that_are_left_out_count_in_no_row():
    x, y = data()
    x[5] = math.nan
    made = model(L.BinaryCrossentropy(from_logits=True), on_nonfinite="skip")
    ledger = made.fit(x, y, batch_size=SIZE, shuffle=False, verbose=0, ledger_steps=1).ledger
    rows = [row for row in ledger.rows if row.kind == "term" and row.step is not None and row.role == "data"]
    assert [row.count for row in rows] == [8, 0, 8, 8, 8, 4]
    assert [row.nonfinite > 0 for row in rows] == [False, True, False, False, False, False]


@pytest.mark.parametrize("step", [2, 3, 6, 7, 9])
@pytest.mark.usefixtures("no_sync")
def test_a_resumed_run_has_every_step_once(tmp_path, step):
    options = {"run_dir": tmp_path / "run", "ledger_steps": 4}
    backup = ll.callbacks.BackupAndRestore(save_freq=1)
    with pytest.raises(Killed):
        fitted(**options, callbacks=[KillBefore(step), backup])
    found = fitted(**options, callbacks=[backup], resume=True)
    assert found.rows == fitted(ledger_steps=4).rows
    assert ll.Ledger.open(tmp_path / "run").rows == found.rows
    with pytest.raises(ll.errors.CheckpointError, match="ledger_steps: expected 4 as in the run, received 2"):
        fitted(run_dir=tmp_path / "run", ledger_steps=2, callbacks=[backup], resume=True)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "all"])
def test_a_wrong_interval_is_refused(every):
    with pytest.raises(InputError, match="ledger_steps: expected a whole number from 1"):
        fitted(ledger_steps=every)
