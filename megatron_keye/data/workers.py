"""Worker processes that read and decode for one replica's leader.

A worker may die, hang or run out of memory: that costs one more try in a new process. The second time, the sample is to blame.
Results come back in memory files, so pixels are never copied through a pipe. `worker.py` is the other side.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_keye.config.schema import DataConfig, LoaderConfig, Variant
from megatron_keye.contract.media import PATCH_VALUES, SampleShape
from megatron_keye.data import messages
from megatron_keye.data.limits import WORKER_ENVIRONMENT
from megatron_keye.data.slabs import Slab
from megatron_keye.data.sources import LoadCounts, LoadedSample, Requests, Results, read_each
from megatron_keye.data.tokenize import TokenizedSample
from megatron_keye.data.worker import TOKEN_BYTES, result_bytes
from megatron_keye.errors import DataError, KeyeError, MediumUnreachableError, SettingsError, UnreachableError, UnsupportedError

WORKER_COMMAND = (sys.executable, "-m", "megatron_keye.data.decode_worker")
START_TIMEOUT_S = 120.0
CLOSE_GRACE_S = 2.0
"""What is being read when a source is closed may finish within this time; its worker is killed after it."""


@dataclass(frozen=True)
class SampleSet:
    """A data set that workers open. `fingerprint` is that of the parent's, which theirs must have too."""

    location: str
    variant: Variant
    data: DataConfig
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        return {"location": self.location, "variant": self.variant, "data": self.data.model_dump(mode="json")}


class WorkerFailed(Exception):
    """A worker gave no answer; the text says why, to follow "it"."""


class Worker:
    """A place for one process, which is started again whenever it is lost. For one thread at a time, except for `kill`."""

    def __init__(self, spawn: Callable[[], tuple[subprocess.Popen, socket.socket]], fingerprints: list[str], deadline_s: float):
        self._spawn, self._fingerprints, self._deadline_s = spawn, fingerprints, deadline_s
        self._process, self._sock = spawn()
        self._is_ready = self._is_lost = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: dict[str, Any], slab: Slab) -> dict[str, Any]:
        """The answer to one job. Raises WorkerFailed, and has a new process the next time; KeyeError where none can be started."""
        self._make_ready()
        self._sock.settimeout(self._deadline_s)
        try:
            messages.send(self._sock, job, slab.fd)
            reply, _ = messages.receive(self._sock)
        except TimeoutError:
            self.end()
            raise WorkerFailed(f"took more than {self._deadline_s:g} s (data.loader.worker_deadline_s)") from None
        except messages.Closed:
            raise WorkerFailed(self.end(grace_s=1.0)) from None
        if reply.get("error") == "oom":
            self.end(grace_s=1.0)
            raise WorkerFailed(f"ran out of memory (data.loader.worker_memory_bytes): {reply['message'][:200]}")
        return reply

    def kill(self) -> None:
        """Have whoever waits for an answer see WorkerFailed."""
        self._process.kill()

    def end(self, grace_s: float = 0.0) -> str:
        """End the process, which may do so by itself within `grace_s`; how it ended, in words."""
        self._is_lost = True
        self._sock.close()
        try:
            code = self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _make_ready(self) -> None:
        """Raises KeyeError where two processes in turn do not start, SettingsError where one finds other data."""
        for is_last in (False, True):
            if self._is_lost:
                self._process, self._sock = self._spawn()
                self._is_ready = self._is_lost = False
            if self._is_ready:
                return
            try:
                self._sock.settimeout(START_TIMEOUT_S)
                self._check(messages.receive(self._sock)[0])
                self._is_ready = True
                return
            except (messages.Closed, TimeoutError):
                how = self.end(grace_s=1.0)
                if is_last:
                    raise KeyeError(f"a decode worker {how} before it was ready; what it wrote to stderr says why") from None

    def _check(self, hello: dict[str, Any]) -> None:
        if "error" in hello:
            self.end()
            raise SettingsError(f"a decode worker cannot open the data: {hello['message']}")
        if hello["fingerprints"] != self._fingerprints:
            self.end()
            raise SettingsError("a decode worker found other data than the run began with: the index was changed meanwhile; start again")


class DecodeWorkers:
    """The worker processes of one leader, for all of its data sets. They start at once and get ready beside the caller."""

    def __init__(self, sets: Sequence[SampleSet], settings: LoaderConfig, command: tuple[str, ...] = WORKER_COMMAND):
        self._setup = {"sets": [s.to_json() for s in sets], "memory_bytes": settings.worker_memory_bytes}
        self._command = command
        # A worker is killed by the kernel when the thread that started it ends, so this one lives as long as the pool.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="worker-start")
        fingerprints = [s.fingerprint for s in sets]
        self.workers = [Worker(self._spawn, fingerprints, settings.worker_deadline_s) for _ in range(settings.workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """One of the workers, to use alone; waits until one is idle."""
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all workers. Sources must have been closed."""
        for worker in self.workers:
            worker.end()
        self._starter.shutdown()

    def _spawn(self) -> tuple[subprocess.Popen, socket.socket]:
        return self._starter.submit(self._spawn_here).result()

    def _spawn_here(self) -> tuple[subprocess.Popen, socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = (*self._command, str(theirs.fileno()), str(os.getpid()))
            environment = os.environ | WORKER_ENVIRONMENT
            process = subprocess.Popen(arguments, pass_fds=(theirs.fileno(),), env=environment, stdin=subprocess.DEVNULL)
        with suppress(messages.Closed):  # whoever waits for it to be ready sees that it is gone
            messages.send(ours, self._setup)
        return process, ours


class WorkerSource:
    """Samples of one of the pool's data sets. Replies come in any order; each belongs to the call that asked."""

    def __init__(self, pool: DecodeWorkers, set_number: int, sample_id: Callable[[int], str]):
        self._pool, self._set_number, self.sample_id = pool, set_number, sample_id
        self.threads = len(pool.workers)
        self._changed = threading.Condition()
        self._asked: set[Worker] = set()
        self._is_closed = False
        self._counts = LoadCounts(0, 0)

    def read(self, sample: int, shape: SampleShape) -> LoadedSample:
        """As `Source.read`. Raises DataError also where two workers in turn failed on the sample."""
        requests, slab = [(sample, shape)], Slab(_num_bytes(shape))
        with self._idle_worker() as worker:
            reply = self._ask(worker, self._job(requests), slab)
        (result,) = self._results(requests, reply, slab)
        if isinstance(result, DataError):
            raise result
        return result

    def read_group(self, samples: Requests) -> Results:
        """As `Source.read_group`. Where a worker is lost over a group, each sample of it is read alone, and so the one to blame found."""
        slab = Slab(sum(_num_bytes(shape) for _, shape in samples))
        with self._idle_worker() as worker:
            self._check_open()
            try:
                reply = worker.ask(self._job(samples), slab)
            except WorkerFailed:
                self._count(worker_failures=1)
                reply = None
        return read_each(self.read, samples) if reply is None else self._results(samples, reply, slab)

    def _job(self, samples: Requests) -> dict[str, Any]:
        return {"set": self._set_number, "samples": [[sample, shape.num_tokens, shape.num_patches] for sample, shape in samples]}

    def _results(self, samples: Requests, reply: dict[str, Any], slab: Slab) -> Results:
        """Raises what is wrong with more than a sample."""
        self._count(samples=len(samples), bytes_read=reply["bytes_read"])
        failed = {place: _error(code, message) for place, code, message in reply["failed"]}
        for error in failed.values():
            if not isinstance(error, DataError):
                raise error
        ends = np.cumsum([_num_bytes(shape) for _, shape in samples])
        parts = zip(samples, np.split(slab.view(), ends[:-1]), strict=True)
        return [failed.get(place) or _unpack(payload, shape) for place, ((_, shape), payload) in enumerate(parts)]

    def counts(self) -> LoadCounts:
        return self._counts

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            if not self._changed.wait_for(lambda: not self._asked, CLOSE_GRACE_S):
                for worker in self._asked:
                    worker.kill()

    def _ask(self, worker: Worker, job: dict[str, Any], slab: Slab) -> dict[str, Any]:
        """One more try, by a new process at the same place, when the first is lost."""
        failures: list[str] = []
        while len(failures) < 2:
            self._check_open()
            try:
                return worker.ask(job, slab)
            except WorkerFailed as error:
                failures.append(str(error))
                self._count(worker_failures=1)
        self._check_open()
        raise DataError(
            f"record {self.sample_id(job['samples'][0][0])}: two decode workers in turn failed on it: one {failures[0]}; the other "
            f"{failures[1]}; raise the limit that it names, repair or remove the sample, or set data.bad_sample=skip"
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise KeyeError("the loader was closed while it read a sample")

    @contextmanager
    def _idle_worker(self) -> Iterator[Worker]:
        """A worker that `close` knows of."""
        with self._pool.worker() as worker:
            with self._changed:
                self._asked.add(worker)
            try:
                yield worker
            finally:
                with self._changed:
                    self._asked.discard(worker)
                    self._changed.notify_all()

    def _count(self, samples: int = 0, bytes_read: int = 0, worker_failures: int = 0) -> None:
        with self._changed:
            now = self._counts
            self._counts = LoadCounts(now.samples + samples, now.bytes_read + bytes_read, now.worker_failures + worker_failures)


def _error(code: str, message: str) -> KeyeError:
    """What the worker met, as what it was."""
    kinds = {
        "data": DataError,
        "medium_unreachable": MediumUnreachableError,
        "unreachable": UnreachableError,
        "unsupported": UnsupportedError,
    }
    return kinds.get(code, KeyeError)(message)


def _num_bytes(shape: SampleShape) -> int:
    return result_bytes(shape.num_tokens, shape.num_patches)


def _unpack(payload: np.ndarray, shape: SampleShape) -> LoadedSample:
    """The parts of a worker's answer, not copied."""
    ids_bytes, tokens_bytes = 4 * shape.num_tokens, TOKEN_BYTES * shape.num_tokens
    token_ids, supervised = payload[:ids_bytes].view(np.int32), payload[ids_bytes:tokens_bytes].view(bool)
    patches, start = [], tokens_bytes
    for segment in shape.segments:
        end = start + segment.grid.num_patches * PATCH_VALUES
        patches.append(payload[start:end].reshape(-1, PATCH_VALUES))
        start = end
    return LoadedSample(TokenizedSample(token_ids, supervised, shape), patches)
