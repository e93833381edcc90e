"""The I/O servers that a job brings with it, on the CPU nodes of its second component."""

import subprocess
from pathlib import Path

from megatron_keye.train.supervise import slurm
from megatron_keye.train.supervise.job import Job, io_registry


class IoServers:
    """A step beside those that train. SLURM ends it with the job; a run whose servers are gone decodes by itself."""

    def __init__(self, job: Job):
        self._job = job
        self._step: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the servers, where the job has nodes for them, unless some of those that were started still run."""
        if not self._job.io_nodes or (self._step is not None and self._step.poll() is None):
            return
        with (io_registry(Path(self._job.run_dir)) / "servers.log").open("ab") as log:
            self._step = subprocess.Popen(slurm.io_command(self._job), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
