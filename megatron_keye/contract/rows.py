"""The text side of packed rows, as the data plane hands it over and the model consumes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowTokens:
    """`token_ids` int64 [row tokens], padding included, and `supervised` bool [row tokens], true where the token is one that the
    model must predict."""

    token_ids: np.ndarray
    supervised: np.ndarray


def next_tokens(tokens: RowTokens, cu_seqlens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The label of every token, which is the next one of its document, and whether it is supervised; both [row tokens]."""
    labels = np.roll(tokens.token_ids, -1)
    supervised = np.roll(tokens.supervised, -1)
    supervised[np.asarray(cu_seqlens[1:]) - 1] = False
    return labels, supervised


def num_supervised(tokens: RowTokens, cu_seqlens: Sequence[int]) -> int:
    """Supervised tokens that are somebody's label. The first token of a document is nobody's."""
    return int(next_tokens(tokens, cu_seqlens)[1].sum())
