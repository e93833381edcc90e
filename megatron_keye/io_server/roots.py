"""Which files may be read: regular ones below the allowed folders, wherever links and dots in a path lead."""

import os
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

from megatron_keye.errors import SettingsError
from megatron_keye.io_server.protocol import Refused


class Roots:
    """The allowed folders. Raises SettingsError where one does not exist."""

    def __init__(self, folders: Sequence[Path]):
        missing = [str(folder) for folder in folders if not folder.is_dir()]
        if missing:
            raise SettingsError(f"--root {' '.join(missing)}: no such folder")
        self._real = [os.path.realpath(folder) for folder in folders]

    def open(self, path: str) -> BufferedReader:
        """Open a file for reading. Raises Refused: `forbidden_path` outside of the roots, and for what is no regular file; `missing` where
        there is no such file."""
        if "\0" in path or not os.path.isabs(path):
            raise Refused("forbidden_path", "expected an absolute path")
        self._check(os.path.realpath(path))
        try:
            # Opening a pipe without O_NONBLOCK would wait for its other end.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Refused("missing", f"cannot read {path}: {error.strerror or error}") from error
        try:
            # The path may have been changed since it was resolved: what counts is the file that is open.
            self._check(os.readlink(f"/proc/self/fd/{fd}"))
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Refused("forbidden_path", f"{path} is not a regular file")
        except BaseException:
            os.close(fd)
            raise
        return open(fd, "rb")

    def holds(self, real: str) -> bool:
        """Whether a path without links is one of the folders, or in one."""
        return any(os.path.commonpath([root, real]) == root for root in self._real)

    def _check(self, real: str) -> None:
        if not self.holds(real):
            raise Refused("forbidden_path", "the path leads out of the folders that this server was started with (--root)")
