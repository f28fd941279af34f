"""The report of a run that goes on: who may read it, what a reader sees, and that it ends when it is told to."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import lossledger as ll
from browser import CHROMIUM, chromium
from lossledger.errors import InputError
from lossledger.ledger import Ledger, Row
from lossledger.report import live
from lossledger.report import watch as watching
from lossledger.report.live import Board, allowing, framed, signature
from lossledger.report.watch import MOST_CONNECTIONS, Watch, watch

HOSTILE = '</script><script>alert("x")</script>'


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "INTERVAL", 0.02)
    # A page is made at once after a change, however long the last took.
    monkeypatch.setattr(live, "REST", 0.0)


def row(epoch: int, value: float, term: str = "mse") -> Row:
    whole = dict(role="data", form="linear", kind="term", group="", presence="")
    sums = dict(count=4, weight=4.0, coefficient=1.0, divisor=4.0, nonfinite=0)
    return Row("training", epoch, None, term, **whole, **sums, total=4 * value, contribution=value)


class Writer:
    """A run that goes on."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.folder, self.epoch = Ledger("plain"), folder, 0

    def epochs(self, *values: float, term: str = "mse") -> None:
        for value in values:
            self.epoch += 1
            self.ledger.append([row(self.epoch, value, term)])
        self.ledger.save(self.folder)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "plain")


@pytest.fixture
def served(writer: Writer) -> Iterator[Watch]:
    writer.epochs(0.75)
    with watch(writer.folder) as page:
        yield page


def ask(
    page: Watch, path: str | None = None, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    """The status, the headers and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    headers = {} if host is None else {"Host": host}
    connection.request(method, f"/{page.token}/" if path is None else path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def text(page: Watch) -> str:
    status, _, body = ask(page)
    assert status == 200
    return body.decode()


def connected(page: Watch) -> socket.socket:
    return socket.create_connection(("127.0.0.1", page.port), timeout=20)


def everything(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


class Stream:
    """The events of a page, as a browser reads them."""

    def __init__(self, page: Watch) -> None:
        self._socket = connected(page)
        request = f"GET /{page.token}/events HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n"
        self._socket.sendall(request.encode())
        self._file = self._socket.makefile("rb")
        self.head = b"".join(iter(self._file.readline, b"\r\n")).decode()

    def next(self) -> dict[str, str]:
        """The next event that is not a heartbeat; none where the stream ended."""
        fields: dict[str, str] = {}
        for line in self._file:
            name, _, value = line.decode().rstrip("\n").partition(":")
            if name:
                fields[name] = value.strip()
            elif fields and set(fields) != {"retry"}:
                return fields
            else:
                fields = {}
        return {}

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def version(page: str) -> str:
    found = re.search(r'<meta name="lossledger-version" content="(\w+)">', page)
    assert found is not None
    return found[1]


def test_the_page_is_the_report_and_follows_the_run(served: Watch, writer: Writer) -> None:
    first = text(served)
    assert "Loss report" in first and "0.7500" in first
    with Stream(served) as stream:
        assert stream.next() == {"data": version(first)}
        writer.epochs(0.3125)
        announced = stream.next()["data"]
        second = text(served)
        assert announced == version(second) != version(first)
        assert "0.3125" in second and "after epoch 2" in second


def test_a_stream_that_begins_after_a_change_is_told_at_once(served: Watch, writer: Writer) -> None:
    first = text(served)
    writer.epochs(0.5)
    with Stream(served) as stream:
        assert stream.next()["data"] not in ("", version(first))


def test_nothing_is_made_where_nobody_looks_or_nothing_changes(served: Watch, writer: Writer) -> None:
    text(served), text(served), text(served)
    assert served.board.builds == 1
    writer.epochs(0.5)
    time.sleep(0.2)
    assert served.board.builds == 1
    with Stream(served) as stream:
        stream.next()
        time.sleep(0.2)
        (writer.folder / "checkpoints").mkdir()
        (writer.folder / "checkpoints" / "1.json").write_text("{}")
        (writer.folder / "report.html").write_text("")
        (writer.folder / "ledger" / ".half.parquet").write_text("")
        time.sleep(0.2)
    assert served.board.builds == 2


def test_fifty_readers_share_one_page_for_each_change(served: Watch, writer: Writer) -> None:
    pages: list[str] = []
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(served)) for _ in range(50)]
        assert len({stream.next()["data"] for stream in streams}) == 1
        assert served.board.builds == 1
        for changes in (1, 2, 3):
            before = served.board.builds
            writer.epochs(0.5 / changes)
            (announced,) = {stream.next()["data"] for stream in streams}
            assert served.board.builds == before + 1
            threads = [threading.Thread(target=lambda: pages.append(text(served))) for _ in range(50)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert {version(page) for page in pages[-50:]} == {announced}
            assert served.board.builds == before + 1
        assert len(pages) == 150


def test_pages_rest_in_proportion_to_what_they_cost(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.epochs(0.5)
    monkeypatch.setattr(live, "REST", 4.0)
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    made = live.report

    def slow(*arguments):
        now[0] += 2.0
        return made(*arguments)

    monkeypatch.setattr(live, "report", slow)
    board = Board(writer.folder)
    first = board.page()
    writer.epochs(0.25)
    assert board.page() is first
    now[0] += 7.9
    assert board.page() is first
    now[0] += 0.2
    assert board.page().version != first.version and board.builds == 2
    board.close()


def test_readers_have_the_last_page_while_the_next_is_made(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.epochs(0.5)
    board = Board(writer.folder)
    first = board.page()
    begun, go, made = threading.Event(), threading.Event(), live.report

    def held(*arguments):
        begun.set()
        assert go.wait(20)
        return made(*arguments)

    monkeypatch.setattr(live, "report", held)
    writer.epochs(0.25)
    thread = threading.Thread(target=board.page)
    thread.start()
    assert begun.wait(20)
    assert board.page() is first
    go.set()
    thread.join(20)
    assert board.page() is not first and board.builds == 2
    board.close()


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path, there: bool) -> None:
    late = Writer(tmp_path / "late")
    if there:
        late.folder.mkdir()
    with watch(late.folder) as page, Stream(page) as stream:
        stream.next()
        assert "Waiting for the run" in text(page)
        late.ledger.save(late.folder)
        stream.next()
        assert "no loss of an epoch yet" in text(page)
        late.epochs(0.5)
        # run.json and the first segment may be seen one after the other.
        for _ in range(3):
            if "Loss report" in text(page):
                break
            stream.next()
        assert "Loss report" in text(page)


def test_a_run_that_has_only_begun_does_not_hide_the_others(tmp_path: Path) -> None:
    late, early = Writer(tmp_path / "late"), Writer(tmp_path / "early")
    late.ledger.save(late.folder)
    early.ledger.save(early.folder)
    with watch(tmp_path) as page, Stream(page) as stream:
        stream.next()
        assert "no loss of an epoch yet" in text(page)
        early.epochs(0.5)
        for _ in range(3):
            stream.next()
            if "Loss report" in text(page):
                break
        assert "Loss report: early<" in text(page) and "not shown: late." in text(page)
        late.epochs(0.25)
        for _ in range(3):
            stream.next()
            if "not shown" not in text(page):
                break
        assert "Loss report: early, late<" in text(page) and "not shown" not in text(page)


def test_a_damaged_segment_is_named_on_the_page_until_it_is_gone(served: Watch, writer: Writer) -> None:
    writer.epochs(0.5)
    damaged = sorted((writer.folder / "ledger").iterdir())[-1]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-8])
    page = text(served)
    assert "The run cannot be read" in page and "LedgerError" in page and damaged.name in page
    with Stream(served) as stream:
        stream.next()
        damaged.write_bytes(content)
        stream.next()
    assert "Loss report" in text(served)


def test_an_error_that_nobody_foresaw_is_shown_and_survived(
    served: Watch, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = live.report

    def broken(*_):
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr(live, "report", broken)
    page = text(served)
    assert "ZeroDivisionError: &lt;/script&gt;" in page and HOSTILE not in page
    monkeypatch.setattr(live, "report", made)
    writer.epochs(0.5)
    assert "Loss report" in text(served)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = Writer(tmp_path / "plain")
    hostile.epochs(0.5, term=HOSTILE)
    with watch(hostile.folder) as page:
        assert HOSTILE not in text(page)
    with watch(tmp_path / "<script>alert(1)") as page:
        assert "<script>alert(1)" not in text(page)


def test_headers_let_the_page_in_and_nothing_else(served: Watch) -> None:
    _, headers, body = ask(served)
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.search(r"[*]|https?:", headers["Content-Security-Policy"])
    assert b"http-equiv" not in body
    assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    assert not {"Server", "Access-Control-Allow-Origin", "Set-Cookie"} & set(headers)
    with Stream(served) as stream:
        assert "200 OK" in stream.head and "text/event-stream" in stream.head and "no-store" in stream.head


def test_policies_are_extended_not_loosened() -> None:
    script = "let a = 1"
    digest = "'sha256-LAfYd7pbFUgwfQu8b4q135PeTG2z+/coPEUYCd74eCQ='"
    with_hash = f"script-src {digest}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    assert allowing("default-src 'none'", script).endswith(with_hash)
    found = allowing("default-src 'none'; script-src 'unsafe-inline'", script)
    assert "script-src 'unsafe-inline';" in found and "sha256" not in found
    found = allowing("script-src 'sha256-abc'; connect-src *", script)
    assert f"script-src 'sha256-abc' {digest};" in found and "*" not in found
    # A policy may be written with entities, as autoescaped templates do.
    page = '<head><meta http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;"></head><body></body>'
    assert framed(page).policy.startswith("default-src 'none';")


@pytest.mark.parametrize(
    "path",
    [
        "/", "*", "/favicon.ico", "/{other}/", "/{token}", "/{token}x/", "/{token}/events/", "/{token}/run.json",
        "/{token}/../{token}/", "/{token}/..%2f..%2fetc/passwd", "/{token}/../../../../etc/passwd", "//{token}/x",
        "/{token}/?", "/{token}/%2e%2e/", "/\u00e9\u00e9/", "http://127.0.0.1/{token}/",
    ],
)  # fmt: skip
def test_other_paths_are_told_nothing(served: Watch, path: str) -> None:
    wrong = served.token[:-1] + ("A" if served.token[-1] != "A" else "B")
    raw = path.replace("{token}", served.token).replace("{other}", wrong)
    with connected(served) as connection:
        connection.sendall(f"GET {raw} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode("latin-1"))
        answer = everything(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == b"404" and body == b""
    assert served.token.encode() not in answer and b"Server:" not in answer


@pytest.mark.parametrize(
    "host", ["attacker.example", "127.0.0.1", "localhost:1", "127.0.0.1.attacker.example:{port}", ""]
)
def test_other_hosts_are_told_nothing(served: Watch, host: str) -> None:
    status, _, body = ask(served, host=host.format(port=served.port))
    assert (status, body) == (404, b"")


def test_this_machine_has_two_names_and_a_request_names_one(served: Watch) -> None:
    assert ask(served, host=f"localhost:{served.port}")[0] == 200
    for hosts in ("", f"Host: 127.0.0.1:{served.port}\r\n" * 2):
        with connected(served) as connection:
            connection.sendall(f"GET /{served.token}/ HTTP/1.1\r\n{hosts}\r\n".encode())
            assert everything(connection).split()[1] == b"404"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get"])
def test_other_methods_are_refused(served: Watch, method: str) -> None:
    status, headers, body = ask(served, method=method)
    assert (status, headers["Allow"], body) == (405, "GET", b"")


def test_only_this_machine_is_listened_to(served: Watch) -> None:
    assert served._server.socket.getsockname()[0] == "127.0.0.1"
    assert served.url == f"http://127.0.0.1:{served.port}/{served.token}/" and len(served.token) >= 40


def test_tokens_differ(tmp_path: Path) -> None:
    with watch(tmp_path) as one, watch(tmp_path) as other:
        assert one.token != other.token and ask(one, f"/{other.token}/")[0] == 404


def test_tokens_are_compared_in_constant_time(served: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compare = watching.secrets.compare_digest
    monkeypatch.setattr(watching.secrets, "compare_digest", lambda *two: seen.append(two) or compare(*two))
    assert ask(served, "/wrong/")[0] == 404
    assert seen == [(b"wrong", served.token.encode())]


def test_connections_are_limited_and_come_back(served: Watch) -> None:
    until = time.monotonic() + 20
    with ExitStack() as held:
        for _ in range(MOST_CONNECTIONS):
            held.enter_context(connected(served))
        while served._server.connections() < MOST_CONNECTIONS and time.monotonic() < until:
            time.sleep(0.01)
        with connected(served) as one_more:
            assert everything(one_more).split()[1] == b"503"
    while served._server.connections() and time.monotonic() < until:
        time.sleep(0.01)
    assert ask(served)[0] == 200


def test_a_reader_who_says_nothing_is_left(served: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching._Handler, "timeout", 0.1)
    with connected(served) as silent:
        assert silent.recv(1) == b""


def test_readers_who_leave_are_noticed(served: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "HEARTBEAT", 0.02)
    for _ in range(3):
        with Stream(served) as stream:
            stream.next()
    until = time.monotonic() + 20
    while served._server.streams and time.monotonic() < until:
        time.sleep(0.02)
    assert served._server.streams == 0


def test_closing_ends_streams_and_frees_the_port(writer: Writer) -> None:
    writer.epochs(0.5)
    page = watch(writer.folder)
    streams = [Stream(page) for _ in range(20)]
    for stream in streams:
        stream.next()
    folder = Path(page.board._folder.name)
    begun = time.monotonic()
    assert page.close() and page.close()
    assert time.monotonic() - begun < 1
    assert not folder.exists()
    for stream in streams:
        assert stream.next()["event"] == "end"
        stream.close()
    with watch(writer.folder, port=page.port) as again:
        assert again.port == page.port


def test_a_taken_port_is_named(served: Watch, writer: Writer) -> None:
    for port in (served.port, 70_000):
        with pytest.raises(InputError, match=f"port: expected one that is free on 127.0.0.1, received {port}"):
            watch(writer.folder, port=port)


def test_a_browser_is_shown_the_page_if_asked_for(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    with ll.watch(writer.folder) as page:
        assert not shown
    with ll.watch(writer.folder, open=True) as page:
        assert shown == [page.url]


def test_files_that_vanish_while_they_are_listed_do_no_harm(tmp_path: Path) -> None:
    assert signature(tmp_path / "nothing") == ()
    (tmp_path / "a.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert signature(tmp_path) == ()
    (tmp_path / "b.json").write_text("{}")
    assert [name for name, _, _ in signature(tmp_path)] == [str(tmp_path / "b.json")]


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/[\w-]+/", line)
    assert found is not None, line
    return found[0]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_the_command_ends_cleanly_with_open_streams(writer: Writer, number: signal.Signals) -> None:
    writer.epochs(0.5)
    process = subprocess.Popen(
        [sys.executable, "-c", "from lossledger.cli import main; main()", "watch", str(writer.folder), "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = told(process)
        port, token = int(url.split(":")[2].split("/")[0]), url.split("/")[3]
        streams = []
        for _ in range(5):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", f"/{token}/events")
            streams.append((connection, connection.getresponse()))
        assert all(answer.status == 200 for _, answer in streams)
        begun = time.monotonic()
        process.send_signal(number)
        status = process.wait(20)
        assert time.monotonic() - begun < 3, "a second, and room for a busy machine"
        out, errors = process.communicate()
        assert (status, out, errors) == (0, "", "")
        for connection, answer in streams:
            assert b"event: end" in answer.read()
            connection.close()
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: nobody looks at the page")
def test_a_browser_follows_the_run_and_keeps_its_place(served: Watch, writer: Writer, tmp_path: Path) -> None:
    writer.epochs(*(0.7 - 0.01 * n for n in range(30)))
    with chromium(tmp_path / "profile") as page:
        page.view(1280, 300)
        page.open(served.url)
        page.wait("document.body.innerText.includes('after epoch 31')")
        page.ask("document.querySelector('details').open = true")
        page.ask("scrollTo({left: 0, top: 200, behavior: 'instant'})")
        assert page.ask("scrollY") == 200
        writer.epochs(0.125)
        page.wait("document.body.innerText.includes('after epoch 32')")
        page.wait("document.querySelector('details').open && scrollY === 200")
        assert page.complaints() == []
        served.close()
        page.wait("document.body.innerText.includes('The watch has ended')")
        assert page.complaints() == []
        inside = (served.url, "data:", "about:")
        assert all(url.startswith(inside) for url in page.requests()), page.requests()
