"""The files with which a run goes on with changed data.

    remaps/SHA256.npy           samples due of a source, int64; the ledger and later checkpoints name it, so it must stay
    remaps/step_00000012.json   the resume state of the checkpoint after 12 steps, and the one that takes its place

The JSON file is written last and in one move: without it nothing has changed.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_keye.checkpoint.files import flush_folder
from megatron_keye.errors import CheckpointError, LedgerError
from megatron_keye.plan.cursor import ResumeState
from megatron_keye.plan.remap import Remap
from megatron_keye.train.run_dir import RunDir, writing


class Remaps:
    """The remaps in a run directory."""

    def __init__(self, run: RunDir):
        self._folder = run.remaps

    def due(self, remap: Remap) -> np.ndarray:
        """The samples that a remap begins with, int64 [num_due]. Raises LedgerError for a file that is missing or damaged."""
        path = self._folder / f"{remap.sha256}.npy"
        remedy = "restore it from a copy: the order of the samples since the data changed follows from it"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LedgerError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
        if hashlib.sha256(content).hexdigest() != remap.sha256:
            raise LedgerError(f"{path} is damaged: its {len(content):,} bytes do not have the SHA-256 of its name; {remedy}")
        return np.load(io.BytesIO(content), allow_pickle=False)

    def applied(self, saved: str) -> ResumeState:
        """The resume state that a checkpoint saved, or the one that takes its place. Raises CheckpointError for a damaged file."""
        state = ResumeState.from_json(saved)
        path = self._state_path(state)
        if not path.exists():
            return state
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
            return ResumeState.from_json(texts["state"]) if texts["saved"] == saved else state
        except (OSError, ValueError, TypeError, LookupError, CheckpointError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): run `keye remap` again") from error

    def write(self, saved: str, state: ResumeState, due: Mapping[str, bytes]) -> None:
        """Make starts from the checkpoint with the resume state `saved` go on from `state`; `due` are the files of its remaps by hash.

        Raises KeyeError where they cannot be written. Whatever interrupts it, the run is as it was or goes on from `state`.
        """
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            for sha256, content in due.items():
                _write_flushed(self._folder / f"{sha256}.npy", content)
            flush_folder(self._folder)
            _write_flushed(self._state_path(state), json.dumps({"saved": saved, "state": state.to_json()}).encode() + b"\n")
            flush_folder(self._folder)

    def _state_path(self, state: ResumeState) -> Path:
        return self._folder / f"step_{state.cursor.step:08d}.json"


def due_file(samples: np.ndarray) -> tuple[str, bytes]:
    """Hash and content of the file of `samples`, int64 [n]."""
    stream = io.BytesIO()
    np.save(stream, samples.astype("<i8"), allow_pickle=False)
    return hashlib.sha256(stream.getvalue()).hexdigest(), stream.getvalue()


def _write_flushed(path: Path, content: bytes) -> None:
    """The whole file, or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
