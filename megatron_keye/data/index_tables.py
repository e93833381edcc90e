"""Building an index: the samples of one shard become tables, and the tables of all shards become the files of the index."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_keye.contract.media import SampleShape
from megatron_keye.data.index import FORMAT_VERSION, IMAGE, INDEX_FOLDER, ITEM_OPTIONS, META_FILE, TABLES, VIDEO, Made
from megatron_keye.data.items import Item
from megatron_keye.data.shards import Span
from megatron_keye.plan.table import segment_runs

LINKS = (("first_item", "items"), ("first_segment", "gaps"), ("name_start", "names"))
"""Columns of the sample table that count rows of another table."""
LISTS = (("task", "tasks"), ("source", "sources"))
"""Columns of the sample table that number the entries of a list."""


@dataclass(frozen=True, slots=True)
class WebBytes:
    """What was at the web address of a medium."""

    num_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sample, as it was found in a shard. `shape` is its full one, under the rules of the index."""

    key: str
    id: str
    record: Span
    record_crc32: int
    items: tuple[Item, ...]
    media: tuple[Span | WebBytes, ...]
    shape: SampleShape
    supervised_tokens: int
    first_supervised: int | None
    task: str | None
    source: str | None


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The tables of one shard, numbered from 0, and the samples that could not be used, as (place, reason)."""

    name: str
    num_bytes: int
    tables: dict[str, np.ndarray]
    tasks: tuple[str, ...]
    sources: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]

    @property
    def num_samples(self) -> int:
        return len(self.tables["samples"])


def shard_index(name: str, num_bytes: int, rows: Sequence[SampleRow], problems: Sequence[tuple[str, str]]) -> ShardIndex:
    """Tables of the samples of one shard."""
    lists: dict[str, list] = {table: [] for table in TABLES}
    tasks: dict[str, int] = {}
    sources: dict[str, int] = {}
    names = bytearray()
    for row in rows:
        row_name = f"{row.key}\n{row.id}".encode()
        gaps = [segment.gap_tokens for segment in row.shape.segments]
        text_tokens = row.shape.num_tokens - row.shape.num_visual_tokens
        place = (0, row.record.offset, row.record.num_bytes, row.record_crc32, len(names), len(row_name))
        runs = segment_runs(row.shape)
        parts = (len(lists["items"]), len(row.items), len(lists["gaps"]), len(gaps))
        tail_tokens = text_tokens - sum(gaps)
        supervision = (row.supervised_tokens, -1 if row.first_supervised is None else row.first_supervised)
        lists["samples"].append((*place, *parts, tail_tokens, *supervision, _number_of(tasks, row.task), _number_of(sources, row.source)))
        lists["gaps"] += gaps
        lists["shapes"].append((row.shape.num_tokens, len(runs), len(lists["runs"])))
        lists["runs"] += runs
        names += row_name
        for item, found in zip(row.items, row.media, strict=True):
            place = (-1, found.offset) if isinstance(found, Span) else (len(lists["web"]), 0)
            lists["items"].append(_item_row(item, (*place, found.num_bytes), len(lists["frames"])))
            if isinstance(found, WebBytes):
                lists["web"].append((found.sha256,))
            if item.frames is not None:
                lists["frames"] += zip(item.frames.numbers, item.frames.timestamps_s, item.frames.tags, strict=True)
    tables = {table: np.array(lists[table], dtype=dtype) for table, dtype in TABLES.items() if table != "names"}
    tables["names"] = np.frombuffer(bytes(names), dtype=TABLES["names"])
    return ShardIndex(name, num_bytes, tables, tuple(tasks), tuple(sources), tuple(problems))


def merge(shards: Sequence[ShardIndex]) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """The tables of all shards, one after another, and the names of tasks and sources, in order of first appearance."""
    rows_before = dict.fromkeys(TABLES, 0)
    names: dict[str, dict[str, int]] = {name: {} for _, name in LISTS}
    parts: dict[str, list[np.ndarray]] = {table: [] for table in TABLES}
    for number, shard in enumerate(shards):
        tables = {table: rows.copy() for table, rows in shard.tables.items()}
        tables["samples"]["shard"] = number
        for column, table in LINKS:
            tables["samples"][column] += rows_before[table]
        tables["items"]["first_frame"] += rows_before["frames"]
        tables["items"]["web"][tables["items"]["web"] >= 0] += rows_before["web"]
        tables["shapes"]["first_run"] += rows_before["runs"]
        for column, name in LISTS:
            # A sample without a task has number -1, which takes the last entry here.
            renumbered = np.array([*(_number_of(names[name], entry) for entry in _entries(shard, name)), -1], dtype=np.int32)
            tables["samples"][column] = renumbered[tables["samples"][column]]
        for table, rows in tables.items():
            parts[table].append(rows)
            rows_before[table] += len(rows)
    merged = {table: np.concatenate([np.empty(0, TABLES[table]), *parts[table]]) for table in TABLES}
    return merged, list(names["tasks"]), list(names["sources"])


def write_index(folder: Path, made: Made, shards: Sequence[ShardIndex]) -> None:
    """Write the index of `shards`, in this order, to `folder`, in place of an older one."""
    tables, tasks, sources = merge(shards)
    partial, final = folder / f"{INDEX_FOLDER}.partial", folder / INDEX_FOLDER
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, table in tables.items():
        np.save(partial / f"{name}.npy", table, allow_pickle=False)
    meta = {
        "format": FORMAT_VERSION,
        "made": asdict(made),
        "shards": [{"name": s.name, "bytes": s.num_bytes, "samples": s.num_samples} for s in shards],
        "tasks": tasks,
        "sources": sources,
        "rows": {name: len(table) for name, table in tables.items()},
        "sha256": {name: hashlib.sha256(table.tobytes()).hexdigest() for name, table in tables.items()},
        "skipped": [problem for s in shards for problem in s.problems],
    }
    (partial / META_FILE).write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _item_row(item: Item, place: tuple[int, int, int], first_frame: int) -> tuple:
    if item.frames is None:
        clip = (first_frame, 0, 0.0, 0, 0.0)
    else:
        clip = (first_frame, len(item.frames.numbers), item.frames.rate, item.frames.clip_frames, item.frames.clip_fps)
    kind = IMAGE if item.frames is None else VIDEO
    wishes = (item.options.get(name, 0) for name in ITEM_OPTIONS)
    return (kind, *place, item.height, item.width, *clip, *wishes)


def _entries(shard: ShardIndex, name: str) -> tuple[str, ...]:
    return shard.tasks if name == "tasks" else shard.sources


def _number_of(names: dict[str, int], name: str | None) -> int:
    return -1 if name is None else names.setdefault(name, len(names))
