"""The spread of the elements: what NumPy says of them all, for any batches, windows, masks and groups."""

from __future__ import annotations

import contextlib
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lossledger as ll
import test_groups
from interrupted import KillBefore, Killed
from lossledger.distributed import joined
from lossledger.errors import CheckpointError
from lossledger.training.checkpoint import Checkpoint
from lossledger.training.data import array_data
from lossledger.training.parts import check_ranks
from test_groups import COLUMNS, model

L = ll.losses
N = 21
SITE = np.array(test_groups.SITE[:N])
data = functools.partial(test_groups.data, size=N)


class Squares(L.Loss):
    """A loss whose elements a test can know."""

    def call(self, y_true, y_pred):
        return (y_true - y_pred).square().mean(-1)


LOSSES = {
    "columns": lambda: L.BinaryCrossentropy(from_logits=True),
    "outputs": lambda: L.MeanSquaredError(),
    "classes": lambda: L.SparseCategoricalCrossentropy(from_logits=True),
    "own": Squares,
    "dice of samples": lambda: L.Dice(axis=(1,), from_logits="sigmoid"),
    "lovasz": lambda: L.LovaszHinge(),
    "several": lambda: 0.5 * L.BinaryCrossentropy(from_logits=True) + L.MeanAbsoluteError(),
}


def of(rows):
    return {
        (r.split, r.epoch, r.step, r.term, r.kind, r.group, r.presence): (r.minimum, r.maximum, r.squares) for r in rows
    }


def expect_equal(found, expected):
    assert set(found) == set(expected)
    for key, values in expected.items():
        assert (found[key][0] is None) == (values[0] is None), key
        if values[0] is not None:
            np.testing.assert_allclose(found[key], values, rtol=1e-12, atol=1e-14, err_msg=str(key))


def summary(values):
    return (values.min(), values.max(), (values**2).sum()) if values.size else (None, None, None)


@pytest.mark.parametrize("masked", [False, True])
def test_spread_is_that_of_all_elements(masked):
    x, y = data()
    mask = np.arange(N) % 4 > 0
    made = model(L.BinaryCrossentropy(from_logits=True))
    # A weight of a sample changes no element.
    given = {"sample_weight": torch.linspace(0.1, 5, N), "mask": torch.from_numpy(mask)} if masked else {}
    made.evaluate(x, y, verbose=0, batch_size=4, spread=True, groups={"site": SITE}, **given)
    z, t = made.predict(x), y.numpy()
    elements = np.logaddexp(0, z) - z * t
    counted = np.broadcast_to((mask if masked else np.ones(N, bool))[:, None], elements.shape)
    for row in made.ledger.rows:
        inside = counted
        if row.kind == "class":
            inside = inside & (np.arange(COLUMNS) == int(row.group)) & (t == (row.presence == "present"))
        elif row.kind == "site":
            inside = inside & (row.group == SITE)[:, None]
        assert row.count == inside.sum()
        np.testing.assert_allclose((row.minimum, row.maximum, row.squares), summary(elements[inside]), rtol=1e-12)


def test_spread_of_labels_is_that_of_their_entries():
    x, y = data(labels=True)
    made = model(L.SparseCategoricalCrossentropy(from_logits=True))
    made.evaluate(x, y, verbose=0, batch_size=4, spread=True)
    z = made.predict(x)
    elements = np.log(np.exp(z).sum(1)) - z[np.arange(N), y]
    for row in made.ledger.rows:
        inside = elements if row.kind == "term" else elements[y.numpy() == int(row.group)]
        np.testing.assert_allclose((row.minimum, row.maximum, row.squares), summary(inside), rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_spread_is_the_same_for_any_batches_and_windows(loss, masked):
    x, y = data(loss == "classes")
    if loss == "lovasz":
        y, x = y.unsqueeze(1), x.unsqueeze(1)
    given = {"groups": {"site": SITE}, "verbose": 0, "spread": True}
    given |= {"mask": torch.arange(N) % 6 > 0} if masked else {}
    made = model(LOSSES[loss]())
    made.evaluate(x, y, batch_size=N, **given)
    whole = of(made.ledger.rows)
    assert all(values[0] is not None for key, values in whole.items() if key[4] == "term")
    for size in (1, 4, 10):
        made.evaluate(x, y, batch_size=size, **given)
        expect_equal(of(made.ledger.rows), whole)
    options = {"epochs": 2, "seed": 1, **given}
    one = model(LOSSES[loss]()).fit(x, y, batch_size=12, **options).ledger
    parts = model(LOSSES[loss]()).fit(x, y, batch_size=4, accumulate=3, **options).ledger
    for key, values in of(one.rows).items():
        np.testing.assert_allclose(of(parts.rows)[key], values, rtol=1e-9, atol=1e-14)
    for row in one.rows:
        if row.count:
            # No variance is negative, and the mean lies between.
            assert row.squares / row.count >= (row.total / row.count) ** 2 * (1 - 1e-9)
            assert row.minimum - 1e-12 <= row.total / row.count <= row.maximum + 1e-12


def test_intervals_show_every_spike():
    x, y = data()
    made = model(L.MeanSquaredError())
    x[13] = 50.0
    options = {"batch_size": 2, "verbose": 0, "shuffle": False, "spread": True, "regularizers": None}
    options.pop("regularizers")
    ledger = made.fit(x, y * 30, ledger_steps=4, **options).ledger
    steps = [row for row in ledger.rows if row.kind == "term" and row.step is not None]
    (whole,) = [row for row in ledger.rows if row.kind == "term" and row.step is None]
    assert [row.step for row in steps] == [4, 8, 11]
    assert max(row.maximum for row in steps) == whole.maximum
    assert min(row.minimum for row in steps) == whole.minimum
    assert math.fsum(row.squares for row in steps) == pytest.approx(whole.squares, rel=1e-12)
    assert made.ledger.query("SELECT max(maximum) AS m FROM ledger WHERE step IS NOT NULL AND kind = 'term'").rows == [
        {"m": whole.maximum}
    ]


def test_what_has_no_elements_has_no_spread():
    x, y = data()
    made = model(L.Dice(axis=(0,), from_logits="sigmoid"), regularizers={"*.weight": "l2"})
    rows = made.fit(x, y, verbose=0, spread=True).ledger.rows
    assert {row.term for row in rows} == {"dice", "l2/*.weight"}
    assert all((row.minimum, row.maximum, row.squares) == (None, None, None) for row in rows)
    made = model("mse")
    assert all(row.minimum is None for row in made.fit(x, y, verbose=0).ledger.rows)


def test_an_element_that_is_not_a_number_is_seen_and_a_step_left_out_is_not():
    x, y = data()
    x[5] = math.nan
    made = model("mse", on_nonfinite="record")
    made.fit(x, y, verbose=0, spread=True)
    (row,) = [row for row in made.ledger.rows if row.kind == "term"]
    assert all(math.isnan(value) for value in (row.minimum, row.maximum, row.squares))
    made = model("mse", on_nonfinite="skip")
    made.fit(x, y, verbose=0, spread=True, batch_size=4)
    (row,) = [row for row in made.ledger.rows if row.kind == "term"]
    assert all(math.isfinite(value) for value in (row.minimum, row.maximum, row.squares))


@pytest.mark.parametrize("step", [3, 5, 9])
@pytest.mark.usefixtures("no_sync")
def test_a_resumed_run_has_the_spread_of_the_whole(tmp_path, step):
    def fitted(**options):
        x, y = data()
        given = {"batch_size": 4, "epochs": 2, "seed": 1, "verbose": 0, "spread": True, "ledger_steps": 4}
        return model("mse").fit(x, y, groups={"site": SITE}, **given, **options).ledger

    backup = ll.callbacks.BackupAndRestore(save_freq=1)
    with pytest.raises(Killed):
        fitted(run_dir=tmp_path / "run", callbacks=[KillBefore(step), backup])
    found = fitted(run_dir=tmp_path / "run", callbacks=[backup], resume=True)
    assert found.rows == fitted().rows
    assert ll.Ledger.open(tmp_path / "run").rows == found.rows


def test_another_number_of_ranks_is_refused_in_the_middle_of_an_epoch():
    x, y = data()
    held = array_data(x, y)
    alone, three = joined(None, torch.device("cpu")), SimpleNamespace(size=3, rank=0)
    for spread, passes in ((None, True), ({"whole": []}, False)):
        so_far = {"measures": {"own": {}}, "groups": None, "spread": spread}
        written = Checkpoint(1, {"epoch": {"pass": so_far}})
        check_ranks(written, alone, held)
        with contextlib.nullcontext() if passes else pytest.raises(CheckpointError, match="but spread=True keeps"):
            check_ranks(written, three, held)
