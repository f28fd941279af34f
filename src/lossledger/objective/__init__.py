"""Outputs × losses × weights + regularizers, as a named sum of terms; and the breakdown of a batch into them."""

from lossledger.objective.auxiliary import Outputs, add_loss, collecting, unpacked, with_added
from lossledger.objective.breakdown import Backprop, Breakdown, Term, Whole
from lossledger.objective.objective import Objective
from lossledger.objective.plan import Penalty

__all__ = [
    "Backprop",
    "Breakdown",
    "Objective",
    "Outputs",
    "Penalty",
    "Term",
    "Whole",
    "add_loss",
    "collecting",
    "unpacked",
    "with_added",
]
