"""A folder served over HTTP from a thread of this process, for benchmarks and tests."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """What handlers have in common; they add `do_GET`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer, which is written in two parts, waits 40 ms for an acknowledgement

    def log_message(self, *arguments) -> None:
        pass

    def asked_range(self) -> tuple[int, int | None] | None:
        """First byte and last, which may be open, where a part of the file is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(asked[1]), int(asked[2]) if asked[2] else None) if asked else None

    def send_head(self, status: int, num_bytes: int, **headers: str) -> None:
        """All that comes before a body."""
        self.send_response(status)
        for name, value in {"Content_Length": str(num_bytes), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


@contextmanager
def serving(handler: type[Handler]) -> Iterator[str]:
    """The URL of a server that answers with `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
