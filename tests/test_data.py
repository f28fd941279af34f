"""Where batches come from: arrays in memory, divided into batches and made again from what was kept of them."""

from __future__ import annotations

import weakref

import pytest
import torch

import lossledger as ll
from lossledger.batch import leaves
from lossledger.training.data import IterableData, array_data, order_of, with_groups

N = 23


def data(x=None):
    g = torch.Generator().manual_seed(0)
    x = {"left": torch.randn(N, 3, generator=g), "right": torch.randn(N, 2, 2, generator=g)} if x is None else x
    y = [torch.randint(0, 3, (N,), generator=g), torch.randn(N, 1, generator=g)]
    found = array_data(x, y, torch.rand(N, generator=g), (torch.rand(N, generator=g) < 0.8,) * 2)
    return with_groups(found, {"site": [f"s{i % 4}" for i in range(N)]})


def parts(batch):
    return list(leaves([batch.x, batch.y, batch.sample_weight, batch.mask, batch.groups, batch.ids]))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_batch_is_made_again_from_what_was_kept_of_it(shuffled):
    arrays = data()
    order = order_of(N, 5, 1) if shuffled else None
    batches = list(arrays.batches(4, order))
    kept = [arrays.kept(batch) for batch in batches]
    told = [[part.clone() for part in parts(batch)] for batch in batches]
    again = [arrays.again(one) for one in kept]
    assert [type(b.x) for b in again] == [dict] * 6 and type(again[0].mask) is tuple
    for before, after in zip(told, map(parts, again), strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))
        assert len(before) == len(after) == 9


def test_what_is_kept_of_a_batch_holds_none_of_its_arrays():
    arrays = data()
    batch = next(arrays.batches(4, order_of(N, 5, 1)))
    held = [weakref.ref(part) for part in parts(batch)[:-1]]
    kept = arrays.kept(batch)
    del batch
    assert not any(ref() is not None for ref in held)
    assert arrays.again(kept).size == 4


def test_batches_of_an_iterable_are_kept_whole():
    source = [ll.Batch(torch.ones(2, 3), torch.ones(2, 1))]
    iterable = IterableData(source, torch.float32)
    batch = next(iterable.batches(1, None))
    assert iterable.again(iterable.kept(batch)) is batch
