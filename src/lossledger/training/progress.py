"""Progress: a bar in a terminal, one line an epoch elsewhere. Every number says what kind it is.

`loss` is *moving*: Σ total / Σ divisor of the epoch so far, while the weights change. `last` is the last batch alone.
Numbers of the validation are *frozen*: the weights stood still.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lossledger.errors import InputError


def style(verbose: Any) -> str:
    """`"bar"`, `"line"` or `"silent"` from Keras's `verbose`: "auto", 0, 1 or 2.

    Raises:
        InputError: another value.
    """
    if verbose in ("auto", 1):
        return "bar" if verbose == 1 or sys.stdout.isatty() else "line"
    if verbose == 2:
        return "line"
    if verbose == 0:
        return "silent"
    raise InputError(f"verbose: expected 'auto', 0, 1 or 2; received {verbose!r}.")


def number(value: float) -> str:
    """A number in four significant digits; small ones keep them.

    >>> number(0.00012346), number(12.345678)
    ('0.0001235', '12.35')
    """
    return f"{value:.4g}"


def line(values: Mapping[str, float]) -> str:
    """Names and numbers on one line, the two losses first.

    >>> line({"loss": 0.5, "accuracy": 0.75, "val_loss": 0.25})
    'loss 0.5  val_loss 0.25  accuracy 0.75'
    """
    first = [name for name in ("loss", "last", "val_loss") if name in values]
    rest = [name for name in values if name not in first]
    return "  ".join(f"{name} {number(values[name])}" for name in first + rest)


class Show:
    """Shows the epochs of one `fit` or the pass of one `evaluate`.

    Args:
        verbose: as in Keras.
    """

    def __init__(self, verbose: Any) -> None:
        self._style = style(verbose)
        # Whatever is silent or a line needs none: one looks at terminal and environment.
        self._console = Console() if self._style == "bar" else None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def wants_numbers(self) -> bool:
        """Whether numbers within the epoch would be seen."""
        return self._style == "bar"

    def __enter__(self) -> Show:
        if self._style == "bar":
            self._progress = Progress(
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                BarColumn(bar_width=12),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[pace]}"),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays, above a bar that runs."""
        if self._style == "silent":
            return
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def begin(self, title: str, steps: int | None) -> None:
        """A new epoch or pass of so many steps."""
        if self._progress is None:
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=steps, pace="", numbers="")

    def update(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """The numbers so far: ten times a second at most."""
        if self._progress is not None and self._task is not None:
            pace = _pace(seconds / max(step, 1))
            self._progress.update(self._task, completed=step, pace=pace, numbers=line(values))

    def end(self, title: str, steps: int, seconds: float, values: Mapping[str, float]) -> None:
        """The epoch or pass is over: one line that stays."""
        if self._style == "silent":
            return
        text = f"{title}  {seconds:.1f} s  {_pace(seconds / max(steps, 1))}  {line(values)}"
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
                self._task = None
            # What does not fit the width of the terminal is in the history.
            self._progress.console.print(text, highlight=False, no_wrap=True, overflow="ellipsis")
        else:
            print(text, flush=True)


def _pace(seconds: float) -> str:
    """Time per step."""
    if seconds >= 1:
        return f"{seconds:.2f} s/step"
    return f"{seconds * 1e3:.0f} ms/step" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs/step"
