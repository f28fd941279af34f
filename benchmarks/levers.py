"""What does each lever do: memory kept, huge pages, bfloat16, channels last, denormals flushed, one thread?

Each contender is a process of its own, since most levers belong to a process. The processes of a workload run in turn,
several times; the table shows medians of a step of `fit`, the ratio to the first contender round by round, page faults
a step and the peak of the memory.

    python benchmarks/levers.py [--repeats 9] [--threads 1] [--only unet] [--quick] [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any

from interleaved import compared, spread

OFF = {"LOSSLEDGER_KEEP_MEMORY": "0"}
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
LEFT_OUT = ("MALLOC_", "GLIBC_TUNABLES", "LOSSLEDGER_", "OMP_NUM_THREADS")

# By contender: environment, and options of the process.
PLAIN: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "all levers off": (OFF, {}),
    "memory kept (default)": ({}, {}),
}
FULL = PLAIN | {
    "memory kept, huge pages": (HUGE, {}),
    "bfloat16": (OFF, {"precision": "bfloat16"}),
    "bfloat16, memory kept": ({}, {"precision": "bfloat16"}),
    "one thread, memory kept": ({"OMP_NUM_THREADS": "1"}, {}),
}
LAYOUT = PLAIN | {
    "channels last, memory kept": ({}, {"channels_last": True}),
    "bfloat16, memory kept": ({}, {"precision": "bfloat16"}),
    "bfloat16, channels last, memory kept": ({}, {"precision": "bfloat16", "channels_last": True}),
}
DEAD = {"all levers off": (OFF, {}), "denormals flushed": (OFF, {"flush": True})}
# By workload: what it is, its name in `made`, its size, steps of a round, and the contenders.
WORKLOADS: dict[str, tuple[str, str, int, int, dict[str, tuple[dict[str, str], dict[str, Any]]]]] = {
    "unet64": ("U-Net of the demo, 16 × 64 × 64", "unet", 64, 24, FULL),
    "unet128": ("U-Net of the demo, 16 × 128 × 128", "unet", 128, 12, FULL),
    "unet256": ("U-Net of the demo, 16 × 256 × 256", "unet", 256, 6, FULL),
    "mlp": ("dense 784-1024-1024-10, batch 256", "mlp", 256, 40, FULL),
    "residual": ("residual net with batch norm, channels first, 16 × 32 × 32", "residual", 32, 30, LAYOUT),
    "groups": ("convolutions with group norm, channels first, 16 × 32 × 32", "groups", 32, 30, LAYOUT),
    "dead": ("dense 784-1024-1024-10 whose hidden units are dead, batch 256", "dead", 256, 20, DEAD),
}


def made(kind: str, size: int, steps: int, channels_last: bool) -> tuple[Any, Any, Any, int, Any]:
    """Module, inputs, targets, batch size and loss."""
    import torch
    from torch import nn

    import lossledger as ll
    from lossledger.demo.scenes import make_scenes
    from lossledger.demo.unet import UNet

    torch.manual_seed(0)
    if kind == "unet":
        # Larger pictures are those of 64 × 64 enlarged.
        scenes, times = make_scenes(16 * steps, 64), size // 64
        x = torch.from_numpy(scenes.images.repeat(times, axis=2).repeat(times, axis=3))
        y = torch.from_numpy(scenes.masks.repeat(times, axis=1).repeat(times, axis=2))
        return UNet(), x, y, 16, ll.losses.BinaryCrossentropy(from_logits=True)
    loss = ll.losses.SparseCategoricalCrossentropy(from_logits=True)
    if kind in ("mlp", "dead"):
        net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
        return net, torch.rand(size * steps, 784), torch.randint(0, 10, (size * steps,)), size, loss
    blocks: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(3):
        norm = nn.BatchNorm2d(32) if kind == "residual" else nn.GroupNorm(8, 32)
        blocks.append(residual(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(32, 32, 1))))
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    if channels_last:
        net.to(memory_format=torch.channels_last)
    return net, torch.rand(16 * steps, 3, size, size), torch.randint(0, 10, (16 * steps,)), 16, loss


def residual(inner: Any) -> Any:
    from torch import nn

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return (x + self.inner(x)).relu()

    return Residual()


def child(workload: str, options: dict[str, Any]) -> None:
    """A contender: prepares, then runs a round for each line that it reads."""
    import torch

    if options.get("flush"):
        # Threads take it over from the one that starts them: it must come before the first operation.
        torch.set_flush_denormal(True)
    import lossledger as ll

    _, kind, size, steps, _ = WORKLOADS[workload]
    net, x, y, batch, loss = made(kind, size, steps, bool(options.get("channels_last")))
    model = ll.Model(net)
    precision = options.get("precision", "float32")
    model.compile(lambda p: torch.optim.Adam(p, lr=1e-4, fused=True), loss, precision=precision)

    def run() -> float:
        history = model.fit(x, y, batch_size=batch, verbose=0, seed=0, checks="off")
        return history.history["loss"][-1]

    run()
    if kind == "dead":
        for layer in (net[0], net[2]):
            layer.bias.data.fill_(-1e3)
        # Without gradients a first moment stops at the smallest numbers that there are: half of them round up again.
        for parameter, state in model.optimizer.state.items():
            if parameter.shape[0] == 1024:
                state["exp_avg"].fill_(1e-41)
    print(json.dumps({"ready": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        value = run()
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        told = {"seconds": seconds / steps, "faults": (after.ru_minflt - before.ru_minflt) / steps, "loss": value}
        print(json.dumps(told | {"peak": after.ru_maxrss / 1024}), flush=True)


class Contender:
    """A process that waits for its turns."""

    def __init__(self, workload: str, environment: dict[str, str], options: dict[str, Any]) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
        command = [sys.executable, __file__, "--child", workload, json.dumps(options)]
        self._process = subprocess.Popen(
            command, env=kept | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.threads = self._read()["ready"]
        self.rounds: list[dict[str, float]] = []

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A contender ended: see its error above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(workload: str, repeats: int, threads: int | None) -> list[dict[str, Any]]:
    asked = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    title, _, _, _, contenders = WORKLOADS[workload]
    running: dict[str, Contender] = {}
    try:
        for name, (environment, options) in contenders.items():
            running[name] = Contender(workload, asked | environment, options)
        began = time.perf_counter()
        for contender in running.values():
            contender.run()
        minutes = (time.perf_counter() - began) * repeats / 60
        print(f"{title}: about {minutes:.1f} minutes", file=sys.stderr, flush=True)
        for _ in range(repeats):
            for contender in running.values():
                contender.rounds.append(contender.run())
    finally:
        for contender in running.values():
            contender.end()
    times = {name: [r["seconds"] for r in c.rounds] for name, c in running.items()}
    first = next(iter(contenders))
    return [
        {
            "workload": title,
            "contender": name,
            **compared(times, name, first),
            "faults": sum(r["faults"] for r in c.rounds) / repeats,
            "peak_mib": c.rounds[-1]["peak"],
            "loss": c.rounds[-1]["loss"],
            "threads": c.threads,
        }
        for name, c in running.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of each contender; torch's own number if not given")
    parser.add_argument("--only", default="", help="workloads whose name begins so")
    parser.add_argument("--quick", action="store_true", help="two repeats, without the largest workloads; as --dry")
    parser.add_argument("--dry", action="store_true", help="print, and leave the results as they are")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], json.loads(options.child[1]))
        return
    repeats = 2 if options.quick else options.repeats
    chosen = [name for name in WORKLOADS if name.startswith(options.only)]
    if options.quick:
        chosen = [name for name in chosen if name not in ("unet128", "unet256")]
    rows = [row for name in chosen for row in measure(name, repeats, options.threads)]
    import pages
    import torch

    import lossledger as ll

    about = {
        "torch": str(torch.__version__),
        "lossledger": ll.__version__,
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": rows[0]["threads"],
        "repeats": repeats,
    }
    lines = [
        "# Levers",
        "",
        "A step of `fit` with the ledger by class, fused Adam. Each contender is a process; ratios are to the first "
        "contender of the workload, round by round. Faults: page faults a step. Peak: of the whole process.",
        "",
        "Made by `make bench`. " + pages.said(about),
        "",
        "| workload | contender | ms a step (median) | ratio (lowest to highest) | faults | peak MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['workload']} | {row['contender']} | {row['median_ms']:.2f} | {spread(row)} "
            f"| {row['faults']:.0f} | {row['peak_mib']:.0f} |"
        )
    if not (options.dry or options.quick or options.only):
        pages.keep("levers", lines, {"about": about, "rows": rows})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
