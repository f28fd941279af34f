"""The difference of two losses: parts that add up, mixes and rates that are told apart, recipes that must agree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import lossledger as ll
from lossledger.cli import main
from lossledger.errors import InputError
from lossledger.ledger import Ledger, Row


def ledger(groups: dict[str, tuple[float, int]], run: str = "run", scale: float = 1.0, **info: Any) -> Ledger:
    """A mean over groups, each given by its total and count."""
    book = Ledger(run, info)
    divisor = sum(count for _, count in groups.values())
    total = sum(total for total, _ in groups.values())
    shared: dict[str, Any] = dict(split="training", epoch=1, step=None, term="bce", role="data", form="linear")
    shared |= dict(presence="", coefficient=scale, divisor=float(divisor), nonfinite=0)

    def row(kind: str, group: str, total: float, count: int) -> Row:
        values = dict(total=total, count=count, weight=float(count), contribution=scale * total / max(divisor, 1))
        return Row(**shared, kind=kind, group=group, **values)

    book.append([row("term", "", total, divisor), *(row("class", g, t, n) for g, (t, n) in groups.items())])
    return book


counted = st.integers(0, 50).flatmap(
    lambda n: st.tuples(st.floats(0, 1e3) if n else st.just(0.0), st.just(n)),
)
sides = st.dictionaries(st.sampled_from("abcde"), counted, min_size=1)


@given(sides, sides, st.sampled_from([1.0, 0.5, -2.0]))
def test_parts_add_up_to_the_difference(one: dict[str, Any], other: dict[str, Any], scale: float) -> None:
    found = ledger(one, scale=scale).diff(ledger(other, scale=scale))
    magnitude = sum(abs(r.before) + abs(r.after) for r in found.rows) + 1
    assert abs(sum(r.difference for r in found.rows) - found.difference) <= 1e-12 * magnitude
    assert abs(found.mix + found.rate - found.difference) <= 1e-12 * magnitude
    for row in found.rows:
        assert abs(row.mix + row.rate - row.difference) <= 1e-12 * magnitude


def test_only_counts_moved() -> None:
    found = ledger({"a": (2.0, 2), "b": (30.0, 10)}).diff(ledger({"a": (6.0, 6), "b": (18.0, 6)}))
    assert found.rate == pytest.approx(0)
    assert found.mix == pytest.approx(24 / 12 - 32 / 12)


def test_only_the_loss_of_a_group_moved() -> None:
    found = ledger({"a": (2.0, 2), "b": (30.0, 10)}).diff(ledger({"a": (2.0, 2), "b": (10.0, 10)}))
    by_group = {row.group: row for row in found.rows}
    assert found.mix == pytest.approx(0)
    assert by_group["a"].rate == 0
    assert by_group["b"].rate == pytest.approx(-20 / 12)


def test_a_group_of_one_side_is_a_change_of_mix() -> None:
    found = ledger({"a": (2.0, 2)}).diff(ledger({"a": (2.0, 2), "b": (8.0, 2)}))
    by_group = {row.group: row for row in found.rows}
    assert (by_group["b"].before, by_group["b"].mix, by_group["b"].rate) == (0, 2, 0)


def test_a_loss_that_is_not_finite_has_no_parts() -> None:
    found = ledger({"a": (1.0, 1)}).diff(ledger({"a": (math.inf, 1)}))
    assert math.isnan(found.rows[0].mix) and math.isnan(found.rows[0].rate) and found.difference == math.inf


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": {"bce": {"loss": "BinaryCrossentropy(label_smoothing=0.1)", "weight": 1.0}}}, "label_smoothing"),
        ({"divisors": {"bce": "sum"}}, "divisors of 'bce'"),
        ({"class_weight": {"bce": {"1": 2.0}}}, "class_weight of 'bce'"),
        ({"regularizers": {"l2": "L2(0.01)"}}, "regularizers of 'l2'"),
    ],
)
def test_different_recipes_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    recipe = {"recipe": {"bce": {"loss": "BinaryCrossentropy()", "weight": 1.0}}, "divisors": {"bce": "mean"}}
    groups = {"a": (1.0, 1)}
    with pytest.raises(InputError, match="measure different things") as error:
        ledger(groups, **recipe).diff(ledger(groups, **(recipe | change)))
    assert named in str(error.value)
    with pytest.raises(InputError, match="terms and their weights"):
        ledger(groups).diff(ledger(groups, scale=2.0))


def test_splits_and_epochs_that_are_missing() -> None:
    with pytest.raises(InputError, match="no 'training' loss for epoch 7; its epochs of this split: 1"):
        ledger({"a": (1.0, 1)}).diff(epoch=7, other_epoch=1)
    with pytest.raises(InputError, match="no 'test' loss"):
        ledger({"a": (1.0, 1)}).diff(split="test")


def trained(folder: Path, seed: int) -> ll.Ledger:
    torch.manual_seed(seed)
    x = torch.randn(80, 3)
    y = torch.stack([x[:, 0] > 0, x[:, 1] > 0, x[:, 2] > 1.5], dim=1).float()
    model = ll.Model(torch.nn.Linear(3, 3))
    loss = ll.losses.BinaryCrossentropy(from_logits=True) + ll.losses.Dice(axis=(0, 1), from_logits="sigmoid")
    model.compile(loss=loss, regularizers={"weight": "l2"}, class_names=["a", "b", "c"])
    history = model.fit(x[:, None], y[:, None], epochs=2, validation_split=0.25, verbose=0, seed=0, run_dir=folder)
    return history.ledger


def test_runs_and_epochs_of_a_real_training(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "first", 0), trained(tmp_path / "second", 1)
    found = first.diff(second)
    assert found.first == "first, validation, epoch 2"
    assert found.before == first.loss("validation") and found.after == second.loss("validation")
    assert sum(r.difference for r in found.rows) == pytest.approx(found.difference, rel=1e-5)
    assert {(r.term, r.kind) for r in found.rows} == {
        ("binary_crossentropy", "class"),
        ("dice", "class"),
        ("l2/weight", "term"),
    }
    epochs = first.diff(split="training", epoch=1, other_epoch=2)
    # The same samples in both epochs: counts of entries did not move, so the cross-entropy has no mix.
    assert all(r.mix == pytest.approx(0, abs=1e-12) for r in epochs.rows if r.term == "binary_crossentropy")


def test_the_command_prints_what_the_method_finds(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "first", 0), trained(tmp_path / "second", 1)
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    shown = CliRunner().invoke(main, ["diff", *folders])
    assert shown.exit_code == 0 and shown.output.strip() == str(first.diff(second))
    assert max(map(len, shown.output.splitlines()[1:])) <= 80
    plain = CliRunner().invoke(main, ["diff", *folders, "--split", "training", "--epoch", "1", "--json"])
    assert json.loads(plain.output) == json.loads(json.dumps(first.diff(second, "training", 1).to_dict()))
    assert list(first.diff(second).to_pandas()["group"])[:3] == ["a", "b", "c"]
