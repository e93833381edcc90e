"""An order in two levels, so that shards are read in long stretches: blocks are shuffled, and then samples within a few blocks.

A block is a run of samples that lie side by side, about 64 MB of shards. Every epoch puts the blocks into a keyed order, cuts
that into windows of a few blocks, and permutes the samples of each window. While training is in one window, a leader's reads
fall into its few blocks and no others.
"""

from functools import lru_cache

import numpy as np

from megatron_keye.errors import PlanError
from megatron_keye.plan.order import Permutation, by_epoch

BLOCK_BYTES = 64 << 20
CACHED_EPOCHS = 2


def block_starts(sample_bytes: np.ndarray, shard_of: np.ndarray, block_bytes: int = BLOCK_BYTES) -> np.ndarray:
    """Boundaries of blocks, int64 [blocks + 1], of samples that take `sample_bytes` int64 [n] and lie in order in the shards `shard_of`
    int64 [n]. A block ends before the sample that would lift it above `block_bytes`, and with its shard."""
    if not len(sample_bytes):
        raise PlanError("The dataset has 0 samples; blocks need at least one. Check data.train and its index.")
    ends = np.cumsum(sample_bytes, dtype=np.int64)
    shard_ends = np.append(np.flatnonzero(np.diff(shard_of)) + 1, len(sample_bytes))
    starts = [0]
    for shard_end in shard_ends.tolist():
        while starts[-1] < shard_end:
            before = ends[starts[-1]] - sample_bytes[starts[-1]]
            stop = int(np.searchsorted(ends, before + block_bytes, side="right"))
            starts.append(min(max(stop, starts[-1] + 1), shard_end))
    return np.array(starts, np.int64)


class BlockOrder:
    """The endless sequence of epochs in two levels. Keeps the boundaries of blocks and, for the epochs in use, sums over them."""

    def __init__(self, starts: np.ndarray, blocks_per_window: int, seed: int):
        """`starts` int64 [blocks + 1] as from `block_starts`."""
        if len(starts) < 2 or starts[0] != 0 or (np.diff(starts) < 1).any():
            raise PlanError("Block boundaries must rise from 0 to the number of samples. Write the index again.")
        if blocks_per_window < 1:
            raise PlanError(f"blocks_per_window is {blocks_per_window}, expected at least 1.")
        self._starts, self._blocks_per_window, self._seed = starts, blocks_per_window, seed
        self.num_samples = int(starts[-1])
        self._epoch = lru_cache(CACHED_EPOCHS)(lambda epoch: _BlockEpoch(starts, blocks_per_window, f"seed {seed}, epoch {epoch}"))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions`, int64 [n]."""
        return by_epoch(positions, self.num_samples, self._epoch)


class _BlockEpoch:
    def __init__(self, starts: np.ndarray, blocks_per_window: int, name: str):
        num_blocks = len(starts) - 1
        self._name = name
        blocks = Permutation(num_blocks, f"block order: {name}".encode()).of(np.arange(num_blocks))
        self._first_samples = starts[blocks]
        self._begins = np.concatenate([[0], np.cumsum(starts[blocks + 1] - starts[blocks])])
        """Of each block in this epoch's order, the offset at which it would begin if its samples were not mixed with others."""
        self._windows = self._begins[np.append(np.arange(0, num_blocks, blocks_per_window), num_blocks)]

    def __call__(self, offsets: np.ndarray) -> np.ndarray:
        windows = np.searchsorted(self._windows, offsets, side="right") - 1
        unmixed = np.empty_like(offsets)
        for window in np.unique(windows).tolist():
            here = windows == window
            begin, end = self._windows[window], self._windows[window + 1]
            permutation = Permutation(int(end - begin), f"samples of window {window}: {self._name}".encode())
            unmixed[here] = begin + permutation.of(offsets[here] - begin)
        blocks = np.searchsorted(self._begins, unmixed, side="right") - 1
        return self._first_samples[blocks] + unmixed - self._begins[blocks]
