"""One request to one server: blocking, within limits, and cancelled by closing its socket from another thread."""

import http.client
import json
import socket
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
import xxhash

from megatron_keye.io_server import auth
from megatron_keye.io_server.buffers import BufferPool
from megatron_keye.io_server.protocol import DECODE_PATH, RESULT_HEADER, STATUS, DecodeJob, ErrorCode

MAX_ERROR_BYTES = 1 << 16
IDLE_CONNECTIONS = 16
"""Per server."""


class AttemptFailed(Exception):
    """The server said no (`code` is what it said), or could not be reached or believed (`code` is None)."""

    def __init__(self, message: str, code: ErrorCode | None = None, retry_after_s: float = 1.0):
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Timeouts:
    connect_s: float
    stall_s: float
    """Longest pause while an answer arrives."""


class Connections:
    """Kept-alive connections by server, and memory for what comes over them."""

    def __init__(self, timeouts: Timeouts, secret: bytes | None, buffers: BufferPool):
        self.timeouts, self.secret, self.buffers = timeouts, secret, buffers
        self._idle: defaultdict[str, list[http.client.HTTPConnection]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, url: str) -> http.client.HTTPConnection | None:
        with self._lock:
            return self._idle[url].pop() if self._idle[url] else None

    def give_back(self, url: str, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle[url]) < IDLE_CONNECTIONS:
                self._idle[url].append(connection)
                return
        connection.close()

    def drop(self, url: str) -> None:
        """Close what is idle: the server was restarted, or is gone."""
        with self._lock:
            connections = self._idle.pop(url, [])
        for connection in connections:
            connection.close()

    def close(self) -> None:
        for url in list(self._idle):
            self.drop(url)


class Attempt:
    """One try to get the answer to `job` from `url`, until `deadline_s` (monotonic)."""

    def __init__(self, connections: Connections, url: str, job: DecodeJob, deadline_s: float):
        self._connections, self.url, self._job, self._deadline_s = connections, url, job, deadline_s
        self.began_s = time.monotonic()
        self._socket: socket.socket | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """End it from another thread; the server sees the connection close and stops its work."""
        with self._lock:  # or the connection might be another attempt's by now
            self._cancelled = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> np.ndarray:
        """uint8 [result_bytes], checked, in memory that is lent until nothing refers to it. Raises AttemptFailed."""
        try:
            kept = self._connections.take(self.url)
            if kept is not None:
                try:
                    return self._exchange(kept)
                except ConnectionError:  # the server had closed it, which says nothing about now
                    if self._cancelled:
                        raise
                    self._connections.drop(self.url)
            return self._exchange(self._connect())
        except (OSError, UnicodeError, http.client.HTTPException) as error:  # UnicodeError: of names that are none of the DNS
            raise AttemptFailed(f"{self.url}: {type(error).__name__}: {error}") from error

    def _connect(self) -> http.client.HTTPConnection:
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=self._connections.timeouts.connect_s)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _exchange(self, connection: http.client.HTTPConnection) -> np.ndarray:
        response = None
        try:
            with self._lock:
                if self._cancelled:
                    raise AttemptFailed(f"{self.url}: cancelled")
                self._socket = connection.sock
            self._send(connection)
            response = connection.getresponse()
            return self._read(response)
        finally:
            with self._lock:
                self._socket = None
            if response is not None and response.isclosed() and not response.will_close:  # read to its end
                self._connections.give_back(self.url, connection)
            else:
                connection.close()

    def _send(self, connection: http.client.HTTPConnection) -> None:
        body = self._job.model_dump_json().encode()
        headers = {"Content-Type": "application/json"}
        if self._connections.secret is not None:
            headers["Authorization"] = auth.sign(self._connections.secret, DECODE_PATH, body, time.time())
        connection.sock.settimeout(max(self._deadline_s - time.monotonic(), 0.001))
        connection.request("POST", DECODE_PATH, body, headers)

    def _read(self, response: http.client.HTTPResponse) -> np.ndarray:
        self._socket.settimeout(self._connections.timeouts.stall_s)
        if response.status != 200:
            raise _refusal(self.url, response)
        facts = self._facts(response)
        answer = self._connections.buffers.lend(self._job.result_bytes)
        view, at = memoryview(answer), 0
        while at < len(view):
            count = response.readinto(view[at:])
            if not count:
                raise AttemptFailed(f"{self.url}: the answer ended after {at} of {len(view)} bytes")
            at += count
        if xxhash.xxh3_64_hexdigest(answer) != facts["xxh3_64"]:
            raise AttemptFailed(f"{self.url}: the pixels do not match their checksum")
        return answer

    def _facts(self, response: http.client.HTTPResponse) -> dict:
        """The header of an answer, which must be to this job. Raises AttemptFailed."""
        try:
            facts = json.loads(response.headers.get(RESULT_HEADER, ""))
            found = (facts["decoder_id"], tuple(facts["segments"]), response.length)
            str(facts["xxh3_64"])
        except (ValueError, KeyError, TypeError) as error:
            raise AttemptFailed(f"{self.url}: found no {RESULT_HEADER} header that can be read: this is no I/O server") from error
        if found[0] != self._job.decoder_id:
            raise AttemptFailed(f"{self.url}: decoded with {found[0]}, expected {self._job.decoder_id}", "wrong_decoder")
        if found[1:] != (self._job.segments, self._job.result_bytes):
            raise AttemptFailed(f"{self.url}: the answer has other sizes than the job")
        return facts


def _refusal(url: str, response: http.client.HTTPResponse) -> AttemptFailed:
    text = response.read(MAX_ERROR_BYTES)
    try:
        refusal = json.loads(text)
        code, message = refusal["error"], str(refusal["message"])
        retry_after_s = float(response.headers.get("Retry-After", "1"))
    except (ValueError, KeyError, TypeError):
        return AttemptFailed(f"{url}: HTTP status {response.status} without an explanation: this is no I/O server")
    if code not in STATUS:
        return AttemptFailed(f"{url}: {code}: {message}")
    return AttemptFailed(f"{url}: {code}: {message}", code, retry_after_s)
