"""Losses that are functions, subclasses or torch's own: torch's numbers and gradients, for every split of the data."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossledger as ll
from lossledger.errors import InputError, InputTypeError

L = ll.losses
B, C = 7, 3
CUTS = (slice(0, 1), slice(1, 4), slice(4, 7))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, classes=C, seed=2):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def signs(*shape):
    return torch.where(rand(*shape) < 0.5, -1.0, 1.0).double()


def ignoring(target, value=-100):
    target = target.clone()
    target[1], target[5] = value, value
    return target


W = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
X, PROBABILITIES, LOGP = randn(B, C), rand(B, C) * 0.9 + 0.05, randn(B, C).log_softmax(-1)
Y, BITS, SIGNS, SIMPLEX = randn(B, C, seed=5), (rand(B, C, seed=6) < 0.5).double(), signs(B, C), rand(B, C).softmax(-1)
CLASSES = labels(B)
IMAGE, PIXELS = randn(B, C, 4, 5), labels(B, 4, 5)
SEQUENCE, TOKENS = randn(B, C, 4), labels(B, 4)
SETS = torch.tensor([[0, 2, -1]] * 3 + [[1, -1, -1]] * 4)

# Name: torch's loss, input, target. Modules and functions of torch, with every option that changes the divisor.
TORCH = {
    "L1Loss": (nn.L1Loss(), X, Y),
    "MSELoss": (nn.MSELoss(), X, Y),
    "MSELoss sum": (nn.MSELoss(reduction="sum"), X, Y),
    "SmoothL1Loss": (nn.SmoothL1Loss(beta=0.3), X, Y),
    "HuberLoss": (nn.HuberLoss(delta=0.4), X, Y),
    "BCELoss": (nn.BCELoss(), PROBABILITIES, BITS),
    "BCELoss weight": (nn.BCELoss(weight=W), PROBABILITIES, BITS),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), X, BITS),
    "BCEWithLogitsLoss pos": (nn.BCEWithLogitsLoss(pos_weight=W), X, BITS),
    "SoftMarginLoss": (nn.SoftMarginLoss(), X, SIGNS),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), X, rand(B, C) * 4),
    "PoissonNLLLoss full": (nn.PoissonNLLLoss(log_input=False, full=True), PROBABILITIES, rand(B, C) * 4),
    "KLDivLoss batchmean": (nn.KLDivLoss(reduction="batchmean"), LOGP, SIMPLEX),
    "KLDivLoss sum": (nn.KLDivLoss(reduction="sum"), LOGP, SIMPLEX),
    "KLDivLoss log": (nn.KLDivLoss(reduction="batchmean", log_target=True), LOGP, SIMPLEX.log()),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(margin=0.5), X, SIGNS),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), X, CLASSES),
    "CrossEntropyLoss sum": (nn.CrossEntropyLoss(reduction="sum", weight=W), X, CLASSES),
    "CrossEntropyLoss weight": (nn.CrossEntropyLoss(weight=W), X, CLASSES),
    "CrossEntropyLoss ignore": (nn.CrossEntropyLoss(), X, ignoring(CLASSES)),
    "CrossEntropyLoss ignore 1": (nn.CrossEntropyLoss(weight=W, ignore_index=1), X, CLASSES),
    "CrossEntropyLoss smooth": (nn.CrossEntropyLoss(label_smoothing=0.2), X, CLASSES),
    "CrossEntropyLoss smooth weight": (nn.CrossEntropyLoss(weight=W, label_smoothing=0.2), X, ignoring(CLASSES)),
    "CrossEntropyLoss soft": (nn.CrossEntropyLoss(), X, SIMPLEX),
    "CrossEntropyLoss soft weight": (nn.CrossEntropyLoss(weight=W, label_smoothing=0.1), X, SIMPLEX),
    "CrossEntropyLoss image": (nn.CrossEntropyLoss(weight=W), IMAGE, ignoring(PIXELS)),
    "CrossEntropyLoss sequence": (nn.CrossEntropyLoss(ignore_index=2), SEQUENCE, TOKENS),
    "CrossEntropyLoss soft image": (nn.CrossEntropyLoss(), IMAGE, IMAGE.softmax(1)),
    "NLLLoss": (nn.NLLLoss(weight=W), LOGP, CLASSES),
    "NLLLoss image": (nn.NLLLoss(ignore_index=0), IMAGE.log_softmax(1), PIXELS),
    "MultiMarginLoss": (nn.MultiMarginLoss(weight=W), X, CLASSES),
    "MultiLabelMarginLoss": (nn.MultiLabelMarginLoss(), X, SETS),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(weight=W), X, BITS),
    "l1_loss": (F.l1_loss, X, Y),
    "mse_loss": (F.mse_loss, X, Y),
    "smooth_l1_loss": (functools.partial(F.smooth_l1_loss, beta=0.3), X, Y),
    "huber_loss": (functools.partial(F.huber_loss, delta=0.4), X, Y),
    "binary_cross_entropy": (F.binary_cross_entropy, PROBABILITIES, BITS),
    "binary_cross_entropy_with_logits": (
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=W),
        X,
        BITS,
    ),
    "soft_margin_loss": (F.soft_margin_loss, X, SIGNS),
    "poisson_nll_loss": (F.poisson_nll_loss, X, rand(B, C) * 4),
    "kl_div": (functools.partial(F.kl_div, reduction="batchmean"), LOGP, SIMPLEX),
    "hinge_embedding_loss": (F.hinge_embedding_loss, X, SIGNS),
    "cross_entropy": (F.cross_entropy, X, CLASSES),
    "cross_entropy partial": (functools.partial(F.cross_entropy, weight=W, ignore_index=1), X, CLASSES),
    "cross_entropy smooth": (functools.partial(F.cross_entropy, label_smoothing=0.3, reduction="sum"), X, CLASSES),
    "nll_loss": (functools.partial(F.nll_loss, weight=W), LOGP, CLASSES),
    "multi_margin_loss": (F.multi_margin_loss, X, CLASSES),
    "multilabel_margin_loss": (F.multilabel_margin_loss, X, SETS),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, X, BITS),
}


def torch_value_and_gradient(fn, x, y):
    leaf = x.clone().requires_grad_()
    value = fn(leaf, y)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a).detach(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_loss_has_the_value_and_gradient_of_torch(name):
    fn, x, y = TORCH[name]
    value, gradient = torch_value_and_gradient(fn, x, y)
    loss = L.get(fn)
    assert isinstance(loss, L.TorchLoss)
    close(loss(y, x), value)
    tally, closed = loss.backprop(y, x)
    close(closed, gradient)
    close(tally.value, value)


@pytest.mark.parametrize("name", TORCH)
def test_unequal_batches_add_up_to_the_full_batch_of_torch(name):
    """torch's mean of means would be another number wherever labels are ignored or classes weighted."""
    fn, x, y = TORCH[name]
    value, gradient = torch_value_and_gradient(fn, x, y)
    loss = L.get(fn)
    whole = sum(loss.tally(y[s], x[s]) for s in CUTS)
    close(whole.value, value)
    close(torch.cat([loss.backprop(y[s], x[s], window=whole)[1] for s in CUTS]), gradient)


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_loss_divides_over_samples(name):
    fn, x, y = TORCH[name]
    tally = L.get(fn).tally(y, x, by="sample")
    assert len(tally.contributions()) == B
    close(tally.contributions().sum(), tally.value)


MASKED = torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)


@pytest.mark.parametrize("name", TORCH)
def test_a_masked_sample_of_a_torch_loss_is_a_deleted_one(name):
    fn, x, y = TORCH[name]
    value, gradient = torch_value_and_gradient(fn, x[MASKED], y[MASKED])
    spoiled = x.clone()
    spoiled[~MASKED] = torch.nan
    loss = L.get(fn)
    close(loss(y, spoiled, mask=MASKED), value)
    _, got = loss.backprop(y, spoiled, mask=MASKED)
    close(got[MASKED], gradient)
    assert not got[~MASKED].any()


@pytest.mark.parametrize("name", [n for n in TORCH if "sum" in n or n in ("MSELoss", "CrossEntropyLoss image")])
def test_a_sample_of_weight_two_counts_twice_in_the_numerator(name):
    fn, x, y = TORCH[name]
    loss, weight = L.get(fn), rand(B)
    parts = torch.stack([loss.tally(y[i : i + 1], x[i : i + 1]).numerator for i in range(B)])
    whole = loss.tally(y, x)
    weighted = loss.tally(y, x, sample_weight=weight)
    close(weighted.numerator, (parts * weight).sum())
    assert float(weighted.divisor) == float(whole.divisor)


@pytest.mark.parametrize("shape", [(4, 5), (4, 4), (3, 3), (3,), (4,)])
def test_a_mask_of_pixels_selects_pixels_with_the_class_axis_first(shape):
    x, y = randn(2, C, *shape), labels(2, *shape)
    mask = rand(2, *shape, seed=8) < 0.6
    entries = F.cross_entropy(x, y, reduction="none")
    close(L.get(nn.CrossEntropyLoss())(y, x, mask=mask), entries[mask].mean())


def test_weights_of_pixels_weigh_pixels_with_the_class_axis_first():
    weight = rand(B, 4, 5)
    entries = F.cross_entropy(IMAGE, PIXELS, reduction="none") * weight
    close(L.get(nn.CrossEntropyLoss())(PIXELS, IMAGE, sample_weight=weight), entries.mean())


def test_a_sample_with_ignored_labels_and_a_mask_counts_once():
    y = ignoring(CLASSES)
    loss = L.get(nn.CrossEntropyLoss(weight=W))
    kept = MASKED & (y != -100)
    close(loss(y, X, mask=MASKED), F.cross_entropy(X[kept], y[kept], weight=W))


def test_all_labels_ignored_is_zero_not_nan():
    assert float(L.get(nn.CrossEntropyLoss())(torch.full((B,), -100), X)) == 0.0


def test_labels_in_a_column_are_labels():
    close(L.get(nn.CrossEntropyLoss())(CLASSES.unsqueeze(-1), X), F.cross_entropy(X, CLASSES))


def test_the_module_of_the_caller_is_not_changed():
    module = nn.CrossEntropyLoss(reduction="sum")
    L.get(module)(CLASSES, X)
    assert module.reduction == "sum"


def test_no_reduction_keeps_the_values_of_torch():
    close(L.get(nn.MSELoss(reduction="none"))(Y, X), F.mse_loss(X, Y, reduction="none"))


@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.huber_loss])
def test_a_partial_with_an_option_that_the_module_lacks_is_refused(function):
    with pytest.raises(ll.errors.InputTypeError, match=r"weight.*Wrap it"):
        L.get(functools.partial(function, weight=torch.ones(B, C, dtype=torch.float64)))


@pytest.mark.parametrize("fn", [nn.CrossEntropyLoss(), nn.MSELoss(), F.cross_entropy])
def test_a_torch_loss_has_a_repr(fn):
    assert "TorchLoss" in repr(L.get(fn))


# --- functions and subclasses --------------------------------------------------------------------------------------


def per_entry(y_true, y_pred):
    return (y_true - y_pred).square()


def per_sample(y_true, y_pred):
    return (y_true - y_pred).square().mean(-1)


def scalar_mean(y_true, y_pred):
    return (y_true - y_pred).square().mean()


def scalar_sum(y_true, y_pred):
    return (y_true - y_pred).square().sum()


class PerSample(L.Loss):
    def call(self, y_true, y_pred):
        return per_sample(y_true, y_pred)


OWN = {
    "per entry": lambda **k: L.FunctionLoss(per_entry, **k),
    "per sample": lambda **k: L.FunctionLoss(per_sample, **k),
    "subclass": lambda **k: PerSample(**k),
}
REDUCTIONS = ("sum_over_batch_size", "sum", "mean_with_sample_weight", "mean_per_sample")


@pytest.mark.parametrize("name", OWN)
def test_values_of_entries_and_of_samples_give_the_same_mean(name):
    close(OWN[name]()(Y, X), F.mse_loss(X, Y))
    weight = rand(B)
    close(OWN[name]()(Y, X, weight), (per_sample(Y, X) * weight).mean())
    close(OWN[name]()(Y, X, mask=MASKED), per_sample(Y, X)[MASKED].mean())
    close(
        OWN[name](reduction="mean_with_sample_weight")(Y, X, weight), (per_sample(Y, X) * weight).sum() / weight.sum()
    )


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_own_losses_add_over_unequal_batches(name, reduction):
    loss, weight = OWN[name](reduction=reduction), rand(B)
    whole, gradient = loss.backprop(Y, X, weight, MASKED)
    pieces = sum(loss.tally(Y[s], X[s], weight[s], MASKED[s]) for s in CUTS)
    close(pieces.value, torch.as_tensor(whole.value))
    close(torch.cat([loss.backprop(Y[s], X[s], weight[s], MASKED[s], pieces)[1] for s in CUTS]), gradient)
    leaf = X.clone().requires_grad_()
    loss(Y, leaf, weight, MASKED).backward()
    close(gradient, leaf.grad)


@pytest.mark.parametrize("name", OWN)
def test_masked_samples_of_an_own_loss_may_be_nan(name):
    x, y = X.clone(), Y.clone()
    x[~MASKED], y[~MASKED] = torch.nan, torch.inf
    tally, gradient = OWN[name]().backprop(y, x, mask=MASKED)
    close(tally.value, per_sample(Y, X)[MASKED].mean())
    assert torch.isfinite(gradient).all() and int(tally.nonfinite) == 0


def test_a_weight_or_mask_of_each_element_goes_with_values_of_each_element():
    weight, mask = rand(B, C), rand(B, C, seed=9) < 0.5
    loss = L.FunctionLoss(per_entry)
    close(loss(Y, X, weight, mask), (per_entry(Y, X) * weight)[mask].sum() / mask.sum())
    with pytest.raises(ll.errors.InputError, match="sample_weight"):
        L.FunctionLoss(per_sample)(Y, X, weight)


def test_groups_of_an_own_loss_sum_to_its_value():
    for make in OWN.values():
        for by in ("sample", torch.tensor([0, 0, 1, 1, 1, 5, 5])):
            tally = make().tally(Y, X, mask=MASKED, by=by)
            close(tally.contributions().sum(), torch.as_tensor(tally.value))


def test_a_scalar_is_the_mean_of_its_batch_unless_declared():
    close(L.get(scalar_sum)(Y, X), per_entry(Y, X).sum())
    means = sum(L.FunctionLoss(scalar_mean, scalar="mean").tally(Y[s], X[s]) for s in CUTS)
    close(means.value, F.mse_loss(X, Y))
    sums = sum(L.FunctionLoss(scalar_sum, scalar="sum").tally(Y[s], X[s]) for s in CUTS)
    close(sums.value, per_entry(Y, X).sum())


def test_the_gradient_of_a_scalar_is_its_own():
    leaf = X.clone().requires_grad_()
    scalar_sum(Y, leaf).backward()
    for declared in (None, "sum", "mean"):
        close(L.FunctionLoss(scalar_sum, scalar=declared).backprop(Y, X)[1], leaf.grad)


def test_classes_weigh_the_samples_of_an_own_loss():
    loss = L.FunctionLoss(lambda y, p: F.cross_entropy(p, y, reduction="none"))
    tally = loss.tally(CLASSES, X, class_weight={0: 0.5, 2: 4.0})
    close(tally.value, (F.cross_entropy(X, CLASSES, reduction="none") * W[CLASSES]).mean())


class Squares(L.Loss):
    def call(self, y_true, y_pred):
        return (y_true - y_pred) ** 2


@pytest.mark.parametrize("size", [1, B])
def test_class_weights_of_pixels_reach_the_pixel_and_no_other(size):
    # With as many rows and columns as samples, axes that are mixed up would broadcast without an error.
    pixels, output = labels(B, size, size, classes=2), randn(B, size, size)
    weight = torch.where(pixels == 1, 5.0, 1.0).double()
    wanted = (weight * (pixels - output) ** 2).mean()
    for loss in (L.get(lambda y, p: (y - p) ** 2), Squares(), L.get(nn.MSELoss())):
        tally = loss.tally(pixels[..., None].double(), output[..., None], class_weight={1: 5.0})
        close(tally.value, wanted)
    one_hot = L.get(lambda y, p: (F.one_hot(y.long(), 2) - p) ** 2)
    both = torch.stack([output, -output], -1)
    wanted = (weight[..., None] * (F.one_hot(pixels, 2) - both) ** 2).mean()
    close(one_hot.tally(pixels, both, class_weight={1: 5.0}).value, wanted)


@pytest.mark.parametrize("loss", [lambda y, p: (y - p) ** 2, Squares(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("shape", [(B, C), (C, C), (4, 4, 4, 4), (B, 4, 5, C)])
def test_class_weights_are_refused_where_the_loss_has_a_value_for_each_class(loss, shape):
    with pytest.raises(InputError, match="one value an entry"):
        L.get(loss).tally(rand(*shape), randn(*shape), class_weight={1: 5.0})


def test_class_weights_are_refused_where_the_loss_has_one_value_for_many_labels():
    per_image = L.get(lambda y, p: ((y - p) ** 2).flatten(1).mean(1))
    for shape in ((4, 4, 4, 3), (B, 4, 5, 3)):
        with pytest.raises(InputError, match="a value of the loss for each label"):
            per_image.tally(rand(*shape), randn(*shape), class_weight={1: 5.0})


def test_class_weights_of_torch_with_probabilities_go_by_its_class_axis():
    soft = rand(4, 4, 4, 4, seed=9).softmax(1)
    values = F.cross_entropy(randn(4, 4, 4, 4), soft, reduction="none")
    weights = torch.tensor([1.0, 5.0, 1.0, 1.0], dtype=torch.float64)[soft.argmax(1)]
    tally = L.get(nn.CrossEntropyLoss()).tally(soft, randn(4, 4, 4, 4), class_weight={1: 5.0})
    close(tally.value, (weights * values).mean())


@pytest.mark.parametrize(("true", "pred"), [((B,), (B,)), ((B,), (B, 1)), ((B, 1), (B,)), ((3, 3), (3, 3, 1))])
def test_an_own_loss_gets_targets_and_predictions_of_one_shape(true, pred):
    seen = []
    L.get(lambda y, p: (seen.append((y.shape, p.shape)), per_sample(y, p))[1])(torch.zeros(true), torch.ones(pred))
    assert seen[0][0] == seen[0][1]


def test_names_come_from_functions_and_arguments():
    assert L.get(per_sample).name == "per_sample"
    assert L.get(lambda y, p: y).name == "loss"
    assert PerSample().name == "per_sample" and PerSample("mine").name == "mine"
    assert L.get(F.cross_entropy).name == "cross_entropy"
    assert L.get(nn.CrossEntropyLoss()).name == "cross_entropy"


def test_names_of_torch_losses_read_well():
    names = [L.get(m).name for m in (nn.BCEWithLogitsLoss(), nn.MSELoss(), nn.KLDivLoss(), nn.NLLLoss())]
    assert names == ["binary_cross_entropy_with_logits", "mse", "kl_div", "nll"]


# --- expressions ---------------------------------------------------------------------------------------------------

mse, mae, huber = L.MeanSquaredError(), L.MeanAbsoluteError(), L.Huber()
EXPRESSIONS = {
    "weighted": (lambda: 0.5 * mse + mae, {"mean_squared_error": 0.5, "mean_absolute_error": 1.0}),
    "right": (lambda: mse * 0.5 + mae * 2, {"mean_squared_error": 0.5, "mean_absolute_error": 2.0}),
    "nested": (
        lambda: 2 * (0.5 * mse + 3 * (mae + huber)),
        {"mean_squared_error": 1.0, "mean_absolute_error": 6.0, "huber_loss": 6.0},
    ),
    "of one": (lambda: 3 * mse, {"mean_squared_error": 3.0}),
    "loss plus expression": (
        lambda: huber + (mse + mae),
        {"huber_loss": 1.0, "mean_squared_error": 1.0, "mean_absolute_error": 1.0},
    ),
    "own": (lambda: mse + 2 * L.get(per_sample), {"mean_squared_error": 1.0, "per_sample": 2.0}),
    "sum": (lambda: sum([mse, mae]), {"mean_squared_error": 1.0, "mean_absolute_error": 1.0}),
    "half": (lambda: mse / 2 + mae, {"mean_squared_error": 0.5, "mean_absolute_error": 1.0}),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_are_flat_sums_of_named_terms(name):
    make, expected = EXPRESSIONS[name]
    loss = make()
    assert {part.name: c for c, part in loss.terms} == expected
    close(loss(Y, X), sum(c * part(Y, X) for c, part in loss.terms))
    objective = ll.Objective(loss)
    b = objective(Y, X)
    assert {n: t.weight for n, t in b.terms.items()} == expected
    close(b.total, loss(Y, X))


def test_repr_of_an_expression_can_be_read_back():
    loss = 2 * (0.25 * L.Huber(delta=2.0) + mae)
    assert repr(loss) == "0.5 * Huber(delta=2.0) + 2 * MeanAbsoluteError()"
    assert repr(eval(repr(loss), vars(L))) == repr(loss)


def test_repr_of_an_expression_keeps_its_coefficients():
    assert repr(eval(repr(0.12345678 * mse + mae), vars(L)).terms[0][0]) == "0.12345678"


def test_an_expression_goes_to_a_configuration_and_back():
    loss = 0.5 * L.BinaryCrossentropy(from_logits=True) + L.Dice(axis=(0, 1), from_logits="sigmoid")
    again = L.deserialize(L.serialize(loss))
    assert repr(again) == repr(loss)


def test_numpy_numbers_are_numbers_on_the_left():
    assert (np.float64(0.5) * mse).terms[0][0] == 0.5


@pytest.mark.parametrize("kind", ["float32", "int64"])
def test_numpy_numbers_are_numbers(kind):
    number = np.dtype(kind).type(2)
    assert (mse * number).terms[0][0] == 2.0
    assert ll.Objective("mse", loss_weights=number).terms[0].coefficient == 2.0


class InTorchsOrder(nn.Module):
    def forward(self, pred, target):
        return (3 * F.relu(target - pred) + F.relu(pred - target)).mean()


class CalledInTorchsOrder(L.Loss):
    def call(self, logits, labels):
        return (labels - logits).exp().mean(-1)


def named_in_torchs_order(input, target):
    return (target - input).exp().mean(-1)


@pytest.mark.parametrize(
    "own",
    [
        InTorchsOrder(),
        CalledInTorchsOrder(),
        named_in_torchs_order,
        functools.partial(named_in_torchs_order),
        lambda y_hat, y: (y - y_hat).exp(),
        lambda p, t: (t - p).exp(),
        lambda out, labels: (labels - out).exp(),
    ],
)
def test_a_loss_whose_arguments_are_named_in_torchs_order_is_refused(own):
    for use in (L.get, ll.metrics.get, lambda fn: ll.Model(nn.Linear(1, 1)).compile("sgd", fn)):
        if isinstance(own, L.Loss) and use is ll.metrics.get:
            continue
        with pytest.raises(InputError, match=r"expected \(y_true, y_pred\), received \(.*wrap it: lambda y_true, y_p"):
            use(own)


def test_names_that_say_no_order_or_the_right_one_are_taken():
    y_true, y_pred = torch.zeros(2, 1), torch.tensor([[1.0], [2.0]])
    module = InTorchsOrder()
    for own in (lambda a, b: b.mean(-1), lambda target, input: input.mean(-1), lambda y, x: x.mean(-1), torch.maximum):
        assert float(L.get(own)(y_true, y_pred)) == 1.5
    wrapped = L.get(lambda y_true, y_pred: module(y_pred, y_true))
    assert float(wrapped(y_true, y_pred)) == float(module(y_pred, y_true)) != float(module(y_true, y_pred))


def test_a_crossentropy_says_what_dtype_its_targets_lack():
    y, loss = labels(B), L.get(nn.CrossEntropyLoss())
    for wrong, right in ((y.double(), y), (F.one_hot(y, C), F.one_hot(y, C).double())):
        with pytest.raises(InputTypeError, match=r"y\.long\(\) for labels, y\.float\(\) for one-hot"):
            loss(wrong, randn(B, C))
        assert torch.allclose(loss(right, randn(B, C)), F.cross_entropy(randn(B, C), right))


@pytest.mark.parametrize("own", [nn.BCEWithLogitsLoss(), lambda y_true, y_pred: (y_true - y_pred).square().mean()])
def test_classes_of_torchs_layout_have_names_beside_a_loss_without_classes(own):
    names = ["cat", "dog", "owl"]
    x, y = randn(4, 2, 6, 6), (rand(4, C, 6, 6) < 0.5).double()
    model = ll.Model(nn.Conv2d(2, C, 1).double())
    metric = ll.metrics.IoU(from_logits="sigmoid", axis=1)
    model.compile("sgd", own, metrics=[metric], class_names=names)
    book = model.fit(x, y, verbose=0, seed=0).ledger
    assert [row.group for row in book.metrics if row.group] == names
    model.compile("sgd", own, class_names=[*names, "emu"])
    with pytest.raises(InputError, match="expected 3 or 6 names"):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("unknown", [{7: 5.0}, [1.0, 5.0], [1.0, 5.0, 1.0, 1.0]])
@pytest.mark.parametrize("shape", [(B, C), (B, C, 4)])
def test_class_weights_of_a_class_that_torchs_output_does_not_have_are_refused(shape, unknown):
    loss, output, target = L.get(nn.CrossEntropyLoss()), randn(*shape), labels(shape[0], *shape[2:])
    for targets in (target, F.one_hot(target, C).movedim(-1, 1).double()):
        with pytest.raises(InputError, match="class_weight"):
            loss.tally(targets, output, class_weight=unknown)
        weights = torch.tensor([1.0, 5.0, 1.0]).double()
        expected = (F.cross_entropy(output, target, reduction="none") * weights[target]).mean()
        for given in ({1: 5.0}, [1.0, 5.0, 1.0], weights):
            close(loss.tally(targets, output, class_weight=given).value, expected)


def test_what_is_advised_beside_a_loss_of_torch_is_an_argument_or_a_loss_of_torch():
    with pytest.raises(InputError, match=r"name the label to leave out with ignore_index\.$"):
        L.get(nn.CrossEntropyLoss())(torch.tensor([0, 255]), randn(2, C))
    for loss, target, remedy in (
        (nn.CrossEntropyLoss(), labels(32), r"NLLLoss"),
        (nn.BCEWithLogitsLoss(), (rand(32, C) < 0.5).double(), r"BCELoss"),
    ):
        probabilities = randn(32, C, seed=5).requires_grad_()
        probabilities = probabilities.softmax(-1) if remedy == "NLLLoss" else probabilities.sigmoid()
        (found,) = (f for f in ll.check(loss, target, probabilities) if f.code == "SPACE1")
        assert remedy in found.remedy and "from_logits" not in found.remedy


def test_a_change_of_what_is_trainable_is_warned_of_where_fit_was_called():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model = ll.Model(net)
    model.compile("sgd", "mse")
    net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="What is trainable has changed") as caught:
        model.fit(torch.zeros(4, 3), torch.zeros(4, 1), verbose=0)
    assert [warning.filename for warning in caught] == [__file__]
