"""From tallies on the host to rows of the ledger and to the names of History."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from lossledger.ledger import Row
from lossledger.objective import Objective
from lossledger.tally import Tally


def rows(objective: Objective, tallies: dict[str, Tally], split: str, epoch: int, step: int | None = None) -> list[Row]:
    """The ledger rows of an epoch or step: one for each term, and one for each of its groups."""
    return [row for name, tally in tallies.items() for row in _term_rows(objective, name, tally, split, epoch, step)]


def _term_rows(
    objective: Objective, name: str, tally: Tally, split: str, epoch: int, step: int | None
) -> Iterator[Row]:
    coefficient = objective.coefficient(name)
    divisor = np.atleast_1d(np.asarray(tally.divisor + tally.offset, dtype=float))
    whole = Row(
        split=split,
        epoch=epoch,
        step=step,
        term=name,
        role=objective.role(name),
        form=tally.form,
        kind="term",
        group="",
        presence="",
        total=float(np.sum(tally.numerator)),
        count=int(tally.count),
        # A ratio's own statistic on the weight's side is its divisor, so that total / weight is its loss.
        weight=float(np.sum(tally.divisor)) if tally.form == "ratio" else float(tally.weight),
        coefficient=coefficient,
        divisor=float(divisor.sum()),
        contribution=coefficient * float(tally.value),
        nonfinite=int(tally.nonfinite),
        masked=None if tally.masked is None else int(tally.masked),
    )
    yield whole
    groups = tally.groups
    if groups is None:
        return
    keys = groups.keys if groups.keys is not None else tuple((i, "") for i in range(len(groups)))
    classes = len({group for group, _ in keys})
    shares = coefficient * np.asarray(tally.contributions(), dtype=float)
    cells = groups.cell or (0,) * len(groups)
    # A list is made at once; number by number it would take most of the time.
    total, count, weight = groups.total.tolist(), groups.count.tolist(), groups.weight.tolist()
    contribution, divisors = shares.tolist(), divisor.tolist()
    # Thousands of classes make thousands of rows: `replace` would look at every field of each.
    shared = {field.name: getattr(whole, field.name) for field in fields(Row)} | {"nonfinite": 0, "masked": None}
    for index, (group, presence) in enumerate(keys):
        own = {
            "kind": groups.kind,
            "group": objective.group_name(group, classes),
            "presence": presence,
            "total": float(total[index]),
            "count": int(count[index]),
            "weight": float(weight[index]),
            "divisor": divisors[cells[index]],
            "contribution": contribution[index],
        }
        yield Row(**shared | own)


def logs(objective: Objective, tallies: dict[str, Tally]) -> dict[str, float]:
    """What History and the progress bar show, with Keras's names: `loss`, then a loss an output, then each term.

    Terms of one output are `<term>_loss`; with several outputs an output is `<output>_loss`. Regularizers and
    auxiliary losses keep their names. Values are without λ, except in `loss`.
    """
    values = {name: _value(tally) for name, tally in tallies.items()}
    total = 0.0
    for name, value in values.items():
        total += objective.coefficient(name) * value
    found = {"loss": total}
    outputs = [output for output in objective.outputs if any(t.output == output for t in objective.terms)]
    if len(objective.outputs) > 1 or objective.structure != "one":
        for output in outputs:
            parts = [t for t in objective.terms if t.output == output]
            found[f"{output}_loss"] = sum(t.part_weight * values[t.name] for t in parts)
            if len(parts) > 1:
                found |= {loss_key(t.name): values[t.name] for t in parts}
    elif len(objective.terms) > 1:
        found |= {loss_key(t.name): values[t.name] for t in objective.terms}
    found |= {name: value for name, value in values.items() if objective.role(name) != "data"}
    return found


def loss_key(name: str) -> str:
    """The key of a term in History: with `_loss` at its end, once."""
    return name if name.endswith("_loss") else f"{name}_loss"


def _value(tally: Tally) -> float:
    """The value of an epoch; not a number when every step of it was left out as not finite."""
    left_out = tally.count == 0 and tally.nonfinite > 0
    return float("nan") if left_out else float(tally.value)
