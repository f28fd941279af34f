"""The report: what it says of a realistic ledger, and that it is one harmless file."""

from __future__ import annotations

import base64
import doctest
import hashlib
import html
import importlib
import json
import math
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossledger.errors import InputError, LedgerError
from lossledger.ledger import Ledger, MetricRow, Row
from lossledger.ledger.table import cell_width
from lossledger.report import as_json, as_markdown, as_text, build_view, display, report
from lossledger.report.cells import against_cells, comparison_cells
from lossledger.report.charts import MOST_POINTS, curve_specification, curves, runtime
from lossledger.report.html import MOST_PICTURE_BYTES, load_pictures, render
from lossledger.report.view import Comparison, ReportView

CLASSES = ("road", "building", "tree", "car", "sign")
HOSTILE = '</script><b>"x"</b>\'{{7*7}}\x1b[31m'
# Share of the entries where the class is present, and own loss there and elsewhere after the first epoch.
PRESENT = {"road": 0.48, "building": 0.31, "tree": 0.18, "car": 0.028, "sign": 0.002}
OWN_LOSS = {"road": 0.09, "building": 0.14, "tree": 0.21, "car": 0.9, "sign": 4.6}
ENTRIES = 240_000


def binary_rows(
    split: str, epoch: int, names: Iterable[str], *, step: int | None = None, scale: float, weight: float
) -> list[Row]:
    """Rows of a binary cross-entropy over five columns, each split by its target; the mean over all entries."""
    groups = []
    listed = list(names)
    divisor = float(ENTRIES * len(listed))
    for original, name in zip(CLASSES, listed, strict=True):
        present = round(ENTRIES * PRESENT[original])
        own_weight = weight if original == "sign" else 1.0
        for presence, count, element in (
            ("present", present, OWN_LOSS[original] * (1.0 if original == "sign" else scale)),
            ("absent", ENTRIES - present, 0.012 * scale),
        ):
            total = count * element * own_weight
            shared = dict(kind="class", group=name, presence=presence, coefficient=1.0, divisor=divisor, nonfinite=0)
            sums = dict(total=total, count=count, weight=count * own_weight, contribution=total / divisor)
            groups.append(Row(split, epoch, step, "binary_crossentropy", "data", "linear", **shared, **sums))
    whole = [math.fsum(getattr(row, name) for row in groups) for name in ("total", "weight", "contribution")]
    count = sum(row.count for row in groups)
    term = ("binary_crossentropy", "data", "linear", "term", "", "")
    return [Row(split, epoch, step, *term, whole[0], count, whole[1], 1.0, divisor, whole[2], 0), *groups]


def dice_rows(split: str, epoch: int, names: Iterable[str], *, coefficient: float, scale: float) -> list[Row]:
    groups = []
    for original, name in zip(CLASSES, names, strict=True):
        divisor = 2.0 * ENTRIES * PRESENT[original]
        total = divisor * min(0.95, OWN_LOSS[original] * scale)
        contribution = coefficient * total / divisor / len(CLASSES)
        key = ("dice", "data", "ratio", "class", name, "")
        groups.append(Row(split, epoch, None, *key, total, ENTRIES, divisor, coefficient, divisor, contribution, 0))
    contribution = math.fsum(row.contribution for row in groups)
    total, weight = math.fsum(row.total for row in groups), math.fsum(row.weight for row in groups)
    term = ("dice", "data", "ratio", "term", "", "")
    count = sum(row.count for row in groups)
    return [Row(split, epoch, None, *term, total, count, weight, coefficient, weight, contribution, 0), *groups]


def fake(
    run: str = "plain", names: tuple[str, ...] = CLASSES, dice: float = 0.0, weight: float = 1.0, steps: int = 0
) -> Ledger:
    """A run of three epochs: binary cross-entropy, Dice where its coefficient is not 0, L2, and IoU by class."""
    recipe = "binary_crossentropy" + (f" + {dice} dice" if dice else "")
    versions = {"torch": "2.6.0", "python": "3.12"}
    ledger = Ledger(run, {"recipe": recipe, "seed": 7, "class_names": list(names), "versions": versions})
    for epoch in (1, 2, 3):
        for split, factor in (("training", 1.0), ("validation", 1.12)):
            scale = factor * (1.0 if epoch == 1 else 0.62 if epoch == 2 else 0.45)
            rows = binary_rows(split, epoch, names, scale=scale, weight=weight)
            if dice:
                rows += dice_rows(split, epoch, names, coefficient=dice, scale=scale)
            penalty = 0.004 / epoch
            l2 = ("l2", "regularizer", "linear", "term", "", "")
            rows.append(Row(split, epoch, None, *l2, penalty * 1e3, 0, 0.0, 1e-3, 1.0, penalty, 0))
            quality = [0.94, 0.9, 0.86, 0.55 + 0.1 * bool(dice), 0.31 if dice else 0.06]
            ious = [value * (0.7 + 0.1 * epoch) for value in quality]
            metrics = [MetricRow(split, epoch, "iou", n, v) for n, v in zip(names, ious, strict=True)]
            ledger.append(rows, [*metrics, MetricRow(split, epoch, "iou", "", sum(ious) / len(ious))])
    spikes = random.Random(0)
    for step in range(1, steps + 1):
        scale = 1.6 / step**0.3 * spikes.choice((0.9, 1.0, 1.1))
        ledger.append(binary_rows("training", 1, names, step=step, scale=scale, weight=weight)[:1])
    return ledger


def png(width: int = 48, height: int = 48, noise: bool = False) -> bytes:
    source = random.Random(1)
    lines = bytearray()
    for y in range(height):
        lines.append(0)
        lines.extend(source.randrange(256) if noise else (x * y) % 256 for x in range(width))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    image = zlib.compress(bytes(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", image) + chunk(b"IEND", b"")


def save_with_pictures(ledger: Ledger, folder: Path, number: int = 5, data: bytes | None = None) -> Path:
    ledger.save(folder)
    (folder / "pictures").mkdir()
    entries = []
    for i in range(number):
        (folder / "pictures" / f"{i}.png").write_bytes(data or png())
        entries.append({"file": f"{i}.png", "caption": f"sample {i * 37}: loss {2.1 - i / 5:.2f}", "run": ledger.run})
    (folder / "pictures" / "pictures.json").write_text(json.dumps(entries))
    return folder


class Page(HTMLParser):
    """Collects what the tests ask of a page: tags that are open at the end, requests, scripts and text."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"unbalanced </{tag}>"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs of 'today'")
    save_with_pictures(fake("plain", steps=40), folder / "plain")
    save_with_pictures(fake("with-dice", dice=0.5, weight=3.0), folder / "lr=0.1 [dice]", number=4)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = report(runs, tmp_path_factory.mktemp("out") / "deep" / "report.html")
    return path.read_text(encoding="utf-8")


def test_view_says_where_the_loss_is() -> None:
    run = build_view(fake(dice=0.5)).runs[0]
    assert [term.term for term in run.terms] == ["binary_crossentropy", "dice", "l2"]
    assert math.fsum(term.contribution for term in run.terms) == pytest.approx(run.verdict.loss)
    assert math.fsum(term.share or 0 for term in run.terms) == pytest.approx(1)
    for term in run.terms[:2]:
        assert math.fsum(part.contribution for part in term.classes) == pytest.approx(term.contribution)
        assert [part.contribution for part in term.classes] == sorted(
            (p.contribution for p in term.classes), reverse=True
        )
    sign = next(part for part in run.terms[0].classes if part.name == "sign")
    assert sign.entries == pytest.approx(0.002)
    assert 0 < (sign.present or 0) < (sign.share or 0)


def test_verdict_names_the_hidden_class() -> None:
    verdict = build_view(fake()).runs[0].verdict
    assert (verdict.split, verdict.epoch, verdict.count, verdict.imbalances) == ("validation", 3, 5 * ENTRIES, ())
    assert verdict.hidden is not None and verdict.hidden.rare
    assert verdict.hidden.row.name == "sign"
    assert verdict.hidden.factor == pytest.approx(4.6 / verdict.loss)
    said = " ".join(as_text(build_view(fake())).split())
    assert "Class sign is present in 0.20 % of the entries; its own loss there is 4.60, 199 times the printed" in said


@pytest.mark.parametrize("form", [as_text, as_json, render])
@pytest.mark.parametrize("outputs", [("",), ("a/", "b/")])
def test_a_single_column_hides_nothing(form, outputs: tuple[str, ...]) -> None:
    def made(names: tuple[str, ...]) -> Ledger:
        ledger = Ledger("regression")
        for output in outputs:
            key = ("validation", 1, None, f"{output}mean_squared_error", "data", "linear")
            ledger.append([Row(*key, "term", "", "", 12.0, 8, 8.0, 1.0, 8.0, 1.5, 0)])
            count = 8 // len(names)
            sums = (12.0 / len(names), count, float(count), 1.0, 8.0, 1.5 / len(names), 0)
            ledger.append([Row(*key, "class", name, "", *sums) for name in names])
        return ledger

    said = [" ".join(form(build_view(made(names))).split()) for names in (("0",), ("0", "1"))]
    words = ['"hidden": null', '"hidden": {'] if form is as_json else ["hides behind the mean"] * 2
    assert ("hides behind the mean" in said[0]) is False
    assert (words[0] in said[0], words[1] in said[1]) == (form is as_json, True)


def of_one_term(term: str, *rows: tuple) -> Ledger:
    """A ledger of one validation, from kind, group, presence and sums of each row."""
    ledger = Ledger(term)
    ledger.append([Row("validation", 1, None, term, "data", "linear", *row) for row in rows])
    return ledger


def test_a_single_label_that_is_rare_is_named() -> None:
    ledger = of_one_term(
        "binary_crossentropy",
        ("term", "", "", 14.9, 100, 100.0, 1.0, 100.0, 0.149, 0),
        ("class", "0", "present", 10.0, 2, 2.0, 1.0, 100.0, 0.1, 0),
        ("class", "0", "absent", 4.9, 98, 98.0, 1.0, 100.0, 0.049, 0),
    )
    (hidden,) = (run.verdict.hidden for run in build_view(ledger).runs)
    assert hidden is not None and hidden.rare and hidden.row.entries == 0.02
    assert hidden.factor == pytest.approx(5.0 / 0.149)
    said = " ".join(as_text(build_view(ledger)).split())
    assert "Class 0 is present in 2.0 % of the entries; its own loss there is 5, 34 times the printed" in said


def test_own_means_are_not_inflated_by_class_weights() -> None:
    plain, heavy = (build_view(fake(weight=weight)).runs[0].tables[0] for weight in (1.0, 3.0))
    assert not plain.weighted and heavy.weighted
    assert [row.name for row in heavy.rows] == list(CLASSES)
    for one, other in zip(plain.rows, heavy.rows, strict=True):
        assert other.mean == pytest.approx(one.mean)
        assert other.mean_present == pytest.approx(one.mean_present)
        assert other.average_weight == pytest.approx(3.0 if other.name == "sign" else 1.0)
    assert heavy.rows[-1].mean_present == pytest.approx(4.6)


def test_view_of_a_categorical_loss() -> None:
    ledger = of_one_term(
        "categorical_crossentropy",
        ("term", "", "", 40.0, 100, 100.0, 1.0, 100.0, 0.4, 0),
        ("class", "common", "", 10.0, 95, 95.0, 1.0, 100.0, 0.1, 0),
        ("class", "rare", "", 30.0, 5, 5.0, 1.0, 100.0, 0.3, 0),
    )
    run = build_view(ledger).runs[0]
    assert [row.entries for row in run.tables[0].rows] == [0.95, 0.05]
    hidden = run.verdict.hidden
    assert hidden is not None and hidden.row.name == "rare" and hidden.factor == pytest.approx(15.0)
    assert run.curves == ()


def test_each_output_has_its_own_class_table() -> None:
    ledger = Ledger("two outputs", {"class_names": {"mask": ["b", "a"], "label": ["b", "z"]}})
    for term, names, share in (("mask/bce", ("a", "b"), 0.75), ("label/cce", ("b", "z"), 0.25)):
        key = ("validation", 1, None, term, "data", "linear")
        ledger.append([Row(*key, "term", "", "", 8 * share, 8, 8.0, 1.0, 8.0, share, 0)])
        ledger.append([Row(*key, "class", n, "", 4 * share, 4, 4.0, 1.0, 8.0, share / 2, 0) for n in names])
    ledger.append(
        [], [MetricRow("validation", 1, "mask_iou", "b", 0.5), MetricRow("validation", 1, "acc", "z", math.nan)]
    )
    mask, label = build_view(ledger).runs[0].tables
    assert (mask.output, [row.name for row in mask.rows], mask.metrics) == ("mask", ["b", "a"], ("mask_iou",))
    assert (label.output, [row.name for row in label.rows], label.metrics) == ("label", ["b", "z"], ("acc",))
    assert mask.rows[0].metrics == (0.5,) and [row.share for row in label.rows] == [0.125, 0.125]
    assert "Classes of mask" in Page(render(build_view(ledger))).text


def test_view_shows_imbalance_and_non_finite_elements() -> None:
    ledger = fake()
    key = ("training", 4, None, "binary_crossentropy", "data", "linear")
    ledger.append([Row(*key, "term", "", "", 1.0, 4, 4.0, 1.0, 4.0, 0.25, 3)])
    ledger.append([Row(*key, "class", "sign", "", 1.0, 4, 4.0, 1.0, 4.0, 0.125, 3)])
    said = as_text(build_view(ledger))
    assert "The books do not balance in 1 of 7 sums" in said
    assert "3 unmasked elements were NaN or infinite" in said


def test_the_books_of_a_loss_that_is_not_a_number_are_not_said_to_balance() -> None:
    ledger = Ledger("broken")
    for epoch, loss in ((1, 0.25), (2, math.nan)):
        key = ("training", epoch, None, "mse", "data", "linear")
        ledger.append([Row(*key, "term", "", "", 4 * loss, 4, 4.0, 1.0, 4.0, loss, 0)])
        ledger.append([Row(*key, "class", "sign", "", 4 * loss, 4, 4.0, 1.0, 4.0, loss, 0)])
    said = as_text(build_view(ledger))
    assert "in each of 1 sum. 1 sum is NaN or infinite and cannot be checked." in " ".join(said.split())
    broken = Ledger("broken")
    broken.append([one for one in ledger.rows if one.epoch == 2])
    said = as_text(build_view(broken))
    assert "The books balance" not in said
    assert "1 sum is NaN or infinite and cannot be checked." in " ".join(said.split())


def test_view_of_a_loss_that_is_not_a_number() -> None:
    ledger = Ledger("broken")
    term = ("mse", "data", "linear", "term", "", "")
    ledger.append([Row("training", 1, None, *term, math.nan, 4, 4.0, 1.0, 4.0, math.nan, 4)])
    ledger.append([Row("training", 2, None, *term, math.inf, 4, 4.0, 1.0, 4.0, math.inf, 4)])
    view = build_view(ledger)
    assert view.runs[0].curves == ()
    assert "∞" in Page(render(view)).text
    broken = Ledger("broken")
    broken.append(ledger.rows[:1])
    assert "not a number" in Page(render(build_view(broken))).text
    assert "not a number" in as_text(build_view(broken))


def test_comparison_of_runs() -> None:
    view = build_view(fake("a"), against=fake("a", dice=0.5))
    assert [run.run for run in view.runs] == ["a (1)", "a (2)"]
    by_title = {comparison.title: dict(comparison.rows) for comparison in view.comparisons}
    assert by_title["iou by class"]["sign"] == pytest.approx((0.06, 0.31))
    cells = comparison_cells(Comparison("x", (("a", (0.1 + 0.2, 0.3)), ("b", (1.0, None)))), ("p", "q"))
    assert [line[-1] for line in cells[1]] == ["0", "–"]
    assert by_title["Contribution to the loss"]["dice"][0] is None
    assert "different losses" in view.note
    refused = view.runs[0].against
    assert refused is not None and refused.diff is None and "recipe: binary_crossentropy + 0.5 dice" in refused.refused
    assert build_view(fake("a"), against=fake("b")).note == ""


def test_the_difference_from_another_run() -> None:
    before, after = fake("before"), fake("after")
    later = Ledger("after", dict(after.info))
    better = [
        replace(r, total=r.total / 2, contribution=r.contribution / 2) if r.group == "sign" else r for r in after.rows
    ]
    later.append(better)
    view = build_view(later, against=before)
    run, other = view.runs
    assert other.against is None and run.against is not None and run.against.other == "before"
    diff = run.against.diff
    assert diff is not None and diff.before == before.loss("validation")
    heads, lines = against_cells(diff)
    assert heads[0] == "group" and lines[0][0] == "sign present" and lines[0][-2] == "0"
    assert math.fsum(row.difference for row in diff.rows) == pytest.approx(diff.mix + diff.rate)
    page, said = render(view), as_text(view)
    assert 'data-tab="Difference"' in page and "is rate" in Page(page).text
    assert "Difference from before" in said and max(map(cell_width, said.splitlines())) <= 80
    assert "sign present" in as_markdown(view)
    numbers = json.loads(as_json(view))["runs"][0]["against"]["diff"]
    assert numbers["rate"] == diff.rate and len(numbers["rows"]) == len(diff.rows)


def test_json_says_what_the_page_says() -> None:
    view = build_view(fake(dice=0.5, weight=3.0))
    found = json.loads(as_json(view))
    (run,) = found["runs"]
    assert found["schema"] == 1 and run["verdict"]["loss"] == view.runs[0].verdict.loss
    shares = [term["share"] for output in run["outputs"] for term in output["terms"]]
    assert math.fsum(shares) == pytest.approx(1)
    sign = run["tables"][0]["rows"][-1]
    assert sign["metrics"] == {"iou": pytest.approx(0.31)} and len(sign["trend"]) == 3
    assert run["provenance"]["seed"] == "7" and run["sentences"][0].startswith("Validation loss")
    broken = Ledger("broken")
    key = ("training", 1, None, "mse", "data", "linear", "term", "", "")
    broken.append([Row(*key, math.nan, 4, 4.0, 1.0, 4.0, math.nan, 4)])
    assert json.loads(as_json(build_view(broken)))["runs"][0]["verdict"]["loss"] == "nan"


def test_classes_show_their_trend() -> None:
    rows = build_view(fake()).runs[0].tables[0].rows
    road = rows[0]
    assert [epoch for epoch, _ in road.trend] == [1, 2, 3]
    assert [value for _, value in road.trend] == pytest.approx([0.09 * 1.12 * s for s in (1.0, 0.62, 0.45)])
    assert road.change == pytest.approx(-0.55) and rows[-1].change == pytest.approx(0)
    page = render(build_view(fake()))
    assert page.count('class="spark"') == len(rows) and "−55.0 %" in page


def test_terms_stand_under_their_outputs() -> None:
    ledger = Ledger("outputs")
    for term, share in (("mask/bce", 0.5), ("mask/dice", 0.25), ("label/cce", 0.25)):
        key = ("validation", 1, None, term, "data", "linear")
        ledger.append([Row(*key, "term", "", "", 8 * share, 8, 8.0, 1.0, 8.0, share, 0)])
    (run,) = build_view(ledger).runs
    assert [(o.name, o.contribution, len(o.terms)) for o in run.outputs] == [("mask", 0.75, 2), ("label", 0.25, 1)]
    assert "Output mask adds 0.750 , 75.0 % of the loss" in Page(render(build_view(ledger))).text
    assert "all of mask" in as_text(build_view(ledger))


def test_a_regularizer_stands_under_no_output() -> None:
    ledger = Ledger("outputs")
    for term, role in (("mask/bce", "data"), ("label/cce", "data"), ("l2/*weight", "regularizer")):
        key = ("validation", 1, None, term, role, "linear")
        ledger.append([Row(*key, "term", "", "", 2.0, 8, 8.0, 1.0, 8.0, 0.25, 0)])
    (run,) = build_view(ledger).runs
    assert [o.name for o in run.outputs] == ["mask", "label", ""]
    assert "Output l2" not in Page(render(build_view(ledger))).text
    assert "all of l2" not in as_text(build_view(ledger)) and "l2/*weight" in as_text(build_view(ledger))


def test_provenance_names_recipe_divisor_and_what_was_counted() -> None:
    ledger = fake()
    recipe = {"bce": {"loss": "Bce()", "weight": 0.5}}
    ledger.info.update(recipe=recipe, divisors={"bce": "sum_over_batch_size"})
    ledger.info["findings"] = [
        {"code": "CLS2", "severity": "warning", "message": "hides.", "remedy": "Look."},
        "not a finding",
    ]
    view = build_view(ledger)
    facts = dict(view.runs[0].provenance)
    assert facts["recipe of bce"] == "0.5 × Bce()" and facts["divisor of bce"] == "sum_over_batch_size"
    assert facts["entries of binary_crossentropy, validation"].startswith(
        "1,200,000 not masked, all finite; divided by"
    )
    for said in (Page(render(view)).text, " ".join(as_text(view).split())):
        assert "CLS2 warning" in said and "hides. Look." in said and "versions: torch" in said
    assert "The checks found 1 thing" in Page(render(view)).text


def test_a_page_too_large_leaves_out_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    view = build_view(fake(steps=40))
    full = len(render(view))
    monkeypatch.setattr("lossledger.report.html.MOST_BYTES", full - 1)
    small = render(view)
    assert len(small) < full and "application/json" not in small and '<figure class="chart">' in small
    monkeypatch.setattr("lossledger.report.html.MOST_BYTES", 1)
    least = render(view)
    assert len(least) < len(small) and "Class sign is present" in Page(least).text


def test_a_run_without_an_epoch_has_no_report() -> None:
    with pytest.raises(InputError, match="nothing to report"):
        build_view(Ledger("empty"))


def test_of_several_runs_those_with_an_epoch_are_shown(tmp_path: Path) -> None:
    for name in ("a", "b", "b'<i>", "c"):
        Ledger(name).save(tmp_path / name)
    with pytest.raises(InputError, match="The run 'a' has no loss of an epoch yet"):
        build_view(Ledger.open(tmp_path))
    for name in ("a", "c"):
        ledger = fake(name)
        ledger.save(tmp_path / name)
    view = build_view(Ledger.open(tmp_path))
    assert [run.run for run in view.runs] == ["a", "c"] and view.waiting == ("b", "b'<i>")
    assert json.loads(as_json(view))["waiting"] == ["b", "b'<i>"] and view.comparisons
    assert "not shown: b, b'<i>." in as_text(view) and "not shown: b, b&#39;&lt;i&gt;." in render(view)
    # What is asked for by name is not left out in silence.
    with pytest.raises(InputError, match="'b' has no loss of an epoch yet"):
        build_view(Ledger.open(tmp_path / "a"), against=Ledger.open(tmp_path).select("b"))
    assert build_view(Ledger.open(tmp_path / "a")).waiting == ()


def test_curves_keep_every_spike() -> None:
    rows = [
        Row("training", 1, step, "mse", "data", "linear", "term", "", "", 1.0, 1, 1.0, 1.0, 1.0, value, 0)
        for step, value in ((s, 99.0 if s == 3333 else 1.0) for s in range(1, 10_001))
    ]
    (curve,) = curves(rows, ())
    points = curve.series[0].points
    assert len(points) <= MOST_POINTS and (3333, 99.0) in points
    assert points[0] == (1, 1.0) and points[-1] == (10_000, 1.0)
    assert list(points) == sorted(points)


def test_lines_with_long_names_stay_apart() -> None:
    middle = [MetricRow("validation", e, "iou", f"{'a' * 30}{i}{'b' * 30}", i / e) for e in (1, 2) for i in (1, 2, 3)]
    (curve,) = curves((), middle)
    specification = curve_specification(curve)
    assert len({point["series"] for point in specification["data"]["values"]}) == 3


def test_page_is_one_harmless_file(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert "link" not in parsed.tags and parsed.handlers == []
    assert parsed.addresses and all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*|http-equiv", "", page.replace(runtime(), ""))
    assert len(page.encode()) <= 2_000_000
    # The specification of every chart, what draws them, and the script of the page.
    charts = page.count('<figure class="chart">')
    assert charts >= 8 and parsed.tags.count("script") == charts + 2
    assert parsed.tags.count("img") == 9 and parsed.tags.count("svg") >= charts
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_only_the_scripts_of_the_library_run(page: str) -> None:
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert policy.startswith("default-src 'none'; ") and "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    said = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in said]
    assert len(said) == 2 and re.findall(r"'sha256-([^']*)'", policy) == digests
    # A page without charts needs no more than its own script.
    ledger = Ledger("short")
    ledger.append(fake().rows[:1])
    assert "unsafe-eval" not in render(build_view(ledger)) and len(render(build_view(ledger))) < 60_000


def test_page_says_it_without_scripts(page: str) -> None:
    words = Page(page).text
    for said in ("0.02309", "Class sign is present in 0.20 %", "The books balance", "lr=0.1 [dice]", "sample 37"):
        assert said in words
    assert re.search(r"sign 0\.20 % 13\.2 % 0\.0152 4\.60 0 % 0\.0600", words)
    assert "torch" in words and "avg. weight" in words


def test_hostile_names_do_no_harm(tmp_path: Path) -> None:
    ledger = fake(HOSTILE, names=("a", "b", "c", "d", HOSTILE), dice=1.0)
    ledger.info[HOSTILE] = {"<img src=http://x onerror=1>": HOSTILE}
    folder = save_with_pictures(ledger, tmp_path / "it's", number=1)
    (folder / "pictures" / "pictures.json").write_text(
        json.dumps([{"file": "0.png", "caption": HOSTILE + '" onload="x'}])
    )
    page = report(folder, tmp_path / "r.html").read_text(encoding="utf-8")
    parsed = Page(page)
    assert parsed.open == [] and parsed.handlers == []
    assert parsed.tags.count("script") == page.count('<figure class="chart">') + 2 and "\x1b" not in page
    for specification in re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL):
        assert json.loads(specification)["data"]["values"] and not set("<>&") & set(specification)
    assert parsed.tags.count("b") == 3 and parsed.tags.count("img") == 1
    assert '</script><b>"x"</b>' in parsed.text and "{{7*7}}" in parsed.text
    for said in (as_text(build_view(ledger)), as_markdown(build_view(ledger))):
        assert "\x1b" not in said
    assert "<b>" not in as_markdown(build_view(ledger)).replace("\\<", "")


def test_pictures_are_few_and_small(tmp_path: Path) -> None:
    large = png(400, 400, noise=True)
    folder = save_with_pictures(fake(), tmp_path / "run", number=30, data=large)
    pictures = load_pictures(folder)
    assert 0 < len(pictures) <= 24
    assert sum(len(picture.data) for picture in pictures) <= MOST_PICTURE_BYTES
    assert report(folder, tmp_path / "r.html").stat().st_size <= 2_000_000


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[1]",
        '[{"caption": "x"}]',
        '[{"file": "../secret.png"}]',
        '[{"file": "no.png"}]',
        '[{"file": "x.png"}]',
    ],
)
def test_bad_lists_of_pictures_are_refused(tmp_path: Path, content: str) -> None:
    fake().save(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "pictures" / "x.png").write_bytes(b"GIF89a")
    (tmp_path / "pictures" / "pictures.json").write_text(content)
    with pytest.raises(LedgerError, match="pictures"):
        report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_many_classes_stay_small() -> None:
    ledger = Ledger("many")
    key = ("validation", 1, None, "categorical_crossentropy", "data", "linear")
    ledger.append([Row(*key, "term", "", "", 5000.0, 5000, 5000.0, 1.0, 5000.0, 1.0, 0)])
    rows = [Row(*key, "class", f"class {i}", "", 1.0, 1, 1.0, 1.0, 5000.0, 1 / 5000, 0) for i in range(5000)]
    ledger.append(rows, [MetricRow("validation", 1, "iou", f"class {i}", 0.5) for i in range(5000)])
    page = render(build_view(ledger))
    assert len(page) < 200_000 and "4900 more are in the ledger" in page


@pytest.mark.parametrize("form", [as_text, as_markdown, render])
def test_of_many_classes_those_that_add_most_are_shown(form: Callable[[ReportView], str]) -> None:
    ledger = Ledger("many")
    key = ("validation", 1, None, "categorical_crossentropy", "data", "linear")
    ledger.append([Row(*key, "term", "", "", 600.0, 10_500, 10_500.0, 1.0, 10_500.0, 600 / 10_500, 0)])
    # Two classes at the end bring half of the loss, and one has a single entry whose own loss is the highest.
    counts = [50] * 150 + [1000, 1999, 1]
    totals = [2.0] * 150 + [150.0, 145.0, 5.0]
    rows = [
        Row(*key, "class", f"class{i:03}", "", total, count, float(count), 1.0, 10_500.0, total / 10_500, 0)
        for i, (total, count) in enumerate(zip(totals, counts, strict=True))
    ]
    ledger.append(rows)
    said = re.sub(r"\s+", " ", form(build_view(ledger)))
    table = said[said.index("own means are") :] if form is render else said[said.index("Classes; own means") :]
    shown = re.findall(r"class\d{3}", table)
    assert shown[:97] == [f"class{i:03}" for i in range(97)]
    assert shown[97:100] == ["class150", "class151", "class152"]
    assert "53 more are in the ledger" in table


@pytest.mark.parametrize("names", [CLASSES, ("道路", "建築物" * 20, "x" * 200, HOSTILE, "é" * 30)])
def test_text_stays_within_80_columns(names: tuple[str, ...]) -> None:
    view = build_view(fake("first" * 30, names, weight=2.0, dice=0.5), against=fake("b", names, steps=3))
    lines = as_text(view).splitlines()
    assert max(map(cell_width, lines)) <= 80
    assert any(line.startswith("Class") and "is present in 0.20 %" in line for line in lines) or names is not CLASSES


def test_markdown_tables_are_well_formed() -> None:
    said = as_markdown(build_view(fake(names=("a|b", "c", "d", "e", "f"))))
    tables = re.findall(r"(?:^\|.*\n)+", said, flags=re.MULTILINE)
    assert len(tables) >= 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert r"a\|b" in said


def test_display_examples() -> None:
    shown = [display(v) for v in (0, 0.0004, 0.031, 4.6, 12345.678, 1e-9, -0.5, None, math.nan, math.inf, -math.inf)]
    assert shown == ["0", "0.000400", "0.0310", "4.60", "12,346", "1.00e-9", "-0.500", "–", "–", "∞", "-∞"]
    shares = [display(v, "percent") for v in (0, 0.5, 0.123, 0.0012, 0.00012, 1e-9, 0.9997, 0.99996, 0.9999999, 1, 1.2)]
    assert shares[:6] == ["0 %", "50.0 %", "12.3 %", "0.12 %", "0.012 %", "< 0.001 %"]
    assert shares[6:] == ["99.97 %", "99.996 %", "> 99.999 %", "100 %", "120.0 %"]
    assert [display(v, "percent") for v in (1 + 2e-7, -1 - 2e-7, 1.000002)] == ["100 %", "-100 %", "> 100 %"]
    assert display(1_228_800, "count") == "1,228,800"
    assert [display(v, "times") for v in (150.2, 1.62, 9.96)] == ["150×", "1.6×", "10×"]


@given(st.floats(-1e300, 1e300), st.integers(1, 6))
def test_numbers_are_never_rounded_to_a_lie(value: float, digits: int) -> None:
    read = float(display(value, digits=digits).replace(",", ""))
    assert read == pytest.approx(value, rel=10.0 ** (1 - digits), abs=0)
    assert (read == 0) == (value == 0)
    assert (abs(read) == 1) == (abs(abs(value) - 1) <= 1e-12)


@given(st.floats(-2, 2))
def test_shares_are_never_rounded_to_nothing_or_everything(share: float) -> None:
    shown = display(share, "percent")
    if shown[0] in "<>":
        bound = float(shown[2:-2]) / 100
        assert share < bound if shown[0] == "<" else share > bound
        return
    read = float(shown[:-2]) / 100
    assert read == pytest.approx(share, abs=6e-4)
    assert (read == 0) == (share == 0)
    assert (abs(read) == 1) == (abs(abs(share) - 1) <= 1e-11)


@pytest.mark.parametrize("module", ["text", "numbers", "charts", "html", "view", "shares", "origin", "plain"])
def test_examples_in_the_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"lossledger.report.{module}")).failed == 0


def test_report_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    assert report(fake(), path) == path and path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(LedgerError, match="Cannot write the report"):
        report(fake(), tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["r.html"]


def test_the_path_says_the_form(tmp_path: Path) -> None:
    view = build_view(fake())
    for name, form in (("r.md", as_markdown), ("r.TXT", as_text), ("r.json", as_json)):
        assert report(fake(), tmp_path / name).read_text(encoding="utf-8") == form(view)


def test_report_imports_no_torch_and_loads_the_rest_late() -> None:
    code = (
        "import sys, lossledger.report; late = {'torch', 'altair', 'vl_convert', 'duckdb', 'jinja2', 'pandas'};"
        "print(sorted(late & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
