"""What does a window of four micro-batches cost, against gradient accumulation written by hand in plain torch?

The demo's U-Net in float32 with binary cross-entropy and weights by class, on pictures of its size and of the largest
that it can make. Contenders run in one process, in turn, several times; the table shows medians and the ratio pair by
pair. Plain torch runs twice: what the second one differs by is what the table cannot tell. Gradients are compared
first.

    python benchmarks/window.py [--repeats 9] [--steps 24] [--batch 16] [--sizes 64 192] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pages
import torch
import torch.nn.functional as F
from interleaved import compared, interleaved, spread

import lossledger as ll
from lossledger.demo.scenes import make_scenes
from lossledger.demo.unet import UNet

ACCUMULATE = 4
WEIGHTS = [1.0, 2.0, 0.5, 1.5, 3.0]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def plain(net, x, y, size, make_optimizer=adam):
    """Gradient accumulation by hand: the mean of each batch over the number of batches."""
    optimizer, weights = make_optimizer(net.parameters()), torch.tensor(WEIGHTS, device=x.device)
    net.train()

    def run() -> None:
        for start in range(0, len(x), ACCUMULATE * size):
            for first in range(start, start + ACCUMULATE * size, size):
                batch = slice(first, first + size)
                loss = F.binary_cross_entropy_with_logits(net(x[batch]), y[batch], weight=weights)
                (loss / ACCUMULATE).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def stepped(net, x, y, size, by, make_optimizer=adam):
    """`objective.step` in a loop of the caller's own."""
    optimizer = make_optimizer(net.parameters())
    objective = ll.Objective(ll.losses.BinaryCrossentropy(from_logits=True), class_weight=dict(enumerate(WEIGHTS)))
    net.train()

    def run() -> None:
        for start in range(0, len(x), ACCUMULATE * size):
            firsts = range(start, start + ACCUMULATE * size, size)
            objective.step([(x[first : first + size], y[first : first + size]) for first in firsts], net, by=by)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def fitted(net, x, y, size):
    """`fit(accumulate=4)`, with its ledger."""
    model = ll.Model(net)
    model.compile(adam, ll.losses.BinaryCrossentropy(from_logits=True))
    weights = dict(enumerate(WEIGHTS))

    def run() -> None:
        model.fit(
            x, y, batch_size=size, accumulate=ACCUMULATE, class_weight=weights, shuffle=False, verbose=0, checks="off"
        )

    return run


def contenders(x, y, size) -> dict[str, Callable[[], None]]:
    def net():
        torch.manual_seed(0)
        return UNet().to(x.device)

    return {
        "plain torch": plain(net(), x, y, size),
        "objective.step, tallies by class": stepped(net(), x, y, size, "class"),
        "objective.step, totals only": stepped(net(), x, y, size, None),
        "fit, ledger by class": fitted(net(), x, y, size),
        "plain torch, again": plain(net(), x, y, size),
    }


def compare(x, y, size) -> float:
    """The distance of the gradients of one window, relative to their size."""
    found: list[torch.Tensor] = []

    class Kept(torch.optim.SGD):
        def step(self, closure=None):
            found.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))

    for make in (plain, lambda *given, **named: stepped(*given, by=None, **named)):
        torch.manual_seed(0)
        make(
            UNet().to(x.device),
            x[: ACCUMULATE * size],
            y[: ACCUMULATE * size],
            size,
            make_optimizer=lambda p: Kept(p, lr=0.0),
        )()
    return float((found[0] - found[1]).norm() / found[0].norm())


def measure(repeats: int, steps: int, size: int, edge: int, device: str) -> tuple[list[dict[str, object]], float]:
    scenes = make_scenes(steps * ACCUMULATE * size, edge)
    x, y = torch.from_numpy(scenes.images).to(device), torch.from_numpy(scenes.masks).float().to(device)
    distance = compare(x, y, size)
    runs = contenders(x, y, size)
    times = interleaved(runs, repeats, steps, device)
    return [{"edge": edge, "contender": name, **compared(times, name, "plain torch")} for name in runs], distance


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--dry", action="store_true", help="print, and leave the results as they are")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows, distance = [], 0.0
    for edge in options.sizes:
        found, apart = measure(options.repeats, options.steps, options.batch, edge, options.device)
        rows, distance = rows + found, max(distance, apart)
    about = pages.about(options.repeats, steps=options.steps, numpy=np.__version__, device=options.device)
    lines = [
        f"# Cost of a window of {ACCUMULATE} micro-batches",
        "",
        f"The demo's U-Net in float32, {ACCUMULATE} × {options.batch} pictures, binary cross-entropy with weights by "
        "class, fused Adam. The plain loop divides the mean of each batch by the number of batches, which is the same "
        "here, where all batches are of one size: the gradients of a step differ by at most "
        f"{distance:.0e} of their size.",
        "",
        "Made by `make bench`. " + pages.said(about),
        "",
        "| pictures | contender | ms a step (median) | ratio (lowest to highest) |",
        "|---|---|---:|---:|",
    ]
    for row in rows:
        edge = row["edge"]
        lines.append(f"| {edge} × {edge} | {row['contender']} | {row['median_ms']:.1f} | {spread(row, 3)} |")
    print("\n".join(lines))
    if not options.dry:
        pages.keep("window", lines, {"about": about, "gradients": distance, "rows": rows}, options.device)


if __name__ == "__main__":
    main()
