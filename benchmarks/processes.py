"""What processes of this machine use, from /proc: CPU time, memory, bytes read."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and all below it, of whichever thread they are children."""
    found = [pid]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
                found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size: a page that n processes share counts for 1 / n in each."""
    return sum(_kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss:") for pid in pids) << 10


def read_bytes(pids: Iterable[int]) -> int:
    """Bytes that processes took by read calls so far, whether from a disk or from the page cache."""
    return sum(int(Path(f"/proc/{pid}/io").read_text().split()[1]) for pid in pids)


def _kilobytes(text: str, field: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field))
