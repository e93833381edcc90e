"""The front's worker processes: a bounded queue in front of them, limits around them, a new one for each that is lost."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from megatron_keye.config.schema import DecoderName
from megatron_keye.data import messages
from megatron_keye.data.limits import WORKER_ENVIRONMENT
from megatron_keye.data.slabs import Slab
from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.io_server.blobs import DiskCache
from megatron_keye.io_server.protocol import Refused
from megatron_keye.io_server.worker import WorkerLimits

JOBS_PER_WORKER = 5000
"""A worker is replaced after so many, in case a library loses memory."""
START_TIMEOUT_S = 120.0
RESTART_PAUSE_S = 1.0
EXIT_S = 2.0
"""A worker that closed its socket before it was ready ends by itself within this long, with the code that says why."""
SEE_STDERR = "what it wrote to stderr says why"
CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS})
"""Signals by which a process dies of what it does; others are sent from outside."""


def worker_command(decoder: DecoderName) -> tuple[str, ...]:
    """The program that decodes with this decoder, for `PoolSettings.command`."""
    return (sys.executable, "-m", "megatron_keye.io_server.decode", decoder)


async def identify(command: Sequence[str]) -> str:
    """The id of the program's decoder. Raises KeyeError where it gives none: SettingsError where another attempt would end the same."""
    process = await asyncio.create_subprocess_exec(
        *command, "identify", env=os.environ | WORKER_ENVIRONMENT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            text, _ = await process.communicate()
    except TimeoutError as error:
        raise KeyeError(f"the decoder did not say its id within {START_TIMEOUT_S:g} s: {' '.join(command)} identify") from error
    finally:
        _kill(process)
        await process.wait()
    said = text.decode().strip()
    if process.returncode:
        raise _start_error(process.returncode, f"the decoder cannot be used (code {process.returncode}): {said or SEE_STDERR}")
    return said


def _start_error(returncode: int, text: str) -> KeyeError:
    return SettingsError(text) if returncode == SettingsError.exit_code else KeyeError(text)


def _kill(process: asyncio.subprocess.Process) -> None:
    """Not by `process.kill`, which polls first: a process that has just ended would then have no code for asyncio, which complains."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


class WorkerDied(Exception):
    """A worker ended without an answer. `crashed` says that it was its own doing."""

    def __init__(self, returncode: int):
        super().__init__(f"the worker ended with code {returncode}")
        self.crashed = returncode >= 0 or -returncode in CRASHES


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of a job: the checksum of its bytes, and how long it waited for workers and was decoded by the last one."""

    checksum: str
    waited_s: float
    took_s: float


@dataclass(frozen=True, slots=True)
class PoolSettings:
    num_workers: int
    queue_jobs: int
    """Jobs that may wait for a worker."""
    roots: tuple[str, ...]
    """Folders and URLs."""
    limits: WorkerLimits
    command: tuple[str, ...]
    """Program with its first arguments. With `identify` it prints its decoder's id, or what is wrong and ends with an exit code. With
    `serve`, that id and the arguments of `worker.main` it is a worker."""
    disk: DiskCache | None = None


class Worker:
    """One process and its socket."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket):
        self.process, self.sock = process, sock
        self.jobs = 0
        self._sending = asyncio.Lock()

    @classmethod
    async def start(cls, settings: PoolSettings, decoder_id: str) -> "Worker":
        """Raises KeyeError where the program does not come up: SettingsError where another attempt would end the same."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        limits = settings.limits
        disk = ("", "0") if settings.disk is None else (str(settings.disk.folder), str(settings.disk.limit_bytes))
        arguments = ("serve", decoder_id, str(theirs.fileno()), str(limits.memory_bytes), str(limits.decode_s), *disk, *settings.roots)
        environment = os.environ | WORKER_ENVIRONMENT
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *settings.command, *arguments, pass_fds=(theirs.fileno(),), env=environment, stdin=asyncio.subprocess.DEVNULL
            )
        worker = cls(process, ours)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await messages.receive_async(ours)
        except BaseException as error:
            await worker.end(EXIT_S if isinstance(error, messages.Closed) else 0.0)
            if isinstance(error, messages.Closed | TimeoutError):
                raise _start_error(process.returncode, f"a worker did not start (code {process.returncode}): {SEE_STDERR}") from error
            raise
        return worker

    async def ask(self, job: str, slab: Slab) -> dict:
        """The worker's answer to one job. Raises WorkerDied."""
        self.jobs += 1
        try:
            async with self._sending:
                await messages.send_async(self.sock, {"job": job}, slab.fd)
            return await messages.receive_async(self.sock)
        except messages.Closed:
            raise WorkerDied(await self.process.wait()) from None

    async def cancel(self) -> None:
        """Ask it to drop the job at hand; it answers all the same."""
        async with self._sending:
            with suppress(messages.Closed):
                await messages.send_async(self.sock, {"cancel": True})

    def kill(self) -> None:
        _kill(self.process)

    async def end(self, within_s: float = 0.0) -> None:
        """Kill it, unless it ends by itself within so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.process.wait()
        self.kill()
        await self.process.wait()
        self.sock.close()


class WorkerPool:
    """`counts` are events by name, for metrics: jobs, started, crashed, lost, timeout, oom, cancelled, from_disk."""

    def __init__(self, settings: PoolSettings):
        self._settings = settings
        self._decoder_id = ""
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._workers: set[Worker] = set()
        self._tasks: set[asyncio.Task] = set()
        self._is_closing = False
        self.waiting = 0
        self.running = 0
        self.counts: Counter[str] = Counter()

    @property
    def num_ready(self) -> int:
        return len(self._workers)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    async def start(self) -> str:
        """Start all workers; returns their decoder's id. Raises KeyeError and SettingsError where one does not come up."""
        self._decoder_id = await identify(self._settings.command)
        workers = await asyncio.gather(*(self._start_worker() for _ in range(self._settings.num_workers)))
        for worker in workers:
            self._admit(worker)
        return self._decoder_id

    async def run(self, job: str, slab: Slab) -> Decoded:
        """Decode one job into `slab`.

        A job whose worker dies is given to one other. Raises Refused; when cancelled, the worker stops at the next frame.
        """
        waited_s = 0.0
        for is_last in (False, True):
            asked_s = time.monotonic()
            worker = await self._take()
            began_s = time.monotonic()
            waited_s += began_s - asked_s
            task = self._background(self._serve(worker, job, slab))
            try:
                reply = await asyncio.shield(task)
            except asyncio.CancelledError:
                await self._cancel(worker, task)
                raise
            except WorkerDied as error:
                if not is_last:
                    continue
                if error.crashed:
                    raise Refused("worker_crashed", "two workers in turn died of this job") from error
                raise Refused("worker_lost", "two workers in turn were killed from outside during this job") from error
            if "error" in reply:
                raise Refused(reply["error"], reply["message"])
            return Decoded(reply["xxh3_64"], waited_s, time.monotonic() - began_s)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Ends all workers, also those with a job; none is replaced any more."""
        self._is_closing = True
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))

    async def _take(self) -> Worker:
        if self._idle.empty() and self.waiting >= self._settings.queue_jobs:
            raise Refused("busy", f"{self.waiting} jobs wait for {self._settings.num_workers} workers", retry_after_s=1)
        self.waiting += 1
        try:
            while (worker := await self._idle.get()).process.returncode is not None:  # it died with nothing to do
                self._lose(worker)
            return worker
        finally:
            self.waiting -= 1

    async def _serve(self, worker: Worker, job: str, slab: Slab) -> dict:
        """Runs to its end whoever waits for it, so that the worker is idle or replaced afterwards."""
        self.counts["jobs"] += 1
        self.running += 1
        reply: dict = {}
        try:
            async with asyncio.timeout(self._settings.limits.decode_s):
                reply = await worker.ask(job, slab)
        except TimeoutError:
            self.counts["timeout"] += 1
            limit_s = self._settings.limits.decode_s
            return {"error": "decode_timeout", "message": f"the decode took more than --decode-timeout-s {limit_s:g}"}
        except WorkerDied as error:
            self.counts["crashed" if error.crashed else "lost"] += 1
            raise
        finally:
            self.running -= 1
            self.counts["oom"] += int(reply.get("error") == "oom")
            self.counts["from_disk"] += int(reply.get("from_disk", False))
            if not reply or reply.get("error") == "oom" or worker.jobs >= JOBS_PER_WORKER:
                self._lose(worker)
            else:
                self._idle.put_nowait(worker)
        return reply

    async def _cancel(self, worker: Worker, task: asyncio.Task) -> None:
        """Tell the worker that nobody waits for `task` any more."""
        self.counts["cancelled"] += 1
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        if not task.done():
            await worker.cancel()

    def _lose(self, worker: Worker) -> None:
        if self._is_closing:  # `close` ends it with the others
            return
        worker.kill()
        self._workers.discard(worker)
        self._background(self._replace(worker))

    async def _replace(self, lost: Worker) -> None:
        await lost.end()
        while True:
            try:
                self._admit(await self._start_worker())
                return
            except KeyeError:
                await asyncio.sleep(RESTART_PAUSE_S)

    async def _start_worker(self) -> Worker:
        return await Worker.start(self._settings, self._decoder_id)

    def _admit(self, worker: Worker) -> None:
        self.counts["started"] += 1
        self._workers.add(worker)
        self._idle.put_nowait(worker)

    def _background(self, coroutine) -> asyncio.Task:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
