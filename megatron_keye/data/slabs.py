"""Memory files for results: named by descriptors alone, so that the kernel frees them whatever dies."""

import fcntl
import mmap
import os
import weakref

import numpy as np


class Slab:
    """A memory file of fixed size, freed when nothing refers to it."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("keye-result", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_bytes)
        # A worker that goes wrong must not take bytes away from under those that read them.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def __len__(self) -> int:
        return self.num_bytes

    def fileno(self) -> int:
        return self.fd

    def freeze(self) -> None:
        """Nobody can change the bytes from here on."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

    def view(self) -> np.ndarray:
        """uint8 [num_bytes], read-only and not copied. The memory lives as long as the array or a part of it, without the slab."""
        if not self.num_bytes:  # nothing cannot be mapped
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(self.fd, self.num_bytes, prot=mmap.PROT_READ), dtype=np.uint8)
