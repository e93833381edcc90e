"""Faults that programs of this kind have had, put in on purpose: a campaign that does not find them proves nothing."""

import threading
import time
from collections import defaultdict
from dataclasses import replace

from megatron_keye.contract.media import SampleShape
from megatron_keye.data.loader import ReplicaLoader
from megatron_keye.data.mixture import MixedDataset
from megatron_keye.data.sources import LoadCounts, LoadedSample, Requests, Results, Source, ThreadSource, read_each
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.mixture import Mixture
from tests.chaos.rank import WatchedFeed, WatchedTraining

READERS = 4


class FrontierTraining(WatchedTraining):
    """Saves where the loader has come to, not where training has: what was decoded ahead is lost at a restart."""

    def _feed(self, dataset: MixedDataset, cursor: Cursor, mixture: Mixture) -> WatchedFeed:
        self._newest_feed = super()._feed(dataset, cursor, mixture)
        return self._newest_feed

    def _save(self, cursor: Cursor) -> None:
        super()._save(replace(self._newest_feed.newest, step=cursor.step))


class ArrivalOrderSource:
    """Gives the sample that was decoded first to whoever asked first, of all that have the same shape. Every second one is slow."""

    def __init__(self, source: Source):
        self._source, self.threads, self.sample_id = source, source.threads, source.sample_id
        self._changed = threading.Condition()
        self._asked: defaultdict[SampleShape, int] = defaultdict(int)
        self._arrived: defaultdict[SampleShape, list[LoadedSample]] = defaultdict(list)

    def read(self, sample: int, shape: SampleShape) -> LoadedSample:
        with self._changed:
            ticket = self._asked[shape]
            self._asked[shape] += 1
        loaded = self._source.read(sample, shape)
        time.sleep(0.02 * (sample % 2))
        arrived = self._arrived[shape]
        with self._changed:
            arrived.append(loaded)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(arrived) > ticket)
            return arrived[ticket]

    def read_group(self, samples: Requests) -> Results:
        return read_each(self.read, samples)

    def counts(self) -> LoadCounts:
        return self._source.counts()

    def close(self) -> None:
        self._source.close()


class ArrivalOrderTraining(WatchedTraining):
    """Fills its batches in the order in which samples happen to be decoded."""

    def _loader(self, dataset: MixedDataset) -> ReplicaLoader | None:
        if self._loading is None:
            return None
        source = ArrivalOrderSource(ThreadSource(dataset, READERS, dataset.bytes_read))
        return ReplicaLoader(source, pad_id=self.inputs.tokenizer.specials.endoftext, skip_bad=False)


FAULTS: dict[str, type[WatchedTraining]] = {"frontier": FrontierTraining, "arrival": ArrivalOrderTraining}
