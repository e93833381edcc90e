"""Folders that appear whole or not at all."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_keye.checkpoint.files import flush_folder
from megatron_keye.errors import CheckpointError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_absent(path: Path, replace: bool) -> None:
    """Raises CheckpointError where something is at `path` that is not to be replaced. An empty folder is nothing."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not replace:
        raise CheckpointError(f"{path} exists; choose another output, or replace it with --force")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; name a folder")


@contextmanager
def new_folder(path: Path, needed_bytes: int, replace: bool = False) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `path` by one rename when the block ends without an error, and else is removed.

    What a process that was killed has left of an earlier attempt is removed first. Raises CheckpointError where `path` exists and is
    not to be replaced, and where the disk has no room for `needed_bytes` or runs full on the way.
    """
    require_absent(path, replace)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        _require_room(path.parent, needed_bytes)
        hidden = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        with _locked(hidden):
            try:
                yield hidden
                hidden.chmod(0o777 & ~_umask())
                flush_folder(hidden)
                _move(hidden, path, replace)
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        full = " make room and start again;" if error.errno in NO_SPACE else ""
        raise CheckpointError(f"{path} could not be written: {error.strerror or error};{full} nothing was left behind") from error


def _move(hidden: Path, path: Path, replace: bool) -> None:
    require_absent(path, replace)
    if path.is_dir() and any(path.iterdir()):
        old = path.with_name(f"{_prefix(path)}replaced-{os.getpid()}")
        path.rename(old)
        hidden.rename(path)
        flush_folder(path.parent)
        shutil.rmtree(old)
    else:
        hidden.rename(path)
        flush_folder(path.parent)


def _prefix(path: Path) -> str:
    return f".{path.name}.incomplete-"


def _remove_abandoned(path: Path) -> None:
    for folder in path.parent.glob(f"{_prefix(path)}*"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except OSError:
            # Another process is filling it, or this file system knows no locks: then it is left to whoever looks after the disk.
            continue
        finally:
            os.close(descriptor)


def _require_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"{folder} has {free_bytes / 1e9:,.1f} GB free, and {needed_bytes / 1e9:,.1f} GB are needed; make room or use another disk"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from taking the folder for abandoned, where the file system can. Ends with this process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value
