"""The data boundary of `fit` and `evaluate`: what is checked once, so that no step has to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lossledger.errors import EmptyDataError, InputError
from lossledger.objective import Outputs
from lossledger.training.data import ArrayData, Data, is_arrays, leaves, make_data, to_device
from lossledger.training.step import StepPlan, run_forward


def validation(data: Data, split: float, given: Any, dtype: torch.dtype) -> tuple[Data, Data | None]:
    """The data to train on and the data to validate on.

    Raises:
        InputError: both forms of validation, or a share that cannot be taken.
        EmptyDataError: a share that leaves nothing on one side.
    """
    if given is not None:
        if split:
            raise InputError("validation_split and validation_data were both given; choose one.")
        if isinstance(given, list | tuple) and 2 <= len(given) <= 3 and is_arrays(given[0]):
            weight = given[2] if len(given) == 3 else None
            return data, make_data(given[0], given[1], weight, None, dtype)
        return data, make_data(given, None, None, None, dtype)
    if not split:
        return data, None
    if not 0 < split < 1:
        raise InputError(f"validation_split: expected a share between 0 and 1, received {split!r}.")
    if not isinstance(data, ArrayData):
        raise InputError("validation_split needs arrays; x is an iterable of batches. Pass validation_data.")
    kept = int(data.length * (1 - split))
    if kept in (0, data.length):
        raise EmptyDataError(
            f"validation_split={split} of {data.length} samples leaves "
            f"{'nothing to train on' if kept == 0 else 'nothing to validate on'}. Change the share."
        )
    return data.part(0, kept), data.part(kept, data.length)


def checked_at_once(data: Data, device: torch.device) -> bool:
    """Arrays were checked at once; batches of an iterable are checked as they come, where reading costs nothing."""
    return isinstance(data, ArrayData) or device.type != "cpu"


def check_targets(plan: StepPlan, data: Data, device: torch.device) -> None:
    """All targets against the shape of the output of two samples: label range, shapes, probabilities."""
    if not isinstance(data, ArrayData):
        return
    probe = to_device(next(iter(data.part(0, min(2, data.length)).batches(2, None))), device)
    was_training = plan.net.training
    plan.net.eval()
    try:
        with torch.no_grad():
            outputs = run_forward(plan.forward, probe.x, plan.autocast, device.type)
    finally:
        plan.net.train(was_training)
    outputs = outputs.outputs if isinstance(outputs, Outputs) else outputs
    for found in leaves(outputs):
        if found.ndim == 0 or found.shape[0] != probe.size:
            raise InputError(
                f"The model returned shape {tuple(found.shape)} for {probe.size} samples; expected the batch on "
                "the first axis."
            )
    plan.objective.check_data(data.y, outputs, data.sample_weight, data.mask, data.length)


def new_run(folder: Path) -> None:
    """A run folder holds one run: a second one in it would add to its numbers.

    Raises:
        InputError: the folder already holds a run.
    """
    if (folder / "run.json").exists():
        raise InputError(
            f"run_dir: expected a new folder, received {folder}, which already holds a run. Choose another folder, or "
            "move the old one away; nothing that was written is overwritten."
        )


def positive(value: Any, name: str) -> None:
    """A whole number from 1, or an InputError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}: expected a whole number from 1, received {value!r}.")
