"""Making an index: every record tokenized, every medium looked at, once."""

import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from megatron_keye.config.schema import ImageConfig, Variant, VideoConfig
from megatron_keye.data.index import made_with
from megatron_keye.data.index_tables import SampleRow, ShardIndex, shard_index, write_index
from megatron_keye.data.items import Item, MediaRules, describe, media_rules, resolve
from megatron_keye.data.record import Record, parse_record
from megatron_keye.data.shards import RECORD_EXTENSION, Span, check_sha256, iter_samples, list_shards, parse_json, read_span
from megatron_keye.data.tokenize import TokenizedSample, tokenize
from megatron_keye.data.tokenizer import KeyeTokenizer, load_tokenizer
from megatron_keye.data.writing import run_jobs
from megatron_keye.errors import DataError


def index_folder(
    folder: Path,
    tokenizer_folder: Path,
    variant: Variant,
    video: VideoConfig,
    workers: int = 1,
    on_shard: Callable[[ShardIndex], None] = lambda indexed: None,
) -> list[ShardIndex]:
    """Index all shards of `folder`; does not write. Samples that cannot be used are in the result, as problems.

    Raises DataError for a folder without shards or a damaged shard, SettingsError for the tokenizer or the video settings.
    """
    load_tokenizer(tokenizer_folder, variant)  # its problems are reported before any work is done
    rules = media_rules(ImageConfig(), video, variant)
    jobs = [(shard, tokenizer_folder, rules) for shard in list_shards(folder)]
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


def _index_shard(shard: Path, tokenizer_folder: Path, rules: MediaRules) -> ShardIndex:
    tokenizer = load_tokenizer(tokenizer_folder, rules.variant)
    rows, problems = [], []
    for key, members in iter_samples(shard):
        place = f"{shard.name}:{key}"
        try:
            rows.append(_index_sample(shard, key, members, tokenizer, rules))
        except DataError as error:
            text = str(error)
            problems.append((place, text if text.startswith(place) else f"{place}: {text}"))
    return shard_index(shard.name, shard.stat().st_size, rows, problems)


def _index_sample(shard: Path, key: str, members: dict[str, Span], tokenizer: KeyeTokenizer, rules: MediaRules) -> SampleRow:
    if RECORD_EXTENSION not in members:
        raise DataError(f"{shard.name}:{key}: found only {sorted(members)}, expected a .{RECORD_EXTENSION} member with the record")
    text = read_span(shard, members[RECORD_EXTENSION])
    record = parse_record(parse_json(text, f"{shard.name}:{key}"), f"{shard.name}:{key}")
    items, spans = _describe_media(shard, f"{shard.name}:{key}, record {record.id}", record, members, rules)
    sample = tokenize(record, [resolve(item, rules).layout for item in items], tokenizer, rules.variant)
    return SampleRow(
        key=key,
        id=record.id,
        record=members[RECORD_EXTENSION],
        record_crc32=zlib.crc32(text),
        items=items,
        media=spans,
        shape=sample.shape,
        supervised_tokens=int(sample.supervised.sum()),
        first_supervised=_first_supervised(sample),
        task=record.task,
        source=record.source,
    )


def _describe_media(
    shard: Path, where: str, record: Record, members: dict[str, Span], rules: MediaRules
) -> tuple[tuple[Item, ...], tuple[Span, ...]]:
    items, spans = [], []
    for number, media in enumerate(record.media):
        if media.origin != "member" or media.address not in members:
            raise DataError(f"{where}: found {media.kind} {media.address:.80}, expected one of the members {sorted(members)}")
        span = members[media.address]
        blob = read_span(shard, span)
        check_sha256(blob, media, where)
        try:
            items.append(describe(media.kind, blob, media.options, rules))
        except DataError as error:
            raise DataError(f"{where}, {media.kind} {number}: {error}") from error
        spans.append(span)
    return tuple(items), tuple(spans)


def _first_supervised(sample: TokenizedSample) -> int | None:
    """Text tokens before the first supervised one."""
    positions = np.flatnonzero(sample.supervised)
    if not len(positions):
        return None
    starts = sample.shape.visual_starts()
    visual = sum(s.grid.num_tokens for s, start in zip(sample.shape.segments, starts, strict=True) if start < positions[0])
    return int(positions[0]) - visual
