"""Which tokens of a packed row a context-parallel rank holds.

Every document is cut into 2 x CP equal chunks, and rank r holds chunks r and 2 CP - 1 - r of each: the zigzag that gives
all ranks the same causal work. Documents must be padded to a multiple of 2 x CP.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def local_tokens(cu_seqlens: Sequence[int], cp_size: int, cp_rank: int) -> np.ndarray:
    """Row indices, int64 [row tokens / cp_size], of the tokens of `cp_rank`, in the order in which it holds them."""
    if cp_size == 1:
        return np.arange(cu_seqlens[-1], dtype=np.int64)
    pieces = []
    for start, end in pairwise(cu_seqlens):
        chunk, rest = divmod(end - start, 2 * cp_size)
        if rest:
            raise ValueError(f"a document of {end - start} tokens cannot be cut into 2 x {cp_size} equal chunks")
        for part in (cp_rank, 2 * cp_size - 1 - cp_rank):
            pieces.append(np.arange(start + part * chunk, start + (part + 1) * chunk, dtype=np.int64))
    return np.concatenate(pieces)


def gathered_order(cu_seqlens: Sequence[int], cp_size: int) -> np.ndarray:
    """int64 [row tokens]: where in the concatenation of all ranks' tokens each row token lies, so that
    `gathered[gathered_order(...)]` is in row order."""
    return np.argsort(np.concatenate([local_tokens(cu_seqlens, cp_size, rank) for rank in range(cp_size)]))
