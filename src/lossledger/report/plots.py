"""Charts that are no curves: samples by confidence and variability, and the mean loss over an image."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lossledger.report.charts import Curve, Series, curve_specification, specified
from lossledger.report.groups import PlaceMap
from lossledger.report.samples import Cartography

# From never right to always right.
_RIGHT = ["#c9525a", "#d9a02b", "#3f7fc4"]


def scatter(found: Cartography, width: int = 420, height: int = 300) -> dict[str, Any]:
    """The Vega-Lite specification of samples by confidence and variability.

    Args:
        found: what to draw.
        width: of the picture in pixels, axes included.
        height: of the plot in pixels.
    """
    import altair

    values = [
        {
            "sample": dot.sample,
            "confidence": dot.confidence,
            "variability": dot.variability,
            "right": dot.correct,
        }
        for dot in found.dots
    ]
    chart = (
        altair.Chart()
        .mark_point(filled=True, size=26, opacity=0.65, aria=False)
        .encode(
            x=altair.X("variability:Q", axis=altair.Axis(title="variability (deviation over the epochs)", tickCount=6)),
            y=altair.Y("confidence:Q", title="confidence (mean)", scale=altair.Scale(domain=[0, 1])),
            color=altair.Color(
                "right:Q", title="how often right", scale=altair.Scale(domain=[0, 0.5, 1], range=_RIGHT)
            ),
            tooltip=["sample:N", "confidence:Q", "variability:Q", "right:Q"],
        )
        .properties(width=width, height=height)
    )
    return specified(chart, values)


def place_chart(found: PlaceMap, width: int = 340) -> dict[str, Any]:
    """The Vega-Lite specification of the mean loss over an image, or by position in a sequence.

    Args:
        found: what to draw.
        width: of the picture in pixels, axes included.
    """
    if not found.image:
        points = tuple(sorted((place.column, place.mean) for place in found.places))
        return curve_specification(Curve(found.term, "position", (Series(found.term, points),), 0), width)
    return _image(found, width)


def _image(found: PlaceMap, width: int) -> dict[str, Any]:
    import altair

    rows, columns = (sorted({getattr(place, axis) for place in found.places}) for axis in ("row", "column"))
    high, wide = _block(rows), _block(columns)
    values = [
        {"x": p.column, "x2": p.column + wide, "y": p.row, "y2": p.row + high, "mean": p.mean} for p in found.places
    ]
    across = altair.Scale(domain=[0, columns[-1] + wide], nice=False)
    down = altair.Scale(domain=[0, rows[-1] + high], nice=False, reverse=True)
    height = round((width - 130) * (rows[-1] + high) / (columns[-1] + wide))
    chart = (
        altair.Chart()
        .mark_rect(aria=False)
        .encode(
            x=altair.X("x:Q", title="column", scale=across),
            x2="x2:Q",
            y=altair.Y("y:Q", title="row", scale=down),
            y2="y2:Q",
            color=altair.Color("mean:Q", title="mean loss", scale=altair.Scale(scheme="viridis")),
            tooltip=[altair.Tooltip("y:Q", title="row"), altair.Tooltip("x:Q", title="column"), "mean:Q"],
        )
        .properties(width=width, height=min(max(height, 60), 500))
    )
    return specified(chart, values)


def _block(starts: list[int]) -> int:
    """How many entries a block holds, by where the blocks begin."""
    return min((b - a for a, b in pairwise(starts)), default=1)
