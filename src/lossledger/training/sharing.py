"""How ranks divide the data: each takes its contiguous share of every global batch, or has a loader of its own."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from lossledger.batch import Batch, leaves
from lossledger.distributed import LONE_SHARE, Group, Share, cut, same_start, sharing_fate
from lossledger.errors import InputError
from lossledger.losses.parts import check_additive
from lossledger.objective import Objective
from lossledger.tally import Tally
from lossledger.training import randomness
from lossledger.training.data import ArrayData, Data

if TYPE_CHECKING:
    from lossledger.training.model import Model

P = ParamSpec("P")
R = TypeVar("R")


def on_all_ranks(method: Callable[Concatenate[Model, P], R]) -> Callable[Concatenate[Model, P], R]:
    """A method that all ranks call: what fails on one of them fails on all."""

    @functools.wraps(method)
    def called(self: Model, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with sharing_fate(self._group()):
            return method(self, *args, **kwargs)

    return called


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One window as this rank sees it.

    Args:
        batches: its micro-batches, none where only others have data.
        share: who has how many.
        spare: any batch of this rank, `None` before it had one.
        due: whether a log point follows, on all ranks at once.
        saved: whether the clock asks for a checkpoint, that of rank 0.
    """

    batches: tuple[Batch, ...]
    share: Share = LONE_SHARE
    spare: Batch | None = None
    due: bool = False
    saved: bool = False


def turns(
    data: Data,
    batches: Iterator[Batch | None],
    accumulate: int,
    group: Group,
    due: Callable[[], bool],
    saved: Callable[[], bool],
) -> Iterator[Turn]:
    """The windows of an epoch, until no rank has data.

    Args:
        data: arrays, the same on all ranks; or the iterable of this rank.
        batches: those of this rank, as `own_batches` gives them.
        accumulate: batches of a window.
        group: the ranks.
        due: whether this process wants a log point; that of rank 0 decides.
        saved: whether it wants a checkpoint; as above.
    """
    if group.size == 1:
        yield from alone(batches, accumulate)
        return
    spare = next(data.part(0, 1).batches(1, None)) if isinstance(data, ArrayData) else None
    while True:
        mine = tuple(batch for batch in itertools.islice(batches, accumulate) if batch is not None)
        said = group.agree(len(mine), int(due()), int(saved()))
        share = Share(group, tuple(count for count, *_ in said))
        if not any(share.counts):
            return
        spare = mine[0] if mine else spare
        yield Turn(mine, share, spare, bool(said[0][1]), bool(said[0][2]))


def never() -> bool:
    """No log point, or no checkpoint."""
    return False


def alone(batches: Iterator[Batch | None], accumulate: int) -> Iterator[Turn]:
    """The windows of one process."""
    return map(Turn, iter(lambda: tuple(itertools.islice(batches, accumulate)), ()))  # type: ignore[arg-type]


def own_batches(
    data: Data, batch_size: int, order: Tensor | None, group: Group, taken: int = 0
) -> Iterator[Batch | None]:
    """The share of this rank in each batch but the first `taken` of arrays, `None` where it is empty."""
    if not isinstance(data, ArrayData):
        return data.batches(batch_size, order)
    if group.size == 1:
        return data.batches(batch_size, order, taken)
    return _shares(data, batch_size, order, group, taken)


def _shares(data: ArrayData, batch_size: int, order: Tensor | None, group: Group, taken: int) -> Iterator[Batch | None]:
    for start in range(taken * batch_size, data.length, batch_size):
        low, high = cut(start, min(start + batch_size, data.length), group)
        yield data.between(low, high, order) if high > low else None


def in_order(objective: Objective, tallies: dict[str, Tally]) -> dict[str, Tally]:
    """The terms in the order of one process; rank 0 may have begun without data."""
    roles = ("data", "auxiliary", "regularizer")
    return dict(sorted(tallies.items(), key=lambda item: roles.index(objective.role(item[0]))))


def check_shared(group: Group, objective: Objective, given: Mapping[str, Data | None], **options: Any) -> None:
    """Data, loss and call can be divided over ranks.

    Args:
        group: the ranks.
        objective: whose losses must add up.
        given: the data by their argument; the first are those that `batch_size` divides.
        options: arguments of the call.

    Raises:
        InputError: other arrays or arguments on other ranks; a loss that compares the samples of a batch.
    """
    if group.size == 1:
        return
    for plan in objective.terms:
        check_additive(plan.loss, plan.name)
    by_rank = group.gather(({name: _seen(data) for name, data in given.items()}, options))
    first_data, first_options = by_rank[0]
    for name, (kind, _) in first_data.items():
        kinds = [data[name][0] for data, _ in by_rank]
        if len(set(kinds)) > 1:
            raise InputError(
                f"{name}: expected the same arrays on every rank, which takes its share; received {', '.join(kinds)} "
                f"by rank. {_REMEDY}"
            )
        if any(not _alike(data[name][1], first_data[name][1]) for data, _ in by_rank):
            raise InputError(
                f"{name}: expected the same arrays on every rank, which takes its share; received {kind} on each, with "
                f"other values. {_REMEDY}"
            )
    arrays = next(iter(first_data.values()))[1] is not None
    for name in first_options if arrays else [name for name in first_options if name in _OF_ALL]:
        values = [found[name] for _, found in by_rank]
        if any(value != values[0] for value in values):
            raise InputError(
                f"{name}: expected the same on every rank, received {', '.join(map(repr, values))} by rank. Of arrays "
                "every rank takes its share of the same batches, and all ranks validate together."
            )


# What ranks with loaders of their own must have in common too; the batches of these are their own affair.
_OF_ALL = ("epochs", "initial_epoch", "validation_freq")


_REMEDY = "Pass all of the data on every rank, or a loader of its own on each."


def _seen(data: Data | None) -> tuple[str, list[float] | None]:
    """What data are, in words, and of arrays some sums, by which those of other ranks are told from them."""
    if data is None:
        return "nothing", None
    if not isinstance(data, ArrayData):
        return "an iterable", None
    rows = torch.linspace(0, data.length - 1, min(data.length, _LOOKED_AT)).long()
    sums: list[float] = []
    for array in leaves([data.x, data.y, data.sample_weight, data.mask]):
        some = array.detach()[rows.to(array.device)].reshape(len(rows), -1)
        some = some.abs() if some.is_complex() else some.double().abs()
        sums += some.double().nan_to_num(0, 0, 0).sum(1).tolist()
    return f"{data.length} samples", sums


# Samples of each array that are compared: few, so that a call costs nothing; and sums, whose last bits may differ.
_LOOKED_AT = 8
_ROUNDING = 1e-3


def _alike(sums: list[float] | None, others: list[float] | None) -> bool:
    if sums is None or others is None:
        return sums is others
    return len(sums) == len(others) and all(map(functools.partial(math.isclose, rel_tol=_ROUNDING), sums, others))


def begin(group: Group, net: nn.Module, seed: int) -> None:
    """One start for all ranks: the weights of rank 0; dropout of its own on every other rank."""
    if group.size == 1:
        return
    same_start(group, net)
    if group.rank:
        randomness.apart(seed, group.rank)
    coupled = [n for n, m in net.named_modules() if _is_batch_norm(m)]
    if coupled and group.rank == 0:
        warnings.warn(
            f"{coupled[0]!r} normalizes over the samples of one rank, so {group.size} ranks train another function "
            "than one. Use torch.nn.SyncBatchNorm.convert_sync_batchnorm(net), or a normalization of single samples.",
            stacklevel=4,
        )


def _is_batch_norm(module: nn.Module) -> bool:
    norm: Any = nn.modules.batchnorm._BatchNorm
    return isinstance(module, norm) and not isinstance(module, nn.SyncBatchNorm)
