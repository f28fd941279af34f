"""Small batches whose tallies wait: ledger, weights and what callbacks see are those of tallies made at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lossledger as ll
from lossledger.training import waiting as waits

L, C = ll.losses, ll.callbacks
N = 210  # 70 batches of 3: more than wait at once, and some that wait at the end


def labels(g):
    return torch.randint(0, 4, (N,), generator=g)


def one_hot(g):
    return torch.eye(4)[labels(g)]


LOSSES = {
    "mse": ("mse", lambda g: torch.randn(N, 4, generator=g)),
    "huber, sum": (L.Huber(reduction="sum"), lambda g: torch.randn(N, 4, generator=g)),
    "binary": (L.BinaryCrossentropy(from_logits=True), one_hot),
    "sparse": (L.SparseCategoricalCrossentropy(from_logits=True), labels),
    "sparse, sum": (L.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"), labels),
    "categorical": (L.CategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"), one_hot),
    "two terms": (L.CategoricalCrossentropy(from_logits=True) + 0.5 * L.MeanSquaredError(), one_hot),
}
EXTRAS = {
    "plain": lambda g: {},
    "weights": lambda g: {"sample_weight": torch.rand(N, generator=g)},
    "class weights": lambda g: {"class_weight": {0: 2.0, 3: 0.25}},
    "both weights": lambda g: {"sample_weight": torch.rand(N, generator=g), "class_weight": [1.0, 0.0, 3.0, 0.5]},
    "mask": lambda g: {"mask": torch.rand(N, generator=g) < 0.7},
    "all": lambda g: {
        "sample_weight": torch.rand(N, generator=g),
        "mask": torch.rand(N, generator=g) < 0.7,
        "class_weight": [1.0, 0.0, 3.0, 0.5],
    },
}


NOTHING = {"SMALL": -1, "LARGE": -1}
# Outputs of small batches, and elements of losses with one an entry; of large ones only those.
WAITS = {"small": {}, "large": {"SMALL": 0}}


def trained(monkeypatch, wait, loss="mse", target=None, extras=None, **options):
    """Rows of the ledger and the weights after two epochs."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(N, 5, generator=g)
    y = torch.randn(N, 4, generator=g) if target is None else target(g)
    given = {} if extras is None else extras(g)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    model = ll.Model(net)
    model.compile(options.pop("optimizer", "adam"), loss, regularizers=options.pop("regularizers", None))
    with monkeypatch.context() as changed:
        for name, value in (wait if isinstance(wait, dict) else {} if wait else NOTHING).items():
            changed.setattr(waits, name, value)
        model.fit(x, y, batch_size=3, epochs=2, seed=1, verbose=0, checks="off", **given, **options)
    return model.ledger.rows, [p.detach().clone() for p in net.parameters()], model


def same_rows(rows, others, rel=2e-6):
    assert len(rows) == len(others) > 0
    for a, b in zip(rows, others, strict=True):
        assert (a.term, a.group, a.presence, a.epoch, a.count) == (b.term, b.group, b.presence, b.epoch, b.count)
        for name in ("total", "weight", "contribution", "divisor"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=rel, abs=1e-7), (a.term, a.group, name)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("case", LOSSES)
def test_the_ledger_is_that_of_tallies_made_at_once(monkeypatch, case, extras):
    loss, target = LOSSES[case]
    if "class_weight" in EXTRAS[extras](torch.Generator()) and case in ("mse", "huber, sum", "two terms"):
        pytest.skip("class weights are for classes")
    rows, weights, _ = trained(monkeypatch, True, loss, target, EXTRAS[extras])
    others, expected, _ = trained(monkeypatch, False, loss, target, EXTRAS[extras])
    same_rows(rows, others)
    # The gradients are the same numbers: only tallies wait.
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("size", WAITS)
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("case", ["sparse", "sparse, sum", "categorical", "two sparse"])
def test_what_waits_for_cross_entropies(monkeypatch, case, extras, size):
    """Elements wait where shapes alone divide and targets are few; otherwise small outputs do."""
    two = L.SparseCategoricalCrossentropy(from_logits=True) + 0.5 * L.SparseCategoricalCrossentropy(
        from_logits=True, name="again", ignore_class=1
    )
    loss, target = (two, labels) if case == "two sparse" else LOSSES[case]
    held = []
    tallies = waits.Kept.tallies

    def seen(self, *arguments):
        held.append(self.elements is not None)
        return tallies(self, *arguments)

    monkeypatch.setattr(waits.Kept, "tallies", seen)
    rows, weights, _ = trained(monkeypatch, WAITS[size], loss, target, EXTRAS[extras])
    alone = case in ("sparse", "sparse, sum") and "mask" not in EXTRAS[extras](torch.Generator())
    few = alone or (case == "categorical" and size == "small" and extras == "plain")
    assert set(held) == ({True} if few else {False} if size == "small" else set())
    others, expected, _ = trained(monkeypatch, False, loss, target, EXTRAS[extras])
    same_rows(rows, others)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_elements_that_wait_hold_no_outputs():
    """10,000 classes: the outputs of 64 batches of 32 would be 82 MB."""
    objective = ll.Objective(L.SparseCategoricalCrossentropy(from_logits=True))
    some = waits.Waiting.of(objective, "class", False)
    for _ in range(3):
        logits, y = torch.randn(32, 10_000), torch.randint(10_000, (32,))
        kept, pulled = some.pull(ll.Batch(logits, y), logits)
        assert kept.output.shape == logits.shape and kept.output.untyped_storage().nbytes() <= 64
        assert pulled.gradient.shape == logits.shape
        some.add(kept)
    first, *others = [one.untyped_storage().data_ptr() for batch in some._batches for one in batch.elements]
    assert first not in others and len(others) == 2 and len(set(others)) == 1
    tally = some.tallies()["sparse_categorical_crossentropy"]
    assert int(tally.count) == 96 and len(tally.groups) == 10_000


def test_batches_with_and_without_weights_take_turns():
    objective = ll.Objective(L.SparseCategoricalCrossentropy(from_logits=True))
    some = waits.Waiting.of(objective, "class", False)
    for weight in (None, torch.tensor([0.0, 2.0, 5.0]), None):
        logits, y = torch.randn(3, 4), torch.randint(4, (3,))
        kept, _ = some.pull(ll.Batch(logits, y, weight), logits)
        (made,) = kept.tallies(objective, "class").values()
        expected = objective.tallies(y, logits, weight)["sparse_categorical_crossentropy"]
        torch.testing.assert_close(made.numerator, expected.numerator)
        torch.testing.assert_close(torch.as_tensor(made.weight), torch.as_tensor(expected.weight))


def test_batches_of_changing_sizes_hold_what_they_are():
    """Room for many of each size would be 64 times that."""
    some = waits.Waiting.of(ll.Objective("mse"), "class", True)
    held = 0
    for size in (20, 21, 22, 21):
        output, y = torch.randn(size, 8), torch.randn(size, 8)
        kept, _ = some.pull(ll.Batch(output, y), output)
        held += kept.output.untyped_storage().nbytes() + kept.y_true.untyped_storage().nbytes()
    assert held == 2 * 4 * 8 * (20 + 21 + 22 + 21)


def test_batches_of_many_entries_do_not_wait():
    """64 batches of pictures would hold a gigabyte, for tallies that cost little beside their steps."""
    some = waits.Waiting.of(ll.Objective(L.SparseCategoricalCrossentropy(from_logits=True)), "class", False)
    for entries, wait in ((64, True), (2**13, True), (2**13 + 1, False)):
        logits, y = torch.randn(1, entries, 8), torch.randint(8, (1, entries))
        assert (some.pull(ll.Batch(logits, y), logits) is not None) is wait


def test_batches_do_wait(monkeypatch):
    sizes = []
    tallies = waits.Kept.tallies

    def seen(self, *arguments):
        sizes.append(len(self.output))
        return tallies(self, *arguments)

    monkeypatch.setattr(waits.Kept, "tallies", seen)
    trained(monkeypatch, True, callbacks=[])
    assert sizes.count(3 * waits.TOGETHER) == 2  # once an epoch; the rest is read where somebody looks


def test_looking_at_the_numbers_changes_none_of_them(monkeypatch):
    class Looks(C.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, batch, logs):
            self.seen.append(logs["loss"])

    looks = Looks()
    rows, weights, _ = trained(monkeypatch, True, callbacks=[looks])
    others, expected, _ = trained(monkeypatch, True)
    assert rows == others and all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    losses = Looks()
    trained(monkeypatch, False, callbacks=[losses])
    assert looks.seen == pytest.approx(losses.seen, rel=2e-6)
    assert len(looks.seen) == 140


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_penalties_are_counted_in_their_own_step(monkeypatch, optimizer):
    options = {"regularizers": {"0.weight": "l2"}, "optimizer": optimizer}
    rows, weights, _ = trained(monkeypatch, True, **options)
    others, expected, _ = trained(monkeypatch, False, **options)
    same_rows(sorted(rows, key=lambda r: (r.epoch, r.term)), sorted(others, key=lambda r: (r.epoch, r.term)))
    assert [row.term for row in rows] == [row.term for row in others]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_loader_may_write_its_next_batch_over_the_last():
    x, y = torch.randn(30, 5), torch.randn(30, 2)

    class Reuses:
        def __iter__(self):
            batch = torch.empty(3, 5), torch.empty(3, 2), torch.empty(3)
            for start in range(0, 30, 3):
                batch[0].copy_(x[start : start + 3])
                batch[1].copy_(y[start : start + 3])
                batch[2].fill_(1.0 + start)
                yield batch

    losses = []
    for data in (Reuses(), [(x[s : s + 3], y[s : s + 3], torch.full((3,), 1.0 + s)) for s in range(0, 30, 3)]):
        torch.manual_seed(0)
        model = ll.Model(nn.Linear(5, 2))
        model.compile("sgd", "mse")
        losses += [model.fit(data, verbose=0).history["loss"][0], model.evaluate(data, verbose=0)]
    assert losses[:2] == losses[2:]


def test_a_step_whose_elements_overflow_in_their_sum_is_left_out():
    model = ll.Model(nn.Linear(1, 1, bias=False))
    model.compile(lambda p: torch.optim.SGD(p, lr=0.0), L.MeanSquaredError(reduction="sum"))
    with pytest.raises(ll.errors.NonFiniteError, match="step 2"):
        # Each square is 2.5e38 and finite, and so is the gradient.
        model.fit(torch.ones(6, 1), torch.tensor([[0.0], [0.0], [0.0], [1.6e19], [1.6e19], [1.6e19]]), batch_size=3,
                  shuffle=False, verbose=0, checks="off")  # fmt: skip


def test_evaluation_waits_too(monkeypatch):
    _, _, model = trained(monkeypatch, True)
    x, y = torch.randn(N, 5), torch.randn(N, 4)
    found = model.evaluate(x, y, batch_size=3, verbose=0)
    with monkeypatch.context() as changed:
        changed.setattr(waits, "SMALL", -1)
        changed.setattr(waits, "LARGE", -1)
        assert found == pytest.approx(model.evaluate(x, y, batch_size=3, verbose=0), rel=1e-6)
    assert found == pytest.approx(float((model.predict(x, verbose=0) - y.numpy()).__pow__(2).mean()), rel=1e-6)


class Coupled(L.Loss):
    additive = False

    def call(self, y_true, y_pred):
        return (y_true - y_pred.mean(0)).square().mean(-1)


@pytest.mark.parametrize(
    "loss", [L.Dice(from_logits="sigmoid"), Coupled(), lambda y, z: (y - z).abs().mean(-1), {"a": "mse"}]
)
def test_what_needs_its_tally_at_once_does_not_wait(loss):
    assert waits.Waiting.of(ll.Objective(loss), "class", False) is None


def test_arrays_of_another_shape_begin_anew():
    objective = ll.Objective("mse")
    some = waits.Waiting.of(objective, "class", False)
    total = 0
    for length in (2, 2, 5, 5, 2):
        y, z = torch.zeros(3, length, 1), torch.ones(3, length, 1)
        full = some.add(some.kept(ll.Batch(z, y), z))
        total += int(full["mean_squared_error"].count) if full else 0
    assert total == 12 + 30
    assert int(some.tallies()["mean_squared_error"].count) == 6


def test_what_waits_goes_into_a_checkpoint_and_comes_back():
    objective = ll.Objective("mse")
    some, other = waits.Waiting.of(objective, "class", False), waits.Waiting.of(objective, "class", False)
    for size in (3, 1, 2):
        y, z = torch.randn(size, 2), torch.randn(size, 2)
        some.add(some.kept(ll.Batch(z, y, torch.rand(size)), z))
    other.load_state_dict(some.state_dict(), torch.device("cpu"))
    assert len(other) == 3
    mine, theirs = some.tallies()["mean_squared_error"], other.tallies()["mean_squared_error"]
    assert torch.equal(mine.numerator, theirs.numerator) and torch.equal(mine.weight, theirs.weight)
    labelled = ll.Objective(L.SparseCategoricalCrossentropy(from_logits=True))
    some, again = waits.Waiting.of(labelled, "class", False), waits.Waiting.of(labelled, "class", False)
    for size in (3, 1, 2):
        z = torch.randn(size, 5)
        some.add(some.pull(ll.Batch(z, torch.randint(5, (size,))), z)[0])
    again.load_state_dict(some.state_dict(), torch.device("cpu"))
    assert len(again) == 3
    mine, theirs = (one.tallies()["sparse_categorical_crossentropy"] for one in (some, again))
    assert torch.equal(mine.numerator, theirs.numerator) and torch.equal(mine.groups.total, theirs.groups.total)
    empty = waits.Waiting.of(objective, "class", False)
    other.load_state_dict(empty.state_dict(), torch.device("cpu"))
    assert len(other) == 0 and other.tallies() == {}


@pytest.mark.parametrize("weight", [None, (6,), (6, 5)], ids=str)
@pytest.mark.parametrize("classes", [None, [1.0, 0.5, 0.0, 3.0]], ids=["alike", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_further_batches_of_a_shape_have_the_gradient_of_the_first(dtype, classes, weight):
    """The first is aligned; what holds for its shape is known for the next."""
    g = torch.Generator().manual_seed(1)
    objective = ll.Objective(
        0.5 * L.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"), class_weight=classes
    )
    y, z = torch.randint(4, (6, 5), generator=g), torch.randn(6, 5, 4, generator=g, dtype=dtype)
    w = None if weight is None else torch.rand(weight, generator=g)
    some = waits.Waiting.of(objective, "class", False)
    pulls = [some.pull(ll.Batch(z, y, w), z.clone()) for _ in range(2)]
    assert all(kept.elements is not None for kept, _ in pulls)
    assert torch.equal(pulls[0][1].gradient, pulls[1][1].gradient)
    expected, gradient = objective.terms[0].loss, z.clone().requires_grad_()
    tally = expected.tally(y, gradient, w, class_weight=classes, by="class")
    (found,) = torch.autograd.grad(0.5 * tally.value, gradient)
    torch.testing.assert_close(pulls[1][1].gradient, found)
    for kept, _ in pulls:
        some.add(kept)
    both = some.tallies()["sparse_categorical_crossentropy"]
    torch.testing.assert_close(both.value, 2 * tally.value.detach())
    torch.testing.assert_close(both.groups.total, 2 * tally.groups.total.detach())
