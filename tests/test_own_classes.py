"""Losses and metrics of somebody's own: parameters that no step would train, and a base that was not initialized."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import lossledger as ll
from lossledger.errors import InputError, InputTypeError

X = torch.linspace(-1, 1, 24).reshape(12, 2)
Y = X.sum(1, keepdim=True) + 0.5


class Uncertain(nn.Module):
    """Squared error with a learnt variance."""

    def __init__(self):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(1))

    def forward(self, y_true, y_pred):
        return ((y_true - y_pred).square() * torch.exp(-self.log_variance) + self.log_variance).mean(-1)


class Holding(ll.losses.Loss):
    """A loss that holds something."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def call(self, y_true, y_pred):
        return (y_true - y_pred).square().mean(-1)


class Called:
    def __init__(self, held):
        self.held = held

    def __call__(self, y_true, y_pred):
        return (y_true - y_pred).square().mean(-1)

    def method(self, y_true, y_pred):
        return self(y_true, y_pred)


NAMED_BY_A_FUNCTION = nn.Parameter(torch.zeros(1))


def reads_a_global(y_true, y_pred):
    return (y_true - y_pred).square().mean(-1) + NAMED_BY_A_FUNCTION


def enclosing(held):
    return lambda y_true, y_pred: held(y_true, y_pred)


def weighted(scale, y_true, y_pred):
    return scale * (y_true - y_pred).square().mean(-1)


def parameter():
    return nn.Parameter(torch.ones(1))


OWN = {
    "module": Uncertain,
    "parameter of a loss": lambda: Holding(parameter()),
    "module of a loss": lambda: Holding(Uncertain()),
    "list in a loss": lambda: Holding([parameter()]),
    "dict in a loss": lambda: Holding({"scale": torch.ones(1, requires_grad=True)}),
    "object": lambda: Called(parameter()),
    "method": lambda: Called(parameter()).method,
    "closure": lambda: enclosing(Uncertain()),
    "global": lambda: reads_a_global,
    "partial": lambda: functools.partial(weighted, parameter()),
    "loss of torch": lambda: nn.BCEWithLogitsLoss(pos_weight=parameter()),
    "part of a sum": lambda: ll.losses.MeanAbsoluteError() + 0.5 * Holding(Uncertain()),
    "head outside of the model": lambda: ll.losses.LinearCrossentropy(nn.Linear(1, 3)),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_a_loss_whose_parameters_no_step_would_train_is_refused(make):
    with pytest.raises(InputError, match=r"trainable parameters of its own.*received.*\(.*requires_grad_\(False\)"):
        ll.Model(nn.Linear(2, 1)).compile("sgd", make())


def test_the_refusal_names_term_and_parameter():
    with pytest.raises(InputError, match=r"loss 'b/holding'.*'?held\.log_variance \(1,\)"):
        ll.Model(nn.Linear(2, 1)).compile("sgd", {"a": "mse", "b": Holding(Uncertain())})


@pytest.mark.parametrize("wrap", [lambda loss: loss, Holding, enclosing], ids=["module", "loss", "closure"])
def test_frozen_parameters_are_not_refused(wrap):
    model = ll.Model(nn.Linear(2, 1))
    model.compile("sgd", wrap(Uncertain().requires_grad_(False)))
    assert model.fit(X, Y, verbose=0, seed=0).history["loss"]


@pytest.mark.parametrize("wrap", [Holding, enclosing], ids=["loss", "closure"])
def test_networks_that_are_read_in_eval_mode_are_not_refused(wrap):
    """A teacher, or the measure of a perceptual loss: seldom frozen, never meant to learn here."""
    model = ll.Model(nn.Linear(2, 1))
    model.compile("sgd", wrap(Uncertain().eval()))
    assert model.fit(X, Y, verbose=0, seed=0).history["loss"]


def test_parameters_of_the_model_are_not_refused():
    net = nn.Sequential(nn.Linear(2, 4))
    net.head = nn.Linear(4, 3)
    for loss in (ll.losses.LinearCrossentropy(net.head), enclosing(net.head)):
        model = ll.Model(net)
        model.compile("sgd", loss)
        assert model.objective.terms


def test_a_head_that_the_optimizer_holds_is_trained():
    net, head = nn.Linear(2, 4), nn.Linear(4, 3)
    before = head.weight.detach().clone()
    model = ll.Model(net)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], 0.1)
    model.compile(optimizer, ll.losses.LinearCrossentropy(head))
    model.fit(X, torch.arange(12) % 3, verbose=0, seed=0)
    assert not torch.equal(head.weight, before)


def test_a_loss_with_parameters_gives_them_a_gradient_where_it_is_called():
    """Outside of `fit` autograd goes through the loss as through any function."""
    loss = Uncertain()
    output = torch.zeros(12, 1, requires_grad=True)
    ll.Objective(loss)(Y, output).total.backward()
    expected = 1 - Y.square().mean()
    assert loss.log_variance.grad is not None
    torch.testing.assert_close(loss.log_variance.grad, expected.reshape(1))


# --- losses that read parameters of the model ----------------------------------------------------------------------


def with_criterion():
    """A network that holds its loss, so that an optimizer of its parameters trains both."""
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    net.criterion = Uncertain()
    return net, net.criterion


def with_penalty():
    """A loss that reads a weight of the network beside its output."""
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    return net, lambda y_true, y_pred: (y_true - y_pred).square().mean(-1) + 0.3 * net.weight.square().sum()


LEARNING = {"held by the model": with_criterion, "read by the loss": with_penalty}


def learnt_by_hand(made, steps):
    """Plain torch, one batch of all samples a step."""
    net, loss = made
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(Y, net(X)).mean().backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in net.named_parameters()}


@pytest.mark.parametrize(("size", "accumulate"), [(12, 1), (5, 3), (1, 12)])
@pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING)
def test_parameters_of_the_model_learn_from_a_loss_that_reads_them(make, size, accumulate):
    expected = learnt_by_hand(make(), steps=4)
    net, loss = make()
    model = ll.Model(net)
    model.compile(torch.optim.SGD(net.parameters(), 0.1), loss)
    model.fit(X, Y, batch_size=size, accumulate=accumulate, epochs=4, verbose=0, seed=0)
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING)
def test_a_step_of_a_loop_adds_to_their_gradients(make):
    net, loss = make()
    loss(Y, net(X)).mean().backward()
    expected = {name: value.grad.clone() for name, value in net.named_parameters()}
    net.zero_grad()
    objective = ll.Objective(loss)
    for times in (1, 2):
        objective.step([(X[:5], Y[:5]), (X[5:], Y[5:])], net)
        for name, value in net.named_parameters():
            torch.testing.assert_close(value.grad, times * expected[name], rtol=2e-5, atol=1e-6, msg=name)


def test_a_term_of_several_is_scaled_with_its_coefficient():
    net, loss = with_criterion()
    total = 0.25 * (Y - net(X)).abs().mean() + 0.5 * loss(Y, net(X)).mean()
    total.backward()
    expected = {name: value.grad.clone() for name, value in net.named_parameters()}
    net.zero_grad()
    both = 0.25 * ll.losses.MeanAbsoluteError() + 0.5 * ll.losses.FunctionLoss(loss)
    ll.Objective(both).step([(X[:7], Y[:7]), (X[7:], Y[7:])], net)
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING)
def test_a_compiled_step_leaves_them_to_the_plain_one(make):
    expected = learnt_by_hand(make(), steps=3)
    net, loss = make()
    model = ll.Model(net)
    model.compile(torch.optim.SGD(net.parameters(), 0.1), loss, jit=True)
    with pytest.warns(UserWarning, match="run without compilation, since the loss .* reads parameters itself"):
        model.fit(X, Y, batch_size=12, epochs=3, verbose=0, seed=0)
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING)
def test_checks_leave_gradients_as_they_are(make):
    """They look at gradients of terms, with every batch that they are shown."""
    net, loss = make()
    both = ll.losses.FunctionLoss(loss) + 0.5 * ll.losses.FunctionLoss(loss, name="again")
    ll.check(both, Y, net(X).detach(), accumulate=3)
    assert all(value.grad is None for value in net.parameters())


def test_checks_leave_the_gradient_of_a_head_as_it_is():
    head = nn.Linear(4, 3)
    again = ll.losses.LinearCrossentropy(head, label_smoothing=0.1, name="again")
    both = ll.losses.LinearCrossentropy(head) + 0.5 * again
    ll.check(both, torch.arange(12) % 3, torch.randn(12, 4))
    assert head.weight.grad is None
    assert head.bias.grad is None


class Doubled(torch.autograd.Function):
    """A function of somebody's own whose context has an attribute that nodes of torch have too."""

    @staticmethod
    def forward(ctx, values):
        ctx.variable = "values"
        return 2 * values

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Remembering(nn.Module):
    """What the forward leaves for a loss, as the encoder of a variational model does."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        self.hidden = torch.tanh(self.first(x))
        return self.last(self.hidden)


def squared(y_true, y_pred):
    return (y_true - y_pred).square().mean(-1)


def reading(held, loss):
    """A network with a parameter, and a loss that reads it."""

    def made():
        torch.manual_seed(0)
        net = nn.Linear(2, 1)
        net.held = nn.Parameter(held.clone())
        return net, lambda y_true, y_pred: loss(net, y_true, y_pred)

    return made


def remembered():
    torch.manual_seed(0)
    net = Remembering()
    return net, lambda y_true, y_pred: squared(y_true, y_pred) + 0.5 * net.hidden.square().mean(-1)


READ = {
    "a sum": reading(torch.zeros(5, 3), lambda net, t, p: squared(t, p) + 0.1 * net.held.sum()),
    "transposed": reading(
        torch.linspace(0, 1, 6).reshape(2, 3),
        lambda net, t, p: squared(t, p) + (net.held.t() @ net.held.detach()).tril().square().sum(),
    ),
    "beside the output": reading(torch.zeros(12, 1), lambda net, t, p: squared(t, p + net.held)),
    "in a function": reading(torch.ones(1), lambda net, t, p: squared(t, p) + Doubled.apply(net.held).square()),
    "of the forward": remembered,
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_what_a_loss_reads_learns_as_in_plain_torch(make, clip):
    """Whatever memory autograd hands gradients out in: fused optimizers and clipping write and read it in place."""
    parameters = []
    for by_hand in (True, False):
        net, loss = make()
        optimizer = torch.optim.Adam(net.parameters(), 0.05)
        if by_hand:
            for _ in range(3):
                optimizer.zero_grad()
                loss(Y, net(X)).mean().backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
        else:
            model = ll.Model(net)
            model.compile(optimizer, loss, clip_norm=clip)
            model.fit(X, Y, batch_size=12, epochs=3, shuffle=False, verbose=0)
        parameters.append({name: value.detach() for name, value in net.named_parameters()})
    for name, value in parameters[0].items():
        torch.testing.assert_close(parameters[1][name], value, rtol=2e-5, atol=1e-6, msg=name)


def test_parameters_with_one_gradient_have_a_tensor_each():
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    net.one, net.other = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1, 1))
    loss = ll.losses.FunctionLoss(lambda t, p: (squared(t, p) * torch.exp(net.one + net.other)[0]).mean(-1))
    loss.backprop(Y, net(X))
    assert net.one.grad.data_ptr() != net.other.grad.data_ptr()
    torch.testing.assert_close(net.one.grad, net.other.grad)


def test_a_term_whose_gradient_is_one_number_goes_before_another():
    net = nn.Linear(2, 1)
    (net(X).mean() + 0.5 * (net(X) - Y).square().mean()).backward()
    expected = net.weight.grad.clone()
    net.zero_grad()
    mean = ll.losses.FunctionLoss(lambda y_true, y_pred: y_pred, name="mean")
    ll.Objective(mean + 0.5 * ll.losses.MeanSquaredError()).step([(X, Y)], net)
    torch.testing.assert_close(net.weight.grad, expected)


# --- the remedies --------------------------------------------------------------------------------------------------


class Returned(nn.Module):
    """The learnt variance stands beside the prediction."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.log_variance = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        mean = self.linear(x)
        return torch.cat([mean, self.log_variance.expand_as(mean)], -1)


def likelihood(y_true, y_pred):
    mean, log_variance = y_pred.chunk(2, -1)
    return ((y_true - mean).square() * torch.exp(-log_variance) + log_variance).mean(-1)


class Added(nn.Module):
    """The model is given the targets too and adds the loss itself."""

    def __init__(self):
        super().__init__()
        self.linear, self.criterion = nn.Linear(2, 1), Uncertain()

    def forward(self, x, target):
        mean = self.linear(x)
        ll.add_loss("uncertain", self.criterion(target, mean))
        return mean


def by_hand(steps):
    """Weights and log variance after steps of plain torch on all samples."""
    torch.manual_seed(0)
    linear, criterion = nn.Linear(2, 1), Uncertain()
    optimizer = torch.optim.SGD([*linear.parameters(), *criterion.parameters()], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(Y, linear(X)).mean().backward()
        optimizer.step()
    return linear.weight, criterion.log_variance


def test_a_parameter_returned_with_the_prediction_is_trained():
    torch.manual_seed(0)
    net = Returned()
    model = ll.Model(net)
    model.compile(torch.optim.SGD(net.parameters(), 0.1), likelihood)
    model.fit(X, Y, batch_size=12, epochs=5, verbose=0, seed=0)
    torch.testing.assert_close((net.linear.weight, net.log_variance), by_hand(5))
    assert bool(net.log_variance.abs() > 0.01)


def test_a_parameter_of_an_added_loss_is_trained():
    torch.manual_seed(0)
    net = Added()
    model = ll.Model(net)
    model.compile(torch.optim.SGD(net.parameters(), 0.1), 0.0 * ll.losses.MeanSquaredError())
    model.fit({"x": X, "target": Y}, Y, batch_size=12, epochs=5, verbose=0, seed=0)
    torch.testing.assert_close((net.linear.weight, net.criterion.log_variance), by_hand(5))


# --- a base that was not initialized -------------------------------------------------------------------------------


class Forgetful(ll.losses.Loss):
    def __init__(self):
        self.power = 2

    def call(self, y_true, y_pred):
        return ((y_true - y_pred) ** self.power).mean(-1)


class ForgetfulMetric(ll.metrics.Metric):
    def __init__(self):
        self.scale = 1.0

    def statistics(self, y_true, y_pred, sample_weight=None, mask=None):
        return torch.zeros(2, dtype=torch.float64)

    def result(self, statistics):
        return ll.metrics.Result(0.0)


FORGOTTEN = {
    "loss": lambda: ll.losses.get(Forgetful()),
    "objective": lambda: ll.Objective(Forgetful()),
    "compile": lambda: ll.Model(nn.Linear(2, 1)).compile("sgd", {"a": Forgetful()}),
    "multiplied": lambda: 2 * Forgetful(),
    "added": lambda: ll.losses.MeanSquaredError() + Forgetful(),
    "metric": lambda: ll.Model(nn.Linear(2, 1)).compile("sgd", "mse", metrics=[ForgetfulMetric()]),
}


@pytest.mark.parametrize("make", FORGOTTEN.values(), ids=FORGOTTEN)
def test_a_class_that_forgets_the_init_of_its_base_is_refused_by_name(make):
    with pytest.raises(InputTypeError, match=r"^Forgetful.*without 'name'.*Call super\(\)\.__init__\("):
        make()


def test_callbacks_need_no_init():
    class Mine(ll.callbacks.Callback):
        def __init__(self):
            self.epochs = 0

        def on_epoch_end(self, epoch, logs):
            self.epochs += 1

    model, mine = ll.Model(nn.Linear(2, 1)), Mine()
    model.compile("sgd", "mse")
    model.fit(X, Y, epochs=2, verbose=0, seed=0, callbacks=mine)
    assert mine.epochs == 2
