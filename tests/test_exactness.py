"""The benchmark of exactness: ours within its goal, an error that shows, a page that says what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOAL = 1e-6
WINDOW = 16


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"peers.{name}")


def errors(peers, name, task):
    common = peers("common")
    make = common.TASKS[task]
    return common.errors(peers(name).run(make(0), 1), common.right(make(0), WINDOW))


@pytest.mark.parametrize("task", ["tokens", "dice"])
def test_ours_is_within_its_goal_and_a_mean_of_means_is_not(peers, task):
    assert max(errors(peers, "ours", task).values()) <= GOAL
    plain = errors(peers, "torch_loop", task)
    assert plain["last"] == "no step"
    assert min(plain["epoch"], plain["evaluation"], plain["steps"]) > 1e-3


def results():
    return json.loads((ROOT / "benchmarks" / "results" / "exactness.json").read_text())["rows"]


def test_published_results_of_ours_are_within_the_goal():
    ours = [row["worst"] for row in results() if row["contender"] == "lossledger"]
    assert len(ours) == 4
    assert max(value for row in ours for value in row.values()) <= GOAL


def test_the_page_of_windows_says_what_was_measured():
    """By contender: loss and gradient accumulated, loss and gradient on two ranks; the worst of the results."""
    page = (ROOT / "docs" / "windows.md").read_text()
    expected: dict[str, list[str]] = {}
    for row in results():
        if row["task"] == "dice" or row["contender"].startswith("one batch"):
            continue
        for columns in (("epoch", "evaluation"), ("steps", "last")):
            said = [row["worst"][c] for c in columns] if row["worst"] else []
            numbers = [value for value in said if isinstance(value, float)]
            cell = f"{max(numbers):.1e}" if numbers else "not offered"
            expected.setdefault(row["contender"], []).append(cell + ", no last step" * ("no step" in said))
    assert len(expected) == 7
    for name, cells in expected.items():
        assert f"| {name} | {' | '.join(cells)} |" in page
