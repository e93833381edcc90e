"""Servers in a thread of the test's own process, with fake or real workers, and ways to ask them."""

import asyncio
import hashlib
import http.client
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from megatron_keye.io_server import auth
from megatron_keye.io_server.attempts import Timeouts
from megatron_keye.io_server.client import ClientSettings, MediaClient
from megatron_keye.io_server.fleet import Fleet
from megatron_keye.io_server.front import Front, ServerSettings
from megatron_keye.io_server.pool import PoolSettings, worker_command
from megatron_keye.io_server.protocol import DECODE_PATH, DecodeJob
from megatron_keye.io_server.worker import WorkerLimits
from tests.unit.io_server import fake_worker
from tests.unit.io_server.fake_worker import FAKE_ID

FAKE_WORKER = (sys.executable, "-m", "tests.unit.io_server.fake_worker")
MIB = 1 << 20
CLIENT = ClientSettings(deadline_s=20.0, hedge_after_s=10.0, requests=4, in_flight_bytes=64 * MIB, timeouts=Timeouts(1.0, 5.0))


class RunningServer:
    """A front in a thread. `settings` fields may be overridden by name, those of its pool too."""

    def __init__(
        self, root: Path, command=FAKE_WORKER, num_workers=1, queue_jobs=4, decode_s=10.0, roots=(), disk=None, worker_bytes=512 * MIB,
        **settings,
    ):  # fmt: skip
        limits = WorkerLimits(worker_bytes, decode_s)
        pool = PoolSettings(num_workers, queue_jobs, tuple(map(str, roots or (root,))), limits, command, disk)
        given = ServerSettings("127.0.0.1", 0, pool, memory_bytes=64 * MIB, drain_s=10.0)
        self.front = Front(replace(given, **settings))
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._started.wait(60), "the server did not start"

    async def _main(self):
        self._loop = asyncio.get_running_loop()
        running = asyncio.create_task(self.front.run())
        await self.front.ready.wait()
        self._started.set()
        await running

    @property
    def url(self) -> str:
        return self.front.url

    @property
    def pool(self):
        return self.front._pool

    def ask_to_stop(self) -> None:
        self._loop.call_soon_threadsafe(self.front.stop)

    def close(self) -> None:
        if self._thread.is_alive():
            self.ask_to_stop()
            self._thread.join(30)
        assert not self._thread.is_alive()


def real_server(root: Path, **settings) -> RunningServer:
    return RunningServer(root, worker_command("pyav"), **({"worker_bytes": 2048 * MIB} | settings))


def job_for(path: Path, /, **changes) -> DecodeJob:
    """A job for a fake worker: the whole file, by default as a 28 x 28 image."""
    blob = path.read_bytes()
    given = dict(
        path=str(path), offset=0, num_bytes=len(blob), sha256=hashlib.sha256(blob).hexdigest(), variant="keye_vl_1_5", height=30, width=30,
        sizes=((28, 28),), frames=None, decoder_id=FAKE_ID,
    )  # fmt: skip
    return DecodeJob(**(given | changes))


def clip_job(path: Path, num_frames: int, side: int = 28) -> DecodeJob:
    """The same as a clip of so many frames, each a segment."""
    sizes = ((side, side), (side, side))
    return job_for(path, sizes=sizes, frames=tuple(range(num_frames)), fast=(False,) * num_frames)


def expected(job: DecodeJob, path: Path) -> bytes:
    return b"".join(part.tobytes() for part in fake_worker.pixels(job, path.read_bytes()))


def request(url: str, body: bytes, headers=(), method="POST", path=DECODE_PATH) -> tuple[int, dict, bytes]:
    """(status, headers, body) of one request on its own connection."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def post(url: str, job: DecodeJob, secret: bytes | None = None) -> tuple[int, dict, bytes]:
    body = job.model_dump_json().encode()
    headers = {} if secret is None else {"Authorization": auth.sign(secret, DECODE_PATH, body, time.time())}
    return request(url, body, headers)


def error_of(answer: tuple[int, dict, bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[2])["error"]


def client_of(*urls: str, **changes) -> MediaClient:
    return MediaClient(Fleet(urls, decoder_id=FAKE_ID), replace(CLIENT, **changes))


def wait_until(condition, timeout_s=15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.01)


def as_bytes(answer: np.ndarray | None) -> bytes | None:
    return None if answer is None else answer.tobytes()


def is_well(server: RunningServer, path: Path) -> bool:
    """Whether it still answers a job for this file."""
    answer = post(server.url, job := job_for(path))
    return answer[0] == 200 and answer[2] == expected(job, path)
