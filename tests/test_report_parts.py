"""The parts of a report below the classes: worst samples, confidence, slices, places."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import lossledger as ll
from lossledger.errors import InputError
from lossledger.ledger import Ledger, Row
from lossledger.ledger.samples import sample_columns
from lossledger.losses import BinaryCrossentropy, CategoricalCrossentropy, MeanSquaredError
from lossledger.report import as_json, as_markdown, as_text, build_view
from lossledger.report.groups import place_maps, slice_tables
from lossledger.report.html import render
from lossledger.report.plots import place_chart, scatter
from lossledger.report.samples import MOST_DOTS, cartography, sample_tables
from lossledger.training.places import add_places
from test_report import HOSTILE, Page, fake


@pytest.fixture(scope="module")
def digits():
    """A run of three classes, two named groups and some wrong labels, which the last samples have."""
    random = np.random.default_rng(0)
    label = random.integers(0, 3, 200)
    x = np.eye(3)[label] * 3 + random.normal(0, 0.4, (200, 3))
    label[190:] = (label[190:] + 1) % 3
    torch.manual_seed(0)
    model = ll.Model(torch.nn.Linear(3, 3))
    model.compile(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3),
        loss=CategoricalCrossentropy(from_logits=True),
        class_names=["cat", "dog", HOSTILE],
    )
    site = np.where(np.arange(200) >= 165, "north", "south")
    return model.fit(
        x, np.eye(3)[label], epochs=5, batch_size=20, samples=True, groups={"site": site}, verbose=0, seed=0
    ).ledger


def test_the_worst_samples_are_those_of_the_ledger(digits: Ledger) -> None:
    (table,) = sample_tables(digits, digits.info["class_names"])
    assert (table.split, table.epoch, table.count) == ("training", 5, 200)
    expected = digits.top_losses(15, epoch=5).rows
    assert [(row.sample, row.loss) for row in table.rows] == [(row["sample"], row["loss"]) for row in expected]
    assert {row.sample for row in table.rows} >= set(range(190, 200))
    assert table.rows[0].label != table.rows[0].predicted
    assert {row.label for table in (table,) for row in table.rows} <= {"cat", "dog", HOSTILE}
    everything = next(sample_tables(digits, None, most=200))
    assert math.fsum(row.share or 0 for row in everything.rows) == pytest.approx(1)
    assert all(row.label in "012" for row in everything.rows)


def test_labels_of_a_single_column_do_not_have_its_name() -> None:
    x, y = torch.linspace(-1.0, 1.0, 40)[:, None], (torch.arange(40) >= 30).float()
    model = ll.Model(torch.nn.Linear(1, 1))
    model.compile("sgd", BinaryCrossentropy(from_logits=True), class_names=["churn"])
    book = model.fit(x, y, samples=True, verbose=0, seed=0).ledger
    (table,) = sample_tables(book, book.info["class_names"], most=40)
    assert {(row.sample >= 30, row.label) for row in table.rows} == {(False, "0"), (True, "1")}


def test_cartography_is_mean_and_deviation_over_the_epochs(digits: Ledger) -> None:
    found = cartography(digits)
    assert found is not None and (found.epochs, found.count, len(found.dots)) == (5, 200, 200)
    samples = digits.samples.where(sample=195)
    dot = next(dot for dot in found.dots if dot.sample == 195)
    assert dot.confidence == pytest.approx(np.mean(samples["confidence"]))
    assert dot.variability == pytest.approx(np.std(samples["confidence"]))
    assert dot.correct == pytest.approx(np.mean(samples["correct"]))
    wrong = [dot.confidence for dot in found.dots if dot.sample >= 190]
    right = [dot.confidence for dot in found.dots if dot.sample < 190]
    assert max(wrong) < np.quantile(right, 0.05)
    assert len(scatter(found)["data"]["values"]) == 200


def test_many_samples_are_drawn_as_few_dots_with_the_least_sure_among_them() -> None:
    ledger, size = Ledger("many"), 5000
    for epoch in (1, 2):
        values = {name: np.ones(size) for name in ("total", "count", "weight", "mean", "contribution", "coefficient")}
        values |= {"sample": np.arange(size), "confidence": np.linspace(1, 0, size), "correct": np.ones(size)}
        ledger.append_samples(sample_columns("cce", "training", epoch, values))
    found = cartography(ledger)
    assert found is not None and found.count == size and len(found.dots) <= MOST_DOTS
    assert {dot.sample for dot in found.dots} >= set(range(size - 100, size)) | {0}
    assert cartography(Ledger("none")) is None and list(sample_tables(Ledger("none"), None)) == []


def test_slices_are_the_groups_of_the_ledger(digits: Ledger) -> None:
    (run,) = build_view(digits).runs
    (table,) = run.slices
    assert (table.kind, table.split, [row.group for row in table.rows]) == ("site", "training", ["north", "south"])
    north = table.rows[0]
    assert north.count == 35 and north.entries == pytest.approx(0.175)
    by_site = {row["site"]: row for row in digits.table(["site"], epoch=5, split="training")}
    assert north.mean == pytest.approx(by_site["north"]["mean"]) and north.share == pytest.approx(
        by_site["north"]["share"]
    )
    assert math.fsum(row.share or 0 for row in table.rows) == pytest.approx(1)
    assert north.factor == pytest.approx(north.mean / digits.loss("training"))
    # Classes are no slices, and slices no classes.
    assert {row.name for row in run.tables[0].rows} == {"cat", "dog", HOSTILE}
    assert list(slice_tables([row for row in digits.rows if row.kind in ("term", "class")], 1.0)) == []


def test_the_worst_slices_are_those_of_the_ledger(digits: Ledger) -> None:
    (run,) = build_view(digits).runs
    assert run.worst == digits.worst_slices(10) and run.worst is not None
    assert str(run.worst.rows[0]) == "site=north" and run.worst.tested == 2 and run.worst.significant == 1
    said = " ".join(as_text(build_view(digits)).split())
    assert "were compared with the rest of 200 samples; 1 is worse by more than chance" in said
    assert "Worse than the rest" in Page(render(build_view(digits))).text
    assert json.loads(as_json(build_view(digits)))["runs"][0]["worst"]["tested"] == 2
    # Samples without groups have none.
    assert build_view(fake()).runs[0].worst is None


def test_provenance_says_how_many_ranks(digits: Ledger) -> None:
    assert dict(build_view(digits).runs[0].provenance)["ranks"] == "1"


def test_every_form_says_them_and_names_do_no_harm(digits: Ledger) -> None:
    view = build_view(digits)
    page, said = render(view), as_text(view)
    for tab in ("Worst samples", "Confidence", "Slices"):
        assert f'data-tab="{tab}"' in page
    parsed = Page(page)
    assert parsed.open == [] and parsed.handlers == []
    assert page.count("</script>") == page.count("<script") and "training, epoch 5: the worst of 200" in parsed.text
    assert "Worst samples, training, epoch 5" in said and "By site" in said and "never right" in said
    assert max(map(len, said.splitlines())) <= 80
    assert "| north |" in as_markdown(view)
    run = json.loads(as_json(view))["runs"][0]
    assert len(run["samples"][0]["rows"]) == 15 and run["cartography"]["count"] == 200
    assert run["slices"][0]["rows"][0]["group"] == "north"


def segmented(loss: BinaryCrossentropy, size: int = 12) -> tuple[Ledger, torch.Tensor, torch.Tensor]:
    """The ledger of an evaluation of images, whose loss lies in the upper left."""
    random = torch.Generator().manual_seed(0)
    y_true = (torch.rand(5, size, size, 2, generator=random) > 0.8).float()
    y_pred = torch.randn(5, size, size, 2, generator=random) * 0.1
    y_pred[:, :3, :3] += 4.0
    same = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(same.weight)
    model = ll.Model(same)
    model.compile(loss=loss)
    model.evaluate(y_pred, y_true, verbose=0)
    return model.ledger, y_true, y_pred


def test_places_add_up_to_the_loss_and_show_where_it_is() -> None:
    loss = BinaryCrossentropy(from_logits=True)
    ledger, y_true, y_pred = segmented(loss)
    rows = add_places(ledger, loss, y_true, y_pred, term="binary_crossentropy", split="test", most=4)
    assert len(rows) == 16 and rows[5].group == "3,3" and rows[0].count == 5 * 9 * 2
    assert math.fsum(row.contribution for row in rows) == pytest.approx(ledger.loss("test"), rel=1e-6)
    assert ledger.balance() == []
    expected = torch.nn.functional.binary_cross_entropy_with_logits(y_pred, y_true, reduction="none")
    (found,) = place_maps(ledger.rows)
    assert found.image and len(found.places) == 16
    by_place = {(place.row, place.column): place.mean for place in found.places}
    assert by_place[0, 0] == pytest.approx(float(expected[:, :3, :3].mean())) == max(by_place.values())
    assert by_place[9, 6] == pytest.approx(float(expected[:, 9:, 6:9].mean()))
    values = place_chart(found)["data"]["values"]
    assert {"x": 0, "x2": 3, "y": 0, "y2": 3, "mean": by_place[0, 0]} in values
    page = render(build_view(ledger))
    assert 'data-tab="Places"' in page and "highest at row 0, column 0" in Page(page).text
    assert "highest at row 0, column 0" in " ".join(as_text(build_view(ledger)).split())


def test_places_of_a_sequence_and_what_is_masked() -> None:
    ledger = Ledger("sequence")
    y_true, y_pred = torch.zeros(2, 6, 1), torch.arange(6.0).reshape(1, 6, 1).expand(2, 6, 1)
    mask = torch.ones(2, 6)
    mask[0, 5] = 0
    loss = MeanSquaredError()
    value = float(loss(y_true, y_pred, mask=mask))
    key = ("validation", 2, None, "mse", "data", "linear", "term", "", "")
    ledger.append([Row(*key, 0.5 * value * 11, 11, 11.0, 0.5, 11.0, 0.5 * value, 0)])
    rows = add_places(ledger, loss, y_true, y_pred, term="mse", mask=mask, most=3)
    assert [(row.group, row.count) for row in rows] == [("0", 4), ("2", 4), ("4", 3)]
    assert math.fsum(row.contribution for row in rows) == pytest.approx(0.5 * value) and rows[0].coefficient == 0.5
    (found,) = place_maps(rows)
    assert not found.image and [place.mean for place in found.places] == pytest.approx([0.5, 6.5, 57 / 3])
    assert [point["position"] for point in place_chart(found)["data"]["values"]] == [0, 2, 4]
    assert "highest at position 4 (19)" in " ".join(as_text(build_view(ledger)).split())


def test_places_of_other_outputs_are_refused() -> None:
    loss = BinaryCrossentropy(from_logits=True)
    ledger, y_true, y_pred = segmented(loss)
    before = len(ledger)
    with pytest.raises(InputError, match="expected the outputs of test"):
        add_places(ledger, loss, y_true, y_pred + 0.1, term="binary_crossentropy", split="test")
    with pytest.raises(InputError, match="no term 'dice'"):
        add_places(ledger, loss, y_true, y_pred, term="dice", split="test")
    with pytest.raises(InputError, match="there are no places"):
        add_places(ledger, loss, y_true[:, 0, 0], y_pred[:, 0, 0], term="binary_crossentropy", split="test")
    with pytest.raises(InputError, match="cannot be divided"):
        dice = ll.losses.Dice(axis=(0, 1, 2), from_logits="sigmoid")
        add_places(ledger, dice, y_true, y_pred, term="binary_crossentropy", split="test")
    assert len(ledger) == before


def test_groups_named_like_no_place_are_left_out() -> None:
    ledger = fake()
    key = ("validation", 3, None, "binary_crossentropy", "data", "linear", "position")
    ledger.append([Row(*key, name, "", 1.0, 1, 1.0, 1.0, 1.0, 0.5, 0) for name in (HOSTILE, "1,2,3", "²", "4")])
    assert list(place_maps(ledger.rows)) == []


def test_places_of_many_entries_add_up_to_the_term():
    """Float32 sums of 400,000 entries of a place, one after another, would be off by more than is accepted."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 1, 1)
    model = ll.Model(net)
    model.compile("sgd", "mse")
    x = torch.rand(400, 1, 32, 32)
    targets = torch.zeros(400, 1, 32, 32)
    history = model.fit(x, targets, batch_size=64, epochs=1, validation_data=(x, targets), verbose=0, checks="off")
    outputs = torch.as_tensor(model.predict(x, batch_size=64)).movedim(1, -1)
    rows = add_places(
        history.ledger, ll.losses.MeanSquaredError(), targets.movedim(1, -1), outputs, term="mean_squared_error", most=1
    )
    (whole,) = [r for r in history.ledger.rows if (r.kind, r.split) == ("term", "validation")]
    assert len(rows) == 1 and rows[0].contribution == pytest.approx(whole.contribution, rel=1e-6)
