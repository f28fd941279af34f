"""What do a loss and its gradient cost with weights, masks and tallies by class, beside torch's plain loss?

Forward and backward from given outputs, without a model. Contenders run in turn, several times; the table shows medians
and the ratio to torch's plain loss repeat by repeat, and the extra memory: what is held at most beside inputs, from
the allocations that the profiler of torch sees, the gradient and buffers that are kept for the next batch included.

    python benchmarks/losses.py [--repeats 15] [--only "U-Net, 64"] [--tiny] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import pages
import torch
import torch.nn.functional as F
from interleaved import compared, interleaved, settled, spread
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import lossledger as ll
from lossledger.losses import backward

PLAIN = "torch's plain loss"


def binary(samples: int, size: int, classes: int = 5) -> tuple[Tensor, Tensor, ll.losses.Loss, Callable[..., Tensor]]:
    output = torch.randn(samples, size, size, classes)
    target = (torch.rand(output.shape) < 0.2).float()
    return output, target, ll.losses.BinaryCrossentropy(from_logits=True), F.binary_cross_entropy_with_logits


def exclusive(
    entries: tuple[int, ...], classes: int, one_hot: bool
) -> tuple[Tensor, Tensor, ll.losses.Loss, Callable[..., Tensor]]:
    output, target = torch.randn(*entries, classes), torch.randint(classes, entries)

    def plain(z: Tensor, y: Tensor) -> Tensor:
        z = z.flatten(0, -2)
        return F.cross_entropy(z, y.reshape(z.shape) if one_hot else y.flatten())

    if one_hot:
        return output, F.one_hot(target, classes).float(), ll.losses.CategoricalCrossentropy(from_logits=True), plain
    return output, target, ll.losses.SparseCategoricalCrossentropy(from_logits=True), plain


def workloads(tiny: bool) -> Iterator[tuple[str, tuple[Tensor, Tensor, ll.losses.Loss, Callable[..., Tensor]]]]:
    """Name, then output, target, loss and torch's function."""
    small = 16 if tiny else 1
    yield "U-Net, 64 × 64, 5 masks", binary(16, 64 // min(small, 4))
    yield "U-Net, 256 × 256, 5 masks", binary(16, 256 // small)
    yield "256 pictures, 1,000 classes, labels", exclusive((256,), 1000 // small, False)
    yield "256 pictures, 1,000 classes, one-hot", exclusive((256,), 1000 // small, True)
    yield "8 × 512 tokens, 2,000 words, labels", exclusive((8, 512 // small), 2000, False)
    yield "8 × 512 tokens, 2,000 words, one-hot", exclusive((8, 512 // small), 2000, True)


def contenders(
    output: Tensor, target: Tensor, loss: ll.losses.Loss, function: Callable[..., Tensor]
) -> dict[str, Callable[[], object]]:
    entries = output.shape[:-1]
    weight = torch.rand(entries, device=output.device)
    mask = torch.rand(entries, device=output.device) < 0.9
    by_class = torch.rand(output.shape[-1]).tolist()
    output.requires_grad_()

    def plain() -> object:
        leaf = output.detach().requires_grad_()
        function(leaf, target).backward()
        return leaf.grad

    def ours(by: str | None, class_weight: list[float] | None = None, **given: Tensor) -> Callable[[], object]:
        objective = ll.Objective(loss, class_weight=class_weight)
        return lambda: objective.backprop(target, output, by=by, **given)

    return {
        PLAIN: plain,
        "lossledger": ours(None),
        "by class": ours("class"),
        "weights, by class": ours("class", sample_weight=weight),
        "mask, by class": ours("class", mask=mask),
        "weights, mask, class weights, by class": ours("class", by_class, sample_weight=weight, mask=mask),
    }


def most_held(step: Callable[[], object], device: str) -> int:
    """The most bytes of memory held at once beside what was there before, in a run without buffers of earlier ones."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        settled(device)
        return torch.cuda.max_memory_allocated(device) - before
    backward._KEPT.scratch = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    found = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(repeats: int, only: str, tiny: bool, device: str) -> list[dict[str, object]]:
    rows = []
    for name, problem in workloads(tiny):
        if only not in name:
            continue
        output, target, *rest = problem
        steps = contenders(output.to(device), target.to(device), *rest)
        for step in steps.values():
            step()
        memory = {contender: most_held(step, device) / 2**20 for contender, step in steps.items()}
        times = interleaved(steps, repeats, device=device)
        for contender in steps:
            row = {"workload": name, "contender": contender, **compared(times, contender, PLAIN)}
            rows.append(row | {"extra_mib": memory[contender], "memory_ratio": memory[contender] / memory[PLAIN]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script; writes no results")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(arguments.repeats, arguments.only, arguments.tiny, arguments.device)
    about = pages.about(arguments.repeats, device=arguments.device)
    lines = [
        "# Cost of a loss and its gradient",
        "",
        "Made by `make bench`. " + pages.said(about),
        "Extra memory: what is held at most beside inputs, the gradient included.",
        "",
        "| workload | contender | ms (median) | ratio (lowest to highest) | extra MiB | ratio |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['workload']} | {row['contender']} | {row['median_ms']:.2f} | {spread(row)} "
            f"| {row['extra_mib']:.1f} | {row['memory_ratio']:.2f} |"
        )
    print("\n".join(lines))
    if arguments.tiny or arguments.only:
        return
    pages.keep("losses", lines, {"about": about, "rows": rows}, arguments.device)


if __name__ == "__main__":
    main()
