"""Which server to ask next: the one that is likely to have the answer, unless it is out of order or busy."""

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_keye.io_server.registry import Lease, RegistryNews

FAILURES_TO_OPEN = 3
"""Consecutive failures after which a server is left alone."""
OPEN_S = 30.0
"""For how long, before one request may try it again."""

Clock = Callable[[], float]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Breaker:
    """Leaves a server alone that fails: closed (in use), open until `open_until_s`, then one trial decides."""

    clock: Clock
    failures: int = 0
    open_until_s: float = 0.0
    busy_until_s: float = 0.0

    def allows(self) -> bool:
        return self.clock() >= self.open_until_s

    def asked(self) -> None:
        """A request goes out. Where it is the trial, others leave the server alone until it has decided."""
        if self.open_until_s:
            self.open_until_s = self.clock() + OPEN_S

    def succeeded(self) -> None:
        self.failures, self.open_until_s = 0, 0.0

    def failed(self) -> None:
        self.failures += 1
        if self.failures >= FAILURES_TO_OPEN:
            self.trip()

    def trip(self) -> None:
        """Open at once. The next failure after that opens it again."""
        self.failures = FAILURES_TO_OPEN - 1
        self.open_until_s = self.clock() + OPEN_S

    def busy(self, retry_after_s: float) -> None:
        self.busy_until_s = self.clock() + retry_after_s


class Places:
    """Who waits for a place at a server that is busy, first come, first served. May be used from several threads."""

    def __init__(self):
        self._waiting: deque[Future] = deque()
        self._lock = threading.Lock()

    def queue(self, *, first: bool) -> Future:
        """What is done when a place is free; at the head of the line for one that was there before. It must `leave` in the end."""
        turn: Future = Future()
        with self._lock:
            self._waiting.insert(0 if first else len(self._waiting), turn)
        return turn

    def leave(self, turn: Future) -> bool:
        """Whether it was given a place."""
        with self._lock:
            if not turn.done():
                self._waiting.remove(turn)
            return turn.done()

    def free(self) -> None:
        """A request has ended, so that there is room for another."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set_result(None)


@dataclass(slots=True)
class Server:
    """One server, and whether to ask it. That it is left alone is logged once until it works again, as a run goes on without it.

    `why` begins with its URL.
    """

    url: str
    breaker: Breaker
    places: Places = field(default_factory=Places)
    _has_forbidden: bool = False

    def failed(self, why: str) -> None:
        with self._logged(why):
            self.breaker.failed()

    def trip(self, why: str) -> None:
        with self._logged(why):
            self.breaker.trip()

    def forbade(self, why: str) -> None:
        """It may not read what a medium is in. Logged once, as the run decodes all such media by itself."""
        if not self._has_forbidden:
            self._has_forbidden = True
            log.warning("a server may not read a data set, which then is decoded elsewhere: give it the set's folder as a --root: %s", why)

    @contextmanager
    def _logged(self, why: str) -> Iterator[None]:
        was_in_use = not self.breaker.open_until_s
        yield
        if was_in_use and self.breaker.open_until_s:
            log.warning("a server is left alone, and tried again every %g s: %s", OPEN_S, why)


def rendezvous(key: bytes, urls: Iterable[str]) -> list[str]:
    """Servers from first to last choice for `key`: the same on every client, and a lost server moves only its own keys."""
    return sorted(urls, key=lambda url: (hashlib.blake2b(url.encode(), key=key[:64], digest_size=8).digest(), url), reverse=True)


class Fleet:
    """The servers of a run, given by URL or found in a registry folder. All methods may be called from several threads."""

    def __init__(self, urls: tuple[str, ...], registry: Path | None = None, decoder_id: str = "", clock: Clock = time.monotonic):
        """Servers of the registry whose decoder id is another are never asked: `unlike`, as last read."""
        self.urls, self.decoder_id, self.clock = urls, decoder_id, clock
        self.unlike: tuple[str, ...] = ()
        self._news = None if registry is None else RegistryNews(registry, clock)
        self._servers: dict[str, Server] = {}
        self._lock = threading.Lock()

    def ranked(self, key: bytes) -> list[Server]:
        """Servers that may be asked, from first to last choice; none where all are out of order."""
        if self._news is not None:
            self._news.refresh()
        with self._lock:
            self._follow([] if self._news is None else self._news.leases)
            usable = [url for url, server in self._servers.items() if server.breaker.allows()]
            return [self._servers[url] for url in rendezvous(key, usable)]

    def _follow(self, leases: list[Lease]) -> None:
        unlike = tuple(lease.url for lease in leases if lease.decoder_id != self.decoder_id)
        if set(unlike) - set(self.unlike):
            log.warning("servers that decode otherwise than %s are not asked: %s", self.decoder_id, ", ".join(unlike))
        self.unlike = unlike
        wanted = dict.fromkeys((*self.urls, *(lease.url for lease in leases if lease.decoder_id == self.decoder_id)))
        self._servers = {url: self._servers.get(url) or Server(url, Breaker(self.clock)) for url in wanted}
