"""Callbacks that hand the numbers of an epoch to programs that draw curves; steps never call them."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lossledger.errors import ExtraError
from lossledger.training.callback import Callback, Logs
from lossledger.training.series import Names, Series, epoch_rows

# As Keras names the folders of its event files.
_FOLDERS = {"training": "train"}


def extra(module: str, name: str, who: str) -> Any:
    """A module of an extra.

    Raises:
        ExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExtraError(
            f"{who}: expected the packages of the extra {name!r}; received {error}. "
            f"Install them: pip install 'lossledger[{name}]'."
        ) from error


class _Sink(Callback):
    """Writes at the end of every epoch, on one rank."""

    def __init__(self, most_groups: int) -> None:
        self.most_groups = most_groups
        self._start_over()

    def _start_over(self) -> None:
        self._names, self._series = Names(), Series(self.most_groups)
        self._steps = 0
        # The epoch and the step that are written first.
        self._begin: tuple[int, int] | None = None

    def on_train_begin(self, logs: Logs) -> None:
        """Start over."""
        self._start_over()
        # Kept: an evaluation in another callback leaves its own in the model.
        self._ledger = self.model.ledger

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Write the numbers of the logs, and those of the ledger's rows of this epoch."""
        if not self.model.writes:
            return
        self._begin = self._begin or (epoch, self._steps + 1)
        self._write(epoch, logs, list(self._points(epoch)))

    def state_dict(self) -> dict[str, Any]:
        """The last step that was written."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind it."""
        self._steps = state["steps"]

    def _points(self, epoch: int) -> Iterator[tuple[str, int | None, str, float]]:
        """Split, step, name and value of the points of an epoch."""
        rows, metrics = epoch_rows(self._ledger, epoch + 1)
        for point in self._series.points(rows, metrics):
            if point.step is not None:
                self._steps = max(self._steps, point.step)
            yield point.split, point.step, self._names.of(*point.name), point.value

    def _write(self, epoch: int, logs: Logs, points: list[tuple[str, int | None, str, float]]) -> None:
        raise NotImplementedError


class TensorBoard(_Sink):
    """Write event files for TensorBoard; needs the extra `tensorboard`.

    The folders `train` and `validation` have the numbers of the logs as Keras names them, `epoch_loss`, at the epochs,
    counted from 0 as in Keras; and of the ledger's rows `mean/…`, `contribution/…` and `count/…` of terms and groups,
    and `masked/…` and `nonfinite/…` of terms. Rows of steps go to the folder `steps`, at their steps. Another training
    in the same folder takes the place of what it repeats. TensorBoard holds single precision; the ledger has every
    digit.

    Args:
        log_dir: folder of the event files.
        most_groups: a kind of groups with more of them is left out, with a warning.

    Raises:
        ExtraError: TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | Path = "logs", most_groups: int = 100) -> None:
        self.log_dir = Path(log_dir)
        self._writer_class = extra("torch.utils.tensorboard", "tensorboard", "TensorBoard").SummaryWriter
        self._writers: dict[str, Any] = {}
        super().__init__(most_groups)

    def on_train_end(self, logs: Logs) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _write(self, epoch: int, logs: Logs, points: list[tuple[str, int | None, str, float]]) -> None:
        for name, value in logs.items():
            held = name.startswith("val_")
            self._add("validation" if held else "train", f"epoch_{name.removeprefix('val_')}", value, epoch)
        for split, step, name, value in points:
            if step is None:
                self._add(_FOLDERS.get(split, split), name, value, epoch)
            else:
                self._add("steps", name, value, step)
        for writer in self._writers.values():
            writer.flush()

    def _add(self, folder: str, name: str, value: float, step: int) -> None:
        if folder not in self._writers:
            assert self._begin is not None
            # TensorBoard drops what the folder has from there on: epochs of a killed run that run again.
            begin = self._begin[1 if folder == "steps" else 0]
            self._writers[folder] = self._writer_class(str(self.log_dir / folder), purge_step=begin)
        # In single precision: TensorBoard's own loader leaves out points in double precision, without a word.
        self._writers[folder].add_scalar(name, value, step, new_style=True)


class MLflow(_Sink):
    """Log metrics to MLflow; needs the extra `mlflow`.

    They go to the active run, or to a new one of the experiment that is set in MLflow: those of the logs by their
    names, `loss` and `val_loss`, at the epochs, counted from 0 as in Keras; and of the ledger's rows
    `training/mean/…`, `training/contribution/…`, `training/count/…` of terms and groups, `training/masked/…` and
    `training/nonfinite/…` of terms, and the same of the validation. Rows of steps are `steps/…`, at their steps. Where
    to is said to MLflow: `mlflow.set_tracking_uri`, `mlflow.set_experiment`. A resumed run goes on in its MLflow run.

    Args:
        run_name: of a new MLflow run.
        most_groups: a kind of groups with more of them is left out, with a warning.

    Raises:
        ExtraError: MLflow is not installed.
    """

    # As many as one request may hold.
    _BATCH = 1000

    def __init__(self, run_name: str | None = None, most_groups: int = 100) -> None:
        self.run_name = run_name
        self._mlflow = extra("mlflow", "mlflow", "MLflow")
        self.run_id: str | None = None
        self._owned = False
        super().__init__(most_groups)

    def on_train_begin(self, logs: Logs) -> None:
        """Start over, in a new run where none is active and none is resumed."""
        super().on_train_begin(logs)
        self.run_id, self._owned = None, False
        # An error that the caller is dealing with is none of this training.
        self._error = sys.exception()
        # The first checkpoint, before the first step, knows the run already.
        if self.model.writes and not self.params.get("resumed"):
            self._run()

    def state_dict(self) -> dict[str, Any]:
        """What was written, and to which run."""
        return {**super().state_dict(), "run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the same run; what runs again is logged again, with the same values."""
        super().load_state_dict(state)
        self.run_id = state["run_id"]

    def on_train_end(self, logs: Logs) -> None:
        """End the run, if it was made here: as failed or killed where an exception ends the training."""
        if self._owned:
            error = sys.exception()
            killed = isinstance(error, KeyboardInterrupt)
            ended = "FINISHED" if error is self._error else "KILLED" if killed else "FAILED"
            self._mlflow.end_run(ended)
            self._owned = False

    def _write(self, epoch: int, logs: Logs, points: list[tuple[str, int | None, str, float]]) -> None:
        metric = importlib.import_module("mlflow.entities").Metric
        now = int(1000 * time.time())
        found = [metric(name, value, now, epoch) for name, value in logs.items()]
        for split, step, name, value in points:
            key = f"{split if step is None else 'steps'}/{name}"
            found.append(metric(key, value, now, epoch if step is None else step))
        client, run = self._mlflow.MlflowClient(), self._run()
        for start in range(0, len(found), self._BATCH):
            client.log_batch(run, metrics=found[start : start + self._BATCH])

    def _run(self) -> str:
        """The run to write to."""
        active = self._mlflow.active_run()
        if active is None:
            active = self._mlflow.start_run(run_id=self.run_id, run_name=None if self.run_id else self.run_name)
            self._owned = True
        self.run_id = str(active.info.run_id)
        return self.run_id
