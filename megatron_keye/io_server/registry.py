"""Finding servers through a shared folder: each keeps a file there that says where it is and until when to believe it."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_keye.io_server.protocol import is_server_url

LEASE_S = 30.0
RENEW_S = 5.0
REREAD_S = 5.0
"""Age of what is known from a registry, before it is read again."""
FIRST_READ_S = 2.0
"""How long who asks waits for the first news."""
DEAD_S = 3600.0
"""A lease that ran out so long ago is removed: its server ended without taking it back."""


@dataclass(frozen=True, slots=True)
class Lease:
    """`expires_s` is in seconds since the epoch: clocks of the machines must agree to a few seconds."""

    url: str
    decoder_id: str
    num_workers: int
    expires_s: float


def lease_path(folder: Path, url: str) -> Path:
    return folder / (url.rpartition("/")[2].replace(":", "-") + ".json")


def write_lease(folder: Path, url: str, decoder_id: str, num_workers: int) -> None:
    """Write or renew a server's file, whole or not at all. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = lease_path(folder, url)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(Lease(url, decoder_id, num_workers, time.time() + LEASE_S))), encoding="utf-8")
    temporary.replace(path)


def remove_lease(folder: Path, url: str) -> None:
    lease_path(folder, url).unlink(missing_ok=True)


def remove_dead_leases(folder: Path) -> None:
    """Should one of these servers renew its lease at this moment after all, it may lose it, and writes it again RENEW_S later.

    Raises OSError where the folder cannot be listed or written.
    """
    for path, lease in _leases(folder):
        if lease.expires_s < time.time() - DEAD_S:
            path.unlink(missing_ok=True)


def live_leases(folder: Path) -> list[Lease]:
    """Leases that have not run out, by URL. Files that hold none are passed over: another will be there soon.

    Raises OSError where the folder is there and cannot be listed.
    """
    now_s = time.time()
    return sorted((lease for _, lease in _leases(folder) if lease.expires_s > now_s), key=lambda lease: lease.url)


def _leases(folder: Path) -> Iterator[tuple[Path, Lease]]:
    for path in folder.glob("*.json"):
        try:
            lease = Lease(**json.loads(path.read_bytes()))
            is_one = is_server_url(lease.url) and isinstance(lease.expires_s, int | float)
        except (OSError, ValueError, TypeError):
            continue
        if is_one:
            yield path, lease


class RegistryNews:
    """What a registry said last. A thread reads it, one at a time, and ends: a file system that hangs costs fresh news alone."""

    def __init__(self, folder: Path, clock: Callable[[], float]):
        self._folder, self._clock = folder, clock
        self.leases: list[Lease] = []
        self._reader = threading.Thread()
        self._began_s: float | None = None
        self._has_waited = threading.Event()
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Have `leases` read anew where they are older than REREAD_S. Until it was read once, it is waited for, FIRST_READ_S in all. May be
        called from several threads."""
        with self._lock:
            is_old = self._began_s is None or self._clock() - self._began_s >= REREAD_S
            if is_old and not self._reader.is_alive():
                self._began_s = self._clock()
                self._reader = threading.Thread(target=self._read, name="registry", daemon=True)
                self._reader.start()
        if not self._has_waited.wait(FIRST_READ_S):
            self._has_waited.set()

    def _read(self) -> None:
        with suppress(OSError):  # a shared folder that cannot be listed for a moment: what was known holds
            self.leases = live_leases(self._folder)
        self._has_waited.set()
