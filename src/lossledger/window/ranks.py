"""What a window does for other ranks: sums of what divides, forwards in step, breakdowns of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lossledger.batch import Batch, leaves, map_structure
from lossledger.distributed import Share
from lossledger.errors import InputError
from lossledger.losses.reproducible import shifted
from lossledger.objective import Whole, unpacked
from lossledger.tally import Tally

# What of a tally is summed before the first backward.
_SUMS = ("numerator", "divisor", "statistics")


def padded(batches: Sequence[Batch], share: Share, lockstep: bool, spare: Batch | None) -> Sequence[Batch]:
    """As many micro-batches as any rank has, where forwards talk to other ranks: blank ones at the end.

    A blank one is one real row that counts for nothing.

    Raises:
        InputError: a rank that never had a batch, and so has no row to forward.
    """
    longest = max(share.counts)
    if not lockstep or min(share.counts) == longest:
        return batches
    known = batches[0] if batches else spare
    # Every rank hears it, so that none waits for the one that cannot go on.
    lacking = [rank for rank, (missing,) in enumerate(share.group.agree(int(known is None))) if missing]
    if lacking:
        raise InputError(
            f"rank {lacking[0]} has no data in this window and never had any; expected at least one sample, because "
            "the forward of fully_shard runs on all ranks. Give it a batch whose sample_weight is 0."
        )
    assert known is not None
    return [*batches, *[one_row(known)] * (longest - len(batches))]


def one_row(batch: Batch) -> Batch:
    """The first sample of a batch."""

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim else value

    names = ("x", "y", "sample_weight", "mask", "groups")
    return Batch(**{name: map_structure(first, getattr(batch, name)) for name in names})


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
    tensors = [torch.as_tensor(v, device=device) for v in (*parts, samples)]
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
