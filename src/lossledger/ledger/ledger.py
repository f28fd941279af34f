"""The ledger: rows that say what a printed loss is made of, in memory and in a run folder.

It only ever grows. What was saved is never rewritten: each save adds one segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from lossledger.errors import InputError, InputTypeError, LedgerError, UnknownNameError
from lossledger.ledger import dynamics, query, segments
from lossledger.ledger.columns import TEXT, Column, Columns, Records, grouped, joined
from lossledger.ledger.diff import Diff, Side, difference
from lossledger.ledger.rows import METRIC_COLUMNS, OPTIONAL, ROW_COLUMNS, MetricRow, Row
from lossledger.ledger.samples import SampleBook, Samples, stacked, top_losses
from lossledger.ledger.selection import Selection, dimensions_of
from lossledger.ledger.sliced import GroupBook, Sliced
from lossledger.ledger.table import Table, exact_sum, roll_up


class Imbalance(NamedTuple):
    """Groups of one kind whose contributions do not add up to their term's; `difference` is groups minus term."""

    split: str
    epoch: int
    step: int | None
    term: str
    kind: str
    difference: float


class _Book:
    """The entries of one run."""

    def __init__(
        self, run: str, info: dict[str, Any], rows: Columns | None = None, metrics: Columns | None = None
    ) -> None:
        self.run = run
        self.info = info
        self.rows = Records(Row, ROW_COLUMNS, OPTIONAL, rows)
        self.metrics = Records(MetricRow, METRIC_COLUMNS, frozenset(), metrics)
        self.samples, self.groups = SampleBook(), GroupBook()

    def epoch_rows(self, split: str, epoch: int) -> list[Row]:
        """The rows of a whole epoch."""
        return self.rows.where(split=split, epoch=epoch, step=None)


class Ledger(Sliced):
    """The entries of a run, append-only; opened from a folder of runs, those of several.

    Args:
        run: name of the run.
        info: provenance, such as recipe, seed, versions, class_names; values that JSON can hold.

    >>> ledger = Ledger("demo")
    >>> names = dict(term="mse", role="data", form="linear", kind="term", group="", presence="")
    >>> sums = dict(total=2.0, count=4, weight=4.0, coefficient=1.0, divisor=4.0, contribution=0.5, nonfinite=0)
    >>> ledger.append([Row("training", epoch=1, step=None, **names, **sums)])
    >>> ledger.loss("training", 1)
    0.5
    """

    def __init__(self, run: str = "run", info: Mapping[str, Any] | None = None) -> None:
        self._books = [_Book(run, dict(info or {}))]
        self._path: Path | None = None
        self._written: dict[Path, tuple[int, int]] = {}

    @property
    def run(self) -> str:
        """Name of the run; of the first, where there are several."""
        return self._books[0].run

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs."""
        return tuple(book.run for book in self._books)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row, in the order of posting, run after run."""
        return tuple(row for book in self._books for row in book.rows)

    @property
    def metrics(self) -> tuple[MetricRow, ...]:
        """Every metric, in the order of posting, run after run."""
        return tuple(metric for book in self._books for metric in book.metrics)

    @property
    def samples(self) -> Samples:
        """What each sample brought to each term, of `samples=True`; read from the run folder where it lies there.

        Raises:
            LedgerError: a damaged or foreign segment of samples.
        """
        return Samples(self._with_run([stacked([book.samples.columns()]) for book in self._books]))

    def append_samples(self, rows: Columns) -> None:
        """Add rows of samples, as `lossledger.ledger.samples.sample_columns` makes them.

        Raises:
            InputError: the ledger holds several runs.
        """
        self._only_book("append to").samples.append(rows)

    def save_samples(self, path: str | Path) -> None:
        """Write the samples alone that a run folder lacks: what a rank adds to the folder that another writes.

        Raises:
            LedgerError: the folder cannot be written to.
        """
        self._only_book("save").samples.save(_absolute(path))
        self._only_book("save").groups.save(_absolute(path))

    def top_losses(
        self, k: int = 20, split: str | None = None, epoch: int | None = None, term: str | None = None
    ) -> Table:
        """The samples with the highest loss in one epoch, the highest first; one that is not finite comes before all.

        Args:
            k: how many.
            split: "training", "validation" or "test"; the first of these that has samples.
            epoch: the last of the split if not given.
            term: whose loss; all terms together, each times its λ, if not given.

        Returns:
            a Table of sample, split, epoch, loss (its own mean), contribution (what it adds to the loss of the epoch),
            and for classification confidence, correct, margin, label and predicted.

        Raises:
            InputError: no samples, no such split or epoch, or several runs.
            UnknownNameError: no such term.
        """
        return top_losses(self.samples, k, split, epoch, term)

    def _groups(self) -> GroupBook:
        return self._only_book("take the groups of").groups

    @property
    def info(self) -> dict[str, Any]:
        """Provenance of the run; of several runs, a copy of each by name."""
        if len(self._books) == 1:
            return self._books[0].info
        return {book.run: dict(book.info) for book in self._books}

    @property
    def path(self) -> Path | None:
        """The folder that the ledger was opened from or saved to last; None before."""
        return self._path

    def __len__(self) -> int:
        return sum(len(book.rows) for book in self._books)

    def __repr__(self) -> str:
        runs = ", ".join(repr(run) for run in self.runs)
        return f"<Ledger of {runs}: {len(self)} rows>"

    def append(self, rows: Iterable[Row], metrics: Iterable[MetricRow] = ()) -> None:
        """Add rows and metrics; nothing that is there changes.

        Raises:
            InputError: the ledger holds several runs.

        >>> ledger = Ledger()
        >>> ledger.append([], [MetricRow("validation", 1, "iou", "road", 0.9)])
        >>> ledger.metrics[0].value
        0.9
        """
        book = self._only_book("append to")
        book.rows.extend(list(rows))
        book.metrics.extend(list(metrics))

    def select(self, run: str) -> Ledger:
        """A ledger of one run, sharing its entries.

        Raises:
            UnknownNameError: no run of this name.
        """
        for book in self._books:
            if book.run == run:
                ledger = Ledger(run)
                ledger._books = [book]
                return ledger
        raise UnknownNameError("run", run, self.runs)

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """Read a run folder, or every run folder inside a folder; runs are then named after their folders.

        Raises:
            LedgerError: not a run folder, a damaged or foreign file in it, or one of a newer version.
            InputTypeError: no path.
        """
        if not isinstance(path, str | PathLike):
            raise InputTypeError(
                f"Expected a ledger or the folder of a run, received {type(path).__name__}. The ledger of a history is "
                "history.ledger, that of evaluate is model.ledger."
            )
        folder = _absolute(path)
        if (folder / segments.RUN_FILE).exists():
            books = [_read_book(folder)]
        elif folder.is_dir():
            inside = sorted(sub for sub in folder.iterdir() if (sub / segments.RUN_FILE).exists())
            books = [_read_book(sub, run=sub.name) for sub in inside]
        else:
            raise LedgerError(f"There is no folder {folder}. Give the run_dir of a run that was saved.")
        if not books:
            raise LedgerError(
                f"{folder} is no run folder: it has no {segments.RUN_FILE}, nor does any folder in it. "
                "Give the run_dir of a run that was saved."
            )
        ledger = cls()
        ledger._books = books
        ledger._path = folder
        ledger._written = {folder: (len(books[0].rows), len(books[0].metrics))}
        return ledger

    def save(self, path: str | Path) -> Path:
        """Write what this folder lacks of the ledger as new segments, and return the folder.

        Raises:
            InputError: the ledger holds several runs.
            LedgerError: the folder cannot be written to, or belongs to a newer version.
        """
        book = self._only_book("save")
        folder = _absolute(path)
        segments.write_run_file(folder, book.run, book.info)
        rows, metrics = self._written.get(folder, (0, 0))
        if len(book.rows) > rows:
            segments.write_segment(folder / "ledger", book.rows.after(rows))
        rows = len(book.rows)
        # Noted at once, so that a failure below does not write these rows a second time.
        self._written[folder] = (rows, metrics)
        if len(book.metrics) > metrics:
            segments.write_segment(folder / "metrics", book.metrics.after(metrics))
        self._written[folder] = (rows, len(book.metrics))
        book.samples.save(folder)
        book.groups.save(folder)
        self._path = folder
        return folder

    def flush(self) -> Path:
        """Write what the ledger's folder lacks; see `save`.

        Raises:
            InputError: the ledger has no folder yet.
        """
        if self._path is None:
            raise InputError("The ledger has no folder to flush to: call save(path) first.")
        return self.save(self._path)

    def table(self, by: Sequence[str] = ("epoch", "term"), **where: Any) -> Table:
        """Add up rows by dimensions.

        Args:
            by: dimensions: run, split, epoch, step, term, role, presence, and one group kind (class, column, label,
                sample, …), which takes the rows of that kind instead of those of whole terms. Rows of steps are used
                where "step" is named, otherwise rows of epochs.
            where: the value, or a list of the values, that a dimension may have; `class_` stands for class.

        Returns:
            a Table with the dimensions, then total, count and weight (sums), mean (total / count, for ratio terms
            total / weight; None where nothing was counted or terms are mixed), contribution (sum) and share of the
            whole loss of the same run, split, epoch and step; then masked (elements that were shown and do not count),
            minimum, maximum and squares (sum), each only where some row knows it, and None where a row that counts
            does not.

        Raises:
            UnknownNameError: a dimension that the ledger does not have.
            InputError: two group kinds at once.

        >>> len(Ledger().table(by=["epoch", "class"], split="training"))
        0
        """
        names = [by] if isinstance(by, str) else list(by)
        return roll_up(self._columns("rows"), names, dimensions_of(where))

    def where(self, **where: Any) -> Selection:
        """The rows whose dimensions have these values, to be added up with `by`; arguments as in `table`.

        >>> len(Ledger().where(split="training").where(epoch=[1, 2]).by("class", "presence"))
        0
        """
        return Selection(self, {}).where(**where)

    def by(self, *dimensions: str) -> Table:
        """Add up all rows by dimensions; `by("epoch", "class")` is `table(["epoch", "class"])`."""
        return self.table(dimensions)

    def loss(self, split: str = "training", epoch: int | None = None) -> float:
        """The loss of an epoch, the last where none is given: the left-to-right sum of its terms.

        Raises:
            InputError: the ledger holds several runs, or nothing for this split and epoch.
        """
        book = self._only_book("take the loss of")
        whole = [row for row in book.epoch_rows(split, self._epoch(split, epoch)) if row.kind == "term"]
        # Not sum(): from Python 3.12 it compensates, and would differ from the loss that was optimized.
        loss = 0.0
        for row in whole:
            loss += row.contribution
        return loss

    def _epoch(self, split: str, epoch: int | None) -> int:
        """The epoch asked for, or the last of the split."""
        columns = self._only_book("take an epoch of").rows.columns()
        whole = columns["split"].among((split,)) & columns["kind"].among(("term",)) & columns["step"].among((None,))
        epochs = sorted(set(columns["epoch"].values[whole].tolist()))
        wanted = epochs[-1] if epoch is None and epochs else epoch
        if wanted is None or wanted not in epochs:
            known = ", ".join(map(str, epochs)) or "none"
            raise InputError(f"The ledger has no {split!r} loss for epoch {epoch}; its epochs of this split: {known}.")
        return wanted

    def diff(
        self,
        other: Ledger | None = None,
        split: str | None = None,
        epoch: int | None = None,
        other_epoch: int | None = None,
        by: str = "class",
    ) -> Diff:
        """Why the loss of another run or epoch differs, by group: where counts moved, and where losses moved.

        A group contributes share · mean; the difference is Δshare · (mean of both means), the mix, plus Δmean · (mean
        of both shares), the rate. The parts of all groups add up to the difference of the two losses.

        Args:
            other: the second ledger; this one where `other_epoch` is of the same run.
            split: "training", "validation" or "test"; the validation where both have it.
            epoch: of this ledger; the last if not given.
            other_epoch: of the other; the last if not given.
            by: kind of the groups; terms without such groups are compared as a whole.

        Raises:
            InputError: different recipes (losses, reductions, weights, smoothing), which are named; several runs; no
                such split or epoch.

        >>> ledger = Ledger("demo")
        >>> names = dict(term="mse", role="data", form="linear", kind="term", group="", presence="")
        >>> sums = dict(count=4, weight=4.0, coefficient=1.0, divisor=4.0, nonfinite=0)
        >>> ledger.append([
        ...     Row("training", 1, None, **names, **sums, total=2.0, contribution=0.5),
        ...     Row("training", 2, None, **names, **sums, total=1.0, contribution=0.25),
        ... ])
        >>> ledger.diff(epoch=1, other_epoch=2).rate
        -0.25
        """
        theirs = self if other is None else other
        if split is None:
            both = set(self._columns("rows")["split"].names) & set(theirs._columns("rows")["split"].names)
            split = next((name for name in ("validation", "test") if name in both), "training")
        return difference(self._side(split, epoch), theirs._side(split, other_epoch), by)

    def _side(self, split: str, epoch: int | None) -> Side:
        book = self._only_book("compare")
        chosen = self._epoch(split, epoch)
        rows = tuple(book.epoch_rows(split, chosen))
        return Side(f"{book.run}, {split}, epoch {chosen}", rows, book.info)

    def balance(self, tolerance: float = 1e-6) -> list[Imbalance]:
        """Where the books do not balance: groups whose contributions do not add up to their term's.

        Args:
            tolerance: largest difference that is rounding, relative to the sum of the magnitudes.

        Returns:
            one entry for each split, epoch, step, term and kind that is out of balance; none if the books balance.
        """
        return [entry for book in self._books for entry in _imbalances(book.rows.columns(), tolerance)]

    def query(self, sql: str) -> Table:
        """Ask SQL of the ledger: one SELECT, answered by DuckDB on a copy in memory.

        Tables: `ledger`, a record each row with the columns of `Row`, and `metrics`, with those of `MetricRow`; both
        begin with the column `run`. A roll-up is exact where it adds totals and counts and divides once:
        `sum(total) / sum(count)`; DuckDB's `fsum` adds with less rounding than its `sum`. Rows of steps have a `step`,
        rows of epochs have none; rows of whole terms have the kind "term", so that a query names the kind it adds.
        With `samples=True` also `samples`, and views over it: see `docs/ledger.md#samples`; and `groups`, with the
        split, sample, kind and group of each sample whose groups are kept.

        Args:
            sql: one SELECT (or WITH … SELECT). It reaches no file, network, extension or setting.

        Raises:
            UnknownNameError: a table that does not exist; with those that do.
            InputError: anything else, or what DuckDB finds wrong; with its reason.

        >>> ledger = Ledger("demo")
        >>> names = dict(term="mse", role="data", form="linear", kind="term", group="", presence="")
        >>> sums = dict(total=2.0, count=4, weight=4.0, coefficient=1.0, divisor=4.0, contribution=0.5, nonfinite=0)
        >>> ledger.append([Row("training", epoch=1, step=None, **names, **sums)])
        >>> ledger.query("SELECT term, sum(total) / sum(count) AS mean FROM ledger GROUP BY term").rows
        [{'term': 'mse', 'mean': 0.5}]
        """
        tables = {"ledger": self._columns("rows"), "metrics": self._columns("metrics")}
        if "groups" in sql.lower():
            tables["groups"] = self._with_run([book.groups.columns() for book in self._books])
        if not dynamics.mentioned(sql):
            return query.answer(sql, tables, others=("groups", "samples", *dynamics.VIEWS))
        return query.answer(sql, {**tables, "samples": self.samples.as_columns()}, dynamics.VIEWS, ("groups",))

    def _columns(self, kind: str) -> Columns:
        """The rows or the metrics of all runs, with a column of the run's name."""
        return self._with_run([getattr(book, kind).columns() for book in self._books])

    def _with_run(self, parts: list[Columns]) -> Columns:
        import numpy as np

        runs = np.repeat(np.arange(len(parts)), [len(next(iter(part.values())).values) for part in parts])
        return {"run": Column(TEXT, runs, self.runs)} | {n: joined([part[n] for part in parts]) for n in parts[0]}

    def _only_book(self, action: str) -> _Book:
        if len(self._books) > 1:
            names = ", ".join(repr(run) for run in self.runs)
            raise InputError(f"Cannot {action} a ledger of several runs ({names}): select(run) one of them.")
        return self._books[0]


def _imbalances(rows: Columns, tolerance: float) -> Iterator[Imbalance]:
    whole = rows["kind"].among(("term",))
    scope = ("split", "epoch", "step", "term")
    terms = dict(_contributions(rows, scope, whole))
    for (split, epoch, step, term, kind), parts in _contributions(rows, (*scope, "kind"), ~whole):
        of_term = terms.get((split, epoch, step, term), [])
        total = exact_sum(of_term)
        difference = exact_sum(parts) - total
        magnitude = exact_sum(map(abs, (*parts, *of_term)))
        balanced = abs(difference) <= tolerance * magnitude if total - total == 0 else difference != difference
        if not balanced:
            yield Imbalance(split, epoch, step, term, kind, difference)


def _contributions(rows: Columns, keys: Sequence[str], mask: Any) -> Iterator[tuple[tuple[Any, ...], list[float]]]:
    """The contributions of the rows that `mask` selects, by `keys`."""
    index = mask.nonzero()[0]
    chosen = {name: rows[name].taken(index) for name in (*keys, "contribution")}
    groups = grouped([chosen[name] for name in keys], len(index))
    names = zip(*(chosen[name].taken(groups.first).listed() for name in keys), strict=True)
    return zip(names, groups.lists(chosen["contribution"].values), strict=True)


def _read_book(folder: Path, run: str | None = None) -> _Book:
    content = segments.read_run_file(folder)
    rows = segments.read_segments(folder / "ledger", ROW_COLUMNS, OPTIONAL)
    metrics = segments.read_segments(folder / "metrics", METRIC_COLUMNS)
    book = _Book(run or content["run"], content["info"], rows, metrics)
    book.samples, book.groups = SampleBook(folder), GroupBook(folder)
    return book


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()
