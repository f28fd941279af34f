"""The sample ledger: every sample once an epoch, books that balance, damage that is named."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossledger as ll
from interrupted import Kill, Killed
from lossledger.errors import CheckpointError, InputError, InputTypeError, LedgerError, UnknownNameError
from lossledger.ledger import Ledger
from lossledger.training import waiting
from test_resume import Stateful
from test_store import damaged

pytestmark = pytest.mark.usefixtures("no_sync")

L, C = ll.losses, ll.callbacks


N = 23


def data(columns: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 4, generator=g, dtype=torch.float64)
    return x, (torch.rand(N, columns, generator=g, dtype=torch.float64) < 0.4).double()


def model(loss, columns: int = 3, rate: float = 0.05, **options) -> ll.Model:
    torch.manual_seed(0)
    made = ll.Model(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, columns)).double())
    made.compile(lambda p: torch.optim.SGD(p, lr=rate), loss, **options)
    return made


def bce() -> L.Loss:
    return L.BinaryCrossentropy(from_logits=True)


def dice(**options) -> L.Loss:
    return L.Dice(**({"axis": (0, 1), "from_logits": "sigmoid"} | options))


LOSSES = {
    "bce": bce,
    "mse": lambda: "mse",
    "sum": lambda: L.BinaryCrossentropy(from_logits=True, reduction="sum"),
    "per sample": lambda: L.MeanSquaredError(reduction="mean_per_sample"),
    "by weight": lambda: L.MeanSquaredError(reduction="mean_with_sample_weight"),
    "dice of the batch": dice,
    "dice by class": lambda: dice(axis=0),
    "dice of samples": lambda: dice(axis=1),
    "focal Tversky": lambda: L.FocalTversky(grouping="class", from_logits="sigmoid"),
    "generalized Dice": lambda: L.GeneralizedDice(from_logits="sigmoid"),
    "two terms": lambda: 0.3 * bce() + 2.0 * dice(),
}


def balanced(ledger: Ledger, split: str, epoch: int) -> int:
    """The contributions of the samples are the losses of the terms; how many terms there are."""
    rows = [r for r in ledger.rows if (r.split, r.epoch, r.kind, r.role) == (split, epoch, "term", "data")]
    for row in rows:
        part = ledger.samples.where(split=split, epoch=epoch, term=row.term)
        assert math.isclose(math.fsum(part["contribution"]), row.contribution, rel_tol=1e-12), row
        assert part["count"].sum() == row.count
    return len(rows)


def each_once(ledger: Ledger, split: str, epochs: range, ids: range = range(N)) -> None:
    for epoch in epochs:
        for term in ledger.samples.names("term"):
            found = ledger.samples.where(split=split, epoch=epoch, term=term)["sample"]
            assert found.tolist() == list(ids)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_books_balance_whatever_the_loss(name, accumulate):
    x, y = data()
    weight, mask = torch.rand(N, dtype=torch.float64) + 0.5, torch.rand(N, 3) < 0.8
    mask[4] = False
    made = model(LOSSES[name]())
    history = made.fit(
        x, y, batch_size=5, epochs=2, accumulate=accumulate, sample_weight=weight, mask=mask, samples=True, verbose=0,
        checks="off", seed=3,
    )  # fmt: skip
    for epoch in (1, 2):
        assert balanced(history.ledger, "training", epoch) == len(made.objective.terms)
    each_once(history.ledger, "training", range(1, 3))
    hidden = history.ledger.samples.where(sample=4)
    assert (hidden["count"] == 0).all() and np.isnan(hidden["mean"]).all() and (hidden["contribution"] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_is_the_tally_by_sample(name):
    x, y = data()
    made = model(LOSSES[name]())
    made.evaluate(x, y, batch_size=N, samples=True, verbose=0)
    outputs = made.net(x).detach()
    for plan in made.objective.terms:
        tally = plan.loss.tally(y, outputs, by="sample")
        part = made.ledger.samples.where(term=plan.name)
        rows = {name: getattr(tally.groups, name).reshape(N, -1).sum(1) for name in ("total", "count", "weight")}
        for column, expected in rows.items():
            assert np.allclose(part[column], expected.numpy(), rtol=1e-14, atol=0)
        contributions = plan.coefficient * tally.contributions().reshape(N, -1).sum(1)
        assert np.allclose(part["contribution"], contributions.numpy(), rtol=1e-12, atol=1e-18)
    assert balanced(made.ledger, "test", 0) == len(made.objective.terms)


def test_samples_are_those_of_the_data_in_any_order():
    """At a rate of zero every epoch, order and batch size give each sample the same loss: that of its own row."""
    x, y = data()
    made = model(bce(), rate=0.0)
    history = made.fit(x, y, batch_size=4, epochs=2, samples=True, verbose=0, seed=1, validation_split=0.3)
    own = nn.functional.binary_cross_entropy_with_logits(made.net(x), y, reduction="none").mean(1).detach().numpy()
    kept = int(N * 0.7)
    each_once(history.ledger, "training", range(1, 3), range(kept))
    each_once(history.ledger, "validation", range(1, 3), range(kept, N))
    for split in ("training", "validation"):
        part = history.ledger.samples.where(split=split)
        assert np.allclose(part["mean"], own[part["sample"]], rtol=1e-12)


def test_several_outputs_weights_of_classes_and_auxiliary_losses():
    x, y = data()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3).double()

        def forward(self, x):
            found = self.body(x)
            return ll.Outputs({"mask": found, "size": found[:, :1]}, {"small": found.square().mean()})

    made = ll.Model(Two())
    made.compile("sgd", {"mask": bce(), "size": "mse"}, {"size": 0.25}, regularizers={"*": "l2"})
    targets = {"mask": y, "size": x[:, :1]}
    weights = {"mask": {0: 2.0, 2: 0.5}}
    ledger = made.fit(x, targets, batch_size=7, class_weight=weights, samples=True, verbose=0, checks="off").ledger
    assert balanced(ledger, "training", 1) == 2
    assert ledger.samples.names("term") == ["mask/binary_crossentropy", "size/mean_squared_error"]
    worst = ledger.top_losses(N)
    terms = {t: ledger.samples.where(term=t)["mean"] for t in ledger.samples.names("term")}
    own = terms["mask/binary_crossentropy"] + 0.25 * terms["size/mean_squared_error"]
    assert [row["sample"] for row in worst] == np.argsort(-own, kind="stable").tolist()
    assert np.allclose([row["loss"] for row in worst], np.sort(own)[::-1], rtol=1e-14)


@pytest.mark.parametrize("name", ["bce", "dice of the batch", "focal Tversky"])
def test_the_books_balance_of_reproducible_sums(name):
    x, y = data()
    made = model(LOSSES[name](), reproducible=True)
    history = made.fit(x, y, batch_size=5, accumulate=2, samples=True, validation_split=0.3, verbose=0, checks="off")
    for split in ("training", "validation"):
        assert balanced(history.ledger, split, 1) == 1


# --- what training dynamics need -----------------------------------------------------------------------------------


def softmax_numbers(z: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and margin, written in plain NumPy."""
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    rows = np.arange(len(z))
    others = z.copy()
    others[rows, label] = -np.inf
    return p[rows, label], z[rows, label] - others.max(-1)


@pytest.mark.parametrize("given", ["logits", "probabilities", "one-hot"])
def test_confidence_and_margin_of_exclusive_classes(given):
    x, _ = data()
    label = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1))
    logits = given != "probabilities"
    loss = L.SparseCategoricalCrossentropy(from_logits=logits)
    y = label
    if given == "one-hot":
        loss, y = L.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), nn.functional.one_hot(label, 3)
    made = model(loss)
    if not logits:
        made = ll.Model(nn.Sequential(made.net, nn.Softmax(-1)))
        made.compile("sgd", loss)
    made.evaluate(x, y, samples=True, verbose=0, batch_size=6)
    z = (made.net if logits else made.net[0])(x).detach().numpy()
    confidence, margin = softmax_numbers(z, label.numpy())
    found = made.ledger.samples
    assert np.allclose(found["confidence"], confidence, rtol=1e-12)
    assert np.allclose(found["margin"], margin, rtol=1e-9)
    assert (found["correct"] == (z.argmax(-1) == label.numpy())).all()
    assert (found["label"] == label.numpy()).all() and (found["predicted"] == z.argmax(-1)).all()


def test_confidence_of_dense_outputs_is_the_mean_of_unmasked_entries():
    z = torch.randn(2, 4, 3, dtype=torch.float64)
    label, keep = torch.randint(3, (2, 4)), torch.tensor([[True, True, False, True], [False] * 4])
    layer = nn.Linear(3, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
        layer.bias.zero_()
    made = ll.Model(layer)
    made.compile("sgd", L.SparseCategoricalCrossentropy(from_logits=True))
    made.evaluate(z, label, mask=keep, samples=True, verbose=0)
    confidence, margin = softmax_numbers(z[0][keep[0]].numpy(), label[0][keep[0]].numpy())
    found = made.ledger.samples
    assert math.isclose(found["confidence"][0], confidence.mean(), rel_tol=1e-12)
    assert math.isclose(found["margin"][0], margin.mean(), rel_tol=1e-12)
    assert math.isclose(found["correct"][0], (margin > 0).mean())
    assert np.isnan([found[name][1] for name in ("mean", "confidence", "correct", "margin")]).all()
    assert np.isnan(found["label"]).all()


def test_confidence_of_columns_and_of_losses_without_probabilities():
    x, y = data(1)
    made = model(bce(), 1)
    made.evaluate(x, y, samples=True, verbose=0)
    z, present = made.net(x).detach().numpy()[:, 0], y.numpy()[:, 0] > 0.5
    found = made.ledger.samples
    assert np.allclose(found["margin"], np.where(present, z, -z), rtol=1e-12)
    assert np.allclose(found["confidence"], 1 / (1 + np.exp(-found["margin"])), rtol=1e-12)
    assert (found["label"] == present).all() and (found["predicted"] == (z > 0)).all()
    for loss, margins in ((L.Hinge(), True), (dice(), False), ("mse", False)):
        other = model(loss, 1)
        other.evaluate(x, y, samples=True, verbose=0)
        found = other.ledger.samples
        assert np.isnan(found["confidence"]).all() and np.isnan(found["margin"]).all() != margins


# --- ids -----------------------------------------------------------------------------------------------------------


def test_ids_that_batches_carry_and_positions_where_they_say_which():
    x, y = data()
    names = torch.arange(N) * 10 + 7
    parts = list(zip(x.split(5), y.split(5), names.split(5), strict=True))
    made = model(bce(), rate=0.0)
    made.fit([ll.Batch(a, b, ids=i.numpy()) for a, b, i in parts], epochs=2, samples=True, verbose=0)
    each_once(made.ledger, "training", range(1, 3), names.tolist())
    for source in ([(a, b) for a, b, _ in parts], DataLoader(TensorDataset(x, y), 5)):
        made.fit(source, epochs=2, samples=True, verbose=0)
        each_once(made.ledger, "training", range(1, 3))
    made.evaluate(iter([(a, b) for a, b, _ in parts]), samples=True, verbose=0)
    each_once(made.ledger, "test", range(1))


@pytest.mark.parametrize(
    "source",
    [
        lambda x, y: DataLoader(TensorDataset(x, y), 5, shuffle=True),
        lambda x, y: DataLoader(TensorDataset(x, y), batch_sampler=[[0, 1], [2, 3]]),
        lambda x, y: iter([(x, y)]),
        Stateful,
    ],
)
def test_samples_that_nobody_can_tell_apart_are_refused(source):
    with pytest.raises(InputError, match=r"expected batches with ids.*Batch\(x, y, ids="):
        model(bce()).fit(source(*data()), samples=True, verbose=0)


def test_wrong_ids_and_arguments_are_refused():
    x, y = data()
    made = model(bce())
    for ids, error in ((torch.arange(3), InputError), (torch.rand(N), InputTypeError)):
        with pytest.raises(error, match="ids: expected"):
            made.fit([ll.Batch(x, y, ids=ids)], samples=True, verbose=0)
    with pytest.raises(InputTypeError, match="samples: expected True or False"):
        made.fit(x, y, samples="yes", verbose=0)
    with pytest.raises(InputError, match="cannot be divided by 'sample'"):
        model(lambda a, b: (a - b).square().mean()).evaluate(x, y, samples=True, verbose=0)


def test_a_sample_that_comes_twice_counts_once_in_the_worst():
    x, y = data()
    made = model(bce())
    made.evaluate([ll.Batch(x[:2], y[:2], ids=[4, 4]), ll.Batch(x[2:3], y[2:3], ids=[5])], samples=True, verbose=0)
    means = made.ledger.samples["mean"]
    found = {row["sample"]: row["loss"] for row in made.ledger.top_losses()}
    assert math.isclose(found[4], means[:2].mean()) and math.isclose(found[5], means[2])


# --- the worst -----------------------------------------------------------------------------------------------------


def test_the_worst_samples():
    x, y = data()
    x[6] = float("inf")
    made = model(bce())
    made.evaluate(x, y, mask=torch.arange(N) != 2, samples=True, verbose=0)
    table = made.ledger.top_losses(5)
    means = np.where(np.isnan(made.ledger.samples["mean"]), -np.inf, made.ledger.samples["mean"])
    assert table.rows[0]["sample"] == 6 and math.isnan(table.rows[0]["loss"])
    assert [row["sample"] for row in table.rows[1:]] == np.argsort(-means, kind="stable")[:4].tolist()
    assert len(made.ledger.top_losses(100)) == N - 1
    for arguments, error in (
        ({"k": 0}, InputError),
        ({"split": "training"}, InputError),
        ({"epoch": 3}, InputError),
        ({"term": "mse"}, UnknownNameError),
    ):
        with pytest.raises(error):
            made.ledger.top_losses(**arguments)
    with pytest.raises(InputError, match="samples=True"):
        Ledger().top_losses()


# --- on disk -------------------------------------------------------------------------------------------------------


def same(one: Ledger, other: Ledger) -> bool:
    a, b = one.samples, other.samples
    names = [name for name in a.columns if name != "run"]
    return len(a) == len(b) and all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") for n in names)


def test_one_segment_an_epoch_that_reads_back(tmp_path):
    x, y = data()
    options = dict(epochs=3, batch_size=5, validation_split=0.2, samples=True, verbose=0, seed=0)
    kept = model(bce()).fit(x, y, **options).ledger
    ledger = model(bce()).fit(x, y, **options, run_dir=tmp_path / "run").ledger
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 3
    opened = Ledger.open(tmp_path / "run")
    assert len(kept.samples) == 3 * N and same(kept, ledger) and same(ledger, opened)
    opened.save(tmp_path / "copy")
    opened.save(tmp_path / "copy")
    assert same(Ledger.open(tmp_path / "copy"), kept)
    both = Ledger.open(tmp_path)
    assert len(both.samples) == 2 * len(kept.samples) and both.samples.names("run") == ["copy", "run"]
    with pytest.raises(InputError, match="one run"):
        both.top_losses()
    assert both.select("run").top_losses().rows == kept.top_losses().rows


def test_damaged_segments_of_samples_are_named(tmp_path: Path):
    x, y = data()
    model(bce()).fit(x, y, epochs=1, samples=True, verbose=0, run_dir=tmp_path, seed=0)
    (path,) = (tmp_path / "samples").iterdir()
    content = path.read_bytes()
    for seed in range(30):
        wrong = damaged(content, random.Random(seed))
        if wrong != content:
            path.write_bytes(wrong)
            # The rest of the run still opens.
            ledger = Ledger.open(tmp_path)
            assert ledger.loss() > 0
            with pytest.raises(LedgerError, match=path.name):
                _ = ledger.samples
    path.write_bytes(content)
    assert len(Ledger.open(tmp_path).samples) == N
    ledger = Ledger.open(tmp_path)
    ledger.append_samples(ledger.samples.where(sample=3)._columns)
    ledger.flush()
    next(p for p in (tmp_path / "samples").iterdir() if p != path).unlink()
    with pytest.raises(LedgerError, match="is gone"):
        _ = ledger.samples


def test_an_interrupted_run_has_every_sample_once(tmp_path):
    x, y = data()
    options = dict(epochs=3, batch_size=4, accumulate=2, validation_split=0.2, samples=True, verbose=0, seed=0)
    whole = model(bce()).fit(x, y, **options).ledger
    moments = 3 * (2 * 3 + 2)
    for moment in range(1, moments + 1, 4):
        run = tmp_path / str(moment)
        calls = lambda: [C.BackupAndRestore(save_freq=1)]  # noqa: E731
        with pytest.raises(Killed):
            model(bce()).fit(x, y, **options, run_dir=run, callbacks=[Kill(moment), *calls()])
        resumed = model(bce()).fit(x, y, **options, run_dir=run, resume=True, callbacks=calls()).ledger
        assert same(resumed, whole) and same(Ledger.open(run), whole)
    with pytest.raises(CheckpointError, match="samples"):
        model(bce()).fit(x, y, **{**options, "samples": False}, run_dir=run, resume=True, callbacks=calls())


def test_a_list_goes_on_counting_after_an_interruption(tmp_path):
    x, y = data()
    batches = list(zip(x.split(4), y.split(4), strict=True))
    options = dict(epochs=2, samples=True, verbose=0, seed=0, run_dir=tmp_path)
    with pytest.raises(Killed):
        model(bce()).fit(batches, **options, callbacks=[Kill(6), C.BackupAndRestore(save_freq=1)])
    ledger = model(bce()).fit(batches, **options, resume=True, callbacks=[C.BackupAndRestore(save_freq=1)]).ledger
    each_once(ledger, "training", range(1, 3))


def test_steps_that_are_left_out_count_nothing():
    x, y = data()
    x[3] = float("nan")
    made = model(bce(), on_nonfinite="skip")
    ledger = made.fit(x, y, batch_size=5, shuffle=False, samples=True, verbose=0, checks="off").ledger
    assert balanced(ledger, "training", 1) == 1
    each_once(ledger, "training", range(1, 2))
    assert (ledger.samples["count"] == 0).tolist() == [True] * 5 + [False] * (N - 5)


def test_nothing_is_kept_unless_asked_for(tmp_path):
    x, y = data()
    ledger = model(bce()).fit(x, y, verbose=0, run_dir=tmp_path).ledger
    assert len(ledger.samples) == 0 and not (tmp_path / "samples").exists()
    with pytest.raises(UnknownNameError):
        _ = ledger.samples["los"]
    with pytest.raises(UnknownNameError):
        ledger.samples.where(epochs=1)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", ["two terms", "mse", "focal Tversky"])
def test_keeping_samples_changes_no_number_of_the_training(name, accumulate, monkeypatch):
    # Tallies that wait are the same but for rounding, and those of samples do not wait.
    monkeypatch.setattr(waiting, "SMALL", -1)
    x, y = data()
    runs = []
    for samples in (False, True):
        made = model(LOSSES[name]())
        options = dict(batch_size=4, epochs=2, accumulate=accumulate, validation_split=0.2, verbose=0, seed=0)
        history = made.fit(x, y, **options, samples=samples, checks="off")
        runs.append((history.history, history.ledger.rows, [p.tolist() for p in made.net.parameters()]))
    assert runs[0] == runs[1]


def test_a_step_sums_its_elements_once(monkeypatch):
    monkeypatch.setattr(waiting, "SMALL", -1)
    x, y = data()
    calls = []
    plain = L.BinaryCrossentropy._elements
    monkeypatch.setattr(L.BinaryCrossentropy, "_elements", lambda self, batch: calls.append(1) or plain(self, batch))
    counts = []
    for samples in (False, True):
        calls.clear()
        model(bce()).fit(x, y, batch_size=4, samples=samples, verbose=0, checks="off")
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
