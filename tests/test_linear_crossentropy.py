"""LinearCrossentropy against the loss of logits that plain torch makes: values, gradients, tallies, memory."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch
from held import Held
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossledger as ll
from declarations import REDUCTIONS
from lossledger.errors import InputError, InputTypeError

L = ll.losses


def problem(seed, vocabulary=11, width=4, entries=(3, 5), bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, vocabulary, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(*entries, width, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, entries, generator=generator)
    return head, hidden, labels


def rows_of(head, rows):
    """A budget of so many rows of logits."""
    return rows * len(head.weight) * head.weight.dtype.itemsize


def oracle(head, hidden, labels, smoothing=0.0, z=0.0):
    """The loss of each entry, in NumPy, from the formula."""
    found = np.empty(labels.shape)
    weight = head.weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.detach().double().numpy()
    for place in np.ndindex(*labels.shape):
        scores = weight @ hidden[place].double().numpy() + bias
        high = scores.max()
        log_sum = high + math.log(sum(math.exp(s - high) for s in scores))
        right = scores[int(labels[place])]
        found[place] = log_sum - (1 - smoothing) * right - smoothing * scores.mean() + z * log_sum**2
    return found


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.1), (0.3, 0.05)])
def test_entries_are_those_of_the_formula(rows, bias, smoothing, z):
    head, hidden, labels = problem(1, bias=bias)
    loss = L.LinearCrossentropy(head, None, smoothing, z, rows_of(head, rows), reduction=None)
    assert loss(labels, hidden).detach().numpy() == pytest.approx(oracle(head, hidden, labels, smoothing, z), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.3, 0.05)])
def test_gradients_of_hidden_states_weight_and_bias(rows, smoothing, z):
    head, hidden, labels = problem(2)
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    weight = torch.rand(labels.shape, dtype=torch.float64)

    def value(hidden, matrix, bias):
        layer = nn.Linear(4, 11).double()
        del layer.weight, layer.bias
        layer.weight, layer.bias = matrix, bias
        loss = L.LinearCrossentropy(layer, None, smoothing, z, rows_of(layer, rows))
        return loss(labels, hidden, weight, mask)

    inputs = [t.detach().clone().requires_grad_() for t in (hidden, head.weight, head.bias)]
    assert torch.autograd.gradcheck(value, inputs)


def plain_gradients(loss_of_logits, head, hidden, labels, weight, mask):
    """Value and gradients through logits and autograd."""
    leaf = hidden.clone().requires_grad_()
    value = loss_of_logits(labels, head(leaf), weight, mask)
    wanted = [leaf, *head.parameters()]
    return value.detach(), torch.autograd.grad(value, wanted)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    reduction=st.sampled_from(REDUCTIONS),
    rows=st.integers(1, 20),
    bias=st.booleans(),
    ignored=st.booleans(),
    weighted=st.sampled_from([None, "sample", "token"]),
    masked=st.sampled_from([None, "some", "all"]),
    cut=st.integers(0, 4),
)
def test_a_step_is_that_of_the_loss_of_logits(seed, reduction, rows, bias, ignored, weighted, masked, cut):
    """Whole and in two unequal parts: value, gradient of hidden states, weight and bias, and the tally by class."""
    head, hidden, labels = problem(seed, entries=(4, 3), bias=bias)
    generator = torch.Generator().manual_seed(seed)
    if ignored:
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    shape = {None: None, "sample": (4,), "token": (4, 3)}[weighted]
    weight = None if shape is None else torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = None if masked is None else (torch.rand(4, 3, generator=generator) < (0.6 if masked == "some" else -1))
    ignore = -100 if ignored else None
    plain = L.SparseCategoricalCrossentropy(True, ignore, reduction)
    ours = L.LinearCrossentropy(head, ignore, chunk_bytes=rows_of(head, rows), reduction=reduction)
    value, gradients = plain_gradients(plain, head, hidden, labels, weight, mask)

    leaf = hidden.clone().requires_grad_()
    called = ours(labels, leaf, weight, mask)
    assert torch.isclose(called, value, rtol=1e-12, atol=1e-14)
    for found, expected in zip(torch.autograd.grad(called, [leaf, *head.parameters()]), gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-13)

    whole = plain.tally(labels, head(hidden).detach(), weight, mask, by="class")
    tally = ours.tally(labels, hidden, weight, mask, by="class")
    for ours_row, plain_row in zip(
        (tally.groups.total, tally.groups.count, tally.groups.weight),
        (whole.groups.total, whole.groups.count, whole.groups.weight),
        strict=True,
    ):
        assert torch.allclose(ours_row.double(), plain_row.double(), rtol=1e-12, atol=1e-13)

    parts = [slice(0, cut), slice(cut, 4)]
    head.zero_grad(set_to_none=True)
    sums, pulls = [], []
    for part in (p for p in parts if p.start < p.stop):
        w, m = (None if v is None else v[part] for v in (weight, mask))
        found, pull = ours.backprop(labels[part], hidden[part], w, m, window=whole, by="class")
        sums.append(found)
        pulls.append(pull)
    total = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    assert torch.isclose(total.value, value, rtol=1e-12, atol=1e-14)
    for found, expected in zip((torch.cat(pulls), *(p.grad for p in head.parameters())), gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), by=st.sampled_from(["sample", "label", "ids"]))
def test_groups_are_those_of_the_loss_of_logits(seed, by):
    head, hidden, labels = problem(seed, vocabulary=7)
    given_ids = torch.randint(3, labels.shape, generator=torch.Generator().manual_seed(seed))
    chosen = given_ids if by == "ids" else by
    expected = L.SparseCategoricalCrossentropy(True).tally(labels, head(hidden).detach(), by=chosen)
    found = L.LinearCrossentropy(head, chunk_bytes=rows_of(head, 4)).tally(labels, hidden, by=chosen)
    assert found.groups.keys == expected.groups.keys
    assert torch.allclose(found.groups.total, expected.groups.total, rtol=1e-12)
    assert torch.isclose(found.contributions().sum(), found.value.detach(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch_for_any_number_of_chunks(dtype):
    head, hidden, labels = problem(3, vocabulary=301, width=16, entries=(256, 4), dtype=dtype)
    exact = nn.Linear(16, 301).double()
    exact.load_state_dict({name: value.double() for name, value in head.state_dict().items()})

    def by_torch(layer, states):
        leaf = states.clone().requires_grad_()
        scores = layer(leaf)
        scores = scores if dtype == torch.float32 or scores.dtype == torch.float64 else scores.float()
        value = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        return [value.detach(), *torch.autograd.grad(value, [leaf, *layer.parameters()])]

    right = by_torch(exact, hidden.double())
    plain = by_torch(head, hidden)
    for rows in (32, 100, 1024):
        head.zero_grad(set_to_none=True)
        loss = L.LinearCrossentropy(head, chunk_bytes=rows * 301 * (4 if dtype == torch.float32 else 6))
        tally, pull = loss.backprop(labels, hidden)
        assert tally.numerator.dtype == torch.float32 and pull.dtype == dtype
        found = [tally.value, pull, *(p.grad for p in head.parameters())]
        for ours, theirs, true in zip(found, plain, right, strict=True):
            error, allowed = ((v.double() - true).norm() / true.norm() for v in (ours, theirs))
            # Below a rounding of the result itself there is nothing to compare.
            assert float(error) <= max(2 * float(allowed), torch.finfo(dtype).eps), (rows, float(error), float(allowed))


@pytest.mark.parametrize("vocabulary", [2_000, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_holds_inputs_and_gradients_and_one_chunk(vocabulary, dtype):
    width, entries, budget = 8, (32, 8), 2**20
    head, hidden, labels = problem(4, vocabulary, width, entries, bias=False, dtype=dtype)
    labels[::3] = -1
    loss = L.LinearCrossentropy(head, ignore_class=-1, chunk_bytes=budget)
    gc.collect()
    with Held() as held:
        loss.backprop(labels, hidden)
    size = dtype.itemsize
    gradients = size * (hidden.numel() + head.weight.numel())
    wide_copy = 0 if dtype == torch.float32 else 4 * head.weight.numel()
    # A few numbers a row: labels, indices, factors, values.
    rows = 200 * labels.numel()
    assert held.most <= gradients + wide_copy + budget + rows, (held.most, gradients, wide_copy, budget)
    # The same measure sees the logits of the plain loss: it would notice a copy.
    with Held() as plain:
        leaf = hidden.clone().requires_grad_()
        L.SparseCategoricalCrossentropy(True, -1)(labels, head(leaf)).backward()
    assert plain.most > labels.numel() * vocabulary * 4 > budget


def test_rows_that_are_left_out_are_never_read():
    head, hidden, labels = problem(5)
    mask = torch.ones(labels.shape, dtype=torch.bool)
    mask[0, 1] = False
    labels[1, 2] = -1
    loss = L.LinearCrossentropy(head, ignore_class=-1)
    value = loss(labels, hidden, mask=mask)
    hidden[0, 1], hidden[1, 2] = torch.nan, torch.inf
    assert torch.equal(loss(labels, hidden, mask=mask), value)
    tally, pull = loss.backprop(labels, hidden, mask=mask)
    assert int(tally.nonfinite) == 0 and int(tally.count) == 13
    assert bool((pull[0, 1] == 0).all()) and all(bool(p.grad.isfinite().all()) for p in head.parameters())


def test_a_row_that_is_not_finite_is_counted():
    head, hidden, labels = problem(6)
    hidden[0, 0] = torch.nan
    assert int(L.LinearCrossentropy(head).tally(labels, hidden).nonfinite) == 1


class Tokens(nn.Module):
    def __init__(self, logits, tied=False, vocabulary=13):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.logits = logits

    def forward(self, x):
        hidden = torch.tanh(self.body(self.embed(x)))
        return self.head(hidden) if self.logits else hidden


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fit_is_that_of_the_loss_of_logits(tied, accumulate, optimizer):
    tokens = torch.randint(13, (22, 7), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[::4, 3:] = -100
    fits = []
    for logits in (True, False):
        net = Tokens(logits, tied).double()
        loss = L.SparseCategoricalCrossentropy(True, -100) if logits else L.LinearCrossentropy(net.head, -100)
        model = ll.Model(net)
        model.compile(optimizer, loss, clip_norm=1.0)
        history = model.fit(x, y, batch_size=4, epochs=2, accumulate=accumulate, seed=3, verbose=0, checks="off")
        evaluated = model.evaluate(x, y, verbose=0)
        rows = len(history.ledger.rows)
        fits.append((history.history["loss"], evaluated, rows, dict(net.named_parameters())))
    plain, ours = fits
    assert ours[0] == pytest.approx(plain[0], rel=1e-12) and ours[1] == pytest.approx(plain[1], rel=1e-12)
    assert ours[2] == plain[2]
    for name, parameter in plain[3].items():
        assert torch.allclose(ours[3][name], parameter, rtol=1e-9, atol=1e-12), name


def test_under_autocast_hidden_states_are_narrower_than_the_weight():
    net = Tokens(False)
    model = ll.Model(net)
    model.compile("adam", L.LinearCrossentropy(net.head), precision="bfloat16")
    tokens = torch.randint(13, (8, 5), generator=torch.Generator().manual_seed(1))
    history = model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=4, epochs=3, verbose=0, checks="off", seed=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert net.head.weight.grad is None and net.head.weight.dtype == torch.float32


def test_a_frozen_head_gets_no_gradient():
    head, hidden, labels = problem(7)
    head.requires_grad_(False)
    _, pull = L.LinearCrossentropy(head).backprop(labels, hidden)
    assert head.weight.grad is None and bool(pull.any())


def test_a_large_vocabulary_has_rows_of_classes_only_when_asked():
    head, hidden, labels = problem(8, vocabulary=10_001)
    loss = L.LinearCrossentropy(head)
    assert loss.classes_are is None
    assert len(loss.tally(labels, hidden, by="label").groups) == 10_001
    with pytest.raises(InputError, match="cannot divide by 'class'"):
        loss.tally(labels, hidden, by="class")


def test_no_rows_at_all():
    head, hidden, labels = problem(9)
    tally, pull = L.LinearCrossentropy(head).backprop(labels[:0], hidden[:0])
    assert float(tally.value) == 0 and pull.shape == (0, 5, 4)


def test_class_weights_weigh_the_rows_of_their_label():
    head, hidden, labels = problem(10)
    weights = {2: 3.0, 5: 0.0}
    expected = L.SparseCategoricalCrossentropy(True).tally(labels, head(hidden).detach(), class_weight=weights)
    found = L.LinearCrossentropy(head).tally(labels, hidden, class_weight=weights)
    assert float(found.value.detach()) == pytest.approx(float(expected.value), rel=1e-12)


MISTAKES = {
    "head": (lambda head, h, y: L.LinearCrossentropy("linear"), InputTypeError, ("head", "nn.Linear", "str")),
    "a vector": (lambda head, h, y: L.LinearCrossentropy(torch.ones(3)), InputTypeError, ("[V, D]", "(3,)")),
    "smoothing": (lambda head, h, y: L.LinearCrossentropy(head, label_smoothing=1.0), InputError, ("1.0",)),
    "z": (lambda head, h, y: L.LinearCrossentropy(head, z_loss=-1), InputError, ("z_loss", "-1")),
    "bytes": (lambda head, h, y: L.LinearCrossentropy(head, chunk_bytes=-1), InputError, ("chunk_bytes", "-1")),
    "logits": (lambda head, h, y: L.LinearCrossentropy(head)(y, head(h)), InputError, ("hidden states", "(3, 5, 11)")),
    "label": (lambda head, h, y: L.LinearCrossentropy(head)(y + 9, h), InputError, ("0 to 10", "received")),
    "positions": (lambda head, h, y: L.LinearCrossentropy(head)(y[:, 1:], h), InputError, ("y_true", "(3, 5)")),
    "weight": (lambda head, h, y: L.LinearCrossentropy(head)(y, h, torch.ones(4)), InputError, ("sample_weight",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(name):
    make, error, words = MISTAKES[name]
    head, hidden, labels = problem(11)
    with pytest.raises(error) as caught:
        make(head, hidden, labels)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_configuration_names_the_shape_of_the_head():
    head, _, _ = problem(12)
    loss = L.LinearCrossentropy(head, label_smoothing=0.1)
    config = loss.get_config()
    assert config["head"] == [11, 4] and config["label_smoothing"] == 0.1
    again = L.LinearCrossentropy.from_config({**config, "head": head})
    assert again.get_config() == config and "label_smoothing=0.1" in repr(loss)
    with pytest.raises(InputTypeError, match="head"):
        L.LinearCrossentropy.from_config(config)
