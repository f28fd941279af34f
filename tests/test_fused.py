"""Steps by the fused kernels, called without torch.optim's preparations: bit for bit those of `optimizer.step`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import lossledger as ll
from lossledger.training.fused import FusedStep, clear_gradients

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, fused=True),
    "adam, flat": lambda p: torch.optim.Adam(p, 0.01, (0.5, 0.9), 1e-3, maximize=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.1, fused=True),
    "groups": lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], 0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, fused=True),
}
PREPARED = set(OPTIMIZERS) - {"amsgrad", "adagrad"}


def parameters():
    return [nn.Parameter(torch.linspace(-1, 1, n)) for n in (4, 3)]


def set_gradients(params, step, missing=()):
    for index, p in enumerate(params):
        p.grad = None if index in missing else torch.sin(p.detach() * (step + 1) + index)


class Pair:
    """The same optimizer twice: `ours` steps by FusedStep, `theirs` as torch does."""

    def __init__(self, make):
        self.ours, self.theirs = parameters(), parameters()
        self.optimizer, self.other = make(self.ours), make(self.theirs)
        self.step_ours = FusedStep(self.optimizer)
        self.steps = 0

    def step(self, bad=False, missing=()):
        for params in (self.ours, self.theirs):
            set_gradients(params, self.steps, missing)
        self.step_ours(torch.tensor(bad))
        self.other.found_inf, self.other.grad_scale = torch.tensor(float(bad)), None
        self.other.step()
        del self.other.found_inf, self.other.grad_scale
        self.steps += 1

    def check(self):
        for a, b in zip(self.ours, self.theirs, strict=True):
            assert torch.equal(a, b)
            mine, other = self.optimizer.state.get(a, {}), self.other.state.get(b, {})
            assert list(mine) == list(other) and all(torch.equal(mine[name], other[name]) for name in mine)

    @property
    def direct(self):
        set_gradients(self.ours, 0)
        return self.step_ours._gradients() is not None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torch(name):
    pair = Pair(OPTIMIZERS[name])
    for step in range(6):
        pair.step(bad=step in (2, 4))
        pair.check()
        assert pair.direct == (name in PREPARED)


@pytest.mark.parametrize("name", sorted(PREPARED))
def test_changes_between_steps_are_seen(name):
    pair = Pair(OPTIMIZERS[name])
    pair.step()
    for optimizer in (pair.optimizer, pair.other):
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.param_groups[0]["weight_decay"] = 0.3
    pair.step()
    pair.check()
    for optimizer in (pair.optimizer, pair.other):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not pair.direct
    pair.step()
    pair.check()
    assert pair.direct
    pair.step(missing=(1,))
    pair.check()
    extra = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for params, optimizer, more in ((pair.ours, pair.optimizer, extra[0]), (pair.theirs, pair.other, extra[1])):
        optimizer.add_param_group({"params": [more], "lr": 0.2})
        params.append(more)
    for _ in range(3):
        pair.step()
        pair.check()
    assert pair.direct


def test_hooks_and_schedulers_are_served_by_the_step_of_torch():
    pair = Pair(OPTIMIZERS["adam"])
    pair.step()
    seen = []
    handle = pair.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    pair.step()
    handle.remove()
    handle = pair.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    pair.step()
    handle.remove()
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("all"))
    pair.step()
    handle.remove()
    assert seen == ["before", "after", "all", "all"]
    pair.step()
    assert len(seen) == 4 and pair.direct
    pair.check()
    # A scheduler warns when no step was counted before its own: warnings are errors here.
    scheduler = torch.optim.lr_scheduler.StepLR(pair.optimizer, 1)
    assert not pair.direct
    pair.step()
    scheduler.step()


def test_a_learning_rate_that_is_a_tensor_is_served_by_the_step_of_torch():
    pair = Pair(lambda p: torch.optim.Adam(p, torch.tensor(0.01), fused=True))
    for _ in range(3):
        pair.step()
        pair.check()
        assert not pair.direct


def test_gradients_are_cleared_as_zero_grad_does():
    params = parameters()
    set_gradients(params, 0)
    clear_gradients(torch.optim.SGD(params, 0.1))
    assert all(p.grad is None for p in params)

    class Keeping(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            """Keeps them."""

    set_gradients(params, 0)
    clear_gradients(Keeping(params, 0.1))
    assert all(p.grad is not None for p in params)


def test_fit_takes_the_direct_steps(monkeypatch):
    """Weights after `fit` are those of a loop of plain torch, and torch's own `step` ran once."""
    x, y = torch.randn(12, 3), torch.randn(12, 1)
    nets = [nn.Linear(3, 1), nn.Linear(3, 1)]
    nets[1].load_state_dict(nets[0].state_dict())
    steps = []
    original = torch.optim.Adam.step
    model = ll.Model(nets[0])
    model.compile(torch.optim.Adam(nets[0].parameters(), 0.01, fused=True), "mse")
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: steps.append(1) or original(self, *a))
    model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
    monkeypatch.undo()
    assert len(steps) == 1
    optimizer = torch.optim.Adam(nets[1].parameters(), 0.01, fused=True)
    for _ in range(3):
        for part in range(0, 12, 4):
            optimizer.zero_grad()
            (nets[1](x[part : part + 4]) - y[part : part + 4]).square().mean().backward()
            optimizer.step()
    assert torch.allclose(nets[0].weight, nets[1].weight, rtol=1e-5)


def test_a_direct_step_reads_nothing_on_the_host():
    pair = Pair(OPTIMIZERS["adam"])
    pair.step()
    set_gradients(pair.ours, 1)
    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    bad = torch.tensor(False)
    with Seen():
        pair.step_ours(bad)
    assert sorted(names) == ["_foreach_add_", "_fused_adam_", "_to_copy", "logical_not"]
