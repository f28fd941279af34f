"""The ledger: tallies kept by run, split, epoch, step, term and group, whose contributions add up to the printed loss.

Imports the standard library only; DuckDB is loaded when a run is saved or opened.
"""

from lossledger.ledger.diff import Diff, DiffRow
from lossledger.ledger.ledger import Imbalance, Ledger
from lossledger.ledger.rows import MetricRow, Row
from lossledger.ledger.slices import Slice, Slices, worst_slices
from lossledger.ledger.table import Table

__all__ = [
    "Diff",
    "DiffRow",
    "Imbalance",
    "Ledger",
    "MetricRow",
    "Row",
    "Slice",
    "Slices",
    "Table",
    "worst_slices",
]
