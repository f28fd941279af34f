"""What a window does for other ranks: sums of what divides, forwards in step, breakdowns of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lossledger.batch import Batch, leaves, map_structure, to_device
from lossledger.distributed import Share
from lossledger.losses.reproducible import shifted
from lossledger.objective import Whole, unpacked
from lossledger.tally import Tally

# What of a tally is summed before the first backward.
_SUMS = ("numerator", "divisor", "statistics")
# What of a batch is cut by sample, in the order of its fields.
_ROW = ("x", "y", "sample_weight", "mask", "groups")


def padded(
    batches: Sequence[Batch], share: Share, lockstep: bool, spare: Batch | None, device: torch.device | None = None
) -> Sequence[Batch]:
    """As many micro-batches as any rank has, where forwards talk to other ranks: blank ones at the end.

    A blank one is one real row that counts for nothing. A rank that has seen none takes it from another: one without
    data, or one that went on with a run after its last batch of the epoch.

    Args:
        batches: of this rank.
        share: who has how many.
        lockstep: whether forwards talk to other ranks.
        spare: a batch that this rank has seen, if any.
        device: of the batches; `None` for the host.
    """
    longest = max(share.counts)
    if not lockstep or min(share.counts) == longest:
        return batches
    known = batches[0] if batches else spare
    known = None if known is None else one_row(known)
    if any(missing for (missing,) in share.group.agree(int(known is None))):
        giver = share.counts.index(longest)
        given = share.group.gather(_sent(known) if share.group.rank == giver and known is not None else None)[giver]
        known = to_device(given, device or torch.device("cpu")) if known is None else known
    assert known is not None
    return [*batches, *[known] * (longest - len(batches))]


def _sent(row: Batch) -> Batch:
    """A row for another process: on the host, without the batch that it was cut from."""

    def own(value: Any) -> Any:
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    return Batch(*(map_structure(own, getattr(row, name)) for name in _ROW))


def one_row(batch: Batch) -> Batch:
    """The first sample of a batch."""

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim else value

    return Batch(*(map_structure(first, getattr(batch, name)) for name in _ROW))


def zeroed(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
    """The tallies of nothing, in the shapes of these."""

    def zero(value: Any) -> Any:
        return torch.zeros_like(value) if isinstance(value, Tensor) else 0

    return {
        name: replace(t, **{n: zero(getattr(t, n)) for n in _SUMS if getattr(t, n) is not None})
        for name, t in tallies.items()
    }


def pull_nothing(outputs: Any) -> None:
    """Back-propagate zeros: hooks of the modules run, and no gradient changes."""
    found, auxiliary = unpacked(outputs)
    roots = [t for t in (*leaves(found), *leaves(auxiliary)) if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])


def summed(
    share: Share, tallies: Mapping[str, Tally], samples: int, device: torch.device, lockstep: bool
) -> Whole | None:
    """What divides in the whole window: the sums over all ranks, in one flat tensor on the device.

    A rank without data gives zeros; how many, the others tell.
    """
    group = share.group
    if group.size == 1:
        return Whole(tallies, samples)
    places = [(term, n) for term, t in tallies.items() for n in _SUMS if getattr(t, n) is not None]
    parts = [getattr(tallies[term], n) for term, n in places]
    # Filled in on the device: what is copied there would wait for it.
    tensors = [
        torch.as_tensor(v, device=device) if isinstance(v, Tensor) else torch.full((), v, device=device)
        for v in (*parts, samples)
    ]
    flat = torch.cat([t.reshape(-1).double() for t in tensors])
    if 0 in share.counts and not lockstep:
        length = max(n for (n,) in group.agree(flat.numel() if tallies else 0))
        if not tallies:
            group.sum_(torch.zeros(length, dtype=torch.float64, device=device))
            return None
    split = iter(torch.split(group.sum_(flat), [t.numel() for t in tensors]))
    sums = [next(split).reshape(t.shape).to(t.dtype) for t in tensors]
    found: dict[str, dict[str, Any]] = {term: {} for term in tallies}
    for (term, n), total in zip(places, sums, strict=False):
        found[term][n] = total
    return Whole({term: replace(tally, **found[term]) for term, tally in tallies.items()}, sums[-1])


def of_all(share: Share, tallies: Mapping[str, Tally], samples: int) -> dict[str, Tally]:
    """The tallies of a window over all ranks, on the host."""
    group = share.group
    if group.size == 1:
        return dict(tallies)
    device = next((leaf.device for leaf in _tensors(tallies)), torch.device("cpu"))
    found: list[Mapping[str, Tally]] = []
    start = 0
    for part, size in group.gather((moved(tallies, torch.device("cpu")), samples)):
        found.append(numbered(part, start))
        start += size
    return moved(merged(found), device)


def _tensors(tallies: Mapping[str, Tally]) -> Iterable[Tensor]:
    return (t.numerator for t in tallies.values() if isinstance(t.numerator, Tensor))


def moved(tallies: Mapping[str, Tally], device: torch.device) -> dict[str, Tally]:
    """The tallies on a device, detached."""

    def move(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, Tensor) else value

    found = {}
    for name, t in tallies.items():
        if t.grid is not None:
            found[name] = t.grid.map(lambda part: moved({"": part}, device)[""], move).tally()
            continue
        g = t.groups
        if g is not None:
            rows = {f: move(getattr(g, f)) for f in ("numerator", "total", "count", "weight")}
            g = replace(g, **rows)
        sums = {f: move(getattr(t, f)) for f in (*_SUMS, "count", "weight", "nonfinite", "shown")}
        found[name] = replace(t, **sums, coefficient=move(t.coefficient), offset=move(t.offset), groups=g)
    return found


def numbered(tallies: Mapping[str, Tally], start: int) -> dict[str, Tally]:
    """Tallies whose rows are named by sample, with the samples numbered from `start`: their place in the window."""
    found = dict(tallies)
    for name, tally in tallies.items():
        groups = tally.groups
        if start and groups is not None and groups.kind == "sample" and groups.keys is not None:
            found[name] = shifted(tally, start)
    return found


def merged(parts: Iterable[Mapping[str, Tally]]) -> dict[str, Tally]:
    """Tallies of parts, added by term."""
    found: dict[str, Tally] = {}
    for part in parts:
        for name, tally in part.items():
            found[name] = found[name] + tally if name in found else tally
    return found
