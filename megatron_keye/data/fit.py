"""What happens to a sample that does not fit a row, decided from the index alone.

1. Its media are scaled down, all by one factor, until sample and text fit, but no item goes below the smallest size that the
   rules allow (`image.min_tokens`, `video.min_frame_tokens`).
2. Where even the smallest media leave too little room, text is cut at the end. Media then keep half of the row, less only
   where more text must stay: all of it up to the last medium, and at least one supervised token.
3. Otherwise the sample is rejected, with a reason.

The result depends on the sample, the rules and the row length only, so it is the same at every layout.
"""

from dataclasses import dataclass

from megatron_keye.contract.media import SampleShape, Segment
from megatron_keye.data.items import Item, MediaRules, Resolved, resolve

SCALE_STEPS = 256
"""Media shrink in multiples of 1 / 256 of their tokens."""

CLOSING_TOKENS = 2
"""Text tokens after the last medium that are never cut: those that may close it, fast end and vision end."""


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What the index knows about a sample. Text includes the tokens that structure media, but no visual tokens.

    `gap_tokens` are the text tokens before each attention segment of all items; `tail_tokens` those after the last.
    `first_supervised` is the number of text tokens before the first supervised one, None where nothing is supervised.
    """

    items: tuple[Item, ...]
    gap_tokens: tuple[int, ...]
    tail_tokens: int
    first_supervised: int | None

    @property
    def text_tokens(self) -> int:
        return sum(self.gap_tokens) + self.tail_tokens


@dataclass(frozen=True, slots=True)
class Fitted:
    """A sample that fits: its items' sizes, and its shape, whose `num_tokens` says where the text is cut."""

    items: tuple[Resolved, ...]
    shape: SampleShape


@dataclass(frozen=True, slots=True)
class Rejected:
    reason: str


def row_limit_tokens(seq_length_tokens: int, pad_multiple_tokens: int) -> int:
    """The longest document that fits a row once it is padded."""
    return seq_length_tokens // pad_multiple_tokens * pad_multiple_tokens


def fit(sample: SampleFacts, rules: MediaRules, limit_tokens: int) -> Fitted | Rejected:
    """Sizes under which `sample` has at most `limit_tokens` tokens, by the policy above.

    Raises DataError for an item that has no size under the rules at all.
    """
    items = [resolve(item, rules) for item in sample.items]
    if sample.text_tokens + _tokens(items) <= limit_tokens:
        return _fitted(sample, items, limit_tokens)
    smallest = _shrunk(sample.items, items, rules, 0)
    if sample.text_tokens + _tokens(smallest) <= limit_tokens:
        return _fitted(sample, _largest(sample.items, items, rules, limit_tokens - sample.text_tokens), limit_tokens)
    required_tokens = _required_text_tokens(sample)
    room_tokens = limit_tokens - required_tokens
    if _tokens(smallest) <= room_tokens:
        media_tokens = min(room_tokens, max(limit_tokens // 2, _tokens(smallest)))
        return _fitted(sample, _largest(sample.items, items, rules, media_tokens), limit_tokens)
    return Rejected(
        f"needs {required_tokens} text and at least {_tokens(smallest)} visual tokens, but a row holds {limit_tokens}; "
        "raise data.seq_length_tokens, lower image.min_tokens or video.min_frame_tokens, sample fewer frames, or drop it"
    )


def _required_text_tokens(sample: SampleFacts) -> int:
    """Text that cannot be cut: up to the last medium, and up to the first supervised token."""
    until_last_medium = sum(sample.gap_tokens) + (CLOSING_TOKENS if sample.items else 0)
    until_supervised = 0 if sample.first_supervised is None else sample.first_supervised + 1
    return max(until_last_medium, until_supervised)


def _largest(stored: tuple[Item, ...], full: list[Resolved], rules: MediaRules, budget_tokens: int) -> list[Resolved]:
    """Items at the largest scale found by bisection whose visual tokens stay within `budget_tokens`; scale 0 must.

    Sizes do not grow evenly with the scale, so a larger one may exist; the one found is always the same.
    """
    if _tokens(full) <= budget_tokens:
        return full
    low, high = 0, SCALE_STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if _tokens(_shrunk(stored, full, rules, middle)) <= budget_tokens:
            low = middle
        else:
            high = middle
    return _shrunk(stored, full, rules, low)


def _shrunk(stored: tuple[Item, ...], full: list[Resolved], rules: MediaRules, scale: int) -> list[Resolved]:
    """Items with `scale` / SCALE_STEPS of their full visual tokens, or the smallest size that the rules allow."""
    return [resolve(s, rules, _scaled(s, f, rules, scale)) for s, f in zip(stored, full, strict=True)]


def _scaled(stored: Item, full: Resolved, rules: MediaRules, scale: int) -> int:
    least = rules.image_min_tokens if stored.frames is None else 1
    return max(least, full.layout.num_tokens * scale // SCALE_STEPS)


def _tokens(items: list[Resolved]) -> int:
    return sum(item.layout.num_tokens for item in items)


def _fitted(sample: SampleFacts, items: list[Resolved], limit_tokens: int) -> Fitted:
    pieces = [(grid, item.layout.ticks_per_frame) for item in items for grid in item.layout.grids]
    segments = tuple(
        Segment(grid, gap_tokens, ticks) for (grid, ticks), gap_tokens in zip(pieces, sample.gap_tokens, strict=True)
    )
    num_tokens = min(limit_tokens, sample.text_tokens + _tokens(items))
    return Fitted(tuple(items), SampleShape(num_tokens, segments))
