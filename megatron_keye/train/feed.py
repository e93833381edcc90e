"""The stream of step batches on one rank.

1. A background thread plans the coming steps from the cursor, lays out this rank's batches and, on a replica's leader, reads and
   decodes them ahead, within a number of steps and a budget of bytes. It issues no collectives.
2. `next_step` takes the next one in the main thread; all ranks agree on the plan; and every rank gets from its replica's leader what
   it needs of rows and pixels, which fill the batch.

Nothing here has state worth saving: the cursor that comes with a step says where the step after it begins.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from megatron_keye.config.schema import RunConfig
from megatron_keye.contract.rows import num_supervised
from megatron_keye.data.delivery import parcel_bytes, parcels, unpack
from megatron_keye.data.loader import ReplicaData, ReplicaLoader, SkippedSample, patch_counts, replica_pixel_bytes
from megatron_keye.data.sources import NO_MEDIA, MediaCounts
from megatron_keye.data.transport import Parcels, Transport
from megatron_keye.errors import SettingsError
from megatron_keye.model.decoder_config import PRECISION
from megatron_keye.parallel.groups import Groups
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.digest import NO_TABLE, plan_table
from megatron_keye.plan.types import ReplicaPlan, StepPlan
from megatron_keye.train.batch import BatchLayout, StepBatch, fill, lay_out
from megatron_keye.train.consensus import agree, from_all_ranks
from megatron_keye.train.placement import PlanAt


@dataclass(frozen=True)
class FedStep:
    """One step ready to run: its plan, this replica's share of it, the cursor after it, this rank's batch, what any replica had to
    skip, and how long it took to get.

    `bytes_read` are those of shards that this rank read for the step, `loader_bytes` what it held decoded when it took the step, steps
    read ahead included, `media` where its pixels came from; 0 except on leaders.
    """

    plan: StepPlan
    share: ReplicaPlan
    after: Cursor
    batch: StepBatch
    skipped: list[SkippedSample]
    wait_s: float
    bytes_read: int
    loader_bytes: int
    media: MediaCounts = NO_MEDIA


@dataclass
class _Prepared:
    """`patch_counts`, per round, and `parcel_bytes` are those of each rank of the replica. `data`, the `parcels` that it is sent in, and
    `num_supervised`, the supervised tokens in it, are the leader's; None and 0 elsewhere."""

    plan: StepPlan
    share: ReplicaPlan
    after: Cursor
    table: np.ndarray
    layout: BatchLayout
    patch_counts: list[list[int]]
    parcel_bytes: list[int]
    data: ReplicaData | None
    parcels: Parcels | None
    num_supervised: int
    pixel_bytes: int


class Feed:
    """Steps from `cursor` on. `loader` is this replica's, and None except on its leader."""

    def __init__(
        self, config: RunConfig, groups: Groups, plan_at: PlanAt, loader: ReplicaLoader | None, transport: Transport, cursor: Cursor,
        device: torch.device,
    ):  # fmt: skip
        self._config, self._groups, self._plan_at, self._loader = config, groups, plan_at, loader
        self._transport, self._device = transport, device
        self._queue: deque[_Prepared | Exception] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._prepare_ahead, args=(cursor,), name="feed", daemon=True)
        self._thread.start()

    def next_step(self) -> FedStep:
        """The next step; all ranks must call it together. Raises on every rank when any rank could not prepare it."""
        began_s = time.perf_counter()
        prepared, loader_bytes = self._take()
        failure = prepared if isinstance(prepared, Exception) else None
        table = NO_TABLE if failure else prepared.table
        own_skipped = [] if failure or prepared.data is None else prepared.data.skipped
        counts = (0 if failure else prepared.num_supervised, len(own_skipped))
        num_supervised, num_skipped = agree(table, counts, failure, self._groups.world, self._device)
        skipped = from_all_ranks(own_skipped, self._groups.world) if num_skipped else []
        batch = self._deliver(prepared, num_supervised)
        data = prepared.data
        bytes_read, media = (0, NO_MEDIA) if data is None else (data.bytes_read, data.media)
        wait_s = time.perf_counter() - began_s
        return FedStep(prepared.plan, prepared.share, prepared.after, batch, skipped, wait_s, bytes_read, loader_bytes, media)

    def close(self) -> None:
        """End the background thread, and with it what it was decoding, within the time that one sample takes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._loader is not None:
            self._loader.close()
        self._thread.join()

    def _prepare_ahead(self, cursor: Cursor) -> None:
        """Runs in the background until closed, or until a step fails: the exception then stands in the queue in its place."""
        try:
            while True:
                plan, after = self._plan_at(cursor)
                share = plan.replicas[self._groups.coordinate("dp")]
                check_budgets(share, f"step {plan.step}, replica {self._groups.coordinate('dp')}", self._config)
                if not self._wait_for_room(replica_pixel_bytes(share)):
                    return
                self._put(self._prepare(plan, share, after))
                cursor = after
        except Exception as error:
            self._put(error)

    def _prepare(self, plan: StepPlan, share: ReplicaPlan, after: Cursor) -> "_Prepared":
        grid = self._groups.grid
        layout, counts = lay_out(share, self._config, self._groups, self._device), patch_counts(share, grid.replica_size)
        sizes = parcel_bytes(share, counts, grid)
        data = None if self._loader is None else self._loader.load(share)
        sent, supervised = (None, 0) if data is None else (parcels(data, share, grid), count_supervised(share, data))
        return _Prepared(plan, share, after, plan_table(plan), layout, counts, sizes, data, sent, supervised, replica_pixel_bytes(share))

    def _wait_for_room(self, pixel_bytes: int) -> bool:
        """Block until another step may be decoded; False when the feed was closed instead."""
        limits = self._config.data

        def has_room() -> bool:
            fits = self._queued_bytes + pixel_bytes <= limits.prefetch_bytes
            return self._closed or not self._queue or (fits and len(self._queue) < limits.prefetch_steps)

        with self._changed:
            self._changed.wait_for(has_room)
            return not self._closed

    def _put(self, item: "_Prepared | Exception") -> None:
        with self._changed:
            self._queue.append(item)
            self._queued_bytes += item.pixel_bytes if isinstance(item, _Prepared) else 0
            self._changed.notify_all()

    def _take(self) -> "tuple[_Prepared | Exception, int]":
        """The next item, and the bytes that are held in it and those behind it."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue)
            held_bytes = sum(item.data.num_bytes for item in self._queue if isinstance(item, _Prepared) and item.data is not None)
            item = self._queue.popleft()
            self._queued_bytes -= item.pixel_bytes if isinstance(item, _Prepared) else 0
            self._changed.notify_all()
            return item, held_bytes

    def _deliver(self, prepared: _Prepared, num_supervised: int) -> StepBatch:
        grid, rank, share = self._groups.grid, self._groups.replica_rank, prepared.share
        received = self._transport.scatter(prepared.parcels, prepared.parcel_bytes)
        rows, patches = unpack(received, share, prepared.patch_counts, grid, rank)
        return fill(prepared.layout, rows, patches, num_supervised, self._device)


def count_supervised(replica: ReplicaPlan, data: ReplicaData) -> int:
    """Supervised tokens of what was loaded: the labels say, not the index, so that a skipped sample has none."""
    return sum(num_supervised(tokens, row.cu_seqlens) for tokens, row in zip(data.rows, replica.rows, strict=True))


def check_budgets(replica: ReplicaPlan, place: str, config: RunConfig) -> None:
    """Raise SettingsError, naming the `place`, where a replica's pixels or visual embeddings of one step exceed their budget."""
    row_bytes = config.model.decoder.hidden_size * PRECISION[config.train.precision].itemsize
    pixels = replica_pixel_bytes(replica)
    if pixels > config.data.prefetch_bytes:
        raise SettingsError(
            f"{place}: its pixels take {pixels:,} bytes, and data.prefetch_bytes is {config.data.prefetch_bytes:,}; "
            "raise that budget or lower data.global_batch_samples or the media limits"
        )
    slab = _visual_tokens(replica) * row_bytes // config.parallel.cp
    if slab > config.encode.slab_bytes:
        raise SettingsError(
            f"{place}: the visual embeddings of a rank take about {slab:,} bytes, and encode.slab_bytes is "
            f"{config.encode.slab_bytes:,}; raise that budget, use more context-parallel ranks or a smaller global batch"
        )


def _visual_tokens(replica: ReplicaPlan) -> int:
    return sum(document.shape.num_visual_tokens for row in replica.rows for document in row.documents)
