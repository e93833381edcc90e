"""Memory files for results: named by descriptors alone, so that the kernel frees them whatever dies."""

import fcntl
import os
import weakref

from megatron_keye.io_server.protocol import Refused


class Slab:
    """A memory file of fixed size. It is freed, and its bytes are given back to the budget, when nothing refers to it."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("keye-result", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_bytes)
        # A worker that goes wrong must not take bytes away from under those that are being sent.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def __len__(self) -> int:
        return self.num_bytes

    def fileno(self) -> int:
        return self.fd

    def freeze(self) -> None:
        """Nobody can change the bytes from here on."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


class SlabBudget:
    """Bytes of all slabs that exist: being decoded into, sent, or kept. Their number is limited too: each is an open file."""

    def __init__(self, limit_bytes: int, limit_slabs: int):
        self.limit_bytes, self.limit_slabs = limit_bytes, limit_slabs
        self.used_bytes = self.used_slabs = 0

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.limit_bytes and self.used_slabs < self.limit_slabs

    def allocate(self, num_bytes: int) -> Slab:
        """Raises Refused: `too_large` for what can never fit, `busy` where others take the room."""
        if num_bytes > self.limit_bytes:
            raise Refused("too_large", f"the result takes {num_bytes} bytes; --memory-mib of this server allows {self.limit_bytes} in all")
        if not self.has_room(num_bytes):
            in_use = f"{self.used_slabs} results take {self.used_bytes} of {self.limit_bytes} bytes"
            raise Refused("busy", in_use, retry_after_s=1)
        slab = Slab(num_bytes)
        self.used_bytes += num_bytes
        self.used_slabs += 1
        weakref.finalize(slab, self._release, num_bytes)
        return slab

    def _release(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes
        self.used_slabs -= 1
