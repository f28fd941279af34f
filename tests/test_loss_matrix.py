"""What every loss must bear, from its row alone: mistakes, no data, NaN, copies, compilers, vectorised problems."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch

import lossledger as ll
from checks import case, close, tensors, value_and_gradient
from declarations import COUPLED, MATRIX, REDUCTIONS, ROWS
from lossledger.errors import InputError, InputTypeError, LossledgerError

SEED = 7


def parametrize(rows):
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in rows])


def good(row, **options):
    return tensors(case(row, SEED, samples=9, **options))


# --- values of losses that are no mean of elements -----------------------------------------------------------------


@parametrize(COUPLED)
def test_value_and_gradient_of_a_whole(row):
    arrays = case(row, SEED, samples=9)
    loss = row.make()
    tally, gradient = value_and_gradient(loss, *arrays)
    assert float(tally.value.detach()) == pytest.approx(row.whole(*arrays), abs=1e-9)
    y, p, w, m = tensors(arrays)
    assert close(loss.backprop(y, p, w, m)[1], gradient)
    assert torch.autograd.gradcheck(lambda q: loss(y, q, w, m), (p.requires_grad_(),))


@parametrize(COUPLED)
def test_groups_of_a_whole_balance(row):
    for by in row.kinds:
        tally = row.make().tally(*good(row), by=by)
        assert close(tally.contributions().sum(), tally.value)


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "mistake"),
    [pytest.param(row, one, id=f"{row.name}-{one.name}") for row in MATRIX for one in row.all_mistakes()],
)
def test_mistakes_are_refused(row, mistake):
    loss = row.make()
    y, p, _, _ = good(row)
    with pytest.raises(mistake.error) as caught:
        mistake.make(loss, y, p)
    missing = [word for word in mistake.words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize(
    ("row", "argument", "value"),
    [pytest.param(row, *one, id=f"{row.name}-{one[0]}={one[1]}") for row in MATRIX for one in row.refused],
)
def test_arguments_out_of_range_are_refused(row, argument, value):
    loss = row.make()
    with pytest.raises((InputError, InputTypeError)) as caught:
        type(loss)(**{**loss.get_config(), argument: value})
    assert argument in str(caught.value) and str(value) in str(caught.value)


@parametrize(MATRIX)
def test_a_prediction_that_is_nan_is_counted_not_hidden(row):
    y, p, _, _ = good(row)
    p[0] = np.nan
    tally = row.make().tally(y, p)
    assert int(tally.nonfinite) >= 1 and not torch.isfinite(tally.value)


# --- no data -------------------------------------------------------------------------------------------------------


@parametrize(MATRIX)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [False, True])
def test_a_batch_of_no_samples_is_zero(row, reduction, weights):
    y, p, w, m = (a[:0] for a in good(row))
    given = (y, p, w, m) if weights else (y, p, None, None)
    loss = row.make(reduction=reduction)
    tally, gradient = loss.backprop(*given)
    assert float(tally.value) == 0 and int(tally.count) == 0 and int(tally.nonfinite) == 0
    assert gradient.shape == p.shape
    prediction = p.clone().requires_grad_()
    value = loss(y, prediction, *given[2:])
    value.backward()
    assert float(value.detach()) == 0 and prediction.grad.shape == p.shape


@parametrize(MATRIX)
def test_a_part_without_samples_is_neutral(row):
    y, p, w, m = good(row)
    loss = row.make()
    whole = loss.tally(y, p, w, m)
    total = loss.tally(y[:0], p[:0], w[:0], m[:0]) + whole
    assert close(total.value, whole.value) and int(total.count) == int(whole.count)


@parametrize(MATRIX)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_that_is_all_masked_is_zero_with_zero_gradient(row, reduction):
    y, p, w, m = good(row)
    loss = row.make(reduction=reduction)
    tally, gradient = value_and_gradient(loss, y, p, w, torch.zeros_like(m))
    _, closed = loss.backprop(y, p, w, torch.zeros_like(m))
    assert float(tally.value.detach()) == 0 and int(tally.count) == 0
    assert not gradient.any() and not closed.any()


# --- the caller's tensors ------------------------------------------------------------------------------------------


@parametrize(MATRIX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_at_least_float32(row, dtype):
    y, p, _, _ = good(row)
    prediction = p.to(dtype)
    got, expected = row.make()(y, prediction), row.make()(y, prediction.double())
    assert got.dtype == torch.float32
    assert close(got, expected, 1e-5)
    _, gradient = row.make().backprop(y, prediction)
    assert gradient.dtype == dtype and gradient.shape == prediction.shape


@parametrize(MATRIX)
@pytest.mark.parametrize("dtype", ["float64", torch.float16])
def test_the_dtype_of_the_result_can_be_chosen(row, dtype):
    y, p, w, m = good(row)
    got = row.make(dtype=dtype)(y, p.float(), w, m)
    assert got.dtype == (torch.float64 if dtype == "float64" else dtype)


@parametrize(MATRIX)
def test_inputs_are_never_written_to(row):
    given = good(row)
    before = [one.clone() for one in given]
    row.make()(*given)
    row.make().backprop(*given)
    for a, b in zip(given, before, strict=True):
        assert torch.equal(a, b)


# --- copies --------------------------------------------------------------------------------------------------------

COPIES = {"pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "deepcopy": copy.deepcopy}


@parametrize(MATRIX)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_copy_is_the_same_loss(row, copied, reduction):
    loss = row.make(reduction=reduction)
    again = copied(loss)
    given = good(row)
    assert type(again) is type(loss) and again is not loss
    assert again.reduction is loss.reduction and repr(again) == repr(loss)
    assert again.get_config() == loss.get_config()
    assert torch.equal(again(*given), loss(*given))


@parametrize([row for row in MATRIX if type(row.make()) in ll.losses.registry.CLASSES.values()])
def test_the_configuration_makes_the_same_loss(row):
    loss = row.make(reduction="sum", dtype="float64")
    again = ll.losses.deserialize(json.loads(json.dumps(ll.losses.serialize(loss))))
    assert type(again) is type(loss) and again.get_config() == loss.get_config()
    given = good(row)
    assert torch.equal(again(*given), loss(*given))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_expressions_objectives_and_tallies_can_be_copied(copied):
    y, p = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.2, 0.7], [0.9, 0.4]])
    loss = 0.5 * ll.losses.BinaryCrossentropy() + ll.losses.Dice(axis=(0, 1))
    assert torch.equal(copied(loss)(y, p), loss(y, p))
    objective = ll.Objective(loss, class_weight={0: 2.0})
    assert torch.equal(copied(objective)(y, p).total, objective(y, p).total)
    tally = ll.losses.BinaryCrossentropy().tally(y, p, by="class")
    again = copied(tally)
    assert torch.equal((again + tally).contributions(), (tally + tally).contributions())
    # The neutral tally is recognised by being itself.
    assert copied(ll.Tally.zero()) is ll.Tally.zero()
    assert copied(ll.losses.Dice(reduction="none")).reduction is ll.losses.Dice(reduction=None).reduction


# --- torch.compile -------------------------------------------------------------------------------------------------


def call_of(row):
    """Value and gradient of a call, from targets, predictions, weight and mask."""
    loss = row.make()

    def run(y, p, w, m, how=lambda function: function):
        leaf = p.clone().requires_grad_()
        value = how(loss)(y, leaf, w, m)
        value.backward()
        return value.detach(), leaf.grad

    return run


def step_of(row):
    """The same as a training step computes them."""
    loss = row.make()

    def step(y, p, w, m):
        tally, gradient = loss.backprop(y, p, w, m)
        return tally.value, gradient

    return lambda y, p, w, m, how=lambda function: function: how(step)(y, p, w, m)


# What torch says of itself: Dynamo looks at tensors between two graphs, Inductor imports an older compiler.
OF_TORCH = ("The .grad attribute of a Tensor that is not a leaf", "`torch.jit.script", "`torch._prims_common.check`")


def compare_compiled(row, run, backend, tolerance, one_graph):
    given = good(row)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        for says in OF_TORCH:
            warnings.filterwarnings("ignore", says)
        graph = run(*given, lambda function: torch.compile(function, backend=backend, fullgraph=one_graph))
    for mine, theirs in zip(graph, run(*given), strict=True):
        assert close(mine, theirs, tolerance)


def one_a_class(rows):
    """The first row of each class and space: compiling takes half a second, and `make test-slow` has all rows."""
    return list({(type(row.make()), getattr(row.make(), "space", None)): row for row in reversed(rows)}.values())


@parametrize(one_a_class(MATRIX))
def test_a_compiled_call_is_one_graph_with_the_same_value_and_gradient(row):
    compare_compiled(row, call_of(row), "aot_eager", 1e-14, row.one_graph)


@parametrize(one_a_class([row for row in MATRIX if row.closed or row.name == "binary-focal"]))
def test_a_compiled_step_has_the_same_value_and_gradient(row):
    """One graph where the gradient is in closed form; else it is left once, for autograd."""
    compare_compiled(row, step_of(row), "eager", 1e-14, row.closed)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_compiled_call_is_one_graph_with_every_reduction(reduction, weights):
    row = next(row for row in MATRIX if row.name == "bce-logits")
    loss, given = row.make(reduction=reduction), good(row, weights=weights, masks=weights)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(loss, backend="eager", fullgraph=True)(*given), loss(*given))


@pytest.mark.slow
@parametrize(MATRIX)
def test_inductor_gives_the_same_value_and_gradient(row):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler; none was found")
    compare_compiled(row, call_of(row), "inductor", 1e-12, row.one_graph)
    compare_compiled(row, step_of(row), "inductor", 1e-12, row.closed)


@pytest.mark.parametrize("name", ["bce-logits", "sparse-logits", "mse", "dice-all", "dice-sample"])
def test_batches_of_other_sizes_do_not_compile_again_and_again(name):
    row = next(row for row in MATRIX if row.name == name)
    loss, graphs = row.make(), []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    run = torch.compile(loss, backend=counting, fullgraph=True)
    for samples in (3, 5, 6, 7, 9):
        given = tensors(case(row, SEED, samples=samples))
        assert torch.equal(run(*given), loss(*given))
    # The first size, and then one for all sizes.
    assert len(graphs) == 2


# --- torch.func ----------------------------------------------------------------------------------------------------


@parametrize(MATRIX)
@pytest.mark.parametrize("weights", [False, True])
def test_many_problems_at_once_are_each_by_itself(row, weights):
    loss = row.make()
    problems = [tensors(case(row, seed, samples=9, weights=weights, masks=weights)) for seed in range(3)]
    y, p, w, m = (None if parts[0] is None else torch.stack(parts) for parts in zip(*problems, strict=True))
    axes = (0, 0, 0, 0) if weights else (0, 0, None, None)

    def call(p, y, w, m):
        return loss(y, p, w, m)

    gradient = torch.func.grad(call)
    with warnings.catch_warnings():
        if not row.batched:
            warnings.filterwarnings("ignore", "There is a performance drop")
        assert close(torch.vmap(call, axes)(p, y, w, m), torch.stack([loss(*one) for one in problems]))
        alone = torch.stack([gradient(p, y, w, m) for y, p, w, m in problems])
        assert close(torch.vmap(gradient, axes)(p, y, w, m), alone)
    for one, (y, p, w, m) in zip(alone, problems, strict=True):
        assert close(one, value_and_gradient(loss, y, p, w, m)[1])


@pytest.mark.parametrize("along", [0, 1, 2])
def test_values_are_checked_in_every_problem_also_under_vmap(along):
    """Whatever axis holds the problems: a bad value in one of them is named."""
    labels, logits = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, 3)
    bad = labels.clone()
    bad[1, 3] = 3
    sparse, focal = ll.losses.SparseCategoricalCrossentropy(from_logits=True), ll.losses.BinaryFocalCrossentropy()
    with pytest.raises(InputError, match=r"from 0 to 2; received 3"):
        torch.vmap(sparse, (0, along))(bad, logits.movedim(0, along))
    outside = torch.full((2, 5, 3), 0.5)
    outside[1, 4, 2] = 7
    with pytest.raises(InputError, match="received 7"):
        torch.vmap(focal, (along, along))(*(a.movedim(0, along) for a in (torch.zeros(2, 5, 3), outside)))
    halves = torch.full((2, 5), 0.5)
    with pytest.raises(InputError, match="booleans"):
        torch.vmap(lambda m: ll.losses.MeanSquaredError()(logits[0], logits[0], mask=m))(halves)


def test_compiled_calls_check_shapes_and_flag_values():
    """A graph has no branch on values: shapes are still refused, and what is no probability is NaN, not a number."""
    torch._dynamo.reset()
    run = torch.compile(ll.losses.BinaryCrossentropy(), backend="aot_eager")
    assert torch.isnan(run(torch.zeros(2, 1), torch.full((2, 1), 3.0)))
    with pytest.raises(LossledgerError, match="same shape"):
        run(torch.zeros(3, 1), torch.full((2, 1), 0.5))


def test_every_class_of_losses_has_a_row():
    tested = {type(row.make()) for row in MATRIX}
    untested = {name for name, kind in ll.losses.registry.CLASSES.items() if kind not in tested}
    assert not untested, f"losses without a row: {untested}"
    assert len({row.name for row in MATRIX}) == len(ROWS) + len(COUPLED)
