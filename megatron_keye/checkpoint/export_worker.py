"""The process that a run starts to export a checkpoint: `python -m megatron_keye.checkpoint.export_worker SOURCE OUTPUT`.

SOURCE is removed when OUTPUT is there, and kept when that fails. Errors go to stderr.
"""

import os
import shutil
import sys
from pathlib import Path

from megatron_keye.checkpoint.convert import export_hf
from megatron_keye.errors import KeyeError

NICENESS = 10
"""Training comes first where they share cores."""
MAX_SHARD_BYTES = 5_000_000_000


def main(source: Path, output: Path) -> int:
    os.nice(NICENESS)
    try:
        export_hf(source, MAX_SHARD_BYTES).write(output, replace=True)
    except KeyeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    shutil.rmtree(source)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
