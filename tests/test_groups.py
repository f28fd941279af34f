"""Named groups: rows that add up to their terms, over batches, windows, masks, weights and resumed runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lossledger as ll
from interrupted import KillBefore, Killed
from lossledger.errors import CheckpointError, InputError, InputTypeError

L = ll.losses
N, COLUMNS = 26, 3
SITE = [("north", "south", "east")[i * i % 5 % 3] for i in range(N)]
LENGTH = np.arange(N) % 7 // 2
GROUPS = {"site": SITE, "length": LENGTH}
LOSSES = {
    "cross-entropy of columns": lambda: L.BinaryCrossentropy(from_logits=True),
    "cross-entropy of classes": lambda: L.SparseCategoricalCrossentropy(from_logits=True),
    "squares": lambda: L.MeanSquaredError(),
    "sum": lambda: L.MeanAbsoluteError(reduction="sum"),
    "mean of weights": lambda: L.MeanSquaredError(reduction="mean_with_sample_weight"),
    "dice of samples": lambda: L.Dice(axis=(1,), from_logits="sigmoid"),
    "dice of the batch": lambda: L.Dice(from_logits="sigmoid"),
    "dice of classes over the batch": lambda: L.Dice(axis=(0,), from_logits="sigmoid"),
    "power of a ratio": lambda: L.FocalTversky(axis=(0,), from_logits="sigmoid"),
    "own": lambda: lambda y_true, y_pred: (y_true - y_pred).abs().mean(-1),
    "several": lambda: 0.5 * L.BinaryCrossentropy(from_logits=True) + L.Dice(axis=(0,), from_logits="sigmoid"),
}


def data(labels=False, size=N):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(size, 4, generator=g, dtype=torch.float64)
    y = (torch.rand(size, COLUMNS, generator=g) < 0.5).double()
    return x, y.argmax(-1) if labels else y


def model(loss, **options):
    torch.manual_seed(0)
    made = ll.Model(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, COLUMNS)).double())
    made.compile("sgd", loss, **options)
    return made


def by_name(ledger, kind, **where):
    return {
        (r["split"], r["epoch"], r["term"], r[kind]): r for r in ledger.table(["split", "epoch", "term", kind], **where)
    }


def expect_equal(found, expected, tolerance=1e-11):
    assert set(found) == set(expected)
    for key, row in expected.items():
        for name in ("total", "count", "weight", "contribution"):
            np.testing.assert_allclose(found[key][name], row[name], rtol=tolerance, atol=1e-14, err_msg=f"{key} {name}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights and masks"])
def test_groups_add_up_to_their_terms_for_any_batches(loss, weighted):
    x, y = data(loss == "cross-entropy of classes")
    given = {"sample_weight": torch.linspace(0.5, 2, N), "mask": torch.arange(N) % 6 > 0} if weighted else {}
    made = model(LOSSES[loss]())
    made.evaluate(x, y, verbose=0, groups=GROUPS, batch_size=N, **given)
    whole = made.ledger
    assert not whole.balance()
    for kind, names in (("site", SITE), ("length", LENGTH)):
        found = by_name(whole, kind)
        assert {key[3] for key in found} == {str(name) for name in names}
        for size in (1, 4, 11):
            made.evaluate(x, y, verbose=0, groups=GROUPS, batch_size=size, **given)
            expect_equal(by_name(made.ledger, kind), found)
        if "ratio" in {row.form for row in whole.rows}:
            continue
        # What a group adds up to is what it adds up to alone.
        for name in set(map(str, names)):
            inside = np.array([str(other) == name for other in names])
            part = {key: value[inside] for key, value in given.items()}
            made.evaluate(x[inside], y[inside], verbose=0, **part)
            (alone,) = made.ledger.table(["term"])
            row = next(row for key, row in found.items() if key[3] == name)
            assert row["count"] == alone["count"]
            np.testing.assert_allclose([row["total"], row["weight"]], [alone["total"], alone["weight"]], rtol=1e-12)


def test_groups_change_no_other_row_and_stand_beside_classes():
    x, y = data()
    options = {"batch_size": 4, "epochs": 2, "seed": 1, "verbose": 0, "validation_split": 0.3, "accumulate": 2}
    options |= {"class_weight": {0: 2.0}, "ledger_steps": 2}
    plain = model(LOSSES["several"](), metrics=["binary_accuracy"]).fit(x, y, **options)
    found = model(LOSSES["several"](), metrics=["binary_accuracy"]).fit(x, y, groups=GROUPS, **options)
    assert found.history == plain.history
    assert [row for row in found.ledger.rows if row.kind not in GROUPS] == list(plain.ledger.rows)
    assert {row.kind for row in found.ledger.rows} == {"term", "class", "site", "length"}
    assert not found.ledger.balance()
    for split, size in (("training", 18), ("validation", 8)):
        rows = found.ledger.table(["site"], split=split, epoch=2, term="binary_crossentropy")
        assert sum(row["count"] for row in rows) == COLUMNS * size
        assert {row["site"] for row in rows} == set(SITE[:18] if split == "training" else SITE[18:])


@pytest.mark.parametrize("loss", ["several", "power of a ratio"])
def test_windows_have_the_groups_of_one_big_batch(loss):
    x, y = data()
    options = {"epochs": 2, "seed": 1, "verbose": 0, "groups": GROUPS, "class_weight": {1: 3.0}}
    whole = model(LOSSES[loss]()).fit(x, y, batch_size=12, **options).ledger
    parts = model(LOSSES[loss]()).fit(x, y, batch_size=4, accumulate=3, **options).ledger
    for kind in GROUPS:
        expect_equal(by_name(parts, kind), by_name(whole, kind))


def batches(size=4, **more):
    x, y = data()
    return [
        ll.Batch(
            x[i : i + size],
            y[i : i + size],
            groups={"site": SITE[i : i + size], "length": LENGTH[i : i + size]},
            **more,
        )
        for i in range(0, N, size)
    ]


def test_batches_of_a_loader_carry_their_groups():
    x, y = data()
    one, other = model(LOSSES["several"]()), model(LOSSES["several"]())
    options = {"epochs": 2, "verbose": 0}
    arrays = one.fit(x, y, batch_size=4, shuffle=False, groups=GROUPS, validation_data=batches(), **options).ledger
    loader = other.fit(batches(), validation_data=batches(5), **options).ledger
    for kind in GROUPS:
        expect_equal(by_name(loader, kind), by_name(arrays, kind))


@pytest.mark.parametrize("ids", [torch.tensor([3, 3, 5]), np.array([3, 3, 5], np.uint8), (3, 3, 5), ["3", "3", "5"]])
def test_ids_are_text_or_whole_numbers_in_any_array(ids):
    made = model("mse")
    x, y = data()
    made.evaluate(x[:3], y[:3], verbose=0, groups={"site": ids})
    assert [(row["site"], row["count"]) for row in made.ledger.table(["site"])] == [("3", 6), ("5", 3)]


def test_steps_that_are_left_out_count_in_no_group():
    x, y = data()
    x[5] = torch.nan
    made = model("mse", on_nonfinite="skip")
    ledger = made.fit(x, y, batch_size=4, shuffle=False, verbose=0, groups=GROUPS).ledger
    kept = [i for i in range(N) if not 4 <= i < 8]
    for kind, names in GROUPS.items():
        for row in ledger.table([kind]):
            assert row["count"] == COLUMNS * sum(str(names[i]) == row[kind] for i in kept)
    assert not ledger.balance()


@pytest.mark.parametrize("loss", ["several", "power of a ratio", "own"])
@pytest.mark.parametrize("loader", [False, True], ids=["arrays", "batches"])
@pytest.mark.parametrize("every", [1, 3, 50])
def test_groups_of_steps_add_up_to_those_of_epochs(loss, loader, every):
    given = (batches(),) if loader else data()
    more = {} if loader else {"groups": GROUPS, "batch_size": 4}
    options = {"epochs": 2, "seed": 1, "verbose": 0, "accumulate": 2, **more}
    ledger = model(LOSSES[loss]()).fit(*given, ledger_steps=every, **options).ledger
    assert not ledger.balance()
    for kind in GROUPS:
        epochs = by_name(ledger, kind)
        expect_equal(by_name(model(LOSSES[loss]()).fit(*given, **options).ledger, kind), epochs)
        lines = ledger.table(["epoch", "step", "term", kind])
        # Four windows of an epoch.
        assert {row["step"] for row in lines} == {4 * e + s for e in (0, 1) for s in {*range(every, 5, every), 4}}
        for (_, epoch, term, group), whole in epochs.items():
            own = [row for row in lines if (row["epoch"], row["term"], row[kind]) == (epoch, term, group)]
            for name in ("total", "count"):
                assert sum(row[name] for row in own) == pytest.approx(whole[name], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loader", [False, True], ids=["arrays", "batches"])
@pytest.mark.parametrize("step", [3, 7, 9])
@pytest.mark.usefixtures("no_sync")
def test_a_resumed_run_has_every_sample_of_a_group_once(tmp_path, step, loader):
    def fitted(groups=GROUPS, **options):
        given = (batches(),) if loader else data()
        more = {} if loader else {"groups": groups, "batch_size": 4}
        more |= {"epochs": 2, "seed": 1, "verbose": 0, "ledger_steps": 3}
        return model(LOSSES["several"]()).fit(*given, **more, **options).ledger

    backup = ll.callbacks.BackupAndRestore(save_freq=1)
    with pytest.raises(Killed):
        fitted(run_dir=tmp_path / "run", callbacks=[KillBefore(step), backup])
    if not loader and step != 7:
        other = {**GROUPS, "site": [name.upper() for name in SITE]}
        with pytest.raises(CheckpointError, match=r"groups\['site'\]: expected the groups of the run"):
            fitted(other, run_dir=tmp_path / "run", callbacks=[backup], resume=True)
    found = fitted(run_dir=tmp_path / "run", callbacks=[backup], resume=True)
    assert found.rows == fitted().rows
    assert ll.Ledger.open(tmp_path / "run").rows == found.rows


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (["a"] * N, InputTypeError, "groups: expected a dict by kind"),
        ({"site": ["a"] * 3}, InputError, rf"groups\['site'\]: expected one group for each of {N} samples.*\(3,\)"),
        ({"site": [["a"]] * N}, InputError, r"received shape \(26, 1\)"),
        ({"site": np.linspace(0, 1, N)}, InputTypeError, r"groups\['site'\]: expected text or whole numbers"),
        ({"site": ["a", None] * (N // 2)}, InputTypeError, "received None at sample 1"),
        ({"epoch": ["a"] * N}, InputError, "received 'epoch'; the ledger uses it itself"),
        ({"class": ["a"] * N}, InputError, "received 'class'"),
        ({3: ["a"] * N}, InputError, "received 3; it is no text"),
    ],
)
def test_wrong_groups_are_refused(groups, error, message):
    made = model("mse")
    x, y = data()
    for call in (made.fit, made.evaluate):
        with pytest.raises(error, match=message):
            call(x, y, verbose=0, groups=groups)


def test_wrong_groups_of_batches_are_refused():
    made = model("mse")
    with pytest.raises(InputError, match="groups: x is an iterable of batches, which carry their own"):
        made.fit(batches(), verbose=0, groups=GROUPS)
    x, y = data()
    with pytest.raises(InputError, match=r"batch 1: groups\['site'\]: expected one group for each of 4 samples"):
        made.fit([batches()[0], ll.Batch(x[:4], y[:4], groups={"site": ["a"], "length": [1] * 4})], verbose=0)
    with pytest.raises(InputError, match=r"expected the kinds \['length', 'site'\] in every batch"):
        made.evaluate([*batches(), (x[:4], y[:4])], verbose=0)


def test_a_loss_that_cannot_be_divided_by_sample_says_so():
    made = model(lambda y_true, y_pred: (y_true - y_pred).square().mean())
    x, y = data()
    with pytest.raises(InputError, match="cannot be divided by 'sample'"):
        made.evaluate(x, y, verbose=0, groups=GROUPS)


@pytest.mark.parametrize("loss", ["cross-entropy of columns", "cross-entropy of classes", "squares"])
@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_elements_of_arrays_are_computed_once(monkeypatch, loss, samples, accumulate):
    x, y = data(loss == "cross-entropy of classes")
    kind, calls, inside = type(LOSSES[loss]()), [], []

    def counted(name):
        known = getattr(kind, name)

        def call(self, batch):
            # A gradient may make its elements with the other.
            calls.extend([name] * (not inside))
            inside.append(name)
            found = known(self, batch)
            inside.pop()
            return found

        return call

    for name in ("_slopes", "_elements"):
        monkeypatch.setattr(kind, name, counted(name))
    made = model(LOSSES[loss]())
    options = {"batch_size": 4, "verbose": 0, "samples": samples, "groups": GROUPS}
    made.fit(x, y, accumulate=accumulate, checks="off", **options)
    # Of seven batches, with their gradients.
    assert calls == ["_slopes"] * 7
    trained = made.ledger
    assert (
        not trained.balance()
        and sum(row["count"] for row in trained.table(["site"])) == trained.table().rows[0]["count"]
    )
    calls.clear()
    made.evaluate(x, y, **options)
    assert calls == ["_elements"] * 7
    # A loader computes them twice, and has the same rows.
    evaluated = {kind: by_name(made.ledger, kind) for kind in GROUPS}
    batches = [
        ll.Batch(x[i : i + 4], y[i : i + 4], groups={"site": SITE[i : i + 4], "length": LENGTH[i : i + 4]})
        for i in range(0, N, 4)
    ]
    made.evaluate(batches, verbose=0)
    for kind, rows in evaluated.items():
        expect_equal(by_name(made.ledger, kind), rows)
