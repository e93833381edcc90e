"""Folders that appear whole or not at all."""

import ctypes
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

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux: paths are relative to the working directory, and two names change places."""
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

    A folder that is replaced keeps its name until the new one has it, where the file system can exchange the two; elsewhere there is a
    moment in which it is `.NAME.replaced-*`. What a process that was killed has left of an earlier attempt is removed first. Raises
    CheckpointError where `path` exists and is not to be replaced, and where the disk has no room for `needed_bytes` or runs full on
    the way.
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
    if not path.exists() or not any(path.iterdir()):
        hidden.rename(path)
    elif not exchange(hidden, path):
        _replace(hidden, path)
    flush_folder(path.parent)
    for backup in path.parent.glob(f"{_backup_prefix(path)}*"):
        shutil.rmtree(backup, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Let two folders change names in one step of the file system; False where it, or this system, knows no such step."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(second))


def _replace(hidden: Path, path: Path) -> None:
    backup = path.with_name(f"{_backup_prefix(path)}{os.getpid()}")
    path.rename(backup)
    try:
        hidden.rename(path)
    except OSError:
        backup.rename(path)
        raise


def _backup_prefix(path: Path) -> str:
    """Of an old folder, whole, whose process was killed between two renames: it stays until there is a new one."""
    return f".{path.name}.replaced-"


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
