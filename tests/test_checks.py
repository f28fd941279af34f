"""Checks: silent on what is right, found where it is wrong, each rule with a fault, a near miss and a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import lossledger as ll
from checks_correct import CORRECT, LOGITS, binary, labels, normal
from checks_faults import FAULTS, NEAR
from lossledger.cli import main
from lossledger.errors import CheckError, InputError, NonFiniteError, UnknownNameError
from lossledger.explain.checks.probe import can_be_called_again
from lossledger.explain.checks.registry import CODES, FAMILIES, RULES

L = ll.losses
PAGES = Path(__file__).resolve().parents[1] / "docs" / "checks"
# Rules that only a training has the numbers for; their faults and near misses are trainings below.
OF_EPOCHS = {rule.code for rule in RULES if rule.runs == "epoch"}
ONLY_EPOCHS = OF_EPOCHS - {rule.code for rule in RULES if rule.runs != "epoch"}


def codes(setup):
    return [finding.code for finding in ll.check(**setup())]


# --- the corpus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_set_up_is_silent(name):
    assert [str(finding) for finding in ll.check(**CORRECT[name]())] == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    code, setup = FAULTS[name]
    found = [finding for finding in ll.check(**setup()) if finding.code == code]
    assert found, f"{code} is missing among {codes(setup)}"
    for finding in found:
        # A number, and what to do.
        assert re.search(r"\d", finding.message)
        assert finding.remedy
        json.dumps(finding.to_dict())


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_not_found(name):
    assert name.partition(" ")[0] not in codes(NEAR[name])


def test_every_code_has_a_fault_and_a_near_miss():
    assert {code for code, _ in FAULTS.values()} == set(CODES) - ONLY_EPOCHS
    assert {name.partition(" ")[0] for name in NEAR} == set(CODES) - ONLY_EPOCHS
    assert {"REC1"} == ONLY_EPOCHS
    assert len(CORRECT) >= 60
    assert len(FAULTS) >= 60


def test_every_family_is_there():
    named = {"SHAPE", "AXIS", "SPACE", "FLOOR", "RED", "DEN", "W", "GA", "SCALE", "TERM", "NAN", "CLS", "REC", "DUP"}
    assert set(FAMILIES) == named | {"PREC", "TOK"}
    for family in FAMILIES:
        assert any(re.fullmatch(rf"{family}\d+", code) for code in CODES)


def test_the_page_shows_the_measured_rates():
    loud = sum(bool(ll.check(**setup())) for setup in CORRECT.values())
    missed = sum(code not in codes(setup) for code, setup in FAULTS.values())
    text = " ".join((PAGES / "index.md").read_text(encoding="utf-8").split())
    stated = re.search(
        r"of more than (\d+) correct set-ups (\d+) \(([\d.]+) %\) .*? "
        r"of more than (\d+) seeded faults (\d+) \(([\d.]+) %\)",
        text,
    )
    assert stated is not None
    right, said, share, wrong, unseen, share_unseen = stated.groups()
    assert len(CORRECT) > int(right) >= 60
    assert len(FAULTS) > int(wrong) >= 60
    assert (loud, missed) == (int(said), int(unseen))
    assert float(share) == round(100 * loud / len(CORRECT), 1)
    assert float(share_unseen) == round(100 * missed / len(FAULTS), 1)


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_a_page_whose_example_prints_it(code):
    """The examples are executed, and what they print compared, with all pages of the documentation."""
    page = PAGES / f"{code}.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {code}: ")
    for part in ("## Why", "## Example", "## Fix", "## When to ignore"):
        assert part in text, f"{page.name} lacks {part}"
    example = text.partition("## Example")[2].partition("## Fix")[0]
    assert re.search(rf"^{code} ", example, re.MULTILINE), "the example does not print the code"


def test_the_map_lists_every_code():
    text = (PAGES / "index.md").read_text(encoding="utf-8")
    for code in CODES:
        assert f"[{code}]({code}.md)" in text


# --- the interface --------------------------------------------------------------------------------------------------


def test_codes_are_ignored_by_name():
    setup = FAULTS["softmax twice, torch, 4 classes"][1]()
    assert ll.check(**setup, ignore=("SPACE1",)) == []
    assert ll.check(**setup, ignore="SPACE1") == []
    assert ll.check(**setup, ignore="SPACE") == []
    assert ll.check(**setup, ignore=("TERM", "W")) != []
    with pytest.raises(UnknownNameError, match="SPACE1"):
        ll.check(**setup, ignore=("SPACE9",))


def test_only_losses_with_a_class_axis_are_told_to_pass_it():
    targets = torch.eye(3)[torch.arange(60).reshape(4, 15) % 3].movedim(-1, 1)
    output = normal(4, 3, 15)
    (found,) = ll.check(ll.losses.CategoricalCrossentropy(from_logits=True), targets, output, ignore=("CLS", "TERM"))
    assert found.code == "AXIS1" and found.remedy.endswith("or pass axis=1.")
    # There, axis is that of the sums.
    found = [f for f in ll.check(ll.losses.Dice(from_logits="softmax"), targets, output) if f.code == "AXIS1"]
    assert [f.remedy for f in found] == ["Move the classes to the end, for example movedim(1, -1)."]


def test_an_error_that_no_rule_explains_is_raised():
    with pytest.raises(InputError, match="labels must be integers"):
        ll.check(nn.CrossEntropyLoss(), torch.tensor([0, 7]), normal(2, 3))
    with pytest.raises(InputError, match="accumulate"):
        ll.check("mse", normal(4, 1), normal(4, 1), accumulate=0)


def test_the_caller_s_arrays_are_left_alone():
    y_true, y_pred = normal(16, 2), normal(16, 2, seed=3).requires_grad_()
    before = y_true.clone(), y_pred.detach().clone()
    ll.check(lambda y, p: (y - p).square().mean(), y_true, y_pred * 1)
    assert torch.equal(y_true, before[0])
    assert torch.equal(y_pred.detach(), before[1])
    assert y_pred.grad is None


def test_random_numbers_are_not_drawn():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for setup in (CORRECT["masks with Dice"], FAULTS["a scalar that sums"][1]):
        arguments = setup()
        torch.manual_seed(3)
        ll.check(**arguments)
        assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda calls: lambda y, p: calls.append(1) or (y - p).square().sum(),
        lambda calls: lambda y, p: ((y - p) * torch.rand(1)).square().sum() + (calls.append(1) or 0),
        lambda calls: Counting(calls),
    ],
    ids=["appends", "random", "module with a buffer"],
)
def test_a_loss_that_remembers_is_called_once_by_check_and_not_by_fit(make):
    calls = []
    ll.check(make(calls), normal(8, 1), normal(8, 1))
    assert len(calls) == 1
    counts = []
    for checks in ("off", "warn"):
        calls.clear()
        fitted(L.FunctionLoss(make(calls), name="own"), normal(8, 3), normal(8, 1), checks=checks, batch_size=4)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_a_loss_that_talks_to_other_ranks_is_not_called_again():
    def over_ranks(y_true, y_pred):
        value = (y_true - y_pred).square().sum()
        torch.distributed.all_reduce(value)
        return value

    assert not can_be_called_again(L.FunctionLoss(over_ranks))
    assert can_be_called_again(L.FunctionLoss(lambda y_true, y_pred: y_pred.gather(1, y_true)))


class Counting(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, y_true, y_pred):
        self.calls.append(1)
        self.seen += 1
        return (y_true - y_pred).square().sum()


# --- fit ------------------------------------------------------------------------------------------------------------


def fitted(loss, x, y, *, width=None, epochs=1, end=None, compiled=None, optimizer="adam", **more):
    torch.manual_seed(0)
    width = width or (y.shape[-1] if y.is_floating_point() else int(y.max()) + 1)
    net = nn.Sequential(nn.Linear(x.shape[-1], width), *([] if end is None else [end]))
    model = ll.Model(net)
    model.compile(optimizer=optimizer, loss=loss, **(compiled or {}))
    return model.fit(x, y, epochs=epochs, verbose=more.pop("verbose", 0), seed=0, **more)


def recorded(history):
    return [finding["code"] for finding in history.ledger.info.get("findings", [])]


USUAL = {
    "regression": lambda: fitted("mse", normal(64, 3), normal(64, 1), epochs=6),
    "classes": lambda: fitted(
        L.SparseCategoricalCrossentropy(**LOGITS), normal(256, 3), normal(256, 3).argmax(-1), epochs=6
    ),
    "classes of torch": lambda: fitted(nn.CrossEntropyLoss(), normal(256, 3), normal(256, 3).argmax(-1), epochs=6),
    "labels": lambda: fitted(
        L.BinaryCrossentropy(**LOGITS), normal(256, 3), (normal(256, 3) > 0.5).float(), epochs=6, validation_split=0.2
    ),
    "sigmoid": lambda: fitted(
        L.BinaryCrossentropy(), normal(256, 3), (normal(256, 3) > 0.5).float(), epochs=6, end=nn.Sigmoid()
    ),
    "two terms": lambda: fitted(
        L.BinaryCrossentropy(**LOGITS) + L.Dice(from_logits="sigmoid"), normal(256, 3), binary(256, 2), epochs=3
    ),
    "function": lambda: fitted(lambda y, p: (y - p).abs().mean(-1), normal(64, 3), normal(64, 1), epochs=3),
    "weights in both": lambda: fitted(
        "mse",
        normal(64, 3),
        normal(64, 1),
        sample_weight=torch.full((64,), 2.0),
        validation_data=(normal(8, 3), normal(8, 1), torch.full((8,), 2.0)),
    ),
    # Passes the level of the base rate on its way down.
    "slow": lambda: fitted(
        L.BinaryCrossentropy(**LOGITS), normal(256, 3), (normal(256, 3) > 0.5).float(), epochs=40, batch_size=256
    ),
    "accumulated": lambda: fitted("mse", normal(64, 3), normal(64, 1), epochs=3, accumulate=2, batch_size=8),
}


@pytest.mark.parametrize("name", USUAL)
def test_a_usual_training_is_silent(name):
    assert recorded(USUAL[name]()) == []


rare = torch.zeros(2000, 2)
rare[:, 0] = (normal(2000, 3)[:, 0] > 0).float()
rare[::200, 1] = 1.0

TRAININGS = {
    "SPACE1": lambda **k: fitted(nn.CrossEntropyLoss(), normal(64, 3), labels(64, classes=3), end=nn.Softmax(-1), **k),
    "RED2": lambda **k: fitted(lambda y, p: (y - p).square().sum(), normal(64, 3), normal(64, 1), **k),
    "W3": lambda **k: fitted("mse", normal(64, 3), normal(64, 1), sample_weight=torch.arange(64) + 50.0, **k),
    "DEN1": lambda **k: fitted(
        "mse", normal(64, 3), normal(64, 1), sample_weight=torch.arange(64) % 2, shuffle=False, **k
    ),
    "REC1": lambda **k: fitted(
        L.SparseCategoricalCrossentropy(**LOGITS),
        normal(64, 3),
        labels(64, classes=3),
        class_weight={1: 5.0},
        validation_data=(normal(8, 3), labels(8, classes=3)),
        **k,
    ),
    "CLS2": lambda **k: fitted(
        L.BinaryCrossentropy(**LOGITS),
        normal(2000, 3),
        rare,
        epochs=12,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        compiled={"class_names": ["often", "rare"]},
        **k,
    ),
    "CLS3": lambda **k: fitted(
        L.SparseCategoricalCrossentropy(**LOGITS), normal(200, 3), labels(200, classes=3) + 1, width=4, **k
    ),
    "FLOOR2": lambda **k: fitted(
        L.SparseCategoricalCrossentropy(**LOGITS),
        torch.zeros(600, 3),
        labels(600, classes=2),
        epochs=30,
        optimizer="sgd",
        **k,
    ),
    "TERM1": lambda **k: fitted(
        L.MeanSquaredError() + 1e-4 * L.MeanAbsoluteError(), normal(64, 3), normal(64, 1), epochs=3, **k
    ),
}


@pytest.mark.parametrize("code", TRAININGS)
def test_fit_finds_it_once_prints_it_and_records_it(code, capsys, tmp_path):
    history = TRAININGS[code](verbose=2, run_dir=tmp_path / "run")
    assert recorded(history).count(code) == 1
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{code} ")]
    assert len(printed) == 1
    assert [f["code"] for f in ll.Ledger.open(tmp_path / "run").info["findings"]].count(code) == 1


def weighted_like(training, validation, batches=False):
    """The remedies for a mean weight of training and validation entries; `None`: no weights are given."""
    made = [
        () if mean is None else (torch.tensor([0.5, 1.5]).repeat(n // 2) * mean,)
        for mean, n in ((training, 64), (validation, 8))
    ]
    held = (normal(8, 3), normal(8, 1), *made[1])
    history = fitted(
        "mse",
        normal(64, 3),
        normal(64, 1),
        sample_weight=made[0][0] if made[0] else None,
        shuffle=False,
        validation_data=[held] if batches else held,
    )
    return [f["remedy"] for f in history.ledger.info.get("findings", []) if f["code"] == "REC1"]


@pytest.mark.parametrize("batches", [False, True])
def test_weights_are_asked_for_only_where_there_are_none(batches):
    (asked,) = weighted_like(2.0, None, batches)
    assert asked.endswith("or give validation_data weights too.")
    for validation in (3.0, 1.0) if not batches else (3.0,):
        (both,) = weighted_like(2.0, validation, batches)
        assert "too" not in both and both.endswith(
            "divide the weights of each by their mean: both have some, of different size."
        )
    (one,) = weighted_like(None, 3.0, batches)
    assert "leave the weights of validation_data out" in one and "too" not in one
    assert weighted_like(1.0, 1.0, batches) == weighted_like(None, None, batches) == []


@pytest.mark.parametrize("code", ["SPACE1", "CLS3"])
def test_findings_are_errors_off_or_ignored_where_asked(code):
    with pytest.raises(CheckError, match=code):
        TRAININGS[code](checks="error")
    assert recorded(TRAININGS[code](checks="off")) == []
    assert code not in recorded(TRAININGS[code](ignore_checks=(code,)))


def test_an_error_of_the_first_batch_leaves_the_weights_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1))
    before = [p.clone() for p in net.parameters()]
    model = ll.Model(net)
    model.compile(loss=nn.CrossEntropyLoss())
    with pytest.raises(CheckError):
        model.fit(normal(64, 3), labels(64, classes=3), verbose=0, checks="error")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_notes_are_recorded_and_not_printed(capsys):
    history = fitted(L.MeanSquaredError(reduction="sum"), normal(64, 3), normal(64, 1), verbose=2, checks="error")
    assert recorded(history) == ["RED1"]
    assert "RED1" not in capsys.readouterr().out


def test_other_words_for_checks_are_refused():
    with pytest.raises(UnknownNameError, match="warn"):
        fitted("mse", normal(8, 3), normal(8, 1), checks="loud")
    with pytest.raises(UnknownNameError, match="code of a check"):
        fitted("mse", normal(8, 3), normal(8, 1), ignore_checks=("X1",))


def test_a_loss_that_is_not_finite_is_still_traced():
    y = normal(64, 1)
    y[3] = float("nan")
    with pytest.raises(NonFiniteError, match="Already not finite: y"):
        fitted("mse", normal(64, 3), y)


def test_the_record_of_the_first_nan_stays_in_the_ledger(tmp_path):
    y = normal(64, 3)
    y[37, 2] = float("nan")
    torch.manual_seed(0)
    model = ll.Model(nn.Linear(3, 3))
    model.compile(loss="mse", class_names=["sky", "road", "lesion"])
    with pytest.raises(NonFiniteError, match=r"Bad samples: 1 of 16 \(data set indices 37\)\. Classes: lesion\."):
        model.fit(normal(64, 3), y, batch_size=16, verbose=0, seed=0, run_dir=tmp_path / "run")
    record = ll.Ledger.open(tmp_path / "run").info["nonfinite"]
    assert record["samples"] == [37]
    assert record["classes"] == ["lesion"]
    assert record["terms"] == {"mean_squared_error": 1}
    assert record["already_bad"] == ["y"]
    assert (record["rank"], 1 <= record["step"] <= 4) == (0, True)


def test_the_report_says_what_was_found(tmp_path):
    TRAININGS["SPACE1"](run_dir=tmp_path / "run")
    written = ll.report(tmp_path / "run", tmp_path / "report.html").read_text(encoding="utf-8")
    plain = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--text"]).output
    # Tags between the words are for the eye.
    for text in (re.sub(r"<[^>]+>", "", written), plain):
        assert "SPACE1 error" in text


@pytest.mark.parametrize("rows", [4, 70000])
def test_the_mask_that_an_output_carries_counts(rows):
    class Masking(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            y._keras_mask = torch.arange(len(x)) % 4 < 3
            return y

    model = ll.Model(Masking(2, 8))
    model.compile(loss="mse")
    y = normal(rows, 8)
    y[3::4] = float("nan")
    history = model.fit(normal(rows, 2), y, batch_size=rows, verbose=0, shuffle=False, seed=0)
    assert recorded(history) == []


def test_a_large_batch_is_judged_by_its_first_samples():
    x, y = normal(4, 65536, 2), labels(4, 65536, classes=3)
    history = fitted(L.SparseCategoricalCrossentropy(**LOGITS), x, y, end=nn.Softmax(-1))
    assert recorded(history) == ["SPACE1"]
    assert "393,216 predictions" in history.ledger.info["findings"][0]["message"]


# --- command line ---------------------------------------------------------------------------------------------------


def test_the_command_checks_a_file(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, y_true=labels(64, classes=4), y_pred=torch.softmax(normal(64, 4), -1))
    loss = ["--loss", "sparse_categorical_crossentropy"]
    result = CliRunner().invoke(main, ["check", str(path), *loss, "--from-logits"])
    assert result.exit_code == 1
    assert result.output.startswith("SPACE1 error: ")
    ignored = CliRunner().invoke(main, ["check", str(path), *loss, "--from-logits", "--ignore", "SPACE1"])
    assert (ignored.exit_code, ignored.output) == (0, "Nothing looks wrong.\n")
    right = CliRunner().invoke(main, ["check", str(path), *loss, "--json"])
    assert json.loads(right.output) == []
    logged = CliRunner().invoke(main, ["check", str(path), *loss, "--logged", "1000"])
    assert logged.exit_code == 0
    assert logged.output.startswith("SCALE1 note: ")


def test_the_command_is_told_the_end_of_a_sequence(tmp_path):
    path = tmp_path / "arrays.npz"
    words = labels(4, 6, classes=3) + 1
    words[:, 4:] = 0
    np.savez(path, y_true=words, y_pred=normal(4, 6, 4), mask=words != 0)
    loss = ["--loss", "SparseCategoricalCrossentropy", "--from-logits", "--end-of-sequence", "0"]
    result = CliRunner().invoke(main, ["check", str(path), *loss])
    assert result.exit_code == 1
    assert "TOK2 warning: " in result.output
    assert CliRunner().invoke(main, ["check", str(path), *loss, "--ignore", "TOK"]).exit_code == 0
