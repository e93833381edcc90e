"""A data set at a URL. Its index is fetched to a folder of this machine once; shards are read in chunks, which are cached."""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import fsspec

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.chunks import ChunkGrid, stretches
from megatron_keye.data.retry import Retries, Transient, with_retries
from megatron_keye.data.shards import Span
from megatron_keye.data.span_cache import locked, open_cache
from megatron_keye.data.storage import ByteCounter
from megatron_keye.errors import DataError, SettingsError, UnreachableError

CHECKED_AT_ONCE = 16
REMEDY = "make shards and index with data_tools/make_shards.py and data_tools/index_shards.py, and upload the whole folder"
TEMPORARY_STATUS = (408, 425, 429)
"""HTTP statuses below 500 that another try may not meet."""


class WrongLength(Transient):
    """An answer that is shorter or longer than what was asked for."""


class RemoteStore:
    """A folder at `url`. Raises SettingsError for a URL that nothing installed can read."""

    def __init__(self, url: str, settings: StorageConfig):
        self._url = url.rstrip("/")
        self._fs, self._root = _file_system(self._url, settings.timeout_s)
        self._retries = Retries(settings.attempts, settings.first_pause_s)
        self._folder = Path(settings.cache).expanduser()
        self._cache = open_cache(settings)
        self._chunk_bytes = settings.chunk_bytes
        self._counter = ByteCounter()
        self._version = ""
        """Of the index: cached chunks of shards as another index knew them may hold other bytes."""
        self._file_bytes: dict[str, int] = {}

    def address(self, name: str) -> str:
        return f"{self._url}/{name}"

    def read(self, name: str, span: Span) -> bytes:
        if self._cache is None:
            return self._range(name, span)
        grid = ChunkGrid(self._file_bytes[name], self._chunk_bytes)
        if span.offset + span.num_bytes > grid.file_bytes:
            raise DataError(
                f"{self.address(name)}: expected {span.num_bytes} bytes at offset {span.offset}, found an end at {grid.file_bytes}; "
                "index the set again"
            )
        key = f"{self.address(name)} {self._version} {grid}"
        touched = grid.touched(span)
        found = {chunk: self._cache.get(f"{key} {chunk}") for chunk in touched}
        chunks = {chunk: blob for chunk, blob in found.items() if blob is not None}
        # No lock: who waits for another's request may wait through all its tries. At worst a chunk is fetched twice.
        for missing in stretches(chunk for chunk in touched if chunk not in chunks):
            fetched = grid.divided(missing, self._range(name, grid.stretch(missing)))
            for chunk, blob in fetched.items():
                self._cache.put(f"{key} {chunk}", blob)
            chunks |= fetched
        return grid.joined(span, chunks)

    def folder_here(self, name: str, files: Sequence[str], verify: Callable[[Path], None]) -> Path:
        first = self._try(files[0], f"{name}/{files[0]}", lambda path: self._fs.cat_file(path))
        key = hashlib.sha256(self.address(name).encode() + b"\n" + first).hexdigest()
        folder = self._folder / "indices" / key
        self._version = key

        def fetch() -> None:
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / files[0]).write_bytes(first)
            for file in files[1:]:
                self._try(file, f"{name}/{file}", lambda path, target=str(partial / file): self._fs.get_file(path, target))
                self._counter.add((partial / file).stat().st_size)
            verify(partial)
            partial.rename(folder)

        self._once(folder, fetch)
        return folder

    def check_lengths(self, num_bytes: Mapping[str, int], remedy: str) -> None:
        listed = "\n".join([self._url, *(f"{name} {expected}" for name, expected in num_bytes.items())])
        done = self._folder / "checked" / hashlib.sha256(listed.encode()).hexdigest()

        def check() -> None:
            with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
                for _ in pool.map(lambda name: self._check_length(name, num_bytes[name], remedy), num_bytes):
                    pass
            done.touch()

        self._once(done, check)
        self._file_bytes |= num_bytes

    def bytes_read(self) -> int:
        return self._counter.total

    def _range(self, name: str, span: Span) -> bytes:
        where = f"{self.address(name)}, {span.num_bytes} bytes at offset {span.offset}"

        def read(path: str) -> bytes:
            blob = self._fs.cat_file(path, start=span.offset, end=span.offset + span.num_bytes)
            if len(blob) != span.num_bytes:
                raise WrongLength(f"found {len(blob)} bytes")
            return blob

        try:
            blob = self._try(where, name, read)
        except WrongLength as error:
            raise DataError(
                f"{where}: {error} each of {self._retries.attempts} times: it is truncated, was changed after it was indexed, or the "
                "server does not know ranges; restore the shard, or index the set again"
            ) from error
        self._counter.add(len(blob))
        return blob

    def _check_length(self, name: str, expected: int, remedy: str) -> None:
        """Ask for the last byte and the one after it: one request, which every file system answers and which moves no data."""

        def read(path: str) -> bytes:
            blob = self._fs.cat_file(path, start=expected - 1, end=expected + 1)
            if len(blob) != 1:
                raise WrongLength(f"found {len(blob)} bytes")
            return blob

        try:
            self._try(self.address(name), name, read)
        except WrongLength as error:
            raise DataError(
                f"{self.address(name)} does not have the {expected} bytes that it had when it was indexed: it is truncated or was changed; "
                f"restore it, or {remedy} again and upload the index"
            ) from error

    def _try(self, where: str, name: str, call: Callable[[str], Any]) -> Any:
        """The result of `call` with the path of a file. Raises WrongLength as it does, DataError for what no retry can help,
        UnreachableError after the last."""

        def attempt() -> Any:
            try:
                return call(f"{self._root}/{name}")
            except aiohttp.ClientResponseError as error:
                raise self._of_status(error, where) from error
            except FileNotFoundError as error:
                raise DataError(f"{self.address(name)} is missing; expected a data set with its index at {self._url}: {REMEDY}") from error
            except PermissionError as error:
                raise DataError(f"{where}: access is denied ({error}); give this machine's account the right to read it") from error
            except (OSError, aiohttp.ClientError) as error:  # FSTimeoutError and ConnectionError are OSErrors
                raise Transient(f"{type(error).__name__}: {error}") from error

        try:
            return with_retries(attempt, self._retries)
        except WrongLength:
            raise
        except Transient as error:
            raise UnreachableError(f"{where}: no answer in {self._retries.attempts} tries, the last: {error}") from error

    def _of_status(self, error: aiohttp.ClientResponseError, where: str) -> Exception:
        """What an HTTP status means for whoever asked."""
        if error.status == 416:
            return WrongLength("found no such range")
        if error.status >= 500 or error.status in TEMPORARY_STATUS:
            return Transient(f"HTTP status {error.status}")
        return DataError(
            f"{where}: the server answers with HTTP status {error.status} {error.message}; check the URL and the right to read it"
        )

    def _once(self, done: Path, action: Callable[[], None]) -> None:
        """Run `action`, which makes the file or folder `done`, unless it was done before or by another process meanwhile."""
        if done.exists():
            return
        done.parent.mkdir(parents=True, exist_ok=True)
        with locked(done.with_suffix(".lock")):
            if not done.exists():
                action()


def _file_system(url: str, timeout_s: float) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path in it."""
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        # Of each pause, not in all: a large file may take its time.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)}
    try:
        return fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"the data set at {url} cannot be read: {error}; expected a folder, or a URL such as s3:// or https://"
        ) from error
