"""Whether a cluster adds up: one batch on one rank and on all of them.

    torchrun --nproc-per-node 4 -m lossledger.check_distributed

Each row is a way to divide the batch: plain replicas, DistributedDataParallel, fully_shard; in one micro-batch a rank,
in several, and with more ranks than samples. It prints the divisor, the loss and the worst error of a gradient, and
exits with 1 where one is past the tolerance.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lossledger.batch import Batch
from lossledger.distributed import ALONE, Group, cut, full, joined, sharing_fate, unwrapped
from lossledger.losses import BinaryCrossentropy, Dice
from lossledger.objective import Objective

WRAPPERS = ("plain", "DDP", "FSDP2")
FEATURES, CLASSES = 6, 5


def network() -> nn.Sequential:
    """A small network whose weights are the same wherever it is made."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return net


def whole_batch(samples: int, device: torch.device) -> Batch:
    """Samples with targets, weights and a mask."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
    y, weight, seen = (torch.rand(samples, CLASSES, generator=generator, dtype=torch.float64) for _ in range(3))
    return Batch(*(t.to(device) for t in (x, (y < 0.3).double(), weight, seen < 0.8)))


def between(batch: Batch, start: int, stop: int) -> Batch:
    """Some of the samples."""
    return Batch(*(value[start:stop] for value in (batch.x, batch.y, batch.sample_weight, batch.mask)))


def shares(batch: Batch, group: Group, parts: int) -> list[Batch]:
    """The micro-batches of this rank: as many as `parts` and its rank, of unequal sizes."""
    low, high = cut(0, batch.size, group)
    stops = sorted({low, high, *(low + (high - low) * i // (parts + group.rank) for i in range(parts + group.rank))})
    if parts == 1:
        stops = sorted({low, high})
    return [between(batch, a, b) for a, b in itertools.pairwise(stops)]


def wrapped(net: nn.Module, wrapper: str) -> nn.Module:
    """The network as its users wrap it."""
    if wrapper == "DDP":
        return nn.parallel.DistributedDataParallel(net)
    if wrapper == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        for module in net.children():
            if isinstance(module, nn.Linear):
                fully_shard(module)
        fully_shard(net)
    return net


def objective() -> Objective:
    """Terms whose divisors count entries, and depend on predictions."""
    return Objective(
        BinaryCrossentropy(from_logits=True) + Dice(from_logits="sigmoid", axis=0), regularizers={"*.weight": "l2"}
    )


def gradients(net: nn.Module) -> list[Tensor]:
    """All gradients, gathered."""
    return [full(p.grad.detach()) for p in unwrapped(net).parameters() if p.grad is not None]


def rows(group: Group, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each way to divide a batch."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for wrapper in WRAPPERS:
        for parts, samples in ((1, 16 * group.size + 3), (2, 16 * group.size + 3), (1, max(1, group.size - 1))):
            batch = whole_batch(samples, device)
            one, many = network().to(device), wrapped(network().to(device), wrapper)
            expected = objective().step([batch], one, process_group=alone)
            found = objective().step(shares(batch, group, parts), many)
            names = ("binary_crossentropy", "dice")
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(gradients(many), gradients(one), strict=True)]
            yield {
                "wrapper": wrapper,
                "samples": samples,
                "micro-batches": parts if parts == 1 else f"{parts} to {parts + group.size - 1}",
                "divisor": float(torch.as_tensor(found.terms[names[0]].tally.divisor)),
                "expected": float(torch.as_tensor(expected.terms[names[0]].tally.divisor)),
                "value": found.value,
                "value error": abs(found.value - expected.value) / abs(expected.value),
                "gradient error": max(errors),
            }


def report(found: dict[str, Any], tolerance: float) -> tuple[str, bool]:
    """A row as text, and whether it is within the tolerance."""
    # A NaN is within no tolerance.
    good = (
        found["divisor"] == found["expected"]
        and found["value error"] <= tolerance
        and found["gradient error"] <= tolerance
    )
    return (
        f"{found['wrapper']:<7} {found['samples']:>7}  {found['micro-batches']!s:>13}  {found['divisor']:>9g}  "
        f"{found['value']:<20.15g} {found['value error']:>11.1e}  {found['gradient error']:>14.1e}  "
        f"{'ok' if good else 'WRONG'}"
    ), good


@click.command(help=__doc__.replace("\n    torchrun", "\n\b\n    torchrun") if __doc__ else None)
@click.option("--tolerance", default=1e-10, show_default=True, help="Largest relative error, in float64.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to calculate; cuda if there is one.")
def main(tolerance: float, device: str | None) -> None:
    """Run on every rank; rank 0 prints."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    group = joined(None, place)
    if group is ALONE:
        raise click.ClickException(
            "Expected several ranks, found one. Run: torchrun --nproc-per-node 2 -m lossledger.check_distributed"
        )
    failed = 0
    with sharing_fate(group):
        if group.rank == 0:
            click.echo(f"{group.size} ranks, {dist.get_backend()}, {kind}, torch {torch.__version__}")
            click.echo(
                f"{'':<7} {'samples':>7}  {'micro-batches':>13}  {'divisor':>9}  {'value':<20} {'value error':>11}  "
                f"{'gradient error':>14}"
            )
        for row in rows(group, place):
            text, good = report(row, tolerance)
            # Past the tolerance on one rank is past it.
            everywhere = all(all(said) for said in group.agree(int(good)))
            failed += not everywhere
            if group.rank == 0:
                click.echo(f"{text}, but not on every rank" if good and not everywhere else text)
    if group.rank == 0:
        click.echo("The ranks add up to one." if not failed else f"{failed} rows are wrong.")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
