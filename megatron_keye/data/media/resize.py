"""Target sizes of images and frames: multiples of 28 pixels within limits, the aspect ratio kept as well as it can be."""

import math
from dataclasses import dataclass

from megatron_keye.config.schema import Variant
from megatron_keye.contract.media import TOKEN_PIXELS
from megatron_keye.errors import DataError

Size = tuple[int, int]
"""(height, width) in pixels."""
TOKEN_AREA = TOKEN_PIXELS * TOKEN_PIXELS
"""Pixels behind one visual token."""
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """Least and most pixels of a picture, height times width."""

    min_pixels: int
    max_pixels: int


PREVIEW_FETCH = PixelLimits(min_pixels=4 * TOKEN_AREA, max_pixels=16384 * TOKEN_AREA)
"""Limits of keye-vl-utils 1.0.0, which resizes first."""
PREVIEW_PROCESSOR = PixelLimits(min_pixels=4 * TOKEN_AREA, max_pixels=1280 * TOKEN_AREA)
"""Limits in the preprocessor_config.json released with Keye-VL-8B-Preview, whose processor resizes a second time."""


def smart_resize(height: int, width: int, min_pixels: float, max_pixels: float) -> Size:
    """Size nearest to (height, width) in multiples of 28, at least 28, scaled into the limits where they are exceeded.

    The rule of keye-vl-utils 1.0.0 and 1.5.2. A very elongated picture can stay above `max_pixels`, as no side goes
    below 28; scaling down rounds down, so it may also end below `min_pixels`.
    Raises DataError for an aspect ratio above 200 or an empty picture.
    """
    _check_shape(height, width)
    nearest = max(TOKEN_PIXELS, _nearest(height)), max(TOKEN_PIXELS, _nearest(width))
    h, w = _into_limits((height, width), nearest, min_pixels, max_pixels)
    return max(TOKEN_PIXELS, h), max(TOKEN_PIXELS, w)


def preview_processor_size(height: int, width: int, limits: PixelLimits = PREVIEW_PROCESSOR) -> Size:
    """Size that the image processor shipped with Keye-VL-8B-Preview resizes to.

    It differs from `smart_resize` where a side is small: such a side is first lifted to 28 with the aspect ratio kept.
    Raises DataError for an aspect ratio above 200, an empty picture, or a side that the limits shrink to nothing.
    """
    if min(height, width) > 0:
        if height < TOKEN_PIXELS:
            height, width = TOKEN_PIXELS, round(width * TOKEN_PIXELS / height)
        if width < TOKEN_PIXELS:
            height, width = round(height * TOKEN_PIXELS / width), TOKEN_PIXELS
    _check_shape(height, width)
    nearest = _nearest(height), _nearest(width)
    h, w = _into_limits((height, width), nearest, limits.min_pixels, limits.max_pixels)
    if min(h, w) < TOKEN_PIXELS:
        raise DataError(
            f"a picture of {height}x{width} pixels has no size of at most {limits.max_pixels} pixels with both sides >= "
            f"{TOKEN_PIXELS}; raise max_pixels of the preprocessor or drop the picture"
        )
    return h, w


def resize_steps(
    height: int,
    width: int,
    variant: Variant,
    min_tokens: int,
    max_tokens: int,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    resized_height: int | None = None,
    resized_width: int | None = None,
    processor: PixelLimits = PREVIEW_PROCESSOR,
) -> tuple[Size, ...]:
    """Sizes to which an image is resized, one after another; the last is what the ViT sees.

    1.5 resizes once. Preview's released chain resizes in keye-vl-utils and again in its image processor, whose limits
    are `processor`, so its pixels depend on both sizes. `min_tokens` and `max_tokens` are the run's limits, which
    `min_pixels` and `max_pixels` of one message part can narrow; where they contradict, the maximum wins. A requested
    size replaces the picture's own and is bound by the run's limits only, as in the released code.
    Raises DataError for an impossible aspect ratio or half of a requested size.
    """
    requested = requested_size(resized_height, resized_width)
    least, most = min_tokens * TOKEN_AREA, max_tokens * TOKEN_AREA
    if variant == "keye_vl_preview":
        most = min(most, PREVIEW_FETCH.max_pixels)
    if requested is not None:
        height, width = requested
    else:
        least = least if min_pixels is None else max(least, min_pixels)
        most = most if max_pixels is None else min(most, max_pixels)
    first = smart_resize(height, width, min(least, most), most)
    return (first,) if variant == "keye_vl_1_5" else with_processor_step(first, processor)


def image_size(height: int, width: int, variant: Variant, min_tokens: int, max_tokens: int, **limits: int | None) -> Size:
    """(height, width) that the ViT sees: the last of `resize_steps`, whose optional arguments `limits` are."""
    return resize_steps(height, width, variant, min_tokens, max_tokens, **limits)[-1]


def requested_size(resized_height: int | None, resized_width: int | None) -> Size | None:
    """The size that a message part asks for, or None. Raises DataError where it names only one side."""
    if resized_height is None and resized_width is None:
        return None
    if resized_height is None or resized_width is None:
        raise DataError(
            f"found resized_height={resized_height} and resized_width={resized_width}; expected both or neither in a message part"
        )
    return resized_height, resized_width


def with_processor_step(first: Size, processor: PixelLimits) -> tuple[Size, ...]:
    """`first`, followed by the size that Preview's image processor makes of it where that is another one."""
    second = preview_processor_size(*first, processor)
    return (first,) if second == first else (first, second)


def _nearest(side: int) -> int:
    return round(side / TOKEN_PIXELS) * TOKEN_PIXELS


def _into_limits(shape: Size, nearest: Size, min_pixels: float, max_pixels: float) -> Size:
    """Multiples of 28 with the area of `nearest` where that is within the limits, else `shape` scaled to the limit."""
    height, width = shape
    area = nearest[0] * nearest[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(math.floor(side / shrink / TOKEN_PIXELS) * TOKEN_PIXELS for side in shape)
    if area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / TOKEN_PIXELS) * TOKEN_PIXELS for side in shape)
    return nearest


def _check_shape(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise DataError(f"found a picture of {height}x{width} pixels; expected both sides >= 1")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise DataError(
            f"found a picture of {height}x{width} pixels; expected an aspect ratio of at most {MAX_ASPECT_RATIO}: crop or drop it"
        )
