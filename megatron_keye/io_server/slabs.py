"""The memory that results may take together."""

import weakref

from megatron_keye.data.slabs import Slab
from megatron_keye.io_server.protocol import Refused


class SlabBudget:
    """Bytes of all slabs that exist: being decoded into, sent, or kept. Their number is limited too: each is an open file."""

    def __init__(self, limit_bytes: int, limit_slabs: int):
        self.limit_bytes, self.limit_slabs = limit_bytes, limit_slabs
        self.used_bytes = self.used_slabs = 0

    def require_possible(self, num_bytes: int) -> None:
        """Raises Refused (too_large) for what can never fit."""
        if num_bytes > self.limit_bytes:
            raise Refused("too_large", f"the result takes {num_bytes} bytes; --memory-mib of this server allows {self.limit_bytes} in all")

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.limit_bytes and self.used_slabs < self.limit_slabs

    def allocate(self, num_bytes: int) -> Slab:
        """Raises Refused: `too_large` for what can never fit, `busy` where others take the room."""
        self.require_possible(num_bytes)
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
