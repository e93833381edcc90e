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


@dataclass(frozen=True)
class LocalRow:
    """What one rank holds of a row's T local tokens: `token_ids` int32 [T] on the first pipeline stage; on the last, `targets` int32 [T],
    twice the label, and 1 more where it is supervised. None elsewhere."""

    token_ids: np.ndarray | None
    targets: np.ndarray | None


def next_tokens(tokens: RowTokens, cu_seqlens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The label of every token, which is the next one of its document, and whether it is supervised; both [row tokens]."""
    labels = np.roll(tokens.token_ids, -1)
    supervised = np.roll(tokens.supervised, -1)
    supervised[np.asarray(cu_seqlens[1:]) - 1] = False
    return labels, supervised


def row_targets(tokens: RowTokens, cu_seqlens: Sequence[int]) -> np.ndarray:
    """int32 [row tokens]: `LocalRow.targets` of the whole row."""
    labels, supervised = next_tokens(tokens, cu_seqlens)
    return (2 * labels + supervised).astype(np.int32)


def num_supervised(tokens: RowTokens, cu_seqlens: Sequence[int]) -> int:
    """Supervised tokens that are somebody's label. The first token of a document is nobody's."""
    return int(next_tokens(tokens, cu_seqlens)[1].sum())
