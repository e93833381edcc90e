"""The server's front: takes requests, hands them to workers, sends what they made. It neither decodes nor imports torch."""

import asyncio
import errno
import json
import resource
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.data.slabs import Slab
from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.io_server import auth
from megatron_keye.io_server.connection import Connection, Gone, Request
from megatron_keye.io_server.events import log_event
from megatron_keye.io_server.metrics import Metrics
from megatron_keye.io_server.pool import PoolSettings, WorkerPool
from megatron_keye.io_server.protocol import (
    DECODE_PATH,
    HEALTH_PATH,
    MAX_REQUEST_BYTES,
    METRICS_PATH,
    RESULT_HEADER,
    STATUS,
    DecodeJob,
    Refused,
    parse_job,
)
from megatron_keye.io_server.registry import RENEW_S, remove_dead_leases, remove_lease, write_lease
from megatron_keye.io_server.results import Result, Results
from megatron_keye.io_server.slabs import SlabBudget

MAX_OPEN_FILES = 1 << 16
MAX_CONNECTIONS = 1024
MAX_TURNED_AWAY = 64
"""Further connections that are told so at a time; others are closed at once."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
ALL_ADDRESSES = frozenset({"0.0.0.0", "::"})
MAY_PASS = frozenset({errno.EADDRINUSE, socket.EAI_AGAIN})
"""Why an address cannot be taken at the moment: another attempt may succeed. For any other reason it would not."""
WORKER_EVENTS = ("jobs", "started", "crashed", "lost", "timeout", "oom", "cancelled", "from_disk")
"""Of `WorkerPool.counts`: all are shown from the beginning, as alerts need."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`memory_bytes` bounds all results together: being decoded, sent, and kept to be sent again.

    Raises SettingsError for a server that could be asked by anyone.
    """

    host: str
    port: int
    pool: PoolSettings
    memory_bytes: int
    drain_s: float
    """How long requests at hand may take after a request to stop."""
    secret: bytes | None = None
    registry: Path | None = None
    advertise: str | None = None
    """Host name by which others reach this server; None takes `host`, or this machine's name where that means all addresses."""

    def __post_init__(self):
        if self.secret is None and self.host not in LOOPBACK:
            raise SettingsError(
                f"without --secret-file the server listens on this machine only, not on {self.host}: it shows whoever asks what is in its "
                "roots; give it a secret, or --listen 127.0.0.1:PORT"
            )


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes | Slab
    headers: tuple[tuple[str, str], ...] = ()


class Front:
    """One server."""

    def __init__(self, settings: ServerSettings):
        self._settings = settings
        self._pool = WorkerPool(settings.pool)
        open_files = _raise_open_files()
        # Results, connections, workers: none may take the files of the others.
        self._max_connections = min(MAX_CONNECTIONS, open_files // 4)
        self._budget = SlabBudget(settings.memory_bytes, limit_slabs=open_files // 2)
        self._results = Results(self._budget)
        self._metrics = Metrics()
        self._connections: set[asyncio.Task] = set()
        self._busy = 0
        self._draining = asyncio.Event()
        self._decoder_id = ""
        self.url = ""
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Serve until `stop` is called, then finish what is at hand.

        Raises KeyeError where the server cannot start: SettingsError where another attempt would end the same.
        """
        settings = self._settings
        try:
            self._decoder_id = await self._pool.start()
            server = await self._listen()
            lease = asyncio.create_task(self._keep_lease())
            log_event("listening", url=self.url, decoder_id=self._decoder_id, workers=settings.pool.num_workers)
            self.ready.set()
            await self._draining.wait()
            log_event("draining", requests=self._busy)
            server.close()
            await asyncio.gather(lease, self._drain())
        finally:
            await self._pool.close()
        log_event("stopped")

    def stop(self) -> None:
        """Take no new requests and end when those at hand are answered."""
        self._draining.set()

    async def _listen(self) -> asyncio.Server:
        settings = self._settings
        try:
            server = await asyncio.start_server(self._accept, settings.host, settings.port, limit=MAX_REQUEST_BYTES)
        except OSError as error:
            text = f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}"
            if error.errno in MAY_PASS:
                raise KeyeError(f"{text}; end what listens there, or name another port") from error
            raise SettingsError(f"{text}; name an address of this machine and a port that this user may take") from error
        port = server.sockets[0].getsockname()[1]
        name = settings.advertise or (socket.gethostname() if settings.host in ALL_ADDRESSES else settings.host)
        self.url = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
        return server

    async def _drain(self) -> None:
        deadline_s = time.monotonic() + self._settings.drain_s
        while self._busy and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _keep_lease(self) -> None:
        """Renew this server's lease until it drains, then take it back: in one place, so that none is written after that."""
        settings = self._settings
        if settings.registry is None:
            return
        with suppress(OSError):
            await asyncio.to_thread(remove_dead_leases, settings.registry)
        while not self._draining.is_set():
            try:
                await asyncio.to_thread(write_lease, settings.registry, self.url, self._decoder_id, settings.pool.num_workers)
            except OSError as error:
                log_event("lease not written", reason=str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._draining.wait()
        with suppress(OSError):
            await asyncio.to_thread(remove_lease, settings.registry, self.url)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._connections.add(task)
        connection = Connection(reader, writer, MAX_REQUEST_BYTES)
        try:
            if len(self._connections) <= self._max_connections:
                await self._converse(connection)
            else:
                await self._turn_away(connection)
        except (Gone, asyncio.CancelledError):
            self._metrics.add("connections_dropped_total")
        finally:
            self._connections.discard(task)
            await connection.close()

    async def _turn_away(self, connection: Connection) -> None:
        """Say that there is no place, without waiting for a request, to as many as the limit of open files has room for."""
        self._metrics.add("connections_refused_total")
        if len(self._connections) <= self._max_connections + MAX_TURNED_AWAY:
            refusal = Refused("busy", f"this server has {self._max_connections} connections, as many as it takes", retry_after_s=1)
            await self._respond(connection, _refusal(refusal), keep_open=False)
            await connection.linger()

    async def _converse(self, connection: Connection) -> None:
        while True:
            try:
                request = await connection.next_request()
            except Refused as error:
                await self._respond(connection, _refusal(error), keep_open=False)
                await connection.linger()
                return
            if request is None:
                return
            self._busy += 1
            try:
                # Under no name, or a connection would keep its last result until its next request.
                answer = self._answer_while_connected(connection, request)
                await self._respond(connection, await answer, keep_open=not self._draining.is_set())
            finally:
                self._busy -= 1
            if not connection.can_go_on:
                return

    async def _respond(self, connection: Connection, answer: Answer, *, keep_open: bool) -> None:
        self._metrics.add("responses_total", status=str(answer.status))
        await connection.respond(answer.status, answer.headers, answer.body, keep_open=keep_open)
        self._metrics.add("sent_bytes_total", len(answer.body))

    async def _answer_while_connected(self, connection: Connection, request: Request) -> Answer:
        """Raises Gone where the client leaves before it has an answer; what is done for it alone is cancelled."""
        answering = asyncio.create_task(self._answer(connection, request))
        leaving = asyncio.create_task(connection.closed())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise Gone
            return await answering
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, connection: Connection, request: Request) -> Answer:
        try:
            if request.method in ("GET", "HEAD") and request.path == HEALTH_PATH:
                return self._health()
            if request.method in ("GET", "HEAD") and request.path == METRICS_PATH:
                return self._metrics_text()
            if request.method == "POST" and request.path == DECODE_PATH:
                return await self._decode(connection, request)
            raise Refused("not_found", f"expected POST {DECODE_PATH}, GET {HEALTH_PATH} or GET {METRICS_PATH}")
        except Exception as fault:
            error = fault
            if not isinstance(fault, Refused):  # a mistake in this program costs one request as well
                log_event("internal error", traceback=traceback.format_exc())
                error = Refused("internal", f"{type(fault).__name__}: {fault}")
            self._metrics.add("refused_total", error=error.code)
            if error.code not in ("busy", "draining"):
                log_event("refused", error=error.code, message=str(error))
            return _refusal(error)

    async def _decode(self, connection: Connection, request: Request) -> Answer:
        if self._settings.secret is not None:
            auth.verify(self._settings.secret, request.headers.get("authorization", ""), request.path, request.body, time.time())
        connection.trust()
        job = parse_job(request.body)
        if job.decoder_id != self._decoder_id:
            raise Refused("wrong_decoder", f"this server decodes with {self._decoder_id}, the client with {job.decoder_id}")
        if self._draining.is_set():
            raise Refused("draining", "this server is about to stop", retry_after_s=60)
        result = await self._result(job, request.body.decode())
        self._metrics.add("decoded_total", kind=_kind(job))
        facts = {"decoder_id": self._decoder_id, "xxh3_64": result.checksum, "segments": job.segments}
        return Answer(200, result.slab, ((RESULT_HEADER, json.dumps(facts)), ("content-type", "application/octet-stream")))

    async def _result(self, job: DecodeJob, text: str) -> Result:
        async def decode(slab: Slab) -> str:
            done = await self._pool.run(text, slab)
            self._metrics.observe("queue_seconds", done.waited_s, kind=_kind(job))
            self._metrics.observe("decode_seconds", done.took_s, kind=_kind(job))
            return done.checksum

        return await self._results.get(job.key, job.result_bytes, decode, keep=job.sha256 is not None)

    def _health(self) -> Answer:
        status = "draining" if self._draining.is_set() else "ok" if self._pool.num_ready else "no workers"
        pool, budget = self._pool, self._budget
        facts = {
            "status": status, "decoder_id": self._decoder_id, "workers": pool.num_ready, "running": pool.running, "waiting": pool.waiting,
            "memory_used_bytes": budget.used_bytes, "memory_limit_bytes": budget.limit_bytes,
        }  # fmt: skip
        return Answer(200 if status == "ok" else 503, json.dumps(facts).encode(), (("content-type", "application/json"),))

    def _metrics_text(self) -> Answer:
        pool, results = self._pool, self._results
        sums = {
            "cache_hits_total": results.hits, "cache_joined_total": results.joined,
            **{f"worker_{event}_total": pool.counts[event] for event in WORKER_EVENTS},
        }  # fmt: skip
        gauges = {
            "workers": pool.num_ready, "jobs_running": pool.running, "jobs_waiting": pool.waiting, "connections": len(self._connections),
            "memory_used_bytes": self._budget.used_bytes, "memory_limit_bytes": self._budget.limit_bytes,
            "cache_bytes": results.kept_bytes,
        }  # fmt: skip
        return Answer(200, self._metrics.text(sums, gauges).encode(), (("content-type", "text/plain; version=0.0.4"),))


def _raise_open_files() -> int:
    """Allow this process as many open files as it may ask for; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _kind(job: DecodeJob) -> str:
    return "image" if job.frames is None else "video"


def _refusal(error: Refused) -> Answer:
    headers = [("content-type", "application/json")]
    if error.retry_after_s is not None:
        headers.append(("retry-after", str(error.retry_after_s)))
    return Answer(STATUS[error.code], error.to_json(), tuple(headers))
