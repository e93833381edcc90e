"""Making an index: every record tokenized, every medium looked at, once."""

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from megatron_keye.config.schema import ImageConfig, StorageConfig, Variant, VideoConfig
from megatron_keye.data.describe import describe
from megatron_keye.data.index import made_with
from megatron_keye.data.index_tables import SampleRow, ShardIndex, WebBytes, shard_index, write_index
from megatron_keye.data.items import Item, MediaRules, media_rules, resolve
from megatron_keye.data.record import Media, Record, parse_record
from megatron_keye.data.shards import RECORD_EXTENSION, Span, check_sha256, iter_samples, list_shards, parse_json, read_span
from megatron_keye.data.shared_counts import SharedCount, SharedCounts
from megatron_keye.data.source_media import media_bytes
from megatron_keye.data.storage import DEFAULT_STORAGE
from megatron_keye.data.tokenize import TokenizedSample, tokenize
from megatron_keye.data.tokenizer import KeyeTokenizer, load_tokenizer
from megatron_keye.data.writing import run_jobs
from megatron_keye.errors import DataError

READ_AHEAD = 8
"""Samples of a shard whose media are read, or fetched from the web, at a time."""


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A sample as it is stored: its record, `text`, and the bytes of its media with where they were found."""

    key: str
    where: str
    text: bytes
    text_span: Span
    record: Record
    media: tuple[tuple[bytes, Span | WebBytes], ...]


def index_folder(
    folder: Path,
    tokenizer_folder: Path,
    variant: Variant,
    video: VideoConfig,
    workers: int = 1,
    on_shard: Callable[[ShardIndex], None] = lambda indexed: None,
    storage: StorageConfig = DEFAULT_STORAGE,
    counts: SharedCounts | None = None,
) -> list[ShardIndex]:
    """Index all shards of `folder`; does not write. Samples that cannot be used are in the result, as problems.

    Media at web addresses are fetched as `storage` says, and not kept. `counts`, one for each shard, tell how many samples were looked at.

    Raises DataError for a folder without shards or a damaged shard, SettingsError for the tokenizer or the video settings.
    """
    load_tokenizer(tokenizer_folder, variant)  # its problems are reported before any work is done
    rules = media_rules(ImageConfig(), video, variant)
    shards = list_shards(folder)
    counts = SharedCounts(len(shards)) if counts is None else counts
    jobs = [(shard, tokenizer_folder, rules, storage, counts.of_job(number)) for number, shard in enumerate(shards)]
    done = []
    for indexed in run_jobs(_index_shard, jobs, workers, initializer=_one_thread):
        on_shard(indexed)
        done.append(indexed)
    return sorted(done, key=lambda indexed: indexed.name)


def save_index(folder: Path, tokenizer_folder: Path, variant: Variant, video: VideoConfig, shards: list[ShardIndex]) -> None:
    """Write what `index_folder` found. Raises DataError where no sample can be used."""
    if not any(s.num_samples for s in shards):
        problems = [reason for s in shards for _, reason in s.problems]
        why = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ": the shards are empty"
        raise DataError(f"the data set at {folder} has no usable sample{why}")
    rules = media_rules(ImageConfig(), video, variant)
    write_index(folder, made_with(load_tokenizer(tokenizer_folder, variant).fingerprint, rules), shards)


def _one_thread() -> None:
    """One worker per core is given: threads of their own would only get in each other's way."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _index_shard(shard: Path, tokenizer_folder: Path, rules: MediaRules, storage: StorageConfig, count: SharedCount) -> ShardIndex:
    tokenizer = load_tokenizer(tokenizer_folder, rules.variant)
    rows, problems, looked_at = [], [], count.map()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for (key, _), sample in _read_ahead(pool, partial(_read_sample, shard, storage), iter_samples(shard)):
            place = f"{shard.name}:{key}"
            try:
                rows.append(_index_sample(sample.result(), tokenizer, rules))
            except DataError as error:
                text = str(error)
                problems.append((place, text if text.startswith(place) else f"{place}: {text}"))
            looked_at += 1
    return shard_index(shard.name, shard.stat().st_size, rows, problems)


def _read_ahead(pool: ThreadPoolExecutor, read: Callable, samples: Iterable) -> Iterator[tuple[tuple[str, dict[str, Span]], Future]]:
    """Yields the samples in order, each with what `read` makes of it; at most `READ_AHEAD` are held."""
    waiting: deque = deque()
    for sample in samples:
        if len(waiting) == READ_AHEAD:
            yield waiting.popleft()
        waiting.append((sample, pool.submit(read, sample)))
    yield from waiting


def _read_sample(shard: Path, storage: StorageConfig, sample: tuple[str, dict[str, Span]]) -> ReadSample:
    key, members = sample
    place = f"{shard.name}:{key}"
    if RECORD_EXTENSION not in members:
        raise DataError(f"{place}: found only {sorted(members)}, expected a .{RECORD_EXTENSION} member with the record")
    text = read_span(shard, members[RECORD_EXTENSION])
    record = parse_record(parse_json(text, place), place)
    where = f"{place}, record {record.id}"
    media = tuple(_read_medium(shard, members, medium, where, storage) for medium in record.media)
    return ReadSample(key, where, text, members[RECORD_EXTENSION], record, media)


def _read_medium(
    shard: Path, members: dict[str, Span], medium: Media, where: str, storage: StorageConfig
) -> tuple[bytes, Span | WebBytes]:  # fmt: skip
    if medium.origin == "web":
        blob = media_bytes(medium, shard.parent, where, storage)
        return blob, WebBytes(len(blob), hashlib.sha256(blob).digest())
    if medium.origin != "member" or medium.address not in members:
        raise DataError(
            f"{where}: found {medium.kind} {medium.address:.80}, expected a web address, or one of the members {sorted(members)}"
        )
    blob = read_span(shard, members[medium.address])
    check_sha256(blob, medium, where)
    return blob, members[medium.address]


def _index_sample(read: ReadSample, tokenizer: KeyeTokenizer, rules: MediaRules) -> SampleRow:
    record, items = read.record, _describe_media(read, rules)
    sample = tokenize(record, [resolve(item, rules).layout for item in items], tokenizer, rules.variant)
    return SampleRow(
        key=read.key,
        id=record.id,
        record=read.text_span,
        record_crc32=zlib.crc32(read.text),
        items=items,
        media=tuple(place for _, place in read.media),
        shape=sample.shape,
        supervised_tokens=int(sample.supervised.sum()),
        first_supervised=_first_supervised(sample),
        task=record.task,
        source=record.source,
    )


def _describe_media(read: ReadSample, rules: MediaRules) -> tuple[Item, ...]:
    items = []
    for number, (media, (blob, _)) in enumerate(zip(read.record.media, read.media, strict=True)):
        try:
            items.append(describe(media.kind, blob, media.options, rules))
        except DataError as error:
            raise DataError(f"{read.where}, {media.kind} {number}: {error}") from error
    return tuple(items)


def _first_supervised(sample: TokenizedSample) -> int | None:
    """Text tokens before the first supervised one."""
    positions = np.flatnonzero(sample.supervised)
    if not len(positions):
        return None
    starts = sample.shape.visual_starts()
    visual = sum(s.grid.num_tokens for s, start in zip(sample.shape.segments, starts, strict=True) if start < positions[0])
    return int(positions[0]) - visual
