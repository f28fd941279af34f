"""Each framework's number from plain arrays: the published cases, the script, and the table of `compare`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import lossledger as ll
from conformance import cases_of
from lossledger.cli import main
from lossledger.conventions import Comparison, FrameworkError, NotSupported, evaluate, outcome
from lossledger.errors import InputError, UnknownNameError

TESTS = Path(__file__).parent
GOLDENS = TESTS / "goldens" / "frameworks.json"
CASES = cases_of(GOLDENS)
# Cases that no convention reproduces yet, with the reason.
MISSING: dict[str, str] = {}

ZEROS = [[[0.0, 0.0]] * 3] * 2
PREDICTED = [[[float(3 * b + t + 1)] * 2 for t in range(3)] for b in range(2)]
MASK = [[1, 1, 0], [1, 0, 0]]
NAN = math.nan


def agrees(found, expected, rtol, atol) -> bool:
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(agrees(found[k], expected[k], rtol, atol) for k in expected)
        )
    if isinstance(expected, list):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(agrees(f, e, rtol, atol) for f, e in zip(found, expected, strict=True))
        )
    if "nan" in (found, expected):
        return bool(found == expected)
    return isinstance(found, int | float) and abs(found - expected) <= atol + rtol * abs(expected)


def matches(case, printed) -> bool:
    expected = case["expected"]
    if isinstance(expected, str) and expected.startswith("error:"):
        return printed.get("error") == expected.removeprefix("error:")
    return "value" in printed and agrees(printed["value"], expected, case["rtol"], case["atol"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_published_case(case):
    printed = outcome(case)
    if case["id"] in MISSING:
        assert not matches(case, printed), f"{case['id']} works now: take it off the list"
    else:
        assert matches(case, printed), (printed, case["expected"], case["note"])


def test_the_id_and_the_expected_number_are_not_read():
    for case in CASES[::10]:
        bare = {k: v for k, v in case.items() if k not in ("id", "expected", "note", "tier", "rtol", "atol")}
        assert outcome(bare) == {**outcome(case), "id": None}


def test_script_prints_one_json_line_a_case(tmp_path):
    odd = [
        {"id": "unknown-convention", "convention": "none", "loss": "mse", "y_true": [[0.0]], "y_pred": [[1.0]]},
        {"id": "unknown-loss", "convention": "keras3", "loss": "nothing", "y_true": [[0.0]], "y_pred": [[1.0]]},
        {"id": "unknown-option", "convention": "keras3", "loss": "mse", "kwargs": {"delta": 1}, "y_true": [[0.0]],
         "y_pred": [[1.0]]},
        {"id": "unknown-scope", "convention": "optax", "scope": "fit", "loss": "squared_error", "y_true": [0.0],
         "y_pred": [1.0]},
        {"id": "nothing"},
    ]  # fmt: skip
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([*CASES, *odd]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(TESTS / "conformance.py"), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == [case["id"] for case in (*CASES, *odd)]
    assert all(line.keys() in ({"id", "value"}, {"id", "error"}) for line in lines)
    assert [line["error"] for line in lines[len(CASES) :]] == ["NotSupported"] * len(odd)


# --- rules that the published cases do not show --------------------------------------------------------------------


def case(convention, loss, y_true, y_pred, scope="loss", **more):
    return {"convention": convention, "loss": loss, "y_true": y_true, "y_pred": y_pred, "scope": scope, **more}


FIT = {"scope": "fit", "y_true": [[0.0]] * 5, "y_pred": [[1.0], [2.0], [3.0], [4.0], [5.0]]}
LABELS, PROBABILITIES = [1, 0, 0], [[0.2, 0.8], [0.6, 0.4], [0.3, 0.7]]
SPARSE = "sparse_categorical_crossentropy"
LOGITS = [[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]

# Numbers of semantics.md that are not in the file of cases.
RULES = {
    "bce p0 y1, Keras 3": (case("keras3", "BinaryCrossentropy", [[1.0]], [[0.0]]), 16.11810),
    "bce p1 y0, Keras 3": (case("keras3", "BinaryCrossentropy", [[0.0]], [[1.0]]), 15.94238),
    "bce p0 y1, tf_keras": (case("tf_keras", "BinaryCrossentropy", [[1.0]], [[0.0]]), 15.42495),
    "sparse, not normalised, tf_keras": (
        case("tf_keras", "SparseCategoricalCrossentropy", [1], [[2.0, 3.0, 5.0]]),
        1.09861,
    ),
    "two outputs": (
        {
            **FIT,
            "convention": "keras3",
            "loss": ["mse", "mae"],
            "y_true": [FIT["y_true"]] * 2,
            "y_pred": [FIT["y_pred"], [[2.0 * i] for i in range(1, 6)]],
            "kwargs": {"batch_size": 2, "loss_weights": [0.5, 2.0], "reg": "0.01*1**2 on a"},
        },
        {"a_loss": 11.0, "b_loss": 6.0, "loss": 17.51},
    ),
    "softmax layer, tf_keras": (
        case("tf_keras", SPARSE, [1], [[100.0, 0.0]], "fit", kwargs={"activation": "softmax"}),
        {"loss": 100.0},
    ),
    "regression head, four micro-batches": (
        case(
            "hf-trainer",
            "BertForSequenceClassification regression (MSE)",
            [[1.0], [2.0], [3.0], [4.0]],
            [[0.0]] * 4,
            "step",
            kwargs={"gradient_accumulation_steps": 4, "micro_batch": 1},
        ),
        {"loss": 30.0},
    ),
    "labels smoothed, weighted and ignored, torch": (
        case("pytorch", "CrossEntropyLoss", [0, -100, 2, 1], LOGITS, class_weight=[1.0, 2.0, 4.0]),
        0.469174,
    ),
    "probabilities with class weights, torch": (
        case(
            "pytorch",
            "CrossEntropyLoss",
            [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
            LOGITS,
            class_weight=[1.0, 2.0, 4.0],
        ),
        2.22866,
    ),
    "last class as -1, optax": (
        case("optax", "softmax_cross_entropy_with_integer_labels", [-1], [[0.0, 0.0, 0.0]]),
        [1.09861],
    ),
    "ignored tokens of a window": (
        case("hf-trainer", "ForMaskedLMLoss", [[-100]], [[[0.0, 1.0]]]),
        NAN,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    asked, expected = RULES[name]
    found = evaluate(asked)
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    else:
        assert found == pytest.approx(expected, rel=1e-5)


RAISED = {
    "class and sample weights, Keras 3": (
        case("keras3", SPARSE, LABELS, PROBABILITIES, "fit", sample_weight=[1.0] * 3, class_weight={"1": 5.0}),
        "ValueError",
    ),
    "weights (B, 1) and a mask, Keras 3 on torch": (
        case("keras3", "mse", ZEROS, PREDICTED, sample_weight=[[1.0], [10.0]], mask=MASK),
        "RuntimeError",
    ),
    "label out of range, Keras 3": (case("keras3", SPARSE, [5], [[0.2, 0.8]]), "IndexError"),
    "weights that no axis has, tf_keras": (
        case("tf_keras", "mse", ZEROS, PREDICTED, sample_weight=[1.0, 2.0, 3.0]),
        "InvalidArgumentError",
    ),
    "no smoothing given, smp": (case("smp", "SoftCrossEntropyLoss", [[[0]]], [[[[0.0]], [[0.0]]]]), "TypeError"),
}


@pytest.mark.parametrize("name", RAISED)
def test_error_of_the_framework(name):
    asked, error = RAISED[name]
    assert outcome(asked) == {"id": None, "error": error}


def test_other_backends_of_keras_3():
    weighted = case("keras3", "mse", ZEROS, PREDICTED, sample_weight=[[1.0], [10.0]], mask=MASK, backend="jax")
    assert evaluate(weighted) == pytest.approx(55.0)
    assert evaluate({**RAISED["label out of range, Keras 3"][0], "backend": "jax"}) == 0.0
    behind = case("keras3", SPARSE, [1], [[100.0, 0.0]], "fit", kwargs={"activation": "softmax"}, backend="tensorflow")
    assert evaluate(behind) == {"loss": pytest.approx(100.0)}


def test_what_nobody_described_is_not_supported():
    with pytest.raises(NotSupported, match="no convention"):
        evaluate(case("jax", "mse", [[0.0]], [[1.0]]))
    with pytest.raises(FrameworkError):
        evaluate(case("keras3", "mse", [[0.0]], [[1.0]], kwargs={"reduction": "median"}))


@pytest.mark.parametrize(("convention", "mean"), [("keras3", 11.0), ("keras3.0-3.1", 40 / 3), ("keras3.0-3.12", 11.0)])
def test_epoch_of_versions_of_keras_3(convention, mean):
    assert evaluate({**FIT, "convention": convention, "loss": "mse", "kwargs": {"batch_size": 2}}) == {
        "loss": pytest.approx(mean)
    }


# --- compare -------------------------------------------------------------------------------------------------------

# semantics.md, section 5: squared errors [[1, 4, 9], [16, 25, 36]].
COLUMNS = ("keras_classic", "tf20", "tf_keras", "keras3", "torch", "optax")
SITUATIONS = {
    "plain": ({}, (91 / 6,) * 6),
    "w (B,)": (
        {"sample_weight": [1.0, 10.0]},
        (784 / 6, 784 / 6, 784 / 6, "RuntimeError", "ValueError", 784 / 33),
    ),
    "w (B, 1)": ({"sample_weight": [[1.0], [10.0]]}, (784 / 6,) * 4 + (784 / 33,) * 2),
    "w with a zero": (
        {"sample_weight": [[0.0], [10.0]]},
        (770 / 3, 770 / 6, 770 / 6, 770 / 6, 770 / 30, 770 / 30),
    ),
    "mask": ({"mask": MASK}, (7.0, 3.5, 7.0, 7.0, 7.0, 7.0)),
    "mask and w": (
        {"mask": MASK, "sample_weight": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]},
        (73 / 3, 73 / 6, 73 / 3, 73 / 3, 73 / 7, 73 / 7),
    ),
    "mask and w equal to it": ({"mask": MASK, "sample_weight": MASK}, (14.0, 3.5, 7.0, 7.0, 7.0, 7.0)),
    "everything masked": ({"mask": [[0, 0, 0]] * 2}, (NAN, 0.0, NAN, 0.0, NAN, NAN)),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_where_frameworks_disagree(name):
    given, expected = SITUATIONS[name]
    table = ll.compare("mse", ZEROS, PREDICTED, **given)
    for convention, value in zip(COLUMNS, expected, strict=True):
        found = table[convention].value
        assert found == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6, nan_ok=True)), convention


@pytest.mark.parametrize("name", SITUATIONS)
def test_value_is_numerator_over_divisor(name):
    for row in ll.compare("mse", ZEROS, PREDICTED, **SITUATIONS[name][0]):
        if row.numerator is not None and row.divisor:
            assert row.numerator / row.divisor == pytest.approx(row.value, rel=1e-5)


def test_mean_with_sample_weight_of_keras_3_divides_by_the_weights_as_given():
    loss = ll.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    table = ll.compare(loss, ZEROS, PREDICTED, sample_weight=[[1.0], [10.0]])
    assert table["keras3"].value == pytest.approx(784 / 11)
    assert table["lossledger"].value == pytest.approx(784 / 33)


LOSSES = {
    "BinaryCrossentropy": ([[0.0, 1.0], [1.0, 1.0]], [[0.2, 0.7], [0.9, 0.4]]),
    "CategoricalCrossentropy": ([[0.0, 1.0], [1.0, 0.0]], [[0.2, 0.8], [0.9, 0.1]]),
    "SparseCategoricalCrossentropy": ([1, 0], [[0.2, 0.8], [0.9, 0.1]]),
    "MeanSquaredError": (ZEROS, PREDICTED),
    "MeanAbsoluteError": (ZEROS, PREDICTED),
    "Huber": (ZEROS, PREDICTED),
    "BinaryFocalCrossentropy": ([[0.0, 1.0], [1.0, 1.0]], [[0.2, 0.7], [0.9, 0.4]]),
    "CategoricalFocalCrossentropy": ([[0.0, 1.0], [1.0, 0.0]], [[0.2, 0.8], [0.9, 0.1]]),
    "Dice": ([[[1.0], [0.0]], [[0.0], [1.0]]], [[[0.9], [0.2]], [[0.3], [0.6]]]),
    "Jaccard": ([[[1.0], [0.0]], [[0.0], [1.0]]], [[[0.9], [0.2]], [[0.3], [0.6]]]),
    "Tversky": ([[[1.0], [0.0]], [[0.0], [1.0]]], [[[0.9], [0.2]], [[0.3], [0.6]]]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_ours_is_our_own_value(name):
    y_true, y_pred = LOSSES[name]
    table = ll.compare(name, y_true, y_pred)
    assert table["lossledger"].value == pytest.approx(float(ll.losses.get(name)(y_true, y_pred)), rel=1e-6)
    agreeing = "keras3" if name != "Jaccard" else "smp"
    assert table[agreeing].value == pytest.approx(table["lossledger"].value, rel=1e-5)
    assert all(row.reason for row in table if row.value is None or isinstance(row.value, str))


def test_class_weights():
    table = ll.compare(
        ll.losses.SparseCategoricalCrossentropy(from_logits=True), [0, 2, 2, 1], LOGITS, class_weight=[1.0, 2.0, 4.0]
    )
    assert table["lossledger"].value == pytest.approx(2.2286596)
    assert table["keras3"].value == pytest.approx(2.2286596)
    assert (table["torch"].value, table["torch"].divisor) == pytest.approx((0.8104217, 11.0))


def test_mask_of_labels_is_the_ignored_index_of_torch():
    table = ll.compare(
        ll.losses.SparseCategoricalCrossentropy(from_logits=True), [0, 2, 2, 1], LOGITS, mask=[1, 0, 1, 1]
    )
    assert table["torch"].value == pytest.approx(0.5586881)
    assert table["hf"].value == pytest.approx(0.5586881)
    assert table["tf20"].value == pytest.approx(0.4190161)


def test_table_prints_in_eighty_columns():
    table = ll.compare("mse", ZEROS, PREDICTED, sample_weight=[1.0, 10.0], mask=MASK)
    text = str(table)
    assert repr(table) == text and "  27.5" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert next(iter(table)).convention == "lossledger" and len(table) == len(table.to_dict()["rows"])
    assert "masked entries stay in the divisor" in text
    page = table._repr_html_()
    assert page.startswith("<table>") and page.count("<tr>") == len(table) + 1
    json.dumps(table.to_dict())


def test_compare_prints_nothing_and_keeps_the_arrays(capsys):
    arrays = [torch.tensor(a) for a in (ZEROS, PREDICTED)]
    weight = torch.ones(2, 3)
    assert isinstance(ll.compare("mse", *arrays, sample_weight=weight, mask=torch.tensor(MASK)), Comparison)
    assert capsys.readouterr().out == ""
    assert torch.equal(weight, torch.ones(2, 3)) and torch.equal(arrays[1], torch.tensor(PREDICTED))


def test_custom_loss_shows_only_ours():
    class Quartic(ll.losses.Loss):
        def call(self, y_true, y_pred):
            return ((y_true - y_pred) ** 4).mean(-1)

    table = ll.compare(Quartic(), [[0.0], [0.0]], [[1.0], [2.0]])
    assert table["lossledger"].value == 8.5
    assert all(row.value is None and row.reason for row in table if row.convention != "lossledger")


def test_bad_input_of_compare():
    with pytest.raises(InputError, match="one loss"):
        ll.compare(ll.losses.get("mse") + ll.losses.get("mae"), [[0.0]], [[1.0]])
    with pytest.raises(UnknownNameError):
        ll.compare("nothing", [[0.0]], [[1.0]])
    with pytest.raises(KeyError):
        _ = ll.compare("mse", [[0.0]], [[1.0]])["nothing"]


def test_command_line(tmp_path):
    path = tmp_path / "batch.npz"
    np.savez(path, y_true=np.array(ZEROS), y_pred=np.array(PREDICTED), mask=np.array(MASK))
    done = CliRunner().invoke(main, ["compare", str(path), "--loss", "mse"])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(ll.compare("mse", ZEROS, PREDICTED, mask=MASK))
    np.savez(path, y_true=np.array([0, 1]), y_pred=np.array([[2.0, 1.0], [0.0, 1.0]]))
    done = CliRunner().invoke(main, ["compare", str(path), "--loss", "SparseCategoricalCrossentropy", "--from-logits"])
    assert "0.313262" in done.output
    np.savez(path, y_true=np.array([0, 1]))
    assert CliRunner().invoke(main, ["compare", str(path), "--loss", "mse"]).exit_code == 1


def _segmented():
    rng = np.random.default_rng(0)
    y = np.eye(3)[rng.integers(0, 2, (2, 4, 4))]
    p = rng.dirichlet(np.ones(3), (2, 4, 4))
    return y, p


L = ll.losses
SMOOTH = {"smooth": 1e-5}


@pytest.mark.parametrize(
    ("convention", "loss"),
    [
        ("monai", L.Dice(grouping="sample_class", **SMOOTH)),
        ("monai", L.Dice(grouping="class", squared=True, include_background=False, **SMOOTH)),
        ("monai", L.Jaccard(grouping="sample_class", smooth=5e-6)),
        ("monai", L.Tversky(0.3, 0.7, grouping="class", include_background=False, **SMOOTH)),
        ("monai", L.GeneralizedDice(**SMOOTH)),
        ("monai", L.GeneralizedDice("simple", grouping="all", include_background=False, **SMOOTH)),
        ("smp", L.Dice(grouping="class", absent="zero")),
        ("smp", L.Tversky(0.3, 0.7, grouping="class", absent="zero")),
        ("smp", L.LovaszSoftmax()),
        ("smp", L.LovaszSoftmax(per_image=False)),
        ("keras3", L.Dice(grouping="class", smooth_numerator=0.0)),
        ("keras3", L.Dice(grouping="sample_class", smooth_numerator=0.0)),
    ],
    ids=repr,
)
def test_a_framework_with_the_same_policy_has_our_number(convention, loss):
    table = ll.compare(loss, *_segmented())
    assert table[convention].value == pytest.approx(table["lossledger"].value, rel=1e-6)


@pytest.mark.parametrize(
    ("convention", "loss", "word"),
    [
        ("monai", L.Dice(grouping="all"), "grouping"),
        ("monai", L.Dice(grouping="class", absent="skip"), "absent"),
        ("monai", L.Tversky(squared=True), "squares"),
        ("monai", L.FocalTversky(), "FocalTversky"),
        ("smp", L.Dice(squared=True), "squared"),
        ("smp", L.Dice(include_background=False), "include_background"),
        ("smp", L.Dice(absent="skip"), "absent"),
        ("smp", L.Dice(grouping="sample_class"), "single samples"),
        ("smp", L.LovaszSoftmax(classes="all"), "present"),
        ("keras3", L.Dice(squared=True), "squared"),
        ("keras3", L.Dice(include_background=False), "include_background"),
        ("keras3", L.Dice(absent="zero"), "absent"),
        ("keras3", L.Dice(smooth=1.0, smooth_numerator=0.5), "smooth_numerator"),
    ],
    ids=repr,
)
def test_a_policy_that_a_framework_has_not_is_a_dash(convention, loss, word):
    row = ll.compare(loss, *_segmented())[convention]
    assert row.value is None and word in row.reason


def test_the_reason_without_weights_is_not_about_weights():
    empty = np.zeros((2, 4, 2))
    row = ll.compare(ll.losses.Dice(axis=(1, 2)), empty, empty)["keras3"]
    assert (row.value, row.reason) == (1, "without target and prediction the loss is 1 there, and 0 here")
