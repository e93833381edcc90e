"""A folder served over HTTP with ranges, and everything that a server may do wrong on request."""

import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks import http_folder


class Faults:
    """What to do wrong; may be changed while the server runs. `requests` are (method, path, first byte or None) so far."""

    def __init__(self):
        self.requests: list[tuple[str, str, int | None]] = []
        self.latency_s = 0.0
        self.fail_first = 0
        self.status = 503
        self.truncate = False
        """Close the connection in the middle of every body."""
        self.stall_s = 0.0
        """Pause in the middle of every body."""
        self.redirects: dict[str, str] = {}
        """Where paths lead on to."""
        self.short_bytes = 0
        """Leave so many bytes out of every body, and say so in its length."""
        self.ignore_ranges = False
        self.gate = threading.Event()
        """Answers to tables of an index wait for it."""
        self.gate.set()
        self.pattern = ""
        """Only paths that match."""
        self.lock = threading.Lock()

    def ranged(self) -> list[tuple[str, str, int | None]]:
        return [request for request in self.requests if request[2] is not None]


def handler(folder: Path, faults: Faults) -> type[http_folder.Handler]:
    class Handler(http_folder.Handler):
        def do_HEAD(self):
            self._answer("HEAD")

        def do_GET(self):
            self._answer("GET")

        def _answer(self, method):
            asked = self.asked_range()
            with faults.lock:
                faults.requests.append((method, self.path, asked[0] if asked else None))
                is_wrong = re.search(faults.pattern, self.path) is not None
                fails = is_wrong and faults.fail_first > 0
                faults.fail_first -= fails
            time.sleep(faults.latency_s)
            if self.path.endswith(".npy"):
                faults.gate.wait(60)
            if fails:
                return self._send(faults.status, b"not now")
            if self.path in faults.redirects:
                return self._send(302, b"", Location=faults.redirects[self.path])
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                return self._send(404, b"no such file")
            body, status = path.read_bytes(), 200
            if asked and not (is_wrong and faults.ignore_ranges):
                first, last = asked
                if first >= len(body):
                    return self._send(416, b"")
                body, status = body[first : None if last is None else last + 1], 206
            if is_wrong and faults.short_bytes:
                body = body[: -faults.short_bytes]
            self._send(status, body, cut=is_wrong and faults.truncate)

        def _send(self, status, body, cut=False, **headers):
            self.send_head(status, len(body), **headers)
            if self.command == "GET":
                half = len(body) // 2
                self.wfile.write(body[:half])
                time.sleep(faults.stall_s)
                self.wfile.write(b"" if cut else body[half:])
            self.close_connection = cut

    return Handler


@contextmanager
def serving(folder: Path):
    """(URL, faults) of a server of the files below `folder`."""
    faults = Faults()
    with http_folder.serving(handler(folder, faults)) as url:
        yield url, faults
