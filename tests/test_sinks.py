"""Callbacks for programs that draw curves: what they write is what History and the ledger say, also after a kill."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
import warnings

import numpy as np
import pytest
import torch

import lossledger as ll
from lossledger.errors import ExtraError
from lossledger.ledger import MetricRow
from lossledger.ledger.rows import ROW_COLUMNS, Row
from lossledger.training.callback import overrides
from lossledger.training.series import LONGEST_NAME, Names, Series
from lossledger.training.sinks import extra

C = ll.callbacks
N = 24
CLASSES = ["cat", "dog/fox", "owl"]


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=g)
    return x, (x > 0).float()


def model():
    torch.manual_seed(0)
    made = ll.Model(torch.nn.Linear(3, 3))
    bce, dice = ll.losses.BinaryCrossentropy(from_logits=True), ll.losses.Dice(axis=(0, 1), from_logits="sigmoid")
    made.compile("sgd", 0.5 * bce + dice, metrics=["iou"], class_names=CLASSES)
    return made


def fit(callbacks, of=None, **options):
    x, y = data()
    options = {"epochs": 3, "batch_size": 6, "validation_split": 0.25, "verbose": 0, "seed": 0, **options}
    return (of or model()).fit(x, y, callbacks=callbacks, checks="off", **options)


class PowerCut(C.Callback):
    """Ends the training in its third epoch."""

    def on_train_batch_end(self, batch, logs):
        if len({row.epoch for row in self.model.ledger.rows}) == 2:
            raise RuntimeError("power cut")


# None: a run in one piece. Otherwise one that was cut, and went on from its second epoch or from the beginning, so that
# epochs that were written ran again.
CUTS = pytest.mark.parametrize("cut", [None, "epoch", 10_000])


def trained(folder, make, cut):
    """A run with a callback made anew for each of its parts."""
    if cut is None:
        return fit([make()], ledger_steps=2)
    every = C.BackupAndRestore(cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit([make(), every, PowerCut()], run_dir=folder, ledger_steps=2)
    # Event files are named after the second and read in the order of their names.
    time.sleep(1.1 - time.time() % 1)
    return fit([make(), every], run_dir=folder, ledger_steps=2, resume=True)


def row(**changed):
    names = dict(split="training", epoch=1, step=None, term="bce", role="data", form="linear", kind="term")
    sums = dict(total=6.0, count=4, weight=3.0, coefficient=0.5, divisor=4.0, contribution=0.75, nonfinite=2, masked=3)
    return Row(**(dict(names, group="", presence="", **sums) | changed))


def expected(history):
    """Every value that a program that draws curves gets, by folder, name and epoch or step: from ledger and History."""
    found = {}
    for name, values in history.history.items():
        folder = "validation" if name.startswith("val_") else "training"
        for epoch, value in enumerate(values):
            found[folder, f"epoch_{name.removeprefix('val_')}", epoch] = value
    losses = {}
    for r in history.ledger.rows:
        at = (r.split, r.epoch - 1) if r.step is None else ("steps", r.step)
        group = [] if r.kind == "term" else [r.kind, r.group.replace("/", "_"), *([r.presence] if r.presence else [])]
        owner = "/".join([r.term, *group])
        mean = r.total / (r.weight if r.form == "ratio" else r.count)
        values = {"mean": mean, "count": r.count, "contribution": r.contribution}
        if r.kind == "term":
            values |= {"nonfinite": r.nonfinite, "masked": r.masked}
            if r.step is not None:
                losses[r.step] = losses.get(r.step, 0.0) + r.contribution
        found |= {(at[0], f"{what}/{owner}", at[1]): value for what, value in values.items()}
    found |= {("steps", "loss", step): loss for step, loss in losses.items()}
    for m in history.ledger.metrics:
        if m.group:
            found[m.split, f"metric/{m.metric}/{m.group.replace('/', '_')}", m.epoch - 1] = m.value
    return {key: float(value) for key, value in found.items() if not (key[1].startswith("metric") and value != value)}


def test_points_of_rows():
    metrics = [MetricRow("training", 1, "iou", "owl", math.nan), MetricRow("training", 1, "iou", "cat", 0.5)]
    group = row(kind="class", group="cat", presence="absent", total=1.0, contribution=0.125, masked=None)
    rows = [row(step=7), row(step=7, term="l2", contribution=1.0, count=0), row(), group, row(form="ratio")]
    found = [(p.split, p.step, "/".join(p.name), p.value) for p in Series().points(rows, metrics)]
    bce = {"contribution/bce": 0.75, "count/bce": 4, "masked/bce": 3, "mean/bce": 1.5, "nonfinite/bce": 2}
    assert found == [
        ("training", 7, "loss", 1.75),
        *(("training", 7, name, value) for name, value in bce.items()),
        ("training", 7, "contribution/l2", 1.0),
        ("training", 7, "count/l2", 0.0),
        ("training", 7, "masked/l2", 3.0),
        ("training", 7, "nonfinite/l2", 2.0),
        *(("training", None, name, value) for name, value in bce.items()),
        ("training", None, "contribution/bce/class/cat/absent", 0.125),
        ("training", None, "count/bce/class/cat/absent", 4.0),
        ("training", None, "mean/bce/class/cat/absent", 0.25),
        *(("training", None, name, 2.0 if name == "mean/bce" else value) for name, value in bce.items()),
        ("training", None, "metric/iou/cat", 0.5),
    ]


def test_means_are_those_of_the_tables():
    ledger = fit([]).ledger
    of_terms = {(r["split"], r["epoch"], (r["term"],)): r["mean"] for r in ledger.table(by=["split", "epoch", "term"])}
    by_class = ledger.table(by=["split", "epoch", "term", "class", "presence"])
    wanted = of_terms | {
        (r["split"], r["epoch"], (r["term"], "class", r["class"], *([r["presence"]] if r["presence"] else []))): r[
            "mean"
        ]
        for r in by_class
    }
    found = {}
    for epoch in (1, 2, 3):
        rows = [r for r in ledger.rows if r.epoch == epoch]
        points = [p for p in Series().points(rows, []) if p.name[0] == "mean"]
        found |= {(p.split, epoch, p.name[1:]): p.value for p in points}
    assert found == pytest.approx(wanted, rel=1e-12)


def test_kinds_of_too_many_groups_are_left_out_and_said_so_once():
    series = Series(most_groups=2)
    rows = [row(kind=kind, group=str(i)) for kind, n in (("class", 2), ("site", 3), ("sample", 9)) for i in range(n)]
    with pytest.warns(UserWarning, match="3 groups of the kind 'site' of 'bce' are not written"):
        found = {point.name[2:] for point in series.points(rows, [])}
    assert found == {("class", "0"), ("class", "1")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {point.name[2:] for point in series.points(rows, [])} == found
    metrics = [MetricRow("training", 1, "iou", str(i), 0.5) for i in range(3)]
    assert not list(series.points([], metrics)) and len(list(Series(3).points([], metrics))) == 3


def test_names_are_taken_by_every_program_and_never_shared():
    names = Names()
    hostile = [
        "",
        ".",
        "..",
        "../../etc/passwd",
        "a\x00b",
        "a\nb",
        "a b",
        "a_b",
        "A_B",
        "x" * 400,
        "x" * 399,
        "é=1",
        "</script>",
    ]
    found = [names.of("mean", "t", "class", group) for group in hostile]
    assert len({name.casefold() for name in found}) == len(hostile)
    for name in found:
        parts = name.split("/")
        assert parts[:3] == ["mean", "t", "class"] and len(parts) == 4 and len(name) <= LONGEST_NAME + 2
        assert parts[3].strip(".") and all(c.isalnum() or c in "_-. " for c in parts[3])
    assert names.of("mean", "t", "class", "a b") == found[6]
    assert names.of("count", "mask/dice") == "count/mask/dice"


@pytest.mark.parametrize("sink", [C.TensorBoard, C.MLflow, C.CSVLogger])
def test_steps_never_call_a_sink(sink):
    made = sink.__new__(sink)
    assert not [hook for hook in ("on_train_batch_begin", "on_train_batch_end") if overrides(made, hook)]


def test_a_missing_extra_is_named():
    with pytest.raises(ExtraError, match=r"TensorBoard: expected the packages of the extra 'tensorboard'; .*nowhere.*"
                                         r"pip install 'lossledger\[tensorboard\]'") as caught:  # fmt: skip
        extra("nowhere", "tensorboard", "TensorBoard")
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("name", ["TensorBoard", "MLflow"])
def test_an_extra_is_looked_for_when_the_callback_is_made(name, monkeypatch):
    for module in ("tensorboard", "torch.utils.tensorboard", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExtraError, match=rf"{name}: .*lossledger\[{name.lower()}\]"):
        getattr(C, name)()


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@CUTS
def test_csv_has_the_rows_of_the_ledger(tmp_path, cut):
    def make():
        return C.CSVLogger(tmp_path / "rows.csv", rows=True)

    history = trained(tmp_path / "run", make, cut)
    lines = read_rows(tmp_path / "rows.csv")
    assert list(lines[0]) == list(ROW_COLUMNS)
    make_value = {"str": str, "int": int, "float": float}
    make_value |= {"int | None": lambda text: int(text) if text else None}
    make_value |= {"float | None": lambda text: float(text) if text else None}
    kinds = {field.name: make_value[str(field.type)] for field in dataclasses.fields(Row)}
    read = [Row(**{name: kinds[name](text) for name, text in line.items()}) for line in lines]
    assert read == list(history.ledger.rows)
    assert any(r.step for r in read) and any(r.kind == "class" for r in read)


def test_csv_of_rows_goes_on_in_its_file(tmp_path):
    fit([C.CSVLogger(tmp_path / "rows.csv", rows=True)])
    first = len(read_rows(tmp_path / "rows.csv"))
    history = fit([C.CSVLogger(tmp_path / "rows.csv", rows=True, append=True)])
    assert len(read_rows(tmp_path / "rows.csv")) == first + len(history.ledger.rows)


class Evaluates(C.Callback):
    def on_epoch_end(self, epoch, logs):
        self.model.evaluate(*data(), verbose=0)


def test_an_evaluation_in_another_callback_does_not_take_the_ledger_away(tmp_path):
    history = fit([Evaluates(), C.CSVLogger(tmp_path / "rows.csv", rows=True)])
    assert len(read_rows(tmp_path / "rows.csv")) == len(history.ledger.rows) > 0
    assert {r.split for r in history.ledger.rows} == {"training", "validation"}


# --- TensorBoard --------------------------------------------------------------------------------------------------

FOLDERS = {"train": "training", "validation": "validation", "steps": "steps"}


def read_events(folder):
    """Values by folder, name and step, as TensorBoard itself reads them; and how often each step is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray

    found, events = {}, 0
    for sub in sorted(folder.iterdir()):
        accumulator = EventAccumulator(str(sub), size_guidance={"tensors": 0})
        accumulator.Reload()
        for tag in accumulator.Tags()["tensors"]:
            for event in accumulator.Tensors(tag):
                found[FOLDERS[sub.name], tag, event.step] = float(make_ndarray(event.tensor_proto))
                events += 1
    assert len(found) == events, "a step is there twice"
    return found


@pytest.fixture
def tensorboard():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(
            "tensorboard", reason="the extra `tensorboard` is not installed: event files are not tested"
        )
        import torch.utils.tensorboard  # noqa: F401


@CUTS
@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_reads_what_the_ledger_says(tmp_path, cut):
    def make():
        return C.TensorBoard(tmp_path / "logs")

    history = trained(tmp_path / "run", make, cut)
    found = read_events(tmp_path / "logs")
    wanted = expected(history)
    assert found.keys() == wanted.keys()
    assert all(found[key] == np.float32(wanted[key]) for key in wanted)
    assert {"mean/binary_crossentropy/class/dog_fox/present", "nonfinite/dice", "epoch_loss"} <= {
        n for _, n, _ in found
    }


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_shows_losses_that_are_not_finite_and_large_counts(tmp_path):
    writer = C.TensorBoard(tmp_path)
    rows = [row(total=math.nan, contribution=math.inf, count=2**40 + 1)]
    writer._begin = (0, 1)
    points = [(p.split, p.step, "/".join(p.name), p.value) for p in Series().points(rows, [])]
    writer._write(0, {"loss": math.nan}, points)
    writer.on_train_end({})
    found = {name: value for (_, name, _), value in read_events(tmp_path).items()}
    assert found["count/bce"] == 2**40 and found["contribution/bce"] == math.inf
    assert math.isnan(found["mean/bce"]) and math.isnan(found["epoch_loss"])


@pytest.mark.usefixtures("tensorboard")
def test_a_training_takes_the_place_of_what_it_repeats(tmp_path):
    later = model()
    fit([C.TensorBoard(tmp_path)], validation_freq=3)
    first = read_events(tmp_path)
    time.sleep(1.1 - time.time() % 1)
    history = fit([C.TensorBoard(tmp_path)], later, epochs=4, initial_epoch=1, validation_split=0.5)
    found = read_events(tmp_path)
    assert found["training", "epoch_loss", 0] == first["training", "epoch_loss", 0]
    again = [found["training", "epoch_loss", epoch] for epoch in (1, 2, 3)]
    assert again == [np.float32(loss) for loss in history.history["loss"]]
    assert {epoch for folder, _, epoch in found if folder == "validation"} == {1, 2, 3}


def asked(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/{path}", timeout=20) as answer:
            return json.load(answer)
    except OSError:
        return {}


@pytest.mark.usefixtures("tensorboard")
def test_the_program_tensorboard_draws_every_series(tmp_path):
    """Its loader is another one than that of the other tests, and passes over points that it does not know."""
    wanted = expected(fit([C.TensorBoard(tmp_path / "logs")], ledger_steps=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", str(tmp_path / "logs")]
    with (tmp_path / "said").open("w") as said:
        program = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=said, stderr=subprocess.STDOUT
        )
    try:
        series = {(folder, name) for folder, name, _ in wanted}
        until, drawn = time.monotonic() + 120, set()
        while drawn != series and time.monotonic() < until:
            time.sleep(1)
            drawn = {(FOLDERS[run], tag) for run, tags in asked(port, "tags").items() for tag in tags}
        assert drawn == series, (tmp_path / "said").read_text()
        points = asked(port, "scalars?run=steps&tag=loss")
        assert {("steps", "loss", step): np.float32(value) for _, step, value in points} == {
            key: np.float32(value) for key, value in wanted.items() if key[:2] == ("steps", "loss")
        }
    finally:
        program.terminate()
        program.wait()


@pytest.mark.usefixtures("tensorboard")
def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(ll.Model, "writes", False)
    fit([C.TensorBoard(tmp_path / "logs")])
    assert not (tmp_path / "logs").exists()


# --- MLflow -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    warnings.simplefilter("ignore")
    found = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed: nothing is logged to MLflow")
    found.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    found.set_experiment("test")
    yield found
    while found.active_run():
        found.end_run()


def read_metrics(client, run_id):
    found = {}
    for key in client.get_run(run_id).data.metrics:
        for metric in client.get_metric_history(run_id, key):
            value = found.setdefault((key, metric.step), metric.value)
            assert np.array_equal(value, metric.value, equal_nan=True), "logged again with another value"
    return found


def as_mlflow(history):
    """The names of MLflow: those of History, and the split before those of the ledger."""
    wanted = {}
    for (folder, name, step), value in expected(history).items():
        if name.startswith("epoch_"):
            name = f"{'val_' if folder == 'validation' else ''}{name.removeprefix('epoch_')}"
        else:
            name = f"{folder}/{name}"
        wanted[name, step] = value
    return wanted


@pytest.mark.slow
@CUTS
def test_mlflow_has_what_the_ledger_says(tmp_path, mlflow, cut):
    def make():
        return C.MLflow(run_name="first")

    history = trained(tmp_path / "run", make, cut)
    client = mlflow.MlflowClient()
    # One, also where it went on.
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert read_metrics(client, run.info.run_id) == as_mlflow(history)
    assert mlflow.active_run() is None


@pytest.mark.slow
def test_mlflow_logs_to_the_active_run_and_leaves_it_open(mlflow):
    with mlflow.start_run() as run:
        fit([C.MLflow()])
        assert mlflow.active_run().info.run_id == run.info.run_id
    assert ("val_loss", 2) in read_metrics(mlflow.MlflowClient(), run.info.run_id)


@pytest.mark.slow
@pytest.mark.parametrize("error, status", [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_mlflow_is_told_how_a_training_ended(mlflow, error, status):
    class Ends(C.Callback):
        def on_epoch_end(self, epoch, logs):
            raise error("ended")

    sink = C.MLflow()
    with pytest.raises(error):
        fit([sink, Ends()])
    assert mlflow.MlflowClient().get_run(sink.run_id).info.status == status
    try:
        raise ValueError("of the caller")
    except ValueError:
        fit([sink])
    assert mlflow.MlflowClient().get_run(sink.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_mlflow_takes_more_metrics_than_one_request_holds(mlflow, monkeypatch):
    monkeypatch.setattr(C.MLflow, "_BATCH", 7)
    sink = C.MLflow()
    history = fit([sink])
    assert read_metrics(mlflow.MlflowClient(), sink.run_id) == as_mlflow(history)
