"""Images: bytes to the uint8 pixels that the released code's decoder and kernel, Pillow, make of them, by faster ways where these agree."""

from io import BytesIO

import numpy as np
import simplejpeg
from PIL import Image

from megatron_keye.config.schema import Variant
from megatron_keye.data.media.blobs import describe_blob
from megatron_keye.data.media.resample import resize_bicubic
from megatron_keye.data.media.resize import Size
from megatron_keye.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that Pillow decodes by itself. Others, such as EPS, start programs of the machine on the file's content."""


def image_dimensions(blob: bytes) -> Size:
    """(height, width) of the stored pixels, from the header alone. Raises DataError where it cannot be read."""
    with _open(blob) as picture:
        return picture.height, picture.width


def is_plain_jpeg(blob: bytes) -> bool:
    """Whether it is a JPEG file of grey or YCbCr pixels, which every decoder turns into the same RGB but for rounding. Raises DataError."""
    with _open(blob) as picture:
        return _is_plain_jpeg(picture)


def read_image(blob: bytes, variant: Variant) -> np.ndarray:
    """uint8 [H, W, 3] RGB pixels as stored: EXIF orientation is not applied, of an animation the first frame is taken.

    Preview lays RGBA pictures on white, 1.5 drops the alpha channel; both as released.
    Raises DataError for bytes that are no image, a damaged one, or one above Pillow's limit of pixels.
    """
    with _open(blob) as picture:
        pixels = _decode_jpeg(blob) if _is_plain_jpeg(picture) else None
        if pixels is not None:
            return pixels
        try:
            picture.load()
        # A damaged file makes decoders raise nearly anything, such as SyntaxError, struct.error or zlib.error.
        except Exception as error:
            raise _unreadable(blob, error) from error
        return np.array(_to_rgb(picture, variant))


def _decode_jpeg(blob: bytes) -> np.ndarray | None:
    """The bytes that Pillow makes of a JPEG file, by the same library but without its copies; None where Pillow has to judge.

    Both take libjpeg-turbo's exact transform and smooth upsampling. What is damaged or rare is an error to simplejpeg.
    """
    try:
        return simplejpeg.decode_jpeg(blob, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None


def resize_image(image: np.ndarray, sizes: tuple[Size, ...]) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [h, w, 3], through every (height, width) of `sizes` in turn, by Pillow's bicubic filter."""
    for size in sizes:
        image = resize_bicubic(image, size)
    return image


def _is_plain_jpeg(picture: Image.Image) -> bool:
    return picture.format == "JPEG" and picture.mode in ("L", "RGB")


def _open(blob: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(blob), formats=FORMATS)
    except Exception as error:  # as above, while the header is parsed
        raise _unreadable(blob, error) from error


def _to_rgb(picture: Image.Image, variant: Variant) -> Image.Image:
    if variant == "keye_vl_preview" and picture.mode == "RGBA":
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture.convert("RGB")


def _unreadable(blob: bytes, error: Exception) -> DataError:
    return DataError(
        f"cannot decode an image: found {describe_blob(blob)} ({type(error).__name__}: {error}); expected a whole file in one of "
        f"{', '.join(FORMATS)}: restore or drop it"
    )
