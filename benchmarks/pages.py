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
    return {
        "torch": str(torch.__version__),
        "lossledger": ll.__version__,
        "python": platform.python_version(),
        **more,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "repeats": repeats,
    }


def said(facts: Mapping[str, Any]) -> str:
    """In words."""
    return ", ".join(f"{name} {value}" for name, value in facts.items()) + "."


def keep(name: str, lines: Sequence[str], content: Any) -> None:
    """The page, and what it was made from, in `results`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
