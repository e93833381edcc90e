"""Hugging Face folders of a run's checkpoints, `RUN_DIR/hf/step_N`, made by another process while training goes on.

A checkpoint that is to be exported is kept by hard links in `RUN_DIR/hf/.step_N.source`, whatever the run removes in the meantime, until
its folder is there. So what a killed run has left of these is work that its next start takes up.
"""

import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from megatron_keye.checkpoint.manifest import MANIFEST
from megatron_keye.config.schema import TrainConfig
from megatron_keye.train.run_dir import RunDir

WORKER = "megatron_keye.checkpoint.export_worker"


class LiveExport:
    """One export at a time, started by the main rank, which never waits before the end. A failure is said, and does not stop the run."""

    def __init__(self, run_dir: RunDir, settings: TrainConfig, say: Callable[[str], None]):
        self.folder = run_dir.path / "hf"
        self._settings = settings
        self._say = say
        self._waiting: deque[Path] = deque()
        self._running: tuple[subprocess.Popen, Path] | None = None

    def resume(self, step: int, checkpoint: Path | None) -> None:
        """Take up what an earlier start of the run, which got to `step` and its `checkpoint`, has left undone."""
        for source in sorted(self.folder.glob(".step_*.source")):
            if (source / MANIFEST).is_file() and not self._output(source).exists():
                self._waiting.append(source)
            else:
                shutil.rmtree(source)
        if checkpoint is not None and not self._output(self._source(step)).exists() and self._source(step) not in self._waiting:
            self.saved(step, checkpoint)
        self._advance()

    def saved(self, step: int, checkpoint: Path) -> None:
        """Export a checkpoint that was just saved, where the settings ask for it."""
        if step % self._settings.export_hf_every_steps and step < self._settings.steps:
            return
        source = self._source(step)
        try:
            self.folder.mkdir(exist_ok=True)
            shutil.rmtree(source, ignore_errors=True)
            source.mkdir()
            # The manifest comes last: without it, the links are not complete.
            for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == MANIFEST):
                os.link(path, source / path.name)
        except OSError as error:
            self._say(f"step {step} is not exported: {checkpoint} cannot be linked to ({error.strerror}); use data_tools/convert.py")
            return
        self._waiting.append(source)
        self._advance()

    def wait(self) -> None:
        """For all exports."""
        self._advance()
        while self._running is not None:
            self._running[0].wait()
            self._advance()

    def _advance(self) -> None:
        """Say how an export ended, and start the next."""
        if self._running is not None and self._running[0].poll() is not None:
            process, output = self._running
            error = process.stderr.read().strip()
            self._say(f"exported {output}" if process.returncode == 0 else f"{output} was not exported: {error}")
            self._running = None
        if self._running is None and self._waiting:
            source = self._waiting.popleft()
            output = self._output(source)
            command = [sys.executable, "-m", WORKER, str(source), str(output)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            self._running = process, output

    def _source(self, step: int) -> Path:
        return self.folder / f".step_{step}.source"

    def _output(self, source: Path) -> Path:
        return source.with_name(source.name.removeprefix(".").removesuffix(".source"))
