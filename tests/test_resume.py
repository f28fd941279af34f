"""A run that was interrupted and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossledger as ll
from interrupted import Kill, Killed
from killing import Noisy
from lossledger.errors import CheckpointError, InputError, InputTypeError
from lossledger.training import backup, checkpoint, opening

# These processes live on; what reaches the disk is tested by those that are killed.
pytestmark = pytest.mark.usefixtures("no_sync")

C, S = ll.callbacks, torch.optim.lr_scheduler
N, SIZE, EPOCHS = 22, 5, 3
STEPS = 5


# A callback that counts comes first: one moment is then before the others at that place, and the next after them.
MOMENTS = EPOCHS * (2 * STEPS + 2)


class Stateful:
    """A loader in the manner of torchdata's: it tells what it has given, and shuffles by itself."""

    def __init__(self, x, y):
        self.x, self.y, self.epoch, self.given, self.start = x, y, -1, 0, None

    def __len__(self):
        return STEPS

    def __iter__(self):
        if self.start is None:
            self.epoch, self.given = self.epoch + 1, 0
        self.start = None
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
        for ids in order.split(SIZE)[self.given :]:
            self.given += 1
            yield self.x[ids], self.y[ids]

    def state_dict(self):
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state):
        self.epoch, self.given = state["epoch"], state["given"]
        self.start = True if self.given < STEPS else None


def data(kind="arrays"):
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(N, 3, generator=g), (torch.randn(N, 2, generator=g) > 0).float()
    batches = [(a, b) for a, b in zip(x.split(SIZE), y.split(SIZE), strict=True)]
    return {
        "arrays": lambda: (x, y),
        "list": lambda: (batches,),
        "loader": lambda: (DataLoader(TensorDataset(x, y), SIZE, shuffle=True),),
        "own generator": lambda: (
            DataLoader(TensorDataset(x, y), SIZE, shuffle=True, generator=torch.Generator().manual_seed(4)),
        ),
        "augmenting": lambda: (DataLoader(Noisy(x, y), SIZE, shuffle=True),),
        "stateful": lambda: (Stateful(x, y),),
    }[kind]()


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))


class Counting(C.Callback):
    """A callback of the user's, with a state."""

    def on_train_begin(self, logs):
        self.seen = []

    def on_train_batch_end(self, batch, logs):
        self.seen.append((batch, logs["loss"]))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class StopMidway(C.Callback):
    def on_train_batch_end(self, batch, logs):
        if len(self.model.ledger.rows) > 0 and batch == 2:
            self.model.stop_training = True


def mixed():
    bce = ll.losses.BinaryCrossentropy(from_logits=True)
    return 0.5 * bce + ll.losses.Dice(axis=(0, 1), from_logits="sigmoid")


def curves():
    absent = ll.losses.Dice(grouping="class", absent="skip", from_logits="sigmoid")
    return absent + ll.losses.FocalTversky(grouping="class", from_logits="sigmoid")


# By name: options of compile, of fit, and the callbacks, made anew for each process.
CASES = {
    "plain": ({}, {}, lambda d: []),
    "validation": ({"metrics": ["mae", "iou"]}, {"validation_split": 0.3, "validation_freq": 2}, lambda d: []),
    "average, clipping, penalties": ({"ema": 0.8, "clip_norm": 1.0, "regularizers": {"*": "l2"}}, {}, lambda d: []),
    "curves of ratios": ({"loss": curves()}, {}, lambda d: []),
    "momentum": ({"optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True)}, {}, lambda d: []),
    "rmsprop": ({"optimizer": "rmsprop"}, {}, lambda d: []),
    "early stopping": (
        {},
        {"validation_split": 0.3},
        lambda d: [C.EarlyStopping(patience=1, min_delta=0.05, restore_best_weights=True)],
    ),
    "best weights and numbers": (
        {},
        {"class_weight": {0: 2.0}},
        lambda d: [C.ModelCheckpoint(d / "best", "loss", True), C.CSVLogger(d / "log.csv")],
    ),
    "rate by epoch": ({}, {}, lambda d: [C.LearningRateScheduler(lambda epoch, rate: rate / 2)]),
    "rate by class": ({}, {}, lambda d: [C.LearningRateScheduler(S.ExponentialLR(optimizer_of(d), 0.5))]),
    "milestones": ({}, {}, lambda d: [S.MultiStepLR(optimizer_of(d), [1, 2], 0.1)]),
    "made later": ({}, {}, lambda d: [C.LearningRateScheduler(lambda o: S.CosineAnnealingLR(o, 3))]),
    "plateau": ({}, {}, lambda d: [C.LearningRateScheduler(S.ReduceLROnPlateau(optimizer_of(d), patience=0), "loss")]),
    "callback of the user's": ({}, {}, lambda d: [Counting()]),
    "stopped midway": ({}, {}, lambda d: [StopMidway()]),
    "bad steps left out": ({"on_nonfinite": "skip", "metrics": ["mae"]}, {"bad": True}, lambda d: []),
    "fewer steps": ({}, {"steps_per_epoch": 3, "shuffle": False}, lambda d: []),
    "windows": ({"ema": 0.9}, {"accumulate": 2}, lambda d: []),
    "windows of a ratio": (
        {"loss": ll.losses.Dice(axis=(0, 1), from_logits="sigmoid")},
        {"accumulate": 3},
        lambda d: [],
    ),
    "later epochs": ({}, {"initial_epoch": 1, "epochs": 4}, lambda d: []),
}
_models: dict[Path, ll.Model] = {}


def optimizer_of(folder):
    return _models[folder].optimizer


def started(folder, case="plain", kind="arrays", moment=None, save_freq=1, model=None, **options):
    """A process: model, data and callbacks made anew, then `fit`; what it came to."""
    compiling, fitting, callbacks = CASES[case]
    if model is None:
        model = ll.Model(net())
        compiling = {"optimizer": "adam", "loss": mixed(), **compiling}
        model.compile(**compiling)
    _models[folder] = model
    arguments = data(kind)
    fitting = dict(fitting)
    if fitting.pop("bad", False):
        arguments[0][7] = math.nan
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    used = callbacks(folder)
    every = [] if save_freq is None else [C.BackupAndRestore(save_freq)]
    kill = [] if moment is None else [Kill(moment)]
    folder.mkdir(exist_ok=True)
    size = SIZE if kind == "arrays" else None
    settings = {"epochs": EPOCHS, "batch_size": size, "verbose": 0, "seed": 0, **fitting, **options}
    history = model.fit(*arguments, callbacks=[*kill, *used, *every], run_dir=folder / "run", **settings)
    return result(folder, model, history, used)


def result(folder, model, history, used):
    book = ll.Ledger.open(folder / "run")
    assert book.rows == history.ledger.rows
    assert book.metrics == history.ledger.metrics or any(math.isnan(m.value) for m in book.metrics)
    stop = [c for c in used if isinstance(c, C.EarlyStopping)]
    return {
        "weights": {name: value.clone() for name, value in model.net.state_dict().items()},
        "optimizer": model.optimizer.state_dict(),
        "history": history.history,
        "epochs": history.epoch,
        "params": history.params,
        "rows": book.rows,
        "metrics": [repr(row) for row in book.metrics],
        "stopped": [(c.best_epoch, c.stopped_epoch) for c in stop],
        "csv": (folder / "log.csv").read_text() if (folder / "log.csv").exists() else None,
        "best": (folder / "best").read_bytes() if (folder / "best").exists() else None,
        "seen": [c.seen for c in used if isinstance(c, Counting)],
        "next": (torch.rand(3), np.random.rand(), random.random()),
    }


def equal(a, b):
    """Equal bit for bit, NaN being equal to itself."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def differing(whole, resumed):
    return [name for name in whole if not equal(whole[name], resumed[name])]


def interrupted(folder, moment, **options):
    """A run that is killed and resumed; `None` when it ended before that moment."""
    try:
        started(folder, moment=moment, **options)
    except Killed:
        return started(folder, resume=True, **options)
    return None


# --- every moment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_at_any_moment_is_the_run_that_was_not_interrupted(tmp_path, case):
    whole = started(tmp_path / "whole", case)
    # Before and after a step, the end of an epoch before and after the other callbacks, the beginning of one.
    moments = range(1, MOMENTS + 1) if case == "validation" else (8, 13, 31)
    resumed = {moment: interrupted(tmp_path / f"{moment}", moment, case=case) for moment in moments}
    found = {moment: differing(whole, other) for moment, other in resumed.items() if other is not None}
    assert len(found) >= 2 and not any(found.values())


@pytest.mark.parametrize("kind", ["arrays", "augmenting", "stateful"])
def test_a_run_may_be_cut_off_inside_a_window(tmp_path, kind):
    """Five batches make windows of 2, 2 and 1; the batch that is cut off may be any of them."""
    whole = started(tmp_path / "whole", kind=kind, accumulate=2)

    class Cut(nn.Module):
        """The model of a process that ends in its n-th forward pass."""

        def __init__(self, left):
            super().__init__()
            self.net, self.left = net(), left

        def forward(self, x):
            self.left -= self.training
            if self.left == 0:
                raise Killed
            return self.net(x)

    for passes in range(1, 2 * STEPS, 2):
        model = ll.Model(Cut(passes))
        model.compile("adam", mixed())
        with pytest.raises(Killed):
            started(tmp_path / f"{passes}", kind=kind, accumulate=2, model=model)
        model.net.left = 10**9
        resumed = started(tmp_path / f"{passes}", kind=kind, accumulate=2, model=model, resume=True)
        resumed["weights"] = {name.removeprefix("net."): value for name, value in resumed["weights"].items()}
        assert differing(whole, resumed) == []


@pytest.mark.parametrize("save_freq", [3, "epoch", None])
@pytest.mark.parametrize("kind", ["arrays", "list", "loader", "own generator", "augmenting", "stateful"])
def test_the_rest_of_an_epoch_is_the_same_for_every_form_of_data(tmp_path, kind, save_freq):
    whole = started(tmp_path / "whole", kind=kind, save_freq=save_freq)
    for moment in (9, 13):
        resumed = interrupted(tmp_path / f"{moment}", moment, kind=kind, save_freq=save_freq)
        assert differing(whole, resumed) == []


def test_a_run_may_be_interrupted_again_and_again(tmp_path):
    whole = started(tmp_path / "whole")
    for _ in range(MOMENTS):
        try:
            resumed = started(tmp_path / "run", moment=5, resume=True)
            break
        except Killed:
            continue
    assert differing(whole, resumed) == []


def test_when_checkpoints_are_written_does_not_change_the_run(tmp_path):
    runs = [started(tmp_path / f"{freq}", kind="augmenting", save_freq=freq) for freq in (1, 2, "epoch", None)]
    assert [differing(runs[0], other) for other in runs[1:]] == [[], [], []]


def test_the_same_model_goes_on_after_an_exception(tmp_path):
    whole = started(tmp_path / "whole", "average, clipping, penalties")
    model = ll.Model(net())
    model.compile("adam", mixed(), ema=0.8, clip_norm=1.0, regularizers={"*": "l2"})
    with pytest.raises(Killed):
        started(tmp_path / "a", "average, clipping, penalties", moment=20, model=model)
    assert differing(whole, started(tmp_path / "a", "average, clipping, penalties", model=model, resume=True)) == []


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef`")
def test_state_of_torchmetrics_goes_on(tmp_path):
    torchmetrics = pytest.importorskip("torchmetrics")

    def fitted(folder, moment=None, **options):
        model = ll.Model(net())
        metrics = [torchmetrics.MeanAbsoluteError(), torchmetrics.SpearmanCorrCoef(2)]
        model.compile("adam", mixed(), metrics=metrics)
        return started(folder, model=model, moment=moment, **options)

    whole = fitted(tmp_path / "whole")
    for moment in (4, 9, 17):
        with pytest.raises(Killed):
            fitted(tmp_path / f"{moment}", moment)
        assert differing(whole, fitted(tmp_path / f"{moment}", resume=True)) == []


@pytest.mark.parametrize("name", ["BinaryAccuracy", "F1Score"])
def test_state_of_metrics_of_keras_goes_on(tmp_path, name):
    """Of one with variables from the start, and of one that its first batch builds."""
    keras = pytest.importorskip("keras")

    def fitted(folder, moment=None, **options):
        model = ll.Model(net())
        model.compile("adam", mixed(), metrics=[getattr(keras.metrics, name)(threshold=0.2)])
        return started(folder, model=model, moment=moment, **options)

    whole = fitted(tmp_path / "whole")
    for moment in (4, 9, 17):
        with pytest.raises(Killed):
            fitted(tmp_path / f"{moment}", moment)
        assert differing(whole, fitted(tmp_path / f"{moment}", resume=True)) == []


def test_sums_that_wait_for_a_batch_are_never_left_out():
    keras = pytest.importorskip("keras")
    from lossledger.metrics import KerasMetric

    y, p = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.9, 0.8], [0.1, 0.7]])
    first, second = KerasMetric(keras.metrics.F1Score(threshold=0.5)), KerasMetric(keras.metrics.F1Score(threshold=0.5))
    first.update(y, p)
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    assert equal(second.state_dict(), first.state_dict())
    with pytest.raises(InputError, match="built by a batch"):
        second.compute()
    first.update(1 - y, p)
    second.update(1 - y, p)
    assert second.compute() == first.compute()
    second.reset()
    second.update(y, p)
    assert second.compute().value == pytest.approx((1 + 2 / 3) / 2)


def test_buffers_outside_the_state_dict_and_tied_weights_are_kept(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.out = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x):
            if self.training:
                self.seen += 1
            return self.out(self.b(self.a(x))) * (1 + self.seen)

    def fitted(folder, moment=None, **options):
        model = ll.Model(Odd())
        model.compile("adam", mixed())
        return started(folder, model=model, moment=moment, **options) | {"seen": model.net.seen}

    whole = fitted(tmp_path / "whole")
    with pytest.raises(Killed):
        fitted(tmp_path / "a", 17)
    assert differing(whole, fitted(tmp_path / "a", resume=True)) == []


# --- beginning and end ---------------------------------------------------------------------------------------------


def test_an_empty_folder_starts_a_run_and_a_finished_run_is_given_back(tmp_path):
    whole = started(tmp_path / "whole")
    first = started(tmp_path / "run", resume=True)
    assert differing(whole, first) == []
    again = started(tmp_path / "run", resume=True)
    assert [name for name in differing(whole, again) if name != "next"] == []


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    whole = started(tmp_path / "whole", "average, clipping, penalties", epochs=5)
    started(tmp_path / "run", "average, clipping, penalties", epochs=2)
    longer = started(tmp_path / "run", "average, clipping, penalties", epochs=5, resume=True)
    assert differing(whole, longer) == []


def test_a_run_that_a_callback_stopped_stays_stopped(tmp_path):
    whole = started(tmp_path / "run", "early stopping", epochs=20)
    again = started(tmp_path / "run", "early stopping", epochs=20, resume=True)
    assert len(whole["epochs"]) < 20 and [n for n in differing(whole, again) if n not in ("next", "seen")] == []


def test_the_seed_that_was_drawn_is_kept(tmp_path):
    with pytest.raises(Killed):
        started(tmp_path / "run", moment=9, seed=None)
    drawn = checkpoint.newest(tmp_path / "run" / "run" / "checkpoints").state["recipe"]["seed"]
    torch.manual_seed(77)
    assert started(tmp_path / "run", seed=None, resume=True)["params"]["seed"] == drawn


def test_a_new_run_does_not_start_in_the_folder_of_another(tmp_path):
    with pytest.raises(Killed):
        started(tmp_path / "run", moment=3)
    assert not (tmp_path / "run" / "run" / "run.json").exists()
    with pytest.raises(InputError, match=r"already holds a run.*resume=True"):
        started(tmp_path / "run")


# --- the ledger ----------------------------------------------------------------------------------------------------


def test_rows_written_after_the_checkpoint_are_moved_aside_not_counted_and_not_deleted(tmp_path):
    whole = started(tmp_path / "whole")
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=2 * (2 * STEPS + 2), save_freq=7)
    run = tmp_path / "a" / "run"
    written = {path.name: path.read_bytes() for path in (run / "ledger").iterdir()}
    assert len(written) == 2
    assert differing(whole, started(tmp_path / "a", save_freq=7, resume=True)) == []
    aside = {path.name: path.read_bytes() for path in (run / "superseded").glob("*/ledger/*")}
    kept = {path.name: path.read_bytes() for path in (run / "ledger").iterdir()}
    assert len(aside) == 1 and {**kept, **aside}.items() >= written.items()


def test_segments_are_read_in_the_order_of_writing(tmp_path, monkeypatch):
    """Process numbers of resumed runs come in any order."""
    book, pids = ll.Ledger("run"), iter([900, 12, 1000, 7])
    started(tmp_path / "a", epochs=1)
    row = ll.Ledger.open(tmp_path / "a" / "run").rows[0]
    for epoch, pid in enumerate(pids, 1):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        book.append([replace(row, epoch=epoch)])
        book.save(tmp_path / "b")
    assert [row.epoch for row in ll.Ledger.open(tmp_path / "b").rows] == [1, 2, 3, 4]


def test_a_missing_segment_is_named(tmp_path):
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=20)
    (segment,) = (tmp_path / "a" / "run" / "ledger").iterdir()
    segment.unlink()
    with pytest.raises(CheckpointError, match=segment.name):
        started(tmp_path / "a", resume=True)


# --- refusals ------------------------------------------------------------------------------------------------------


def another(**compiling):
    model = ll.Model(net())
    model.compile(**{"optimizer": "adam", "loss": mixed(), **compiling})
    return model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate": 2}, "accumulate: expected 1 as in the run, received 2"),
        ({"batch_size": 4}, "batch_size: expected 5 as in the run, received 4"),
        ({"seed": 1}, "seed: expected 0 as in the run, received 1"),
        ({"shuffle": False}, "shuffle: expected True"),
        ({"steps_per_epoch": 2}, "steps_per_epoch: expected None"),
        ({"validation_split": 0.2}, "data samples: expected 22 as in the run, received 17"),
        ({"class_weight": {0: 3.0}}, "class_weight"),
        ({"kind": "list"}, "data"),
        ({"case": "early stopping"}, "callbacks: expected .* received .*EarlyStopping"),
        ({"compiling": {"optimizer": "sgd"}}, "optimizer: expected 'Adam' as in the run, received 'SGD'"),
        ({"compiling": {"loss": "mse"}}, "recipe binary_crossentropy: expected"),
        ({"compiling": {"ema": 0.5}}, "ema: expected None"),
        ({"compiling": {"metrics": ["mae"]}}, "metrics"),
        ({"compiling": {"clip_norm": 1.0}}, "clip_norm"),
    ],
)
def test_another_recipe_is_refused_by_name_and_nothing_is_touched(tmp_path, options, said):
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=20)
    files = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    model = another(**options.pop("compiling", {}))
    before = [p.detach().clone() for p in model.net.parameters()]
    with pytest.raises(CheckpointError, match=said):
        started(tmp_path / "a", model=model, resume=True, **options)
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == files
    assert equal([p.detach() for p in model.net.parameters()], before)


NUMBERS = {"batch_size": SIZE, "accumulate": 2, "steps_per_epoch": 4, "validation_freq": 1, "ledger_steps": 2}
CLIP, EMA = np.float32(0.1), np.float32(0.9)


def clipped(plain):
    """A model whose recipe has numbers of NumPy, or the plain numbers of the same value."""
    clip, ema = (number.item() for number in (CLIP, EMA)) if plain else (CLIP, EMA)
    return another(clip_norm=clip, ema=ema)


def stored(folder):
    return checkpoint.newest(folder / "run" / "checkpoints").state["recipe"]


@pytest.mark.parametrize("plain", [True, False])
def test_numbers_of_numpy_are_plain_numbers_in_the_recipe(tmp_path, plain):
    given = [dict(NUMBERS), {name: np.int64(value) for name, value in NUMBERS.items()}]
    whole = started(tmp_path / "whole", model=clipped(True), **NUMBERS)
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=15, model=clipped(not plain), **given[plain])
    assert stored(tmp_path / "a") == stored(tmp_path / "whole")
    numbers = {name: stored(tmp_path / "a")[name] for name in (*NUMBERS, "clip_norm", "ema")}
    assert numbers == {**NUMBERS, "clip_norm": CLIP.item(), "ema": EMA.item()}
    resumed = started(tmp_path / "a", model=clipped(plain), resume=True, **given[not plain])
    assert differing(whole, resumed) == []


def test_a_run_of_an_earlier_version_may_hold_the_text_of_a_number(tmp_path, monkeypatch):
    recipe, names = opening.recipe, {"validation_freq", "ledger_steps", "clip_norm", "ema"}

    def earlier(*parts, **settings):
        made = recipe(*parts, **settings)
        texts = {"clip_norm": str(CLIP), "ema": str(EMA)}
        return {name: texts.get(name, str(made[name])) if name in names else made[name] for name in made}

    monkeypatch.setattr(opening, "recipe", earlier)
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=15, model=clipped(False), **NUMBERS)
    monkeypatch.undo()
    held = {name: stored(tmp_path / "a")[name] for name in names}
    assert held == {"validation_freq": "1", "ledger_steps": "2", "clip_norm": "0.1", "ema": "0.9"}
    with pytest.raises(CheckpointError, match=r"recipe\. ledger_steps: expected '2' as in the run, received 3\. Pass"):
        started(tmp_path / "a", model=clipped(True), resume=True, **{**NUMBERS, "ledger_steps": 3})
    with pytest.raises(
        CheckpointError, match=r"recipe\. clip_norm: expected '0\.1' as in the run, received 1e[+]300\. Pass"
    ):
        started(tmp_path / "a", model=another(clip_norm=1e300, ema=EMA), resume=True, **NUMBERS)
    resumed = started(tmp_path / "a", model=clipped(True), resume=True, **NUMBERS)
    assert differing(started(tmp_path / "whole", model=clipped(True), **NUMBERS), resumed) == []


def test_a_model_of_another_shape_is_refused(tmp_path):
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=20)
    model = ll.Model(nn.Linear(3, 2))
    model.compile("adam", mixed())
    with pytest.raises(CheckpointError, match=r"weights 0.weight: expected 'torch.float32 \(6, 3\)' as in the run"):
        started(tmp_path / "a", model=model, resume=True)


def test_the_learning_rate_and_the_number_of_epochs_are_no_part_of_the_recipe(tmp_path):
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=20)
    model = another(optimizer=lambda p: torch.optim.Adam(p, lr=0.5, eps=1e-7))
    resumed = started(tmp_path / "a", model=model, epochs=4, resume=True)
    # The rate of the run goes on.
    assert differing(started(tmp_path / "whole", epochs=4), resumed) == []


def test_data_that_can_be_passed_over_once_only_are_refused(tmp_path):
    x, y = data()
    model = another()

    def fit(**options):
        batches = ((a, b) for a, b in zip(x.split(5), y.split(5), strict=True))
        return model.fit(batches, run_dir=tmp_path / "run", steps_per_epoch=2, epochs=2, verbose=0, **options)

    fit()
    with pytest.raises(CheckpointError, match="generator, which gives its batches once"):
        fit(resume=True)


def test_other_data_in_an_iterable_are_refused(tmp_path):
    with pytest.raises(Killed):
        started(tmp_path / "a", kind="list", moment=9)
    x, y = data()
    batches = list(zip((x + 1).split(5), y.split(5), strict=True))
    model = another()
    with pytest.raises(CheckpointError, match="first batch of the interrupted epoch is not the one"):
        model.fit(batches, epochs=3, seed=0, run_dir=tmp_path / "a" / "run", resume=True, verbose=0)


def test_a_stateful_loader_whose_epochs_are_cut_is_refused(tmp_path):
    with pytest.raises(Killed):
        started(tmp_path / "a", kind="stateful", moment=5, steps_per_epoch=3)
    with pytest.raises(CheckpointError, match="steps_per_epoch=3 ends epochs"):
        started(tmp_path / "a", kind="stateful", steps_per_epoch=3, resume=True)


def test_a_shorter_csv_file_is_refused(tmp_path):
    case = "best weights and numbers"
    with pytest.raises(Killed):
        started(tmp_path / "a", case, moment=20)
    (tmp_path / "a" / "log.csv").write_text("epoch")
    with pytest.raises(CheckpointError, match=r"log.csv has 5 bytes; the run had written"):
        started(tmp_path / "a", case, resume=True)


def test_arguments_of_resumption_are_checked(tmp_path):
    x, y = data()
    with pytest.raises(InputError, match="resume: expected the folder"):
        another().fit(x, y, resume=True)
    with pytest.raises(InputTypeError, match="resume: expected True or False"):
        another().fit(x, y, run_dir=tmp_path / "r", resume="yes")
    with pytest.raises(InputError, match="BackupAndRestore: expected a folder"):
        another().fit(x, y, callbacks=C.BackupAndRestore())
    with pytest.raises(InputError, match="one BackupAndRestore at most"):
        another().fit(x, y, callbacks=[C.BackupAndRestore(), C.BackupAndRestore()], run_dir=tmp_path / "r")
    for wrong in ("batch", True, 1.5, None):
        with pytest.raises(InputTypeError, match="save_freq"):
            C.BackupAndRestore(wrong)
    with pytest.raises(InputError, match="save_freq"):
        C.BackupAndRestore(0)


def test_a_state_that_no_checkpoint_can_hold_is_named_before_the_first_step(tmp_path):
    class Odd(C.Callback):
        def state_dict(self):
            return {"when": object()}

    model = another()
    before = [p.detach().clone() for p in model.net.parameters()]
    with pytest.raises(CheckpointError, match=r"cannot hold callbacks.0.when.*received object"):
        model.fit(*data(), callbacks=Odd(), run_dir=tmp_path / "r", verbose=0)
    assert equal([p.detach() for p in model.net.parameters()], before)


# --- files ---------------------------------------------------------------------------------------------------------

TREE = {
    "plain": [None, True, -3, 2**200, 0.1, -0.0, "ü", b"\x00\xff"],
    "numbers": [math.inf, -math.inf, math.nan, np.float32(0.5), np.int64(4)],
    "nested": {1: (2, [3]), "a": {"tensor": "a tag as a key"}, (1, "x"): {}},
    "counter": Counter({5: 2}),
    "tensors": [torch.tensor(1.5), torch.zeros(0, 3), torch.arange(6).reshape(2, 3).T, torch.ones(2).bfloat16()],
    "arrays": np.arange(3, dtype=np.uint32),
}


def test_a_tree_of_values_comes_back_as_it_was(tmp_path):
    shared = torch.ones(3)
    tree = {**TREE, "tied": [shared, shared]}
    checkpoint.write(tmp_path / "c", tree)
    found = checkpoint.newest(tmp_path / "c").state
    array = found.pop("arrays")
    assert isinstance(array, np.ndarray) and array.dtype == np.uint32 and array.tolist() == [0, 1, 2]
    assert type(found["counter"]) is Counter and math.copysign(1, found["plain"][5]) == -1
    assert equal({name: part for name, part in tree.items() if name != "arrays"}, found)


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.ones(2).to_sparse(), torch.ones(1, dtype=torch.complex64)])
def test_a_value_of_another_kind_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"cannot hold a\.0"):
        checkpoint.write(tmp_path, {"a": [value]})


def test_only_the_two_newest_checkpoints_stay_and_no_pickle_is_among_them(tmp_path):
    started(tmp_path / "a")
    folder = tmp_path / "a" / "run" / "checkpoints"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    for path in folder.glob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def damaged_copies(content):
    yield b""
    yield content[: len(content) // 2]
    yield content[:-2]
    yield content[: len(content) // 3] + bytes([content[len(content) // 3] ^ 1]) + content[len(content) // 3 + 1 :]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", range(5))
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, suffix, damage):
    whole = started(tmp_path / "whole")
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=20)
    folder = tmp_path / "a" / "run" / "checkpoints"
    newest = sorted(folder.glob(f"*.{suffix}"))[-1]
    copies = list(damaged_copies(newest.read_bytes()))
    if damage < len(copies):
        newest.write_bytes(copies[damage])
    elif suffix == "json":
        newest.write_text('{"schema": 1, "state": 3}')
    else:
        newest.unlink()
    with pytest.warns(UserWarning, match=rf"{newest.stem}.*Going on from the one before it"):
        resumed = started(tmp_path / "a", resume=True)
    assert differing(whole, resumed) == []


def test_no_whole_checkpoint_is_an_error_that_names_the_files(tmp_path):
    with pytest.raises(Killed):
        started(tmp_path / "a", moment=20)
    folder = tmp_path / "a" / "run" / "checkpoints"
    for path in folder.glob("*.json"):
        path.write_text("[]")
    with pytest.raises(CheckpointError, match="No whole checkpoint in"):
        started(tmp_path / "a", resume=True)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="holds a run without checkpoints"):
        started(tmp_path / "a", resume=True)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    path = checkpoint.write(tmp_path, {"a": 1})
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(CheckpointError, match=r"schema 99; this version .* up to 1"):
        checkpoint.newest(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write a checkpoint in"):
        checkpoint.write(tmp_path / "file", {})


def test_checkpoints_take_a_bounded_share_of_the_time(tmp_path, monkeypatch):
    """The clock runs only while a checkpoint is written, 1 s each, and 1 s a step: one checkpoint in 100 steps."""
    clock = [0.0]
    monkeypatch.setattr(backup.time, "perf_counter", lambda: clock[0])
    written = []

    def write(folder, state):
        clock[0] += 1.0
        written.append(state["epoch"])

    monkeypatch.setattr(backup.checkpoint, "write", write)

    class Second(C.Callback):
        def on_train_batch_end(self, batch, logs):
            clock[0] += 1.0

    model = ll.Model(nn.Linear(3, 2))
    model.compile("adam", mixed())
    x, y = data()
    model.fit(x, y, batch_size=1, epochs=20, callbacks=Second(), run_dir=tmp_path / "r", verbose=0)
    # The first, those between (440 steps), and the last.
    assert len(written) == 1 + 4 + 1


# --- processes that are killed -------------------------------------------------------------------------------------

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs that are killed are forked")


def killing(folder, *arguments):
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@forks
def test_runs_killed_at_random_moments_lose_nothing_and_count_nothing_twice(tmp_path):
    found = killing(tmp_path, 5, 1)
    assert found["kills"] >= 5 and found["wrong"] == []


@forks
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_hundred_runs_killed_at_random_moments(tmp_path, seed):
    found = killing(tmp_path, 100, seed)
    assert found["kills"] >= 100 and found["runs"] >= 4 and found["wrong"] == []


@forks
@pytest.mark.slow
def test_runs_killed_at_each_call_that_makes_something_durable(tmp_path):
    found = killing(tmp_path, "calls", 1)
    assert found["calls"] >= 80 and found["kills"] >= found["calls"] and found["wrong"] == []


@forks
def test_runs_killed_at_some_calls_that_make_something_durable(tmp_path):
    found = killing(tmp_path, "calls", 11)
    assert found["calls"] >= 80 and found["kills"] >= 8 and found["wrong"] == []


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiled", [(False, True), (True, False)], ids=["with", "without"])
def test_a_run_goes_on_with_or_without_torch_compile(tmp_path, compiled):
    """Weights, best weights and buffers that `state_dict` leaves out have their plain names in a checkpoint."""

    def run(name, wrap, stop=None, resume=False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        net.register_buffer("beside", torch.zeros(1), persistent=False)
        model = ll.Model(torch.compile(net, backend="eager") if wrap else net)
        model.compile("adam", "mse")
        best = ll.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)
        x = torch.linspace(-1, 1, 24).reshape(8, 3)
        options = {"run_dir": tmp_path / name, "resume": resume, "callbacks": [best, *([] if stop is None else [stop])]}
        history = model.fit(x, x.sum(1, keepdim=True), batch_size=4, epochs=3, seed=0, verbose=0, **options)
        return history.history, [value.detach().clone() for value in net.state_dict().values()]

    class Stop(ll.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            if epoch == 1:
                raise Killed

    history, weights = run("whole", False)
    with pytest.raises(Killed):
        run("parts", compiled[0], Stop())
    again, found = run("parts", compiled[1], resume=True)
    assert again == history
    assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))
