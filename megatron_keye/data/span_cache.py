"""A folder that keeps bytes that came over a network, up to a limit; what was not used for longest goes first.

fsspec has caches of files too, but none with a limit in bytes, and several processes would write over each other's lists. Here
a file is complete or absent, and the one number that processes share, the sum of all sizes, changes under a lock.
"""

import fcntl
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from megatron_keye.config.schema import StorageConfig
from megatron_keye.errors import SettingsError

CRC_BYTES = 4
KEEP_FRACTION = 0.9
"""Room is made for more than one entry at a time: down to this part of the limit."""
PARTIAL = ".partial"
ABANDONED_AFTER_S = 3600.0
"""A partial file of this age belongs to a process that is gone."""

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` alone among all processes of this machine; it is free again when its holder ends, however."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class SpanCache:
    """Entries by key, in `folder`, of at most `limit_bytes` together. Safe between threads and processes."""

    def __init__(self, folder: Path, limit_bytes: int):
        self._folder, self._limit_bytes = folder, limit_bytes
        self._lock, self._total = folder / "lock", folder / "total"
        self._keeps = True
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, or None. A damaged entry is removed."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        blob = stored[:-CRC_BYTES]
        if stored[-CRC_BYTES:] != _crc(blob):
            log.warning("removed a damaged entry from the cache at %s", self._folder)
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # another process may have made room meanwhile
            os.utime(path)
        return blob

    def put(self, key: str, blob: bytes) -> None:
        """Keep `blob`, where it fits at all. A disk that is full costs the cache, not the caller; it is logged once until it works."""
        num_bytes = len(blob) + CRC_BYTES
        if num_bytes > self._limit_bytes:
            return
        path = self._path(key)
        partial = path.with_name(f"{uuid4().hex}{PARTIAL}")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(blob + _crc(blob))
            with locked(self._lock):
                replaced = path.stat().st_size if path.exists() else 0
                total = self._read_total() + num_bytes - replaced
                if total > self._limit_bytes:
                    total = self._make_room(int(self._limit_bytes * KEEP_FRACTION) - num_bytes) + num_bytes
                # The number goes first: killed in between, it is too large, which the next clearing puts right.
                self._total.write_text(str(total))
                partial.rename(path)
            self._keeps = True
        except OSError as error:
            if self._keeps:
                log.warning("cannot keep data in the cache at %s: %s", self._folder, error)
            self._keeps = False
            with suppress(OSError):
                partial.unlink()

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name

    def _read_total(self) -> int:
        text = self._total.read_text() if self._total.exists() else ""
        return int(text) if text.isdecimal() else sum(size for _, size, _ in self._entries())

    def _make_room(self, target_bytes: int) -> int:
        """Remove the entries that were not used for longest; bytes of what is left."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= target_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, file) of all entries; partial files that nobody will finish are removed on the way."""
        found = []
        for path in self._folder.glob("??/*"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                if path.suffix != PARTIAL:
                    found.append((facts.st_mtime, facts.st_size, path))
                elif time.time() - facts.st_mtime > ABANDONED_AFTER_S:
                    path.unlink()
        return found


def open_cache(settings: StorageConfig) -> SpanCache | None:
    """This machine's cache, or None where the settings keep nothing. Raises SettingsError for a folder that cannot be made."""
    folder = Path(settings.cache).expanduser()
    try:
        return SpanCache(folder / "spans", settings.cache_bytes) if settings.cache_bytes else None
    except OSError as error:
        raise SettingsError(f"data.storage.cache: cannot make {folder}: {error}; name a folder on a disk of the node") from error


def _crc(blob: bytes) -> bytes:
    return zlib.crc32(blob).to_bytes(CRC_BYTES, "little")
