"""Arrays in memory: divided into batches, made again from what was kept of them, checked against the model."""

from __future__ import annotations

import collections
import functools
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lossledger as ll
from lossledger.batch import leaves
from lossledger.errors import InputError, InputTypeError
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


def plain(arrays, size, order):
    """The batches, each gathered by itself."""
    ids = torch.arange(N) if order is None else order
    return [[part[one] for part in parts(arrays)] for one in ids.split(size)]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("size", [1, 4, 5, 23, 40])
@pytest.mark.parametrize("together", [1, 300, 2**20])
def test_batches_taken_together_are_those_taken_one_by_one(monkeypatch, shuffled, size, together):
    monkeypatch.setattr("lossledger.training.data.AT_ONCE_BYTES", together)
    monkeypatch.setattr("lossledger.training.data.AT_ONCE", 3)
    arrays = data()
    order = order_of(N, 5, 1) if shuffled else None
    whole = ll.Batch(arrays.x, arrays.y, arrays.sample_weight, arrays.mask, arrays.groups, torch.arange(N))
    expected = plain(whole, size, order)
    for taken in range(len(expected) + 1):
        found = list(arrays.batches(size, order, taken))
        assert len(found) == len(expected) - taken
        for batch, one in zip(found, expected[taken:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(parts(batch), one, strict=True))
            assert batch.size == len(one[0])


def test_a_run_that_goes_on_finds_its_batches_where_they_lay():
    arrays = array_data(torch.randn(100, 3), torch.randn(100, 1))
    order = order_of(100, 5, 1)
    offsets = [batch.x.storage_offset() for batch in arrays.batches(3, order)]
    assert len(set(offsets)) == 34
    for taken in (1, 7, 33):
        assert [batch.x.storage_offset() for batch in arrays.batches(3, order, taken)] == offsets[taken:]


def test_small_batches_are_gathered_together_and_large_ones_alone():
    def gathers(samples, features):
        arrays = array_data(torch.zeros(samples, features), torch.zeros(samples, 1))
        with Calls() as calls:
            list(arrays.batches(8, order_of(samples, 0, 0)))
        return calls.names.count("index_select")

    assert gathers(8 * 64, 4) == 2
    assert gathers(8 * 64, 2**15) == 2 * 64


class Calls(TorchDispatchMode):
    """The operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Writing(nn.Module):
    """Writes into its inputs, what autograd allows for tensors that are no views."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.add_(self.shift)


def test_a_model_that_writes_into_its_inputs_writes_into_no_other_batch():
    x = torch.zeros(8, 1)
    model = ll.Model(Writing())
    model.compile(lambda p: torch.optim.SGD(p, lr=0.0), "mse")
    assert model.fit(x, torch.ones(8, 1), batch_size=2, verbose=0, epochs=2).history["loss"] == [0.0, 0.0]
    assert torch.equal(x, torch.zeros(8, 1))


# --- predictions are written to their place --------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "a b")
FORMS = {
    "one": lambda x: x,
    "dict": lambda x: {"a": x, "b": x[:, :1].bool()},
    "ordered": lambda x: collections.OrderedDict(a=x, b=-x),
    "list": lambda x: [x, x.to(torch.bfloat16)],
    "tuple": lambda x: (x, None, {"c": x.unsqueeze(-1)}),
    "named": lambda x: Pair(x, x + 1),
    "numbers beside": lambda x: {"a": x, "n": x.sum()},
    "other rows": lambda x: {"a": x, "pairs": x.repeat(2, 1)},
    "more rows": lambda x: x.repeat_interleave(2, 0),
    "fewer rows": lambda x: x[:1],
    "widths": lambda x: {"a": x} if len(x) == 5 else {"a": x.double()},
}


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


def numbers(value):
    return list(leaves(value))


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_predictions_have_the_form_and_the_numbers_of_the_batches(form, steps):
    x, net = torch.randn(N, 3), Returns(FORMS[form])
    found = ll.Model(net).predict(x, batch_size=5, steps=steps)
    batches = [net(part) for part in x.split(5)[:steps]]
    expected = ll.Model(net).predict([(part,) for part in x.split(5)][:steps])
    assert type(found) is type(expected)
    for column, (array, other) in enumerate(zip(numbers(found), numbers(expected), strict=True)):
        joined = [numbers(batch)[column].float() for batch in batches]
        whole = torch.cat(joined) if joined[0].ndim else torch.stack(joined)
        np.testing.assert_array_equal(array.astype("float32"), whole.numpy())
        np.testing.assert_array_equal(array, other)
        assert array.dtype == other.dtype and array.flags.writeable


class Reusing(nn.Module):
    """Returns the same memory each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("room", torch.zeros(4, 3))

    def forward(self, x):
        return self.room.copy_(x)


def test_a_model_may_return_the_same_memory_each_time():
    x = torch.randn(12, 3)
    np.testing.assert_array_equal(ll.Model(Reusing()).predict(x, batch_size=4), x.numpy())


def test_predictions_take_the_memory_of_one_result():
    x = torch.randn(2**16, 16)
    with Calls() as calls:
        found = ll.Model(nn.Identity()).predict(x, batch_size=2**13)
    assert found.nbytes == x.nbytes and calls.names.count("empty") == 1 and "cat" not in calls.names


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


# Beyond those of its steps; measured with some room: 1155, 614 and 231.
FIXED_BUDGET = {"fit": 1170, "evaluate": 625, "predict": 240}


def test_a_second_call_makes_few_python_calls():
    """What a call costs beside its steps is Python's."""
    script = str(Path(__file__).with_name("fixed_calls.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(zip(FIXED_BUDGET, map(float, done.stdout.split()), strict=True))
    assert {name: found[name] for name, most in FIXED_BUDGET.items() if found[name] > most} == {}


class ByName(nn.Module):
    """A model of inputs that are called as those of many language models, and of one that is called otherwise."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)

    def forward(self, input_ids, attention_mask=None):
        found = self.embed(input_ids.long())
        return found if attention_mask is None else found * attention_mask[..., None]


IDS, LABELS = torch.arange(20).reshape(5, 4) % 7, torch.arange(20).reshape(5, 4) % 3
KEYED = {
    "x and y": ({"x": IDS, "y": LABELS}, "lossledger.Batch(b['x'], b['y'])"),
    "with weights": (
        {"sample_weight": torch.arange(5.0), "label": LABELS, "image": IDS},
        "lossledger.Batch(b['image'], b['label'], b['sample_weight'])",
    ),
    "of a tokenizer": (
        collections.UserDict(input_ids=IDS, attention_mask=torch.ones(5, 4), labels=LABELS),
        "lossledger.Batch({key: b[key] for key in ('input_ids', 'attention_mask')}, b['labels'])",
    ),
    "unknown names": ({0: IDS, 1: LABELS}, "lossledger.Batch(b[0], b[1])"),
}


@pytest.mark.parametrize("name", KEYED)
def test_a_batch_that_is_a_dict_is_refused_with_the_line_that_makes_it_one(name):
    keyed, made = KEYED[name]
    samples = [{key: keyed[key][i] for key in keyed} for i in range(5)]
    model = ll.Model(ByName())
    model.compile("sgd", ll.losses.SparseCategoricalCrossentropy(from_logits=True))
    loader = functools.partial(torch.utils.data.DataLoader, samples, batch_size=2)
    calls = {
        "loader": lambda: model.fit(loader(), verbose=0),
        "list": lambda: model.fit([dict(keyed)], verbose=0),
        "generator": lambda: model.evaluate(iter([keyed]), verbose=0),
        "validation": lambda: model.fit([(IDS, LABELS)], validation_data=loader(), verbose=0),
        "window": lambda: ll.Objective("mse").window([keyed]).__enter__(),
    }
    for call in calls.values():
        with pytest.raises(InputTypeError, match="batch 0: Data is expected to be in format") as caught:
            call()
        assert f"with the keys {', '.join(map(repr, keyed))}. " in str(caught.value) and made in str(caught.value)
        names = {"torch": torch, "lossledger": ll}
        exec(str(caught.value).partition("for example: ")[2], names)
        history = model.fit(loader(collate_fn=names["collate"]), verbose=0)
        assert history.ledger.rows[0].count == 20


def test_a_dict_without_targets_is_refused():
    model = ll.Model(nn.Linear(3, 1))
    model.compile("sgd", "mse")
    for item, said in (({}, "without keys"), ({"x": torch.ones(2, 3)}, "with the keys 'x'. Give inputs and targets")):
        with pytest.raises(InputTypeError, match=f"received dict {said}"):
            model.fit([item], verbose=0)
