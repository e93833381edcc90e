"""Memory that answers are read into, used again and again: fresh pages cost the kernel as much as copying an answer into them."""

import logging
import threading
import weakref
from collections import deque

import numpy as np
import torch

LEAST_BLOCK_BYTES = 1 << 20
"""Smaller arrays come from the heap, which uses its pages again by itself."""
STEPS_PER_DOUBLING = 4
"""Sizes of blocks from one power of two to the next: at most a fifth of a block is not used."""

log = logging.getLogger(__name__)


class BufferPool:
    """Lends arrays, page-locked where there is a GPU to copy them to and the kernel allows it. May be called from several threads.

    A block comes back when nothing refers to its array any more, nor to any part of it: no code gives it back, so none does too early.
    """

    def __init__(self, idle_limit_bytes: int):
        """Keeps at most `idle_limit_bytes` that nobody uses, those used last."""
        self._idle_limit_bytes = idle_limit_bytes
        self._idle: deque[np.ndarray] = deque()
        self._idle_bytes = 0
        # Finalizers append here, and may not wait for the lock: they run at any moment, also in a thread that holds it.
        self._returned: deque[np.ndarray] = deque()
        self._page_locks = torch.cuda.is_available()
        self._lock = threading.Lock()

    def lend(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] with any content."""
        if num_bytes < LEAST_BLOCK_BYTES:
            return np.empty(num_bytes, dtype=np.uint8)
        block = self._take(block_bytes(num_bytes))
        # Parts of an array refer to it only where its own base is no array: hence the memoryview. They would refer to the block otherwise.
        lent = np.frombuffer(memoryview(block), dtype=np.uint8, count=num_bytes)
        weakref.finalize(lent, self._give_back, block).atexit = False
        return lent

    def _take(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            self._collect()
            place = next((place for place, block in enumerate(self._idle) if len(block) == num_bytes), None)
            if place is not None:
                block = self._idle[place]
                del self._idle[place]
                self._idle_bytes -= num_bytes
            self._trim()
        self._settle()
        return self._new_block(num_bytes) if place is None else block

    def _give_back(self, block: np.ndarray) -> None:
        self._returned.append(block)
        self._settle()

    def _settle(self) -> None:
        """Make the limit hold, unless another thread has the lock: that one calls this when it has let go, so that none is overlooked."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._collect()
                self._trim()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
            self._idle_bytes += len(self._idle[-1])

    def _trim(self) -> None:
        while self._idle_bytes > self._idle_limit_bytes:
            self._idle_bytes -= len(self._idle.popleft())

    def _new_block(self, num_bytes: int) -> np.ndarray:
        if self._page_locks:
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
            except RuntimeError as error:  # of CUDA: such memory is only faster
                self._page_locks = False
                log.warning("no more page-locked memory, answers of servers go into ordinary one from here on: %s", error)
        return np.empty(num_bytes, dtype=np.uint8)


def block_bytes(num_bytes: int) -> int:
    """Size of the block for an array of `num_bytes`, so that arrays of nearly the same size use the same blocks."""
    step = max(1 << (num_bytes - 1).bit_length(), 2 * STEPS_PER_DOUBLING) // (2 * STEPS_PER_DOUBLING)
    return -(-num_bytes // step) * step
