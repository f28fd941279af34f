"""What does cross-entropy over a large vocabulary cost in time, memory and error, beside plain torch?

Forward and backward of the last layer with its loss, from hidden states `[N, D]`. Contenders run in turn, several
times; the table shows medians, the ratio to plain torch pair by pair, the extra memory (what is held at most beside
inputs and gradients, counted storage by storage in a run of its own), and the relative error of loss and gradients
against float64. torch's own `linear_cross_entropy` is measured where the installed torch has it, plain and in chunks.

    python benchmarks/vocabulary.py [--repeats 5] [--tokens 512] [--width 256] [--vocabularies 32000] [--device cpu]
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import pages
import torch
import torch.nn.functional as F
from held import Held
from interleaved import compared, interleaved, spread
from torch import Tensor, nn

import lossledger as ll

Step = Callable[[], tuple[Tensor, Tensor, Tensor]]


def plain(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Step:
    def step() -> tuple[Tensor, Tensor, Tensor]:
        leaf = hidden.detach().requires_grad_()
        head.zero_grad(set_to_none=True)
        value = F.cross_entropy(
            head(leaf).float() if leaf.dtype.itemsize < 4 else head(leaf), labels, ignore_index=-100
        )
        value.backward()
        return value.detach(), leaf.grad, head.weight.grad

    return step


def of_torch(hidden: Tensor, head: nn.Linear, labels: Tensor, chunked: bool) -> Step | None:
    own = getattr(F, "linear_cross_entropy", None)
    if own is None:
        return None
    options = nn.LinearCrossEntropyOptions() if chunked else None

    def step() -> tuple[Tensor, Tensor, Tensor]:
        leaf = hidden.detach().requires_grad_()
        head.zero_grad(set_to_none=True)
        value = own(leaf, head.weight, labels, ignore_index=-100, options=options)
        value.backward()
        return value.detach(), leaf.grad, head.weight.grad

    return step


def ours(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Step:
    loss = ll.losses.LinearCrossentropy(head, ignore_class=-100)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        head.zero_grad(set_to_none=True)
        batch = loss.align(labels, hidden, checked=True)
        tally, gradient = loss.backprop_aligned(batch, None, 1.0)
        return tally.value, gradient, head.weight.grad

    return step


def problem(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, ignored: float, device: str):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False).to(device, dtype)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, head, labels.to(device)


def exact(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, over rows of the vocabulary's logits a few at a time."""
    states, weight = hidden.detach().double(), head.weight.detach().double()
    kept = (labels != -100).nonzero().squeeze(1)
    value, pull, total = states.new_zeros(()), torch.zeros_like(states), torch.zeros_like(weight)
    for rows in kept.split(64):
        scores = states[rows] @ weight.T
        logs = scores.log_softmax(1)
        value -= logs.gather(1, labels[rows, None]).sum()
        slopes = logs.exp_()
        slopes.scatter_add_(1, labels[rows, None], slopes.new_full((len(rows), 1), -1.0))
        slopes /= len(kept)
        pull[rows] = slopes @ weight
        total.addmm_(slopes.T, states[rows])
    return value / len(kept), pull, total


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    cases = [
        (vocabulary, dtype, ignored)
        for vocabulary in arguments.vocabularies
        for dtype in (torch.float32, torch.bfloat16)
        for ignored in (0.0, 0.5)
        if not ignored or dtype == torch.float32
    ]
    for vocabulary, dtype, ignored in cases:
        inputs = problem(arguments.tokens, arguments.width, vocabulary, dtype, ignored, arguments.device)
        contenders = {
            "plain torch": plain(*inputs),
            "torch's linear_cross_entropy": of_torch(*inputs, chunked=False),
            "the same in chunks": of_torch(*inputs, chunked=True),
            "lossledger": ours(*inputs),
        }
        steps = {name: step for name, step in contenders.items() if step is not None}
        right = exact(*inputs)
        hidden, head, _ = inputs
        result_bytes = (hidden.numel() + head.weight.numel()) * dtype.itemsize
        about = {}
        for name, step in steps.items():
            head.zero_grad(set_to_none=True)
            gc.collect()
            with Held() as held:
                found = step()
            about[name] = {
                "extra_mib": (held.most - result_bytes) / 2**20,
                "error_loss": error(found[0], right[0]),
                "error_hidden": error(found[1], right[1]),
                "error_weight": error(found[2], right[2]),
            }
            del found
        times = interleaved(steps, arguments.repeats, device=arguments.device)
        kind = {"vocabulary": vocabulary, "dtype": str(dtype).removeprefix("torch."), "ignored": ignored}
        rows += [{**kind, "contender": name, **compared(times, name, "plain torch"), **about[name]} for name in steps]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    rows = measure(arguments)
    about = pages.about(arguments.repeats, device=arguments.device, tokens=arguments.tokens, width=arguments.width)
    lines = [
        "# Cross-entropy over large vocabularies",
        "",
        "Made by `python benchmarks/vocabulary.py`. " + pages.said(about),
        "Extra memory: what is held at most beside inputs and gradients. Errors: against float64, as norms.",
        "",
        "| vocabulary | dtype | ignored | contender | ms (median) | ratio (lowest to highest) | extra MiB "
        "| error of loss | of hidden | of weight |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['vocabulary']:,} | {row['dtype']} | {row['ignored']:.0%} | {row['contender']} "
            f"| {row['median_ms']:.0f} | {spread(row)} | {row['extra_mib']:.0f} "
            f"| {row['error_loss']:.1e} | {row['error_hidden']:.1e} | {row['error_weight']:.1e} |"
        )
    pages.keep("vocabulary", lines, {"about": about, "rows": rows}, arguments.device)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
