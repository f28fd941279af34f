"""The checkpoints of a call of `fit`: when they are written, what they hold, and how a run goes on from one.

They are written between optimizer steps only: a step that a kill cuts off runs again from its beginning.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lossledger.batch import Batch
from lossledger.distributed import as_part, at_rest, divided_state, gathered, is_part, local, together
from lossledger.ledger import segments
from lossledger.training import checkpoint, parts, position, randomness
from lossledger.training.alone import Alone
from lossledger.training.callback import Callback, overrides
from lossledger.training.checkpoint import Checkpoint
from lossledger.training.data import ArrayData
from lossledger.training.sharing import Turn, own_batches

if TYPE_CHECKING:
    from lossledger.training.fitting import Fitting
    from lossledger.training.sums import Pass

# Share of the time that checkpoints may take, where nobody says how often to write them.
SHARE = 0.01
LEDGERS = ("ledger", "metrics", "samples", "groups")


class Backup:
    """Writes the checkpoints of a run, and puts everything back from the one it goes on from.

    All ranks call its methods; rank 0 writes the files, and its clock counts.

    Args:
        folder: of the run.
        found: the checkpoint to go on from, if any.
        fixed: what a checkpoint says of the whole run: recipe and seed.
        fitting: the call, with all that training changes.
        save_freq: "epoch", a number of batches, or `None` for a bounded share of the time.
        alone: the folder as held by rank 0.
    """

    def __init__(
        self,
        folder: Path,
        found: Checkpoint | None,
        fixed: Mapping[str, Any],
        fitting: Fitting,
        save_freq: str | int | None,
        alone: Alone | None,
    ) -> None:
        self._group, self._alone = fitting.group, alone
        self._folder, self._fixed, self._fitting, self._save_freq = folder, fixed, fitting, save_freq
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
            return (self._fitting.progress.step - 1 + steps) % self._save_freq == 0
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
        at_rest(self._fitting.forward.net)
        state = {**self._fixed, **self._now(current)}
        # Telling a state may draw; when checkpoints are written must not change the run.
        randomness.restore(state["random"], self._fitting.device)
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
        fitting = self._fitting
        progress = fitting.progress
        return {
            "random": randomness.capture(fitting.device),
            "history": progress.history,
            "done": progress.done,
            "step": progress.step,
            "stopped": fitting.stopped(),
            "epoch": None if current is None else self._within(current),
            "data": position.state_of(fitting.data, bool(progress.done) or current is not None),
            "validation": position.state_of(fitting.validation, any(n.startswith("val_") for n in progress.history)),
            "callbacks": [callback.state_dict() for callback in stateful(fitting.options.callbacks)],
            "average": fitting.average.state_dict(),
            "optimizer": fitting.plan.optimizer.state_dict(),
            "weights": fitting.forward.everything(),
            "segments": {kind: segments.segment_names(self._folder / kind) for kind in LEDGERS},
        }

    def _buffers(self, weights: Mapping[str, Tensor]) -> list[str]:
        """What is not trained, and may differ by rank."""
        trained = {local(p).data_ptr() for p in self._fitting.forward.named_parameters().values()}
        return [n for n, value in weights.items() if not is_part(value) and value.data_ptr() not in trained]

    def _within(self, current: Pass) -> dict[str, Any]:
        place = {"taken": self._taken, "ended": self._ended, "opening": self._opening}
        return {"pass": current.state_dict(), **place}

    def begin(self) -> None:
        """Put everything back as it was; a new run writes its first checkpoint."""
        if self._state is None:
            self.write(None)
            return
        state, fitting = self._state, self._fitting
        fitting.progress.history = state["history"]
        fitting.progress.done, fitting.progress.step = state["done"], state["step"]
        fitting.stop(state["stopped"])
        # Before the optimizer: making a scheduler changes its rates.
        for callback, own in zip(stateful(fitting.options.callbacks), state["callbacks"], strict=True):
            callback.load_state_dict(own)
        known = fitting.forward.everything()
        fitting.forward.put_back({name: as_part(value, known.get(name)) for name, value in state["weights"].items()})
        fitting.plan.optimizer.load_state_dict(divided_state(state["optimizer"], fitting.plan.optimizer))
        fitting.average.load_state_dict(state["average"])
        position.restore(fitting.data, state["data"])
        position.restore(fitting.validation, state["validation"])
        self._next = time.perf_counter()
        if state["epoch"] is None:
            self._settle()

    def leave(self) -> None:
        """Let other processes write to the folder."""
        if self._alone is not None:
            self._alone.leave()

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
        data, device = self._fitting.data, self._fitting.device
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
        data = self._fitting.data
        if isinstance(data, ArrayData):
            return own_batches(data, batch_size, order, self._group, self._taken)
        if ended and data.has_state:
            # Another rank has more batches than this one; its loader would begin anew.
            return iter(())
        return position.rest_of_epoch(data, self._taken, self._opening, self._fitting.device)

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
            randomness.restore(self._state["random"], self._fitting.device)
        self._state = None


def stateful(callbacks: Sequence[Callback]) -> list[Callback]:
    """The callbacks that tell a state."""
    return [callback for callback in callbacks if overrides(callback, "state_dict")]
