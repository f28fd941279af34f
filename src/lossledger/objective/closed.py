"""Gradients of a batch now, its tallies later: tallies add, so those of many small batches can be made at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lossledger.losses.aligned import Aligned
from lossledger.losses.closed import Plain, closed_gradient, has_closed_form, plain
from lossledger.losses.prediction import Prediction
from lossledger.objective.objective import Objective


@dataclass(frozen=True, slots=True, eq=False)
class Pull:
    """What to back-propagate into the one output of a batch.

    Args:
        gradient: of the loss with respect to the output.
        sums: Σ elements of each term, not finite where an element is not, or where they overflow.
        elements: of each term, where they are all that its tally is made from beside the targets; else `None`.
    """

    gradient: Tensor
    sums: list[Tensor]
    elements: list[Tensor] | None = None


class Closed:
    """The gradients of an objective without tallies.

    Args:
        objective: one that `can_wait`.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        # Whether an entry has one element of each term, which is little beside an output of many classes.
        self.few = all(term.loss.one_element for term in objective.terms)
        # What is the same for all batches of a shape: most have that of the batch before.
        self._shape: Any = None
        self._plain: list[Plain] | None = None

    def pull(self, y_true: Tensor, output: Tensor, sample_weight: Any, mask: Any, plainly: bool = False) -> Pull | None:
        """The gradient of a batch that is a window of its own; `None` where it needs a tally after all.

        Args:
            y_true: targets, checked.
            output: what the model returned, without its graph.
            sample_weight: as in a call.
            mask: as in a call.
            plainly: only where elements are all that a tally is made from, and shapes alone divide.
        """
        found = []
        if mask is None:
            of_weights = None if sample_weight is None else (sample_weight.shape, sample_weight.dtype)
            shape = (y_true.shape, y_true.dtype, output.shape, output.dtype, of_weights)
            if shape == self._shape and self._plain is not None:
                prediction = Prediction(output)
                prediction.shared = len(self._plain) > 1
                for known in self._plain:
                    found.append(known.gradient(y_true, prediction, sample_weight))
                return self._joined(found, output, True)
            if plainly and shape == self._shape:
                return None
            self._shape = shape
        terms, shared = self._objective.terms, False
        batches, _, _ = self._objective.align(y_true, output, sample_weight, mask, checked=True)
        if mask is None:
            self._plain = self._common(batches, y_true, output)
            shared = self._plain is not None
        if plainly and not shared:
            return None
        for term, batch in zip(terms, batches, strict=True):
            found.append(closed_gradient(term.loss, batch, term.coefficient))
        return self._joined(found, output, shared)

    def _common(self, batches: list[Aligned], y_true: Tensor, output: Tensor) -> list[Plain] | None:
        found = []
        for term, batch in zip(self._objective.terms, batches, strict=True):
            classes = self._objective._class_weight(term, output)
            one = plain(term.loss, batch, y_true, output, term.coefficient, classes)
            if one is None:
                return None
            found.append(one)
        return found

    def _joined(self, found: list[tuple[Tensor, Tensor] | None], output: Tensor, shared: bool) -> Pull | None:
        """The pull of a batch from that of its terms; `shared`: with `Plain`, what others of its shape have too."""
        whole: Tensor | None = None
        sums = []
        for term, one in zip(self._objective.terms, found, strict=True):
            if one is None:
                return None
            gradient = term.loss.restore(one[1], output)
            whole = gradient if whole is None else whole.add_(gradient)
            sums.append(one[0].sum())
        elements = [one[0] for one in found if one is not None] if self.few and shared else None
        return None if whole is None else Pull(whole, sums, elements)


def can_wait(objective: Objective) -> bool:
    """Whether gradients need no tally: one output, every loss with a closed form, no auxiliary loss that is weighed."""
    if objective._auxiliary_weights:  # Each step shows whether the model has those losses.
        return False
    return objective.structure == "one" and all(has_closed_form(plan.loss) for plan in objective.terms)
