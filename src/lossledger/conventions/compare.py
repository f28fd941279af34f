"""`compare`: one loss on one batch in every convention, side by side, with what divided it and why it differs."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lossledger.conventions import rows as rules
from lossledger.conventions.common import FrameworkError, NotSupported, Reduced
from lossledger.errors import InputError, InputTypeError
from lossledger.losses import Loss, get
from lossledger.losses.expression import Expression

OURS = "lossledger"
WIDTH = 80


@dataclass(frozen=True, slots=True)
class Row:
    """One convention's number.

    Args:
        convention: its name.
        numerator: what was summed, `None` where the framework has none.
        divisor: what divided it.
        value: the number, the name of the error that the framework raises, or `None` for no such loss.
        reason: why it differs from ours, in one line.
    """

    convention: str
    numerator: float | None
    divisor: float | None
    value: float | str | None
    reason: str

    def cells(self) -> tuple[str, str, str, str]:
        """The convention, the numerator, the divisor and the value as text."""
        return (self.convention, _text(self.numerator), _text(self.divisor), _text(self.value))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of `compare`; prints as a table.

    Args:
        loss: the name of the loss.
        rows: ours first.
    """

    loss: str
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, convention: str) -> Row:
        for row in self.rows:
            if row.convention == convention:
                return row
        raise KeyError(convention)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain values."""
        return {"loss": self.loss, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        head = ("convention", "numerator", "divisor", "value")
        cells = [head, *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(4)]
        lines = [f"{self.loss}: the same arrays in every convention", ""]
        for line in cells:
            first = line[0].ljust(widths[0])
            lines.append("  ".join([first, *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))
        lines.insert(3, "-" * len(lines[2]))
        lines.append("")
        for row in self.rows:
            if row.reason:
                text = f"{row.convention}: {row.reason}"
                lines.extend(textwrap.wrap(text, WIDTH, subsequent_indent="  "))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("convention", "numerator", "divisor", "value", "reason"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in (*row.cells(), row.reason)) + "</tr>" for row in self
        )
        caption = html.escape(self.loss)
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.6g}"


def compare(
    loss: Any,
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    mask: Any = None,
    class_weight: Any = None,
) -> Comparison:
    """The number of every convention from the same arrays.

    Args:
        loss: one loss, or its name.
        y_true: targets.
        y_pred: predictions.
        sample_weight: given to each framework as it is; in some that is an error.
        mask: which entries count.
        class_weight: by index.

    Raises:
        InputError: an expression of several losses, or arrays that do not fit our loss.

    Example:
        >>> table = compare("mse", [[[0.0]] * 3], [[[1.0], [2.0], [9.0]]], mask=[[1, 1, 0]])
        >>> table["keras3"].value, round(table["tf20"].value, 4)
        (2.5, 1.6667)
    """
    ours = get(loss)
    if isinstance(ours, Expression):
        raise InputError("compare: expected one loss, received a sum of losses. Compare its parts one by one.")
    if not isinstance(ours, Loss):
        raise InputTypeError(f"compare: expected a loss, received {type(ours).__name__}.")
    own = _ours(ours, y_true, y_pred, sample_weight, mask, class_weight)
    batch = rules.Batch.of(ours, y_true, y_pred, sample_weight, mask, class_weight)
    rows = [own, *(_row(name, function, batch, own) for name, function in rules.ROWS.items())]
    return Comparison(ours.name, tuple(rows))


def _ours(loss: Loss, y_true: Any, y_pred: Any, weight: Any, mask: Any, class_weight: Any) -> Row:
    batch = loss.align(y_true, y_pred, weight, mask, class_weight)
    tally = loss.tally_aligned(batch)
    columns = batch.weighting.shape[-1] if batch.weighting.shape else 1
    numerator = torch.as_tensor(tally.numerator).detach().double()
    divisor = torch.as_tensor(tally.divisor).detach().double()
    value = float(torch.as_tensor(tally.value).detach())
    if numerator.ndim or divisor.ndim or tally.offset:
        single = numerator.numel() == 1
        return Row(OURS, float(numerator) if single else None, float(divisor) if single else None, value, "")
    if isinstance(batch.late, type(None)) and loss.reduction.statistic is not None:
        numerator, divisor = numerator / columns, divisor / columns
    return Row(OURS, float(numerator), float(divisor), value, "")


def _number(value: torch.Tensor | None) -> float | None:
    return None if value is None or value.numel() != 1 else float(value.detach())


def _row(name: str, function: Callable[[rules.Batch], tuple[Reduced, str]], batch: rules.Batch, own: Row) -> Row:
    try:
        reduced, reason = function(batch)
    except NotSupported as missing:
        return Row(name, None, None, None, str(missing))
    except FrameworkError as error:
        return Row(name, None, None, error.type_name, rules.ERRORS.get(error.type_name, "") or str(error))
    except (RuntimeError, ValueError, IndexError) as error:
        text = str(error).splitlines()[0] if str(error) else "it raises"
        return Row(name, None, None, type(error).__name__, text)
    value = _number(reduced.value)
    if value is None:
        return Row(name, None, None, None, "the result is not one number")
    same = isinstance(own.value, float) and _close(value, own.value)
    return Row(name, _number(reduced.numerator), _number(reduced.divisor), value, "" if same else reason)


def _close(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)


def table_of(case: Mapping[str, Any]) -> Comparison:
    """`compare` of a mapping with the names of its arguments, as a file holds them."""
    known = ("loss", "y_true", "y_pred", "sample_weight", "mask", "class_weight")
    return compare(**{name: case.get(name) for name in known})
