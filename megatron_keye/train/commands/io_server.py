"""`keye io-server`: decode images and videos for training runs on other machines, or ask servers how they are."""

import argparse
import asyncio
import http.client
import json
import signal
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

from megatron_keye.config.schema import DecoderName
from megatron_keye.errors import SettingsError
from megatron_keye.io_server.auth import load_secret
from megatron_keye.io_server.blobs import Blobs, DiskCache, is_url
from megatron_keye.io_server.front import Front, ServerSettings
from megatron_keye.io_server.pool import PoolSettings, worker_command
from megatron_keye.io_server.protocol import HEALTH_PATH
from megatron_keye.io_server.worker import WorkerLimits

HELP = """Serve decoded pixels to training runs, bit for bit those that they would decode themselves.

A run uses servers by data.media.servers or data.media.registry. SIGTERM finishes what is at hand and ends the server."""
EXAMPLES = """\
  keye io-server --listen 127.0.0.1:7300 --workers 8 --root /data/shards       # for runs on this machine
  keye io-server --listen 0.0.0.0:7300 --workers 64 --root /data/shards \\
      --secret-file run/secret --registry run/io_servers                       # for a cluster
  keye io-server status http://node1:7300 http://node2:7300                    # exit code 0 where all are well"""

STATUS_TIMEOUT_S = 5.0
MIB, GIB = 1 << 20, 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", metavar="HOST:PORT", help="where to listen; port 0 takes a free one and says which")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="decoding processes; about one per core (default: 1)")
    parser.add_argument("--decoder", choices=get_args(DecoderName), default="pyav", help="data.media.decoder of the runs (default: pyav)")
    parser.add_argument("--root", nargs="+", default=[], metavar="PATH", help="folders and URLs whose files may be read, and no others")
    parser.add_argument("--secret-file", metavar="F", help="secret that runs must know (data.media.secret_file)")
    parser.add_argument("--registry", metavar="DIR", help="shared folder in which runs find this server (data.media.registry)")
    parser.add_argument("--advertise", metavar="HOST", help="name by which runs reach this server (default: that of --listen)")
    parser.add_argument("--queue", type=int, metavar="N", help="requests that may wait for a worker (default: 4 per worker)")
    parser.add_argument("--memory-mib", type=int, default=4096, metavar="M", help="all results together, cached ones too (default: 4096)")
    parser.add_argument("--disk-cache", metavar="DIR", help="keep media that were read in this folder, on a disk of this node")
    parser.add_argument("--disk-cache-gib", type=float, default=64, metavar="G", help="most bytes of --disk-cache (default: 64)")
    parser.add_argument("--worker-memory-mib", type=int, default=4096, metavar="M", help="memory one decode may take (default: 4096)")
    parser.add_argument("--decode-timeout-s", type=float, default=120.0, metavar="S", help="time one decode may take (default: 120)")
    parser.add_argument("--drain-s", type=float, default=60.0, metavar="S", help="time to finish after SIGTERM (default: 60)")
    actions = parser.add_subparsers(dest="action", metavar="status")
    status = actions.add_parser("status", help="ask servers how they are")
    status.add_argument("urls", nargs="+", metavar="URL")


def run(args: argparse.Namespace) -> int:
    if args.action == "status":
        return _status(args.urls)
    asyncio.run(serve(_settings(args)))
    return 0


async def serve(settings: ServerSettings) -> None:
    """Run a server until SIGTERM or SIGINT."""
    front = Front(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, front.stop)
    await front.run()


def _settings(args: argparse.Namespace) -> ServerSettings:
    """Raises SettingsError for arguments that make no server."""
    host, colon, port = (args.listen or "").rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"--listen is {args.listen!r}: expected HOST:PORT, such as 127.0.0.1:7300")
    for name in ("workers", "memory_mib", "worker_memory_mib", "decode_timeout_s", "drain_s", "disk_cache_gib"):
        if vars(args)[name] <= 0:
            raise SettingsError(f"--{name.replace('_', '-')} is {vars(args)[name]}: expected more than 0")
    roots = tuple(root if is_url(root) else str(Path(root).resolve()) for root in args.root)
    disk = None if args.disk_cache is None else DiskCache(Path(args.disk_cache).resolve(), int(args.disk_cache_gib * GIB))
    Blobs(roots, disk)
    queue_jobs = 4 * args.workers if args.queue is None else max(args.queue, 0)
    limits = WorkerLimits(args.worker_memory_mib * MIB, args.decode_timeout_s)
    return ServerSettings(
        host=host.strip("[]"),
        port=int(port),
        pool=PoolSettings(args.workers, queue_jobs, roots, limits, worker_command(args.decoder), disk),
        memory_bytes=args.memory_mib * MIB,
        drain_s=args.drain_s,
        secret=None if args.secret_file is None else load_secret(Path(args.secret_file)),
        registry=None if args.registry is None else Path(args.registry),
        advertise=args.advertise,
    )


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
