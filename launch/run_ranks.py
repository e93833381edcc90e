"""torchrun with the trainer's own exit code.

torchrun ends with 1 whatever its workers ended with, so a launcher could not tell settings that must be changed (65)
from a crash that may be tried again. Takes torchrun's arguments.
"""

import sys
from collections.abc import Sequence
from signal import SIGTERM

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


def main(argv: Sequence[str]) -> int:
    """Runs the workers until they end and returns the exit code for all of them."""
    try:
        run(parse_args(list(argv)))
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        print(
            f"{error.name}: ranks that failed: {', '.join(f'{f.local_rank} (exit code {f.exitcode})' for f in failures)}", file=sys.stderr
        )
        return exit_code([failure.exitcode for failure in failures])
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
