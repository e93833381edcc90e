"""Reading the files of a data set: what every store offers, and the one that is a folder of this machine."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.shards import Span, read_span
from megatron_keye.errors import DataError

DEFAULT_STORAGE = StorageConfig()


class Store(Protocol):
    """The files of a data set, by name. All methods may be called from several threads."""

    def address(self, name: str) -> str:
        """Where a file is, for people."""
        ...

    def read(self, name: str, span: Span) -> bytes:
        """A part of a file. Raises DataError where it is missing or ends before, UnreachableError where nothing can be known."""
        ...

    def folder_here(self, name: str, files: Sequence[str], verify: Callable[[Path], None]) -> Path:
        """A folder of this machine with these files of the folder `name`; the first is small and changes when any does.

        What must be fetched for it passes `verify` first. Raises DataError where a file is missing."""
        ...

    def check_lengths(self, num_bytes: Mapping[str, int], remedy: str) -> None:
        """Raise DataError, which ends in `remedy`, where one of these files is missing or has another length.

        Comes before the first `read` of any of them."""
        ...

    def bytes_read(self) -> int:
        """Bytes that were read from where the files are, so far."""
        ...


class ByteCounter:
    """A sum that several threads add to."""

    def __init__(self):
        self._lock = threading.Lock()
        self.total = 0

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.total += num_bytes


class LocalStore:
    """A folder. Raises DataError where there is none."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(
                f"no data set at {folder}: no such folder; write one with data_tools/make_shards.py INPUT.jsonl {folder} and "
                f"data_tools/index_shards.py {folder}, or make the demo data with `make data`"
            )
        self._folder = folder
        self._counter = ByteCounter()

    def address(self, name: str) -> str:
        return str(self._folder / name)

    def read(self, name: str, span: Span) -> bytes:
        blob = read_span(self._folder / name, span)
        self._counter.add(len(blob))
        return blob

    def folder_here(self, name: str, files: Sequence[str], verify: Callable[[Path], None]) -> Path:
        path = self._folder / name
        if not (path / files[0]).is_file():
            raise DataError(f"no index at {path}; run data_tools/index_shards.py {self._folder}")
        return path

    def check_lengths(self, num_bytes: Mapping[str, int], remedy: str) -> None:
        for name, expected in num_bytes.items():
            path = self._folder / name
            if not path.is_file():
                raise DataError(f"{path} is missing; restore it, or {remedy} for what is there")
            found = path.stat().st_size
            if found != expected:
                raise DataError(
                    f"{path} has {found} bytes, but had {expected} when it was indexed: it is truncated or was changed; "
                    f"restore it, or {remedy} again"
                )

    def bytes_read(self) -> int:
        return self._counter.total
