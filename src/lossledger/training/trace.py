"""Where the first NaN or infinity came from: the step, the term, the samples, and what was already bad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossledger.batch import Batch, leaves
from lossledger.errors import LossledgerError, NonFiniteError
from lossledger.objective import Objective, unpacked
from lossledger.tally import Tally


def nonfinite_error(
    objective: Objective, step: int, tallies: dict[str, Tally], batch: Batch | None, outputs: Any
) -> LossledgerError:
    """The error for the first step whose loss is not finite.

    Args:
        objective: knows the terms.
        step: number of the step, from 1.
        tallies: of the step.
        batch: the batch, or `None` when it is no longer at hand.
        outputs: what the model makes of the batch now, or `None`.

    Returns:
        a `NonFiniteError`; or the error that explains it better, such as predictions that are no probabilities.
    """
    bad = {name: int(t.nonfinite) for name, t in tallies.items() if int(t.nonfinite) > 0}
    terms = ", ".join(f"{name!r} ({count:,} {'element' if count == 1 else 'elements'})" for name, count in bad.items())
    rank = (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )
    record: dict[str, Any] = {"step": step, "rank": rank, "terms": bad, "samples": [], "already_bad": []}
    if bad:
        message = f"step {step}: the loss is not finite; expected finite elements, received NaN or infinity in {terms}."
    else:
        message = (
            f"step {step}: the loss is finite but its gradient is not; expected finite gradients of all parameters. "
            "A root or a logarithm at 0 does this."
        )
    if batch is not None:
        if outputs is not None:
            try:
                objective.align(batch.y, outputs, batch.sample_weight, batch.mask)
            except LossledgerError as better:
                return better
            found = _samples(objective, batch, outputs, set(bad))
            record["samples"] = found.tolist()
            message += _said(found, batch)
        record["already_bad"] = _already_bad(batch, outputs)
    classes = _classes(objective, tallies)
    message += f" Classes: {', '.join(classes[:8])}{', …' if len(classes) > 8 else ''}." if classes else ""
    message += f" Already not finite: {', '.join(record['already_bad'])}." if record["already_bad"] else ""
    return NonFiniteError(
        message + " The weights were not updated with this step. Look at those samples, lower the learning rate, or "
        "set clip_norm; on_nonfinite='skip' leaves such steps out.",
        record | {"classes": classes},
    )


def _samples(objective: Objective, batch: Batch, outputs: Any, terms: set[str]) -> Tensor:
    """Samples of the batch with non-finite elements: indices of the data set where they are known, or positions."""
    batches, _, size = objective.align(batch.y, outputs, batch.sample_weight, batch.mask, checked=True)
    for plan, aligned in zip(objective.terms, batches, strict=True):
        if plan.name not in terms:
            continue
        found = torch.zeros(size, dtype=torch.bool)
        for tensor in (aligned.prediction.raw, aligned.y_true, aligned.weighting.product):
            if tensor is not None and tensor.ndim and tensor.shape[0] == size:
                found |= ~torch.isfinite(tensor.detach().float()).reshape(size, -1).all(1).cpu()
        positions = found.nonzero().flatten()
        if len(positions):
            return positions if batch.ids is None else batch.ids[positions]
    return torch.zeros(0, dtype=torch.int64)


def _said(samples: Tensor, batch: Batch) -> str:
    """The samples in words."""
    if not len(samples):
        return ""
    named = "data set indices" if batch.ids is not None else "positions in the batch"
    shown = ", ".join(str(int(i)) for i in samples[:8]) + (", …" if len(samples) > 8 else "")
    return f" Bad samples: {len(samples)} of {batch.size} ({named} {shown})."


def _classes(objective: Objective, tallies: dict[str, Tally]) -> list[str]:
    """Classes whose totals are not finite, where the loss has several."""
    names: dict[str, None] = {}
    for tally in tallies.values():
        groups = tally.groups
        if groups is None or groups.keys is None:
            continue
        several = len({key for key, _ in groups.keys})
        for (key, _), total in zip(groups.keys, groups.total, strict=True):
            if several > 1 and not bool(torch.isfinite(torch.as_tensor(total))):
                names[objective.group_name(key, several)] = None
    return list(names)


def _already_bad(batch: Batch, outputs: Any) -> list[str]:
    """What was not finite before the loss saw it."""
    parts = (
        ("x", batch.x),
        ("y", batch.y),
        ("sample_weight", batch.sample_weight),
        ("the output of the model", unpacked(outputs)[0]),
    )
    return [name for name, value in parts if any(_bad(t) for t in leaves(value))]


def _bad(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
