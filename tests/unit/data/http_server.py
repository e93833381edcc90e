"""A folder served over HTTP with ranges, and everything that a server may do wrong on request."""

import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


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


def handler(folder: Path, faults: Faults):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer, which is written in two parts, waits 40 ms for an acknowledgement

        def do_HEAD(self):
            self._answer("HEAD")

        def do_GET(self):
            self._answer("GET")

        def log_message(self, *args):
            pass

        def _answer(self, method):
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            with faults.lock:
                faults.requests.append((method, self.path, int(asked[1]) if asked else None))
                is_wrong = re.search(faults.pattern, self.path) is not None
                fails = is_wrong and faults.fail_first > 0
                faults.fail_first -= fails
            time.sleep(faults.latency_s)
            if self.path.endswith(".npy"):
                faults.gate.wait(60)
            if fails:
                return self._send(faults.status, b"not now")
            if self.path in faults.redirects:
                return self._send(302, b"", location=faults.redirects[self.path])
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                return self._send(404, b"no such file")
            body, status = path.read_bytes(), 200
            if asked and not (is_wrong and faults.ignore_ranges):
                first, last = int(asked[1]), int(asked[2] or len(body) - 1)
                if first >= len(body):
                    return self._send(416, b"")
                body, status = body[first : last + 1], 206
            if is_wrong and faults.short_bytes:
                body = body[: -faults.short_bytes]
            self._send(status, body, cut=is_wrong and faults.truncate)

        def _send(self, status, body, cut=False, location=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if location is not None:
                self.send_header("Location", location)
            self.end_headers()
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(folder, faults))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
