"""One image or video of a sample: what its bytes say, which sizes the rules give it, and its patches.

`describe.describe` reads bytes, once, when a set is indexed. `resolve` is arithmetic on that description, so planning needs no bytes.
`load_patches` makes the pixels that the resolved sizes promise, with the decoder of the run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_keye.config.schema import ImageConfig, Variant, VideoConfig
from megatron_keye.contract.media import PATCH_PIXELS, PatchGrid
from megatron_keye.data.media import preview_video, slow_fast
from megatron_keye.data.media.decoder import MediaDecoder
from megatron_keye.data.media.image import resize_image
from megatron_keye.data.media.patches import patchify
from megatron_keye.data.media.resample import resize_bilinear
from megatron_keye.data.media.resize import PREVIEW_PROCESSOR, TOKEN_AREA, PixelLimits, Size, resize_steps
from megatron_keye.data.media.rules import VideoRules, video_rules
from megatron_keye.data.tokenize import ItemLayout
from megatron_keye.errors import DataError

TOKENS_PER_SECOND = 2.0
"""Ids by which the temporal M-RoPE position of a Preview clip moves in one second."""


@dataclass(frozen=True, slots=True)
class MediaRules:
    """Everything about media that the settings decide. Limits are in visual tokens."""

    variant: Variant
    image_min_tokens: int
    image_max_tokens: int
    video: VideoRules
    processor: PixelLimits = PREVIEW_PROCESSOR
    """Limits of the second resize of Preview; Keye-VL-1.5 has none."""


@dataclass(frozen=True, slots=True)
class Frames:
    """The sampled frames of a video: int32 [n] numbers, float32 [n] seconds, uint8 [n] tags (1 is fast), and the clip they
    are from. `rate` is sampled frames per second of video."""

    numbers: np.ndarray
    timestamps_s: np.ndarray
    tags: np.ndarray
    rate: float
    clip_frames: int
    clip_fps: float


@dataclass(frozen=True, slots=True)
class Item:
    """An image or video as it is stored: native size in pixels and the limits that the record asks for."""

    height: int
    width: int
    options: Mapping[str, float] = field(default_factory=dict)
    frames: Frames | None = None
    """None for an image."""

    @property
    def num_segments(self) -> int:
        return 1 if self.frames is None else len(self.frames.numbers)


@dataclass(frozen=True, slots=True)
class Resolved:
    """An item with settled sizes. `sizes` are those its pixels pass through: the steps of an image or a Preview clip, or
    (slow, fast) of a Keye-VL-1.5 video."""

    layout: ItemLayout
    sizes: tuple[Size, ...]


def media_rules(image: ImageConfig, video: VideoConfig, variant: Variant) -> MediaRules:
    return MediaRules(variant, image.min_tokens, image.max_tokens, video_rules(video, variant))


def count_frames(clip_frames: int, clip_fps: float, options: Mapping[str, float], rules: MediaRules) -> int:
    """How many frames of a clip the rules take. Raises DataError for a clip without frames or frame rate."""
    video = asked_video_rules(options, rules)
    if rules.variant == "keye_vl_1_5":
        return slow_fast.count_frames(clip_frames, clip_fps, video, asked_pixels(options, "min_pixels"))
    return preview_video.count_frames(clip_frames, clip_fps, video)


def asked_video_rules(options: Mapping[str, float], rules: MediaRules) -> VideoRules:
    """The rules with the wishes of one record in their place."""
    wishes: dict[str, float] = {}
    if "fps" in options:
        wishes["fps"] = options["fps"]
    if "max_frames" in options:
        wishes["max_frames"] = min(int(options["max_frames"]), rules.video.max_frames or int(options["max_frames"]))
    if "total_pixels" in options:
        wishes["total_tokens"] = min(int(options["total_pixels"]) // TOKEN_AREA, rules.video.total_tokens)
    return replace(rules.video, **wishes)


def asked_pixels(options: Mapping[str, float], name: str) -> int | None:
    """A limit in pixels of one record, None where it has none."""
    return int(options[name]) if name in options else None


def resolve(item: Item, rules: MediaRules, max_tokens: int | None = None) -> Resolved:
    """Sizes of `item` under the rules; `max_tokens`, where given, also bounds the visual tokens of the whole item.

    The bound is met as far as the smallest sizes of the rules allow. Raises DataError for an aspect ratio above 200.
    """
    if item.frames is None:
        return _resolve_image(item, rules, max_tokens)
    if rules.variant == "keye_vl_1_5":
        return _resolve_slow_fast(item, item.frames, rules, max_tokens)
    return _resolve_clip(item, item.frames, rules, max_tokens)


def load_patches(item: Item, resolved: Resolved, blob: bytes, variant: Variant, decoder: MediaDecoder) -> list[np.ndarray]:
    """uint8 [num_patches, 588] per attention segment of the item, in order. Raises DataError for bytes that cannot be
    decoded or are not those that were described, UnsupportedError as the decoder does."""
    pieces = list(iter_patches(item, resolved.sizes, blob, variant, decoder))
    return pieces if len(pieces) == len(resolved.layout.grids) else [np.concatenate(pieces)]


def iter_patches(item: Item, sizes: tuple[Size, ...], blob: bytes, variant: Variant, decoder: MediaDecoder) -> Iterator[np.ndarray]:
    """The patches of `load_patches` in the same order, as an image or frame by frame, one of which is held at a time."""
    if item.frames is None:
        image = decoder.read_image(blob, variant)
        _expect_size(image.shape[:2], item)
        yield patchify(resize_image(image, sizes)[None])
    elif variant == "keye_vl_1_5":
        yield from _slow_fast_patches(item, item.frames.tags, sizes, decoder.iter_frames(blob, item.frames.numbers))
    else:
        yield from _clip_patches(item, sizes, decoder.iter_frames(blob, item.frames.numbers))


def _resolve_image(item: Item, rules: MediaRules, max_tokens: int | None) -> Resolved:
    most = rules.image_max_tokens if max_tokens is None else min(max_tokens, rules.image_max_tokens)
    limits = {name: int(value) for name, value in item.options.items()}
    steps = resize_steps(item.height, item.width, rules.variant, rules.image_min_tokens, most, processor=rules.processor, **limits)
    return Resolved(ItemLayout("image", (_grid(1, steps[-1]),)), steps)


def _resolve_slow_fast(item: Item, frames: Frames, rules: MediaRules, max_tokens: int | None) -> Resolved:
    video = asked_video_rules(item.options, rules)
    budget = video.total_tokens if max_tokens is None else min(max_tokens, video.total_tokens)
    least, most = asked_pixels(item.options, "min_pixels"), asked_pixels(item.options, "max_pixels")
    sizes = slow_fast.video_sizes(frames.tags, item.height, item.width, video, least, most, budget)
    slow, fast = _grid(1, sizes.slow), _grid(1, sizes.fast)
    fast_flags = tuple(bool(tag) for tag in frames.tags)
    grids = tuple(fast if is_fast else slow for is_fast in fast_flags)
    return Resolved(ItemLayout("video", grids, fast_flags, tuple(frames.timestamps_s.tolist())), (sizes.slow, sizes.fast))


def _resolve_clip(item: Item, frames: Frames, rules: MediaRules, max_tokens: int | None) -> Resolved:
    num_frames = len(frames.numbers)
    least, most = asked_pixels(item.options, "min_pixels"), asked_pixels(item.options, "max_pixels")
    if max_tokens is not None:
        bound = max(max_tokens // num_frames * TOKEN_AREA, rules.video.min_frame_tokens * TOKEN_AREA)
        most = bound if most is None else min(most, bound)
    video = asked_video_rules(item.options, rules)
    steps = preview_video.frame_steps(item.height, item.width, num_frames, video, least, most, processor=rules.processor)
    ticks_per_frame = TOKENS_PER_SECOND / frames.rate
    return Resolved(ItemLayout("video", (_grid(num_frames, steps[-1]),), ticks_per_frame=ticks_per_frame), steps)


def _slow_fast_patches(item: Item, tags: np.ndarray, sizes: tuple[Size, ...], frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for tag, frame in zip(tags, frames, strict=True):
        _expect_size(frame.shape[:2], item)
        yield patchify(resize_bilinear(frame, sizes[tag])[None])


def _clip_patches(item: Item, sizes: tuple[Size, ...], frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for frame in frames:
        _expect_size(frame.shape[:2], item)
        yield patchify(preview_video.resize_frames(frame[None], sizes))


def _grid(num_frames: int, size: Size) -> PatchGrid:
    height, width = size
    return PatchGrid(num_frames, height // PATCH_PIXELS, width // PATCH_PIXELS)


def _expect_size(found: Size, item: Item) -> None:
    if tuple(found) != (item.height, item.width):
        raise DataError(
            f"found pixels of {found[0]}x{found[1]}, but the index says {item.height}x{item.width}: "
            "the media changed after they were indexed; run index_shards again"
        )
