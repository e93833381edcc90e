"""A process that dies at any file operation of a save, and files that may not be read or written."""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_keye.checkpoint.background import BackgroundSave
from megatron_keye.checkpoint.host_copies import HostCopies
from megatron_keye.checkpoint.store import Keep, checkpoints, find_damage, latest_good, save_checkpoint
from megatron_keye.errors import CheckpointError
from tests.unit.checkpoint.states import IDENTITY, make_state, names, run_record
from tests.unit.train.forked import in_a_fork

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "os.fsync"}
NOBODY = 65534


class Crash(BaseException):
    """Nothing handles it, as nothing handles SIGKILL: what is on the disk at that moment stays."""


class Countdown:
    """Raises Crash at file operation number `left`, counted from 0, and at every one after it: the dead do nothing."""

    left: int | None = None
    thread: int | None = None

    def __call__(self, event: str, arguments: object) -> None:
        if self.left is None or event not in OPERATIONS or threading.get_ident() != self.thread:
            return
        self.left -= 1
        if self.left < 0:
            raise Crash(event)


COUNTDOWN = Countdown()
sys.addaudithook(COUNTDOWN)  # For good: Python has no way to take one back.


@contextmanager
def crashing_at(operation: int) -> Iterator[None]:
    fsync = os.fsync

    def audited_fsync(descriptor: int) -> None:
        COUNTDOWN("os.fsync", ())
        fsync(descriptor)

    COUNTDOWN.left, COUNTDOWN.thread = operation, threading.get_ident()
    try:
        with patch("os.fsync", audited_fsync):
            yield
    finally:
        COUNTDOWN.left = None


def save(folder: Path, step: int) -> None:
    save_checkpoint(folder, make_state(step), run_record(step), IDENTITY, Keep(1))


def test_a_crash_at_any_file_operation_leaves_a_good_checkpoint(tmp_path):
    """The old one until the new one has its name, the new one after that; and the next save clears up."""
    newest = []
    for operation in count():
        folder = tmp_path / str(operation)
        save(folder, 1)
        try:
            with crashing_at(operation):
                save(folder, 2)
        except Crash:
            pass
        else:
            break
        assert [find_damage(path) for path in checkpoints(folder) if find_damage(path)] == []
        newest.append(latest_good(folder)[0].name)
        save(folder, 3)
        assert names(folder) == ["step_00000003"]
    assert newest == sorted(newest), "once the new one is there it stays"
    assert newest.count("step_00000001") >= 8 and newest.count("step_00000002") >= 4, "there were that many operations to die at"


def test_a_crash_at_any_file_operation_of_the_commit_of_a_save_in_the_background(tmp_path):
    newest = []
    for operation in count():
        folder = tmp_path / str(operation)
        save(folder, 1)
        saving = BackgroundSave(folder, make_state(2), run_record(2), IDENTITY, Keep(1), HostCopies())
        try:
            with crashing_at(operation):
                saving.finish()
        except Crash:
            pass
        else:
            break
        assert [find_damage(path) for path in checkpoints(folder) if find_damage(path)] == []
        newest.append(latest_good(folder)[0].name)
    assert newest == sorted(newest) and set(newest) == {"step_00000001", "step_00000002"}


def as_nobody(function, *args):
    """What `function` returns in a process that may do nothing special."""

    def run():
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return function(*args)

    return in_a_fork(run)


def failed_save(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        save(folder, 2)
    return str(error.value)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter, which those of pytest are not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_a_file_that_may_not_be_read_is_named(folder, name):
    save(folder, 1)
    (folder / "step_00000001" / name).chmod(0)
    (problem,) = as_nobody(find_damage, folder / "step_00000001")
    assert f"step_00000001/{name}" in problem and "Permission denied" in problem


def test_a_folder_that_may_not_be_written_to_is_an_error(folder):
    save(folder, 1)
    folder.chmod(0o555)
    message = as_nobody(failed_save, folder)
    assert "Permission denied" in message and "repair the folder" in message
    assert names(folder) == ["step_00000001"]
    assert find_damage(folder / "step_00000001") == []
