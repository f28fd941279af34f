"""A window of micro-batches has the value and the gradient of one big batch, however it is split."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import inputs
import lossledger as ll
from calls import counted
from declarations import AXES, OVERLAPS, REDUCTIONS, ROWS
from lossledger.forward import run_forward
from window_laws import TOLERANCE, Noise, Table, gradients, norm

L = ll.losses
LOGITS = {"from_logits": True}
# CTC has one value a sample, and two steps spell too little for it: it has a test of its own.
BY_ENTRY = [row for row in ROWS if row.name != "ctc"]


def parts_of(x, y, weight, mask, sizes):
    """Batches of the given sizes."""

    def cut(value, start, stop):
        return None if value is None else {name: v[start:stop] for name, v in value.items()}

    stops = np.cumsum(sizes).tolist()
    return [
        ll.Batch(x[a:b], cut(y, a, b), cut(weight, a, b), cut(mask, a, b))
        for a, b in zip([0, *stops], stops, strict=False)
    ]


def check_against_one_batch(objective, net, batches, whole, tolerance):
    expected = objective(whole.y, run_forward(net, whole.x, None, "cpu"), whole.sample_weight, whole.mask, model=net)
    expected.backward()
    wanted = gradients(net)
    net.zero_grad()
    scale, before = 0.0, gradients(net)
    with objective.window(batches, model=net) as window:
        for batch in window:
            window.backward(net(batch.x))
            after = gradients(net)
            scale += norm([a - b for a, b in zip(after, before, strict=True)])
            before = after
    size = sum(abs(float(t.contribution)) for t in expected.terms.values())
    # The gradient of a ratio is a difference of parts of the size of the loss, and is rounded as they are.
    scale += size
    found = gradients(net)
    assert norm([a - b for a, b in zip(found, wanted, strict=True)]) <= tolerance * scale
    b = window.breakdown
    assert list(b.terms) == list(expected.terms)
    for name, term in b.terms.items():
        assert abs(float(term.value - expected.terms[name].value)) <= 2 * tolerance * max(size, 1e-30), name
    assert abs(b.value - expected.value) <= 2 * tolerance * size
    return window


def draw_output(data, rng, samples):
    """A loss with its target and output: any row of the loss suites, or an overlap loss."""
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    if data.draw(st.booleans()):
        row = data.draw(st.sampled_from(BY_ENTRY))
        return row.make(reduction=reduction), *row.inputs(rng, (samples, 2))
    make, _ = OVERLAPS[data.draw(st.sampled_from(sorted(OVERLAPS)))]
    axis = AXES[data.draw(st.sampled_from(sorted(AXES)))]
    y, p = inputs.binary_probabilities(rng, (samples, 2))
    # Without any target an overlap loss is flat, and its gradient nothing but rounding.
    y = 0.1 + 0.8 * y
    loss = make(axis=axis, reduction=data.draw(st.sampled_from(["sum_over_batch_size", "sum"])))
    return (0.5 * loss + L.BinaryCrossentropy(reduction=reduction)) if data.draw(st.booleans()) else loss, y, p


@given(st.data())
def test_any_objective_split_in_any_way_is_one_batch(data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    samples = sum(sizes)
    losses, y, outputs, weight, mask, classes = {}, {}, {}, {}, {}, {}
    for name in "abc"[: data.draw(st.integers(1, 3))]:
        loss, true, pred = draw_output(data, rng, samples)
        losses[name] = loss
        true = torch.as_tensor(true)
        y[name] = true.to(dtype) if true.is_floating_point() else true
        outputs[name] = torch.as_tensor(pred).to(dtype)
        if data.draw(st.booleans()):
            weight[name] = torch.as_tensor(rng.uniform(0, 3, (samples, 2)[: data.draw(st.integers(1, 2))])).to(dtype)
        if data.draw(st.booleans()):
            mask[name] = torch.as_tensor(rng.random((samples, 2)[: data.draw(st.integers(1, 2))]) < 0.6)
        if isinstance(loss, L.Loss) and loss.classes_are in ("column", "label") and data.draw(st.booleans()):
            classes[name] = {0: 2.0, 2: 0.5}
    aux = data.draw(st.booleans())
    objective = ll.Objective(
        losses,
        loss_weights={next(iter(losses)): 0.3} | ({"size": 0.1} if aux else {}),
        regularizers={"*": "l2"} if data.draw(st.booleans()) else None,
        class_weight=classes or None,
    )
    net = Table(outputs, aux)
    x = torch.arange(samples)
    whole = ll.Batch(x, y, weight or None, mask or None)
    check_against_one_batch(
        objective, net, parts_of(x, y, weight or None, mask or None, sizes), whole, TOLERANCE[dtype]
    )


# --- modules with state of their own -------------------------------------------------------------------------------


def mlp(*extra, outputs=2, dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), *extra, nn.Tanh(), nn.Linear(5, outputs)).to(dtype)


def points(samples=10, outputs=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=g, dtype=torch.float64)
    return x, (torch.rand(samples, outputs, generator=g) < 0.4).double()


def cut(x, y, *stops):
    return [(x[a:b], y[a:b]) for a, b in zip((0, *stops), (*stops, len(x)), strict=True)]


dice = L.Dice(from_logits="sigmoid")
bce = L.BinaryCrossentropy(**LOGITS)


class Recorded(nn.Module):
    """Remembers the outputs of every forward, and whether gradients were on."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x):
        found = self.net(x)
        self.calls.append((found.detach().clone(), torch.is_grad_enabled()))
        return found


@pytest.mark.parametrize(("loss", "batches", "forwards"), [(bce, 3, 3), (dice, 1, 1), (dice, 3, 6), (bce + dice, 2, 4)])
def test_a_ratio_takes_two_rounds_where_there_are_several_batches(loss, batches, forwards):
    net, (x, y) = Recorded(mlp()), points()
    seen = []
    with ll.Objective(loss).window(cut(x, y, *range(2, 2 * batches, 2)), net) as window:
        for batch in window:
            seen.append(window.replaying)
            window.backward(net(batch.x))
    assert len(net.calls) == forwards
    assert seen == [forwards > batches and i >= batches for i in range(forwards)]
    assert [grad for _, grad in net.calls] == [forwards == batches or i >= batches for i in range(forwards)]
    assert torch.is_grad_enabled()


def test_what_a_window_asks_of_each_module_is_little():
    """Python calls that a window of two batches makes beside the forwards, for each layer of the model."""

    def beside(layers):
        net = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(layers)), nn.Linear(3, 2)).double()
        batches, objective = cut(*points(), 5), ll.Objective("mse")
        forwards = counted(lambda: [net(x) for x, _ in batches])
        objective.step(batches, net)
        return counted(lambda: objective.step(batches, net)) - forwards

    # Three walks, each of a few frames a module; asked by name for what Keras layers keep, it was 55.
    assert (beside(60) - beside(20)) / 40 <= 30


def test_the_second_round_draws_the_same_random_numbers():
    net, (x, y) = Recorded(mlp(nn.Dropout(0.5))), points()
    torch.manual_seed(7)
    b = ll.Objective(dice).step(cut(x, y, 3, 7), net)
    outputs = [o for o, _ in net.calls]
    for first, second in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(outputs[0][:3], net.net.eval()(x[:3]))
    after = torch.rand(3)
    torch.manual_seed(7)
    net.net.train()
    plain = [net.net(x[a:b_]) for a, b_ in ((0, 3), (3, 7), (7, 10))]
    assert torch.equal(after, torch.rand(3))
    torch.testing.assert_close(b.total, dice(y, torch.cat(plain)).detach(), rtol=1e-12, atol=0)


class Replayed(nn.Module):
    """The dropout masks that another module drew, on the whole batch."""

    def __init__(self, net, masks):
        super().__init__()
        self.net, self.masks = net, masks

    def forward(self, x):
        return self.net[3](self.net[2](self.net[0](x) * self.masks))


def test_the_gradient_with_dropout_is_that_of_the_masks_that_were_drawn():
    net, (x, y) = mlp(nn.Dropout(0.5)), points()
    masks = []
    hook = net[1].register_forward_hook(lambda _, args, out: masks.append((out / args[0]).detach()))
    objective = ll.Objective(bce + dice)
    objective.step(cut(x, y, 3, 7), net)
    hook.remove()
    found = gradients(net)
    net.zero_grad()
    objective(y, Replayed(net, torch.cat(masks[:3]))(x)).backward()
    for a, b in zip(found, gradients(net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [bce, dice])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_updated_once(loss, momentum):
    x, y = points()
    net, plain = mlp(nn.BatchNorm1d(5, momentum=momentum)), mlp(nn.BatchNorm1d(5, momentum=momentum))
    ll.Objective(loss).step(cut(x, y, 3, 7), net)
    for part, _ in cut(x, y, 3, 7):
        plain(part)
    assert int(net[1].num_batches_tracked) == 3
    assert torch.equal(net[1].running_mean, plain[1].running_mean)
    assert torch.equal(net[1].running_var, plain[1].running_var)


def test_a_model_that_is_another_function_in_the_second_round_is_refused():
    net, (x, y) = mlp(Noise()), points()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with pytest.raises(ll.errors.ReplayError, match="second round"):
        ll.Objective(dice).step(cut(x, y, 3), net)
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight)) and net[0].bias.grad is None
    ll.Objective(bce).step(cut(x, y, 3), net)


def test_keras_layers_are_replayed_with_their_seeds_and_statistics():
    import keras

    def made():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.layers.Input((3,)),
                keras.layers.Dense(8),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.3, seed=1),
                keras.layers.Dense(2),
            ]
        )

    x, y = (t.float() for t in points())
    net, plain = made(), made()
    with ll.Objective(dice).window(cut(x, y, 3, 7), net) as window:
        for batch in window:
            window.backward(net(batch.x, training=True))
    outputs = [plain(part, training=True) for part, _ in cut(x, y, 3, 7)]
    for a, b in zip(net.non_trainable_variables, plain.non_trainable_variables, strict=True):
        assert torch.equal(a.value, b.value)
    torch.testing.assert_close(window.breakdown.total, dice(y, torch.cat(outputs)).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_modes_of_modules_stay(training):
    net, (x, y) = mlp(nn.BatchNorm1d(5), nn.Dropout()).train(training), points()
    net[1].eval()
    ll.Objective(dice).step(cut(x, y, 3), net)
    assert [m.training for m in net] == [training, False, training, training, training]


# --- masks of the model, targets of several lengths ----------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", L.Dice(), "mse_sum"])
@pytest.mark.parametrize("own", [False, True])
def test_a_mask_that_only_the_model_knows_joins_that_of_the_data(loss, own):
    loss = L.MeanSquaredError(reduction="mean_per_sample") if loss == "mse_sum" else loss
    g = torch.Generator().manual_seed(0)
    y = torch.rand(7, 4, 3, generator=g, dtype=torch.float64)
    net = Table({"a": torch.rand(7, 4, 3, generator=g, dtype=torch.float64)})
    made = torch.rand(7, 4, generator=g) < 0.6
    given_mask = torch.rand(7, generator=g) < 0.7 if own else None
    objective = ll.Objective(loss)
    both = made if given_mask is None else made & given_mask[:, None]
    expected = objective(y, net(torch.arange(7))["a"], mask=both)
    expected.backward()
    wanted = gradients(net)
    net.zero_grad()
    batches = [
        ll.Batch(torch.arange(a, b), y[a:b], mask=None if given_mask is None else given_mask[a:b])
        for a, b in ((0, 2), (2, 3), (3, 7))
    ]
    with objective.window(batches, net) as window:
        for batch in window:
            window.backward(net(batch.x)["a"], mask=made[batch.x])
    assert window.replaying
    torch.testing.assert_close(window.breakdown.total, expected.total.detach(), rtol=1e-12, atol=0)
    for a, b in zip(gradients(net), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def test_a_mask_for_some_micro_batches_only_is_refused():
    net, (x, y) = mlp(), points()
    with pytest.raises(ll.errors.InputError, match="every micro-batch"):  # noqa: SIM117
        with ll.Objective(bce).window(cut(x, y, 3), net) as window:
            for i, batch in enumerate(window):
                window.backward(net(batch.x), mask=torch.ones(len(batch.x), 2) if i else None)


def test_one_batch_with_a_mask_of_the_model_takes_one_round():
    net, (x, y) = Recorded(mlp()), points()
    mask = torch.arange(10) % 3 > 0
    with ll.Objective(bce).window([(x, y)], net) as window:
        for batch in window:
            window.backward(net(batch.x), mask=mask)
    assert len(net.calls) == 1
    torch.testing.assert_close(window.breakdown.total, bce(y, net(x), mask=mask).detach(), rtol=1e-12, atol=0)


def test_masks_of_the_model_may_be_for_some_outputs():
    g = torch.Generator().manual_seed(0)
    outputs = {n: torch.rand(6, 3, 2, generator=g, dtype=torch.float64) for n in "ab"}
    y = {n: torch.rand(6, 3, 2, generator=g, dtype=torch.float64) for n in "ab"}
    own, made = {"a": torch.rand(6, generator=g) < 0.7}, {n: torch.rand(6, 3, generator=g) < 0.7 for n in "ab"}
    net, objective = Table(outputs), ll.Objective({"a": "mse", "b": "mae"})
    expected = objective(y, net(torch.arange(6)), mask={"a": own["a"][:, None] & made["a"], "b": made["b"]})
    batches = parts_of(torch.arange(6), y, None, own, [2, 1, 3])
    with objective.window(batches, net) as window:
        for batch in window:
            window.backward(net(batch.x), mask={n: m[batch.x] for n, m in made.items()})
    torch.testing.assert_close(window.breakdown.total, expected.total.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(9,), (10, 3)])
def test_masks_that_do_not_fit_each_other_are_refused(shape):
    net, (x, y) = mlp(), points()
    batch = ll.Batch(x, y, mask=torch.ones(10, 2, dtype=torch.bool))
    with pytest.raises(ll.errors.InputError, match="same leading axes"), ll.Objective(bce).window([batch]) as window:
        for one in window:
            window.backward(net(one.x), mask=torch.ones(shape))


def test_targets_of_several_lengths_are_counted_in_a_first_round():
    net, objective = mlp(), ll.Objective("mse")
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, t, 3, generator=g, dtype=torch.float64) for t in (4, 1, 6)]
    batches = [(x, x[..., :2]) for x in parts]
    b = objective.step(batches, net)
    found = gradients(net)
    net.zero_grad()
    flat = torch.cat([x.reshape(-1, 3) for x in parts])
    expected = (net(flat) - flat[:, :2]).square().mean()
    expected.backward()
    torch.testing.assert_close(b.total, expected.detach(), rtol=1e-12, atol=0)
    for a, e in zip(found, gradients(net), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)


def test_outputs_of_several_lengths_with_targets_of_one_divide_as_the_loss_says():
    """CTC divides by samples, whatever the number of steps."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, t, 4, generator=g, dtype=torch.float64) for t in (5, 7)]
    labels = torch.tensor([[1, 2], [3, 0]])
    net = nn.Linear(4, 4).double()
    b = ll.Objective("ctc").step([(x, labels) for x in rows], net)
    expected = sum(L.CTC()(labels, net(x)) for x in rows) / 2
    torch.testing.assert_close(b.total, expected.detach(), rtol=1e-12, atol=0)


def test_outputs_whose_shape_cannot_be_told_from_the_targets_are_refused():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * torch.ones(len(x), 2, int(x[0]))

    loss = L.FunctionLoss(lambda y, p: (p - y[:, :1, None]).square().mean(1), name="wide")
    batches = [(torch.full((2, 1), k), torch.zeros(2, 1)) for k in (3, 4)]
    with pytest.raises(ll.errors.InputError, match="Pad the outputs"):
        ll.Objective(loss).step(batches, Wide())


# --- what is refused -----------------------------------------------------------------------------------------------


def scalar(y_true, y_pred):
    return (y_true - y_pred).square().mean()


REFUSED = {
    "pairs": (lambda: L.Circle(), "compares the samples of a batch"),
    "scalar": (lambda: scalar, "one number for a batch"),
    "torch scalar function": (lambda: lambda y, p: nn.functional.mse_loss(p, y), "declared scalar"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_losses_whose_parts_do_not_add_up_are_refused_in_parts_only(case):
    make, reason = REFUSED[case]
    x, y = points()
    y = torch.arange(10) % 3 if case == "pairs" else y
    net, objective = mlp(), ll.Objective(make())
    assert objective.step([(x, y)], net).value > 0
    before = gradients(net)
    with pytest.raises(ll.errors.InputError, match=reason):
        objective.step(cut(x, y, 4), net)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(net), strict=True))


@pytest.mark.parametrize("loss", [L.BinaryCrossentropy, lambda **k: L.FunctionLoss(lambda y, p: (y - p).square(), **k)])
def test_a_divisor_that_counts_in_the_targets_is_that_of_the_window(loss):
    positives = ll.Reduction("positives", lambda weighting, y_true: (y_true > 0.5).sum())
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(9, 3, generator=g) < 0.4).double()
    net, x = Table({"a": torch.rand(9, 3, generator=g, dtype=torch.float64) * 0.8 + 0.1}), torch.arange(9)
    objective = ll.Objective({"a": loss(reduction=positives)})
    whole = ll.Batch(x, {"a": y})
    window = check_against_one_batch(objective, net, parts_of(x, {"a": y}, None, None, [2, 1, 6]), whole, 1e-12)
    assert not window.replaying


@pytest.mark.parametrize("declared", ["mean", "sum"])
def test_a_declared_scalar_is_exact(declared):
    def fn(y_true, y_pred):
        values = (y_true - y_pred).square().sum(-1)
        return values.mean() if declared == "mean" else values.sum()

    x, y = points()
    net, objective = mlp(), ll.Objective(L.FunctionLoss(fn, scalar=declared))
    b = objective.step(cut(x, y, 1, 4), net)
    found = gradients(net)
    net.zero_grad()
    expected = fn(y, net(x))
    expected.backward()
    torch.testing.assert_close(b.total, expected.detach(), rtol=1e-12, atol=0)
    for a, e in zip(found, gradients(net), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "single",
    [
        ll.Batch(torch.ones(2, 1), torch.ones(2, 1)),
        (torch.ones(2, 1), torch.ones(2, 1)),
        [np.ones((2, 1)), np.ones((2, 1))],
        None,
    ],
    ids=["batch", "tuple", "list", "nothing"],
)
def test_one_batch_instead_of_a_list_is_refused(single):
    with pytest.raises(ll.errors.InputTypeError, match=r"Put a single one in a list: \[batch\]"):
        ll.Objective("mse").step(single, nn.Linear(1, 1))


def test_a_window_without_batches_or_targets_is_refused():
    with pytest.raises(ll.errors.EmptyDataError, match="micro-batch"):
        ll.Objective("mse").step([], mlp())
    with pytest.raises(ll.errors.InputTypeError, match="batch 1"):
        ll.Objective("mse").step([points(), 3], mlp())
    with pytest.raises(ll.errors.InputError, match="targets"):
        ll.Objective("mse").step([ll.Batch(points()[0])], mlp())
    with (
        pytest.raises(ll.errors.InputError, match="no model"),
        ll.Objective("mse", regularizers={"*": "l2"}).window([points()]),
    ):
        pass


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.count = mlp(), 0

    def forward(self, x):
        self.count += 1
        if self.count == 2:
            ll.add_loss("kl", self.net[0].weight.square().sum())
        return self.net(x)


def test_an_auxiliary_loss_of_some_micro_batches_only_is_refused():
    with pytest.raises(ll.errors.InputError, match=r"'kl'.*7 of 10 samples"):
        ll.Objective("mse").step(cut(*points(), 3), Sometimes())


def test_a_loss_that_depends_on_no_parameter_is_refused():
    x, y = points()
    with pytest.raises(ll.errors.InputError, match="does not depend on any trainable parameter"):
        ll.Objective("mse").step(cut(x, y, 3), mlp().requires_grad_(False))


# --- the loop, and what a failure leaves ---------------------------------------------------------------------------


def leave_early(window, net):
    for batch in window:
        window.backward(net(batch.x))
        break


def leave_in_the_second_round(window, net):
    for batch in window:
        window.backward(net(batch.x))
        if window.replaying:
            break


def forget(window, net):
    for batch in window:
        net(batch.x)


def call_twice(window, net):
    for batch in window:
        outputs = net(batch.x)
        window.backward(outputs)
        window.backward(outputs)


def never_loop(window, net):
    assert window.breakdown


def fail_late(window, net):
    for i, batch in enumerate(window):
        if i == (3 if window.counting or window.replaying else 1):
            raise ZeroDivisionError
        window.backward(net(batch.x))


MISUSED = {f.__name__: f for f in (leave_early, leave_in_the_second_round, forget, call_twice, never_loop, fail_late)}


@pytest.mark.parametrize(
    ("loop", "loss"),
    [(name, loss) for name in MISUSED for loss in (bce, dice) if (name, loss) != ("leave_in_the_second_round", bce)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_loop_that_fails_leaves_no_half_window(loop, loss):
    net, (x, y) = mlp(nn.BatchNorm1d(5)), points()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    mean = net[1].running_mean.clone()
    error = ZeroDivisionError if loop == "fail_late" else ll.errors.InputError
    with pytest.raises(error) as raised, ll.Objective(loss).window(cut(x, y, 3), net) as window:
        MISUSED[loop](window, net)
    assert torch.is_grad_enabled()
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for n, p in net.named_parameters() if n != "0.weight")
    assert torch.equal(net[1].running_mean, mean)
    ll.add_loss("nobody listens", torch.zeros(()))
    ll.add_loss("nobody listens", torch.zeros(()))
    assert raised.value is not None


def test_gradients_are_added_to_those_that_are_there():
    net, (x, y) = mlp(), points()
    objective = ll.Objective(bce + dice)
    objective.step(cut(x, y, 3), net)
    once = gradients(net)
    held = net[0].weight.grad
    objective.step(cut(x, y, 3), net)
    for one, two in zip(once, gradients(net), strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-12, atol=0)
    assert net[0].weight.grad is held


def test_a_plain_module_needs_no_model():
    net, (x, y) = mlp(), points()
    objective = ll.Objective(bce + dice)
    expected = objective.step(cut(x, y, 3), net)
    found = gradients(net)
    net.zero_grad()
    with objective.window(cut(x, y, 3)) as window:
        for batch in window:
            window.backward(net(batch.x))
    assert window.breakdown.value == expected.value
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(net), strict=True))


def test_batches_may_be_arrays_of_numpy_with_weights_and_a_generator():
    net, (x, y) = mlp(), points()
    w = torch.arange(10.0, dtype=torch.float64)
    expected = ll.Objective(bce)(y, net(x), w)
    b = ll.Objective(bce).step(((x[a:e].numpy(), y[a:e].numpy(), w[a:e].numpy()) for a, e in ((0, 4), (4, 10))), net)
    torch.testing.assert_close(b.total, expected.total.detach(), rtol=1e-12, atol=0)


def test_a_micro_batch_may_be_empty_or_fully_masked():
    net, (x, y) = mlp(), points()
    objective = ll.Objective(bce + dice)
    expected = objective.step([(x[:6], y[:6])], net)
    found = gradients(net)
    net.zero_grad()
    empty, masked = ll.Batch(x[:0], y[:0]), ll.Batch(x[6:], y[6:], mask=torch.zeros(4, 2))
    b = objective.step([empty, (x[:2], y[:2]), masked, (x[2:6], y[2:6])], net)
    torch.testing.assert_close(b.total, expected.total, rtol=1e-12, atol=0)
    for a, e in zip(gradients(net), found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("by", ["class", "sample", "column"])
def test_the_breakdown_of_a_window_divides_over_groups(by):
    net, (x, y) = mlp(), points()
    loss = bce + L.Dice(from_logits="sigmoid", axis=(0,)) if by != "column" else bce
    objective = ll.Objective(loss)
    b = objective.step(cut(x, y, 3), net, by=by)
    expected = objective(y, net(x))
    for name, term in b.terms.items():
        shares, wanted = term.by(by), expected.terms[name].by(by)
        assert list(shares) == list(wanted)
        for key, share in shares.items():
            torch.testing.assert_close(share, wanted[key].detach(), rtol=1e-11, atol=1e-14)
    with pytest.raises(ll.errors.InputError, match="Open it with by"):
        next(iter(b.terms.values())).by("label")


def test_the_breakdown_of_a_window_divides_over_the_groups_of_the_batches():
    net, (x, y) = mlp(), points()
    groups = torch.tensor([5, 5, 9, 9, 5, 7, 7, 9, 5, 5])
    batches = [ll.Batch(x[a:b], y[a:b], groups=groups[a:b]) for a, b in ((0, 4), (4, 10))]
    b = ll.Objective(bce).step(batches, net, by="group")
    shares = b.terms["binary_crossentropy"].by("group")
    per_sample = nn.functional.binary_cross_entropy_with_logits(net(x), y, reduction="none").mean(1).detach() / 10
    assert set(shares) == {5, 7, 9}
    for key, share in shares.items():
        torch.testing.assert_close(share, per_sample[groups == key].sum(), rtol=1e-12, atol=0)


# --- memory, ranks -------------------------------------------------------------------------------------------------


class Alive(nn.Module):
    """Counts the activations that are alive, at the end of each forward."""

    def __init__(self):
        super().__init__()
        self.saved, self.most = weakref.WeakSet(), 0

    def forward(self, x):
        out = x * 1.0
        if out.requires_grad:
            self.saved.add(out)
        gc.collect()
        self.most = max(self.most, len(self.saved))
        return out


@pytest.fixture
def young_objects():
    """What earlier tests left is not looked through at each collection of garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("young_objects")
@pytest.mark.parametrize("loss", [bce, dice], ids=["linear", "ratio"])
def test_the_graph_of_one_micro_batch_is_in_memory(loss):
    def most(count):
        alive = Alive()
        net, (x, y) = mlp(alive), points(12)
        saved = []

        def pack(tensor):
            held = weakref.ref(tensor)
            saved.append(held)
            return tensor

        counts, outputs = [], weakref.WeakSet()
        batches = cut(x, y, *range(12 // count, 12, 12 // count))
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, ll.Objective(loss).window(batches, net) as window:
            for batch in window:
                found = net(batch.x)
                outputs.add(found)
                window.backward(found)
                del found
                gc.collect()
                assert not outputs
                counts.append(sum(r() is not None and r().grad_fn is not None for r in saved))
        return alive.most, max(counts)

    assert most(1)[0] == most(12)[0] == 1
    assert most(12)[1] <= most(1)[1]
