"""From the training loss to the validation loss in named parts, each with its standard error; they add up exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lossledger.objective import Objective
from lossledger.report.numbers import display
from lossledger.tally import Tally
from lossledger.window import merged

MOVED, PENALTIES, MODE, AUGMENTED, WEIGHTED, DATA = (
    "weights moved",
    "regularizers",
    "train mode",
    "augmentation",
    "counting",
    "data",
)

_MEANINGS = {
    MOVED: "the mean over an epoch in which the weights changed, against the weights at its end",
    PENALTIES: "what the penalties add to the training loss, against what they add to the validation loss",
    MODE: "train mode (dropout, statistics of the batch), against eval mode",
    AUGMENTED: "inputs as they were trained on, against the same without augmentation",
    WEIGHTED: "sample and class weights that only the training loss counts",
    DATA: "what remains: other samples",
}


@dataclass(frozen=True, slots=True)
class GapPart:
    """One part of the difference.

    Args:
        name: `"weights moved"`, `"regularizers"`, `"train mode"`, `"augmentation"`, `"counting"` or `"data"`.
        value: what it adds on the way from the training loss to the validation loss; `None` where it cannot be told
            apart from the part `"data"`.
        error: its standard error over the measured batches; 0 where it is known exactly, `None` without a value or
            from a single batch.
        meaning: in words.
    """

    name: str
    value: float | None
    error: float | None
    meaning: str


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The way from a training loss to a validation loss.

    Args:
        epoch: from 1; `None` outside of `fit`.
        loss: where it starts.
        val_loss: where it ends.
        parts: in order; their values add up to `val_loss − loss`.
        batches: how many training batches (steps, where batches are accumulated) were measured again.
        notes: what could not be measured.
    """

    epoch: int | None
    loss: float
    val_loss: float
    parts: tuple[GapPart, ...]
    batches: int
    notes: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """Validation loss less training loss."""
        return self.val_loss - self.loss

    def __getitem__(self, name: str) -> GapPart:
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """The waterfall as values that JSON can hold."""
        found = asdict(self)
        return found | {"parts": [asdict(part) for part in self.parts], "notes": list(self.notes)}

    def __str__(self) -> str:
        return _text(self)


def _text(found: Waterfall) -> str:
    """At most 80 columns."""
    where = "" if found.epoch is None else f"epoch {found.epoch}: "
    unit = "batch" if found.batches == 1 else "batches"
    lines = [
        f"{where}from loss to val_loss ({found.batches:,} {unit} measured again)",
        f"{'':15}{'change':>12}{'± error':>12}{'loss':>12}",
        f"{'loss':15}{'':>24}{display(found.loss, digits=5):>12}",
    ]
    level = found.loss
    for part in found.parts:
        if part.value is None:
            lines.append(f"{part.name:15}{'–':>12}{'':>12}{'':>12}")
            continue
        level += part.value
        error = "exact" if part.error == 0 else "unknown" if part.error is None else display(part.error, digits=2)
        change = f"{'+' if part.value > 0 else ''}{display(part.value, digits=4)}"
        lines.append(f"{part.name:15}{change:>12}{error:>12}{display(level, digits=5):>12}")
    lines.append(f"{'val_loss':15}{'':>24}{display(found.val_loss, digits=5):>12}")
    return "\n".join([*lines, *found.notes])


# --- the arithmetic -----------------------------------------------------------------------------------------------

Tallies = Mapping[str, Tally]
States = Mapping[str, Tallies]
"""The tallies of one measured step in each state of the measurement, by name."""


def contribution(objective: Objective, tallies: Tallies, penalties: bool) -> float:
    """What the regularizers, or all other terms, add to the loss.

    Args:
        objective: knows λ and the role of each term.
        tallies: by term.
        penalties: the regularizers; else everything but them.
    """
    return math.fsum(
        objective.coefficient(name) * float(tally.value)
        for name, tally in tallies.items()
        if (objective.role(name) == "regularizer") is penalties
    )


def with_errors(
    units: Sequence[States], values: Callable[[Sequence[States]], Sequence[float]]
) -> list[tuple[float, float | None]]:
    """Values of all units, each with its jackknife standard error: how it varies when one unit is left out.

    Args:
        units: the measured steps.
        values: of some of them.
    """
    whole = values(units)
    count = len(units)
    if count < 2:
        return [(value, None) for value in whole]
    without = [values([*units[:left], *units[left + 1 :]]) for left in range(count)]
    errors = []
    for column in zip(*without, strict=True):
        mean = math.fsum(column) / count
        errors.append(math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in column)))
    return list(zip(whole, errors, strict=True))


def waterfall(
    objective: Objective,
    units: Sequence[States],
    start: Tallies | None,
    end: Tallies,
    epoch: int | None,
    missing: Mapping[str, str],
    notes: Sequence[str] = (),
) -> Waterfall:
    """The parts of the difference between two losses.

    Args:
        objective: knows λ and the role of each term.
        units: the measured steps. Their states are "moving" (as the epoch counted them), "train", "eval", "plain"
            (without augmentation) and "counted" (as the validation counts); one that is missing equals that before it.
        start: tallies of the whole epoch; without them the way starts at the measured batches in train mode.
        end: tallies of the validation.
        epoch: from 1.
        missing: parts that cannot be told apart, with the reason.
        notes: further remarks.
    """
    order = ["moving", "train", "eval", "plain", "counted"]
    names = [MOVED, MODE, AUGMENTED, WEIGHTED]
    if start is None:
        order, names = order[1:], names[1:]
    goal = contribution(objective, end, False)
    frozen = contribution(objective, end, True)

    def levels(some: Sequence[States]) -> list[float]:
        found: list[float] = []
        now: list[Tallies] = [{}] * len(some)
        for state in order:
            now = [unit.get(state, before) for unit, before in zip(some, now, strict=True)]
            found.append(contribution(objective, merged(now), False))
        return found

    def values(some: Sequence[States]) -> list[float]:
        found = levels(some)
        changes = [after - before for before, after in itertools.pairwise(found)]
        # The measured batches stand for the epoch: what they do not explain of its loss is the data.
        origin = found[0] if start is None else contribution(objective, start, False)
        return [*changes, goal - origin - math.fsum(changes)]

    measured = dict(zip([*names, DATA], with_errors(units, values), strict=True))
    if start is None:
        loss = levels(units)[0] + frozen
        measured[PENALTIES] = (0.0, 0.0)
    else:
        penalties = contribution(objective, start, True)
        loss = contribution(objective, start, False) + penalties
        measured[PENALTIES] = (frozen - penalties, 0.0)
    parts = tuple(
        GapPart(name, None, None, missing[name]) if name in missing else GapPart(name, *measured[name], meaning)
        for name, meaning in _MEANINGS.items()
        if name in measured
    )
    said = (*(f"{name}: {reason}" for name, reason in missing.items()), *notes)
    return Waterfall(epoch, loss, goal + frozen, parts, len(units), said)
