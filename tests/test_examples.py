"""The examples run as scripts, are short, and print the facts that they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def output_of(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> str:
    patch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


def numbers(text: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text, re.MULTILINE)]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    return lambda name: output_of(name, capsys, tmp_path, monkeypatch)


def test_examples_are_those_tested_here() -> None:
    names = {"regression.py", "two_outputs.py", "batch_size_one.py", "masked_sequence.py", "keras_unet.py"}
    assert {path.name for path in EXAMPLES} == names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_say_what_to_see(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert "What to see" in text.split('"""')[1]


def test_regression_converges(run) -> None:
    lines = run("regression.py").splitlines()
    weights = [[float(value) for value in line.split()] for line in lines[2:5]]
    for i, row in enumerate(weights):
        assert row == pytest.approx([10.0 if i == j else 0.0 for j in range(3)], abs=0.01)
    assert [float(value) for value in lines[6].split()] == pytest.approx([2.5] * 3, abs=0.01)
    first, last = numbers(lines[0], r": ([\d.e+-]+)")
    assert last < 1e-6 * first


def test_two_outputs_add_up(run) -> None:
    text = run("two_outputs.py")
    assert "the contributions sum to the total: True" in text
    assert "the ledger's loss is the printed loss: True" in text
    before, after = text.split("\n\n")
    for part, terms, whole in (
        (before, r"^(?:price|sold|l2)/\S+ .* ([\d.]+)$", r"^total +([\d.]+)$"),
        (after, r"^(?:price|sold|l2)/\S+ +([\d.]+) +[\d.]+%$", r"^printed loss +([\d.]+)$"),
    ):
        shares = [float(value) for value in re.findall(terms, part, re.MULTILINE)]
        (total,) = re.findall(whole, part, re.MULTILINE)
        assert len(shares) == 3
        assert sum(shares) == pytest.approx(float(total), abs=3e-4)


def test_last_and_moving_differ(run) -> None:
    text = run("batch_size_one.py")
    last, moving = numbers(text, r"last +([\d.]+) "), numbers(text, r"moving +([\d.]+)")
    assert len(last) == len(moving) == 6
    assert all(abs(a - b) > 0.01 for a, b in zip(last, moving, strict=True))
    assert numbers(text, r"printed for the epoch: ([\d.]+),") == moving[-1:]
    frozen = numbers(text.split("frozen, with")[1].splitlines()[0].split(":")[1], r"([\d.]+)")
    assert len(frozen) == 3
    assert max(frozen) - min(frozen) <= 1e-4
    assert frozen[0] < moving[-1]


def test_masked_loss_is_the_same_for_every_batch_size(run) -> None:
    text = run("masked_sequence.py")
    assert "28 of 49 steps count" in text
    assert "the same loss for every batch size: True" in text
    losses, naive = numbers(text, r"loss ([\d.]+),"), numbers(text, r"batch means ([\d.]+)")
    assert numbers(text, r"batch size (\d+):") == [1, 2, 5, 7]
    assert max(losses) - min(losses) < 2e-6
    assert max(naive) - min(naive) > 0.01


def test_the_keras_unet_adds_up_and_learns(run, monkeypatch) -> None:
    """In a small size: 24 scenes, 3 epochs."""
    monkeypatch.setenv("SCENES", "24")
    monkeypatch.setenv("EPOCHS", "3")
    text = run("keras_unet.py")
    first, last = numbers(text.splitlines()[0], r"([\d.]+)")
    assert last < first
    parts = numbers(text, r"^(?:binary|l2).* ([\d.]+)$")
    (whole,), (printed,) = numbers(text, r"sum of the parts ([\d.]+)"), numbers(text, r"validation loss +([\d.]+)")
    assert len(parts) == 11
    assert sum(parts) == pytest.approx(whole, abs=1e-4)
    assert whole == pytest.approx(printed, abs=2e-5)
