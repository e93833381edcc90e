"""What makes pixels of encoded images and videos: one of two decoders, chosen by `data.media.decoder`.

Everything that decodes for training takes its decoder from here: the run itself, its worker processes and the I/O servers. Indices are
made by PyAV alone (`data/items.py`): of a medium they hold sizes, frame counts and tags, which must not depend on the host.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from typing import Protocol

import numpy as np

from megatron_keye.config.schema import DecoderName, Variant
from megatron_keye.data.media.dali import DaliDecoder
from megatron_keye.data.media.fingerprint import pixel_fingerprint
from megatron_keye.data.media.image import read_image
from megatron_keye.data.media.video import DECODER_ID, iter_frames
from megatron_keye.errors import SettingsError


class MediaDecoder(Protocol):
    """All methods may be called from several threads."""

    name: str
    """Another one wherever decoded pixels may be others."""

    def read_image(self, blob: bytes, variant: Variant) -> np.ndarray:
        """uint8 [H, W, 3] as `image.read_image`. Raises DataError, and UnsupportedError for a medium with which nothing is wrong, but which
        this decoder cannot decode here."""
        ...

    def iter_frames(self, blob: bytes, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3] each, as `video.iter_frames`. Raises as `read_image`, and ValueError for indices that do not increase."""
        ...


class PyAvDecoder:
    """FFmpeg's decoders by PyAV, libjpeg-turbo, and Pillow for other images."""

    name = DECODER_ID

    def read_image(self, blob: bytes, variant: Variant) -> np.ndarray:
        return read_image(blob, variant)

    def iter_frames(self, blob: bytes, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return iter_frames(blob, indices)


PYAV = PyAvDecoder()


@cache
def open_decoder(name: DecoderName) -> MediaDecoder:
    """The decoder of this process, opened at its first use: DALI's holds memory of the GPU that is this process's own.

    Raises SettingsError where its library is missing.
    """
    if name == "pyav":
        return PYAV
    try:
        from megatron_keye.data.media.dali_backend import DaliBackend
    except ImportError as error:
        raise SettingsError(
            f"data.media.decoder is dali, and NVIDIA DALI cannot be imported here ({error}): "
            "pip install 'megatron_keye[dali]', or set data.media.decoder=pyav"
        ) from error
    return DaliDecoder(DaliBackend(device=int(os.environ.get("LOCAL_RANK", "0"))))


def decoder_id(decoder: MediaDecoder) -> str:
    """Everything that decides about pixels: the decoder, the libraries that resize, and what this machine's kernels make of noise.

    The last loads torch and takes a second.
    """
    return _names_and_versions(decoder) + pixel_fingerprint()


def check_versions(decoder: MediaDecoder, found_id: str) -> None:
    """Raises SettingsError unless all of `found_id` that names and versions decide, which an earlier process of this machine found,
    still holds. Does without torch."""
    now = _names_and_versions(decoder)
    if not found_id.startswith(now):
        raise SettingsError(f"packages changed: found {now.removesuffix('-pixels-')}, but the server started with {found_id}: restart it")


def _names_and_versions(decoder: MediaDecoder) -> str:
    resizers = "-".join(f"{name}-{version(name).partition('+')[0]}" for name in ("pillow", "torch"))
    return f"{decoder.name}-{resizers}-pixels-"
