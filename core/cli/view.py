"""`moe-engine view`: a run's growing report in a browser."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..files import read_file
from .output import echo

PAUSE = 5.0  # seconds between two drawings of a page, at least
REFRESH = 5  # seconds after which an open page asks again
NAMES = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


@click.command(short_help="Watch a run in a browser while it trains.")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="INTEGER",
    default=0,
    show_default=True,
    help="Port on 127.0.0.1; 0: a free one.",
)
def view(run: Path, port: int) -> int:
    """Show the report of a run while it grows: print an address on this machine,
    and serve a page there until Ctrl-C.

    \b
    Watch a run that trains in another terminal:
        moe-engine view runs/A

    The page has the newest numbers and every figure. It is drawn again when the
    log has changed, every five seconds at most; once the run has ended, it is
    the run's report.html. Only this machine can open it. The run's folder is
    only read, and the run never waits for it.
    """
    page = Page(run)
    page.content()
    server = serve(page.content, port)
    echo(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0


class Page:
    """The page of a run, drawn when its log has changed, once per `PAUSE` at most. clock: seconds, from any start."""

    def __init__(self, run: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.clock = run, clock
        self.drawings = 0
        self._drawn: tuple[Any, float, bytes] | None = None  # state of the log, time and page of the last drawing
        self._one_at_a_time = threading.Lock()

    def content(self) -> bytes:
        """The page. Raises UsageError if the folder holds no run."""
        with self._one_at_a_time:
            state, now = self._state(), self.clock()
            if self._drawn is None or (self._drawn[0] != state and now - self._drawn[1] >= PAUSE):
                self._drawn = (state, now, self._draw())
                self.drawings += 1
            return self._drawn[2]

    def _state(self) -> list[tuple[int, int] | None]:
        """Size and time of the files that the page is drawn from."""
        found: list[tuple[int, int] | None] = []
        for name in ("metrics.jsonl", "summary.json", "report.html"):
            try:
                state = (self.run / name).stat()
                found.append((state.st_size, state.st_mtime_ns))
            except OSError:
                found.append(None)
        return found

    def _draw(self) -> bytes:
        from ..run.live import read_live
        from ..run.page import run_page

        report = self.run / "report.html"
        if (self.run / "summary.json").exists() and report.exists():
            return read_file(report)
        run = read_live(self.run)
        try:
            return run_page(run, REFRESH).encode()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of words for numbers
            message = f"run folder {self.run} is damaged: its metrics.jsonl can't be drawn ({error})"
            raise UsageError(message, code="damaged-run") from error


class Server(ThreadingHTTPServer):
    """A server of one page on 127.0.0.1."""

    def __init__(self, content: Callable[[], bytes], port: int) -> None:
        self.content = content
        super().__init__(("127.0.0.1", port), Handler)


def serve(content: Callable[[], bytes], port: int) -> Server:
    """A server of one page. Raises UsageError for a port that is taken."""
    try:
        return Server(content, port)
    except OSError as error:
        sentence = f"port {port} can't be used: {error.strerror}; leave --port out for a free one"
        raise UsageError(sentence, code="port-taken") from error


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of / alone, and only under a name of this machine, so that no other site can read it."""

    server: Server

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def _answer(self, with_body: bool) -> None:
        if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in NAMES}:
            self.send_error(403, "unknown host")
        elif self.path.partition("?")[0] != "/":
            self.send_error(404)
        else:
            try:
                self._send(self.server.content(), with_body)
            except (UsageError, OSError) as error:
                self.send_error(503, "the run can't be read", str(error))

    def _send(self, body: bytes, with_body: bool) -> None:
        self.send_response(200)
        for name, value in {**HEADERS, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            with suppress(ConnectionError):  # the reader left
                self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""
