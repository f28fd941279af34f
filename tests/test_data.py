"""Arrays in memory: divided into batches, made again from what was kept of them, checked against the model."""

from __future__ import annotations

import functools
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import lossledger as ll
from lossledger.batch import leaves
from lossledger.errors import InputError
from lossledger.training.data import IterableData, array_data, order_of, with_groups
from lossledger.training.known import form_of
from lossledger.values import check_probabilities

N = 23


def data(x=None):
    g = torch.Generator().manual_seed(0)
    x = {"left": torch.randn(N, 3, generator=g), "right": torch.randn(N, 2, 2, generator=g)} if x is None else x
    y = [torch.randint(0, 3, (N,), generator=g), torch.randn(N, 1, generator=g)]
    found = array_data(x, y, torch.rand(N, generator=g), (torch.rand(N, generator=g) < 0.8,) * 2)
    return with_groups(found, {"site": [f"s{i % 4}" for i in range(N)]})


def parts(batch):
    return list(leaves([batch.x, batch.y, batch.sample_weight, batch.mask, batch.groups, batch.ids]))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_batch_is_made_again_from_what_was_kept_of_it(shuffled):
    arrays = data()
    order = order_of(N, 5, 1) if shuffled else None
    batches = list(arrays.batches(4, order))
    kept = [arrays.kept(batch) for batch in batches]
    told = [[part.clone() for part in parts(batch)] for batch in batches]
    again = [arrays.again(one) for one in kept]
    assert [type(b.x) for b in again] == [dict] * 6 and type(again[0].mask) is tuple
    for before, after in zip(told, map(parts, again), strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))
        assert len(before) == len(after) == 9


def test_what_is_kept_of_a_batch_holds_none_of_its_arrays():
    arrays = data()
    batch = next(arrays.batches(4, order_of(N, 5, 1)))
    held = [weakref.ref(part) for part in parts(batch)[:-1]]
    kept = arrays.kept(batch)
    del batch
    assert not any(ref() is not None for ref in held)
    assert arrays.again(kept).size == 4


def test_batches_of_an_iterable_are_kept_whole():
    source = [ll.Batch(torch.ones(2, 3), torch.ones(2, 1))]
    iterable = IterableData(source, torch.float32)
    batch = next(iterable.batches(1, None))
    assert iterable.again(iterable.kept(batch)) is batch


# --- what the model returns is asked once ----------------------------------------------------------------------------


class Changing(nn.Module):
    """Returns more or fewer columns, as its attribute says, and counts its forwards."""

    def __init__(self, columns=4):
        super().__init__()
        self.layer, self.columns, self.sizes = nn.Linear(3, 4), columns, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.layer(x)[:, : self.columns]


def compiled(net, loss=None):
    model = ll.Model(net)
    model.compile("sgd", ll.losses.SparseCategoricalCrossentropy(from_logits=True) if loss is None else loss)
    return model


def labelled(labels=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, generator=g, dtype=dtype), torch.arange(12) % labels


def test_the_model_is_asked_for_its_outputs_once_for_inputs_of_a_form():
    model, (x, y) = compiled(Changing()), labelled()
    model.fit(x, y, batch_size=6, validation_split=0.5, verbose=0)
    assert model.net.sizes == [2, 6, 6]
    model.fit(x, y, batch_size=6, validation_data=(x, y), verbose=0)
    model.evaluate(x, y, batch_size=12, verbose=0)
    assert model.net.sizes[3:] == [6, 6, 6, 6, 12]
    model.evaluate(x.repeat(2, 1), y.repeat(2), batch_size=24, verbose=0)
    assert model.net.sizes[8:] == [24]


@pytest.mark.parametrize("call", ["fit", "evaluate"])
def test_targets_are_checked_against_what_a_changed_model_returns_now(call):
    model, (x, y) = compiled(Changing()), labelled()
    run = functools.partial(getattr(model, call), batch_size=12, verbose=0)
    run(x, y)
    model.net.columns = 2
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises(InputError, match="labels must be integers from 0 to 1; received 2"):
        run(x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    run(x, y % 2)
    # The label that does not fit comes after the first batch, which alone is seen before the weights change.
    model.net.columns = 4
    run(x, y % 2)
    model.net.columns = 2
    with pytest.raises(InputError, match="labels must be integers from 0 to 1; received 2"):
        getattr(model, call)(
            x, y.sort().values, batch_size=4, verbose=0, **({"shuffle": False} if call == "fit" else {})
        )
    if call == "fit":
        assert all(torch.isfinite(value).all() for value in model.net.state_dict().values())


@pytest.mark.parametrize("call", ["fit", "evaluate"])
def test_data_that_fit_a_changed_model_alone_are_taken(call):
    model, (x, y) = compiled(Changing(2)), labelled()
    run = functools.partial(getattr(model, call), batch_size=12, verbose=0)
    run(x, y % 2)
    model.net.columns = 4
    run(x, y)
    model.net.columns = 3
    run(x, y % 3)


def test_validation_data_that_fit_a_changed_model_alone_are_taken():
    model, (x, y) = compiled(Changing(2)), labelled()
    model.fit(x, y % 2, batch_size=12, verbose=0)
    model.net.columns = 4
    model.fit(x, y % 2, batch_size=12, validation_data=(x, y), verbose=0)
    model.net.columns = 2
    with pytest.raises(InputError, match=r"validation data: .*labels must be integers from 0 to 1; received 2"):
        model.fit(x, y % 2, batch_size=12, validation_data=(x, y), verbose=0)


def test_a_form_of_inputs_is_its_structure_shapes_and_dtypes():
    model, (x, y) = compiled(nn.Linear(3, 4).double()), labelled(dtype=torch.float64)
    model.evaluate(x, y, verbose=0)
    assert len(model._compiled().known) == 1
    forms = [x, x[:5], x.float(), {"a": x}, {"b": x}, (x, x), [x, x], x.reshape(12, 3, 1)]
    assert len({form_of(one) for one in forms}) == len(forms) - 1
    known = next(iter(model._compiled().known.values()))
    assert known[""].shape == (2, 4) and known[""].untyped_storage().nbytes() == 8


def test_targets_of_many_samples_are_checked_in_parts_that_bound_the_memory(monkeypatch):
    monkeypatch.setattr("lossledger.objective.objective.CHECKED_AT_ONCE", 16)
    sizes = []
    align = ll.losses.SparseCategoricalCrossentropy.align
    monkeypatch.setattr(
        ll.losses.SparseCategoricalCrossentropy,
        "align",
        lambda self, y, *rest: sizes.append(len(y)) or align(self, y, *rest),
    )
    model, (x, y) = compiled(nn.Linear(3, 4)), labelled()
    y[9] = 7
    with pytest.raises(InputError, match=r"received 7 at position \(1,\) .*Positions count from sample 8\."):
        model.evaluate(x, y, verbose=0)
    assert sizes == [4, 4, 4]


def test_a_prediction_repeated_without_memory_is_looked_at_once():
    repeated = torch.tensor([[0.5, 1.5]]).expand(1000, 2)
    with pytest.raises(InputError, match=r"received 1.5 \(1 outside in all\)"):
        check_probabilities(repeated, "here")
    check_probabilities(torch.rand(1, 3).expand(4, 3), "here")


# Beyond those of its steps; measured with some room: 1005, 593 and 236.
FIXED_BUDGET = {"fit": 1025, "evaluate": 610, "predict": 250}


def test_a_second_call_makes_few_python_calls():
    """What a call costs beside its steps is Python's."""
    script = str(Path(__file__).with_name("fixed_calls.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(zip(FIXED_BUDGET, map(float, done.stdout.split()), strict=True))
    assert {name: found[name] for name, most in FIXED_BUDGET.items() if found[name] > most} == {}
