"""The run that a call of `fit` begins or goes on with: its ledger, its folder, and the checkpoint it goes on from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lossledger.distributed import Group, together
from lossledger.errors import CheckpointError, InputError
from lossledger.ledger import Ledger, segments
from lossledger.training import checkpoint, parts, position
from lossledger.training.alone import Alone
from lossledger.training.backup import LEDGERS, Backup, stateful
from lossledger.training.callback import Callback
from lossledger.training.callbacks import BackupAndRestore
from lossledger.training.checking import Checking
from lossledger.training.checkpoint import Checkpoint
from lossledger.training.fitting import Fitting
from lossledger.training.provenance import differences, recipe


def found_by(group: Group, folder: str | Path | None) -> Checkpoint | None:
    """The checkpoint that a run goes on from, read by rank 0 for all ranks; `None` where no run has begun.

    Args:
        group: the ranks.
        folder: of the run to go on with, if any.
    """
    if folder is None:
        return None
    return parts.of_first(group, together(group, lambda: find(Path(folder)) if group.rank == 0 else None))


def find(folder: Path) -> Checkpoint | None:
    """The checkpoint that a run in this folder goes on from; `None` where no run has begun.

    Raises:
        CheckpointError: a run without a whole checkpoint.
    """
    found = checkpoint.newest(folder / checkpoint.FOLDER)
    if found is None and (folder / segments.RUN_FILE).exists():
        raise CheckpointError(
            f"resume: {folder} holds a run without checkpoints; expected some in {folder / checkpoint.FOLDER}. Put "
            "them back, or start in another run_dir."
        )
    return found


def opened(fitting: Fitting, found: Checkpoint | None, checks: Callable[[Ledger], Checking | None]) -> Fitting:
    """The call with the ledger, the backup and the checks of its run; nothing is touched before all has been checked.

    Args:
        fitting: the call, whose ledger is a new one.
        found: the checkpoint to go on from, if any.
        checks: those of a run with this ledger.

    Raises:
        CheckpointError: a run that this call cannot go on with.
        InputError: a `BackupAndRestore` that has no folder.
    """
    save_freq = frequency(fitting.options.callbacks, fitting.run_dir)
    if fitting.run_dir is None:
        return replace(fitting, options=replace(fitting.options, checks=checks(fitting.ledger)))
    folder, made, group = Path(fitting.run_dir), _recipe(fitting), fitting.group
    alone = together(group, lambda: Alone(folder) if group.rank == 0 else None)
    try:
        ledger = fitting.ledger
        if found is not None:
            written, found = found, parts.of_rank(found, group)
            together(group, functools.partial(_check, found, written, folder, made, fitting))
            again = functools.partial(reopened, found, folder) if group.rank == 0 else lambda: None
            before = group.first(together(group, again))
            ledger = ledger if before is None else before
        saving = Backup(folder, found, {"recipe": made}, fitting, save_freq, alone)
        return replace(fitting, ledger=ledger, options=replace(fitting.options, backup=saving, checks=checks(ledger)))
    except BaseException:
        if alone is not None:
            alone.leave()
        raise


@contextlib.contextmanager
def leaving(fitting: Fitting) -> Iterator[None]:
    """The folder of the run is let go of in the end, however it ends."""
    try:
        yield
    finally:
        if fitting.options.backup is not None:
            fitting.options.backup.leave()


def _recipe(fitting: Fitting) -> dict[str, Any]:
    options = fitting.options
    return recipe(
        fitting.ledger.info,
        fitting.plan,
        fitting.forward.state(),
        fitting.data,
        fitting.validation,
        metrics=[metric.name for metric in fitting.metrics],
        callbacks=[type(callback).__name__ for callback in stateful(options.callbacks)],
        shuffle=fitting.shuffled,
        steps_per_epoch=options.steps,
        initial_epoch=fitting.epochs.start,
        validation_freq=fitting.validation_freq,
        ema=fitting.average.decay,
        on_nonfinite=options.on_nonfinite,
        ledger_steps=options.every,
        samples=fitting.samples or None,
        spread=fitting.spread or None,
    )


def frequency(callbacks: Sequence[Callback], run_dir: Any) -> str | int | None:
    """How often checkpoints are written, as a `BackupAndRestore` says.

    Raises:
        InputError: two of them, or no folder to write to.
    """
    found = [callback for callback in callbacks if isinstance(callback, BackupAndRestore)]
    if len(found) > 1:
        raise InputError("callbacks: expected one BackupAndRestore at most, received several. Keep one.")
    if found and run_dir is None:
        raise InputError("BackupAndRestore: expected a folder for the checkpoints, received none. Pass run_dir to fit.")
    return found[0].save_freq if found else None


def _check(found: Checkpoint, written: Checkpoint, folder: Path, recipe: Mapping[str, Any], fitting: Fitting) -> None:
    check_recipe(found, recipe, folder)
    parts.check_ranks(written, fitting.group, fitting.data, fitting.validation)
    position.check_resumable(fitting.data, "x", recipe["steps_per_epoch"])
    if fitting.validation is not None:
        position.check_resumable(fitting.validation, "validation_data", None)


def check_recipe(found: Checkpoint, recipe: Mapping[str, Any], folder: Path) -> None:
    """A run goes on with the recipe that it began with.

    Raises:
        CheckpointError: another recipe; the message says what differs.
    """
    other = list(differences(found.state["recipe"], recipe))
    if other:
        raise CheckpointError(
            f"resume: the run in {folder} was begun with another recipe. {'; '.join(other)}. Pass what the run had, or "
            "start in another run_dir."
        )


def reopened(found: Checkpoint, folder: Path) -> Ledger | None:
    """The ledger as it was at a checkpoint; `None` where nothing was written yet.

    What was written after the checkpoint is moved to `superseded`: the run writes it again.

    Raises:
        CheckpointError: a segment that the checkpoint names is missing.
    """
    for kind in LEDGERS:
        # Runs of earlier versions have no samples.
        missing = set(found.state["segments"].get(kind, ())) - set(segments.segment_names(folder / kind))
        if missing:
            raise CheckpointError(
                f"resume: {folder / kind} lacks {', '.join(sorted(missing))}, which checkpoint {found.number:06d} "
                "names. Put the files back, or start in another run_dir."
            )
    inside = folder / checkpoint.FOLDER
    segments.set_aside(folder, {**found.state["segments"], checkpoint.FOLDER: checkpoint.files_of(found, inside)})
    return Ledger.open(folder) if (folder / segments.RUN_FILE).exists() else None
