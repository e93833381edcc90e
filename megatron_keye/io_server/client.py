"""Asking a fleet of servers for one result: retries, hedging, back-pressure, and when to give up."""

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from megatron_keye.io_server.attempts import Attempt, AttemptFailed, Connections, Timeouts
from megatron_keye.io_server.buffers import BufferPool
from megatron_keye.io_server.fleet import Fleet, Server
from megatron_keye.io_server.protocol import DecodeJob
from megatron_keye.io_server.server_times import ServerTimes

MAX_ATTEMPTS = 3
"""Servers that may fail at one job. One that is busy has not failed."""
FATAL_CRASHES = 2
"""Servers whose workers died of a job before it is kept away from this process too."""


class Poisonous(Exception):
    """A job that ended the workers of several servers: decoding it here would end the training process."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    deadline_s: float
    """Longest wait for servers in all; then the caller decodes by itself."""
    hedge_after_s: float
    """Least time after which a second server is asked as well."""
    requests: int
    """Jobs at a time."""
    in_flight_bytes: int
    """Bytes of all results on their way, at most; one larger result goes alone. As much idle memory is kept for the next ones."""
    timeouts: Timeouts
    secret: bytes | None = None


class ByteCredits:
    """Bytes that may be on their way at a time."""

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used_bytes or self._used_bytes + num_bytes <= self._limit_bytes)
            self._used_bytes += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= num_bytes
                self._changed.notify_all()


@dataclass
class Counts:
    """Events by name: remote, local, retried, hedged, hedge_won, busy, failed, confirmed_here."""

    values: Counter[str] = field(default_factory=Counter)
    last_failure: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.values[name] += number

    def failure(self, message: str) -> None:
        with self._lock:
            self.values["failed"] += 1
            self.last_failure = message


class MediaClient:
    """Asks the servers of `fleet`. All methods may be called from several threads."""

    def __init__(self, fleet: Fleet, settings: ClientSettings):
        self.fleet, self.settings = fleet, settings
        self._connections = Connections(settings.timeouts, settings.secret, BufferPool(settings.in_flight_bytes))
        # Losers of hedges and cancelled attempts hold their threads for a moment.
        self._threads = ThreadPoolExecutor(3 * settings.requests, thread_name_prefix="media")
        self._credits = ByteCredits(settings.in_flight_bytes)
        self.times = ServerTimes(settings.hedge_after_s)
        self._closed: Future = Future()
        self.counts = Counts()

    def fetch(self, job: DecodeJob, stop: Future | None = None) -> np.ndarray | None:
        """uint8 [result_bytes], or None where the caller must decode by itself: no server could, in time.

        None also once `stop` is done, whose result does not matter, or the client closed. Raises Poisonous.
        """
        with self._credits.hold(job.result_bytes):
            return _Fetch(self, job, {self._closed} if stop is None else {self._closed, stop}).run()

    def close(self) -> None:
        """Ends what is under way."""
        self._closed.set_result(None)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._connections.close()


class _Fetch:
    """One job, its attempts, and what became of them."""

    def __init__(self, client: MediaClient, job: DecodeJob, stops: set[Future]):
        """It ends without an answer when one of `stops` is done."""
        self._client, self._job, self._stops = client, job, stops
        self._asked_s = time.monotonic()
        """When the latest server was asked, hedges apart."""
        self._deadline_s = self._asked_s + client.settings.deadline_s
        self._servers = deque(client.fleet.ranked(job.key))
        self._running: dict[Future, tuple[Attempt, Server, bool]] = {}
        self._failed = self._crashed = 0
        self._is_final = False
        self._hedged = self._was_refused = False

    def run(self) -> np.ndarray | None:
        try:
            while not self._is_final and self._next_attempt():
                done, _ = wait(self._stops.union(self._running), self._patience_s(), return_when=FIRST_COMPLETED)
                if done & self._stops:
                    return None
                if not done:
                    self._grow_impatient()
                for future in done:
                    answer = self._judge(future)
                    if answer is not None:
                        return answer
            return None
        finally:
            for attempt, server, _ in self._running.values():
                attempt.cancel()
                server.places.free()

    def _next_attempt(self) -> bool:
        """See to it that an attempt is running; False where nothing more can be tried."""
        if self._running:
            return True
        if self._is_stopped(0) or not self._servers or self._failed >= MAX_ATTEMPTS:
            return False
        now_s = time.monotonic()
        server = min(self._servers, key=lambda s: max(s.breaker.busy_until_s, now_s))
        if not self._wait_for_place(server):
            return False
        if self._failed:
            self._client.counts.add("retried")
        self._start(server, is_hedge=False)
        return True

    def _wait_for_place(self, server: Server) -> bool:
        """Wait while the server is busy; False where that takes too long, or this ends. Any place that another job of this client leaves
        there is given to the one that waits longest: without that the server would be idle until `Retry-After` is over.
        """
        pause_s = server.breaker.busy_until_s - time.monotonic()
        if pause_s <= 0:
            return True
        if time.monotonic() + pause_s >= self._deadline_s:
            return False
        turn = server.places.queue(first=self._was_refused)
        wait(self._stops | {turn}, pause_s, return_when=FIRST_COMPLETED)
        is_stopped = self._is_stopped(0)
        if server.places.leave(turn) and is_stopped:
            server.places.free()  # for the next in line
        return not is_stopped

    def _is_stopped(self, within_s: float) -> bool:
        return bool(wait(self._stops, within_s, return_when=FIRST_COMPLETED).done)

    def _start(self, server: Server, *, is_hedge: bool) -> None:
        self._servers.remove(server)
        server.breaker.asked()
        if not is_hedge:
            self._asked_s = time.monotonic()
        attempt = Attempt(self._client._connections, server.url, self._job, self._deadline_s)
        self._running[self._client._threads.submit(attempt.run)] = (attempt, server, is_hedge)

    def _patience_s(self) -> float:
        left_s = max(self._deadline_s - time.monotonic(), 0.0)
        if self._hedged or not self._servers:
            return left_s
        hedge_at_s = self._asked_s + self._client.times.hedge_after_s(self._job)
        return min(left_s, max(hedge_at_s - time.monotonic(), 0.0))

    def _grow_impatient(self) -> None:
        """Nothing came in time: hedge, or end at the deadline."""
        if time.monotonic() >= self._deadline_s:
            self._is_final = True
            for _, server, _ in self._running.values():
                why = f"{server.url}: no answer within {self._client.settings.deadline_s:g} s"
                server.failed(why)
                self._client.counts.failure(why)
            return
        self._hedged = True
        if self._client.times.may_hedge():
            self._client.counts.add("hedged")
            self._start(self._servers[0], is_hedge=True)

    def _judge(self, future: Future) -> np.ndarray | None:
        """The answer of a finished attempt, or None with what its failure means noted."""
        attempt, server, is_hedge = self._running.pop(future)
        counts = self._client.counts
        try:
            answer = future.result()
        except AttemptFailed as error:
            self._note(server, error)
            return None
        server.places.free()
        counts.add("remote")
        times, took_s = self._client.times, time.monotonic() - attempt.began_s
        times.answered(server.url, self._job, took_s)
        if times.is_slow(server.url, self._job, took_s):
            server.trip(f"{server.url}: others answer several times sooner")
        else:
            server.breaker.succeeded()
        if is_hedge:
            counts.add("hedge_won")
            for overtaken, slower, _ in self._running.values():  # which may be hung: hedges are too few to find out every time
                slower.failed(f"{slower.url}: others answer sooner")
                times.overtaken(slower.url, self._job, time.monotonic() - overtaken.began_s)
        return answer

    def _note(self, server: Server, error: AttemptFailed) -> None:
        """A server that answers is in order, whatever it answers; one that cannot be asked again soon is left alone."""
        code, breaker = error.code, server.breaker
        if code == "busy":
            self._client.counts.add("busy")
            breaker.succeeded()
            breaker.busy(error.retry_after_s * random.uniform(0.5, 1.0))  # or all would come back together
            self._servers.append(server)
            self._was_refused = True
            return
        server.places.free()
        self._client.counts.failure(str(error))
        self._failed += 1
        if code is None or code == "internal":
            server.failed(str(error))
        elif code in ("wrong_decoder", "draining", "denied"):
            server.trip(str(error))
        else:
            breaker.succeeded()
            if code == "forbidden_path":  # of this medium: the server is in order for others
                server.forbade(str(error))
        if code == "corrupt":  # no other server would find it whole; the caller says how it is broken
            self._client.counts.add("confirmed_here")
            self._is_final = True
        elif code == "worker_crashed":
            self._crashed += 1
            if self._crashed >= FATAL_CRASHES:
                raise Poisonous(f"it ended the decoders of {self._crashed} servers; the last: {error}")
