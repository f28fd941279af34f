"""The sample ledger: what every sample brought to every term, epoch by epoch, held as columns.

A run folder keeps one segment an epoch and rank; what is sealed there is read again when somebody asks for it, so that
a long run does not hold every epoch in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lossledger.errors import InputError, LedgerError, UnknownNameError
from lossledger.ledger import dynamics, export, query, segments
from lossledger.ledger.columns import INTEGER, REAL, TEXT, Column, Columns, joined
from lossledger.ledger.table import Table

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from numpy.typing import NDArray

FOLDER = "samples"
SAMPLE_COLUMNS = {
    "split": TEXT,
    "epoch": INTEGER,
    "sample": INTEGER,
    "term": TEXT,
    "coefficient": REAL,
    "total": REAL,
    "count": INTEGER,
    "weight": REAL,
    "mean": REAL,
    "contribution": REAL,
    "confidence": REAL,
    "correct": REAL,
    "margin": REAL,
    "label": INTEGER,
    "predicted": INTEGER,
}
# `mean` has no value where everything was masked; the rest only where a term tells classes apart.
OPTIONAL = frozenset({"mean", "confidence", "correct", "margin", "label", "predicted"})
MEASURES = ("confidence", "correct", "margin", "label", "predicted")
# Where nobody says which split: samples of the training are those whose labels are looked at.
_SPLITS = ("training", "validation", "test")


def sample_columns(term: str, split: str, epoch: int, values: Mapping[str, NDArray[Any]]) -> Columns:
    """The rows of one term in one epoch.

    Args:
        term: its name.
        split: "training", "validation" or "test".
        epoch: from 1; 0 outside `fit`.
        values: by column, [N] numbers; one that is not among them has no values. `mean` and the measures have none
            where the count is 0.
    """
    import numpy as np

    size = len(values["sample"])
    nothing = values["count"] == 0
    found: Columns = {}
    for name, kind in SAMPLE_COLUMNS.items():
        if kind == TEXT:
            found[name] = Column(kind, np.zeros(size, np.int64), (split if name == "split" else term,))
        elif name == "epoch":
            found[name] = Column(kind, np.full(size, epoch, np.int64))
        else:
            dtype = np.int64 if kind == INTEGER else np.float64
            given = values.get(name)
            array = np.zeros(size, dtype) if given is None else given.astype(dtype)
            missing = np.ones(size, bool) if given is None else nothing
            found[name] = Column(kind, array, (), missing if name in OPTIONAL else None)
    return found


def stacked(
    parts: list[Columns], kinds: Mapping[str, str] = SAMPLE_COLUMNS, optional: frozenset[str] = OPTIONAL
) -> Columns:
    """The rows of all parts, one after another; no part: no row."""
    import numpy as np

    if parts:
        return {name: joined([part[name] for part in parts]) for name in parts[0]}
    empty = {kind: np.zeros(0, np.float64 if kind == REAL else np.int64) for kind in (TEXT, INTEGER, REAL)}
    return {
        name: Column(kind, empty[kind], (), np.zeros(0, bool) if name in optional else None)
        for name, kind in kinds.items()
    }


class SampleBook:
    """The sample rows of one run: in memory, or sealed in its folder and read when asked for.

    Args:
        run: folder of the run that holds them already, if any.
    """

    _folder: ClassVar[str] = FOLDER
    _kinds: ClassVar[Mapping[str, str]] = SAMPLE_COLUMNS
    _optional: ClassVar[frozenset[str]] = OPTIONAL

    def __init__(self, run: Path | None = None) -> None:
        self._run = run
        # What is neither sealed in the folder nor dropped.
        self._new: list[Columns] = []
        self._sealed: set[str] = set()
        self._elsewhere: dict[Path, int] = {}

    def append(self, rows: Columns) -> None:
        """Add rows."""
        self._new.append(rows)

    def columns(self) -> Columns:
        """Every row.

        Raises:
            LedgerError: a damaged or foreign segment, or one that is gone.
        """
        read = None
        if self._run is not None:
            folder = self._run / self._folder
            gone = sorted(self._sealed - set(segments.segment_names(folder)))
            if gone:
                raise LedgerError(f"{folder / gone[0]} is gone; expected the segment that this ledger sealed there.")
            read = segments.read_segments(folder, self._kinds, self._optional)
        return stacked([*([] if read is None else [read]), *self._new], self._kinds, self._optional)

    def save(self, run: Path) -> None:
        """Write what the folder of a run lacks as one segment.

        Raises:
            LedgerError: the folder cannot be written to.
        """
        if self._run is None or self._run == run:
            if self._new:
                rows = stacked(self._new)
                self._sealed.add(segments.write_segment(run / self._folder, rows).name)
                self._new = []
            self._run = run
            return
        rows, known = self.columns(), self._elsewhere.get(run, 0)
        size = len(rows["sample"].values)
        if size > known:
            lacking = {n: column.taken(slice(known, None)) for n, column in rows.items()}
            segments.write_segment(run / self._folder, lacking)
        self._elsewhere[run] = size


class Samples:
    """The sample ledger of one run or of several: a row each sample, term, split and epoch, as columns.

    Args:
        columns: the rows, with the column `run`.

    >>> from lossledger.ledger import Ledger
    >>> len(Ledger().samples)
    0
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._columns)

    def __len__(self) -> int:
        return len(self._columns["sample"].values)

    def __repr__(self) -> str:
        return f"<Samples: {len(self)} rows, {', '.join(self.columns)}>"

    def __getitem__(self, name: str) -> NDArray[Any]:
        """[N] One column: numbers, NaN where there is no value; text as Python strings.

        Raises:
            UnknownNameError: no column of this name.
        """
        import numpy as np

        if name not in self._columns:
            raise UnknownNameError("column of the samples", name, self.columns)
        column = self._columns[name]
        if column.kind == TEXT:
            return column.objects()
        if column.missing is None:
            return column.values
        return np.where(column.missing, np.nan, column.values)

    def where(self, **accepted: Any) -> Samples:
        """The rows whose columns have these values; a list, tuple, set or range accepts each of its values.

        Raises:
            UnknownNameError: no column of this name.
        """
        import numpy as np

        mask = np.ones(len(self), bool)
        for name, value in accepted.items():
            if name not in self._columns:
                raise UnknownNameError("column of the samples", name, self.columns)
            listed = isinstance(value, list | tuple | set | frozenset)
            values = frozenset(value) if listed else value if isinstance(value, range) else (value,)
            mask &= self._columns[name].among(values)
        return self._taken(mask)

    def _taken(self, mask: NDArray[np.bool_]) -> Samples:
        index = mask.nonzero()[0]
        return Samples({name: column.taken(index) for name, column in self._columns.items()})

    def as_columns(self) -> Columns:
        """The columns themselves."""
        return self._columns

    def statistics(self, above: float | None = None) -> Table:
        """What the losses of each sample say across epochs.

        Args:
            above: a loss; count the epochs in which that of the sample was higher.

        Returns:
            a Table of run, split, term, sample, epochs, mean, deviation (of the population), trend (least-squares slope
            an epoch; None for one epoch), lowest, highest, last and nonfinite, and with `above` the count `above`.

        Raises:
            InputError: `above` is no finite number.

        >>> from lossledger.ledger import Ledger
        >>> Ledger().samples.statistics(above=0.7).columns[-2:]
        ('nonfinite', 'above')
        """
        if above is None:
            chosen = "SELECT * FROM sample_losses ORDER BY ALL"
        elif not isinstance(above, bool) and isinstance(above, int | float) and math.isfinite(above):
            times = f"count(*) FILTER (mean > {float(above)!r}::DOUBLE) AS above"
            counts = f"SELECT run, split, term, sample, {times} FROM samples GROUP BY ALL"
            chosen = f"SELECT * FROM sample_losses JOIN ({counts}) USING (run, split, term, sample) ORDER BY ALL"
        else:
            raise InputError(f"statistics: above: expected a finite number, received {above!r}.")
        return query.answer(chosen, {"samples": self._columns}, dynamics.VIEWS)

    def labels(self) -> Table:
        """What tools that look for wrong labels read: id, label, predicted, confidence, margin, loss, epochs.

        `label` is the given class, `predicted` that of the last epoch; confidence, margin and loss are means over the
        epochs. Samples of several entries have no one label and are not in it.

        Returns:
            a Table that begins with run, split and term; `to_csv()` is the file, `to_pandas()` the arrays.

        >>> from lossledger.ledger import Ledger
        >>> Ledger().samples.labels().columns[3:]
        ('id', 'label', 'predicted', 'confidence', 'margin', 'loss', 'epochs')
        """
        return query.answer("SELECT * FROM sample_labels ORDER BY ALL", {"samples": self._columns}, dynamics.VIEWS)

    def to_pandas(self) -> pandas.DataFrame:
        """The columns as a pandas DataFrame; pandas must be installed.

        Raises:
            ImportError: pandas is not installed.
        """
        return export.to_pandas(self._columns)

    def to_arrow(self) -> Any:
        """The columns as a `pyarrow.Table`; pyarrow must be installed.

        Raises:
            ImportError: pyarrow is not installed.
        """
        return export.to_arrow(self._columns)

    def to_csv(self, path: str | Path) -> Path:
        """Write the columns as CSV with a heading: numbers with every digit, nothing where there is no value.

        Raises:
            LedgerError: the file cannot be written.
        """
        return export.to_csv(self._columns, Path(path).expanduser().absolute())

    def names(self, name: str) -> list[Any]:
        """The distinct values of a column, in order."""
        column = self._columns[name]
        return sorted(set(column.taken(_first_of_each(column)).listed()))


def _first_of_each(column: Column) -> NDArray[np.intp]:
    import numpy as np

    index: NDArray[np.intp] = np.unique(column.values, return_index=True)[1]
    return index


def top_losses(samples: Samples, k: int, split: str | None, epoch: int | None, term: str | None) -> Table:
    """The samples of one epoch with the highest loss; see `Ledger.top_losses`."""
    import numpy as np

    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"top_losses: k: expected a whole number from 1, received {k!r}.")
    chosen, split, epoch = one_epoch(samples, split, epoch, "top_losses")
    if term is not None:
        if term not in chosen.names("term"):
            raise UnknownNameError("term of the samples", term, chosen.names("term"))
        chosen = chosen.where(term=term)
    ids, place = np.unique(chosen["sample"], return_inverse=True)
    loss, counted = np.zeros(len(ids)), np.zeros(len(ids), bool)
    found = {name: np.full(len(ids), np.nan) for name in MEASURES}
    for name in chosen.names("term"):
        part = chosen["term"] == name
        at, means = place[part], chosen["mean"][part]
        coefficient = 1.0 if term is not None else chosen["coefficient"][part][0]
        some = chosen["count"][part] > 0
        # A loader that draws with replacement gives a sample several times an epoch.
        times = np.bincount(at[some], minlength=len(ids))
        sums = np.bincount(at[some], means[some], len(ids))
        loss += coefficient * np.divide(sums, times, out=np.zeros(len(ids)), where=times > 0)
        counted |= times > 0
        for measure, values in found.items():
            new = np.full(len(ids), np.nan)
            new[at] = chosen[measure][part]
            values[np.isnan(values)] = new[np.isnan(values)]
    contribution = np.bincount(place, chosen["contribution"], len(ids))
    ranked = np.where(np.isnan(loss), np.inf, loss)
    order = [i for i in np.argsort(-ranked, kind="stable").tolist() if counted[i]][:k]
    rows = [
        {"sample": int(ids[i]), "split": split, "epoch": epoch, "loss": float(loss[i])}
        | {"contribution": float(contribution[i])}
        | {name: _value(name, values[i]) for name, values in found.items()}
        for i in order
    ]
    return Table(("sample", "split", "epoch", "loss", "contribution", *MEASURES), rows)


def _value(name: str, value: float) -> float | int | None:
    if value != value:
        return None
    return int(value) if SAMPLE_COLUMNS[name] == INTEGER else float(value)


def one_epoch(samples: Samples, split: str | None, epoch: int | None, where: str) -> tuple[Samples, str, int]:
    """The rows of one split and epoch: those asked for, or the training's and the last.

    Raises:
        InputError: no samples, no such split or epoch, or several runs.
    """
    if not len(samples):
        raise InputError(f"{where}: the ledger has no samples. Record them: fit(…, samples=True).")
    runs = samples.names("run")
    if len(runs) > 1:
        raise InputError(f"{where}: expected the samples of one run, received those of {', '.join(runs)}: select(run).")
    splits = samples.names("split")
    split = next((name for name in _SPLITS if name in splits), splits[0]) if split is None else split
    if split not in splits:
        raise InputError(f"{where}: the ledger has no samples of the split {split!r}; it has {', '.join(splits)}.")
    chosen = samples.where(split=split)
    epochs = chosen.names("epoch")
    epoch = epochs[-1] if epoch is None else epoch
    if epoch not in epochs:
        known = ", ".join(map(str, epochs))
        raise InputError(f"{where}: the ledger has no samples of epoch {epoch} of {split!r}; it has {known}.")
    return chosen.where(epoch=epoch), split, epoch
