"""The index beside the shards: tables that can be memory-mapped, and a JSON file that says what they were made with.

Planning reads nothing else: text token counts, native sizes, slow-fast tags, and where every byte is.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.fit import SampleFacts
from megatron_keye.data.items import Frames, Item, MediaRules
from megatron_keye.data.locations import open_store
from megatron_keye.data.media.video import DECODER_ID
from megatron_keye.data.places import Member, Place, WebAddress
from megatron_keye.data.shards import Span
from megatron_keye.data.storage import DEFAULT_STORAGE, LocalStore, Store
from megatron_keye.data.template import TEMPLATE_VERSION
from megatron_keye.errors import DataError
from megatron_keye.plan.table import SampleTable

if TYPE_CHECKING:
    from megatron_keye.data.web_media import WebMedia

FORMAT_VERSION = 3
INDEX_FOLDER = "index"
META_FILE = "index.json"
IMAGE, VIDEO = 0, 1
ITEM_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width", "total_pixels", "fps", "max_frames")
"""Columns of the item table for wishes of the record; 0 where it has none."""

CLIP_COLUMNS = ("clip_frames", "clip_fps", "num_frames", "min_pixels", "total_pixels", "fps", "max_frames")
"""Columns of the item table that decide which frames of a video are sampled, and how many were."""

TABLES = {
    "samples": np.dtype(
        [
            ("shard", "<i4"),
            ("record_offset", "<i8"),
            ("record_bytes", "<i8"),
            ("record_crc32", "<u4"),
            ("name_start", "<i8"),  # of "key\nid" in the names table
            ("name_bytes", "<i4"),
            ("first_item", "<i8"),
            ("num_items", "<i4"),
            ("first_segment", "<i8"),
            ("num_segments", "<i4"),
            ("tail_tokens", "<i4"),  # text after the last attention segment
            ("supervised_tokens", "<i4"),
            ("first_supervised", "<i4"),  # -1 where nothing is
            ("task", "<i4"),  # number in the list of the JSON file, -1 for none
            ("source", "<i4"),
        ]
    ),
    "items": np.dtype(
        [
            ("kind", "<u1"),
            ("web", "<i8"),  # row in the web table, -1 for a member of the shard
            ("offset", "<i8"),  # in the shard
            ("num_bytes", "<i8"),
            ("height", "<i4"),
            ("width", "<i4"),
            ("first_frame", "<i8"),
            ("num_frames", "<i4"),
            ("rate", "<f8"),
            ("clip_frames", "<i8"),
            ("clip_fps", "<f8"),
            *((name, "<f8") for name in ITEM_OPTIONS),
        ]
    ),
    # All that planning reads of a sample: its tokens, and its runs of attention segments. Apart, as every rank goes through it.
    "shapes": np.dtype([("tokens", "<i4"), ("num_runs", "<i4"), ("first_run", "<i8")]),
    "runs": np.dtype([("patches", "<i4"), ("segments", "<i4")]),  # of attention segments of like size, under the rules of the index
    "web": np.dtype([("sha256", "V32")]),  # of media at web addresses, which are in the records
    "gaps": np.dtype("<i4"),  # text tokens before each attention segment
    "frames": np.dtype([("number", "<i4"), ("timestamp_s", "<f4"), ("tag", "<u1")]),
    "names": np.dtype("<u1"),
}


@dataclass(frozen=True, slots=True)
class Made:
    """What an index was made with. Of the media rules, those that decide about frames must be a run's; sizes may differ."""

    variant: str
    tokenizer: str
    """Fingerprint."""
    template: int
    decoder: str
    image: Mapping[str, Any]
    """Limits of images, in tokens."""
    video: Mapping[str, Any]
    """`VideoRules` as a dict."""


def made_with(tokenizer_fingerprint: str, rules: MediaRules) -> Made:
    """What an index is made with here and now, to store in it or to compare with it."""
    return Made(
        variant=rules.variant,
        tokenizer=tokenizer_fingerprint,
        template=TEMPLATE_VERSION,
        decoder=DECODER_ID,
        image={"min_tokens": rules.image_min_tokens, "max_tokens": rules.image_max_tokens},
        video=asdict(rules.video),
    )


class Index:
    """A read-only view of an index. Its arrays are memory-mapped; all methods may be called from several threads."""

    def __init__(self, store: Store, web: "WebMedia | None", meta: dict[str, Any], tables: Mapping[str, np.ndarray]):
        """`web` reads media at web addresses; None where there are none."""
        self.store = store
        """Holds the shards."""
        self._web = web
        self._meta = meta
        self._tables = tables
        self._shards = [shard["name"] for shard in meta["shards"]]
        self.fingerprint = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        """Over everything in the index: the JSON file holds checksums of the tables."""
        self.made = Made(**meta["made"])

    def __len__(self) -> int:
        return len(self._tables["samples"])

    def shard(self, sample: int) -> str:
        """Name of the shard that holds the sample."""
        return self._shards[self._tables["samples"]["shard"][sample]]

    def record_span(self, sample: int) -> Span:
        row = self._tables["samples"][sample]
        return Span(int(row["record_offset"]), int(row["record_bytes"]))

    def record_crc32(self, sample: int) -> int:
        """Checksum of the record's JSON."""
        return int(self._tables["samples"]["record_crc32"][sample])

    def payload_crc32(self, sample: int) -> int:
        """Checksum of all that the sample is made of: the record's JSON, which has the SHA-256 of members, and that of web media."""
        checksum = self.record_crc32(sample)
        for number in self._item_rows(sample)["web"].tolist():
            checksum = checksum if number < 0 else zlib.crc32(self._web_sha256(number), checksum)
        return checksum

    def media_places(self, sample: int) -> list[Place]:
        shard = self.shard(sample)
        return [
            Member(self.store, shard, Span(int(item["offset"]), int(item["num_bytes"])))
            if item["web"] < 0
            else WebAddress(self._web, self._web_sha256(item["web"]).hex())
            for item in self._item_rows(sample)
        ]

    def bytes_read(self) -> int:
        """Of shards, and of media at web addresses, so far."""
        return self.store.bytes_read() + (0 if self._web is None else self._web.bytes_read())

    def key_and_id(self, sample: int) -> tuple[str, str]:
        """The sample's key in its shard and the id of its record."""
        row = self._tables["samples"][sample]
        start = row["name_start"]
        key, _, record_id = self._tables["names"][start : start + row["name_bytes"]].tobytes().decode().partition("\n")
        return key, record_id

    def task(self, sample: int) -> str | None:
        return self._listed("tasks", "task", sample)

    def source(self, sample: int) -> str | None:
        return self._listed("sources", "source", sample)

    def source_sizes(self, samples: np.ndarray, unnamed: str) -> Counter[str]:
        """Samples of each source among `samples`, int64 [n]; those that name none are of the source `unnamed`."""
        numbers, counts = np.unique(self._tables["samples"]["source"][samples], return_counts=True)
        names = (unnamed if number < 0 else self._meta["sources"][number] for number in numbers.tolist())
        sizes: Counter[str] = Counter()
        for name, count in zip(names, counts.tolist(), strict=True):
            sizes[name] += count
        return sizes

    def supervised_tokens(self, sample: int) -> int:
        return int(self._tables["samples"]["supervised_tokens"][sample])

    def full_table(self) -> SampleTable:
        """What planning knows of every sample under the media rules that the index was made with, where it is not cut."""
        shapes, runs = self._tables["shapes"], self._tables["runs"]
        return SampleTable(shapes["tokens"], shapes["first_run"], shapes["num_runs"], runs["patches"], runs["segments"])

    def with_video(self) -> np.ndarray:
        """bool [len]: whether a sample has a video."""
        samples = self._tables["samples"]
        videos_before = np.concatenate([[0], np.cumsum(self._tables["items"]["kind"] == VIDEO)])
        return videos_before[samples["first_item"] + samples["num_items"]] > videos_before[samples["first_item"]]

    @property
    def shard_bytes(self) -> int:
        """Of all shards together."""
        return sum(shard["bytes"] for shard in self._meta["shards"])

    def distinct_clips(self) -> Iterator[tuple[int, Item]]:
        """Yields the videos that differ in what decides which frames are sampled, each with a sample that has it."""
        items = self._tables["items"]
        videos = np.flatnonzero(items["kind"] == VIDEO)
        columns = np.stack([items[name][videos].astype(np.float64) for name in CLIP_COLUMNS], axis=1)
        _, first = np.unique(columns, axis=0, return_index=True)
        for number in videos[np.sort(first)]:
            sample = int(np.searchsorted(self._tables["samples"]["first_item"], number, side="right")) - 1
            yield sample, self._item(items[number])

    def facts(self, sample: int) -> SampleFacts:
        """What `fit` decides from."""
        row = self._tables["samples"][sample]
        first_segment, first_supervised = int(row["first_segment"]), int(row["first_supervised"])
        gaps = self._tables["gaps"][first_segment : first_segment + int(row["num_segments"])]
        items = tuple(self._item(item) for item in self._item_rows(sample))
        return SampleFacts(items, tuple(gaps.tolist()), int(row["tail_tokens"]), None if first_supervised < 0 else first_supervised)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(place, reason) of samples in the shards that are not in the index."""
        return [(place, reason) for place, reason in self._meta["skipped"]]

    def _listed(self, names: str, column: str, sample: int) -> str | None:
        number = int(self._tables["samples"][column][sample])
        return None if number < 0 else self._meta[names][number]

    def _web_sha256(self, number: int) -> bytes:
        return self._tables["web"]["sha256"][number].tobytes()

    def _item_rows(self, sample: int) -> np.ndarray:
        row = self._tables["samples"][sample]
        return self._tables["items"][int(row["first_item"]) : int(row["first_item"]) + int(row["num_items"])]

    def _item(self, row: np.void) -> Item:
        options = {name: float(row[name]) for name in ITEM_OPTIONS if row[name]}
        frames = None
        if row["kind"] == VIDEO:
            first = int(row["first_frame"])
            table = self._tables["frames"][first : first + int(row["num_frames"])]
            columns = (np.ascontiguousarray(table[name]) for name in ("number", "timestamp_s", "tag"))
            frames = Frames(*columns, float(row["rate"]), int(row["clip_frames"]), float(row["clip_fps"]))
        return Item(int(row["height"]), int(row["width"]), options, frames)


def open_index(location: str | Path, storage: StorageConfig = DEFAULT_STORAGE) -> Index:
    """The index of the data set at a folder or URL. Raises DataError where it is absent or damaged, or a shard is missing or has
    another length than when it was indexed; else as `open_store` does."""
    store = open_store(location, storage)
    remedy = f"run data_tools/index_shards.py {location if isinstance(store, LocalStore) else 'FOLDER'}"
    address = store.address(INDEX_FOLDER)

    def verify(folder: Path) -> None:
        """Raises DataError where a table that was fetched is not the one that was written."""
        meta = _read_meta(folder, address, remedy)
        for name, expected in meta["sha256"].items():
            if hashlib.sha256(np.load(folder / f"{name}.npy", allow_pickle=False)).hexdigest() != expected:
                raise ValueError(f"{name}.npy does not have the checksum that {META_FILE} gives it")

    try:
        path = store.folder_here(INDEX_FOLDER, [META_FILE, *(f"{name}.npy" for name in TABLES)], verify)
        meta = _read_meta(path, address, remedy)
        tables = {name: _open_table(path, name, meta["rows"][name]) for name in TABLES}
        index = Index(store, _open_web(storage) if len(tables["web"]) else None, meta, tables)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the index at {address} is damaged ({type(error).__name__}: {error}); {remedy} again") from error
    store.check_lengths({shard["name"]: shard["bytes"] for shard in meta["shards"]}, remedy)
    return index


def _open_web(storage: StorageConfig) -> "WebMedia":
    from megatron_keye.data.web_media import WebMedia  # loads what other sets do not need

    return WebMedia(storage)


def _read_meta(folder: Path, address: str, remedy: str) -> dict[str, Any]:
    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    if meta["format"] != FORMAT_VERSION:
        raise DataError(f"{address} has format {meta['format']}, expected {FORMAT_VERSION}; {remedy} again")
    return meta


def _open_table(path: Path, name: str, num_rows: int) -> np.ndarray:
    file = path / f"{name}.npy"
    # An empty array cannot be memory-mapped.
    table = np.load(file, mmap_mode="r" if num_rows else None, allow_pickle=False)
    if table.dtype != TABLES[name] or table.shape != (num_rows,):
        raise ValueError(f"{file} does not have {num_rows} rows of the {name} table's columns")
    return table
