"""What one node says about itself before a run starts, as one line of JSON. launch/preflight.sh and the supervisor run it on each node.

GPUs as nvidia-smi sees them and as torch computes on them, the run directory written and read back, the clock, and versions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "flash-attn")
PROBE_BYTES = 64 << 20
GPU_FIELDS = "name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown"
MIB = 1 << 20


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args(argv).run_dir
    problems: list[str] = []
    gpus = list_gpus(problems)
    if gpus:
        problems += gpus_that_compute_wrongly(len(gpus))
    free_disk_bytes, disk_bytes_per_s = try_disk(run_dir, problems)
    report = {
        "time_s": time.time(),
        "gpus": gpus,
        "versions": installed_versions(),
        "free_disk_bytes": free_disk_bytes,
        "disk_bytes_per_s": disk_bytes_per_s,
        "problems": problems,
    }
    print(json.dumps(report))
    return 0


def list_gpus(problems: list[str]) -> list[dict]:
    """As nvidia-smi lists them; none on a machine without it."""
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        problems.append("nvidia-smi does not answer")
        return []
    if done.returncode:
        problems.append(f"nvidia-smi failed: {(done.stdout + done.stderr).strip()}")
        return []
    return [parse_gpu(line) for line in done.stdout.splitlines() if line.strip()]


def parse_gpu(line: str) -> dict:
    """One line of nvidia-smi's CSV; what a GPU does not support is `[N/A]`."""
    name, driver, total_mib, used_mib, ecc, slowdown = (word.strip() for word in line.split(","))
    return {
        "name": name,
        "driver": driver,
        "memory_bytes": int(total_mib) * MIB,
        "used_bytes": int(used_mib) * MIB,
        "ecc_errors": int(ecc) if ecc.isdigit() else 0,
        "slowed_by": "hardware slowdown" if slowdown == "Active" else "",
    }


def gpus_that_compute_wrongly(num_listed: int) -> list[str]:
    """A product of small whole numbers is exact in float32, TF32 too, so any difference is a fault."""
    import torch

    problems = []
    if torch.cuda.device_count() != num_listed:
        problems.append(f"torch sees {torch.cuda.device_count()} GPUs, nvidia-smi {num_listed}")
    a = torch.randint(-4, 5, (1024, 1024), generator=torch.Generator().manual_seed(0)).double()
    expected = a @ a
    for number in range(torch.cuda.device_count()):
        try:
            on_gpu = a.to(f"cuda:{number}", torch.float32)
            if not torch.equal((on_gpu @ on_gpu).double().cpu(), expected):
                problems.append(f"GPU {number} computes a wrong product")
        except RuntimeError as error:
            problems.append(f"GPU {number} does not compute: {str(error).splitlines()[0]}")
    return problems


def try_disk(run_dir: Path, problems: list[str]) -> tuple[int, float]:
    """Free bytes in the run directory, and the bytes/s of writing a file there and reading it back."""
    path = run_dir / f".preflight-{os.uname().nodename}-{os.getpid()}"
    content = os.urandom(MIB) * (PROBE_BYTES // MIB)
    try:
        began_s = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        same = path.read_bytes() == content
        took_s = time.perf_counter() - began_s
    except OSError as error:
        problems.append(f"the run directory cannot be written: {error}")
        return sys.maxsize, 0.0
    finally:
        with suppress(OSError):
            path.unlink()
    if not same:
        problems.append("the run directory gives back other bytes than were written")
    stats = os.statvfs(run_dir)
    return stats.f_bavail * stats.f_frsize, PROBE_BYTES / took_s


def installed_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
