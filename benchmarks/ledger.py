"""What does a ledger of a million rows cost: to append, to write, to open, to add up by group, to ask in SQL?

Every round writes a new folder and opens it again; the table shows medians.

    python benchmarks/ledger.py [--rows 1000000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import duckdb
import pages

from lossledger.ledger import Ledger, Row

CLASSES = 20


def rows_of(count: int) -> list[Row]:
    """Rows of steps: a term and its classes, with random totals."""
    source = random.Random(0)
    found = []
    for index in range(count):
        step, place = divmod(index, CLASSES + 1)
        kind, group = ("term", "") if place == 0 else ("class", f"class {place}")
        total = source.random()
        found.append(
            Row(
                *("training", 1 + step // 1000, 1 + step, "mask/dice", "data", "linear", kind, group, ""),
                *(total, 64, 64.0, 1.0, 1280.0, total / 1280, 0),
            )
        )
    return found


def measured(rows: list[Row]) -> dict[str, float]:
    """Seconds of each action, on a ledger of these rows."""
    seconds: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = action()
        seconds[name] = time.perf_counter() - began
        return found

    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger("million")
        timed("append", lambda: ledger.append(rows))
        timed("write", lambda: ledger.save(folder))
        opened = timed("open", lambda: Ledger.open(folder))
        timed("group by class", lambda: opened.table(by=["class"], step=range(10**9)))
        timed("group by epoch and class", lambda: opened.table(by=["epoch", "class"], step=range(10**9)))
        sql = 'SELECT epoch, "group", fsum(total) / sum(count) FROM ledger GROUP BY ALL'
        timed("the same in SQL", lambda: opened.query(sql))
        timed("balance", opened.balance)
        timed("rows as objects", lambda: len(opened.rows))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = rows_of(options.rows)
    rounds = [measured(rows) for _ in range(options.repeats)]
    found = {name: [entry[name] for entry in rounds] for name in rounds[0]}
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, DuckDB {duckdb.__version__}"
    )
    lines = [
        f"# A ledger of {options.rows:,} rows",
        "",
        f"Seconds, median of {options.repeats}, with the fastest and the slowest. {machine}.",
        "`python benchmarks/ledger.py` makes this page.",
        "",
        "| action | median | fastest | slowest |",
        "|---|---:|---:|---:|",
        *(f"| {n} | {statistics.median(t):.2f} | {min(t):.2f} | {max(t):.2f} |" for n, t in found.items()),
    ]
    print("\n".join(lines))
    pages.keep("ledger", lines, {"rows": options.rows, "machine": machine, "seconds": found})


if __name__ == "__main__":
    main()
