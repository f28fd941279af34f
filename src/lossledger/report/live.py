"""The page of a run that is still going on: made again when its files change, once for all of its readers."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lossledger.errors import InputError
from lossledger.ledger.segments import RUN_FILE
from lossledger.report.html import report

# Files that a page is made of lie at most this deep in a folder of runs: folder/run/ledger/segment.
DEPTH = 3
SUFFIXES = (".parquet", ".json", ".png")
# They change without a change of what a page says.
OTHERS = ("checkpoints", "superseded")
# A page is not made again before this many times the duration of the last making: at most a fifth of one core.
REST = 4.0

_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">\n?')
# For a page that says nothing of its own.
_DEFAULT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """One version of the page.

    Args:
        content: the HTML.
        policy: its Content-Security-Policy.
        version: differs where the content does.
    """

    content: bytes
    policy: str
    version: str


class Board:
    """What every reader sees: one page, made at most once for each change of the run's files.

    Args:
        run: a run folder or a folder of runs; it need not exist yet.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.builds = 0
        self.closed = False
        self._changed = threading.Condition()
        # Held while the page is made, so that nobody makes it a second time.
        self._making = threading.Lock()
        self._seen: Signature | None = None
        self._rested = 0.0
        self._page: Page | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="lossledger-watch-", ignore_cleanup_errors=True)

    def page(self) -> Page:
        """The page of the files as they are, or were a moment ago where making it takes long."""
        # While somebody makes the next page, the others have the last one.
        if not self._making.acquire(blocking=self._page is None):
            assert self._page is not None
            return self._page
        try:
            begun = time.monotonic()
            # Looked at before the files are read, so that a change during the reading is found the next time.
            seen = signature(self.run)
            if self._page is None or (seen != self._seen and begun >= self._rested):
                page, now = self._made(), time.monotonic()
                self._seen, self._rested = seen, now + REST * (now - begun)
                with self._changed:
                    self._page = page
                    self._changed.notify_all()
            return self._page
        finally:
            self._making.release()

    def newer(self, version: str | None, timeout: float) -> str | None:
        """Wait for a version other than this one: its name; the same name after `timeout` seconds without one.

        Returns:
            `None` where the board was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._version() != version, timeout)
            return None if self.closed else self._version()

    def close(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self._folder.cleanup()

    def _version(self) -> str | None:
        return None if self._page is None else self._page.version

    def _made(self) -> Page:
        self.builds += 1
        return framed(self._said())

    def _said(self) -> str:
        """The report, or a page that says why there is none."""
        if not (self.run / RUN_FILE).exists() and not any(self.run.glob(f"*/{RUN_FILE}")):
            return _message(self.run, f"There is no run in {self.run} yet.", failed=False)
        try:
            return report(self.run, Path(self._folder.name) / "page.html").read_text(encoding="utf-8")
        except InputError as error:
            # A run without the loss of an epoch has only begun.
            return _message(self.run, str(error), failed=False)
        except Exception as error:
            # Whatever a file holds, the page that shows it must go on.
            return _message(self.run, f"{type(error).__name__}: {error}", failed=True)


def signature(run: Path) -> Signature:
    """Names, times and sizes of the files that a page is made of."""
    return tuple(sorted(_files(run, DEPTH)))


def _files(folder: Path, depth: int) -> Iterator[tuple[str, int, int]]:
    # Files may be moved while they are listed.
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if depth > 1 and entry.name not in OTHERS:
                        yield from _files(Path(entry.path), depth - 1)
                elif entry.name.endswith(SUFFIXES):
                    found = entry.stat()
                    yield entry.path, found.st_mtime_ns, found.st_size


def framed(page: str) -> Page:
    """A page that asks for its newer versions, and may do so under its policy."""
    script = _template("watch.js")
    stated = _POLICY.search(page)
    policy = allowing(html.unescape(stated[1]) if stated else _DEFAULT_POLICY, script)
    body = _POLICY.sub("", page, count=1)
    version = hashlib.sha256(body.encode("utf-8", "replace")).hexdigest()[:32]
    head = f'<meta name="lossledger-version" content="{version}">\n<link rel="icon" href="data:,">\n'
    start, _, rest = body.partition("</head>")
    # The last one: the text of a script may hold another.
    middle, _, end = rest.rpartition("</body>")
    content = f"{start}{head}</head>{middle}<script>{script}</script>\n</body>{end}"
    return Page(content.encode("utf-8", "replace"), policy, version)


def allowing(policy: str, script: str) -> str:
    """A Content-Security-Policy that also allows one inline script and its stream of events, and no frame around it."""
    found = [part.split() for part in policy.split(";") if part.strip()]
    directives = {name.lower(): sources for name, *sources in found}
    scripts = [s for s in directives.get("script-src", directives.get("default-src", [])) if s != "'none'"]
    listed = any(source.startswith(("'sha", "'nonce-")) for source in scripts)
    # A hash would turn 'unsafe-inline' off for the scripts of the page itself.
    if listed or "'unsafe-inline'" not in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        scripts = [*scripts, f"'sha256-{digest}'"]
    none = ["'none'"]
    directives |= {"script-src": scripts, "connect-src": ["'self'"]}
    directives |= {"base-uri": none, "form-action": none, "frame-ancestors": none}
    return "; ".join(" ".join((name, *sources)) for name, sources in directives.items())


def _message(run: Path, message: str, failed: bool) -> str:
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_template("waiting.html"))
    title = "The run cannot be read" if failed else "Waiting for the run"
    return template.render(title=title, run=run.name, message=message, failed=failed)


def _template(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
