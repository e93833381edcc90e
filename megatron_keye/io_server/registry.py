"""Finding servers through a shared folder: each keeps a file there that says where it is and until when to believe it."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_keye.io_server.protocol import is_server_url

LEASE_S = 30.0
RENEW_S = 5.0


@dataclass(frozen=True, slots=True)
class Lease:
    """`expires_s` is in seconds since the epoch: clocks of the machines must agree to a few seconds."""

    url: str
    decoder_id: str
    num_workers: int
    expires_s: float


def lease_path(folder: Path, url: str) -> Path:
    return folder / (url.rpartition("/")[2].replace(":", "-") + ".json")


def write_lease(folder: Path, url: str, decoder_id: str, num_workers: int) -> None:
    """Write or renew a server's file, whole or not at all. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = lease_path(folder, url)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(Lease(url, decoder_id, num_workers, time.time() + LEASE_S))), encoding="utf-8")
    temporary.replace(path)


def remove_lease(folder: Path, url: str) -> None:
    lease_path(folder, url).unlink(missing_ok=True)


def live_leases(folder: Path) -> list[Lease]:
    """Leases that have not run out, by URL. Files that hold none are passed over: another will be there soon.

    Raises OSError where the folder is there and cannot be listed.
    """
    leases, now_s = [], time.time()
    for path in sorted(folder.glob("*.json")):
        try:
            lease = Lease(**json.loads(path.read_bytes()))
            if lease.expires_s > now_s and is_server_url(lease.url):
                leases.append(lease)
        except (OSError, ValueError, TypeError):
            continue
    return sorted(leases, key=lambda lease: lease.url)
