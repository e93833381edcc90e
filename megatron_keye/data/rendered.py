"""Tokens of a chat that a model's own template has rendered, made as the released processors make them.

The counterpart of `tokenize`, which knows the template of the training data by heart. Where a template is that one, both
give the same tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_keye.config.schema import Variant
from megatron_keye.contract.media import SampleShape, Segment
from megatron_keye.contract.tokens import COMMON_NAMES
from megatron_keye.data.chat_template import ChatTemplate
from megatron_keye.data.record import Record
from megatron_keye.data.template import TURN_END, TURN_START
from megatron_keye.data.tokenize import ItemLayout, TokenizedSample, media_structure, tokenize
from megatron_keye.data.tokenizer import KeyeTokenizer
from megatron_keye.errors import DataError

RESERVED = (TURN_START, TURN_END, COMMON_NAMES["image_pad"], COMMON_NAMES["video_pad"])
"""Tokens that only the template may write."""
ASSISTANT_TURN = re.compile(f"{re.escape(TURN_START)}assistant\n(.*?{re.escape(TURN_END)})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TemplateTokenizer:
    """A tokenizer with the chat template that belongs to it."""

    template: ChatTemplate
    tokenizer: KeyeTokenizer
    variant: Variant

    def tokenize(self, record: Record, items: Sequence[ItemLayout]) -> TokenizedSample:
        """Tokens of a whole record; `items` are the layouts of `record.media`, in order. A document needs no template.

        Supervised is what stands between `<|im_start|>assistant` and `<|im_end|>`, the latter included, but no medium. Raises
        DataError for a text with a token that only the template may write, and where the template refuses the chat or leaves
        out media or assistant turns.
        """
        if record.document:
            return tokenize(record, items, self.tokenizer, self.variant)
        _refuse_reserved(record)
        text = self.template.render(record.messages)
        spans = [match.span(1) for match in ASSISTANT_TURN.finditer(text)]
        self._expect_rendered("assistant turns", len(spans), sum(m.role == "assistant" for m in record.messages))
        return self._tokenize_text(text, spans, items)

    def _tokenize_text(self, text: str, supervised_spans: list[tuple[int, int]], items: Sequence[ItemLayout]) -> TokenizedSample:
        ids, starts = self.tokenizer.encode_with_starts(text)
        token_ids, supervised = np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool)
        for start, stop in supervised_spans:
            supervised[np.searchsorted(starts, start) : np.searchsorted(starts, stop)] = True
        places = np.flatnonzero(np.isin(token_ids, self.tokenizer.specials.placeholders))
        self._expect_rendered("media placeholders", len(places), len(items))
        for place, item in zip(places, items, strict=True):
            self._expect_wrapped(token_ids[place - 1 : place + 2], item)
        return self._expand(token_ids, supervised, places, items)

    def _expand(
        self, token_ids: np.ndarray, supervised: np.ndarray, places: np.ndarray, items: Sequence[ItemLayout]
    ) -> TokenizedSample:  # fmt: skip
        """Put every item's tokens in place of its vision start, placeholder and vision end."""
        ids, flags, at = [], [], 0
        for place, item in zip(places, items, strict=True):
            ids += [token_ids[at : place - 1], self._media_ids(item, int(token_ids[place]))]
            flags += [supervised[at : place - 1], np.zeros(len(ids[-1]), dtype=bool)]
            at = place + 2
        all_ids, all_flags = np.concatenate([*ids, token_ids[at:]]), np.concatenate([*flags, supervised[at:]])
        segments = _segments(np.flatnonzero(np.isin(all_ids, self.tokenizer.specials.placeholders)).tolist(), items)
        return TokenizedSample(all_ids, all_flags, SampleShape(len(all_ids), segments))

    def _media_ids(self, item: ItemLayout, placeholder: int) -> np.ndarray:
        """All tokens of an item, from vision start to vision end."""
        first, *others = media_structure(item, self.tokenizer, self.variant)
        ids = list(first)
        for grid, after in zip(item.grids, others, strict=True):
            ids += [placeholder] * grid.num_tokens + after
        return np.array(ids, dtype=np.int32)

    def _expect_rendered(self, what: str, found: int, expected: int) -> None:
        if found != expected:
            raise DataError(
                f"the chat template {self.template.path} writes {found} {what} for a conversation with {expected}; use the "
                "template of a Keye-VL processor (chat_template.json), which need not be that of its tokenizer"
            )

    def _expect_wrapped(self, around: np.ndarray, item: ItemLayout) -> None:
        specials = self.tokenizer.specials
        placeholder = specials.image_pad if item.kind == "image" else specials.video_pad
        if around.tolist() != [specials.vision_start, placeholder, specials.vision_end]:
            raise DataError(
                f"the chat template {self.template.path} does not write the {item.kind}s of a conversation in order, each as "
                f"<|vision_start|><|{item.kind}_pad|><|vision_end|>; use the template of a Keye-VL processor"
            )


def _segments(visual_places: list[int], items: Sequence[ItemLayout]) -> tuple[Segment, ...]:
    segments, used, end = [], 0, 0
    for item in items:
        for grid in item.grids:
            start = visual_places[used]
            segments.append(Segment(grid, start - end, item.ticks_per_frame))
            used += grid.num_tokens
            end = start + grid.num_tokens
    return tuple(segments)


def _refuse_reserved(record: Record) -> None:
    for message in record.messages:
        for token in RESERVED:
            if any(token in part for part in message.parts if isinstance(part, str)):
                raise DataError(
                    f"a text of the {message.role} holds {token}, which only the chat template may write; remove it (an image or "
                    "video is a part of its own, or stands where <image> or <video> is written)"
                )
