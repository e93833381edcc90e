"""`keye io-server`: decode images and videos for training runs on other machines, or ask servers how they are."""

import argparse
import asyncio
import http.client
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

from megatron_keye.config.schema import DecoderName
from megatron_keye.errors import SettingsError
from megatron_keye.io_server.auth import load_secret
from megatron_keye.io_server.blobs import Blobs, DiskCache, is_url
from megatron_keye.io_server.events import logging_as_events
from megatron_keye.io_server.front import Front, ServerSettings
from megatron_keye.io_server.pool import PoolSettings, worker_command
from megatron_keye.io_server.protocol import HEALTH_PATH, is_server_url
from megatron_keye.io_server.registry import live_leases
from megatron_keye.io_server.several import STOP_SIGNALS, WORKERS_PER_SERVER, run_servers, shared_out
from megatron_keye.io_server.worker import WorkerLimits

HELP = """Serve decoded pixels to training runs, bit for bit those that they would decode themselves.

A run uses servers by data.media.servers or data.media.registry. SIGTERM finishes what is at hand and ends the server; a second one
ends it at once."""
EXAMPLES = """\
  keye io-server --listen 127.0.0.1:7300 --workers 8 --root /data/shards       # for runs on this machine
  keye io-server --listen 0.0.0.0:7300 --workers 64 --root /data/shards \\
      --secret-file run/secret --registry run/io_servers                       # for a cluster: four servers, ports 7300 to 7303
  keye io-server status http://node1:7300 http://node2:7300                    # exit code 0 where all are well
  keye io-server status --registry run/io_servers"""

STATUS_TIMEOUT_S = 5.0
DRAIN_S = 20.0
"""SLURM kills processes 30 s (KillWait) after their SIGTERM; closing connections and workers takes seconds too."""
SAME_SIGNAL_S = 1.0
"""A signal this soon after the first is the same one: SLURM sends it to all of a job's processes, and a batch script passes it on."""
MAX_PORT = 65535
MIB, GIB = 1 << 20, 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", metavar="HOST:PORT", help="where to listen; port 0 takes a free one and says which")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="decoding processes; about one per core (default: 1)")
    servers_help = (
        "processes that take requests, each at a port of its own from --listen's on, with its part of the workers "
        f"(default: one per {WORKERS_PER_SERVER} workers)"
    )
    parser.add_argument("--servers", type=int, metavar="N", help=servers_help)
    parser.add_argument("--decoder", choices=get_args(DecoderName), default="pyav", help="data.media.decoder of the runs (default: pyav)")
    roots_help = "folders and URLs whose files may be read, and no others; may be given more than once"
    parser.add_argument("--root", nargs="+", action="extend", default=[], metavar="PATH", help=roots_help)
    parser.add_argument("--secret-file", metavar="F", help="secret that runs must know (data.media.secret_file)")
    parser.add_argument("--registry", metavar="DIR", help="shared folder in which runs find this server (data.media.registry)")
    parser.add_argument("--advertise", metavar="HOST", help="name by which runs reach this server (default: that of --listen)")
    parser.add_argument("--queue", type=int, metavar="N", help="requests that may wait for a worker, or 0 (default: 4 per worker)")
    memory_help = "all results of each server together, cached ones too (default: 4096)"
    parser.add_argument("--memory-mib", type=int, default=4096, metavar="M", help=memory_help)
    parser.add_argument("--disk-cache", metavar="DIR", help="keep media that were read in this folder, on a disk of this node")
    parser.add_argument("--disk-cache-gib", type=float, default=64, metavar="G", help="most bytes of --disk-cache (default: 64)")
    parser.add_argument("--worker-memory-mib", type=int, default=4096, metavar="M", help="memory one decode may take (default: 4096)")
    parser.add_argument("--decode-timeout-s", type=float, default=120.0, metavar="S", help="time one decode may take (default: 120)")
    drain_help = f"time to finish after SIGTERM (default: {DRAIN_S:g}, which fits into SLURM's KillWait of 30)"
    parser.add_argument("--drain-s", type=float, default=DRAIN_S, metavar="S", help=drain_help)
    actions = parser.add_subparsers(dest="action", metavar="status")
    status = actions.add_parser("status", help="ask servers how they are")
    status.add_argument("urls", nargs="*", metavar="URL", help="http://HOST:PORT")
    status.add_argument("--registry", default=argparse.SUPPRESS, metavar="DIR", help="all servers that announce themselves there")


def run(args: argparse.Namespace) -> int:
    if args.action == "status":
        return _status(_asked(args))
    settings = _settings(args)
    num_servers = -(-args.workers // WORKERS_PER_SERVER) if args.servers is None else args.servers
    if num_servers == 1:
        run_server(settings)
        return 0
    return run_servers(run_server, _shared_out(settings, num_servers))


def run_server(settings: ServerSettings) -> None:
    """Raises KeyeError where it cannot start."""
    with logging_as_events():
        asyncio.run(serve(settings))


async def serve(settings: ServerSettings) -> None:
    """Run a server until SIGTERM or SIGINT. The next one then ends this process at once, and workers end with it."""
    front = Front(settings)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        front.stop()
        loop.call_later(SAME_SIGNAL_S, let_go)

    def let_go() -> None:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    await front.run()


def _settings(args: argparse.Namespace) -> ServerSettings:
    """Raises SettingsError for arguments that make no server."""
    host, colon, port = (args.listen or "").rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > MAX_PORT:
        raise SettingsError(f"--listen is {args.listen!r}: expected HOST:PORT, such as 127.0.0.1:7300")
    for name in ("workers", "memory_mib", "worker_memory_mib", "decode_timeout_s", "drain_s", "disk_cache_gib"):
        if not 0 < vars(args)[name] < math.inf:
            raise SettingsError(f"--{name.replace('_', '-')} is {vars(args)[name]}: expected more than 0, and finite")
    if args.queue is not None and args.queue < 0:
        raise SettingsError(f"--queue is {args.queue}: expected 0 or more")
    if args.advertise is not None and not re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]+", args.advertise):
        raise SettingsError(f"--advertise is {args.advertise!r}: expected the name or address of this machine alone, such as node1")
    if "" in args.root:
        raise SettingsError("--root is empty: expected a folder or URL; `.` is the current folder")
    registry = None if args.registry is None else _registry(Path(args.registry))
    roots = tuple(root if is_url(root) else str(Path(root).resolve()) for root in args.root)
    disk = None if args.disk_cache is None else DiskCache(Path(args.disk_cache).resolve(), int(args.disk_cache_gib * GIB))
    Blobs(roots, disk)
    queue_jobs = 4 * args.workers if args.queue is None else args.queue
    limits = WorkerLimits(args.worker_memory_mib * MIB, args.decode_timeout_s)
    return ServerSettings(
        host=host.strip("[]"),
        port=int(port),
        pool=PoolSettings(args.workers, queue_jobs, roots, limits, worker_command(args.decoder), disk),
        memory_bytes=args.memory_mib * MIB,
        drain_s=args.drain_s,
        secret=None if args.secret_file is None else load_secret(Path(args.secret_file)),
        registry=registry,
        advertise=args.advertise,
    )


def _shared_out(settings: ServerSettings, num_servers: int) -> list[ServerSettings]:
    """Raises SettingsError for more servers than workers or ports."""
    if not 0 < num_servers <= settings.pool.num_workers:
        raise SettingsError(f"--servers is {num_servers}: expected from 1 to --workers, which is {settings.pool.num_workers}")
    if settings.port and settings.port + num_servers - 1 > MAX_PORT:
        raise SettingsError(f"--listen has port {settings.port}: {num_servers} servers need as many ports from there on, up to {MAX_PORT}")
    return shared_out(settings, num_servers)


def _registry(folder: Path) -> Path:
    """The folder, made where it was not there. Raises SettingsError where no lease can be written: no run would ever find the server."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--registry {folder}: cannot make it: {error.strerror}; name a folder that all nodes share") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"--registry {folder} cannot be written by this user; name another folder, or change its mode")
    return folder


def _asked(args: argparse.Namespace) -> list[str]:
    """URLs of the servers to ask. Raises SettingsError where there are none."""
    if strange := [url for url in args.urls if not is_server_url(url)]:
        raise SettingsError(f"found {', '.join(strange)}: expected http://HOST:PORT, as a server says when it starts")
    urls = args.urls
    if args.registry is not None:
        urls = [*urls, *(lease.url for lease in live_leases(Path(args.registry)))]
    if not urls:
        where = "name servers by URL, or by --registry" if args.registry is None else f"no server has a valid lease in {args.registry}"
        raise SettingsError(where)
    return urls


def _status(urls: list[str]) -> int:
    """One line per server; 1 where any is not well."""
    bad = 0
    for url in urls:
        try:
            facts = _health(url)
            is_well = facts["status"] == "ok"
            text = "  ".join(f"{name} {value}" for name, value in facts.items())
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            is_well, text = False, f"no answer: {error}"
        bad += not is_well
        print(f"{url}  {text}")
    return int(bad > 0)


def _health(url: str) -> dict:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=STATUS_TIMEOUT_S)
    try:
        connection.request("GET", HEALTH_PATH)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()
