"""The report as one HTML file: it opens offline, asks for nothing, and is read without JavaScript.

Its scripts are known by their hashes; nothing else runs, whatever a name in the ledger says.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossledger.errors import LedgerError
from lossledger.ledger import Ledger
from lossledger.report import cells, sentences
from lossledger.report.charts import curve_specification, draw, runtime
from lossledger.report.numbers import Style, display
from lossledger.report.plain import as_json
from lossledger.report.plots import place_chart, scatter
from lossledger.report.templating import environment
from lossledger.report.text import as_markdown, as_text
from lossledger.report.view import Picture, ReportView, RunView, build_view

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_BYTES = 2_000_000
MOST_PICTURES = 24
MOST_PICTURE_BYTES = 600_000
# Width and height of a trend in a table.
SPARK = (56, 14)
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class _Limits:
    """How much a page shows: runs, curves a run, lines a table, classes a term, and whether charts answer."""

    runs: int = 100
    curves: int = 12
    classes: int = 100
    bars: int = 12
    live: bool = True


# What is tried until a page is small enough; nothing is left out before it must be.
_LADDER = (_Limits(), _Limits(live=False), _Limits(20, 6, 50, 8, live=False), _Limits(8, 2, 20, 5, live=False))


def report(run: Ledger | str | Path, path: str | Path, against: Ledger | str | Path | None = None) -> Path:
    """Write the report of a run, or of several side by side, and return its path.

    Args:
        run: a ledger, a run folder, or a folder of run folders.
        path: of the HTML file, replaced whole if it is there; one that ends in `.md`, `.txt` or `.json` gets Markdown,
            the text of the terminal or JSON.
        against: another run: what moved the loss from its own to that of `run`, by class.

    Raises:
        InputError: a run without the loss of any epoch.
        LedgerError: the run cannot be read, or the file cannot be written.
    """
    target = Path(path).expanduser().absolute()
    form = {".md": as_markdown, ".txt": as_text, ".json": as_json}.get(target.suffix.lower(), render)
    _write_whole(target, form(view_of(run, against)))
    return target


def view_of(run: Ledger | str | Path, against: Ledger | str | Path | None = None) -> ReportView:
    """What the report of a run says, with the pictures in its folder; arguments as in `report`."""
    ledger = run if isinstance(run, Ledger) else Ledger.open(run)
    other = Ledger.open(against) if isinstance(against, str | Path) else against
    return build_view(ledger, other, load_pictures(ledger.path) if ledger.path is not None else ())


def render(view: ReportView) -> str:
    """The page of a view: at most 2 MB, for which charts stop to answer to the mouse and tables end earlier.

    Args:
        view: what to say.
    """
    template = _environment().get_template("report.html")
    script = _template("report.js")
    charted = any(run.curves or run.cartography or run.maps for run in view.runs)
    for limits in _LADDER:
        code = runtime() if limits.live and charted else ""
        page = template.render(
            view=view,
            cells=cells,
            sentences=sentences,
            names=[run.run for run in view.runs],
            limits=limits,
            runtime=_trusted(code),
            script=_trusted(script),
            policy=_policy([code, script] if code else [script]),
        )
        if len(page.encode("utf-8", "replace")) <= MOST_BYTES:
            break
    return page


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded, and only these scripts run. Vega compiles the expressions of a chart, which needs eval."""
    digests = (base64.b64encode(hashlib.sha256(code.encode()).digest()).decode("ascii") for code in scripts)
    allowed = " ".join(
        [*(f"'sha256-{digest}'" for digest in digests), *(["'unsafe-eval'"] if len(scripts) > 1 else [])]
    )
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"


def _template(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _trusted(code: str) -> object:
    """A script of the library's own: nothing in it comes from a run."""
    from markupsafe import Markup

    return Markup(code)


def load_pictures(folder: Path) -> tuple[Picture, ...]:
    """The pictures of a run folder, or of the run folders in it: at most 24 PNG files, 0.6 MB together.

    Args:
        folder: with `pictures/pictures.json`, a list of {"file", "caption", "run"}; none there, none loaded.

    Raises:
        LedgerError: a list of pictures that cannot be read, or that names what is not a PNG file beside it.
    """
    folders = [folder, *(sorted(sub for sub in folder.iterdir() if sub.is_dir()) if folder.is_dir() else [])]
    lists = [_listed(sub) for sub in folders if (sub / "pictures" / "pictures.json").is_file()]
    kept: list[Picture] = []
    size = 0
    # In turn, so that every run of several is seen.
    for picture in chain.from_iterable(zip_longest(*lists)):
        if picture is not None and len(kept) < MOST_PICTURES and size + len(picture.data) <= MOST_PICTURE_BYTES:
            kept.append(picture)
            size += len(picture.data)
    order = list(dict.fromkeys(picture.run for picture in kept))
    return tuple(sorted(kept, key=lambda picture: order.index(picture.run)))


def _listed(folder: Path) -> list[Picture]:
    path = folder / "pictures" / "pictures.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [_picture(path, entry, folder.name) for entry in entries[:MOST_PICTURES]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(
            f'{path} is not a list of pictures: {error!r}. Expected [{{"file": …, "caption": …, "run": …}}, …].'
        ) from error


def _picture(path: Path, entry: dict[str, str], run: str) -> Picture:
    file = path.parent / str(entry["file"])
    # A list must not be able to pull other files of the machine into a page that is passed on.
    if file.parent.resolve() != path.parent.resolve() or file.is_symlink():
        raise LedgerError(f"{path} names {entry['file']!r}: a picture lies in the folder of its list, not elsewhere.")
    data = file.read_bytes()
    if not data.startswith(PNG):
        raise LedgerError(f"{file} is not a PNG file. Save the picture as PNG, or remove it from {path}.")
    return Picture(data, str(entry.get("caption", "")), str(entry.get("run", run)))


def _environment() -> Environment:
    found = environment("lossledger.report")
    found.filters.update(
        display=_display,
        minus=_minus,
        raw=_raw,
        spark=_spark,
        specification=functools.cache(curve_specification),
        scatter=functools.cache(scatter),
        place_chart=functools.cache(place_chart),
        drawn=_once(_drawn),
        script_json=_script_json,
        data_uri=_data_uri,
        bar=_bar,
        widest=_widest,
    )
    return found


def _display(value: float | None, style: Style = "number", digits: int = 3) -> str:
    return _minus(display(value, style, digits))


def _minus(cell: str) -> str:
    """A true minus sign before a number, which a hyphen in a name is not."""
    return re.sub(r"(?<![\w.])-(?=[\d.∞])|(?<=e)-(?=\d+$)", "\N{MINUS SIGN}", cell)


def _raw(value: float | None) -> str:
    """A number for sorting; "" where there is none."""
    return "" if value is None or math.isnan(value) else str(value).replace("inf", "Infinity")


def _spark(points: Sequence[tuple[int, float | None]]) -> object:
    """A small line without axes: the shape of a trend, whose numbers stand beside it."""
    from markupsafe import Markup

    values = [value for _, value in points if value is not None and math.isfinite(value)]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    steps = [values[round(i * (len(values) - 1) / 59)] for i in range(60)] if len(values) > 60 else values
    spots = (
        f"{SPARK[0] * i / (len(steps) - 1):.1f},{SPARK[1] * (1 - (v - low) / ((high - low) or 1)):.1f}"
        for i, v in enumerate(steps)
    )
    return Markup(
        f'<svg class="spark" viewBox="-1 -1 {SPARK[0] + 2} {SPARK[1] + 2}" aria-hidden="true">'
        f'<polyline points="{" ".join(spots)}"/></svg>'
    )


def _once(draw_it: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """The same drawing for the same specification, should the page be rendered again."""
    drawn: dict[int, tuple[dict[str, Any], object]] = {}

    def found(specification: dict[str, Any]) -> object:
        if id(specification) not in drawn:
            drawn[id(specification)] = (specification, draw_it(specification))
        return drawn[id(specification)][1]

    return found


def _drawn(specification: dict[str, Any]) -> object:
    from markupsafe import Markup

    # Markup is trusted here: SVG that the renderer made, with every name in it escaped.
    return Markup(draw(specification))


def _script_json(specification: dict[str, Any]) -> object:
    """JSON that no name in it can end the script of: what begins a tag or a comment is escaped."""
    from markupsafe import Markup

    said = json.dumps(specification, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(said.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _data_uri(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.data).decode("ascii")


def _widest(run: RunView) -> float:
    """The largest share that a bar of the run shows: bars are drawn against it, all on one scale."""
    parts = [part for term in run.terms for part in term.classes[: _LADDER[0].bars]]
    shares = [share for part in parts for share in (part.share, part.entries) if share is not None]
    return max((share for share in shares if math.isfinite(share)), default=1.0)


def _bar(share: float | None, scale: float) -> str:
    """A share as the width of a bar, in percent."""
    if share is None or not math.isfinite(share) or scale <= 0:
        return "0"
    return f"{100 * min(max(share / scale, 0.0), 1.0):.3f}"


def _write_whole(target: Path, page: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "x", encoding="utf-8", errors="replace", newline="\n") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LedgerError(f"Cannot write the report {target}: {error}.") from error
