"""The checkpoints of a call of `fit`: when they are written, what they hold, and how a run goes on from one.

They are written between optimizer steps only: a step that a kill cuts off runs again from its beginning.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossledger.batch import Batch
from lossledger.distributed import Group, as_part, at_rest, divided_state, gathered, is_part, local, together
from lossledger.errors import CheckpointError, InputError
from lossledger.forward import Forward
from lossledger.ledger import Ledger, segments
from lossledger.training import checkpoint, parts, position, randomness
from lossledger.training.average import Average
from lossledger.training.callback import Callback, overrides
from lossledger.training.callbacks import BackupAndRestore
from lossledger.training.checkpoint import Checkpoint
from lossledger.training.data import ArrayData, Data
from lossledger.training.provenance import differences
from lossledger.training.sharing import Turn, own_batches

if TYPE_CHECKING:
    from lossledger.training.sums import Pass

# Share of the time that checkpoints may take, where nobody says how often to write them.
SHARE = 0.01
_LEDGERS = ("ledger", "metrics", "samples", "groups")


@dataclass(slots=True, eq=False)
class Progress:
    """How far a call of `fit` has come.

    Args:
        history: numbers by name, one an epoch.
        done: the epochs that ended, from 0.
        step: number of the next epoch's first step, from 1.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)
    step: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Changing:
    """All that training changes.

    Args:
        forward: of the model, with its weights.
        optimizer: with the state of its parameters.
        average: of the weights.
        callbacks: those with a state among them.
        data: trained on.
        validation: validated on.
        progress: of the epochs.
        stopped: whether a callback ended the training.
        stop: sets that.
        device: of the model.
    """

    forward: Forward
    optimizer: torch.optim.Optimizer
    average: Average
    callbacks: Sequence[Callback]
    data: Data
    validation: Data | None
    progress: Progress
    stopped: Callable[[], bool]
    stop: Callable[[bool], None]
    device: torch.device


class Backup:
    """Writes the checkpoints of a run, and puts everything back from the one it goes on from.

    All ranks call its methods; rank 0 writes the files, and its clock counts.

    Args:
        group: the ranks.
        folder: of the run.
        found: the checkpoint to go on from, if any.
        fixed: what a checkpoint says of the whole run: recipe and seed.
        changing: what it holds.
        save_freq: "epoch", a number of batches, or `None` for a bounded share of the time.
    """

    def __init__(
        self,
        group: Group,
        folder: Path,
        found: Checkpoint | None,
        fixed: Mapping[str, Any],
        changing: Changing,
        save_freq: str | int | None,
    ) -> None:
        self._group = group
        self._folder, self._fixed, self._changing, self._save_freq = folder, fixed, changing, save_freq
        self._state: dict[str, Any] | None = None if found is None else found.state
        self._taken, self._ended = 0, False
        self._opening: dict[str, Any] | None = None
        self._next = 0.0

    # --- when ------------------------------------------------------------------------------------------------------

    def is_time(self) -> bool:
        """Whether the clock of this process asks for a checkpoint."""
        return self._save_freq is None and time.perf_counter() >= self._next

    def due(self, steps: int, turn: Turn) -> bool:
        """Whether a checkpoint should be written after so many steps of the epoch, the last of which was this one."""
        if isinstance(self._save_freq, int):
            return (self._changing.progress.step - 1 + steps) % self._save_freq == 0
        return self.is_time() if self._group.size == 1 else turn.saved

    def end_epoch(self, last: bool) -> None:
        """Write a checkpoint, if one is due at the end of this epoch."""
        if last or self._save_freq == "epoch" or self._group.agree(int(self.is_time()))[0][0]:
            self.write(None)

    def write(self, current: Pass | None) -> None:
        """Write a checkpoint.

        Args:
            current: the pass of the epoch that runs; `None` between epochs.
        """
        started = time.perf_counter()
        at_rest(self._changing.forward.net)
        state = {**self._fixed, **self._now(current)}
        # Telling a state may draw; when checkpoints are written must not change the run.
        randomness.restore(state["random"], self._changing.device)
        buffers = self._buffers(state["weights"])
        # What ranks compare must be there on all of them; weights lie on the first.
        state = {k: gathered(part, self._group.rank == 0 or k == "callbacks") for k, part in state.items()}
        state = parts.collected(self._group, state, buffers)
        together(self._group, lambda: self._to_disk(state))
        ended = time.perf_counter()
        self._next = ended + (ended - started) / SHARE

    def _to_disk(self, state: Mapping[str, Any]) -> None:
        if self._group.rank == 0:
            checkpoint.write(self._folder / checkpoint.FOLDER, state)

    # --- what ------------------------------------------------------------------------------------------------------

    def _now(self, current: Pass | None) -> dict[str, Any]:
        all_ = self._changing
        progress = all_.progress
        return {
            "random": randomness.capture(all_.device),
            "history": progress.history,
            "done": progress.done,
            "step": progress.step,
            "stopped": all_.stopped(),
            "epoch": None if current is None else self._within(current),
            "data": position.state_of(all_.data, bool(progress.done) or current is not None),
            "validation": position.state_of(all_.validation, any(n.startswith("val_") for n in progress.history)),
            "callbacks": [callback.state_dict() for callback in stateful(all_.callbacks)],
            "average": all_.average.state_dict(),
            "optimizer": all_.optimizer.state_dict(),
            "weights": all_.forward.everything(),
            "segments": {kind: segments.segment_names(self._folder / kind) for kind in _LEDGERS},
        }

    def _buffers(self, weights: Mapping[str, Tensor]) -> list[str]:
        """What is not trained, and may differ by rank."""
        trained = {local(p).data_ptr() for p in self._changing.forward.named_parameters().values()}
        return [n for n, value in weights.items() if not is_part(value) and value.data_ptr() not in trained]

    def _within(self, current: Pass) -> dict[str, Any]:
        place = {"taken": self._taken, "ended": self._ended, "opening": self._opening}
        return {"pass": current.state_dict(), **place}

    def begin(self) -> None:
        """Put everything back as it was; a new run writes its first checkpoint."""
        if self._state is None:
            self.write(None)
            return
        state, all_ = self._state, self._changing
        all_.progress.history = state["history"]
        all_.progress.done, all_.progress.step = state["done"], state["step"]
        all_.stop(state["stopped"])
        # Before the optimizer: making a scheduler changes its rates.
        for callback, own in zip(stateful(all_.callbacks), state["callbacks"], strict=True):
            callback.load_state_dict(own)
        known = all_.forward.everything()
        all_.forward.put_back({name: as_part(value, known.get(name)) for name, value in state["weights"].items()})
        all_.optimizer.load_state_dict(divided_state(state["optimizer"], all_.optimizer))
        all_.average.load_state_dict(state["average"])
        position.restore(all_.data, state["data"])
        position.restore(all_.validation, state["validation"])
        self._next = time.perf_counter()
        if state["epoch"] is None:
            self._settle()

    @property
    def interrupted(self) -> bool:
        """Whether the next epoch is the rest of one that was interrupted."""
        return self._state is not None and self._state["epoch"] is not None

    def batches(
        self, batch_size: int, order: Tensor | None, limit: int | None, current: Pass
    ) -> Iterator[Batch | None]:
        """The batches of the epoch that begins, or the rest of one that was interrupted, as `own_batches` gives them.

        Args:
            batch_size: samples of a batch.
            order: of the samples of arrays.
            limit: batches of a whole epoch, if not all of the data.
            current: the pass of the epoch; put back to where it was.
        """
        data, device = self._changing.data, self._changing.device
        if self._state is None or self._state["epoch"] is None:
            self._taken, self._ended, self._opening = 0, False, position.opening_of(data, device)
            batches = own_batches(data, batch_size, order, self._group)
            if self._opening is not None:
                batches = position.seen_from(batches, self._opening)
        else:
            interrupted = self._state["epoch"]
            current.load_state_dict(interrupted["pass"])
            self._taken, self._opening = interrupted["taken"], interrupted["opening"]
            batches = self._rest(batch_size, order, interrupted["ended"])
            position.restore_generators(data, self._state["data"]["generators"])
            self._settle()
        return self._counted(itertools.islice(batches, None if limit is None else limit - self._taken))

    def _rest(self, batch_size: int, order: Tensor | None, ended: bool) -> Iterator[Batch | None]:
        data = self._changing.data
        if isinstance(data, ArrayData):
            return own_batches(data, batch_size, order, self._group, self._taken)
        if ended and data.has_state:
            # Another rank has more batches than this one; its loader would begin anew.
            return iter(())
        return position.rest_of_epoch(data, self._taken, self._opening, self._changing.device)

    def _counted(self, batches: Iterator[Batch | None]) -> Iterator[Batch | None]:
        for batch in batches:
            self._taken += 1
            yield batch
        self._ended = True

    def _settle(self) -> None:
        """The last thing to put back; nothing may draw between here and the next step."""
        assert self._state is not None
        if self._state["random"] is None:
            randomness.apart(self._state["recipe"]["seed"], self._group.rank, self._state["step"] + self._taken)
        else:
            randomness.restore(self._state["random"], self._changing.device)
        self._state = None


def stateful(callbacks: Sequence[Callback]) -> list[Callback]:
    """The callbacks that tell a state."""
    return [callback for callback in callbacks if overrides(callback, "state_dict")]


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


# --- the run to go on with -----------------------------------------------------------------------------------------


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


def open_run(
    group: Group,
    folder: str | Path | None,
    found: Checkpoint | None,
    recipe: Callable[[], Mapping[str, Any]],
    changing: Changing,
) -> tuple[Backup | None, Ledger | None]:
    """The backup of a run, and its ledger so far; nothing is touched before everything has been checked.

    Args:
        group: the ranks.
        folder: of the run, if it has one.
        found: the checkpoint to go on from, if any.
        recipe: makes that of this call, which takes the whole state of the model.
        changing: what checkpoints hold.

    Raises:
        CheckpointError: a run that this call cannot go on with.
        InputError: a `BackupAndRestore` that has no folder.
    """
    save_freq = frequency(changing.callbacks, folder)
    if folder is None:
        return None, None
    folder = Path(folder)
    ledger, made = None, recipe()
    if found is not None:
        written, found = found, parts.of_rank(found, group)
        together(group, functools.partial(_check, found, written, group, folder, made, changing))
        last = found
        ledger = together(group, lambda: reopened(last, folder) if group.rank == 0 else None)
        ledger = group.first(ledger)
    return Backup(group, folder, found, {"recipe": dict(made)}, changing, save_freq), ledger


def _check(
    found: Checkpoint, written: Checkpoint, group: Group, folder: Path, recipe: Mapping[str, Any], changing: Changing
) -> None:
    check_recipe(found, recipe, folder)
    parts.check_ranks(written, group, changing.data, changing.validation)
    position.check_resumable(changing.data, "x", recipe["steps_per_epoch"])
    if changing.validation is not None:
        position.check_resumable(changing.validation, "validation_data", None)


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
    for kind in _LEDGERS:
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
