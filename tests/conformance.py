"""`python tests/conformance.py CASES.json`: one JSON line a case, its value or the type of its error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lossledger.conventions import outcome


def cases_of(path: str | Path) -> list[dict[str, Any]]:
    """The cases of a file in the form of `goldens/frameworks.json`."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return list(found["cases"] if isinstance(found, dict) else found)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tests/conformance.py CASES.json", file=sys.stderr)
        return 2
    for case in cases_of(arguments[0]):
        print(json.dumps(outcome(case), allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
