"""Folders that appear, and are replaced, whole or not at all."""

import errno
import itertools
import os
import signal
from pathlib import Path

import pytest

from megatron_keye.checkpoint import new_folder as module
from megatron_keye.checkpoint.new_folder import new_folder
from megatron_keye.errors import CheckpointError

OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "c": "new"}


def fill(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def replace(path: Path) -> None:
    with new_folder(path, 0, replace=True) as folder:
        fill(folder, NEW)


def is_killed_before(number: int, path: Path) -> bool:
    """Replace `path` in a process that is killed before call `number` of those that change names or remove; False where it has fewer."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0
    calls = itertools.count()

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    try:
        for name in ("rename", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        module.exchange = counted(module.exchange)
        replace(path)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_replacement_that_is_killed_leaves_the_old_or_the_new_folder_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(module, "exchange", lambda first, second: False)
    for number in itertools.count():
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True)
        fill(out, OLD)
        was_killed = is_killed_before(number, out)
        if out.exists():
            assert contents(out) == NEW or (was_killed and contents(out) == OLD)
        else:
            (backup,) = out.parent.glob(".out.replaced-*")
            assert not can_exchange and contents(backup) == OLD
        replace(out)
        assert list(out.parent.iterdir()) == [out] and contents(out) == NEW
        if not was_killed:
            break
    assert number >= (4 if can_exchange else 6), "there were calls to be killed at"


def test_a_replacement_that_fails_half_way_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    fill(out, OLD)
    monkeypatch.setattr(module, "exchange", lambda first, second: False)
    rename = Path.rename

    def fail_for_the_new(path, target):
        if contents(path) == NEW:
            raise OSError(errno.EIO, "the disk is broken")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(CheckpointError, match="the disk is broken"):
        replace(out)
    assert list(tmp_path.iterdir()) == [out] and contents(out) == OLD


def test_folders_that_cannot_be_exchanged_are_an_error(tmp_path):
    (tmp_path / "first").mkdir()
    with pytest.raises(FileNotFoundError):
        module.exchange(tmp_path / "first", tmp_path / "second")


def test_a_block_that_raises_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "out", 0) as folder:
            (folder / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def be_late():
        with new_folder(out, 0):
            out.mkdir()
            (out / "theirs").write_text("x")

    with pytest.raises(CheckpointError, match="exists"):
        be_late()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "theirs").is_file()


def test_an_empty_folder_is_filled_and_readable_by_all(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out, 0) as folder:
        (folder / "file").write_text("x")
    assert (out / "file").is_file() and out.stat().st_mode & 0o055 == 0o055
