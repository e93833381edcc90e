"""Loading one replica's part of a step. Only the replica's leader has a loader; other ranks neither open nor decode anything.

1. `load` reads and decodes every document of the replica's plan through its source: worker processes, servers, or threads.
2. Token ids and supervision are packed into rows, in the places that the plan gives, whatever came first.
3. Pixels are grouped by the rank and round that will encode them.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megatron_keye.contract.media import PATCH_VALUES, SampleShape
from megatron_keye.contract.rows import RowTokens
from megatron_keye.data.sources import NO_MEDIA, LoadCounts, LoadedSample, MediaCounts, Requests, Source, read_each
from megatron_keye.errors import DataError
from megatron_keye.plan.types import EncodeTask, ReplicaPlan, Row

GROUP_SAMPLES = 16
"""Most texts that are asked for at a time."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample whose slot stays in the plan, empty and unsupervised, because it could not be read."""

    sample: int
    sample_id: str
    reason: str


@dataclass(frozen=True)
class ReplicaData:
    """`rows[microbatch]`, and `patches[(encoder, round)]`: uint8 [num_patches, 588] of each of that round's segments.

    `bytes_read` are those of shards that it took, `media` where the pixels came from."""

    rows: list[RowTokens]
    patches: dict[tuple[int, int], list[np.ndarray]]
    skipped: list[SkippedSample]
    bytes_read: int
    media: MediaCounts = NO_MEDIA

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        rows = sum(row.token_ids.nbytes + row.supervised.nbytes for row in self.rows)
        return rows + sum(p.nbytes for patches in self.patches.values() for p in patches)


class ReplicaLoader:
    """Reads documents from `source`. `skip_bad` turns a DataError into an empty slot."""

    def __init__(self, source: Source, *, pad_id: int, skip_bad: bool):
        self._source = source
        self._pad_id = pad_id
        self._pool = ThreadPoolExecutor(source.threads, thread_name_prefix="decode")
        self._skip_bad = skip_bad

    @property
    def counts(self) -> LoadCounts:
        """What was read so far."""
        return self._source.counts()

    def load(self, plan: ReplicaPlan) -> ReplicaData:
        """Everything the replica needs for one step. Raises DataError for a sample that cannot be read, unless it is skipped."""
        before = self.counts
        shapes = {document.sample: document.shape for row in plan.rows for document in row.documents}
        groups = read_together(shapes, self._source.threads)
        results = self._pool.map(self._read_group, [[(sample, shapes[sample]) for sample in group] for group in groups])
        loaded = {sample: result for group, own in zip(groups, results, strict=True) for sample, result in zip(group, own, strict=True)}
        rows = [self._row(row, loaded) for row in plan.rows]
        patches: dict[tuple[int, int], list[np.ndarray]] = {}
        for task in plan.tasks:
            patches.setdefault((task.encoder, task.round), []).append(self._patches_of(task, plan, loaded))
        skipped = [result for result in loaded.values() if isinstance(result, SkippedSample)]
        now = self.counts
        return ReplicaData(rows, patches, skipped, now.bytes_read - before.bytes_read, now.media.since(before.media))

    def close(self) -> None:
        """End what is being read, and the threads. The source may not be used again."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._source.close()
        self._pool.shutdown(wait=True)

    def _read_group(self, samples: Requests) -> list[LoadedSample | SkippedSample]:
        if len(samples) == 1:
            results = read_each(self._source.read, samples)
        else:
            results = self._source.read_group(samples)
        return [self._unless_bad(sample, result) for (sample, _), result in zip(samples, results, strict=True)]

    def _unless_bad(self, sample: int, result: LoadedSample | DataError) -> LoadedSample | SkippedSample:
        if not isinstance(result, DataError):
            return result
        if not self._skip_bad:
            raise result
        return SkippedSample(sample, self._source.sample_id(sample), str(result))

    def _row(self, row: Row, loaded: dict) -> RowTokens:
        token_ids = np.full(row.num_tokens, self._pad_id, dtype=np.int64)
        supervised = np.zeros(row.num_tokens, dtype=bool)
        for document in row.documents:
            result = loaded[document.sample]
            if not isinstance(result, SkippedSample):
                own = slice(document.start, document.start + document.shape.num_tokens)
                token_ids[own], supervised[own] = result.tokens.token_ids, result.tokens.supervised
        return RowTokens(token_ids, supervised)

    def _patches_of(self, task: EncodeTask, plan: ReplicaPlan, loaded: dict) -> np.ndarray:
        document = plan.rows[task.microbatch].documents[task.document]
        result = loaded[document.sample]
        if isinstance(result, SkippedSample):
            return np.zeros((document.shape.segments[task.segment].grid.num_patches, PATCH_VALUES), dtype=np.uint8)
        return result.patches[task.segment]


def loading_cost(bytes_read: int, loader_bytes: int, replica_size: int) -> str:
    """What loading took, in words: on leaders alone, beside what it would take if each of a replica's ranks loaded for itself."""
    took = f"loading: {_in_mb(bytes_read)} read, at most {_in_mb(loader_bytes)} held decoded"
    if replica_size == 1:
        return took
    every = f"{_in_mb(replica_size * bytes_read)} and {_in_mb(replica_size * loader_bytes)}"
    return f"{took}, by one of {replica_size} ranks each; loading on every rank would take {every}"


def _in_mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def read_together(shapes: Mapping[int, SampleShape], threads: int) -> list[list[int]]:
    """Samples by the request that reads them: those with media alone, and first, as they take longest; texts in groups, as a request costs
    more than a short text does, but in so many that every thread has one."""
    texts = [sample for sample, shape in shapes.items() if not shape.segments]
    size = max(1, min(GROUP_SAMPLES, -(-len(texts) // threads)))
    alone = [[sample] for sample, shape in shapes.items() if shape.segments]
    return alone + [texts[start : start + size] for start in range(0, len(texts), size)]


def replica_pixel_bytes(plan: ReplicaPlan) -> int:
    """Bytes of uint8 pixels that `load` decodes for this plan."""
    return sum(document.shape.num_patches * PATCH_VALUES for row in plan.rows for document in row.documents)


def patch_counts(plan: ReplicaPlan, num_ranks: int) -> list[list[int]]:
    """Patches of each rank of the replica, per round: [num_ranks][num_rounds]."""
    counts = [[0] * plan.num_rounds for _ in range(num_ranks)]
    for task in plan.tasks:
        document = plan.rows[task.microbatch].documents[task.document]
        counts[task.encoder][task.round] += document.shape.segments[task.segment].grid.num_patches
    return counts
