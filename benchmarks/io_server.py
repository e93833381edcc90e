"""What the I/O server costs: CPU time of decoding there against decoding here, of the leader alone, and latency when overloaded.

One run on one machine; only the ratios mean something. Caching is off, because every repetition asks for the same clips:

    python benchmarks/io_server.py --pairs 5 --workers 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from megatron_keye.config.schema import ImageConfig, VideoConfig
from megatron_keye.data.items import describe, media_rules, resolve
from megatron_keye.data.record import Media
from megatron_keye.data.shards import Span
from megatron_keye.data.storage import LocalStore
from megatron_keye.data.stored import StoredMedium
from megatron_keye.io_server.attempts import Timeouts
from megatron_keye.io_server.client import ClientSettings, MediaClient
from megatron_keye.io_server.fleet import Fleet
from megatron_keye.io_server.protocol import DecodeJob, decoder_id
from megatron_keye.io_server.remote import job_of

VARIANT = "keye_vl_1_5"
FRAME_RATE = 30
OVERLOAD_REQUESTS = 24
OVERLOAD_QUEUE = 8


@dataclass(frozen=True)
class Pair:
    """CPU seconds of the same clips decoded here and fetched; `client_s` is the part of the process that asks."""

    local_s: float
    client_s: float
    server_s: float


def make_clip(path: Path, seconds: int, height: int, width: int, seed: int) -> None:
    """H.264 with B-frames: a picture of smoothed noise that pans, with grain."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height // 4, width // 2, 3), dtype=np.uint8)
    canvas = cv2.resize(noise, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    stream = BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("h264", rate=FRAME_RATE, options={"preset": "veryfast", "crf": "26"})
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FRAME_RATE):
            shift = number * 2 % width
            grain = rng.integers(0, 12, (height, width, 1), dtype=np.uint8)
            frame = cv2.add(np.ascontiguousarray(canvas[:, shift : shift + width]), grain.repeat(3, axis=2))
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(track.encode())
    path.write_bytes(stream.getvalue())


def stored(path: Path) -> StoredMedium:
    rules = media_rules(ImageConfig(), VideoConfig(), VARIANT)
    blob = path.read_bytes()
    item = describe("video", blob, {}, rules)
    span, media = Span(0, len(blob)), Media("video", "file", path.name)
    return StoredMedium(LocalStore(path.parent), path.name, span, media, item, resolve(item, rules), VARIANT, path.name)


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def with_children(pid: int) -> list[int]:
    return [pid, *(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def timed(work: Callable[[], None]) -> float:
    """CPU seconds of this process for `work`, all threads included."""
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


def measure_pair(
    media: list[StoredMedium], jobs: list[DecodeJob], client: MediaClient, threads: ThreadPoolExecutor, pids: list[int]
) -> Pair:
    def here() -> None:
        for medium in media:
            medium.patches()

    def there() -> None:
        if any(answer is None for answer in threads.map(client.fetch, jobs)):
            raise RuntimeError(f"a server failed: {client.counts.last_failure}")

    local_s = timed(here)
    began_s = cpu_seconds(pids)
    client_s = timed(there)
    return Pair(local_s, client_s, cpu_seconds(pids) - began_s)


def overload(client: MediaClient, jobs: list[DecodeJob]) -> list[float]:
    """Seconds until each of many requests at once was answered; each is for a name of its own, so that none rides on another."""

    def fetch(number: int) -> float:
        job = jobs[number % len(jobs)]
        name = Path(f"{job.path}.{number}")
        name.hardlink_to(job.path)
        began_s = time.perf_counter()
        answer = client.fetch(job.model_copy(update={"path": str(name)}))
        return time.perf_counter() - began_s if answer is not None else float("inf")

    with ThreadPoolExecutor(OVERLOAD_REQUESTS) as threads:
        return sorted(threads.map(fetch, range(OVERLOAD_REQUESTS)))


def start_server(root: str, workers: int) -> tuple[subprocess.Popen, str]:
    """A server of this machine and its URL. Raises RuntimeError where it does not start."""
    arguments = ("--listen", "127.0.0.1:0", "--root", root, "--workers", str(workers), "--queue", str(OVERLOAD_QUEUE))
    command = [sys.executable, "-m", "megatron_keye.train.cli", "io-server", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("{"):
            return process, json.loads(line)["url"]
    raise RuntimeError(f"the server ended with code {process.wait()}")


def client_for(url: str, requests: int) -> MediaClient:
    settings = ClientSettings(600.0, 600.0, requests, 4 << 30, Timeouts(5.0, 30.0))
    return MediaClient(Fleet((url,), decoder_id=decoder_id()), settings)


def report(pairs: list[Pair]) -> None:
    total = [(pair.client_s + pair.server_s) / pair.local_s for pair in pairs]
    leader = [pair.local_s / pair.client_s for pair in pairs]
    for pair in pairs:
        print(f"local {pair.local_s:7.2f} s   client {pair.client_s:6.3f} s   server {pair.server_s:7.2f} s")
    print(f"total CPU, remote / local:      median {statistics.median(total):.3f}, from {min(total):.3f} to {max(total):.3f}")
    print(f"CPU of the leader, local / remote: median {statistics.median(leader):.0f}, from {min(leader):.0f} to {max(leader):.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="repetitions of local and remote in turn")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=16, help="length of a clip")
    parser.add_argument("--height", type=int, default=480)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.mp4" for number in range(args.clips)]
        for number, path in enumerate(paths):
            make_clip(path, args.seconds, args.height, args.height * 16 // 9 // 2 * 2, number)
        media = [stored(path) for path in paths]
        jobs = [job_of(medium, decoder_id()) for medium in media]
        print(f"{len(jobs)} clips of {len(jobs[0].frames)} sampled frames, {sum(job.result_bytes for job in jobs):,} bytes of patches")
        server, url = start_server(folder, args.workers)
        try:
            client = client_for(url, args.workers)
            with ThreadPoolExecutor(args.workers) as threads:
                pids = with_children(server.pid)
                measure_pair(media, jobs, client, threads, pids)
                report([measure_pair(media, jobs, client, threads, pids) for _ in range(args.pairs)])
            flood = client_for(url, OVERLOAD_REQUESTS)
            waits_s = overload(flood, jobs)
            print(
                f"{OVERLOAD_REQUESTS} requests at once on a queue of {OVERLOAD_QUEUE}: p50 {statistics.median(waits_s):.2f} s, "
                f"slowest {waits_s[-1]:.2f} s, {flood.counts.values['busy']} times told to come back, "
                f"{sum(wait == float('inf') for wait in waits_s)} lost"
            )
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
