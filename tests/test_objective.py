"""The objective: a total that is exactly the sum of its named terms, for every structure of outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lossledger as ll

L, R = ll.losses, ll.regularizers
B = 6
LOGITS = {"from_logits": True}


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(seed=1):
    g = torch.Generator().manual_seed(seed)
    return {"mask": (rand(B, 4, 3, seed=seed) < 0.4).double(), "label": torch.randint(0, 5, (B, 4), generator=g)}


def outputs(seed=2):
    g = torch.Generator().manual_seed(seed)
    return {
        "mask": torch.randn(B, 4, 3, generator=g, dtype=torch.float64),
        "label": torch.randn(B, 4, 5, generator=g, dtype=torch.float64),
    }


def losses():
    return {
        "mask": 0.5 * L.BinaryCrossentropy(**LOGITS) + L.Dice(axis=(0, 1), from_logits="sigmoid"),
        "label": L.SparseCategoricalCrossentropy(ignore_class=4, **LOGITS),
    }


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


def full(**options):
    return ll.Objective(
        losses(),
        loss_weights={"label": 0.3, "kl": 0.1},
        regularizers={"*.weight": "l2", "*": R.L1(0.1)},
        class_weight={"mask": {0: 2.0}, "label": [1.0, 2.0, 3.0, 4.0, 5.0]},
        **options,
    )


def aux(y_pred):
    return ll.Outputs(y_pred, {"kl": rand(B), "router": torch.tensor(2.5, dtype=torch.float64)})


def with_gradient(y_pred):
    return {name: p.clone().requires_grad_() for name, p in y_pred.items()}


NAMES = ["mask/binary_crossentropy", "mask/dice", "label/sparse_categorical_crossentropy"]


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


@given(st.integers(0, 1000), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_the_contributions_sum_exactly_to_the_total(seed, weighted, masked, dtype):
    y_pred = {name: p.to(dtype) for name, p in outputs(seed).items()}
    b = full()(
        targets(seed),
        aux(y_pred),
        rand(B, 4, seed=seed) if weighted else None,
        rand(B, 4, seed=seed + 1) < 0.7 if masked else None,
        model=net(),
    )
    assert bool(sum(t.contribution for t in b.terms.values()) == b.total)
    assert b.value == float(b.total.detach())
    for term in b.terms.values():
        assert bool(term.contribution == term.weight * term.value)
        assert term.value.ndim == 0 and not term.value.requires_grad


def test_terms_are_named_by_output_with_role_and_weight():
    b = full()(targets(), aux(outputs()), model=net())
    assert {n: (t.role, t.weight) for n, t in b.terms.items()} == {
        NAMES[0]: ("data", 0.5),
        NAMES[1]: ("data", 1.0),
        NAMES[2]: ("data", 0.3),
        "l2/*.weight": ("regularizer", 1.0),
        "l1": ("regularizer", 1.0),
        "kl": ("auxiliary", 0.1),
        "router": ("auxiliary", 1.0),
    }
    close(b.terms["kl"].value, rand(B).mean())
    text = str(b)
    assert all(name in text for name in b.terms) and text.splitlines()[-1].startswith("total")


def test_terms_are_the_values_of_the_losses():
    y, p = targets(), outputs()
    b = ll.Objective(losses())(y, p)
    bce, dice = (part for _, part in losses()["mask"])
    close(b.terms[NAMES[0]].value, bce(y["mask"], p["mask"]))
    close(b.terms[NAMES[1]].value, dice(y["mask"], p["mask"]))
    close(b.terms[NAMES[2]].value, losses()["label"](y["label"], p["label"]))


@pytest.mark.parametrize("kind", ["class", "sample"])
def test_groups_of_every_term_sum_to_its_contribution(kind):
    b = full()(targets(), outputs_with_kl(), rand(B), rand(B, 4) < 0.8, model=net())
    for name in NAMES:
        shares = b.terms[name].by(kind)
        close(sum(shares.values()), b.terms[name].contribution)
        assert all(s.ndim == 0 and not s.requires_grad for s in shares.values())
    keys = list(b.terms[NAMES[0]].by("class"))
    assert keys == [(c, side) for side in ("present", "absent") for c in range(3)]
    assert list(b.terms[NAMES[2]].by("label")) == list(range(5))


def outputs_with_kl():
    return ll.Outputs(outputs(), {"kl": rand(B)})


def test_a_term_without_groups_says_so():
    b = full()(targets(), outputs_with_kl(), model=net())
    for name in ("l1", "kl"):
        with pytest.raises(ll.errors.InputError, match="one value"):
            b.terms[name].by("class")


# --- structures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, tuple])
def test_lists_and_dicts_of_outputs_give_one_total(form):
    y, p = targets(), outputs()
    expected = ll.Objective(losses(), {"label": 0.3})(y, p)
    listed = ll.Objective(form(losses().values()), form([1.0, 0.3]), output_names=["mask", "label"])
    b = listed(form(y.values()), form(p.values()))
    assert list(b.terms) == NAMES
    assert bool(b.total == expected.total)
    unnamed = ll.Objective(form(losses().values()))(form(y.values()), form(p.values()))
    assert list(unnamed.terms)[-1] == "output_1/sparse_categorical_crossentropy"
    # A list of losses also reads dicts by name.
    assert bool(listed(y, p).total == expected.total)


@pytest.mark.parametrize("y", [lambda y: y, lambda y: {"label": y["label"]}, lambda y: [None, y["label"]]])
def test_an_output_without_a_loss_needs_no_target(y):
    objective = ll.Objective({"mask": None, "label": losses()["label"]})
    b = objective(y(targets()), outputs())
    assert list(b.terms) == NAMES[2:]


def test_extra_outputs_of_the_model_are_left_alone():
    objective = ll.Objective({"label": losses()["label"]})
    assert list(objective({"label": targets()["label"]}, outputs()).terms) == NAMES[2:]


def test_one_loss_has_terms_without_an_output_name():
    b = ll.Objective("mse", loss_weights=3)([[1.0]], torch.tensor([[3.0]]))
    assert {n: (t.weight, float(t.value)) for n, t in b.terms.items()} == {"mean_squared_error": (3.0, 4.0)}
    assert b.value == 12.0


def test_missing_loss_weights_are_one_and_multiply_the_weight_in_the_expression():
    b = ll.Objective(losses(), {"mask": 4.0})(targets(), outputs())
    assert [t.weight for t in b.terms.values()] == [2.0, 4.0, 1.0]


def test_a_missing_class_weight_is_one():
    y, p = targets(), outputs()
    explicit = ll.Objective(losses(), class_weight={"mask": [2.0, 1.0, 1.0], "label": [1.0] * 5})(y, p)
    assert bool(ll.Objective(losses(), class_weight={"mask": {0: 2.0}})(y, p).total == explicit.total)
    named = ll.Objective(losses()["mask"], class_weight={"cat": 2.0}, class_names=["cat", "dog", "emu"])
    assert bool(named(y["mask"], p["mask"]).total == sum_of(explicit, NAMES[:2]))


def sum_of(b, names):
    return sum(b.terms[name].contribution for name in names)


def test_one_array_of_weights_is_for_all_outputs_and_a_dict_for_those_it_names():
    y, p, w, m = targets(), outputs(), rand(B), rand(B) < 0.7
    objective = ll.Objective(losses())
    one = objective(y, p, w, m)
    by_name = objective(y, p, {"mask": w, "label": w}, {"mask": m, "label": m})
    listed = objective(y, p, [w, w], (m, m))
    assert bool(one.total == by_name.total) and bool(one.total == listed.total)
    partly = objective(y, p, {"label": w}, {"label": m})
    plain = objective(y, p)
    assert bool(partly.terms[NAMES[0]].value == plain.terms[NAMES[0]].value)
    assert bool(partly.terms[NAMES[2]].value == one.terms[NAMES[2]].value)


def test_a_list_of_two_numbers_is_a_weight_a_sample_also_with_two_outputs():
    objective = ll.Objective(["mse", "mae"])
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1)
    assert objective([zeros, zeros], [ones, ones], sample_weight=[1.0, 3.0]).value == 4.0


def test_the_space_of_the_model_is_not_touched():
    y, p = targets(), outputs()
    before = {n: t.clone() for n, t in {**y, **{f"p{k}": v for k, v in p.items()}}.items()}
    mask = rand(B, 4) < 0.5
    full()(y, outputs_with_kl(), rand(B), mask, model=net())
    after = {**y, **{f"p{k}": v for k, v in p.items()}}
    assert all(torch.equal(after[n], t) for n, t in before.items())


# --- gradients -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.booleans(), st.booleans())
def test_backprop_is_the_gradient_of_the_total(seed, weighted, masked):
    """Closed forms, shared activations, λ and added losses against autograd through plain operations."""
    w = {"mask": rand(B, 4, 3, seed=seed), "label": rand(B, seed=seed)} if weighted else None
    m = {"mask": rand(B, seed=seed) < 0.7, "label": rand(B, 4, seed=seed) < 0.5} if masked else None
    y, objective = targets(seed), full()
    found = []
    for closed in (True, False):
        leaves = with_gradient(outputs(seed))
        kl = leaves["mask"].square().mean((1, 2))
        given_ = ll.Outputs(leaves, {"kl": kl, "router": leaves["label"].exp().mean()})
        if closed:
            result = objective.backprop(y, given_, w, m)
            torch.autograd.backward(result.roots, result.gradients)
        else:
            b = objective(y, given_, w, m, model=net())
            b.backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for a, c in zip(*found, strict=True):
        close(a, c)
    for name, tally in result.tallies.items():
        close(tally.value, b.terms[name].value)
        assert not tally.numerator.requires_grad


def test_the_total_also_carries_the_gradient_of_the_penalties():
    model = net()
    b = full()(targets(), outputs_with_kl(), model=model)
    b.backward()
    for name, p in model.named_parameters():
        expected = 0.1 * p.detach().sign() + (0.02 * p.detach() if name.endswith("weight") else 0)
        close(p.grad, expected)


def test_tallies_of_parts_add_to_the_breakdown_of_the_whole():
    y, p, objective = targets(), outputs(), ll.Objective(losses(), {"label": 0.3})
    whole = objective(y, p)
    parts = [
        objective.tallies({n: v[s] for n, v in y.items()}, {n: v[s] for n, v in p.items()})
        for s in (slice(0, 1), slice(1, 6))
    ]
    for name in NAMES:
        close(sum(part[name] for part in parts).value, whole.terms[name].value)


# --- regularizers --------------------------------------------------------------------------------------------------


def orthogonal(w, factor, mode):
    """As keras.regularizers.OrthogonalRegularizer 3.15: half the mean |cos| over pairs of rows."""
    w = w if mode == "rows" else w.T
    unit = w / np.sqrt(np.maximum((w**2).sum(1, keepdims=True), 1e-12))
    n = len(w)
    return factor * 0.5 * np.abs((unit @ unit.T) * (1 - np.eye(n))).sum() / (n * (n - 1) / 2)


PENALTIES = {
    "l1": (R.L1(0.3), lambda w: 0.3 * np.abs(w).sum()),
    "l2": (R.L2(0.3), lambda w: 0.3 * (w**2).sum()),
    "l1_l2": (R.L1L2(0.2, 0.3), lambda w: 0.2 * np.abs(w).sum() + 0.3 * (w**2).sum()),
    "l1_l2 of nothing": (R.L1L2(), lambda w: 0.0),
    "default l1": (R.get("l1"), lambda w: 0.01 * np.abs(w).sum()),
    "default l2": (R.get("L2"), lambda w: 0.01 * (w**2).sum()),
    "rows": (R.OrthogonalRegularizer(0.7), lambda w: orthogonal(w, 0.7, "rows")),
    "columns": (R.OrthogonalRegularizer(0.7, "columns"), lambda w: orthogonal(w, 0.7, "columns")),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_have_the_formulas_of_keras(name):
    made, oracle = PENALTIES[name]
    weight = torch.randn(4, 3, dtype=torch.float64)
    close(made(weight), oracle(weight.numpy()))


@given(st.integers(0, 1000))
def test_penalties_can_be_differentiated(seed):
    torch.manual_seed(seed)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    for made, _ in PENALTIES.values():
        if not isinstance(made, R.L1L2) or made.l1 or made.l2:
            (gradient,) = torch.autograd.grad(made(weight), weight)
            assert torch.isfinite(gradient).all()


def test_a_row_of_zeros_is_orthogonal_and_has_a_finite_gradient():
    weight = torch.eye(3, dtype=torch.float64)
    weight[1] = 0
    weight.requires_grad_()
    value = R.OrthogonalRegularizer(1.0)(weight)
    value.backward()
    assert float(value.detach()) == 0.0 and torch.isfinite(weight.grad).all()


def test_a_penalty_sums_over_the_trainable_parameters_that_match():
    model = net()
    model[0].weight.requires_grad_(False)
    objective = ll.Objective("mse", regularizers={"*.weight": R.L2(1.0), "0.*": R.L1(1.0), "*": "l2"})
    b = objective(torch.zeros(1, 1), torch.zeros(1, 1), model=model)
    close(b.terms["l2/*.weight"].value, model[1].weight.detach().square().sum())
    close(b.terms["l1/0.*"].value, model[0].bias.detach().abs().sum())
    close(b.terms["l2"].value, sum(0.01 * p.detach().square().sum() for p in model.parameters() if p.requires_grad))


def test_a_penalty_of_your_own_is_a_term():
    class Largest(R.Regularizer):
        name = "largest"

        def __call__(self, weight):
            return weight.abs().max()

    b = ll.Objective("mse", regularizers={"1.bias": Largest()})(torch.zeros(1, 1), torch.zeros(1, 1), model=net())
    close(b.terms["largest/1.bias"].value, net()[1].bias.detach().abs().max())


# --- added losses --------------------------------------------------------------------------------------------------


def test_an_added_loss_of_one_number_a_sample_is_their_mean_for_every_split():
    value = rand(B)
    y, p, objective = torch.zeros(B, 1), torch.ones(B, 1), ll.Objective("mse")
    parts = [objective.tallies(y[s], ll.Outputs(p[s], {"kl": value[s]})) for s in (slice(0, 1), slice(1, 6))]
    close(sum(part["kl"] for part in parts).value, value.mean())


def test_add_loss_outside_of_training_does_nothing():
    ll.add_loss("kl", torch.zeros(()))
    ll.add_loss("kl", torch.zeros(()))


def test_a_name_is_added_once_in_a_forward():
    class Twice(nn.Linear):
        def forward(self, x):
            ll.add_loss("kl", x.mean())
            ll.add_loss("kl", x.mean())
            return super().forward(x)

    model = ll.Model(Twice(1, 1))
    model.compile("sgd", "mse")
    with pytest.raises(ll.errors.InputError, match="'kl' was already used"):
        model.evaluate(torch.zeros(2, 1), torch.zeros(2, 1), verbose=0)
