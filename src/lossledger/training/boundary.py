"""The data boundary of `fit` and `evaluate`: what is checked once, so that no step has to."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossledger.batch import Batch, leaves, to_device
from lossledger.distributed import at_rest
from lossledger.errors import EmptyDataError, InputError, InputTypeError, LossledgerError, UnknownNameError
from lossledger.forward import run_forward
from lossledger.objective import Objective, unpacked
from lossledger.training.data import ArrayData, Data, IterableData, check_kind, is_arrays, make_data, read_batch
from lossledger.training.known import Assumed, Check, Known, form_of, stand_in
from lossledger.training.modes import evaluating
from lossledger.training.step import StepPlan
from lossledger.values import is_number

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
BATCH_SIZE = 32
POLICIES = ("raise", "skip", "record")


def validation(data: Data, split: Any, given: Any, dtype: torch.dtype) -> tuple[Data, Data | None]:
    """The data to train on and the data to validate on.

    Raises:
        InputError: both forms of validation, or a share that cannot be taken.
        EmptyDataError: a share that leaves nothing on one side.
    """
    split = 0.0 if split is None else split
    if not is_number(split):
        raise InputTypeError(f"validation_split: expected a share between 0 and 1, received {split!r}.")
    if given is not None:
        if split:
            raise InputError("validation_split and validation_data were both given; choose one.")
        with about_validation():
            # A list of batches is an iterable like any other, whatever its length.
            if isinstance(given, list | tuple) and 2 <= len(given) <= 3 and is_arrays(given):
                weight = given[2] if len(given) == 3 else None
                return data, make_data(given[0], given[1], weight, None, dtype)
            return data, make_data(given, None, None, None, dtype)
    return (data, None) if not split else _divided(data, float(split))


def _divided(data: Data, split: float) -> tuple[Data, Data]:
    """The first samples, and the share of the last."""
    if not 0 < split < 1:
        raise InputError(f"validation_split: expected a share between 0 and 1, received {split!r}.")
    if not isinstance(data, ArrayData):
        raise InputError(
            "Argument `validation_split` is only supported for tensors or NumPy arrays; received an iterable of "
            "batches. Pass validation_data."
        )
    kept = int(data.length * (1 - split))
    if kept in (0, data.length):
        raise EmptyDataError(
            f"Training data contains {data.length} samples, which is not sufficient to split it: "
            f"validation_split={split} leaves {'nothing to train on' if kept == 0 else 'nothing to validate on'}. "
            "Change the share."
        )
    return data.part(0, kept), data.part(kept, data.length)


@contextlib.contextmanager
def about_validation() -> Iterator[None]:
    """Errors say that they are about the validation data."""
    try:
        yield
    except LossledgerError as error:
        error.args = (f"validation data: {error}",)
        raise


def first_batch(data: Data) -> tuple[Batch, Data]:
    """The first batch (of an array, its first samples), and the data with it still in its place.

    Raises:
        EmptyDataError: there is none.
    """
    if isinstance(data, ArrayData):
        return next(data.batches(2, None)), data
    source = iter(data.source)
    try:
        first = next(source)
    except StopIteration:
        raise EmptyDataError("x: the iterable gave no batch; expected at least one.") from None
    again = IterableData(itertools.chain([first], source), data.dtype) if source is data.source else data
    return read_batch(first, data.dtype, 0), again


def checked_at_once(data: Data, device: torch.device) -> bool:
    """Arrays were checked at once; batches of an iterable are checked as they come, where reading costs nothing."""
    return isinstance(data, ArrayData) or device.type != "cpu"


def check_targets(plan: StepPlan, data: Data, device: torch.device, known: Known | None = None) -> Assumed | None:
    """All targets against the shape of the outputs: label range, shapes, probabilities.

    Args:
        plan: of a step.
        data: to check; an iterable is checked as its batches come.
        device: of the model.
        known: the outputs that are known by the form of the inputs; of others the model is asked, with two samples.

    Returns:
        what the first batch must confirm, where the outputs were known.

    Raises:
        InputError: targets or outputs that do not fit each other or the loss.
    """
    if not isinstance(data, ArrayData):
        return None
    check, form = _checker(plan.objective, data), form_of(data.x)
    if known is not None and form in known:
        # Whatever is refused by what the model once returned is judged by what it returns now.
        with contextlib.suppress(LossledgerError):
            check(known[form])
            return Assumed(known, form, plan.objective, [check])
    found = _asked(plan, data, device)
    check(found)
    if known is not None:
        known[form] = {name: stand_in(output) for name, output in found.items()}
    return None


def _checker(objective: Objective, data: ArrayData) -> Check:
    if objective.structure == "one" and not isinstance(data.y, Tensor):
        raise InputError(
            f"y: the loss is for one output; expected one array, received a {type(data.y).__name__} of "
            f"{len(list(leaves(data.y)))}. Pass the array itself, or give a loss for each output."
        )
    return lambda found: objective.check_data(data.y, found, data.sample_weight, data.mask, data.length)


def _asked(plan: StepPlan, data: ArrayData, device: torch.device) -> dict[str, Tensor]:
    """The outputs with a loss for two samples: of one, a shape that follows the batch looks like any other."""
    # A copy: the model may write into its inputs.
    probe = to_device(data.again(torch.arange(min(2, data.length))), device)
    with evaluating(plan.net), torch.no_grad():
        outputs = run_forward(plan.forward, probe.x, plan.autocast, device.type)
    at_rest(plan.net)
    found = plan.objective.split(unpacked(outputs)[0], "y_pred")
    # What a model returns beside the outputs with a loss is its own business.
    names = dict.fromkeys(term.output for term in plan.objective.terms)
    for name in names:
        check_output(found[name], name, probe.size)
    return {name: found[name] for name in names}


def check_output(output: Any, name: str, samples: int) -> None:
    """An output with a loss is a tensor with the batch on its first axis.

    Raises:
        InputError: another shape.
        InputTypeError: no tensor.
    """
    where = f" as the output {name!r}" if name else ""
    if not isinstance(output, Tensor):
        raise InputTypeError(
            f"The model returned {type(output).__name__}{where}; expected a tensor with the batch on the first axis."
        )
    if output.ndim == 0 or output.shape[0] != samples:
        raise InputError(
            f"The model returned shape {tuple(output.shape)} for {samples} samples{where}; expected the batch on the "
            "first axis."
        )


def warn_if_trainable_changed(plan: StepPlan, now: Mapping[str, Tensor]) -> None:
    """The optimizer holds what was trainable when `compile` resolved it, as in Keras; a later change needs another."""
    known = {id(p) for p in plan.parameters}
    changed = [name for name, p in now.items() if id(p) not in known]
    frozen = len(known) - (len(now) - len(changed))
    if changed or frozen:
        warnings.warn(
            f"What is trainable has changed since compile: {frozen} parameters were frozen, {len(changed)} thawed"
            f"{f' (such as {changed[0]!r})' if changed else ''}. Those thawed are not trained; call compile again.",
            UserWarning,
            stacklevel=4,
        )


def new_run(folder: Path) -> None:
    """A run folder holds one run: a second one in it would add to its numbers.

    Raises:
        InputError: the folder already holds a run.
    """
    if (folder / "run.json").exists() or any((folder / "checkpoints").glob("*.json")):
        raise InputError(
            f"run_dir: expected a new folder, received {folder}, which already holds a run. Choose another folder, or "
            "go on with that run by resume=True; nothing that was written is overwritten."
        )


def whole(value: Any, name: str, least: int = 1) -> int:
    """A whole number from `least`.

    Raises:
        InputError: another value.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name}: expected a whole number from {least}, received {value!r}.")
    return int(value)


def batch_size_of(given: Any, x: Any, validation: Any = None) -> int:
    """The batch size given, or the usual one.

    Args:
        given: as in `fit`.
        x: as in `fit`; an iterable has batches of its own.
        validation: as in `fit`; arrays are divided also beside an iterable.

    Raises:
        InputError: not a whole number, or beside nothing that it could divide.
    """
    if given is None:
        return BATCH_SIZE
    size = whole(given, "batch_size")
    if not is_arrays(x) and not is_arrays(validation):
        check_kind(x)
        raise InputError(
            f"batch_size: x is an iterable of batches, which have their own sizes; expected no batch_size beside it, "
            f"received {size}. Leave it out; a DataLoader takes it."
        )
    return size


def check_pass(steps: Any) -> None:
    """The count of a pass over data.

    Raises:
        InputError: not a whole number in its range.
    """
    if steps is not None:
        whole(steps, "steps")


def check_fit(
    epochs: Any,
    accumulate: Any,
    initial_epoch: Any,
    validation_freq: Any,
    run_dir: Any,
    resume: Any,
    ledger_steps: Any,
    writes: bool,
) -> tuple[int, int, int, int, int | None]:
    """The counts of `fit`, and its folder, which one process writes to.

    Returns:
        the counts in this order, numbers of NumPy as plain ones.

    Raises:
        InputError: a count that is not a whole number in its range, a folder that holds a run, or none to resume.
        InputTypeError: `resume` is no truth value.
    """
    counts = (
        whole(epochs, "epochs"),
        whole(accumulate, "accumulate"),
        whole(initial_epoch, "initial_epoch", 0),
        whole(validation_freq, "validation_freq"),
        None if ledger_steps is None else whole(ledger_steps, "ledger_steps"),
    )
    if not isinstance(resume, bool):
        raise InputTypeError(f"resume: expected True or False, received {resume!r}.")
    if resume and run_dir is None:
        raise InputError("resume: expected the folder of a run beside it, received run_dir=None. Pass run_dir.")
    if run_dir is not None and not resume and writes:
        new_run(Path(run_dir))
    return counts


def steps_of(steps: Any, available: int | None) -> int | None:
    """The batches of an epoch: all of them, or as many as `steps_per_epoch` says.

    Raises:
        InputError: more than there are, or not a whole number.
    """
    if steps is None:
        return available
    wanted = whole(steps, "steps_per_epoch")
    if available is not None and wanted > available:
        raise InputError(
            f"steps_per_epoch: expected at most {available}, the batches of one pass over the data; received {wanted}. "
            "Train for more epochs instead."
        )
    return wanted


def check_targets_of_all(
    plan: StepPlan,
    frozen_plan: StepPlan,
    data: Data,
    held: Data | None,
    device: torch.device,
    known: Known | None = None,
) -> Assumed | None:
    """The targets to train on, and those to validate on.

    Returns:
        as `check_targets`, for both.

    Raises:
        InputError: as `check_targets`.
    """
    assumed = check_targets(plan, data, device, known)
    if held is None:
        return assumed
    alike = isinstance(data, ArrayData) and isinstance(held, ArrayData) and form_of(data.x) == form_of(held.x)
    # Class weights do not apply to validation, so its targets may hold other classes.
    with about_validation():
        other = check_targets(frozen_plan, held, device, known if alike else None)
    if not alike or assumed is None:
        return assumed
    # Asked again for one, the model may have returned something new for both.
    return check_targets(plan, data, device) if other is None else assumed.joined(other, about_validation)


def updates_of(batches: int | None, accumulate: int) -> int | None:
    """Optimizer steps of so many batches; the last one may have fewer batches than the others."""
    return None if batches is None else -(-batches // accumulate)


def seed_of(seed: Any) -> int:
    """The seed given, or one drawn from torch's generator.

    Raises:
        InputTypeError: not a whole number.
    """
    if seed is None:
        return int(torch.randint(2**31, ()))
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise InputTypeError(f"seed: expected a whole number or None, received {seed!r}.")
    return int(seed)


def check_compile(
    loss: Any, precision: Any, clip_norm: Any, ema: Any, on_nonfinite: Any, reproducible: Any, jit: Any
) -> None:
    """There is a loss, and the options of `compile` that are words and numbers.

    Raises:
        UnknownNameError: a word that is not one of them.
        InputError: no loss, or a number out of range.
        InputTypeError: no number.
    """
    if loss is None:
        raise InputError(
            "No loss to compute. Provide a `loss` argument in `compile()`: expected a loss, received None. For "
            "example compile(loss='mse')."
        )
    for name, truth in (("reproducible", reproducible), ("jit", jit)):
        if not isinstance(truth, bool):
            raise InputTypeError(f"{name}: expected True or False, received {truth!r}.")
    for name, word, words in (("precision", precision, PRECISIONS), ("on_nonfinite", on_nonfinite, POLICIES)):
        if not isinstance(word, str) or word not in words:
            raise UnknownNameError(name, word, words)
    for name, number, expected in (
        ("clip_norm", clip_norm, "a positive number"),
        ("ema", ema, "a decay between 0 and 1"),
    ):
        if number is None:
            continue
        if not is_number(number):
            raise InputTypeError(f"{name}: expected {expected}, received {number!r}.")
        if not number > 0 or (name == "ema" and not number < 1):
            raise InputError(f"{name}: expected {expected}, received {number!r}.")
