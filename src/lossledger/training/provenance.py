"""What a run was made of: kept with its ledger, so that numbers of different recipes are not compared."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lossledger
from lossledger.batch import leaves
from lossledger.training.data import ArrayData, Data
from lossledger.training.step import StepPlan

# What may differ between a run and the call that resumes it, or is known from the weights.
_FREE = ("learning_rate", "versions", "parameters", "ranks")


def provenance(
    plan: StepPlan, seed: int | None, batch_size: int, accumulate: int = 1, ranks: int = 1
) -> dict[str, Any]:
    """Recipe, divisors, seed, sizes, ranks and versions, as values that JSON can hold."""
    objective = plan.objective
    return {
        "recipe": {t.name: {"loss": repr(t.loss), "weight": t.coefficient} for t in objective.terms},
        "divisors": {t.name: t.loss.reduction.name for t in objective.terms},
        "regularizers": {p.name: repr(p.regularizer) for p in objective.penalties},
        "class_names": list(objective.class_names or ()),
        "class_weight": {t.name: _plain(t.class_weight) for t in objective.terms if t.class_weight is not None},
        **({"reproducible": True} if objective.reproducible else {}),
        "optimizer": type(plan.optimizer).__name__,
        "learning_rate": float(plan.optimizer.param_groups[0]["lr"]),
        "batch_size": batch_size,
        "accumulate": accumulate,
        "seed": seed,
        "parameters": sum(p.numel() for p in plan.parameters),
        "ranks": ranks,
        "versions": {
            "lossledger": lossledger.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def recipe(
    made: Mapping[str, Any],
    plan: StepPlan,
    state: Mapping[str, Tensor],
    data: Data,
    validation: Data | None,
    **settings: Any,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed, as values that JSON gives back equal.

    Args:
        made: the provenance. Versions may change, and learning rates come with the optimizer's state.
        plan: of a step.
        state: weights and buffers, by names that another instance has too.
        data: to train on.
        validation: to validate on.
        settings: more of the same, by name.
    """
    kept = {name: value for name, value in made.items() if name not in _FREE}
    shapes = {name: f"{value.dtype} {tuple(value.shape)}" for name, value in state.items()}
    step = {"precision": str(plan.autocast or "float32"), "clip_norm": plan.clip_norm}
    whole = {**kept, **step, "weights": shapes, "data": _described(data), "validation data": _described(validation)}
    # Functions are known by their names: their addresses differ from process to process.
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps({**whole, **settings}, default=_known))
    found: dict[str, Any] = json.loads(text)
    return found


def _known(value: Any) -> Any:
    """What JSON has no form for: numbers of NumPy are numbers, all else is known by its text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _described(data: Data | None) -> Any:
    if data is None:
        return None
    if not isinstance(data, ArrayData):
        return {"batches": data.steps(1)}
    parts = {"x": data.x, "y": data.y, "sample_weight": data.sample_weight, "mask": data.mask}
    shapes = {name: [f"{a.dtype} {tuple(a.shape[1:])}" for a in leaves(part)] for name, part in parts.items()}
    kinds = {"groups": sorted(data.groups)} if data.groups else {}
    return {"samples": data.length, **shapes, **kinds}


def differences(run: Any, call: Any, where: str = "") -> Iterator[str]:
    """What differs between the recipe of a run and that of a call of `fit`."""
    if isinstance(run, Mapping) and isinstance(call, Mapping):
        for name in {**run, **call}:
            yield from differences(run.get(name), call.get(name), f"{where} {name}".lstrip())
    elif run != call and not _was_numpy(run, call):
        yield f"{where}: expected {run!r} as in the run, received {call!r}"


def _was_numpy(run: Any, call: Any) -> bool:
    """Whether the run holds the text of this number: earlier versions kept numbers of NumPy so."""
    if not isinstance(run, str) or not isinstance(call, int | float):
        return False
    with np.errstate(over="ignore"):
        return run == str(call) or (isinstance(call, float) and run == str(np.float32(call)))


def _plain(class_weight: Any) -> Any:
    if isinstance(class_weight, Mapping):
        return {str(k): float(v) for k, v in class_weight.items()}
    return [float(v) for v in class_weight]
