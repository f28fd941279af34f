"""Curves of a run as Vega-Lite, and their drawing as static SVG.

The page holds the drawing, which needs no JavaScript, and the specification, which answers to the mouse where there is.
The colours are mid-tones and `currentColor`, which read on a light and on a dark page.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossledger.ledger import MetricRow, Row
from lossledger.ledger.table import clean, shortened

COLOURS = ("#3f7fc4", "#d9772b", "#3a9a6b", "#b0559b", "#a8892c", "#7a6fd0", "#c9525a", "#3a97a8")
MOST_POINTS = 600
VEGA_LITE = "6.4"
_SPLITS = ("training", "validation", "test")


@dataclass(frozen=True, slots=True)
class Series:
    """A named line of a curve: points (epoch or step, value)."""

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Lines that share a scale; `missing` values were not finite and cannot be drawn."""

    title: str
    axis: str
    series: tuple[Series, ...]
    missing: int


def curves(rows: Sequence[Row], metrics: Sequence[MetricRow]) -> tuple[Curve, ...]:
    """The curves of a run: loss by step and epoch, each term, each metric; those of one point are left out.

    Args:
        rows: of one run.
        metrics: of the same run.
    """
    whole = [row for row in rows if row.kind == "term"]
    found = [_curve("Loss", "epoch", _loss_points(whole, by_step=False))]
    if any(row.step is not None for row in whole):
        found.append(_curve("Loss of each step", "step", _loss_points(whole, by_step=True)))
    terms = list(dict.fromkeys(row.term for row in whole))
    for term in terms if len(terms) > 1 else ():
        own = [row for row in whole if row.term == term]
        found.append(_curve(f"{term}, contribution", "epoch", _loss_points(own, by_step=False)))
    for name in dict.fromkeys(metric.metric for metric in metrics):
        own_metrics = [metric for metric in metrics if metric.metric == name]
        overall = [(metric.split, metric.epoch, metric.value) for metric in own_metrics if not metric.group]
        found.append(_curve(name, "epoch", overall))
        split = next((s for s in ("validation", "training", "test") if any(m.split == s for m in own_metrics)), "")
        by_class = [(m.group, m.epoch, m.value) for m in own_metrics if m.group and m.split == split]
        if 1 < len({name for name, _, _ in by_class}) <= len(COLOURS):
            found.append(_curve(f"{name} by class, {split}", "epoch", by_class))
    return tuple(curve for curve in found if any(len(series.points) > 1 for series in curve.series))


def _loss_points(rows: Iterable[Row], by_step: bool) -> list[tuple[str, int, float]]:
    sums: dict[tuple[str, int], float] = {}
    for row in rows:
        if (row.step is not None) == by_step:
            key = (row.split, row.epoch if row.step is None else row.step)
            sums[key] = sums.get(key, 0.0) + row.contribution
    ordered = sorted(sums, key=lambda key: _SPLITS.index(key[0]) if key[0] in _SPLITS else len(_SPLITS))
    return [(split, position, sums[split, position]) for split, position in ordered]


def _curve(title: str, axis: str, points: Sequence[tuple[str, int, float]]) -> Curve:
    finite = [point for point in points if math.isfinite(point[2])]
    series = []
    for name in dict.fromkeys(name for name, _, _ in finite):
        line = sorted((position, value) for other, position, value in finite if other == name)
        series.append(Series(name, tuple(_thinned(line))))
    return Curve(title, axis, tuple(series), len(points) - len(finite))


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    inside = points[1:-1]
    size = math.ceil(2 * len(inside) / (MOST_POINTS - 2))
    kept = [points[0]]
    for start in range(0, len(inside), size):
        stretch = inside[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return [*kept, points[-1]]


def curve_specification(curve: Curve, width: int = 340, height: int = 170) -> dict[str, Any]:
    """The Vega-Lite specification of a curve.

    Args:
        curve: what to draw.
        width: of the picture in pixels, axes included.
        height: of the plot in pixels.
    """
    import altair

    names = _labels([series.name for series in curve.series])
    values = [
        {"position": position, "value": value, "series": name}
        for name, series in zip(names, curve.series, strict=True)
        for position, value in series.points
    ]
    few = max(len(series.points) for series in curve.series) <= 30
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    legend = altair.Legend(title=None, orient="top", columns=4, offset=6) if len(names) > 1 else None
    base = altair.Chart().encode(
        x=altair.X("position:Q", axis=_whole_numbers(curve), scale=altair.Scale(zero=False, nice=False)),
        y=altair.Y("value:Q", title=None, scale=_scale(curve)),
        color=altair.Color("series:N", scale=altair.Scale(domain=names, range=colours), legend=legend),
    )
    # No format: a number shown with all of its digits is not rounded to a lie.
    said = [altair.Tooltip("series:N", title="line"), altair.Tooltip("position:Q", title=curve.axis), "value:Q"]
    chart = altair.layer(
        base.mark_line(strokeWidth=1.75, strokeJoin="round", aria=False),
        base.mark_point(filled=True, size=18 if few else 60, opacity=1 if few else 0, aria=False).encode(tooltip=said),
    ).properties(width=width, height=height)
    return specified(chart, values)


def specified(chart: Any, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The specification of an Altair chart without data, with these values and the look of all charts.

    Args:
        chart: of Altair.
        values: one a mark.
    """
    chart = chart.properties(autosize={"type": "fit-x", "contains": "padding"}).configure(**_THEME)
    # Without its schema, a specification names no outside address. Layers share the data of the whole.
    plain: dict[str, Any] = {name: value for name, value in chart.to_dict().items() if name != "$schema"}
    for layer in plain.get("layer", ()):
        layer.pop("data", None)
    return {**plain, "data": {"values": list(values)}}


def draw(specification: Mapping[str, Any]) -> str:
    """A chart as an SVG element; needs vl-convert.

    Every name in it is escaped by the renderer; it loads nothing.

    Args:
        specification: of Vega-Lite.
    """
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg(dict(specification), vl_version=VEGA_LITE)
    # Inline SVG needs no namespaces; without them the page names no outside address at all.
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)


@functools.cache
def runtime() -> str:
    """The JavaScript that draws charts, as `window.vegaEmbed`; needs vl-convert, which carries it."""
    import vl_convert

    code: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return code


def _whole_numbers(curve: Curve) -> Any:
    import altair

    positions = sorted({position for series in curve.series for position, _ in series.points})
    ticks = {"values": positions} if len(positions) <= 8 else {"tickCount": 6, "tickMinStep": 1}
    return altair.Axis(title=curve.axis, format=",d", **ticks)


def _scale(curve: Curve) -> Any:
    """Logarithmic where the values span more than two orders of magnitude, as losses often do."""
    import altair

    values = [value for series in curve.series for _, value in series.points]
    low, high = min(values), max(values)
    if low > 0 and high > 100 * low:
        return altair.Scale(type="log")
    return altair.Scale(zero=False, nice=True)


def _labels(names: Sequence[str]) -> list[str]:
    """Short names for the legend; lines whose names look alike once shortened are numbered, or they would be joined."""
    short = [shortened(clean(name), 20) for name in names]
    return [f"{name} ({i + 1})" if short.count(name) > 1 else name for i, name in enumerate(short)]


_THEME: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "padding": {"left": 2, "right": 10, "top": 6, "bottom": 2},
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelOpacity": 0.75,
        "titleOpacity": 0.75,
        "gridColor": "#888888",
        "gridOpacity": 0.22,
        "domain": False,
        "tickColor": "#888888",
        "tickOpacity": 0.4,
    },
    "axisX": {"grid": False, "domain": True, "domainColor": "#888888", "domainOpacity": 0.5},
    "axisY": {"tickCount": 5, "ticks": False, "labelPadding": 6},
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "titleFontSize": 11,
        "labelFontSize": 11,
        "symbolType": "stroke",
        "symbolStrokeWidth": 2.5,
    },
}
