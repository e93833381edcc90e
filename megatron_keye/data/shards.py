"""webdataset tar shards: written through the webdataset library, read by byte offset.

A sample is one key: `KEY.json`, the record, and `KEY.0.jpg`, `KEY.1.mp4`, ...: its media, which the record names as members.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_keye.data.record import Media, Record, record_to_json
from megatron_keye.errors import DataError

SHARD_PATTERN = "*.tar"
RECORD_EXTENSION = "json"


@dataclass(frozen=True, slots=True)
class Span:
    """A member's bytes inside its tar."""

    offset: int
    num_bytes: int


def list_shards(folder: Path) -> list[Path]:
    """Shards of a data set in order. Raises DataError where there is none."""
    shards = sorted(folder.glob(SHARD_PATTERN))
    if not shards:
        found = "no such folder" if not folder.is_dir() else "no *.tar file in it"
        raise DataError(f"no data set at {folder}: {found}; write shards with data_tools/make_shards.py INPUT.jsonl {folder}")
    return shards


def iter_samples(shard: Path) -> Iterator[tuple[str, dict[str, Span]]]:
    """Yields (key, {extension: where its bytes are}) of every sample, in the order of the file.

    Raises DataError for a file that is no tar, ends early, or holds a member without a key and an extension.
    """
    key, members = "", {}
    for name, span in _members(shard):
        path = PurePosixPath(name)
        stem, _, extension = path.name.partition(".")
        if not stem or not extension:
            raise DataError(f"{shard}: found member {name!r}, expected KEY.EXTENSION; write shards with data_tools/make_shards.py")
        next_key = str(path.with_name(stem))
        if members and next_key != key:
            yield key, members
            members = {}
        key = next_key
        members[extension] = span
    if members:
        yield key, members


def read_span(shard: Path, span: Span) -> bytes:
    """The bytes of one member. Raises DataError where the file is missing or ends before them."""
    try:
        with shard.open("rb") as file:
            file.seek(span.offset)
            blob = file.read(span.num_bytes)
    except OSError as error:
        raise DataError(f"cannot read {shard}: {error.strerror or error}; restore the shard, or index the folder again") from error
    if len(blob) != span.num_bytes:
        raise DataError(
            f"{shard} is truncated: found {len(blob)} of {span.num_bytes} bytes at offset {span.offset}; "
            "restore the shard, or index the folder again"
        )
    return blob


def parse_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 as well as bad JSON
        raise DataError(f"{where}: found text that is not JSON ({error}), expected one JSON object per record") from error


def check_sha256(blob: bytes, media: Media, where: str) -> None:
    """Raises DataError where `blob` is not what the record's checksum says."""
    if media.sha256 is not None and hashlib.sha256(blob).hexdigest() != media.sha256:
        raise DataError(f"{where}: the bytes of {media.address} do not match their sha256 in the record: damaged; restore the shard")


def encode_sample(key: str, record: Record, blobs: Iterable[bytes | None]) -> dict[str, str | bytes]:
    """A webdataset sample of `record` and the bytes of its media, in order; the record is made to name them as members.

    A medium of which None is given stays where it is.
    """
    sample: dict[str, str | bytes] = {"__key__": key}
    stored = []
    for number, (media, blob) in enumerate(zip(record.media, blobs, strict=True)):
        if blob is None:
            stored.append(media)
            continue
        member = f"{number}.{_extension(media)}"
        sample[member] = blob
        stored.append(replace(media, origin="member", address=member, sha256=hashlib.sha256(blob).hexdigest()))
    text = json.dumps(record_to_json(_with_media(record, stored)), ensure_ascii=False, separators=(",", ":"))
    return sample | {RECORD_EXTENSION: text.encode()}


def _with_media(record: Record, media: list[Media]) -> Record:
    """`record` with its media replaced, in order."""
    following = iter(media)
    messages = tuple(replace(m, parts=tuple(p if isinstance(p, str) else next(following) for p in m.parts)) for m in record.messages)
    document = tuple(p if isinstance(p, str) else next(following) for p in record.document)
    return replace(record, messages=messages, document=document)


def _extension(media: Media) -> str:
    if media.origin == "inline":
        mime = media.address[len("data:") :].partition(";")[0].partition(",")[0]
        name = mime.partition("/")[2]
    else:
        name = PurePosixPath(media.address).suffix[1:]
    name = name.lower()
    return name if name.isalnum() and name != RECORD_EXTENSION else "bin"


def _members(shard: Path) -> Iterator[tuple[str, Span]]:
    """(name, bytes) of every file of a tar, and a check that the tar is whole."""
    try:
        with tarfile.open(shard, "r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + (member.size if member.isfile() else 0)
                if member.isfile():
                    yield member.name, Span(member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} is not a whole tar file: {error}; restore it or write it again") from error
    _expect_end_blocks(shard, end)


def _expect_end_blocks(shard: Path, end: int) -> None:
    """A tar ends in zero blocks: without them, members may be missing that tarfile does not miss."""
    first_block = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    with shard.open("rb") as file:
        file.seek(first_block)
        tail = file.read(2 * tarfile.BLOCKSIZE)
    if tail != bytes(2 * tarfile.BLOCKSIZE):
        raise DataError(f"{shard} is truncated: it does not end as a tar file does; restore it, or write it again")
