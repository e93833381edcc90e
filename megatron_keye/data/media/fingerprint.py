"""What the libraries make of pixels on this machine, as a short name.

torch and FFmpeg choose their kernels by the CPU's instructions, and not all of them give the same bytes: without AVX2, torch's bicubic
resize and swscale's colours differ by single grey levels. So versions alone do not say whether two machines decode alike.
"""

import base64
import hashlib

import av
import numpy as np

from megatron_keye.data.media.image import read_image, resize_image
from megatron_keye.data.media.preview_video import resize_frames as resize_preview_frames
from megatron_keye.data.media.resample import resize_bilinear

_PICTURES = ((97, 131), (250, 166))
_SIZES = ((56, 84), (140, 196), (364, 252))
"""Smaller and larger than the pictures, and of other shapes."""
_VIDEO_WIDTHS = (166, 854)
_VIDEO_HEIGHT = 98
_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHBYWICwgIyYnKSopGR8tMC0oMCUoKSj/"
    "2wBDAQcHBwoIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCj/wAARCAAbABQDASIAAhEBAxEB/8QA"
    "GgAAAgMBAQAAAAAAAAAAAAAAAAYEBQcBCP/EACYQAAEDBAEBCQAAAAAAAAAAAAEAAgMEBQYhEhEHExQiJTEzUXH/xAAXAQADAQAAAAAAAAAAAAAAAAACBQYH"
    "/8QAIBEAAQQBBAMAAAAAAAAAAAAABAABAgMFERITMRUhMv/aAAwDAQACEQMRAD8AYcYsk9LWMe9pABTFnbTNbQxuyGrtXklJEwlvEFUkt9iuLiwEFKjs0TaT"
    "EUiG2Mu3QHBQDCnzvo6zeW2Td47yn3QtD8LG7fEITNsHin98yy5yoM/aQcjq301I53I6VTgV4dV3EsLuu1KzjVvk6fSVOy0+sn9Srd5AOd930yuhi7M2BZaU"
    "+rsvQsEXKJpQpFL8DUKFe+bP2oeQFWq//9k="
)
"""20 x 27 pixels with halved colour planes."""


def pixel_fingerprint() -> str:
    """8 hex digits that are equal where all steps after a frame's or image's decoding give equal bytes: colours and resizing.

    Found by doing them, on noise. Decoding itself is exact by its standards, but for JPEG, of which a file is decoded as well.
    """
    digest = hashlib.sha256(read_image(_JPEG, "keye_vl_1_5"))
    for height, width in _PICTURES:
        picture = _noise((height, width, 3))
        for size in _SIZES:
            digest.update(resize_image(picture, (size,)))
            digest.update(resize_bilinear(picture, size))
            digest.update(resize_preview_frames(picture[None], (size,)))
    for width in _VIDEO_WIDTHS:
        for planes in (_noise((_VIDEO_HEIGHT * 3 // 2, width)), _noise((_VIDEO_HEIGHT * 3 // 2, width, 2)).view("<u2")[..., 0] % 1024):
            digest.update(_rgb(planes))
    return digest.hexdigest()[:8]


def _rgb(planes: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of a frame with halved colour planes, uint8 or uint16 [H * 3 / 2, W], of which the latter has 10 bits."""
    pixel_format = "yuv420p" if planes.dtype == np.uint8 else "yuv420p10le"
    return np.ascontiguousarray(av.VideoFrame.from_ndarray(planes, format=pixel_format).to_ndarray(format="rgb24"))


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 noise that no version of a library changes."""
    return np.frombuffer(hashlib.shake_128(repr(shape).encode()).digest(int(np.prod(shape))), dtype=np.uint8).reshape(shape).copy()
