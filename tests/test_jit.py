"""`compile(jit=True)`: the compiled step gives what the plain step gives, or says why it is not compiled."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lossledger as ll
from interrupted import KillAfter, Killed
from lossledger.errors import InputError, InputTypeError, NonFiniteError
from lossledger.training.data import array_data
from lossledger.training.jit import Course
from lossledger.training.updates import supported

L, O = ll.losses, torch.optim
N, SIZE = 52, 16


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, REAL = drawn(N, 3), drawn(N, 3, seed=1)
SOME = (drawn(N, 3, seed=2) < 0).float()
LABELS = drawn(N, 3, seed=3).argmax(1)
WEIGHT, MASK = drawn(N, seed=4).abs(), drawn(N, 3, seed=5) < 0.6


def network(outputs=3, inside=nn.Tanh):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 5), inside(), nn.Linear(5, outputs))


def fitted(jit, net, x, y, compiled=None, samples=N, **options):
    """A model trained for two epochs, with what it said."""
    model = ll.Model(copy.deepcopy(net))
    model.compile(jit=jit, **{"optimizer": lambda p: O.Adam(p, 0.01), **(compiled or {})})

    def cut(value):
        if isinstance(value, dict):
            return {name: cut(part) for name, part in value.items()}
        return value[:samples] if isinstance(value, torch.Tensor) else value

    torch.manual_seed(11)
    options = {"batch_size": SIZE, "epochs": 2, "seed": 0, "verbose": 0} | options
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = model.fit(cut(x), cut(y), **{name: cut(value) for name, value in options.items()})
    return model, history, [str(warning.message) for warning in said]


def programs(model):
    return [found for found in model._compiled().plan.jit._programs.values() if found is not None]


def close(a, b, tolerance=1e-5):
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=tolerance, atol=tolerance)


def check_same(plain, compiled, tolerance=1e-5):
    """Weights, buffers, state of the optimizer, history and every row of the ledger."""
    (model, history, _), (other, found, _) = plain, compiled
    for (name, a), b in zip(model.net.state_dict().items(), other.net.state_dict().values(), strict=True):
        assert close(a, b, tolerance), name
    for p, q in zip(model.net.parameters(), other.net.parameters(), strict=True):
        mine, theirs = model.optimizer.state.get(p, {}), other.optimizer.state.get(q, {})
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            assert value is theirs[name] is None or close(value, theirs[name], tolerance), name
    assert list(history.history) == list(found.history)
    for name, values in history.history.items():
        assert close(values, found.history[name], tolerance), name
    rows, others = history.ledger.rows, found.ledger.rows
    assert len(rows) == len(others) and found.ledger.balance() == []
    for a, b in zip(rows, others, strict=True):
        assert (a.term, a.kind, a.group, a.presence) == (b.term, b.kind, b.group, b.presence)
        assert (a.step, a.count, a.nonfinite, a.masked) == (b.step, b.count, b.nonfinite, b.masked)
        assert close([a.total, a.weight, a.divisor, a.contribution], [b.total, b.weight, b.divisor, b.contribution])


def compared(net, x, y, compiled=None, programs_made=1, tolerance=1e-5, **options):
    plain, jitted = (fitted(jit, net, x, y, compiled, **options) for jit in (False, True))
    assert len(programs(jitted[0])) == programs_made and jitted[2] == plain[2]
    check_same(plain, jitted, tolerance)
    return jitted


def test_the_compiled_step_is_the_plain_one():
    # Weights, mask, a last batch that is filled up, clipping, a penalty, an average, metrics, samples, rows of steps, a
    # rate that changes, and a step that is left out: one program.
    x = X.clone()
    x[3, 0] = float("nan")
    model, history, _ = compared(
        network(),
        x,
        SOME,
        {
            "loss": L.BinaryCrossentropy(from_logits=True),
            "clip_norm": 0.1,
            "regularizers": {"*.weight": "l2"},
            "ema": 0.9,
            "metrics": ["binary_accuracy"],
            "on_nonfinite": "skip",
        },
        sample_weight=WEIGHT,
        mask=MASK,
        samples=N,
        ledger_steps=2,
        callbacks=[ll.callbacks.LearningRateScheduler(lambda epoch: 0.01 / (epoch + 1))],
    )
    assert history.ledger.rows[0].nonfinite > 0
    assert model.optimizer.param_groups[0]["lr"] == 0.005
    # A second call goes on with the same program.
    before = copy.deepcopy(model.net.state_dict())
    model.fit(X, SOME, sample_weight=WEIGHT, mask=MASK, batch_size=SIZE, verbose=0)
    assert len(programs(model)) == 1
    assert not any(close(a, b) for a, b in zip(before.values(), model.net.state_dict().values(), strict=True))


def test_what_is_not_finite_is_raised_before_it_reaches_the_weights():
    messages, weights = [], []
    x = X[:48].clone()
    x[40] = float("inf")
    for jit in (False, True):
        model = ll.Model(network())
        model.compile("sgd", "mse", jit=jit)
        with pytest.raises(NonFiniteError) as error:
            model.fit(x, REAL[:48], batch_size=SIZE, shuffle=False, verbose=0, checks="off")
        messages.append(str(error.value))
        weights.append(model.net.state_dict())
        assert not jit or len(programs(model)) == 1
    assert messages[0] == messages[1]
    assert all(close(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


REFUSED = {
    "Rprop is none of the optimizers": ({"optimizer": lambda p: O.Rprop(p)}, {}),
    "reproducible totals": ({"reproducible": True}, {}),
    # The last step is of one batch.
    "a step of several batches": ({}, {"accumulate": 3}),
    "tensors as rates": ({"optimizer": lambda p: O.Adam(p, torch.tensor(0.01))}, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_compiled_runs_as_it_is_and_says_so_once(reason):
    compiled, options = REFUSED[reason]
    plain, jitted = (fitted(jit, network(), X, REAL, {"loss": "mse", **compiled}, **options) for jit in (False, True))
    check_same(plain, jitted)
    assert [reason in text for text in jitted[2]] == [True] and programs(jitted[0]) == []


class Remembering(nn.Linear):
    """Writes to itself in every forward."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Branching(nn.Linear):
    """Looks at values."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Recurrent(nn.RNN):
    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Recurrent, "recurrent layers"),
        (Remembering, "Remembering writes to its attribute 'last'"),
        (Branching, "the step cannot be traced"),
    ],
)
def test_a_model_that_cannot_be_traced_runs_as_it_is(net, reason):
    made = net(3, 3)
    plain, jitted = (fitted(jit, made, X, REAL, {"loss": "mse"}, samples=48) for jit in (False, True))
    check_same(plain, jitted)
    assert [reason in text for text in jitted[2]] == [True] and programs(jitted[0]) == []
    assert type(getattr(jitted[0].net, "last", X)) is torch.Tensor


def test_without_a_compiler_steps_run_as_they_are(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(config, "fx_graph_cache", False)
    # A program of its own, which no cache of an earlier run holds compiled.
    net, x, y = nn.Linear(19, 1), drawn(N, 19), drawn(N, 1)
    plain, jitted = (fitted(jit, net, x, y, {"loss": "mse"}, samples=48) for jit in (False, True))
    check_same(plain, jitted)
    assert ["no C++ compiler was found" in text for text in jitted[2]] == [True] and programs(jitted[0]) == []


def test_batch_norm_refuses_a_smaller_last_batch():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model = ll.Model(net)
    model.compile("sgd", "mse", jit=True)
    with pytest.raises(InputError, match=r"'1' normalizes .* batch of 4 cannot be filled up to the 16 .* jit=False"):
        model.fit(X, REAL, batch_size=SIZE, verbose=0)
    plan, data = model._compiled().plan, array_data(X, REAL)
    # Statistics that stand still, and steps that never come to the smaller batch.
    net[1].eval()
    plan.jit.begin(plan, Course(data, SIZE))
    net[1].train()
    plan.jit.begin(plan, Course(data, SIZE, steps=3))


def test_a_compiled_step_makes_few_python_calls():
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("calls.py")), "jit"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    # One of them is the program; a step in a loop of plain torch makes over a hundred.
    assert float(found.stdout) < 25


def test_jit_is_a_truth_value():
    with pytest.raises(InputTypeError, match="jit: expected True or False"):
        ll.Model(network()).compile(loss="mse", jit="yes")


def test_the_documented_optimizers_are_those_that_are_compiled():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    section = page[page.index("## Compiled steps") :]
    assert all(f"`{name}`" in section for name in supported())


# --- one program each: slow ---------------------------------------------------------------------------------------


class Adding(nn.Module):
    """Brings a loss of its own."""

    def __init__(self):
        super().__init__()
        self.inside = network()

    def forward(self, x):
        h = self.inside(x)
        ll.add_loss("size", h.square().mean(1))
        return h


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = network(1), network(3)

    def forward(self, x):
        return {"left": self.left(x), "right": self.right(x)}


def normalizing():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


def flat_groups(p):
    p = list(p)
    return O.Adam([{"params": p[:1], "lr": 0.1, "betas": (0.5, 0.9)}, {"params": p[1:]}], 0.01)


BCE = L.BinaryCrossentropy(from_logits=True)
# Net, targets, what is compiled, what is fitted.
CASES = {
    "sgd": (network, REAL, {"optimizer": "sgd", "loss": "mse"}, {}),
    "momentum": (network, REAL, {"optimizer": lambda p: O.SGD(p, 0.05, 0.9, nesterov=True, weight_decay=0.01)}, {}),
    "adamw": (network, REAL, {"optimizer": "adamw", "loss": "mae"}, {}),
    "amsgrad": (network, REAL, {"optimizer": lambda p: O.Adam(p, 0.01, amsgrad=True, maximize=True)}, {}),
    "several groups": (network, REAL, {"optimizer": flat_groups, "loss": "huber"}, {}),
    "adagrad": (network, REAL, {"optimizer": "adagrad"}, {}),
    "nadam": (network, REAL, {"optimizer": "nadam"}, {}),
    "rmsprop": (network, REAL, {"optimizer": lambda p: O.RMSprop(p, 0.01, momentum=0.5, centered=True)}, {}),
    "not gated": (network, REAL, {"on_nonfinite": "record"}, {}),
    "class weights": (
        network,
        LABELS,
        {"loss": L.SparseCategoricalCrossentropy(from_logits=True)},
        {"class_weight": {0: 2.0, 2: 0.5}},
    ),
    "dice over the batch": (network, SOME, {"loss": L.Dice(from_logits="sigmoid")}, {"sample_weight": WEIGHT}),
    "an expression": (network, SOME, {"loss": L.Dice(axis=1, from_logits="sigmoid") + 0.5 * BCE}, {"mask": MASK}),
    "lovasz": (network, SOME, {"loss": L.LovaszHinge()}, {}),
    "pairs of a batch": (network, LABELS, {"loss": L.SupervisedContrastive()}, {}),
    "weights divide": (
        network,
        REAL,
        {"loss": L.MeanSquaredError(reduction="mean_with_sample_weight")},
        {"sample_weight": WEIGHT},
    ),
    "a function": (network, REAL, {"loss": lambda t, p: ((t - p) ** 4).mean(-1)}, {}),
    "dropout": (lambda: network(inside=lambda: nn.Dropout(0.3)), REAL, {}, {"samples": 48}),
    "batch norm": (normalizing, REAL, {"optimizer": "sgd"}, {"samples": 48}),
    "an auxiliary loss": (Adding, REAL, {"loss_weights": {"size": 0.1}}, {"samples": 48}),
    "two outputs": (
        Heads,
        {"left": REAL[:, :1], "right": SOME},
        {"loss": {"left": "mse", "right": BCE}, "loss_weights": {"left": 0.3}, "metrics": {"left": ["mae"]}},
        {"sample_weight": {"right": WEIGHT}},
    ),
    "bfloat16": (network, REAL, {"precision": "bfloat16"}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_step_is_the_plain_one(case):
    net, y, compiled, options = CASES[case]
    compared(net(), X, y, {"loss": "mse", **compiled}, **options)


@pytest.mark.slow
def test_batches_of_an_iterable_are_filled_up_and_checked():
    def batches(sizes):
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [(X[end - size : end], SOME[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

    plain, jitted = (
        fitted(jit, network(), batches([16, 16, 4, 16]), None, {"loss": BCE}, batch_size=None) for jit in (False, True)
    )
    check_same(plain, jitted)
    # One for batches as they are, and one for those that are filled up.
    assert len(programs(jitted[0])) == 2 and jitted[2] == []
    before = copy.deepcopy(jitted[0].net.state_dict())
    with pytest.raises(InputError, match=r"targets must be in \[0, 1\]"):
        jitted[0].fit([(X[:16], SOME[:16] + 1)], verbose=0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), jitted[0].net.state_dict().values(), strict=True))


@pytest.mark.slow
def test_batch_norm_refuses_a_smaller_batch_of_an_iterable_and_takes_single_ones():
    model = ll.Model(normalizing())
    model.compile("sgd", "mse", jit=True)
    with pytest.raises(InputError, match="a batch of 4 cannot be filled up to the 16"):
        model.fit([(X[:16], REAL[:16]), (X[16:32], REAL[16:32]), (X[48:], REAL[48:])], verbose=0)
    numbers = [model.train_on_batch(X[:size], REAL[:size]) for size in (16, 4, 16)]
    # Of fit, with a ledger by class, and of two sizes of single batches.
    assert len(programs(model)) == 3 and all(number > 0 for number in numbers)


@pytest.mark.slow
def test_single_batches_are_those_of_the_plain_step():
    models = [ll.Model(network()) for _ in range(2)]
    for jit, model in enumerate(models):
        model.compile("adam", "mse", jit=bool(jit))
    for _ in range(3):
        assert close(*(model.train_on_batch(X, REAL, sample_weight=WEIGHT) for model in models))
    assert len(programs(models[1])) == 1
    assert all(close(a, b) for a, b in zip(models[0].net.parameters(), models[1].net.parameters(), strict=True))


@pytest.mark.slow
def test_class_weights_that_come_again_find_their_program():
    model = ll.Model(network())
    model.compile("adam", L.SparseCategoricalCrossentropy(from_logits=True), jit=True)
    for weights in ({0: 2.0}, {0: 2.0}, {0: 3.0}, {0: 2.0}):
        model.fit(X[:48], LABELS[:48], batch_size=SIZE, class_weight=weights, verbose=0)
    assert len(programs(model)) == 2
    assert programs(copy.deepcopy(model)) == []


@pytest.mark.slow
def test_numbers_of_the_optimizer_may_change_in_any_step():
    class Changing(ll.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            group = self.model.optimizer.param_groups[0]
            # Weight decay that begins asks for another program.
            group["lr"], group["weight_decay"] = 0.1 / (batch + 1), 0.1 * (batch > 1)

    def run(jit):
        return fitted(jit, network(), X, REAL, {"loss": "mse"}, samples=48, callbacks=[Changing()])

    plain, jitted = run(False), run(True)
    check_same(plain, jitted)
    assert len(programs(jitted[0])) == 2 and jitted[2] == []


@pytest.mark.slow
@pytest.mark.parametrize("metrics", [None, ["mae"]])
def test_a_run_that_is_resumed_is_bit_for_bit_the_one_that_was_not_interrupted(tmp_path, metrics):
    def run(name, stop=None, resume=False):
        model = ll.Model(network(inside=lambda: nn.Dropout(0.3)))
        model.compile("adam", "mse", jit=True, ema=0.9, metrics=metrics)
        torch.manual_seed(3)
        used = [ll.callbacks.BackupAndRestore(1), *([] if stop is None else [KillAfter(stop)])]
        options = {"epochs": 2, "batch_size": SIZE, "seed": 0, "verbose": 0, "callbacks": used}
        history = model.fit(X, REAL, run_dir=tmp_path / name, resume=resume, **options)
        state = model.optimizer.state_dict()["state"]
        return model.net.state_dict(), state, history.history, history.ledger.rows

    whole = run("whole")
    for stop in (2, 3, 6):
        with pytest.raises(Killed):
            run(f"{stop}", stop)
        weights, state, history, rows = run(f"{stop}", resume=True)
        assert all(torch.equal(a, weights[name]) for name, a in whole[0].items())
        assert all(torch.equal(a, state[p][name]) for p, slots in whole[1].items() for name, a in slots.items())
        assert (history, rows) == whole[2:]
