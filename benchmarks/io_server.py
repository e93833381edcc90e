"""What the I/O server costs: CPU time of decoding there against decoding here, of the leader alone, and what overload does.

Decoding here runs in as many processes as the server has workers, in their environment, so that caches are shared alike. One run on one
machine; only the ratios mean something. Caching is off, because every repetition asks for the same clips:

    python -m benchmarks.io_server --pairs 10 --workers 1
"""

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from benchmarks.shard_sets import photograph
from megatron_keye.config.schema import ImageConfig, VideoConfig
from megatron_keye.data.describe import describe
from megatron_keye.data.items import media_rules, resolve
from megatron_keye.data.limits import WORKER_ENVIRONMENT
from megatron_keye.data.media.decoder import PYAV, decoder_id
from megatron_keye.data.places import Member
from megatron_keye.data.record import Media
from megatron_keye.data.shards import Span
from megatron_keye.data.storage import LocalStore
from megatron_keye.data.stored import StoredMedium
from megatron_keye.io_server.attempts import Timeouts
from megatron_keye.io_server.client import ClientSettings, MediaClient
from megatron_keye.io_server.fleet import Fleet
from megatron_keye.io_server.protocol import DecodeJob
from megatron_keye.io_server.remote import job_of

VARIANT = "keye_vl_1_5"
FRAME_RATE = 30
OVERLOAD_REQUESTS = 24
OVERLOAD_QUEUE = 8


WEB_BITS_PER_PIXEL = 0.09
"""1.1 Mbit/s at 480p, 2.5 at 720p, 5.6 at 1080p."""
GROUP_FRAMES = 250
BOOTSTRAPS = 2000
OWN_DECODER = decoder_id(PYAV)


@dataclass(frozen=True)
class Pair:
    """CPU seconds of the same clips decoded here and fetched: by the process that asks, the server's front and its workers."""

    local_s: float
    client_s: float
    front_s: float
    workers_s: float

    @property
    def total(self) -> float:
        """Of fetching, as a multiple of decoding here."""
        return (self.client_s + self.front_s + self.workers_s) / self.local_s

    @property
    def rate(self) -> float:
        """Frames per CPU second of the server, as a part of what decoding here makes."""
        return self.local_s / (self.front_s + self.workers_s)


def encoder_options(codec: str) -> dict[str, str]:
    """A fast setting of the encoder, which each names in its own way."""
    return {"libsvtav1": {"preset": "8"}, "libvpx-vp9": {"cpu-used": "5", "row-mt": "1"}}.get(codec, {"preset": "fast"})


def make_clip(
    path: Path,
    codec: str,
    seconds: int,
    height: int,
    seed: int,
    bits_per_pixel: float = WEB_BITS_PER_PIXEL,
    group_frames: int = GROUP_FRAMES,
) -> None:
    """A clip with B-frames: a picture of smoothed noise that pans, with grain; at most `group_frames` from one key frame to the next."""
    rng = np.random.default_rng(seed)
    width = height * 16 // 9 // 2 * 2
    noise = rng.integers(0, 256, (height // 4, width // 2, 3), dtype=np.uint8)
    canvas = cv2.resize(noise, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    stream = BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream(codec, rate=FRAME_RATE, options=encoder_options(codec) | {"g": str(group_frames)})
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        track.bit_rate = int(bits_per_pixel * FRAME_RATE * width * height)
        for number in range(seconds * FRAME_RATE):
            shift = number * 2 % width
            grain = rng.integers(0, 12, (height, width, 1), dtype=np.uint8)
            picture = cv2.add(np.ascontiguousarray(canvas[:, shift : shift + width]), grain.repeat(3, axis=2))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(track.encode(frame))
        container.mux(track.encode())
    path.write_bytes(stream.getvalue())


def make_media(folder: Path, args: argparse.Namespace) -> list[Path]:
    if args.kind == "video":
        paths = [folder / f"{number}.mp4" for number in range(args.media)]
        for number, path in enumerate(paths):
            make_clip(path, args.codec, args.seconds, args.height, number, args.bits_per_pixel)
        return paths
    paths, rng = [folder / f"{number}.jpg" for number in range(args.media)], np.random.default_rng(0)
    for path in paths:
        path.write_bytes(photograph(rng))
    return paths


@functools.cache
def stored(path: Path) -> StoredMedium:
    rules = media_rules(ImageConfig(), VideoConfig(), VARIANT)
    blob = path.read_bytes()
    kind = "image" if path.suffix == ".jpg" else "video"
    item = describe(kind, blob, {}, rules)
    place, media = Member(LocalStore(path.parent), path.name, Span(0, len(blob))), Media(kind, "file", path.name)
    return StoredMedium(place, media, item, resolve(item, rules), VARIANT, path.name)


def cpu_seconds(pid: int) -> float:
    """Time on a CPU of all threads of a process so far."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def workers_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def use_one_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def decode_here(path: Path) -> float:
    """CPU seconds of this process for the clip."""
    medium = stored(path)
    began_s = time.process_time()
    medium.patches(PYAV)
    return time.process_time() - began_s


def measure_pair(
    paths: list[Path],
    jobs: list[DecodeJob],
    here: ProcessPoolExecutor,
    client: MediaClient,
    threads: ThreadPoolExecutor,
    front: int,
) -> Pair:
    def server_s() -> np.ndarray:
        return np.array([cpu_seconds(front), sum(map(cpu_seconds, workers_of(front)))])

    local_s = sum(here.map(decode_here, paths))
    before_s, client_before_s = server_s(), time.process_time()
    if any(answer is None for answer in threads.map(client.fetch, jobs)):
        raise RuntimeError(f"a server failed: {client.counts.last_failure}")
    client_s = time.process_time() - client_before_s
    return Pair(local_s, client_s, *(server_s() - before_s).tolist())


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
    return MediaClient(Fleet((url,), decoder_id=OWN_DECODER), settings)


def report(pairs: list[Pair]) -> None:
    for pair in pairs:
        print(
            f"local {pair.local_s:7.2f} s   client {pair.client_s:6.3f} s   front {pair.front_s:6.3f} s   workers {pair.workers_s:7.2f} s"
        )
    say("total CPU, remote / local", [pair.total for pair in pairs])
    say("CPU of the leader, local / remote", [pair.local_s / pair.client_s for pair in pairs])
    say("rate per CPU second, server / local processes", [pair.rate for pair in pairs])


def say(name: str, values: list[float]) -> None:
    """The median, with an interval by resampling the pairs."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (BOOTSTRAPS, len(values))), axis=1)
    low, high = np.percentile(medians, (5, 95))
    print(f"{name}: median {statistics.median(values):.3f}, 90 % of resampled medians from {low:.3f} to {high:.3f}")


def flood(url: str, jobs: list[DecodeJob], front: int) -> None:
    """Overload the server and say what became of it."""
    client = client_for(url, OVERLOAD_REQUESTS)
    idle_bytes = [resident_bytes(pid) for pid in (front, *workers_of(front))]
    waits_s = overload(client, jobs)
    grown = [resident_bytes(pid) - before for pid, before in zip((front, *workers_of(front)), idle_bytes, strict=True)]
    print(
        f"{OVERLOAD_REQUESTS} requests at once on a queue of {OVERLOAD_QUEUE}: p50 {np.percentile(waits_s, 50):.2f} s, "
        f"p99 {np.percentile(waits_s, 99):.2f} s, {client.counts.values['busy']} times told to come back, "
        f"{sum(wait == float('inf') for wait in waits_s)} lost; memory of the server {sum(idle_bytes) / 1e6:.0f} MB before, "
        f"{sum(grown) / 1e6:+.0f} MB after"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="repetitions of local and remote in turn")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kind", choices=("video", "image"), default="video")
    parser.add_argument("--media", type=int, default=2, help="clips or photographs")
    parser.add_argument("--seconds", type=int, default=16, help="length of a clip")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--bits-per-pixel", type=float, default=WEB_BITS_PER_PIXEL, help="bit rate, by default that of web video")
    parser.add_argument("--codec", default="h264", help="an encoder of PyAV: h264, hevc, ...")
    args = parser.parse_args()
    use_one_thread()
    os.environ.update(WORKER_ENVIRONMENT)  # of the processes that decode here
    with tempfile.TemporaryDirectory() as folder:
        paths = make_media(Path(folder), args)
        jobs = [job_of(stored(path), OWN_DECODER) for path in paths]
        what = "photographs" if args.kind == "image" else f"{args.codec} clips of {len(jobs[0].frames)} frames"
        encoded, patches = sum(job.num_bytes for job in jobs), sum(job.result_bytes for job in jobs)
        print(f"{len(jobs)} {what}, {encoded:,} bytes encoded, {patches:,} bytes of patches")
        server, url = start_server(folder, args.workers)
        context = multiprocessing.get_context("spawn")
        try:
            client = client_for(url, args.workers)
            with ThreadPoolExecutor(args.workers) as threads, ProcessPoolExecutor(args.workers, context, use_one_thread) as here:
                measure_pair(paths, jobs, here, client, threads, server.pid)
                report([measure_pair(paths, jobs, here, client, threads, server.pid) for _ in range(args.pairs)])
            flood(url, jobs, server.pid)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
