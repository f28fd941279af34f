"""`explain`: every number that it shows, against formulas in NumPy; shapes, sentences, forms, the command line."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

import declarations
import lossledger as ll
import oracles
from lossledger.cli import main
from lossledger.errors import InputError

L = ll.losses
B, H, C = 4, 6, 5
RNG = np.random.default_rng(5)
Y = (RNG.random((B, H, H, C)) < 0.3).astype(float)
Z = RNG.normal(0, 2, (B, H, H, C))
P = oracles.sigmoid(Z)
LABELS = RNG.integers(0, C, (B, H))
SCORES = RNG.normal(0, 2, (B, H, C))
MASK = np.arange(H) < np.array([6, 4, 2, 1])[:, None]
WEIGHT = np.array([1.0, 3.0, 0.5, 2.0])
LN2 = np.log(2)

bce = L.BinaryCrossentropy(from_logits=True)
sparse = L.SparseCategoricalCrossentropy(from_logits=True)


def only(found):
    (term,) = found.terms
    return term


def level(term, name):
    return next(reference.value for reference in term.references if reference.name == name)


def entropy(p):
    return float(-sum(q * np.log(q) for q in p if q > 0))


def cross(labels, scores):
    return -np.log(np.take_along_axis(oracles.softmax(scores), labels[..., None], -1))[..., 0]


# --- the numbers of a mean ----------------------------------------------------------------------------------------


def test_each_step_of_a_mean():
    term = only(ll.explain(bce, Y, Z))
    elements = oracles.bce_logits(Y, Z)
    assert [(step.operation, step.shape) for step in term.steps] == [
        ("output", (4, 6, 6, 5)),
        ("loss of each element", (4, 6, 6, 5)),
        ("mean over class", (4, 6, 6)),
        ("Σ 144 entries", ()),
        ("÷ 144 entries", ()),
    ]
    assert term.steps[-2].value == pytest.approx(elements.mean(-1).sum())
    assert term.steps[-1].value == pytest.approx(elements.mean()) == pytest.approx(term.value)
    assert term.divisor.value == 144 and "4 × 6 × 6" in term.divisor.source
    assert term.equation == f"Σ l / entries = {elements.mean(-1).sum():.6g} / 144 = {elements.mean():.6g}"


def test_the_identity_without_weights():
    term = only(ll.explain(bce, Y, Z))
    own = oracles.bce_logits(Y, Z).mean((1, 2, 3))
    assert f"samples' own means is {own.mean():.6g}" in term.order and "does not matter" in term.order


def test_the_order_under_a_mask():
    term = only(ll.explain(sparse, LABELS, SCORES, mask=MASK))
    losses = cross(LABELS, SCORES)
    own = np.mean([losses[i][MASK[i]].mean() for i in range(B)])
    assert term.order.startswith("The order matters")
    assert f"{losses[MASK].mean():.6g}" in term.order and f"{own:.6g}" in term.order
    other = only(
        ll.explain(
            L.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_per_sample"), LABELS, SCORES, mask=MASK
        )
    )
    assert other.value == pytest.approx(own) and f"{losses[MASK].mean():.6g}" in other.order


DIVISORS = {
    "sum_over_batch_size": lambda w, m: m.sum(),
    "mean_with_sample_weight": lambda w, m: (w[:, None] * m).sum(),
    "sum_over_all_entries": lambda w, m: m.size,
    "sum_over_nonzero_weights": lambda w, m: ((w[:, None] * m) != 0).sum(),
    "mean_per_sample": lambda w, m: m.any(1).sum(),
    "sum": lambda w, m: 1,
}


@pytest.mark.parametrize("reduction", DIVISORS)
def test_the_divisor_and_its_source(reduction):
    loss = L.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    term = only(ll.explain(loss, LABELS, SCORES, sample_weight=WEIGHT, mask=MASK))
    divisor = DIVISORS[reduction](WEIGHT, MASK)
    entries = cross(LABELS, SCORES) * WEIGHT[:, None] * MASK
    if reduction == "mean_per_sample":
        entries = entries / MASK.sum(1)[:, None]
    assert term.divisor.value == pytest.approx(divisor)
    assert term.divisor.source
    total = next(step.value for step in term.steps if step.operation.startswith("Σ"))
    assert total == pytest.approx(entries.sum())
    assert term.value == pytest.approx(entries.sum() / divisor)
    operations = [step.operation for step in term.steps]
    assert "× weight" in operations and "× mask: 13 entries count" in operations


def test_a_divisor_of_your_own_is_named():
    own = ll.Reduction("per_batch", lambda weighting: weighting.shape[0])
    term = only(ll.explain(L.MeanSquaredError(reduction=own), Y[:, 0], Z[:, 0]))
    assert "per_batch" in term.divisor.source


def test_class_weights_of_torch_divide():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    labels = torch.as_tensor(LABELS[:, 0])
    term = only(ll.explain(nn.CrossEntropyLoss(weight=weight), labels, torch.as_tensor(SCORES[:, 0])))
    assert term.divisor.value == pytest.approx(float(weight[labels].sum()))
    assert term.divisor.name == "Σ class weights"
    expected = nn.functional.cross_entropy(torch.as_tensor(SCORES[:, 0]), labels, weight)
    assert term.value == pytest.approx(float(expected))


# --- contributions ------------------------------------------------------------------------------------------------


def test_contributions_by_class_and_term():
    found = ll.explain(0.5 * bce + L.Dice(from_logits="sigmoid", axis=(0, 1, 2)), Y, Z)
    assert sum(term.contribution for term in found.terms) == pytest.approx(found.value)
    for term in found.terms:
        assert sum(group.contribution for group in term.groups) == pytest.approx(term.contribution)
        assert sum(group.share for group in term.groups) == pytest.approx(1)
    elements = oracles.bce_logits(Y, Z)
    groups = {group.name: group for group in found.terms[0].groups}
    present = groups["class 2 present"]
    assert present.count == Y[..., 2].sum()
    assert present.mean == pytest.approx(elements[..., 2][Y[..., 2] == 1].mean())
    assert present.contribution == pytest.approx(0.5 * elements[..., 2][Y[..., 2] == 1].sum() / elements.size)


def test_classes_have_their_names():
    names = ["sky", "road", "wall", "tree", "lesion"]
    found = only(ll.explain(ll.Objective(bce, class_names=names), Y, Z)).groups
    plain = only(ll.explain(bce, Y, Z)).groups
    for group, other in zip(found, plain, strict=True):
        number, presence = other.name.split()[1:]
        assert (group.name, group.contribution) == (f"class {names[int(number)]} {presence}", other.contribution)


def test_contributions_by_output_and_regularizers():
    net = nn.Linear(2, 1).double()
    nn.init.constant_(net.weight, 0.5)
    objective = ll.Objective({"price": "mse", "sold": bce}, loss_weights={"price": 0.25}, regularizers={"weight": "l2"})
    y = {"price": Y[:, 0, 0], "sold": Y[:, 1, 1]}
    z = {"price": Z[:, 0, 0], "sold": Z[:, 1, 1]}
    found = ll.explain(objective, y, z, model=net)
    price, sold = 0.25 * ((y["price"] - z["price"]) ** 2).mean(), oracles.bce_logits(y["sold"], z["sold"]).mean()
    assert dict(found.outputs) == pytest.approx({"price": price, "sold": sold, "regularizer": 0.01 * 0.5})
    assert found.value == pytest.approx(price + sold + 0.005)
    assert [term.role for term in found.terms] == ["data", "data", "regularizer"]


def test_class_weight():
    weights = {1: 3.0, 2: 0.5}
    term = only(ll.explain(sparse, LABELS, SCORES, class_weight=weights))
    factor = np.vectorize(lambda k: weights.get(k, 1.0))(LABELS)
    assert term.value == pytest.approx((factor * cross(LABELS, SCORES)).mean())
    with pytest.raises(InputError, match="Give it to the objective"):
        ll.explain(ll.Objective(sparse), LABELS, SCORES, class_weight=weights)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
@pytest.mark.parametrize("loss", [L.BinaryCrossentropy, L.BinaryFocalCrossentropy])
def test_class_weight_by_column(loss, reduction):
    weights = np.array([1.0, 4.0, 0.5, 2.0, 9.0])
    term = only(ll.explain(loss(from_logits=True, reduction=reduction), Y, Z, class_weight=list(weights)))
    levels = {level.name: level.value for level in term.references}
    # The weight of a column does not change how often its class occurs.
    rates = torch.as_tensor(Y.mean((0, 1, 2)))
    constant = loss(from_logits=True, reduction=reduction)(Y, rates.logit().expand(Y.shape), sample_weight=None)
    assert levels["base rate"] != pytest.approx(float(constant))
    weighted = ll.Objective(loss(from_logits=True, reduction=reduction), class_weight=list(weights))
    assert levels["base rate"] == pytest.approx(
        float(weighted(torch.as_tensor(Y), rates.logit().expand(Y.shape)).total)
    )


# --- levels -------------------------------------------------------------------------------------------------------


def test_levels_of_independent_columns():
    term = only(ll.explain(bce, Y, Z))
    rates = Y.mean((0, 1, 2))
    base = np.mean([entropy((q, 1 - q)) for q in rates])
    assert level(term, "chance") == pytest.approx(LN2)
    assert level(term, "base rate") == pytest.approx(base)
    assert level(term, "floor") == 0
    assert level(term, "double sigmoid") == pytest.approx(Y.mean() * np.log1p(np.exp(-1)) + (1 - Y.mean()) * LN2)
    assert term.skill == pytest.approx(1 - oracles.bce_logits(Y, Z).mean() / base)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "mean_per_sample", "sum"])
def test_the_base_rate_under_weights_and_mask(reduction):
    loss = L.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    term = only(ll.explain(loss, LABELS, SCORES, sample_weight=WEIGHT, mask=MASK))
    weight = WEIGHT[:, None] * MASK
    if reduction == "mean_per_sample":
        weight = weight / MASK.sum(1)[:, None]
    rates = np.array([(weight * (k == LABELS)).sum() for k in range(C)]) / weight.sum()
    divisor = DIVISORS[reduction](WEIGHT, MASK)
    assert level(term, "base rate") == pytest.approx(entropy(rates) * weight.sum() / divisor)
    assert level(term, "chance") == pytest.approx(np.log(C) * weight.sum() / divisor)


@pytest.mark.parametrize(
    ("classes", "smoothed", "double"), [(2, 0.1985, 0.3133), (5, 0.3897, 0.9048), (10, 0.5003, 1.4612)]
)
def test_floors_of_exclusive_classes(classes, smoothed, double):
    y = np.eye(classes)[RNG.integers(0, classes, 40)]
    z = RNG.normal(0, 1, (40, classes))
    term = only(ll.explain(L.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), y, z))
    target = [0.9 + 0.1 / classes, *[0.1 / classes] * (classes - 1)]
    assert level(term, "floor") == pytest.approx(entropy(target)) == pytest.approx(smoothed, abs=1e-4)
    plain = only(ll.explain(L.CategoricalCrossentropy(from_logits=True), y, z))
    assert level(plain, "floor") == 0
    assert level(plain, "double softmax") == pytest.approx(-np.log(np.e / (np.e + classes - 1)))
    assert level(plain, "double softmax") == pytest.approx(double, abs=1e-4)
    assert level(plain, "chance") == pytest.approx(np.log(classes))


def test_the_floor_of_soft_labels():
    y = oracles.softmax(RNG.normal(0, 1, (30, C)))
    term = only(ll.explain(L.CategoricalCrossentropy(), y, oracles.softmax(RNG.normal(0, 1, (30, C)))))
    assert level(term, "floor") == pytest.approx(np.mean([entropy(row) for row in y]))
    assert any("no prediction gets below" in reference.meaning for reference in term.references)


def test_a_double_softmax_is_noticed():
    term = only(ll.explain(sparse, LABELS, oracles.softmax(SCORES)))
    assert "looks like probabilities" in term.references[-1].meaning
    assert "looks like" not in only(ll.explain(sparse, LABELS, SCORES)).references[-1].meaning


def test_torch_has_its_class_axis_at_one():
    y, z = torch.as_tensor(LABELS), torch.as_tensor(SCORES).movedim(-1, 1)
    found, ours = only(ll.explain(nn.CrossEntropyLoss(), y, z)), only(ll.explain(sparse, LABELS, SCORES))
    for name in ("chance", "base rate", "floor", "double softmax"):
        assert level(found, name) == pytest.approx(level(ours, name), abs=1e-12)


def test_levels_of_regression():
    y, p = RNG.normal(1, 2, (31, 3)), RNG.normal(0, 1, (31, 3))
    squared = only(ll.explain("mse", y, p))
    assert level(squared, "base rate") == pytest.approx(y.var(0).mean())
    assert squared.skill == pytest.approx(1 - ((y - p) ** 2).mean() / y.var(0).mean())
    absolute = only(ll.explain("mae", y, p))
    assert level(absolute, "base rate") == pytest.approx(np.abs(y - np.median(y, 0)).mean())


def test_a_base_rate_below_0_gives_no_skill():
    # The likelihood of Poisson counts without its constant may be negative.
    term = only(ll.explain("poisson", np.full((6, 1), 9.0) + np.arange(6)[:, None], np.full((6, 1), 10.0)))
    assert level(term, "base rate") < 0 and term.skill is None


def test_weights_inside_a_smoothed_loss_have_no_floor():
    y, z = torch.as_tensor(LABELS), torch.as_tensor(SCORES).movedim(-1, 1)
    weight = torch.arange(1.0, C + 1).double()
    for module, floor in (
        (nn.CrossEntropyLoss(label_smoothing=0.1), True),
        (nn.CrossEntropyLoss(weight, label_smoothing=0.1), False),
    ):
        names = [reference.name for reference in only(ll.explain(module, y, z)).references]
        assert ("floor" in names) is floor


@pytest.mark.parametrize(("loss", "choices"), [(L.InfoNCE(), 7), (L.NTXent(), 13)])
def test_chance_among_the_samples_of_a_batch(loss, choices):
    term = only(ll.explain(loss, np.zeros(7), RNG.normal(0, 1, (7, 2, 3))))
    assert level(term, "chance") == pytest.approx(np.log(choices))


def test_in_batch_negatives_are_ln_n():
    term = only(ll.explain(sparse, np.arange(8), RNG.normal(0, 1, (8, 8))))
    assert level(term, "chance") == pytest.approx(np.log(8)) and "ln N with N = 8" in term.references[0].meaning


def test_levels_of_overlap():
    term = only(ll.explain(L.Dice(from_logits="sigmoid", axis=(0, 1, 2)), Y, Z))
    rates, size = Y.mean((0, 1, 2)), B * H * H
    expected = np.mean([1 - 2 * q * q * size / (2 * q * size) for q in rates])
    assert level(term, "base rate") == pytest.approx(expected)
    assert level(term, "nothing found") == pytest.approx(1)


# --- consistency --------------------------------------------------------------------------------------------------


def dice_of(y, p, axes):
    return 1 - 2 * (y * p).sum(axes) / (y.sum(axes) + p.sum(axes))


def iou_of(y, p, axes):
    return (y * p).sum(axes) / (y + p - y * p).sum(axes)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2)])
def test_dice_cannot_be_below_what_iou_allows(axes):
    hard = (Z > 0).astype(float)
    iou, decided = iou_of(Y, hard, axes).mean(), dice_of(Y, hard, axes).mean()
    bound = (1 - iou) / (1 + iou)
    assert decided >= bound
    (text,) = only(ll.explain(L.Dice(from_logits="sigmoid", axis=axes), Y, Z)).consistency
    for number in (iou, bound, decided, dice_of(Y, P, axes).mean()):
        assert f"{number:.4f}" in text


def test_dice_of_exclusive_classes_is_decided_by_argmax():
    y, hard = np.eye(C)[LABELS], np.eye(C)[SCORES.argmax(-1)]
    (text,) = only(ll.explain(L.Dice(from_logits="softmax", axis=(0, 1)), y, SCORES)).consistency
    assert f"IoU of 5 cells is {iou_of(y, hard, (0, 1)).mean():.4f}" in text


@pytest.mark.parametrize("logits", [True, False])
def test_errors_cost_at_least_ln_2(logits):
    term = only(ll.explain(L.BinaryCrossentropy(from_logits=logits), Y, Z if logits else P))
    wrong = (Y == 1) != (Z > 0)
    (text,) = term.consistency
    assert f"{wrong.sum():,} elements" in text and f"below {wrong.mean() * LN2:.4f}" in text
    assert term.value >= wrong.mean() * LN2
    (text,) = only(ll.explain(sparse, LABELS, SCORES, sample_weight=WEIGHT, mask=MASK)).consistency
    share = ((SCORES.argmax(-1) != LABELS) * MASK * WEIGHT[:, None]).sum() / MASK.sum()
    assert f"below {share * LN2:.4f}" in text


def test_smoothed_labels_have_no_bound():
    assert only(ll.explain(L.BinaryCrossentropy(label_smoothing=0.1), Y, P)).consistency == ()


# --- a window -----------------------------------------------------------------------------------------------------


def test_parts_of_a_window():
    found = ll.explain(sparse, LABELS, SCORES, sample_weight=WEIGHT, mask=MASK, parts=[1, 3])
    losses = cross(LABELS, SCORES) * WEIGHT[:, None] * MASK
    first, second = found.parts
    assert (first.samples, second.samples) == (1, 3)
    assert (first.divisor, second.divisor) == (6, 7)
    assert first.value == pytest.approx(losses[:1].sum() / 6) and second.value == pytest.approx(losses[1:].sum() / 7)
    assert first.share == pytest.approx(6 / 13)
    assert first.share * first.value + second.share * second.value == pytest.approx(found.value)
    assert found.mean_of_parts == pytest.approx((first.value + second.value) / 2)


def test_parts_of_a_ratio_have_no_divisor():
    found = ll.explain(bce + L.Dice(from_logits="sigmoid"), Y, Z, parts=[2, 1, 1])
    assert [part.divisor for part in found.parts if part.term == "dice"] == [None] * 3
    assert [part.divisor for part in found.parts if part.term != "dice"] == [72, 36, 36]


def test_parts_of_several_outputs():
    objective = ll.Objective({"a": "mse", "b": "mae"})
    y, z = ({"a": values[:, 0, 0], "b": values[:, 1, 1]} for values in (Y, Z))
    found = ll.explain(objective, y, z, sample_weight={"a": WEIGHT}, parts=[3, 1])
    assert [(part.term, part.samples) for part in found.parts[2:]] == [
        ("a/mean_squared_error", 1),
        ("b/mean_absolute_error", 1),
    ]
    assert found.parts[3].value == pytest.approx(np.abs(y["b"][3] - z["b"][3]).mean())


@pytest.mark.parametrize("parts", [[1, 2], [5], [4, 0], []])
def test_parts_must_add_up(parts):
    with pytest.raises(InputError, match="add up to the batch"):
        ll.explain(sparse, LABELS, SCORES, parts=parts)


# --- every loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("row", declarations.ROWS, ids=declarations.NAMES)
def test_the_books_of_every_loss(row, reduction):
    y_true, y_pred = row.inputs(np.random.default_rng(1), (4, 3))
    weight = np.array([1.0, 2.0, 0.5, 1.5])
    term = only(ll.explain(row.make(reduction=reduction), y_true, y_pred, sample_weight=weight))
    entries = (row.elements(y_true, y_pred).mean(-1).T * weight).T
    per_sample = entries.size // 4
    divisor = {"sum": 1, "sum_over_batch_size": entries.size, "mean_with_sample_weight": weight.sum() * per_sample}[
        reduction
    ]
    expected = entries.sum() / divisor
    assert term.value == pytest.approx(expected, rel=1e-6)
    numbers = [step.value for step in term.steps if step.value is not None]
    assert numbers[0] == pytest.approx(entries.sum(), rel=1e-6)
    assert numbers[-1] == pytest.approx(expected, rel=1e-6)
    assert term.divisor.value == pytest.approx(divisor)
    if term.groups:
        assert sum(group.contribution for group in term.groups) == pytest.approx(expected, rel=1e-6)
    assert all(np.isfinite(reference.value) for reference in term.references)


def test_lists_are_arrays():
    found = ll.explain("mse", [[0.0], [0.0]], [[1.0], [3.0]], sample_weight=[1.0, 2.0], mask=[1, 1], parts=[1, 1])
    assert found.value == 9.5 and [part.value for part in found.parts] == [1.0, 18.0]


def test_a_function_that_returns_one_number():
    found = ll.explain(lambda y_true, y_pred: (y_true - y_pred).square().sum(), torch.zeros(3, 1), torch.ones(3, 1))
    assert found.value == 3 and only(found).steps[-1].value == 3
    assert str(found)


def test_a_batch_that_is_masked_altogether():
    found = ll.explain(sparse, LABELS, SCORES, mask=np.zeros((B, H), bool))
    assert found.value == 0 and "Nothing counts" in only(found).order
    assert only(found).skill is None


# --- forms --------------------------------------------------------------------------------------------------------

SHOWN = ll.explain(0.5 * bce + L.Dice(from_logits="sigmoid", axis=(0, 1, 2)), Y, Z, parts=[1, 3])


def test_sentences_say_it_first():
    text = str(SHOWN)
    assert 2 <= len(SHOWN.sentences) <= 3
    assert " ".join(text.split()).startswith(" ".join(SHOWN.sentences))


def test_text_is_80_columns_and_complete():
    lines = str(SHOWN).splitlines()
    assert max(len(line) for line in lines) <= 80
    for term in SHOWN.terms:
        for step in term.steps:
            assert step.operation.split()[0] in str(SHOWN)


def test_rich_shows_the_same():
    file = io.StringIO()
    Console(file=file, width=80, color_system=None).print(SHOWN)
    assert [line.rstrip() for line in file.getvalue().rstrip().splitlines()] == str(SHOWN).splitlines()


def test_dict_is_plain():
    assert json.loads(json.dumps(SHOWN.to_dict()))["value"] == SHOWN.value


def test_html_holds_the_numbers_and_escapes_names():
    page = SHOWN._repr_html_()
    for term in SHOWN.terms:
        assert term.name in page and term.divisor.source.split(":")[0] in page
    hostile = ll.explain(L.MeanSquaredError(name="<script>alert(1)</script>"), Y[:, 0, 0], Z[:, 0, 0])
    assert "<script>" not in hostile._repr_html_()
    assert "\x1b" not in str(ll.explain(L.MeanSquaredError(name="a\x1b[31mb"), Y[:, 0, 0], Z[:, 0, 0]))


def test_no_gradient_and_nothing_changed():
    z = torch.as_tensor(Z).requires_grad_()
    before = z.detach().clone()
    ll.explain(bce, Y, z)
    assert z.grad is None and torch.equal(z.detach(), before)


# --- the command line ---------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    file = tmp_path / "batch.npz"
    np.savez(file, y_true=LABELS, y_pred=SCORES, mask=MASK, class_weight=np.arange(1.0, C + 1))
    call = ["explain", str(file), "--loss", "SparseCategoricalCrossentropy", "--from-logits"]
    expected = ll.explain(sparse, LABELS, SCORES, mask=MASK, class_weight=np.arange(1.0, C + 1))
    done = CliRunner().invoke(main, call)
    assert done.exit_code == 0 and done.output.rstrip("\n") == str(expected)
    plain = CliRunner().invoke(main, [*call, "--json"])
    assert json.loads(plain.output) == json.loads(json.dumps(expected.to_dict()))


def test_command_line_refuses(tmp_path):
    file = tmp_path / "batch.npz"
    np.savez(file, y_true=LABELS)
    assert "no array y_pred" in CliRunner().invoke(main, ["explain", str(file), "--loss", "mse"]).output
    np.savez(file, y_true=LABELS, y_pred=SCORES)
    done = CliRunner().invoke(main, ["explain", str(file), "--loss", "mse", "--from-logits"])
    assert done.exit_code == 1 and "has no from_logits" in done.output
