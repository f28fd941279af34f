"""What a run was made of: kept with its ledger, so that numbers of different recipes are not compared."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

import lossledger
from lossledger.training.step import StepPlan


def provenance(plan: StepPlan, seed: int | None, batch_size: int, accumulate: int = 1) -> dict[str, Any]:
    """Recipe, divisors, seed, sizes and versions, as values that JSON can hold."""
    objective = plan.objective
    return {
        "recipe": {t.name: {"loss": repr(t.loss), "weight": t.coefficient} for t in objective.terms},
        "divisors": {t.name: t.loss.reduction.name for t in objective.terms},
        "regularizers": {p.name: repr(p.regularizer) for p in objective.penalties},
        "class_names": list(objective.class_names or ()),
        "class_weight": {t.name: _plain(t.class_weight) for t in objective.terms if t.class_weight is not None},
        "optimizer": type(plan.optimizer).__name__,
        "learning_rate": float(plan.optimizer.param_groups[0]["lr"]),
        "batch_size": batch_size,
        "accumulate": accumulate,
        "seed": seed,
        "parameters": sum(p.numel() for p in plan.parameters),
        "versions": {
            "lossledger": lossledger.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def _plain(class_weight: Any) -> Any:
    if isinstance(class_weight, Mapping):
        return {str(k): float(v) for k, v in class_weight.items()}
    return [float(v) for v in class_weight]
