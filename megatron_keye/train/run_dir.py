"""The run directory, which is how people and launchers see and steer a run.

    config.yaml       settings as resolved when the run last started
    metrics.jsonl     one line per step
    validation.jsonl  one line per validation; its step is the last one trained before it
    ledger.jsonl      which samples each step trained on, chained by hash; see `plan/ledger.py`
    remaps/           what was still due where data changed; see `train/remaps.py`
    checkpoints/      step_00000123/ ...
    hf/               step_123/ ..., Hugging Face folders, where train.export_hf_every_steps asks for them
    heartbeats/rankN  "step time phase", renewed at every phase change
    step.json         the step that is being trained, and its samples
    stacks/rankN      empty; the stacks of a rank's threads where its watchdog or a fatal signal ended it
    tensorboard/
    STOP, SAVE        put there by anyone: end the run at the next step with a checkpoint; checkpoint now and go on
    DONE              put there by the run when its last step is saved
    lock              held while a start of the run is alive
"""

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_keye.errors import KeyeError, SettingsError

WAIT_S = 60.0
"""For an earlier start that lost its launcher: it stops at its next step, with a checkpoint."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""File systems that know no locks."""


class RunDir:
    """Paths and small files of one run. Only the main rank writes anything but its own heartbeat."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.remaps = self.path / "remaps"
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.yaml"
        self.step = self.path / "step.json"
        self.tensorboard = self.path / "tensorboard"

    def create(self) -> None:
        """Raises SettingsError where the folder cannot be made or written."""
        try:
            for folder in (self.checkpoints, self.path / "heartbeats"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"the run directory {self.path} cannot be made: {error}; choose another with --run-dir") from error

    @contextmanager
    def locked(self, wait_s: float = WAIT_S) -> Iterator[None]:
        """Keep other starts of this run out, where the file system can. Raises KeyeError when another is alive for `wait_s`."""
        with (self.path / "lock").open("a") as file:
            deadline = time.monotonic() + wait_s
            while not _try_lock(file):
                if time.monotonic() > deadline:
                    raise KeyeError(f"another start of the run {self.path} is alive; wait for its end, or touch {self.path}/STOP to end it")
                time.sleep(0.1)
            yield

    def heartbeat(self, rank: int, step: int, phase: str) -> None:
        """Say that `rank` is alive in `phase` (setup, load, step, save, eval) of `step`. Raises KeyeError."""
        path = self.path / "heartbeats" / f"rank{rank}"
        with writing(path):
            write_atomically(path, f"{step} {time.time():.3f} {phase}\n")

    def stacks(self, rank: int) -> Path:
        return self.path / "stacks" / f"rank{rank}"

    def note_step(self, step: int, sample_ids: list[str]) -> None:
        """Say what is about to be trained: the ledger's line comes only when the step is over, which a step that ends the run never is."""
        with writing(self.step):
            write_atomically(self.step, json.dumps({"step": step, "samples": sample_ids}) + "\n")

    def is_asked(self, name: str) -> bool:
        """Whether somebody put the file `name` (STOP or SAVE) there."""
        return (self.path / name).exists()

    def answer(self, name: str) -> None:
        """Remove a request that was carried out."""
        (self.path / name).unlink(missing_ok=True)

    @property
    def is_done(self) -> bool:
        return (self.path / "DONE").exists()

    def mark_done(self, step: int) -> None:
        with writing(self.path / "DONE"):
            write_atomically(self.path / "DONE", f"{step}\n")


def _try_lock(file) -> bool:
    """Whether the lock on `file` is now ours, or there are none to be had here. It ends with the process, however that ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises KeyeError, which names `path`, where the system refuses a write: the disk is full, or the folder is gone."""
    try:
        yield
    except OSError as error:
        raise KeyeError(
            f"cannot write {path} ({error.strerror}): make room or repair the folder, and start again; the run goes on from its newest "
            "checkpoint"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class JsonLines:
    """A file of one JSON object per line, appended to; each line has a `step`."""

    def __init__(self, path: Path):
        self.path = path

    def keep_before(self, step: int) -> None:
        """Drop the lines of steps from `step` on, which a resumed run will write again, and any that is torn. Raises KeyeError."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) < step]
        with writing(self.path):
            write_atomically(self.path, "".join(f"{line}\n" for line in kept))

    def append(self, fields: dict) -> None:
        """Numbers that are not finite become null, which is all that JSON has for them. Raises KeyeError."""
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


def _step_of(line: str) -> float:
    """The line's step; infinity for a line that was cut off while it was written."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
