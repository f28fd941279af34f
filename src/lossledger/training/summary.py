"""A table of the modules of a network."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lossledger.forward import Forward


def summary_table(forward: Forward) -> str:
    """The modules that hold parameters, with shapes and sizes, 80 columns wide.

    Example:
        >>> from torch import nn
        >>> print(summary_table(Forward(nn.Linear(2, 3))).splitlines()[-1].strip())
        9 parameters, 9 trainable
    """
    net = forward.net
    table = Table(title=type(net).__name__, title_justify="left", box=None, pad_edge=False)
    for name, justify in (("module", "left"), ("kind", "left"), ("shapes", "left"), ("parameters", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name, kind, own in forward.parts():
        shapes = ", ".join("×".join(map(str, p.shape)) or "scalar" for p in own)
        table.add_row(name or "(itself)", kind, shapes, f"{sum(p.numel() for p in own):,}")
    total = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    lines = "\n".join(line.rstrip() for line in capture.get().splitlines())
    return f"{lines.rstrip()}\n{total:,} parameters, {trainable:,} trainable"
