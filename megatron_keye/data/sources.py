"""Where a loader gets its samples: what every source offers, and the one that reads in threads of this process."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from megatron_keye.contract.media import SampleShape
from megatron_keye.data.tokenize import TokenizedSample
from megatron_keye.errors import DataError


@dataclass(frozen=True, eq=False)
class LoadedSample:
    """A sample's tokens, and uint8 [num_patches, 588] of each of its attention segments, in order."""

    tokens: TokenizedSample
    patches: list[np.ndarray]


@dataclass(frozen=True)
class MediaCounts:
    """Images and videos with their pixels from servers, or decoded here in place of that; requests that failed, and second ones to
    another server because the first was slow. All 0 where no servers are used."""

    remote: int = 0
    local: int = 0
    failed: int = 0
    hedged: int = 0

    def since(self, before: "MediaCounts") -> "MediaCounts":
        return MediaCounts(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


NO_MEDIA = MediaCounts()


@dataclass(frozen=True)
class LoadCounts:
    """What a source did since it was made. `bytes_read` are those of shards and of media at web addresses, as they are stored."""

    samples: int
    bytes_read: int
    worker_failures: int = 0
    media: MediaCounts = NO_MEDIA


class Samples(Protocol):
    """Numbered samples that can be read one by one, such as a `Dataset`."""

    def tokens(self, sample: int) -> TokenizedSample: ...

    def pixels(self, sample: int) -> list[np.ndarray]: ...

    def sample_id(self, sample: int) -> str: ...


Requests = Sequence[tuple[int, SampleShape]]
"""Samples, and the shapes that they were planned with."""
Results = list[LoadedSample | DataError]


class Source(Protocol):
    """Reads samples, `threads` at a time. Every method may be called from several threads."""

    threads: int

    def read(self, sample: int, shape: SampleShape) -> LoadedSample:
        """One sample, which was planned with `shape`. Raises DataError where it cannot be read, now or ever."""
        ...

    def read_group(self, samples: Requests) -> Results:
        """Several small samples at once, in order; a DataError in the place of one that cannot be read."""
        ...

    def sample_id(self, sample: int) -> str: ...

    def counts(self) -> LoadCounts: ...

    def close(self) -> None:
        """Return soon: what is being read is not wanted any more."""
        ...


def read_each(read: Callable[[int, SampleShape], LoadedSample], samples: Requests) -> Results:
    """`Source.read_group` of a source to which it makes no difference."""
    results: Results = []
    for sample, shape in samples:
        try:
            results.append(read(sample, shape))
        except DataError as error:
            results.append(error)
    return results


class ThreadSource:
    """Reads in the threads that ask, in at most `threads` at a time. `bytes_read` says how many bytes `samples` has read so far."""

    def __init__(self, samples: Samples, threads: int, bytes_read: Callable[[], int] = lambda: 0):
        self._samples, self.threads, self._bytes_read = samples, threads, bytes_read
        self._reading = threading.Semaphore(threads)
        self._lock = threading.Lock()
        self._num_samples = 0

    def read(self, sample: int, shape: SampleShape) -> LoadedSample:
        with self._lock:
            self._num_samples += 1
        with self._reading:
            return LoadedSample(self._samples.tokens(sample), self._samples.pixels(sample))

    def read_group(self, samples: Requests) -> Results:
        return read_each(self.read, samples)

    def sample_id(self, sample: int) -> str:
        return self._samples.sample_id(sample)

    def counts(self) -> LoadCounts:
        return LoadCounts(self._num_samples, self._bytes_read())

    def close(self) -> None:
        """Nothing to do: a sample that is being read is read to its end."""
