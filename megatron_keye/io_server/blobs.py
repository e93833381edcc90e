"""The encoded bytes of jobs: from the folders and URLs that a server may read, or from its disk, where it kept them."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.locations import is_url
from megatron_keye.data.remote_store import RemoteStore
from megatron_keye.data.shards import Span
from megatron_keye.data.span_cache import SpanCache
from megatron_keye.errors import DataError, SettingsError, UnreachableError
from megatron_keye.io_server.protocol import DecodeJob, Refused
from megatron_keye.io_server.roots import Roots

URL_STORAGE = StorageConfig(cache_bytes=0, attempts=3)
"""Media are read alone and kept whole; another server is asked sooner than this machine would try again for long."""
PLAIN_NAME = re.compile(r"(?!\.{1,2}(/|$))[^/?#%\\\0]+(/(?!\.{1,2}(/|$))[^/?#%\\\0]+)*")
"""What follows a URL: nothing that leads upwards, also not in the server's way of writing it."""

ReadSpan = Callable[[Span], bytes]


@dataclass(frozen=True, slots=True)
class DiskCache:
    """A folder for media that were read. Servers of one node may share it."""

    folder: Path
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Blob:
    content: bytes
    from_disk: bool


class Blobs:
    """What may be read: below `roots`, which are folders and URLs. Raises SettingsError for one that cannot be, and for a bad `disk`."""

    def __init__(self, roots: Sequence[str], disk: DiskCache | None = None):
        urls = [root.rstrip("/") for root in roots if is_url(root)]
        folders = [Path(root) for root in roots if not is_url(root)]
        if not roots:
            raise SettingsError("name at least one folder or URL with --root")
        self._stores = {url: _store(url) for url in urls}
        self._folders = Roots(folders)
        self._cache = None if disk is None else _cache(disk, self._folders)

    def read(self, job: DecodeJob) -> Blob:
        """Raises Refused for a path that is not allowed or leads to nothing, DataError where the bytes are not those of the job."""
        span = Span(job.offset, job.num_bytes)
        with self._opened(job.path) as read_span:  # first of all: what was kept is only for who may ask for the file
            if (kept := self._kept(job.sha256)) is not None:
                return Blob(kept, from_disk=True)
            content = read_span(span)
        if job.sha256 is not None and _sha256(content) != job.sha256:
            raise DataError(f"{job.path}: {job.num_bytes} bytes at {job.offset} do not have the sha256 of the job: damaged, or replaced")
        if self._cache is not None and job.sha256 is not None:
            self._cache.put(job.sha256, content)
        return Blob(content, from_disk=False)

    def _kept(self, sha256: str | None) -> bytes | None:
        kept = None if self._cache is None or sha256 is None else self._cache.get(sha256)
        return kept if kept is not None and _sha256(kept) == sha256 else None

    @contextmanager
    def _opened(self, path: str) -> Iterator[ReadSpan]:
        if is_url(path):
            yield self._remote(path)
            return
        with self._folders.open(path) as file:
            size = os.fstat(file.fileno()).st_size

            def read(span: Span) -> bytes:
                if size < span.offset + span.num_bytes:
                    raise DataError(
                        f"{path} has {size} bytes: expected {span.num_bytes} at {span.offset}; it is truncated, or another file"
                    )
                file.seek(span.offset)
                return file.read(span.num_bytes)

            yield read

    def _remote(self, url: str) -> ReadSpan:
        root = next((root for root in self._stores if url.startswith(f"{root}/")), None)
        name = "" if root is None else url.removeprefix(f"{root}/")
        if root is None or not PLAIN_NAME.fullmatch(name):
            raise Refused("forbidden_path", "the URL leads out of those that this server was started with (--root)")

        def read(span: Span) -> bytes:
            try:
                return self._stores[root].read(name, span)
            except UnreachableError as error:
                raise Refused("missing", str(error)) from error

        return read


def _store(url: str) -> RemoteStore:
    if url.startswith(("file:", "local:")):
        raise SettingsError(f"--root {url}: expected the folder itself, so that links in it can be judged")
    return RemoteStore(url, URL_STORAGE)


def _cache(disk: DiskCache, folders: Roots) -> SpanCache:
    if folders.holds(os.path.realpath(disk.folder)):
        raise SettingsError(f"--disk-cache {disk.folder} lies in a --root, whose files are shown to runs: name a folder outside")
    try:
        disk.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return SpanCache(disk.folder / "media", disk.limit_bytes)
    except OSError as error:
        raise SettingsError(f"--disk-cache {disk.folder}: cannot make it: {error}; name a folder on a disk of this node") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
