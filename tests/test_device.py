"""Losses, steps, windows and `fit` on a device that is not the processor.

The device is pretended (see `pretended.py`): that tensors of two devices meet nowhere, that no number of the device is
read or waited for between log points, and that the numbers are those of the processor, is really run. CUDA itself is
not: its kernels, its autocast, streams and graphs are for `test_cuda.py`, where there is a GPU.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import lossledger as ll
import pretended
from checks import case, close, tensors
from declarations import MATRIX, REDUCTIONS, ROWS
from lossledger.training import optimizers, waiting
from lossledger.training.gate import Gate
from lossledger.values import streams
from on_device import BATCH, BCE, FITS, READING, WEIGHT, X, Y, alike, between_log_points, columns, of_loss, trained
from pretended import MixedError, OnDevice, WaitError, host, moved, placed, unread
from thread_ranks import on_threads, windows_take_threads

# A process of these tests was once ended by a crash inside torch that did not come again: alone, it stops nobody.
pytestmark = pytest.mark.slow

L = ll.losses
CLASS_WEIGHTS = {"dict": {0: 2.0, 1: 0.5}, "list": [1.0, 2.0, 0.5], "tensor": torch.tensor([1.0, 2.0, 0.5])}


def parametrize(rows):
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in rows])


def both(run):
    """What `run` returns on the processor, and on the device; it is given what moves its tensors."""
    expected = run(lambda value: value)
    with pretended.device():
        return expected, host(run(moved))


def same(found, expected, tolerance=1e-6):
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert close(mine, other, tolerance)


@pytest.fixture(autouse=True)
def _reads_again():
    yield
    pretended.set_unread(False)


# --- the pretended device ------------------------------------------------------------------------------------------

WAITS = {
    "item": lambda a: a.sum().item(),
    "float": lambda a: float(a.sum()),
    "bool": lambda a: bool(a.any()),
    "cpu": lambda a: a.cpu(),
    "to the host": lambda a: a.to("cpu"),
    "nonzero": lambda a: a.nonzero(),
    "mask as index": lambda a: a[a > 0],
    "index of the host": lambda a: a[[0, 1]],
    "copy of a number": lambda a: torch.as_tensor(0.5, device=a.device),
    "copy of numbers": lambda a: torch.tensor([0.5], device=a.device),
    "copy of a tensor": lambda a: torch.ones(3).to(a.device),
    "choice of a number": lambda a: torch.where(a > 0, a, torch.zeros(())),
}
MIXES = {
    "sum": lambda a: a + torch.ones(3),
    "cat": lambda a: torch.cat((a, torch.ones(1))),
    "index_select": lambda a: a.index_select(0, torch.tensor([0])),
    "index of the device": lambda a: torch.ones(3)[a.long()],
    "stack": lambda a: torch.stack((a.sum(), torch.zeros(()))),
}
FREE = {
    "number": lambda a: a + 1,
    "number without axes": lambda a: a * torch.tensor(2.0),
    "choice of a number of Python": lambda a: torch.where(a > 0, a, 0.0),
    "fill": lambda a: torch.full((), 0.5, device=a.device) + a,
    "copy that nobody waits for": lambda a: torch.ones(3).to(a.device, non_blocking=True) + a,
    "number under a mask": lambda a: a.clone().masked_fill_(a > 0, 0.0),
}


@pytest.mark.parametrize("act", WAITS.values(), ids=WAITS)
def test_waiting_for_the_device_is_seen(act):
    with pretended.device():
        here = moved(torch.tensor([-1.0, 0.0, 1.0]))
        act(here)
        with unread(), pytest.raises(WaitError):
            act(here)


@pytest.mark.parametrize("act", MIXES.values(), ids=MIXES)
def test_tensors_of_two_devices_do_not_meet(act):
    with pretended.device(), pytest.raises((MixedError, RuntimeError), match="device"):
        act(moved(torch.tensor([0.0, 1.0, 2.0])))


@pytest.mark.parametrize("act", FREE.values(), ids=FREE)
def test_what_a_device_allows_is_allowed(act):
    values = torch.tensor([-1.0, 0.0, 1.0])
    with pretended.device(), unread():
        found = act(moved(values))
    assert type(found) is OnDevice and torch.equal(host(found), act(values))


def test_numpy_is_refused():
    with pretended.device(), pytest.raises((RuntimeError, TypeError)):
        moved(torch.ones(3)).numpy()


# --- losses --------------------------------------------------------------------------------------------------------


@parametrize(MATRIX)
@pytest.mark.parametrize(("weights", "masks"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_loss_is_the_same_on_a_device_and_nothing_is_read(row, weights, masks):
    given = tensors(case(row, 7, samples=9, weights=weights, masks=masks))
    for by in (None, *row.kinds) if weights == masks else (None,):
        expected, found = both(of_loss(row.make(), given, by, unread))
        same(found, expected)


@parametrize([ROWS[0], *(row for row in MATRIX if row.name in ("sparse-logits", "dice-sample", "custom-class"))])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [False, True])
def test_every_reduction_is_the_same_on_a_device(row, reduction, weights):
    given = tensors(case(row, 7, samples=9, weights=weights, masks=weights))
    expected, found = both(of_loss(row.make(reduction=reduction), given, None, unread))
    same(found, expected)


@parametrize(MATRIX)
def test_a_call_of_a_loss_takes_tensors_of_a_device(row):
    """Outside of steps values are checked, and the gradient is that of autograd."""
    loss, given = row.make(), tensors(case(row, 7, samples=9))

    def run(move):
        y, p, w, m = move(given)
        p.requires_grad_()
        value = loss(y, p, w, m)
        value.backward()
        return [value, p.grad, loss.tally(y, p, w, m).value]

    expected, found = both(run)
    same(found, expected, 1e-11)


@pytest.mark.parametrize(
    ("row", "class_weight"),
    [
        pytest.param(row, given, id=f"{row.name}-{kind}")
        for row in MATRIX
        for kind, given in CLASS_WEIGHTS.items()
        if kind == "tensor" or row in ROWS
    ],
)
def test_class_weights_reach_the_device_without_waiting(row, class_weight):
    given = tensors(case(row, 7, samples=9))

    def run(move):
        loss = row.make()
        objective = ll.Objective(loss, class_weight=class_weight)
        y, p, w, m = move(given)
        p.requires_grad_()
        by = "class" if loss.classes_are else None
        for _ in range(2):
            with unread(loss.name not in READING):
                found = objective.backprop(y, p, w, m, by)
                torch.autograd.backward(found.roots, found.gradients)
                tallies = objective.tallies(y, p.detach(), w, m, by)
        return [*(tally.value for tally in tallies.values()), p.grad]

    try:
        ll.Objective(row.make(), class_weight=class_weight)
        expected = run(lambda value: value)
    except ll.errors.LossledgerError:
        # Some have no classes, or want a number for each.
        return
    with pretended.device():
        same(host(run(moved)), expected)


@pytest.mark.parametrize("row", [row for row in MATRIX if row.name in READING], ids=READING)
def test_losses_that_have_to_read_are_those_that_are_known(row):
    loss = row.make()
    with pretended.device(), unread(), pytest.raises(WaitError):
        y, p, w, m = moved(tensors(case(row, 7, samples=9)))
        loss.backprop_aligned(loss.align(y, p, w, m, checked=True), None, 1.0)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("ignored", [None, 0])
def test_a_big_vocabulary_reads_only_how_many_rows_count(ignored):
    """Rows that do not count are dropped before the product: how many are left is a length of the host."""
    x, y, w = torch.randint(1, 20, (4, 6)), torch.randint(0, 20, (4, 6)), torch.rand(4)

    def run(move):
        net = placed(Tokens()) if move is moved else Tokens()
        loss = L.LinearCrossentropy(net.head, ignore_class=ignored, z_loss=0.1, chunk_bytes=800)
        labels, outputs, weights = move(y), net(move(x)), move(w)
        with unread(ignored is None):
            found = ll.Objective(loss).backprop(labels, outputs, weights, by="class")
            torch.autograd.backward(found.roots, found.gradients)
        return [found.tallies["linear_crossentropy"].value, net.head.weight.grad, net.body.weight.grad]

    expected, found = both(run)
    same(found, expected)


# --- windows, of one process and of several ------------------------------------------------------------------------

OBJECTIVES = {
    "linear": lambda: ll.Objective(L.BinaryCrossentropy(from_logits=True)),
    "sum": lambda: ll.Objective(L.BinaryCrossentropy(from_logits=True, reduction="sum")),
    "ratio": lambda: ll.Objective(
        L.Dice(axis=0, from_logits="sigmoid") + L.BinaryCrossentropy(from_logits=True), class_weight=[1.0, 2.0, 3.0]
    ),
    "regularized": lambda: ll.Objective("mse", regularizers={"*weight": "l1"}),
}


def batches_of_window():
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(4, 3, generator=generator),
            (torch.rand(4, 3, generator=generator) < 0.4).float(),
            torch.rand(4, generator=generator),
        )
        for _ in range(3)
    ]


def small_net(move, norm=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5) if norm else nn.Tanh(), nn.Linear(5, 3))
    return placed(net) if move is moved else net


def windowed(objective, batches, net, group=None):
    with objective.window(batches, model=net, process_group=group) as window:
        for batch in window:
            outputs = net(batch.x)
            with unread():
                window.backward(outputs)
    return [window.breakdown.total, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_window_is_the_same_on_a_device_and_nothing_is_read(make):
    def run(move):
        batches, net, other = move(batches_of_window()), small_net(move), small_net(move)
        step = make().step(batches, other)
        return [*windowed(make(), batches, net), step.total, *(p.grad for p in other.parameters())]

    expected, found = both(run)
    same(found, expected)


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
def test_counts_of_ranks_stay_on_the_device(make):
    def run(move):
        nets = [small_net(move, norm=False) for _ in range(2)]

        def rank(group):
            with pretended.of_thread() if move is moved else contextlib.nullcontext():
                return windowed(make(), move(batches_of_window())[group.rank :: 2], nets[group.rank], group)

        with pretended.device() if move is moved else contextlib.nullcontext(), windows_take_threads():
            return [value for one in on_threads(2, rank) for value in one]

    expected = run(lambda value: value)
    same(host(run(moved)), expected)


# --- fit, evaluate, predict ----------------------------------------------------------------------------------------


@pytest.fixture
def points(monkeypatch):
    """Nothing is read between log points; see `between_log_points`."""
    return between_log_points(monkeypatch, pretended.set_unread)


@pytest.mark.parametrize("name", FITS)
def test_fit_is_the_same_on_a_device_and_reads_at_log_points_only(name, monkeypatch, points):
    expected, ledger = trained(FITS[name])
    points.update(batches=0, waited=0)
    with pretended.device() as device:
        # Tallies wait for plain tensors only, which those of a real device are.
        monkeypatch.setattr(waiting, "Tensor", OnDevice)
        found, on_device = trained(FITS[name], placed, host)
    assert device.type == "cuda" and points["batches"] >= 10
    if name == "plain":
        assert points["waited"] == 10
    alike(found, expected)
    assert [row[:-1] for row in on_device] == [row[:-1] for row in ledger]
    alike([row[-1] for row in on_device], [row[-1] for row in ledger])


def test_data_may_lie_on_the_device(points):
    """All, or some of the arrays; the order of the samples is made on the host."""

    def history(place, move):
        torch.manual_seed(3)
        model = ll.Model(place(columns()))
        model.compile("adam", BCE)
        x, y = move((torch.from_numpy(X), torch.from_numpy(Y)))
        fit = model.fit(x, y, BATCH, 2, verbose=0, seed=1, checks="off", samples=True, sample_weight=WEIGHT)
        return [fit.history["loss"], model.evaluate(x, y, BATCH, verbose=0)]

    expected = history(lambda net: net, lambda arrays: arrays)
    with pretended.device():
        alike(history(placed, moved), expected)
        alike(history(placed, lambda arrays: [moved(arrays[0]), arrays[1]]), expected)


def test_a_run_is_resumed_on_a_device(tmp_path):
    class Stop(ll.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    def fit(folder, place, *callbacks):
        torch.manual_seed(3)
        model = ll.Model(place(columns()))
        model.compile("rmsprop", BCE, metrics=["MAE"])
        given = {"epochs": 2, "verbose": 0, "seed": 1, "samples": True, "callbacks": callbacks}
        return model.fit(X, Y, BATCH, run_dir=tmp_path / folder, resume=True, **given).history

    often = ll.callbacks.BackupAndRestore(save_freq=1)
    with pretended.device():
        with pytest.raises(KeyboardInterrupt):
            fit("killed", placed, Stop(), often)
        assert fit("killed", placed, often) == fit("whole", placed, often)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "adagrad", "sgd"])
@pytest.mark.parametrize(("first", "then"), [(placed, nn.Module.cpu), (nn.Module.cpu, placed)], ids=["device", "host"])
def test_a_run_goes_on_where_there_is_another_device(tmp_path, optimizer, first, then):
    """What a checkpoint says of kernels and of counters of steps was for another device."""
    with pretended.device():
        fit_in(tmp_path, first, optimizer, 2)
        found = fit_in(tmp_path, then, optimizer, 4)
    alike(found, fit_in(tmp_path / "whole", nn.Module.cpu, optimizer, 4))


def fit_in(folder, place, optimizer, epochs, *callbacks):
    torch.manual_seed(3)
    model = ll.Model(place(columns()))
    model.compile(optimizer, BCE)
    given = {"verbose": 0, "seed": 1, "callbacks": callbacks, "run_dir": folder, "resume": True}
    return model.fit(X, Y, BATCH, epochs, **given).history["loss"]


def test_a_model_may_be_moved_before_its_first_step():
    """Counters on the device, where torch finds none, would stop the first step."""
    net = columns()
    optimizer = torch.optim.RMSprop(net.parameters())
    gate = Gate(net, optimizer, tuple(net.parameters()), ())
    optimizer.param_groups[0]["capturable"] = True
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    gate.step(torch.tensor(False))
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_gap_is_measured_on_a_device():
    def history(place):
        torch.manual_seed(3)
        model = ll.Model(place(columns()))
        model.compile("adam", BCE)
        given = {"verbose": 0, "seed": 1, "validation_split": 0.2, "callbacks": [ll.callbacks.Gap()]}
        model.fit(X, Y, BATCH, 2, **given)
        return [row.contribution for row in model.ledger.rows]

    expected = history(lambda net: net)
    with pretended.device():
        alike(history(placed), expected)


TEXTS = {
    "breakdown": lambda loss, *given: str(ll.Objective(loss)(*given)),
    "explanation": lambda loss, *given: str(ll.explain(loss, *given)),
    "contributions": lambda loss, *given: loss.tally(*given, by="class").contributions().tolist(),
}


@pytest.mark.parametrize("tell", TEXTS.values(), ids=TEXTS)
@parametrize(
    [row for row in MATRIX if row.name in ("bce-logits", "sparse-logits", "dice-all", "focal_tversky-class-plain")]
)
def test_what_is_said_of_a_batch_of_a_device(row, tell):
    given = tensors(case(row, 7, samples=9))
    expected = tell(row.make(), *given)
    with pretended.device():
        assert tell(row.make(), *moved(given)) == expected


# --- what depends on the kind of device ----------------------------------------------------------------------------


def test_passes_over_memory_are_counted_on_the_processor_alone():
    with pretended.device():
        large = torch.zeros(2**20, device="cuda")
        assert large.is_cuda and not streams(large)


def test_step_counters_of_unfused_optimizers_lie_with_the_parameters():
    """On the host they would be put back by a flag that has to be read there."""
    for kind in (torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adamax, torch.optim.Adadelta):
        with pretended.device():
            net = placed(columns())
            optimizer = kind(net.parameters())
            gate = Gate(net, optimizer, tuple(net.parameters()), ())
            for bad in (False, True):
                for parameter in net.parameters():
                    parameter.grad = torch.ones_like(parameter)
                flag = torch.full((), bad, device="cuda")
                with unread():
                    gate.step(flag)
            counters = [state["step"] for state in optimizer.state.values()]
        assert all(type(counter) is OnDevice and counter.inner == 1 for counter in counters)


def test_a_fused_kernel_is_asked_for_where_torch_has_one():
    """Adagrad has one for the processor in every version, and one for CUDA in builds that say so."""
    net = columns()
    assert optimizers.make("adagrad", net).defaults["fused"]
    with pretended.device():
        there = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adagrad_", "CUDA")
        assert bool(optimizers.make("adagrad", placed(net)).defaults["fused"]) == there
        assert optimizers.make("adam", net).defaults["fused"]
