"""Where the shards of a data set lie, and reading them."""

import threading
from pathlib import Path
from typing import Protocol

from megatron_keye.data.shards import Span, read_span


class Store(Protocol):
    """The files of a data set, by name. All methods may be called from several threads."""

    def address(self, name: str) -> str:
        """Where a file is, for people."""
        ...

    def read(self, name: str, span: Span) -> bytes:
        """A part of a file. Raises DataError where it is missing or ends before."""
        ...

    def bytes_read(self) -> int:
        """Bytes that were read so far."""
        ...


class ByteCounter:
    def __init__(self):
        self._lock = threading.Lock()
        self.total = 0

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.total += num_bytes


class LocalStore:
    """A folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._counter = ByteCounter()

    def address(self, name: str) -> str:
        return str(self._folder / name)

    def read(self, name: str, span: Span) -> bytes:
        blob = read_span(self._folder / name, span)
        self._counter.add(len(blob))
        return blob

    def bytes_read(self) -> int:
        return self._counter.total
