"""From pieces of text and resolved media to token ids, supervision flags and the shape that planning works with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_keye.config.schema import Variant
from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.contract.tokens import SpecialTokens
from megatron_keye.data.record import Record
from megatron_keye.data.template import TextPiece, render
from megatron_keye.data.tokenizer import KeyeTokenizer
from megatron_keye.errors import DataError


@dataclass(frozen=True, slots=True)
class ItemLayout:
    """An image or video after its sizes are settled: all that its tokens depend on.

    `grids` has one entry per attention segment: one for an image or a Preview clip, one per frame of a Keye-VL-1.5 video.
    The frames of the latter also have `timestamps_s` and `fast` (True for a fast frame), one entry each.
    """

    kind: Literal["image", "video"]
    grids: tuple[PatchGrid, ...]
    fast: tuple[bool, ...] = ()
    timestamps_s: tuple[float, ...] = ()
    ticks_per_frame: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Visual tokens of all segments."""
        return sum(grid.num_tokens for grid in self.grids)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedSample:
    """A sample as the decoder reads it: `token_ids` int32 [T], `supervised` bool [T], and its shape with T tokens.

    supervised[t] says that token t is a target of the loss. It is False at 0, which nothing predicts.
    """

    token_ids: np.ndarray
    supervised: np.ndarray
    shape: SampleShape

    def truncated(self, num_tokens: int) -> "TokenizedSample":
        """The first `num_tokens` tokens. The caller sees to it that no visual token is cut off."""
        shape = SampleShape(min(num_tokens, self.shape.num_tokens), self.shape.segments)
        return TokenizedSample(self.token_ids[:num_tokens], self.supervised[:num_tokens], shape)


def tokenize(record: Record, items: Sequence[ItemLayout], tokenizer: KeyeTokenizer, variant: Variant) -> TokenizedSample:
    """Tokens of a whole record; `items` are the layouts of `record.media`, in order.

    Every stretch of text between two media is tokenized as one string, as the released processors do.
    Raises DataError if a text holds a visual placeholder for which there is no medium.
    """
    writer = _TokenWriter()
    for piece in render(record):
        if isinstance(piece, TextPiece):
            _write_text(writer, piece, tokenizer, record.id)
        else:
            item = items[piece.item]
            placeholder = tokenizer.specials.image_pad if item.kind == "image" else tokenizer.specials.video_pad
            between = media_structure(item, tokenizer, variant)
            for ids, grid in zip(between[:-1], item.grids, strict=True):
                writer.text(ids)
                writer.segment(grid, item.ticks_per_frame, placeholder)
            writer.text(between[-1])
    return writer.finish()


def media_structure(item: ItemLayout, tokenizer: KeyeTokenizer, variant: Variant) -> list[list[int]]:
    """Token ids before the first segment of `item`, between its segments, and after the last: one list more than segments.

    Images and Preview clips stand between vision start and end. In Keye-VL-1.5 every frame of a video is announced by a frame
    token and its time in seconds, and a fast frame stands between fast start and end.
    """
    specials = tokenizer.specials
    if item.kind == "image" or variant == "keye_vl_preview":
        return [[specials.vision_start], [specials.vision_end]]
    between, opened = [], [specials.vision_start]
    for timestamp_s, fast in zip(item.timestamps_s, item.fast, strict=True):
        stamp = tokenizer.encode(f"{timestamp_s:.1f}")
        between.append([*opened, specials.frame, *stamp, *_fast_mark(specials.fast_start, fast)])
        opened = _fast_mark(specials.fast_end, fast)
    return [*between, [*opened, specials.vision_end]]


def _fast_mark(token: int | None, fast: bool) -> list[int]:
    return [token] if fast and token is not None else []


def _write_text(writer: "_TokenWriter", piece: TextPiece, tokenizer: KeyeTokenizer, record_id: str) -> None:
    ids, starts = tokenizer.encode_with_starts(piece.text)
    _refuse_placeholders(ids, tokenizer.specials, record_id)
    bounds = np.asarray(piece.supervised, dtype=np.int64).reshape(-1)
    # A position inside the k-th range has an odd number of range ends (start, end, start, ...) at or before it.
    supervised = np.searchsorted(bounds, np.asarray(starts, dtype=np.int64), side="right") % 2 == 1
    writer.text(ids, supervised)


def _refuse_placeholders(ids: list[int], specials: SpecialTokens, record_id: str) -> None:
    if not set(specials.placeholders).isdisjoint(ids):
        raise DataError(
            f"record {record_id}: a text holds a visual placeholder token but there is no medium for it; "
            "write <|vision_start|><|image_pad|><|vision_end|> (or <image>) once per image of the message, or remove it"
        )


class _TokenWriter:
    """Collects token ids and flags, and counts the text between segments."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._supervised: list[np.ndarray] = []
        self._segments: list[Segment] = []
        self._gap_tokens = 0

    def text(self, ids: list[int], supervised: np.ndarray | None = None) -> None:
        self._append(np.asarray(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool) if supervised is None else supervised)
        self._gap_tokens += len(ids)

    def segment(self, grid: PatchGrid, ticks_per_frame: float, placeholder: int) -> None:
        self._append(np.full(grid.num_tokens, placeholder, dtype=np.int32), np.zeros(grid.num_tokens, dtype=bool))
        self._segments.append(Segment(grid, self._gap_tokens, ticks_per_frame))
        self._gap_tokens = 0

    def finish(self) -> TokenizedSample:
        token_ids, supervised = np.concatenate(self._ids), np.concatenate(self._supervised)
        supervised[0] = False
        return TokenizedSample(token_ids, supervised, SampleShape(len(token_ids), tuple(self._segments)))

    def _append(self, ids: np.ndarray, supervised: np.ndarray) -> None:
        self._ids.append(ids)
        self._supervised.append(supervised)
