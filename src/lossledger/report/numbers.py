"""How the report shows numbers. One rule: a number is never rounded to a lie.

What is not 0 is never shown as 0, what is not 1 never as 1, what is not everything never as 100 %.
"""

from __future__ import annotations

import math
from typing import Literal

from lossledger.ledger.table import DASH, significant

Style = Literal["number", "count", "percent", "times", "change"]

_NEARLY = 1e-12
# A part that is the whole is above it where both were added up in float32.
_ROUNDING = 1e-6


def display(value: float | None, style: Style = "number", digits: int = 3) -> str:
    """A number as text.

    Args:
        value: the number; None and NaN are undefined and become a dash.
        style: "number"; "count" (whole, with separators); "percent" of a share of 1; "times" for a factor;
            "change" for a share by which something rose or fell.
        digits: significant digits of a number.

    >>> display(0.0004), display(0.9996, "percent"), display(1228800, "count"), display(152.3, "times")
    ('0.000400', '99.96 %', '1,228,800', '152×')
    >>> display(None), display(0.00000001, "percent"), display(1.0, "percent"), display(1.6, "times")
    ('–', '< 0.001 %', '100 %', '1.6×')
    >>> display(0.25, "change"), display(-0.25, "change")
    ('+25.0 %', '-25.0 %')
    """
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if style == "percent":
        return _percent(value)
    if style == "change":
        return f"+{_percent(value)}" if value > 0 and not _percent(value).startswith("<") else _percent(value)
    if style == "count" and value == int(value):
        return f"{int(value):,}"
    if style == "times":
        return f"{value:,.0f}×" if abs(value) >= 9.95 else f"{significant(value, 2)}×"
    return significant(value, digits)


def _percent(share: float) -> str:
    value = 100 * share
    sign = "-" if value < 0 else ""
    magnitude = abs(value)
    if magnitude == 0 or -100 * _NEARLY <= magnitude - 100 <= 100 * _ROUNDING:
        return f"{sign}{magnitude:.0f} %"
    if magnitude < 0.001:
        return f"> {sign}0.001 %" if sign else "< 0.001 %"
    for decimals in (1, 2, 3):
        text = f"{magnitude:.{decimals}f}"
        # Small shares keep two significant digits; near 100 % the distance from it must show.
        if magnitude >= 10 ** (1 - decimals) and float(text) != 100:
            return f"{sign}{text} %"
    if float(text) != 100:
        return f"{sign}{text} %"
    bound = "99.999" if magnitude < 100 else "100"
    return f"{'<' if sign else '>'} {sign}{bound} %"
