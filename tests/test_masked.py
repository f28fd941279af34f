"""What was masked: counted and masked elements of every term are all that were shown, however a run is made."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import lossledger as ll
from interrupted import KillBefore, Killed
from lossledger.ledger import Ledger, Row
from lossledger.report import as_text, build_view
from lossledger.report.html import render
from lossledger.report.plain import as_dict
from lossledger.tally import Tally
from lossledger.training.intervals import Intervals
from lossledger.training.running import Running, described, rebuilt

L = ll.losses
N, LENGTH, COLUMNS = 22, 3, 4


class Net(nn.Module):
    """An output a position, and two losses of its own: of samples, and of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, COLUMNS)

    def forward(self, x):
        found = self.layer(x)
        ll.add_loss("size", found.square().mean((1, 2)))
        return ll.Outputs(found, {"scale": self.layer.weight.square().mean()})


def data():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(N, LENGTH, 5, generator=g)
    y = (torch.rand(N, LENGTH, COLUMNS, generator=g) < 0.4).float()
    return x, y, torch.rand(N, LENGTH, generator=g) < 0.7


LOSSES = {
    "columns": (lambda: L.BinaryCrossentropy(from_logits=True), COLUMNS),
    "ratio": (lambda: L.Dice(axis=(0, 1), from_logits="sigmoid"), COLUMNS),
    "labels": (lambda: L.CategoricalCrossentropy(from_logits=True), 1),
    "own": (lambda: lambda y, p: (y - p).square().mean(-1), 1),
}


def model(loss="columns", **options):
    torch.manual_seed(0)
    made = ll.Model(Net())
    made.compile("sgd", LOSSES[loss][0](), regularizers={"*.weight": "l2"}, **options)
    return made


def terms(ledger, **accepted):
    rows = [r for r in ledger.rows if r.kind == "term"]
    return [r for r in rows if all(getattr(r, name) == value for name, value in accepted.items())]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 3}, {"ledger_steps": 2}, {"sample_weight": torch.arange(N) % 2}]
)
def test_counted_and_masked_are_all_that_were_shown(loss, options):
    x, y, mask = data()
    made, each = model(loss), LOSSES[loss][1]
    if loss == "labels":
        y = nn.functional.one_hot(y.argmax(-1), COLUMNS).float()
    ledger = made.fit(x, y, mask=mask, batch_size=4, epochs=2, verbose=0, seed=1, **options).ledger
    for epoch in (1, 2):
        whole, size, scale, penalty = terms(ledger, epoch=epoch, step=None)
        # A weight of 0 is not a mask.
        assert (whole.count, whole.masked) == (each * int(mask.sum()), each * int((~mask).sum()))
        assert (size.count, size.masked, scale.masked, penalty.masked) == (N, 0, 0, 0)
        parts = [row for row in terms(ledger, epoch=epoch, term=whole.term) if row.step is not None]
        assert len(parts) == (3 if "ledger_steps" in options else 0)
        assert not parts or sum(row.masked for row in parts) == whole.masked
    assert all(row.masked is None for row in ledger.rows if row.kind != "term")
    made.evaluate(x, y, mask=mask, batch_size=5, verbose=0)
    assert terms(made.ledger)[0].masked == each * int((~mask).sum())


def test_an_ignored_label_is_masked():
    x, y, mask = data()
    labels = torch.where(mask, y.argmax(-1), -1)
    made = ll.Model(nn.Linear(5, COLUMNS))
    made.compile("sgd", L.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1))
    (row,) = terms(made.fit(x, labels, batch_size=4, verbose=0).ledger)
    assert (row.count, row.masked) == (int(mask.sum()), int((~mask).sum()))


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_step_left_out_was_not_shown(reproducible):
    x, y, mask = data()
    mask[5], x[5] = True, math.nan
    made = model(on_nonfinite="skip", reproducible=reproducible)
    made.fit(x, y, mask=mask, batch_size=4, shuffle=False, verbose=0)
    row = terms(made.ledger)[0]
    left = torch.cat((mask[:4], mask[8:]))
    assert (row.count, row.masked) == (COLUMNS * int(left.sum()), COLUMNS * int((~left).sum()))


@pytest.mark.usefixtures("no_sync")
def test_a_resumed_run_masks_as_the_whole(tmp_path):
    x, y, mask = data()

    backup = ll.callbacks.BackupAndRestore(save_freq=1)
    options = {"mask": mask, "batch_size": 4, "seed": 1, "verbose": 0, "ledger_steps": 2}
    with pytest.raises(Killed):
        model().fit(x, y, run_dir=tmp_path / "run", callbacks=[KillBefore(4), backup], **options)
    found = model().fit(x, y, run_dir=tmp_path / "run", callbacks=[backup], resume=True, **options).ledger
    assert found.rows == model().fit(x, y, **options).ledger.rows
    assert Ledger.open(tmp_path / "run").rows == found.rows


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("by", [None, "sample"])
@pytest.mark.parametrize("loss", [L.MeanSquaredError(), L.LogCoshDice(axis=(0, 1))])
def test_sums_of_an_older_checkpoint_do_not_know_what_was_masked(loss, by, reproducible):
    given = {"mask": [True, False], "by": by, "reproducible": reproducible}
    tally = loss.tally([[0.25], [1.0]], [[0.7], [1.0]], **given)
    known = Running(torch.device("cpu"))
    known.add({"mse": tally})
    assert known.read()["mse"].masked == 1

    def older(sums, kind):
        del kind["shown"]
        # On a grid four parts, then size and entries.
        length = (len(sums) - 2) // 4 if reproducible else len(sums)
        return [v for i, v in enumerate(sums) if i >= 4 * length or i % length != 5]

    told, state = described(known.read()["mse"]), known.state_dict()
    state["sums"]["mse"] = older(state["sums"]["mse"], state["patterns"]["mse"])
    opened = Running(torch.device("cpu"))
    opened.load_state_dict(state, {"mse": loss.link})
    assert opened.read()["mse"].masked is None
    assert opened.read()["mse"].value == pytest.approx(float(tally.value), rel=1e-6)
    opened.add({"mse": tally})
    assert opened.read()["mse"].masked is None and opened.read()["mse"].count == 2
    assert opened.read()["mse"].value == pytest.approx(float((tally + tally).value), rel=1e-6)
    told["sums"] = older(told["sums"], told["kind"])
    assert rebuilt(told, loss.link).masked is None
    assert rebuilt(told, loss.link).value == pytest.approx(float(tally.value), rel=1e-6)


def test_a_tally_that_does_not_say_makes_its_sums_unknown():
    running, intervals = Running(torch.device("cpu")), Intervals(2, torch.device("cpu"))
    for step, shown in enumerate((5, None, 4), 1):
        one = {"mse": Tally(torch.tensor(6.0), 3, torch.tensor(3), 3, shown=shown)}
        running.add(one)
        intervals.add(step, one)
    assert running.read()["mse"].masked is None
    assert [part["mse"].masked for _, part in intervals.all(3)] == [None, 1]


# --- tables and reports --------------------------------------------------------------------------------------------


def row(epoch=1, split="training", term="mse", **changed):
    sums = dict(total=2.0, count=4, weight=4.0, coefficient=1.0, divisor=4.0, contribution=0.5, nonfinite=0)
    names = dict(step=None, role="data", form="linear", kind="term", group="", presence="")
    return Row(split=split, epoch=epoch, term=term, **(names | sums | changed))


def book(*rows):
    ledger = Ledger("run")
    ledger.append(rows)
    return ledger


def test_a_table_adds_what_was_masked_and_does_not_guess():
    ledger = book(row(masked=3), row(2, masked=4), row(3), row(4, masked=0))
    table = ledger.table(["epoch"])
    assert table.columns[-1] == "masked"
    assert [line["masked"] for line in table] == [3, 4, None, 0]
    assert ledger.table(["split"], epoch=[1, 2]).rows[0]["masked"] == 7
    assert ledger.table(["split"]).rows[0]["masked"] is None
    assert "masked" not in book(row()).table().columns
    assert str(ledger.table(["epoch"], epoch=3)).splitlines()[0].endswith("share")


def test_a_table_has_the_spread_of_its_rows_where_it_was_kept():
    x, y, mask = data()
    made = model()
    ledger = made.fit(x, y, mask=mask, batch_size=4, epochs=2, verbose=0, spread=True).ledger
    own = [r for r in ledger.rows if r.kind == "class" and r.group == "2"]
    assert len(own) == 4
    (found,) = [line for line in ledger.table(["class"]) if line["class"] == "2"]
    assert found["minimum"] == min(r.minimum for r in own) and found["maximum"] == max(r.maximum for r in own)
    assert found["squares"] == math.fsum(r.squares for r in own)
    assert "masked" not in found
    lines = {line["term"]: line for line in ledger.table(["term"])}
    assert lines["binary_crossentropy"]["maximum"] == max(r.maximum for r in terms(ledger, role="data"))
    # Auxiliary losses and penalties have no elements; several terms have no smallest one.
    assert lines["size"]["minimum"] is None and ledger.table(["split"]).rows[0]["minimum"] is None
    assert "minimum" not in model().fit(x, y, verbose=0).ledger.table().columns


@pytest.mark.parametrize("name", ["minimum", "maximum", "squares"])
def test_rows_that_count_nothing_have_no_part_in_the_spread_and_nan_is_seen(name):
    def value(*rows):
        return book(*rows, row(term="other", minimum=0.0)).table(["term"]).rows[0].get(name)

    spread = {"minimum": 0.5, "maximum": 2.0, "squares": 3.0}
    nothing = row(2, count=0, total=0.0)
    assert value(row(**spread), nothing) == spread[name]
    assert value(row(**spread), row(2)) is None
    for pair in (
        (row(**spread), row(2, **dict.fromkeys(spread, math.nan))),
        (row(**dict.fromkeys(spread, math.nan)), row(2, **spread)),
    ):
        assert math.isnan(value(*pair))


def test_the_report_says_what_was_masked_and_how_far_elements_reach():
    view = build_view(
        book(row(masked=12, minimum=0.25, maximum=3.0, squares=16.0), row(split="validation", nonfinite=1))
    )
    facts, said = dict(view.runs[0].provenance), as_dict(view)["runs"][0]
    assert facts["entries of mse, training"] == (
        "4 not masked, 12 masked (75.0 % of all), all finite; divided by 4; elements from 0.250 to 3, root mean "
        "square 2"
    )
    assert facts["entries of mse, validation"] == (
        "4 not masked, 1 of them not finite; divided by 4; how many were masked is not known"
    )
    assert [(one["masked"], one["count"]) for one in said["counted"]] == [(12, 4), (None, 4)]
    assert said["counted"][0]["reach"] == {"minimum": 0.25, "maximum": 3.0, "root_mean_square": 2.0}
    assert "12 masked (75.0 % of all)" in " ".join(as_text(view).split())
    view = build_view(book(row(masked=0)))
    assert "4 not masked, none masked, all finite" in dict(view.runs[0].provenance)["entries of mse, training"]


def test_the_table_of_classes_shows_how_far_they_reach():
    x, y, mask = data()
    made = model(class_names=["ant", "bee", "cat", "dog"])
    made.fit(x, y, mask=mask, verbose=0, spread=True)
    view = build_view(made.ledger)
    with torch.no_grad():
        z = made.net(x).outputs.numpy()
    (table,) = view.runs[0].tables
    rows = {r.name: r for r in table.rows}
    own = [r for r in made.ledger.rows if r.group == "bee"]
    assert len(own) == 2 and z.shape == (N, LENGTH, COLUMNS)
    reach = rows["bee"].reach
    assert (reach.minimum, reach.maximum) == (min(r.minimum for r in own), max(r.maximum for r in own))
    assert reach.root_mean_square == pytest.approx(
        np.sqrt(sum(r.squares for r in own) / sum(r.count for r in own)), rel=1e-12
    )
    text = as_text(view)
    assert "smallest" in text and "largest" in text and "root mean square" in text
    assert max(map(len, text.splitlines())) <= 80
    page = render(view)
    assert ">smallest</th>" in page and "are of its elements of binary_crossentropy, without weights." in page
    assert as_dict(view)["runs"][0]["tables"][0]["rows"][1]["reach"]["maximum"] == reach.maximum
    plain = model()
    plain.fit(x, y, verbose=0)
    assert "smallest" not in as_text(build_view(plain.ledger)) + render(build_view(plain.ledger))
