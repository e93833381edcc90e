"""`python -m megatron_keye.train.supervise RUN_DIR`: what launch/train.sbatch becomes in the batch shell's place."""

import os
import sys
from pathlib import Path

from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise.attempt import this_allocation
from megatron_keye.train.supervise.job import load_job
from megatron_keye.train.supervise.supervisor import Supervisor


def main(run_dir: str) -> int:
    """The job's exit code."""
    try:
        job = load_job(Path(run_dir))
        if job.continues and not RunDir(job.continues).is_done:
            raise SettingsError(f"{run_dir} continues {job.continues}, which is not complete; submit the chain again")
        return Supervisor(this_allocation(job, os.environ)).run()
    except KeyeError as error:
        print(f"supervisor: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
