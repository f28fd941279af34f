"""The report of a run that goes on, served to this machine only, behind a token that nobody can guess."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from lossledger.errors import InputError
from lossledger.report.live import Board, Page

ADDRESS = "127.0.0.1"
# Seconds between two looks at the files.
INTERVAL = 1.0
# Seconds without news after which a stream says that it is alive, and finds out whether its reader is.
HEARTBEAT = 15.0
# Seconds that a reader may leave the server waiting.
PATIENCE = 10.0
# Seconds that open streams get to say goodbye.
GRACE = 0.3
MOST_CONNECTIONS = 128

_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_NOTHING = "default-src 'none'"


def watch(run: str | Path, port: int = 0, open: bool = False) -> Watch:
    """Serve the report of a run that goes on, to browsers of this machine.

    The page follows the run: it changes when a segment arrives. Serve from another process than the one that trains
    (`lossledger watch RUN`), so that training shares no interpreter with it.

    Args:
        run: a run folder, or a folder of runs; it need not exist yet.
        port: to listen on; 0 for any that is free.
        open: show the page in a browser.

    Returns:
        a Watch, with `url` and `close()`; also a context manager that closes.

    Raises:
        InputError: the port cannot be had.

    Example:
        >>> with watch("runs/first") as page:
        ...     page.url.startswith("http://127.0.0.1:")
        True
    """
    started = Watch(Path(run).expanduser().absolute(), port)
    if open:
        import webbrowser

        webbrowser.open(started.url)
    return started


class _Stop(BaseException):
    """The process was told to end."""


def serve(run: str | Path, port: int, open: bool, say: Callable[[str], None]) -> None:
    """Watch a run until Ctrl-C or a SIGTERM; for the command line.

    Args:
        run: a run folder, or a folder of runs.
        port: to listen on.
        open: show the page in a browser.
        say: gets the line with the URL.
    """
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise _Stop

    page = None
    try:
        for number in signals:
            signal.signal(number, stop)
        page = watch(run, port, open)
        say(f"Watching {run} at {page.url} (Ctrl-C ends it)")
        while True:
            time.sleep(3600)
    except _Stop:
        if page is not None and not page.close():
            # A page is being made: the interpreter would wait for DuckDB, or die with it.
            os._exit(0)


class Watch:
    """A page that is being served.

    Args:
        run: the folder.
        port: to listen on.

    Raises:
        InputError: the port cannot be had.
    """

    def __init__(self, run: Path, port: int) -> None:
        self.token = secrets.token_urlsafe(32)
        self.board = Board(run)
        try:
            self._server = _Server(port, self.token, self.board)
        except (OSError, OverflowError) as error:
            self.board.close()
            raise InputError(
                f"port: expected one that is free on {ADDRESS}, received {port}: {error}. Pass 0 for any."
            ) from error
        self.port: int = self._server.server_address[1]
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.1,), name="lossledger-watch", daemon=True),
            threading.Thread(target=self._look, name="lossledger-look", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def url(self) -> str:
        """Where the page is; whoever knows it can read the report."""
        return f"http://{ADDRESS}:{self.port}/{self.token}/"

    def close(self) -> bool:
        """End every stream and free the port; within a second, and harmless when repeated.

        Returns:
            whether all threads have ended; one that is making a page ends when the page is made.
        """
        if not self._ended.is_set():
            self._ended.set()
            self.board.close()
            self._server.shutdown()
            self._server.server_close()
            self._server.end_connections(GRACE)
            for thread in self._threads:
                thread.join(GRACE)
        return not any(thread.is_alive() for thread in self._threads) and not self._server.connections()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self) -> None:
        """Make the page anew when files have changed, while somebody waits for that."""
        while not self._ended.wait(INTERVAL):
            if self._server.streams:
                self.board.page()


class _Server(ThreadingHTTPServer):
    """One thread for each connection, up to a limit; every open connection is known."""

    daemon_threads = True
    # Readers who come at the same moment wait in line; beyond it the system makes them try again, seconds later.
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, port: int, token: str, board: Board) -> None:
        self.token, self.board = token, board
        self.streams = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._all_ended = threading.Condition(self._lock)
        super().__init__((ADDRESS, port), _Handler)
        own = self.server_address[1]
        self.hosts = {f"{ADDRESS}:{own}", f"localhost:{own}"} | ({ADDRESS, "localhost"} if own == 80 else set())

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks a name server for this machine's name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, or turn it away where there are too many."""
        with self._lock:
            full = len(self._open) >= MOST_CONNECTIONS
            if not full:
                self._open.add(request)
        if full:
            with suppress(OSError):
                request.setblocking(False)
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        """Close a connection, and forget it."""
        super().close_request(request)
        with self._lock:
            self._open.discard(request)
            self._all_ended.notify_all()

    def count_stream(self, change: int) -> None:
        """One reader more, or one less."""
        with self._lock:
            self.streams += change

    def connections(self) -> int:
        """How many are open."""
        with self._lock:
            return len(self._open)

    def end_connections(self, grace: float) -> None:
        """Wait for the connections to end, then end them."""
        with self._lock:
            self._all_ended.wait_for(lambda: not self._open, grace)
            for request in self._open:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)
            self._all_ended.wait_for(lambda: not self._open, grace)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of the page and of its events, and says nothing to anybody else."""

    server: _Server
    timeout = PATIENCE

    def do_GET(self) -> None:
        """The page, its events, or nothing."""
        wanted = self._wanted()
        if wanted == "":
            self._page(self.server.board.page())
        elif wanted == "events":
            self._events()
        else:
            self.send_error(404)

    def _wanted(self) -> str | None:
        """What follows the token in the path; None where host or token are not ours."""
        # A name that somebody else's site resolves to this machine is refused: its scripts would read the answer.
        hosts = self.headers.get_all("Host", [])
        begin, _, rest = self.path.partition("/")
        token, slash, wanted = rest.partition("/")
        same = secrets.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode("ascii"))
        known = len(hosts) == 1 and hosts[0].lower() in self.server.hosts
        return wanted if same and known and not begin and slash else None

    def _page(self, page: Page) -> None:
        self._head(200, "text/html; charset=utf-8", page.policy, len(page.content))
        self.wfile.write(page.content)

    def _events(self) -> None:
        """The version of the page, at once and whenever it changes."""
        board, version = self.server.board, None
        board.page()
        self._head(200, "text/event-stream; charset=utf-8", _NOTHING)
        self.wfile.write(b"retry: 1000\n\n")
        self.server.count_stream(1)
        try:
            while (now := board.newer(version, HEARTBEAT)) is not None:
                self.wfile.write(f"data: {now}\n\n".encode() if now != version else b": \n\n")
                version = now
            self.wfile.write(b"event: end\ndata: \n\n")
        finally:
            self.server.count_stream(-1)

    def _head(self, code: int, kind: str, policy: str, length: int | None = None) -> None:
        self.send_response_only(code)
        for name, value in {**_HEADERS, "Content-Security-Policy": policy, "Content-Type": kind}.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An empty answer: 404, 405 for a method that is not GET, or what was wrong with the request."""
        self.send_response_only(405 if code == 501 else code)
        for name, value in {**_HEADERS, "Content-Security-Policy": _NOTHING, "Content-Length": "0"}.items():
            self.send_header(name, value)
        if code == 501:
            self.send_header("Allow", "GET")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: paths hold the token."""
