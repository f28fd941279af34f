"""The report as one HTML file: it opens offline, asks for nothing, and is read without JavaScript."""

from __future__ import annotations

import base64
import json
import math
import os
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from lossledger.errors import LedgerError
from lossledger.ledger import Ledger
from lossledger.ledger.table import clean
from lossledger.report import text
from lossledger.report.charts import Curve, draw
from lossledger.report.numbers import Style, display
from lossledger.report.view import Picture, ReportView, RunView, build_view

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_PICTURES = 12
MOST_PICTURE_BYTES = 1_200_000
MOST_CURVES = 12
MOST_CLASSES = 100
MOST_BARS = 12
PNG = b"\x89PNG\r\n\x1a\n"


def report(run: Ledger | str | Path, path: str | Path) -> Path:
    """Write the report of a run, or of several side by side, and return its path.

    Args:
        run: a ledger, a run folder, or a folder of run folders.
        path: of the HTML file; replaced whole if it is there.

    Raises:
        InputError: a run without the loss of any epoch.
        LedgerError: the run cannot be read, or the file cannot be written.
    """
    ledger = run if isinstance(run, Ledger) else Ledger.open(run)
    pictures = load_pictures(ledger.path) if ledger.path is not None else ()
    page = render(build_view(ledger, pictures=pictures))
    target = Path(path).expanduser().absolute()
    _write_whole(target, page)
    return target


def render(view: ReportView) -> str:
    """The page of a view, with at most 12 curves a run and 100 classes a table.

    Args:
        view: what to say.
    """
    environment = _environment()
    template = environment.get_template("report.html")
    return template.render(
        view=view,
        text=text,
        names=[run.run for run in view.runs],
        limits={"curves": MOST_CURVES, "classes": MOST_CLASSES, "bars": MOST_BARS},
    )


def load_pictures(folder: Path) -> tuple[Picture, ...]:
    """The pictures of a run folder, or of the run folders in it: at most 12 PNG files, 1.2 MB together.

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
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lossledger.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(display=_display, chart=_chart, data_uri=_data_uri, bar=_bar, widest=_widest)
    return environment


def _shown(value: object) -> object:
    return clean(value) if type(value) is str else value


def _display(value: float | None, style: Style = "number", digits: int = 3) -> str:
    return display(value, style, digits).replace("-", "\N{MINUS SIGN}")


def _chart(curve: Curve) -> object:
    from markupsafe import Markup

    # The one place where markup is trusted: SVG that the renderer made, with every name in it escaped.
    return Markup(draw(curve))


def _data_uri(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.data).decode("ascii")


def _widest(run: RunView) -> float:
    """The largest share that a bar of the run shows: bars are drawn against it, all on one scale."""
    parts = [part for term in run.terms for part in term.classes[:MOST_BARS]]
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
