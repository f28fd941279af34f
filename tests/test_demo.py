"""The main job: small in the fast suite, at full size with its effect in the slow one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from lossledger.cli import main
from lossledger.demo.run import suggested_weights
from lossledger.ledger import Ledger


def metric(ledger, run, group):
    rows = [r for r in ledger.select(run).metrics if r.split == "validation" and r.group == group]
    return max(rows, key=lambda r: r.epoch).value


def test_the_demo_runs_from_the_command_line(tmp_path):
    folder = tmp_path / "it's a run"
    arguments = ["demo", "--scenes", "48", "--epochs", "1", "--size", "32", "--folder", str(folder)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "The books balance" in result.output and "Act two" in result.output
    page = (folder / "report.html").read_text()
    assert "digit 4" in page and len(page) < 2_000_000
    ledger = Ledger.open(folder)
    for run in ledger.runs:
        pictures = json.loads((folder / run / "pictures" / "pictures.json").read_text())
        assert len(pictures) == 6 and all((folder / run / "pictures" / p["file"]).is_file() for p in pictures)
        own = ledger.select(run)
        assert {"class", "digits", "position", "term"} == {row.kind for row in own.rows}
        assert len(own.samples.where(split="validation", term="binary_crossentropy")) == 12
    for tab in ("Worst samples", "Slices", "Places", "Provenance"):
        assert page.count(f'data-tab="{tab}"') == 2
    assert ledger.runs == ("1-plain", "2-weighted") and ledger.balance() == []
    # A second demo keeps the first.
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert again.exit_code == 0 and (tmp_path / "it's a run-1" / "report.html").is_file()


def test_weights_by_pixel_run_too(tmp_path):
    arguments = ["demo", "--scenes", "48", "--epochs", "1", "--size", "32", "--weighting", "pixel"]
    result = CliRunner().invoke(main, [*arguments, "--folder", str(tmp_path / "d")], catch_exceptions=False)
    assert result.exit_code == 0


def test_the_report_command_says_what_a_run_holds(tmp_path):
    import lossledger as ll

    model = ll.Model(__import__("torch").nn.Linear(2, 3))
    model.compile(loss=ll.losses.BinaryCrossentropy(from_logits=True), class_names=["a", "b", "c"])
    x = np.random.default_rng(0).random((20, 2))
    history = model.fit(x, (x @ np.ones((2, 3)) > 1).astype(float), epochs=2, verbose=0, run_dir=tmp_path / "r")
    result = CliRunner().invoke(main, ["report", str(tmp_path / "r"), "--text"], catch_exceptions=False)
    assert result.exit_code == 0 and "The books balance" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80
    assert suggested_weights(history.ledger).keys() <= {"a", "b", "c"}
    result = CliRunner().invoke(main, ["report", str(tmp_path / "r")], catch_exceptions=False)
    assert (tmp_path / "r" / "report.html").is_file()


def test_errors_of_the_command_line_are_one_line(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--size", "7", "--folder", str(tmp_path / "d")])
    assert result.exit_code == 2 and "Traceback" not in result.output and "lossledger:" in result.output


@pytest.mark.slow
def test_the_demo_shows_its_effect(tmp_path):
    """At full size: the printed loss is tiny, the rare class is lost, and what the ledger suggests finds it."""
    folder = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "--folder", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    ledger = Ledger.open(folder)
    assert ledger.select("1-plain").loss("validation", 20) < 0.05
    assert metric(ledger, "1-plain", "digit 4") < 0.2 < 0.35 < metric(ledger, "2-weighted", "digit 4")
    for run in ledger.runs:
        assert all(metric(ledger, run, f"digit {d}") > 0.55 for d in range(4))


def test_the_report_command_prints_every_form(tmp_path):
    import lossledger as ll

    x = np.random.default_rng(0).random((20, 2))
    for name, epochs in (("a", 1), ("b", 2)):
        model = ll.Model(__import__("torch").nn.Linear(2, 3))
        model.compile(loss=ll.losses.BinaryCrossentropy(from_logits=True), class_names=["p", "q", "r"])
        model.fit(x, (x @ np.ones((2, 3)) > 1).astype(float), epochs=epochs, verbose=0, run_dir=tmp_path / name)
    command = ["report", str(tmp_path / "b"), "--against", str(tmp_path / "a")]
    said = {form: CliRunner().invoke(main, [*command, f"--{form}"]).output for form in ("text", "markdown", "json")}
    assert "Difference from a" in said["text"] and max(map(len, said["text"].splitlines())) <= 80
    assert said["markdown"].startswith("# Loss report: b, a\n") and "| class |" in said["markdown"]
    assert json.loads(said["json"])["runs"][0]["against"]["diff"]["rows"]
    printed = CliRunner().invoke(main, ["diff", str(tmp_path / "a"), str(tmp_path / "b")]).output
    assert "mix" in printed and max(map(len, printed.splitlines())) <= 80
