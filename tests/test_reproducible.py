"""Reproducible totals: the same bits for any split, order and number of ranks; how near they are; their range."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossledger as ll
from checks import as_tensor, case
from declarations import MATRIX, REDUCTIONS
from lossledger.errors import InputError
from lossledger.losses.reproducible import shifted
from lossledger.tally import GRID, GRID_ENTRIES
from spawning import run_ranks

L = ll.losses
ADDITIVE = [row for row in MATRIX if row.make().additive]
rows = st.sampled_from(ADDITIVE)
reductions = st.sampled_from(REDUCTIONS)
seeds = st.integers(0, 2**32 - 1)
LINKED = ("numerator", "divisor", "count", "weight", "nonfinite")


def same(a, b):
    """The same bits, also of NaN; a float64 of a whole number is that number."""
    a, b = (torch.as_tensor(v).double() for v in (a, b))
    return a.shape == b.shape and bool(((a.view(torch.int64) == b.view(torch.int64)) | (a.isnan() & b.isnan())).all())


def expect_same(mine, other, rows=True):
    for name in LINKED:
        assert same(getattr(mine, name), getattr(other, name)), name
    assert same(mine.value, other.value)
    if mine.statistics is not None:
        assert same(mine.statistics, other.statistics)
    if rows and mine.groups is not None:
        assert mine.groups.keys == other.groups.keys
        for name in ("numerator", "total", "count", "weight"):
            assert same(getattr(mine.groups, name), getattr(other.groups, name)), name
        assert same(mine.contributions(), other.contributions())


def pieces(rng, samples):
    """A partition into unequal parts."""
    cuts = [
        0,
        *sorted(rng.choice(np.arange(1, samples), int(rng.integers(1, min(4, samples))), replace=False)),
        samples,
    ]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


# --- tallies -------------------------------------------------------------------------------------------------------


def expect_any_split(row, reduction, seed, weights, masks, dtype):
    loss, rng = row.make(reduction=reduction), np.random.default_rng(seed)
    y, p, w, m = case(row, seed, samples=int(rng.integers(2, 23)), weights=weights, masks=masks)
    if w is not None and row.name.startswith("lovasz"):
        w = w.reshape(len(w), -1)[:, 0]
    arrays = [as_tensor(y), as_tensor(p).to(dtype), as_tensor(w), as_tensor(m)]
    by = None if not row.kinds else row.kinds[int(rng.integers(len(row.kinds)))]

    def tally(index):
        found = loss.tally(*(None if a is None else a[index] for a in arrays), by=by, reproducible=True)
        # Rows of a ratio by sample are named by the place of the sample.
        return shifted(found, index.start or 0) if isinstance(index, slice) else found

    whole = tally(slice(None))
    parts = [tally(index) for index in pieces(rng, len(p))]
    left, right = sum(parts), parts[-1]
    for part in reversed(parts[:-1]):
        right = part + right
    expect_same(whole, left)
    expect_same(whole, right)
    order = torch.as_tensor(rng.permutation(len(p)))
    expect_same(whole, tally(order), rows=by != "sample")
    plain = loss.tally(*arrays, by=by)
    assert int(plain.count) == int(whole.count)
    assert float(plain.value) == pytest.approx(float(whole.value), rel=1e-5, abs=1e-6)
    if by is not None:
        assert plain.groups.keys == whole.groups.keys and plain.groups.cell == whole.groups.cell
        for name in ("numerator", "total", "count", "weight"):
            mine, other = (torch.as_tensor(getattr(t.groups, name)).double() for t in (whole, plain))
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5), name
        assert torch.allclose(whole.contributions(), plain.contributions().double(), rtol=1e-4, atol=1e-5)


@given(rows, reductions, seeds, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=100)
def test_any_split_and_any_order_give_the_same_bits(row, reduction, seed, weights, masks, dtype):
    expect_any_split(row, reduction, seed, weights, masks, dtype)


@pytest.mark.parametrize("row", ADDITIVE, ids=[row.name for row in ADDITIVE])
def test_every_loss_has_the_same_bits_for_any_split(row):
    for seed, reduction in enumerate(REDUCTIONS):
        expect_any_split(row, reduction, seed, True, True, torch.float32)


def test_plain_sums_do_depend_on_the_split():
    """What the option is for: without it at least one of these numbers changes, so the tests above can fail."""
    loss = L.BinaryCrossentropy(from_logits=True)
    y, p = (torch.rand(100, 3) < 0.4).float(), 5 * torch.randn(100, 3)

    def found(size, **options):
        return {
            float(sum(loss.tally(y[i : i + n], p[i : i + n], **options) for i in range(0, 100, n)).value) for n in size
        }

    assert len(found((1, 3, 7, 100))) > 1
    assert len(found((1, 3, 7, 100), reproducible=True)) == 1


@given(seeds, st.integers(1, 200), st.integers(-70, 20))
def test_the_error_is_bounded(seed, samples, exponent):
    """Each number is rounded once, at 2^-61 at most; the last additions of the parts at float64."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (samples, 1)) * 2.0**exponent * 10.0 ** rng.uniform(-3, 3, (samples, 1))
    loss = L.FunctionLoss(lambda y, p: p[..., 0], reduction="sum")
    tally = loss.tally(np.zeros((samples, 1)), values, reproducible=True)
    exact = math.fsum(values[:, 0])
    bound = samples * GRID[-1] / 2 + 2.0**-50 * math.fsum(abs(values[:, 0]))
    assert abs(float(tally.value) - exact) <= bound


def test_numbers_of_float32_are_added_without_error():
    values = torch.rand(1000, 1) + 0.001
    tally = L.FunctionLoss(lambda y, p: p[..., 0], reduction="sum").tally(values, values, reproducible=True)
    assert float(tally.value) == math.fsum(values[:, 0].tolist())


def test_weights_are_on_the_grid_too():
    weight, value = torch.rand(501) / 3, torch.rand(501, 1)
    loss = L.MeanAbsoluteError(reduction="mean_with_sample_weight")
    tally = loss.tally(torch.zeros(501, 1), value, weight, reproducible=True)
    assert float(tally.weight) == float(tally.divisor) == math.fsum(weight.tolist())


def test_sums_beyond_the_grid_are_an_error():
    loss = L.FunctionLoss(lambda y, p: p[..., 0], reduction="sum")

    def tally(value):
        return loss.tally(torch.zeros(2, 1), torch.tensor([[value], [-value]], dtype=torch.float64), reproducible=True)

    assert float(tally(2.0**44).value) == 0
    for total in (tally(2.0**46), sum([tally(2.0**44)] * 5), tally(1e300)):
        with pytest.raises(InputError, match="reproducible=True: expected sums below 2\\^47"):
            _ = total.value
    crowd = tally(1.0)
    object.__setattr__(crowd.grid, "entries", GRID_ENTRIES)
    with pytest.raises(InputError, match="fewer than 2\\^36 samples"):
        _ = crowd.value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_reported(bad):
    loss = L.FunctionLoss(lambda y, p: p[..., 0], reduction="sum")
    p = torch.tensor([[1.0], [bad], [2.0]])
    plain, found = loss.tally(p, p), loss.tally(p, p, reproducible=True)
    assert same(found.value, plain.value)
    assert int(found.nonfinite) == int(plain.nonfinite) == 1


def test_a_tally_on_the_grid_adds_to_its_like_only():
    mse, one = L.MeanSquaredError(), [[1.0]]
    with pytest.raises(InputError, match="on a grid and one without"):
        mse.tally(one, one) + mse.tally(one, one, reproducible=True)
    total = ll.Tally.zero() + mse.tally(one, [[3.0]], reproducible=True)
    assert float(total.value) == 4


def test_groups_of_given_ids_are_found_by_their_keys():
    loss, p, ids = L.MeanAbsoluteError(), torch.rand(30, 4, 2), torch.randint(0, 3, (30,))
    whole = loss.tally(torch.zeros_like(p), p, by=ids, reproducible=True)
    parts = sum(
        loss.tally(torch.zeros_like(p[i : i + 7]), p[i : i + 7], by=ids[i : i + 7], reproducible=True)
        for i in range(0, 30, 7)
    )
    mine, other = (dict(zip(t.groups.keys, t.contributions().tolist(), strict=True)) for t in (whole, parts))
    assert mine == other and len(mine) == 3


def test_threads_do_not_matter():
    loss, y, z = L.BinaryCrossentropy(from_logits=True), torch.ones(2, 70_001, 1), torch.randn(2, 70_001, 1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(float(loss.tally(y, z, reproducible=True).value))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


def test_losses_without_samples_of_their_own_are_refused():
    with pytest.raises(InputError, match="compares the samples"):
        ll.Objective(L.InfoNCE(), reproducible=True)
    with pytest.raises(InputError, match="compares the samples"):
        L.LovaszHinge(per_image=False).tally([[[1.0]]], [[[1.0]]], reproducible=True)
    mean = L.FunctionLoss(lambda y, p: (y - p).abs().mean())
    with pytest.raises(InputError, match="declared scalar"):
        mean.tally([[1.0]], [[3.0]], reproducible=True)
    declared = L.FunctionLoss(lambda y, p: (y - p).abs().mean(), scalar="mean")
    assert float(declared.tally([[1.0], [1.0]], [[3.0], [2.0]], reproducible=True).value) == 1.5
    with pytest.raises(ll.errors.InputTypeError, match="reproducible: expected True or False"):
        ll.Model(nn.Linear(1, 1)).compile(loss="mse", reproducible="yes")


# --- training ------------------------------------------------------------------------------------------------------


class Elementwise(nn.Module):
    """Products alone: the same bits for each sample, whatever is beside it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.7, -0.3, 0.9]))

    def forward(self, x):
        return {"a": x * self.scale, "b": x[:, :2] * self.scale[:2]}


def prepared(reproducible=True, **options):
    g = torch.Generator().manual_seed(3)
    x = 4 * torch.randn(53, 3, generator=g)
    y = {"a": torch.randint(0, 3, (53,), generator=g), "b": (torch.rand(53, 2, generator=g) < 0.4).float()}
    weight = {"a": torch.rand(53, generator=g), "b": torch.rand(53, generator=g)}
    mask = {"a": torch.rand(53, generator=g) < 0.8, "b": torch.rand(53, generator=g) < 0.8}
    model = ll.Model(Elementwise())
    logits = {"from_logits": True}
    model.compile(
        lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        {
            "a": L.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight", **logits),
            "b": 2 * L.BinaryCrossentropy(**logits) + L.FocalTversky(axis=0, from_logits="sigmoid"),
        },
        regularizers={"*": "l2"},
        reproducible=reproducible,
        **options,
    )
    return model, {"x": x, "y": y, "sample_weight": weight, "mask": mask}


def losses(logs):
    """The numbers of the losses, without the penalty: one value a step is no sum over samples."""
    return {name: value for name, value in logs.items() if "l2" not in name and name not in ("loss", "val_loss")}


def ledger_rows(ledger):
    rows = [vars_of(row) for row in ledger.rows if row.role == "data"]
    assert rows
    return sorted(rows, key=str)


def vars_of(row):
    names = (
        "split",
        "epoch",
        "term",
        "kind",
        "group",
        "presence",
        "total",
        "count",
        "weight",
        "divisor",
        "contribution",
    )
    return tuple(getattr(row, name) for name in names)


def trained(batch_size, accumulate, reproducible=True):
    model, data = prepared(reproducible)
    held = tuple(data[name] for name in ("x", "y", "sample_weight"))
    sites = {"site": [("north", "south", "east")[i * i % 5 % 3] for i in range(53)]}
    fitted = model.fit(
        **data,
        groups=sites,
        batch_size=batch_size,
        accumulate=accumulate,
        epochs=2,
        validation_data=held,
        seed=1,
        verbose=0,
    )
    return losses(fitted.history), ledger_rows(model.ledger)


def evaluated(batch_size, reproducible=True):
    model, data = prepared(reproducible)
    return model.evaluate(**data, batch_size=batch_size, verbose=0, return_dict=True), ledger_rows(model.ledger)


SPLITS = [(53, 1), (8, 1), (3, 2), (1, 5), (20, 2)]


def test_history_and_ledger_of_fit_have_the_same_bits_for_any_batch_size():
    found = [trained(*split) for split in SPLITS]
    assert all(one == found[0] for one in found[1:])
    assert {"site", "class", "term"} <= {kind for _, _, _, kind, *_ in found[0][1]}
    assert len({str(trained(*split, reproducible=False)) for split in SPLITS}) > 1


def test_rows_of_single_samples_have_the_same_bits():
    def found(batch_size):
        model, given = prepared()
        model.fit(**given, batch_size=batch_size, samples=True, seed=1, verbose=0)
        names = ("term", "sample", "total", "count", "weight", "mean", "contribution")
        return sorted(zip(*(map(repr, model.ledger.samples[name].tolist()) for name in names), strict=True))

    rows = found(53)
    assert len(rows) == 53 * 3
    assert found(7) == found(1) == rows


def test_evaluate_has_the_same_bits_for_any_batch_size():
    found = [evaluated(size) for size in (53, 1, 5, 16)]
    assert all(one == found[0] for one in found[1:])
    assert len({str(evaluated(size, reproducible=False)) for size in (53, 1, 5, 16)}) > 1
    plain = evaluated(53, reproducible=False)[0]
    assert found[0][0] == {name: pytest.approx(value, rel=1e-5) for name, value in plain.items()}


def test_a_window_of_your_own_loop_has_the_same_bits():
    model, data = prepared()
    net, found = model.net, []
    for size in (53, 9, 2):
        cut = [slice(i, i + size) for i in range(0, 53, size)]
        batches = [
            ll.Batch(data["x"][s], *({k: v[s] for k, v in data[n].items()} for n in ("y", "sample_weight", "mask")))
            for s in cut
        ]
        breakdown = model.objective.step(batches, net)
        found.append(
            {
                name: (float(t.value), [float(v) for v in t.by("class").values()])
                for name, t in breakdown.terms.items()
                if t.role == "data"
            }
        )
    assert found[0] == found[1] == found[2]


def test_gradients_are_those_of_the_plain_sums():
    gradients = []
    for reproducible in (False, True):
        model, data = prepared(reproducible)
        model.objective.step([ll.Batch(**data)], model.net)
        gradients.append(model.net.scale.grad)
    assert torch.equal(*gradients)


def test_steps_left_out_leave_the_grid_too():
    model, data = prepared(on_nonfinite="skip")
    whole = model.fit(**data, batch_size=53, seed=1, verbose=0).history
    worse = {
        name: torch.cat((v, v[:1])) if isinstance(v, torch.Tensor) else {k: torch.cat((u, u[:1])) for k, u in v.items()}
        for name, v in data.items()
    }
    worse["x"][-1] = math.nan
    worse["mask"] = {name: torch.cat((m[:-1], torch.ones(1, dtype=torch.bool))) for name, m in worse["mask"].items()}
    model, _ = prepared(on_nonfinite="skip")
    found = model.fit(**worse, batch_size=53, shuffle=False, verbose=0).history
    assert losses(found) == losses(whole)


def test_a_resumed_epoch_goes_on_on_the_grid(tmp_path):
    class Stop(Exception):
        pass

    def fit(folder, resume, at=None):
        model, data = prepared()
        steps = []

        class Halt(ll.callbacks.Callback):
            def on_train_batch_end(self, batch, logs):
                steps.append(batch)
                if batch == at:
                    raise Stop

        model.fit(
            **data,
            batch_size=4,
            epochs=2,
            seed=1,
            verbose=0,
            run_dir=folder,
            resume=resume,
            callbacks=[ll.callbacks.BackupAndRestore(save_freq=1), Halt()],
        )
        return ledger_rows(ll.Ledger.open(folder)), len(steps)

    with pytest.raises(Stop):
        fit(tmp_path / "a", False, at=5)
    resumed, whole = fit(tmp_path / "a", True), fit(tmp_path / "b", False)
    assert resumed[0] == whole[0]
    # Steps 0 to 4 had been written.
    assert resumed[1] == whole[1] - 5


# --- ranks ---------------------------------------------------------------------------------------------------------


def report(rank, size, out):
    """The numbers of this rank, as text that keeps every bit."""
    Path(out, f"numbers-{rank}").write_text(repr((trained(8, 2), evaluated(5))))


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(size):
    folder, codes = run_ranks(report, size)
    assert codes == [0] * size, [file.read_text() for file in folder.glob("error-*")]
    expected = repr((trained(8, 2), evaluated(5)))
    for rank in range(size):
        assert Path(folder, f"numbers-{rank}").read_text() == expected
