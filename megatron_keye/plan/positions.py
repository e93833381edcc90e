"""M-RoPE positions of whole packed rows."""

import numpy as np

from megatron_keye.config.schema import Variant
from megatron_keye.contract.positions import mrope_positions
from megatron_keye.plan.types import Row


def row_positions(row: Row, variant: Variant) -> np.ndarray:
    """int64 [3, row tokens]: every document starts again at 0, and its padding counts on after its last token."""
    positions = np.zeros((3, row.num_tokens), dtype=np.int64)
    for document in row.documents:
        own = mrope_positions(document.shape, variant)
        end = document.start + document.shape.num_tokens
        positions[:, document.start : end] = own
        padding = document.padded_tokens - document.shape.num_tokens
        positions[:, end : end + padding] = own.max(initial=-1) + 1 + np.arange(padding)
    if not row.documents:
        positions[:] = np.arange(row.num_tokens)
    return positions
