"""The updates of compiled steps are those of torch.optim, for every optimizer and option that has a rule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lossledger.training import updates

O = torch.optim
OPTIMIZERS = {
    "sgd": lambda p: O.SGD(p, 0.1),
    "sgd, momentum": lambda p: O.SGD(p, 0.1, 0.9, dampening=0.2, weight_decay=0.1),
    "sgd, nesterov": lambda p: O.SGD(p, 0.1, 0.9, nesterov=True, maximize=True),
    "adam": lambda p: O.Adam(p, 0.01, (0.5, 0.9), weight_decay=0.1),
    "amsgrad": lambda p: O.Adam(p, 0.01, amsgrad=True, maximize=True),
    "adamw": lambda p: O.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adamax": lambda p: O.Adamax(p, 0.01, weight_decay=0.1),
    "nadam": lambda p: O.NAdam(p, 0.01, weight_decay=0.1),
    "nadam, decoupled": lambda p: O.NAdam(p, 0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "rmsprop": lambda p: O.RMSprop(p, 0.01, weight_decay=0.1),
    "rmsprop, centered": lambda p: O.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: O.Adagrad(p, 0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: O.Adadelta(p, 0.5, weight_decay=0.1, maximize=True),
}


def slope(step):
    return torch.sin(torch.arange(5.0) * (step + 1)).double()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_that_of_torch(name):
    theirs = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([theirs])
    group = optimizer.param_groups[0]
    ours, state = None, {}
    for step in range(4):
        theirs.grad = slope(step)
        if step == 1:
            # Torch's first step makes the state.
            ours, state = theirs.detach().clone(), copy.deepcopy(dict(optimizer.state[theirs]))
        if ours is not None:
            rule = updates.rule_of(optimizer, group)
            values = tuple(group[number] for number in updates.names_of_numbers(optimizer))
            numbers = torch.tensor(updates.flat_numbers(values), dtype=torch.float64)
            count = state["step"].add_(1) if rule.counts else None
            before = [ours.clone(), *(state[slot].clone() for slot in rule.slots)]
            tensors = [ours, *(state[slot] for slot in rule.slots)]
            updates.update(rule, ours, theirs.grad, tensors[1:], count, numbers, torch.tensor(True))
            assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
            updates.update(rule, ours, theirs.grad, tensors[1:], count, numbers, torch.tensor(False))
        optimizer.step()
        group["lr"] *= 0.5
    torch.testing.assert_close(ours, theirs.detach())
    assert set(state) >= {slot for slot, value in optimizer.state[theirs].items() if value is not None}
    for slot, value in state.items():
        if value is not None:
            torch.testing.assert_close(value, optimizer.state[theirs][slot], check_dtype=False)


def test_all_that_have_rules_are_tested():
    tested = {type(make([nn.Parameter(torch.zeros(1))])).__name__ for make in OPTIMIZERS.values()}
    assert tested == set(updates.supported())
