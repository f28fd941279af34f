"""The laws of DESIGN §2 for windows: every loss that adds up, however its data are cut over batches and ranks.

Ranks are threads here, which a window does not notice; `test_distributed.py` runs a part of it in processes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lossledger as ll
import lossledger.window.window as window_module
from declarations import REDUCTIONS, ROWS
from lossledger.errors import RankError
from lossledger.objective import Whole
from thread_ranks import on_threads, windows_take_threads
from window_laws import (
    ADDITIVE,
    COUPLED,
    POSITIONS,
    Problem,
    at_once,
    cut,
    expect_one_batch,
    gap,
    in_window,
    random_problem,
)

SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(["", "samples", "entries"])
DTYPES = st.sampled_from([torch.float64, torch.float32])


@pytest.fixture(autouse=True, scope="module")
def _threads():
    with windows_take_threads():
        yield


def ranks_of(problem):
    if len(problem.parts) == 1:
        return [in_window(problem, None, 0)]
    return on_threads(len(problem.parts), lambda group: in_window(problem, group, group.rank))


def check(problem):
    expect_one_batch(problem, ranks_of(problem))


def drawn(data, rows):
    return random_problem(
        data.draw(SEEDS),
        rows,
        data.draw(st.sampled_from([1, 2, 3])),
        data.draw(DTYPES),
        weights=data.draw(KINDS),
        masks=data.draw(KINDS),
        empty=data.draw(st.booleans()),
        hidden=data.draw(st.booleans()),
        classes=data.draw(st.booleans()),
        more=data.draw(st.booleans()),
    )


def one_loss(row, data):
    check(drawn(data, [row]))


@pytest.mark.parametrize("row", ADDITIVE, ids=lambda row: row.name)
@settings(max_examples=6)
@given(st.data())
def test_every_loss_is_that_of_one_batch(row, data):
    one_loss(row, data)


@pytest.mark.slow
@pytest.mark.parametrize("row", ADDITIVE, ids=lambda row: row.name)
@settings(max_examples=100)
@given(st.data())
def test_every_loss_is_that_of_one_batch_in_many_cases(row, data):
    one_loss(row, data)


def several_outputs(data):
    """Outputs whose losses divide by different things: one in three counts elements, one weights, one samples."""
    rows = data.draw(st.lists(st.sampled_from(ADDITIVE), min_size=2, max_size=3))
    check(drawn(data, rows))


@settings(max_examples=120)
@given(st.data())
def test_several_outputs_are_those_of_one_batch(data):
    several_outputs(data)


@pytest.mark.slow
@settings(max_examples=2000)
@given(st.data())
def test_several_outputs_are_those_of_one_batch_in_many_cases(data):
    several_outputs(data)


@pytest.mark.parametrize("row", COUPLED, ids=lambda row: row.name)
@pytest.mark.parametrize("sizes", [[[3], [4]], [[3, 4]]], ids=["ranks", "batches"])
def test_losses_that_compare_samples_are_refused_in_parts(row, sizes):
    """Also where each rank has one batch only."""
    rng = np.random.default_rng(0)
    y, pred = (torch.as_tensor(v) for v in row.inputs(rng, (7, POSITIONS)))
    objective = ll.Objective({"a": row.make()})
    problem = Problem(objective, {"a": pred.double()}, {"a": y}, {}, {}, cut(rng, sizes))
    with pytest.raises(ll.errors.InputError, match="compares the samples"):
        ranks_of(problem)


# --- the check can fail --------------------------------------------------------------------------------------------


def unequal(reduction="sum_over_batch_size"):
    rng = np.random.default_rng(0)
    parts = cut(rng, [[2, 5], [1]])
    y, pred = (torch.as_tensor(rng.normal(size=(8, POSITIONS, 3))) for _ in range(2))
    mask = torch.as_tensor(rng.random((8, POSITIONS)) < 0.6)
    loss = ll.losses.MeanSquaredError(reduction=reduction)
    return Problem(ll.Objective({"a": loss}), {"a": pred}, {"a": y}, {}, {"a": mask}, parts)


def test_ranks_that_divide_by_their_own_sums_are_noticed(monkeypatch):
    check(unequal())
    monkeypatch.setattr(window_module, "summed", lambda share, tallies, samples, *_: Whole(tallies, samples))
    with pytest.raises(AssertionError):
        check(unequal())


def test_a_mean_of_means_is_noticed():
    problem = unequal()
    pieces = [ids for rank in problem.parts for ids in rank]
    net = problem.net()
    for ids in pieces:
        batch = problem.batch(ids)
        (problem.objective(batch.y, net(ids), mask=batch.mask).total / len(pieces)).backward()
    right = at_once(problem)
    assert gap([p.grad for p in net.parameters()], right.gradients) > 1e-3


def test_a_rank_that_fails_ends_the_others():
    problem = unequal()

    def work(group):
        if group.rank == 1:
            raise ZeroDivisionError("no batch here")
        with pytest.raises(RankError, match="no batch here"):
            in_window(problem, group, group.rank)

    with pytest.raises(ZeroDivisionError):
        on_threads(2, work)


# --- the table of DESIGN §2 ----------------------------------------------------------------------------------------

EVERY = set(REDUCTIONS)
HOLDS = {
    "repeat is weight 2": {"sum", "mean_with_sample_weight"},
    "mask is delete": EVERY - {"sum_over_all_entries"},
    "weight 0 is delete": {"sum", "mean_with_sample_weight", "sum_over_nonzero_weights"},
    "a masked sample is neutral": EVERY - {"sum_over_all_entries"},
}
# Weights and masks are in the sums of a ratio over the batch, whatever the reduction.
RATIOS = {f"{name}-{axis}" for name in ("dice", "jaccard", "tversky") for axis in ("all", "batch-by-class")}


def sides(row, reduction, law):
    """Two ways to say the same, on inputs where a violation must show; the first is cut over three ranks."""
    rng = np.random.default_rng(11)
    y, pred = (torch.as_tensor(v) for v in row.inputs(rng, (5, POSITIONS)))
    entries = (5,) if row.per_sample else (5, POSITIONS)
    weight, mask = torch.as_tensor(rng.uniform(0.2, 3, entries)), torch.ones(entries, dtype=torch.bool)
    everyone, others = torch.arange(5), torch.tensor([0, 1, 3, 4])
    objective = ll.Objective({"a": row.make(reduction=reduction)})

    def problem(ids, weight, mask=None, columns=slice(None)):
        if not row.per_sample:
            weight, mask = weight[:, columns], None if mask is None else mask[:, columns]
        parts = ((ids[:1], ids[1:3]), (), (ids[3:],))
        fields = [{"a": v} for v in (pred[:, columns], y if row.per_sample else y[:, columns], weight)]
        return Problem(objective, *fields, {} if mask is None else {"a": mask}, parts)

    if law == "repeat is weight 2":
        heavy = weight.clone()
        heavy[1] *= 2
        return problem(torch.tensor([0, 1, 1, 2, 3, 4]), weight), problem(everyone, heavy)
    if law == "mask is delete":
        mask[:, -1] = False
        return problem(everyone, weight, mask), problem(everyone, weight, mask, slice(-1))
    if law == "weight 0 is delete":
        light = weight.clone()
        light[2] = 0
        return problem(everyone, light), problem(others, weight)
    mask[2] = False
    return problem(everyone, weight, mask), problem(others, weight)


def same(left, right):
    """Whether ranks found on one side what one batch gives on the other; gradients of deleted entries are 0."""
    (found, *_), expected = ranks_of(left), at_once(right)
    tolerance = 1e-12 * max(expected.size, abs(found.total))
    if abs(found.total - expected.total) > 2 * tolerance:
        return False
    (shared, mine), (other, theirs) = found.gradients, expected.gradients
    assert bool((mine[:, theirs.shape[1] :] == 0).all())
    pairs = [mine[:, : theirs.shape[1]] - theirs, shared - other]
    return max(float(p.norm()) for p in pairs) <= tolerance + 1e-12 * (sum(found.parts) + float(other.norm()))


TABLE = [
    # Where an entry is a sample, an entry that is masked is a sample that is.
    pytest.param(row, law, id=f"{row.name}-{law}")
    for row in ADDITIVE
    for law in HOLDS
    if (row in ROWS or row.name in RATIOS) and not (row.per_sample and law == "mask is delete")
]


@pytest.mark.parametrize(("row", "law"), TABLE)
def test_table_of_laws_over_ranks(row, law):
    """Laws that a reduction keeps hold in value and gradient; those it breaks are seen to break."""
    for reduction in REDUCTIONS:
        kept = row.name in RATIOS or reduction in HOLDS[law]
        if row.name in RATIOS and reduction not in ("sum_over_batch_size", "sum"):
            continue
        assert same(*sides(row, reduction, law)) == kept, reduction


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("row", ADDITIVE, ids=lambda row: row.name)
def test_what_is_masked_reaches_no_rank(row, poison):
    """NaN and Inf under a mask, in outputs, targets and weights, on some ranks: the values and gradients without."""
    problem = random_problem(5, [row], 3, torch.float64, weights="entries", masks="entries")
    mask, name = problem.mask["a"], "a"
    spread = mask.reshape(*mask.shape, *(1,) * (problem.outputs[name].ndim - mask.ndim))
    target = problem.y[name]
    if target.is_floating_point() and not row.per_sample:
        target = torch.where(mask.reshape(*mask.shape, *(1,) * (target.ndim - mask.ndim)), target, poison)
    dirty = Problem(
        problem.objective,
        {name: torch.where(spread, problem.outputs[name], poison)},
        {name: target},
        {name: torch.where(mask, problem.weight[name], poison)},
        problem.mask,
        problem.parts,
    )
    assert not mask.all()
    clean, found = ranks_of(problem), ranks_of(dirty)
    for one, other in zip(clean, found, strict=True):
        assert one.total == other.total
        # The model itself multiplies what is masked by a parameter: of its outputs alone there is something to say.
        rows, others = one.gradients[1], other.gradients[1]
        assert bool(torch.isfinite(others).all()) and torch.equal(rows, others)


# --- thousands of ranks, by their tallies --------------------------------------------------------------------------


def in_random_order(rng, tallies):
    """The sum, two neighbours at a time, in an order of its own."""
    found = [tallies[i] for i in rng.permutation(len(tallies))]
    while len(found) > 1:
        at = int(rng.integers(len(found) - 1))
        found[at : at + 2] = [found[at] + found[at + 1]]
    return found[0]


def merged_as_one(row, ranks, seed):
    """Ranks with no sample up to three: merged in three orders, their tallies are that of one batch."""
    rng = np.random.default_rng(seed)
    loss = row.make(reduction=str(rng.choice(REDUCTIONS)))
    sizes = rng.integers(0, 4, ranks)
    y, pred = (torch.as_tensor(v) for v in row.inputs(rng, (int(sizes.sum()), POSITIONS)))
    entries = (len(pred),) if row.per_sample else (len(pred), POSITIONS)
    fields = [y, pred, torch.as_tensor(rng.uniform(0.2, 3, entries)), torch.as_tensor(rng.random(entries) < 0.7)]
    pieces = zip(*(torch.split(field, sizes.tolist()) for field in fields), strict=True)
    tallies = [loss.tally(*piece) if len(piece[0]) else ll.Tally.zero() for piece in pieces]
    whole = loss.tally(*fields)
    for order in (tallies, tallies[::-1]):
        assert float(sum(order, ll.Tally.zero()).value) == pytest.approx(float(whole.value), rel=1e-11, abs=1e-14)
    found = in_random_order(rng, tallies)
    assert float(found.value) == pytest.approx(float(whole.value), rel=1e-11, abs=1e-14)
    assert int(found.count) == int(whole.count)


@pytest.mark.parametrize("row", ADDITIVE[::9], ids=lambda row: row.name)
def test_a_thousand_ranks_merge_into_one_tally(row):
    merged_as_one(row, 1000, 1)


@pytest.mark.slow
@pytest.mark.parametrize("row", ADDITIVE, ids=lambda row: row.name)
def test_thousands_of_ranks_merge_into_one_tally(row):
    merged_as_one(row, 4000, 2)
