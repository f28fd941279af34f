"""Outputs × losses × weights + regularizers, as a named sum of terms; and the breakdown of a batch into them."""

from lossledger.objective.auxiliary import Outputs, add_loss, auxiliary_tally, collecting
from lossledger.objective.breakdown import Backprop, Breakdown, Term
from lossledger.objective.objective import Objective

__all__ = ["Backprop", "Breakdown", "Objective", "Outputs", "Term", "add_loss", "auxiliary_tally", "collecting"]
