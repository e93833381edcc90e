"""torchrun with the trainer's own exit code.

torchrun ends with 1 whatever its workers ended with, so a launcher could not tell settings that must be changed (65)
from a crash that may be tried again. Takes torchrun's arguments; `--report FILE` before them also writes how each rank failed.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import SIGTERM, Signals

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

DELIBERATE = (66, 65)
"""Exit codes that a rank chooses itself."""
TAKEN_DOWN = -SIGTERM
"""How ranks end that torchrun stops because another one failed."""


def exit_code(worker_codes: Sequence[int]) -> int:
    """One code for all ranks: a deliberate one if any rank has it, else that of the first rank which was not just taken down.

    `worker_codes` are those of the failed ranks, at least one, earliest failure first; -n is signal n and becomes 128 + n.
    """
    for code in DELIBERATE:
        if code in worker_codes:
            return code
    code = next((code for code in worker_codes if code != TAKEN_DOWN), TAKEN_DOWN)
    return code if code > 0 else 128 - code


def _ending(worker_code: int) -> str:
    return f"exit code {worker_code}" if worker_code >= 0 else Signals(-worker_code).name


def main(argv: Sequence[str]) -> int:
    """Runs the workers until they end and returns the exit code for all of them."""
    report = Path(argv[1]) if argv[0] == "--report" else None
    code, failures = _run(argv if report is None else argv[2:])
    if report is not None:
        report.write_text(json.dumps({"exit_code": code, "failures": failures}), encoding="utf-8")
    return code


def _run(argv: Sequence[str]) -> tuple[int, list[dict]]:
    """The exit code for all workers, and those that failed, earliest first."""
    # It tells of the first rank that ended; the line below tells of all.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run(parse_args(list(argv)))
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        codes = [failure.exitcode for _, failure in failures]
        if not set(codes) <= {*DELIBERATE, TAKEN_DOWN}:
            died = ", ".join(f"{rank} ({_ending(failure.exitcode)})" for rank, failure in failures)
            print(f"ranks that did not end well: {died}", file=sys.stderr)
        return exit_code(codes), [
            {"rank": rank, "local_rank": failure.local_rank, "exit_code": failure.exitcode, "time_s": failure.timestamp}
            for rank, failure in failures
        ]
    except SignalException as error:
        return 128 + error.sigval, []
    return 0, []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
