"""Worst slices: a planted slice is found, nothing is found where nothing is, and the numbers are those of NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lossledger as ll
from interrupted import KillBefore, Killed
from lossledger.errors import InputError
from lossledger.ledger.slices import student_tail, worst_slices


def drawn(rng, samples):
    """Three kinds of groups of unequal sizes."""
    return {
        "site": rng.choice(["north", "south", "east"], samples, p=[0.5, 0.3, 0.2]),
        "language": rng.choice(["de", "en", "fr", "it"], samples),
        "length": rng.integers(0, 5, samples),
    }


def test_a_planted_conjunction_is_the_worst_slice():
    rng = np.random.default_rng(0)
    groups = drawn(rng, 4000)
    planted = (groups["site"] == "east") & (groups["language"] == "fr")
    losses = rng.exponential(1.0, 4000) * np.where(planted, 2.0, 1.0)
    found = worst_slices(losses, groups)
    assert found.rows[0].groups == (("site", "east"), ("language", "fr"))
    assert found.rows[0].p < 1e-3
    # Its parts are worse than the rest too, but no conjunction with the length is worse than the site or the language.
    significant = [row.groups for row in found if row.p <= 0.05]
    assert not any("length" in dict(groups) for groups in significant)
    assert found.tested == (3 + 4 + 5) + (12 + 15 + 20)


def test_numbers_of_a_slice_are_those_of_its_samples():
    rng = np.random.default_rng(1)
    groups = drawn(rng, 500)
    losses = rng.normal(1e6, 1.0, 500)
    for row in worst_slices(losses, groups, k=1000, minimum_count=5):
        inside = np.all([groups[kind].astype(str) == name for kind, name in row.groups], axis=0)
        assert row.count == inside.sum()
        assert row.share == inside.mean()
        assert row.mean == pytest.approx(losses[inside].mean(), rel=1e-12)
        assert row.outside == pytest.approx(losses[~inside].mean(), rel=1e-12)
        assert row.effect == pytest.approx(losses[inside].mean() - losses[~inside].mean(), abs=1e-8)


def test_p_value_of_one_group_is_that_of_welch_times_the_number_of_tests():
    # Two groups of 3 and 4: t = 4.5 / sqrt(1/3 + 5/12), with 4.9 degrees of freedom.
    losses = [6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0]
    found = worst_slices(losses, {"site": ["a"] * 3 + ["b"] * 4}, minimum_count=3)
    a, b = 1.0 / 3, (5.0 / 3) / 4
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 3)
    one = student_tail(4.5 / math.sqrt(a + b), freedom)
    assert found.rows[0].p == pytest.approx(2 * one, rel=1e-12)
    assert found.rows[1].p == pytest.approx(1 - one, rel=1e-12)


@pytest.mark.parametrize(
    ("t", "freedom", "exact"),
    [
        (1.0, 1.0, 0.25),
        (-1.0, 1.0, 0.75),
        (math.sqrt(2.0), 2.0, 0.5 - math.sqrt(2.0) / (2 * math.sqrt(4.0))),
        (40.0, 1.0, math.atan(1 / 40.0) / math.pi),
        (1.959963984540054, 1e9, 0.025),
    ],
)
def test_tail_of_students_t(t, freedom, exact):
    assert student_tail(t, freedom) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", ["normal", "exponential", "lognormal"])
def test_without_an_effect_false_findings_stay_below_the_level(name):
    draws, wrong = 200, 0
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        groups = drawn(rng, 600)
        losses = getattr(rng, name)(size=600)
        wrong += worst_slices(losses, groups, minimum_count=20).significant > 0
    assert wrong <= 0.05 * draws


def test_a_conjunction_that_is_one_of_its_parts_is_not_tested():
    rng = np.random.default_rng(2)
    site = rng.choice(["a", "b"], 400)
    found = worst_slices(rng.normal(size=400), {"site": site, "country": np.where(site == "a", "A", "B")})
    assert found.tested == 4


def test_small_slices_are_not_tested_and_losses_that_are_not_finite_are_counted():
    losses = [1.0] * 50 + [9.0] * 5 + [math.nan] * 5
    site = ["a"] * 50 + ["b"] * 10
    found = worst_slices(losses, {"site": site})
    assert (found.tested, found.samples, found.left_out, len(found)) == (0, 55, 5, 0)
    assert "5 samples whose loss is not finite were left out" in str(found)


def test_three_kinds_can_be_joined():
    rng = np.random.default_rng(3)
    groups = drawn(rng, 20000)
    planted = (groups["site"] == "east") & (groups["language"] == "fr") & (groups["length"] == 2)
    losses = rng.exponential(1.0, 20000) * np.where(planted, 3.0, 1.0)
    assert worst_slices(losses, groups, depth=3).rows[0].groups == (
        ("site", "east"),
        ("language", "fr"),
        ("length", "2"),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {}}, "at least one kind"),
        ({"groups": {"site": ["a"]}}, r"groups\['site'\].*each of 3"),
        ({"k": 0}, "k: expected a whole number from 1"),
        ({"depth": 4}, "depth: expected a whole number from 1 to 3"),
        ({"minimum_count": 1}, "minimum_count: expected a whole number from 2"),
        ({"level": 1.5}, "level: expected a number between 0 and 1"),
        ({"losses": [[1.0]]}, "one number a sample"),
    ],
)
def test_wrong_arguments_say_what_was_expected(options, message):
    given = {"losses": [1.0, 2.0, 3.0], "groups": {"site": ["a", "b", "c"]}} | options
    with pytest.raises(InputError, match=message):
        worst_slices(**given)


# --- from a ledger ---------------------------------------------------------------------------------------------------

N = 1200


def planted(seed=0):
    """Samples of three kinds of groups; the targets of one conjunction are wrong."""
    rng = np.random.default_rng(seed)
    groups = drawn(rng, N)
    x = rng.normal(size=(N, 3)).astype(np.float32)
    y = x @ np.array([[1.0], [-2.0], [0.5]], np.float32)
    bad = (groups["site"] == "east") & (groups["language"] == "fr")
    y[bad] += rng.choice([-3.0, 3.0], (bad.sum(), 1)).astype(np.float32)
    return x, y, groups


def model():
    torch.manual_seed(0)
    made = ll.Model(torch.nn.Linear(3, 1))
    made.compile(lambda p: torch.optim.SGD(p, lr=0.1), "mse")
    return made


def test_fit_keeps_the_groups_of_its_samples_and_finds_the_planted_slice(tmp_path):
    x, y, groups = planted()
    options = {"epochs": 3, "verbose": 0, "seed": 0, "samples": True, "groups": groups, "validation_split": 0.5}
    ledger = model().fit(x, y, run_dir=tmp_path / "run", **options).ledger
    found = ledger.worst_slices()
    assert found.rows[0].groups == (("language", "fr"), ("site", "east"))
    assert found.rows[0].p < 1e-4
    assert found.samples == N // 2
    opened = ll.Ledger.open(tmp_path / "run")
    assert opened.worst_slices() == found
    # The groups are written once, not every epoch.
    assert len(list((tmp_path / "run" / "groups").glob("*.parquet"))) == 1
    columns = opened._groups().columns()
    assert len(columns["sample"].values) == 3 * N
    held = opened.worst_slices(split="validation", epoch=2)
    top = opened.top_losses(N, split="validation", epoch=2)
    sites = np.array([groups["site"][row["sample"]] == "east" for row in top])
    losses = np.array([row["loss"] for row in top])
    row = next(row for row in opened.worst_slices(100, "validation", 2, depth=1) if row.groups == (("site", "east"),))
    assert (row.count, row.mean) == (sites.sum(), pytest.approx(losses[sites].mean(), rel=1e-12))
    assert held.samples == len(losses) == N // 2


def test_batches_of_a_loader_have_the_slices_of_their_arrays():
    x, y, groups = planted()
    one, other = model(), model()
    one.evaluate(x, y, verbose=0, samples=True, groups=groups)
    batches = [
        ll.Batch(x[i : i + 32], y[i : i + 32], groups={kind: ids[i : i + 32] for kind, ids in groups.items()})
        for i in range(0, N, 32)
    ]
    other.evaluate(batches, verbose=0, samples=True)
    assert other.ledger.worst_slices() == one.ledger.worst_slices()


def test_sql_joins_samples_and_groups(tmp_path):
    x, y, groups = planted()
    options = {"epochs": 2, "batch_size": 512, "verbose": 0, "seed": 1, "samples": True, "groups": groups}
    ledger = model().fit(x, y, run_dir=tmp_path / "a", **options).ledger
    sql = """
        SELECT run, kind, "group" AS name, count(*) AS n, avg(mean) AS mean
        FROM samples JOIN groups USING (run, split, sample) WHERE epoch = 2 GROUP BY ALL ORDER BY ALL
    """
    (losses,) = [ledger.samples.where(epoch=2)]
    order = np.argsort(losses["sample"])
    expected = [
        (
            "a",
            kind,
            str(name),
            int((np.asarray(ids) == name).sum()),
            losses["mean"][order][np.asarray(ids) == name].mean(),
        )
        for kind, ids in sorted(groups.items())
        for name in sorted(set(ids))
    ]
    for book in (ledger, ll.Ledger.open(tmp_path / "a")):
        found = [tuple(row.values()) for row in book.query(sql)]
        assert [row[:4] for row in found] == [row[:4] for row in expected]
        assert [row[4] for row in found] == pytest.approx([row[4] for row in expected], rel=1e-9)
    # Of several runs each has its own.
    model().fit(x[:64], y[:64], run_dir=tmp_path / "b", **options | {"groups": {"side": ["odd", "even"] * 32}})
    several = ll.Ledger.open(tmp_path)
    counts = several.query('SELECT run, kind, count(*) AS n FROM "groups" GROUP BY ALL ORDER BY ALL').rows
    assert counts[-1] == {"run": "b", "kind": "side", "n": 64} and {row["run"] for row in counts} == {"a", "b"}
    assert ll.Ledger().query("SELECT count(*) AS n FROM groups").rows == [{"n": 0}]


def test_groups_can_be_given_to_a_ledger_of_samples():
    x, y, groups = planted()
    made = model()
    made.evaluate(x, y, verbose=0, samples=True, groups=groups)
    expected = made.ledger.worst_slices()
    made.evaluate(x, y, verbose=0, samples=True)
    with pytest.raises(InputError, match="no groups of the samples of 'test'"):
        made.ledger.worst_slices()
    by_sample = {kind: {i: str(name) for i, name in enumerate(ids)} for kind, ids in sorted(groups.items())}
    assert made.ledger.worst_slices(groups=by_sample) == expected
    del by_sample["site"][5]
    assert made.ledger.worst_slices(100, groups=by_sample, depth=1, minimum_count=2).tested == 12
    made.evaluate(x, y, verbose=0, groups=groups)
    with pytest.raises(InputError, match="no samples"):
        made.ledger.worst_slices()


@pytest.mark.usefixtures("no_sync")
def test_a_resumed_run_has_the_group_of_every_sample(tmp_path):
    x, y, groups = planted()

    def fitted(folder, **options):
        given = {"epochs": 2, "batch_size": 200, "seed": 3, "verbose": 0, "samples": True, "groups": groups}
        return model().fit(x, y, run_dir=tmp_path / folder, **given, **options).ledger

    backup = ll.callbacks.BackupAndRestore(save_freq=1)
    for moment in (4, 9):
        with pytest.raises(Killed):
            fitted(f"run {moment}", callbacks=[KillBefore(moment), backup])
        resumed = fitted(f"run {moment}", callbacks=[backup], resume=True)
        whole = fitted(f"whole {moment}")
        for epoch in (1, 2):
            assert resumed.worst_slices(epoch=epoch) == whole.worst_slices(epoch=epoch)
        assert len(resumed._groups().columns()["sample"].values) == 3 * N
