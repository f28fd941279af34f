"""Losses that Keras does not have, beyond the table of laws: torch's numbers, edges, messages, names."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossledger as ll
from lossledger.errors import InputError, InputTypeError

L = ll.losses
COMMON = ["reduction", "name", "dtype"]
SIGNATURES = {
    "SoftCategoricalCrossentropy": ("soft_categorical_crossentropy", ("class_weights", "from_logits")),
    "AsymmetricMultiLabel": ("asymmetric_multi_label", ("gamma_positive", "gamma_negative", "clip", "from_logits")),
    "Quantile": ("quantile", ("quantile",)),
    "GaussianNegativeLogLikelihood": ("gaussian_negative_log_likelihood", ("log_variance", "full", "eps")),
    "PoissonNegativeLogLikelihood": ("poisson_negative_log_likelihood", ("log_input", "full", "eps")),
    "MarginRanking": ("margin_ranking", ("margin",)),
    "Contrastive": ("contrastive", ("margin",)),
    "Triplet": ("triplet", ("margin", "squared")),
    "TripletHard": ("triplet_hard", ("margin", "squared")),
    "TripletSemiHard": ("triplet_semi_hard", ("margin", "squared")),
    "SupervisedContrastive": ("supervised_contrastive", ("temperature",)),
    "InfoNCE": ("info_nce", ("temperature", "symmetric")),
    "NTXent": ("nt_xent", ("temperature",)),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_and_arguments_are_in_the_form_of_keras(name):
    function, arguments = SIGNATURES[name]
    parameters = inspect.signature(getattr(L, name)).parameters
    assert list(parameters)[: len(arguments)] == list(arguments) and list(parameters)[-3:] == COMMON
    assert parameters["reduction"].default == "sum_over_batch_size" and parameters["dtype"].default is None
    assert parameters["name"].default == function
    assert type(L.get(name)) is type(L.get(function)) is getattr(L, name)
    # The function takes the same arguments with the same defaults.
    own = inspect.signature(getattr(L, function)).parameters
    assert list(own) == ["y_true", "y_pred", *list(parameters)[:-3]]
    assert all(own[p].default == parameters[p].default for p in list(parameters)[:-3])


# --- torch's numbers, value and gradient ---------------------------------------------------------------------------


def both(ours, theirs, y, p):
    """Value and gradient with respect to the output, ours and torch's."""
    found = []
    for fn in (lambda q: ours(y, q), theirs):
        leaf = p.clone().requires_grad_()
        value = fn(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    (a, grad_a), (b, grad_b) = found
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad_a, grad_b, rtol=1e-11, atol=1e-13)
    assert grad_b.abs().sum() > 0
    _, closed = ours.backprop(y, p)
    torch.testing.assert_close(closed, grad_b, rtol=1e-11, atol=1e-13)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("steps", [(), (5,)])
def test_soft_crossentropy_is_that_of_torch_with_probabilities(smoothing, steps):
    """The divisor is the number of entries, also with class weights."""
    weights = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    y, z = normal(4, *steps, 3).softmax(-1), normal(4, *steps, 3, seed=1)
    ours = L.SoftCategoricalCrossentropy(class_weights=weights, from_logits=True, label_smoothing=smoothing)

    def theirs(q):
        return F.cross_entropy(q.movedim(-1, 1), y.movedim(-1, 1), weights, label_smoothing=smoothing)

    both(ours, theirs, y, z)


@pytest.mark.parametrize("full", [False, True])
def test_gaussian_is_that_of_torch(full):
    """A variance below eps is read as eps, and still has a gradient."""
    y, mean = normal(6, 3), normal(6, 3, seed=1)
    variance = normal(6, 3, seed=2).square()
    variance[0, 0] = variance[1] = 0.01
    assert (variance < 0.05).sum() >= 4
    theirs = nn.GaussianNLLLoss(full=full, eps=0.05)

    def split(q):
        return theirs(q[..., :3], y, q[..., 3:])

    both(L.GaussianNegativeLogLikelihood(full=full, eps=0.05), split, y, torch.cat((mean, variance), -1))


def test_gaussian_of_logarithms_is_that_of_variances():
    y, mean, logs = normal(6, 2), normal(6, 2, seed=1), normal(6, 2, seed=2)
    a = L.GaussianNegativeLogLikelihood(log_variance=True)(y, torch.cat((mean, logs), -1))
    b = L.GaussianNegativeLogLikelihood()(y, torch.cat((mean, logs.exp()), -1))
    assert float(a) == pytest.approx(float(b), rel=1e-12)


@pytest.mark.parametrize("log_input", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_poisson_is_that_of_torch(log_input, full):
    y = torch.poisson(torch.full((7, 3), 1.5, dtype=torch.float64), generator=rng())
    assert (y == 0).any() and (y == 1).any() and (y > 2).any()
    p = normal(7, 3) if log_input else normal(7, 3).exp()
    ours = L.PoissonNegativeLogLikelihood(log_input=log_input, full=full, eps=1e-3)
    theirs = nn.PoissonNLLLoss(log_input=log_input, full=full, eps=1e-3)
    both(ours, lambda q: theirs(q, y), y, p)


def test_poisson_of_rates_is_that_of_keras():
    y, p = normal(5, 2).square().round(), normal(5, 2, seed=1).exp()
    ours = L.PoissonNegativeLogLikelihood(log_input=False, eps=1e-7)
    assert float(ours(y, p)) == pytest.approx(float(L.Poisson()(y, p)), rel=1e-14)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_margin_ranking_is_that_of_torch(margin):
    y, p = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64), normal(4, 2)
    p[0, 1] = p[0, 0]  # a tie
    theirs = nn.MarginRankingLoss(margin)
    both(L.MarginRanking(margin), lambda q: theirs(q[:, 0], q[:, 1], y), y, p)


def test_triplets_are_those_of_torch():
    p = normal(6, 3, 4)
    p[0, 1] = p[0, 0]  # at distance 0
    theirs = nn.TripletMarginLoss(margin=1.2, eps=0.0)
    ours, leaf = L.Triplet(1.2), p.clone().requires_grad_()
    assert float(ours(torch.zeros(6), p)) == pytest.approx(float(theirs(*p.unbind(1))), rel=1e-12)
    ours(torch.zeros(6), leaf).backward()
    assert torch.isfinite(leaf.grad).all()
    both(ours, lambda q: theirs(*q.unbind(1)), torch.zeros(5), p[1:])


def test_multi_margin_of_torch_is_taken_as_it_is():
    labels, p = torch.tensor([0, 2, 1, 1]), normal(4, 3)
    both(L.get(nn.MultiMarginLoss(margin=0.7)), lambda q: nn.MultiMarginLoss(margin=0.7)(q, labels), labels, p)


@pytest.mark.parametrize(
    ("module", "ours"),
    [
        (nn.GaussianNLLLoss(), "GaussianNegativeLogLikelihood"),
        (nn.MarginRankingLoss(), "MarginRanking"),
        (nn.TripletMarginLoss(), "Triplet"),
    ],
)
def test_modules_of_three_arguments_are_refused_with_the_name_of_ours(module, ours):
    with pytest.raises(InputTypeError, match=rf"losses\.{ours}, or wrap it: lambda"):
        L.get(module)


# --- class weights inside the sum ----------------------------------------------------------------------------------


def test_soft_targets_and_labels_differ_in_what_a_class_weight_does():
    y, p = [[0.4, 0.6]], [[0.5, 0.5]]
    inside = L.SoftCategoricalCrossentropy(class_weights=[5.0, 1.0])
    by_label = L.CategoricalCrossentropy()
    assert float(inside(y, p)) == pytest.approx((5 * 0.4 + 0.6) * math.log(2), rel=1e-6)
    assert float(by_label.tally(y, p, class_weight=[5.0, 1.0]).value) == pytest.approx(math.log(2), rel=1e-6)
    hot = [[1.0, 0.0]]
    assert float(inside(hot, p)) == float(by_label.tally(hot, p, class_weight=[5.0, 1.0]).value)
    assert float(L.SoftCategoricalCrossentropy()(y, p)) == float(by_label(y, p))


def test_weights_of_labels_divide_as_in_torch_with_integer_targets():
    """Σ w_y divides there, which is another reduction here."""
    weights, labels, z = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64), torch.tensor([0, 1, 1, 2]), normal(4, 3)
    theirs = F.cross_entropy(z, labels, weights)
    ours = L.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    assert float(ours.tally(labels, z, class_weight=weights).value) == pytest.approx(float(theirs), rel=1e-12)
    hot = F.one_hot(labels, 3).double()
    entries = L.SoftCategoricalCrossentropy(class_weights=weights, from_logits=True).tally(hot, z)
    assert float(entries.numerator) / float(weights[labels].sum()) == pytest.approx(float(theirs), rel=1e-12)
    assert int(entries.divisor) == 4


@pytest.mark.parametrize("class_weight", [{"dog": 2.0, "emu": 0.5}, {1: 2.0, 2: 0.5}, [1.0, 2.0, 0.5]])
def test_class_weights_of_an_objective_enter_the_sum(class_weight):
    """By name, by index or as a list, with weights of the loss itself and of the samples."""
    y, p, w = normal(4, 3).softmax(-1), normal(4, 3, seed=1).softmax(-1), torch.tensor([1.0, 0.5, 2.0, 0.0])
    loss = L.SoftCategoricalCrossentropy(class_weights=[3.0, 1.0, 1.0])
    objective = ll.Objective(loss, class_weight=class_weight, class_names=["cat", "dog", "emu"])
    expected = 0.0
    for b in range(4):
        for k, weight in enumerate([3.0, 2.0, 0.5]):
            expected -= float(w[b]) * weight * float(y[b, k]) * math.log(float(p[b, k])) / 4
    assert float(objective(y, p, sample_weight=w).total) == pytest.approx(expected, rel=1e-12)


def test_class_weights_survive_the_configuration():
    loss = L.SoftCategoricalCrossentropy(class_weights=torch.tensor([0.5, 2.0]), label_smoothing=0.1)
    again = L.deserialize(L.serialize(loss))
    assert again.class_weights == (0.5, 2.0) and again.get_config() == loss.get_config()
    assert repr(loss) == "SoftCategoricalCrossentropy(class_weights=(0.5, 2.0), label_smoothing=0.1)"


# --- edges ---------------------------------------------------------------------------------------------------------


def test_asymmetric_loss_of_one_focus_and_no_clip_is_the_cross_entropy():
    y, z = (normal(5, 3) > 0).double(), normal(5, 3, seed=1)
    for from_logits, p in ((True, z), (False, z.sigmoid())):
        ours = L.AsymmetricMultiLabel(0.0, 0.0, 0.0, from_logits=from_logits)
        assert float(ours(y, p)) == pytest.approx(float(L.BinaryCrossentropy(from_logits=from_logits)(y, p)), rel=1e-12)
    focal = L.BinaryFocalCrossentropy(gamma=2.0, from_logits=True)
    assert float(L.AsymmetricMultiLabel(2.0, 2.0, 0.0, from_logits=True)(y, z)) == pytest.approx(float(focal(y, z)))


@pytest.mark.parametrize("gammas", [(0.0, 0.0), (0.3, 0.5), (1.0, 4.0)])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_asymmetric_loss_is_finite_for_sure_outputs(gammas, clip):
    z = torch.tensor([[-200.0, -0.1, 0.0, 0.1, 200.0]], requires_grad=True)
    for label in (0.0, 1.0):
        value = L.AsymmetricMultiLabel(*gammas, clip, from_logits=True)(torch.full_like(z, label), z)
        (gradient,) = torch.autograd.grad(value, z)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()
    p = torch.tensor([[0.0, clip, 0.5, 1.0]], requires_grad=True)
    for label in (0.0, 1.0):
        value = L.AsymmetricMultiLabel(*gammas, clip)(torch.full_like(p, label), p)
        (gradient,) = torch.autograd.grad(value, p)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()


def test_an_absent_label_below_the_clip_has_no_loss_and_no_gradient():
    p = torch.tensor([[0.04, 0.2]], requires_grad=True)
    value = L.AsymmetricMultiLabel(clip=0.05)(torch.zeros(1, 2), p)
    value.backward()
    assert p.grad[0, 0] == 0 and p.grad[0, 1] > 0


def test_the_best_constant_of_a_pinball_loss_is_the_quantile():
    y = normal(1001, 1)
    candidates = y.sort(0).values
    for q in (0.1, 0.5, 0.9):
        costs = torch.stack([L.Quantile(q)(y, torch.full_like(y, float(c))) for c in candidates])
        assert float(candidates[costs.argmin()]) == pytest.approx(float(y.quantile(q)), abs=1e-12)


def test_the_median_is_half_the_absolute_error():
    y, p = normal(4, 2), normal(4, 2, seed=1)
    assert float(L.Quantile()(y, p)) == pytest.approx(0.5 * float(L.MeanAbsoluteError()(y, p)), rel=1e-14)


def test_derivative_of_a_pinball_loss_at_the_target_is_zero():
    p = torch.ones(1, 2, requires_grad=True)
    L.Quantile([0.1, 0.9])(torch.ones(1), p).backward()
    assert not p.grad.any() and not L.Quantile([0.1, 0.9]).backprop(torch.ones(1), p)[1].any()


def test_weights_and_masks_of_single_columns():
    """A weight and a mask in the elements' shape, where the output is wider than the target, or the target narrower."""
    y, p = normal(3, 2), torch.cat((normal(3, 2, seed=1), normal(3, 2, seed=2).exp()), -1)
    w, m = (
        torch.tensor([[1.0, 2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64),
        torch.tensor([[1, 0], [1, 1], [0, 1]]),
    )
    loss = L.GaussianNegativeLogLikelihood()
    each = F.gaussian_nll_loss(p[:, :2], y, p[:, 2:], reduction="none")
    tally, gradient = loss.backprop(y, p, w, m)
    assert float(tally.value) == pytest.approx(float((each * w * m).sum() / m.sum()), rel=1e-12)
    leaf = p.clone().requires_grad_()
    loss(y, leaf, w, m).backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-14)
    poisoned = p.clone()
    poisoned[0, 1] = poisoned[0, 3] = math.nan
    assert torch.equal(loss.backprop(y, poisoned, w, m)[1], gradient)
    quantiles = L.Quantile([0.3, 0.7])
    expected = torch.stack([L.quantile(y[:, :1], p[:, c : c + 1], q) for c, q in enumerate((0.3, 0.7))], -1)
    got = quantiles.tally(y[:, 0], p[:, :2], w, m)
    assert float(got.value) == pytest.approx(float((expected * w * m).sum() / m.sum()), rel=1e-12)


def test_distances_of_zero_have_finite_gradients():
    for loss, y, p in (
        (L.Contrastive(), [0.0, 1.0], torch.ones(2, 2, 3)),
        (L.Triplet(), [0.0, 0.0], torch.ones(2, 3, 3)),
    ):
        leaf = p.clone().requires_grad_()
        loss(y, leaf).backward()
        assert torch.isfinite(leaf.grad).all()


def test_a_negative_variance_is_refused_and_counted_in_a_step():
    loss = L.GaussianNegativeLogLikelihood()
    y, p = torch.zeros(2, 1), torch.tensor([[0.0, -0.5], [0.0, 1.0]])
    with pytest.raises(InputError, match="softplus"):
        loss(y, p)
    batch = loss.align(y, p, checked=True)
    assert int(loss.tally_aligned(batch).nonfinite) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: L.SoftCategoricalCrossentropy(class_weights=[1.0, -1.0]), "not negative"),
        (lambda: L.SoftCategoricalCrossentropy(class_weights={0: 2.0}), "class_weight of fit"),
        (lambda: L.SoftCategoricalCrossentropy(class_weights=[1.0])([[0.0, 1.0]], [[0.5, 0.5]]), r"\(2,\).*\(1,\)"),
        (lambda: L.AsymmetricMultiLabel(clip=1.0), "clip in"),
        (lambda: L.AsymmetricMultiLabel(gamma_negative=-1.0), "gamma_negative >= 0"),
        (lambda: L.Quantile(1.0), r"open interval \(0, 1\)"),
        (lambda: L.Quantile([]), r"open interval"),
        (lambda: L.Quantile([0.1, 2.0]), r"open interval"),
        (lambda: L.Quantile("median"), r"open interval"),
        (lambda: L.Quantile([0.1, 0.9])([[1.0, 2.0]], [[1.0, 2.0]]), "one column a quantile.*a loss of its own"),
        (lambda: L.GaussianNegativeLogLikelihood(eps=0.0), "eps must be positive"),
        (lambda: L.GaussianNegativeLogLikelihood()([[1.0]], [[1.0]]), r"\[B, …, 2C\].*torch.cat"),
        (lambda: L.PoissonNegativeLogLikelihood(eps=-1.0), "eps must be positive"),
        (lambda: L.MarginRanking(margin=-1.0), "margin >= 0"),
        (lambda: L.MarginRanking()([0.0], [[1.0, 2.0]]), "-1 and 1.*2 \\* y - 1"),
        (lambda: L.MarginRanking()([1.0], [[1.0, 2.0, 3.0]]), r"\[B, …, 2\]"),
        (lambda: L.Contrastive()([2.0], torch.zeros(1, 2, 3)), r"\[0, 1\]"),
        (lambda: L.Triplet()([0.0], torch.zeros(1, 2, 3)), r"\[B, …, 3, D\].*torch.stack"),
        (lambda: L.Triplet()([0.0, 0.0], torch.zeros(1, 3, 3)), r"\(2,\).*\(1, 3, 3\)"),
        (lambda: L.Triplet().tally([0.0], torch.zeros(1, 3, 3), class_weight={0: 1.0}), "needs classes"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_functions_keep_one_value_an_entry():
    y, p = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.2, 0.8], [0.4, 0.6]])
    for got in (
        L.soft_categorical_crossentropy(y, p, class_weights=[1.0, 2.0]),
        L.asymmetric_multi_label(y, p),
        L.quantile(y, p, 0.9),
        L.poisson_negative_log_likelihood(y, p),
        L.gaussian_negative_log_likelihood(y[:, :1], p),
        L.margin_ranking([1, -1], p),
        L.contrastive([1, 0], np.stack((p, y), 1)),
        L.triplet([0, 0], np.stack((p, y, p), 1)),
        L.triplet_hard([0, 0], p),
        L.triplet_semi_hard([0, 1], p),
        L.supervised_contrastive([0, 0], p),
        L.info_nce([0, 0], np.stack((p, y), 1)),
        L.nt_xent([0, 0], np.stack((p, y), 1)),
    ):
        assert got.shape == (2,)
