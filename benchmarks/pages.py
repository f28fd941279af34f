"""Pages of results: what ran where, and the files that they are kept in."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lossledger as ll

RESULTS = Path(__file__).parent / "results"


def about(repeats: int, **more: Any) -> dict[str, Any]:
    """The versions, the machine, and whatever else a page says of a run in this process."""
    gpu = {} if more.get("device", "cpu") == "cpu" else {"gpu": torch.cuda.get_device_name(more["device"])}
    return {
        "torch": str(torch.__version__),
        "lossledger": ll.__version__,
        "python": platform.python_version(),
        **more,
        **gpu,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "repeats": repeats,
    }


def said(facts: Mapping[str, Any]) -> str:
    """In words."""
    return ", ".join(f"{name} {value}" for name, value in facts.items()) + "."


def keep(name: str, lines: Sequence[str], content: Any, device: str = "cpu") -> None:
    """The page, and what it was made from, in `results`; that of another device than the processor has its name."""
    RESULTS.mkdir(exist_ok=True)
    name = name if device == "cpu" else f"{name}-{device.partition(':')[0]}"
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
