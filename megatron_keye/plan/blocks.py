"""The order of one source, in two levels so that its shards are read in long stretches: blocks are shuffled, and then samples within a
few blocks.

A block is a run of samples that lie side by side. Every epoch shifts the boundaries of blocks, puts the blocks into a keyed order, cuts
that into windows of a few blocks, and permutes the samples of each window. While training is in one window, reads fall into its few
blocks and no others. Where one window holds the whole source, that is one permutation of all samples.

Nothing is stored: a position costs the same in a source of a thousand samples and of a billion.
"""

import hashlib
from functools import lru_cache

import numpy as np

from megatron_keye.errors import PlanError
from megatron_keye.plan.order import Permutation, by_epoch

CACHED_EPOCHS = 2
CACHED_WINDOWS = 8


class BlockOrder:
    """The endless sequence of epochs over samples 0 .. num_samples - 1; each epoch visits every sample once."""

    def __init__(self, num_samples: int, block_samples: int, blocks_per_window: int, seed: int):
        if num_samples < 1:
            raise PlanError(f"The dataset has {num_samples} samples; an order needs at least one. Check data.train and its index.")
        if min(block_samples, blocks_per_window) < 1:
            raise PlanError(f"Blocks of {block_samples} samples and windows of {blocks_per_window} blocks: expected at least 1 of each.")
        self.num_samples = num_samples
        self._epoch = lru_cache(CACHED_EPOCHS)(
            lambda epoch: _BlockEpoch(num_samples, block_samples, blocks_per_window, f"seed {seed}, epoch {epoch}")
        )

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions`, int64 [n]."""
        return by_epoch(positions, self.num_samples, self._epoch)


def shuffled(num_samples: int, seed: int) -> BlockOrder:
    """The order in which any sample may come anywhere in an epoch."""
    return BlockOrder(num_samples, max(1, num_samples), 1, seed)


class _BlockEpoch:
    """One epoch, as a function from offsets in it, int64 [n], to samples. Samples that fill no block come last, mixed with the last
    window; as block boundaries shift, they are others in each epoch."""

    def __init__(self, num_samples: int, block_samples: int, blocks_per_window: int, name: str):
        self._name, self._num_samples, self._block_samples = name, num_samples, block_samples
        self._num_blocks = num_samples // block_samples
        self._blocks = Permutation(self._num_blocks, f"block order: {name}".encode()) if self._num_blocks else None
        self._num_windows = max(1, self._num_blocks // blocks_per_window)
        self._window_samples = block_samples * blocks_per_window
        self._shift = int.from_bytes(hashlib.shake_256(f"block boundaries: {name}".encode()).digest(8), "little") % num_samples
        self._permutation = lru_cache(CACHED_WINDOWS)(self._window_permutation)

    def __call__(self, offsets: np.ndarray) -> np.ndarray:
        windows = np.minimum(offsets // self._window_samples, self._num_windows - 1)
        mixed = np.empty_like(offsets)
        for window in np.unique(windows).tolist():
            here, begin = windows == window, window * self._window_samples
            mixed[here] = begin + self._permutation(window).of(offsets[here] - begin)
        blocks, within = np.divmod(mixed, self._block_samples)
        whole = blocks < self._num_blocks
        if whole.any():
            blocks[whole] = self._blocks.of(blocks[whole])
        return (blocks * self._block_samples + within + self._shift) % self._num_samples

    def _window_permutation(self, window: int) -> Permutation:
        begin = window * self._window_samples
        end = self._num_samples if window == self._num_windows - 1 else begin + self._window_samples
        return Permutation(end - begin, f"samples of window {window}: {self._name}".encode())
