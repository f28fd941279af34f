"""From tallies on the host to rows of the ledger and to the names of History."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lossledger.ledger import Row
from lossledger.objective import Objective
from lossledger.tally import Tally


def rows(objective: Objective, tallies: dict[str, Tally], split: str, epoch: int, step: int | None = None) -> list[Row]:
    """The ledger rows of an epoch or step: one for each term, and one for each of its groups."""
    found = []
    for name, tally in tallies.items():
        coefficient, role = objective.coefficient(name), objective.role(name)
        divisor = np.atleast_1d(np.asarray(tally.divisor + tally.offset, dtype=float))

        def row(kind: str, group: str, presence: str, sums: Sequence[float], own: float, share: float) -> Row:
            return Row(
                split=split,
                epoch=epoch,
                step=step,
                term=name,  # noqa: B023  called before the loop goes on
                role=role,  # noqa: B023
                form=tally.form,  # noqa: B023
                kind=kind,
                group=group,
                presence=presence,
                total=float(sums[0]),
                count=int(sums[1]),
                weight=float(sums[2]),
                coefficient=coefficient,  # noqa: B023
                divisor=own,
                contribution=coefficient * float(share),  # noqa: B023
                nonfinite=int(tally.nonfinite) if kind == "term" else 0,  # noqa: B023
            )

        total = float(np.sum(tally.numerator))
        # A ratio's own statistic on the weight's side is its divisor, so that total / weight is its loss.
        weight = float(np.sum(tally.divisor)) if tally.form == "ratio" else float(tally.weight)
        found.append(row("term", "", "", (total, tally.count, weight), float(divisor.sum()), tally.value))
        groups = tally.groups
        if groups is None:
            continue
        shares = tally.contributions()
        cells = groups.cell or (0,) * len(groups)
        classes = len({group for group, _ in groups.keys}) if groups.keys is not None else len(groups)
        for index, (group, presence) in enumerate(groups.keys or [(i, "") for i in range(len(groups))]):
            sums = (groups.total[index], groups.count[index], groups.weight[index])
            label = objective.group_name(group, classes)
            found.append(row(groups.kind, label, presence, sums, float(divisor[cells[index]]), shares[index]))
    return found


def logs(objective: Objective, tallies: dict[str, Tally]) -> dict[str, float]:
    """What History and the progress bar show, with Keras's names: `loss`, then a loss an output, then each term.

    Terms of one output are `<term>_loss`; with several outputs an output is `<output>_loss`. Regularizers and
    auxiliary losses keep their names. Values are without λ, except in `loss`.
    """
    values = {name: float(tally.value) for name, tally in tallies.items()}
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
                found |= {f"{t.name}_loss": values[t.name] for t in parts}
    elif len(objective.terms) > 1:
        found |= {f"{t.name}_loss": values[t.name] for t in objective.terms}
    found |= {name: value for name, value in values.items() if objective.role(name) != "data"}
    return found
