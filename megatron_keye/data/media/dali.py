"""NVIDIA DALI as a media decoder: JPEG images and plain clips, on the GPU where there is one.

DALI only decodes. Which frames a clip has, how they are turned and what their colours mean is read by PyAV (`video.inspect`), and
resizing is ours. What DALI has no exact way for is left to the other decoder, by the file alone, so that hosts with one id do the same.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from megatron_keye.config.schema import Variant
from megatron_keye.data.media.blobs import describe_blob
from megatron_keye.data.media.image import is_plain_jpeg, read_image
from megatron_keye.data.media.video import DECODER_ID, StoredClip, checked_indices, inspect, iter_frames
from megatron_keye.errors import UnsupportedError

RULES = 1
"""Raised when other files are left to PyAV and Pillow, or when colours change."""
CPU_CODECS = frozenset({"vp9", "mjpeg"})
GPU_MIN_SIDES = {"h264": 48, "mpeg4": 48, "mjpeg": 64, "vp9": 128, "av1": 128, "hevc": 144}
"""The codecs that GPUs decode, with the smallest frame, in pixels, that any of their video engines asks for."""
CHUNK_BYTES = 256 << 20

# Weights of red and blue in luma, by the number of the conversion. DALI takes every clip for BT.601, which other numbers mean here too.
_BT601 = (0.299, 0.114)
_LUMA_WEIGHTS = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}

ImagePipeline = Callable[[bytes], np.ndarray]
"""uint8 [H, W, 3] RGB of a JPEG file."""
VideoPipeline = Callable[[bytes, Sequence[int]], np.ndarray]
"""uint8 [n, H, W, 3] RGB: the frames of a clip with these numbers."""


class Backend(Protocol):
    """The library as it is on this host. Its pipelines may raise anything, and are of no use afterwards."""

    name: str
    """With its version, and whether a GPU decodes."""
    has_gpu: bool

    def open_images(self) -> ImagePipeline: ...

    def open_videos(self) -> VideoPipeline: ...


class DaliDecoder:
    """A `decoder.MediaDecoder`. Threads take turns, as DALI has threads of its own."""

    def __init__(self, backend: Backend, chunk_bytes: int = CHUNK_BYTES):
        """At most `chunk_bytes` of pixels are asked of the library at once, where one frame does not have more."""
        self._backend, self._chunk_bytes = backend, chunk_bytes
        self._images, self._videos = _Reopened(backend.open_images), _Reopened(backend.open_videos)
        self.name = f"{backend.name}-jpeg-{_fingerprint(self._images)}-rules-{RULES}-{DECODER_ID}"

    def read_image(self, blob: bytes, variant: Variant) -> np.ndarray:
        if not is_plain_jpeg(blob):
            return read_image(blob, variant)
        return _decoded(blob, lambda: self._images(blob), lambda: read_image(blob, variant))

    def iter_frames(self, blob: bytes, indices: Sequence[int]) -> Iterator[np.ndarray]:
        clip = inspect(blob)
        wanted = checked_indices(indices, clip.num_frames)
        self._require_hardware(blob, clip)
        if not self._takes(clip):
            yield from iter_frames(blob, wanted)
            return
        length = max(1, self._chunk_bytes // (clip.height * clip.width * 3))
        for chunk in (wanted[start : start + length] for start in range(0, len(wanted), length)):
            yield from (_finished(frame, clip) for frame in self._chunk(blob, chunk))

    def _chunk(self, blob: bytes, wanted: tuple[int, ...]) -> np.ndarray:
        return _decoded(blob, lambda: self._videos(blob, wanted), lambda: deque(iter_frames(blob, wanted), maxlen=0))

    def _takes(self, clip: StoredClip) -> bool:
        """Whether DALI decodes it; PyAV does otherwise."""
        if not clip.is_plain:
            return False
        if not self._backend.has_gpu:
            return clip.codec in CPU_CODECS
        return clip.codec in GPU_MIN_SIDES and min(clip.height, clip.width) >= GPU_MIN_SIDES[clip.codec]

    def _require_hardware(self, blob: bytes, clip: StoredClip) -> None:
        if clip.codec in GPU_MIN_SIDES and clip.codec not in CPU_CODECS and not self._backend.has_gpu:
            raise UnsupportedError(
                f"{describe_blob(blob)} has {clip.codec} video, which NVIDIA DALI decodes on GPUs only, and none is here: "
                "set data.media.decoder=pyav, or decode where there is a GPU"
            )


class _Reopened:
    """A pipeline that is opened when it is first needed, and anew after an error."""

    def __init__(self, open_pipeline: Callable[[], Callable[..., np.ndarray]]):
        self._open = open_pipeline
        self._pipeline: Callable[..., np.ndarray] | None = None
        self._lock = threading.Lock()

    def __call__(self, *medium) -> np.ndarray:
        with self._lock:
            # Set again only after success.
            pipeline, self._pipeline = self._pipeline or self._open(), None
            pixels = pipeline(*medium)
            self._pipeline = pipeline
            return pixels


def _decoded(blob: bytes, decode: Callable[[], np.ndarray], check: Callable[[], object]) -> np.ndarray:
    """What `decode` gives. Where it fails, `check` raises what is wrong with the medium; if it finds nothing, one more try is made."""
    try:
        return decode()
    except Exception:  # DALI's are RuntimeErrors, whatever the reason
        check()
    try:
        return decode()
    except Exception as error:
        raise UnsupportedError(
            f"NVIDIA DALI cannot decode {describe_blob(blob)} ({_reason(error)}), in which PyAV and Pillow find nothing wrong: "
            "set data.media.decoder=pyav, or drop it"
        ) from error


def _reason(error: Exception) -> str:
    """DALI's own words begin behind a traceback of the pipeline's definition."""
    words = str(error).partition("encountered:")[2] or str(error)
    return f"{type(error).__name__}: {words.strip().partition(chr(10))[0][:300]}"


def _finished(frame: np.ndarray, clip: StoredClip) -> np.ndarray:
    """Upright, with the colours that the clip says. Colours beyond BT.601's reach stay clipped."""
    if clip.color_matrix in _LUMA_WEIGHTS:
        frame = cv2.transform(frame, _to_rgb(_LUMA_WEIGHTS[clip.color_matrix]) @ np.linalg.inv(_to_rgb(_BT601)))
    return np.ascontiguousarray(np.rot90(frame, clip.quarter_turns))


def _to_rgb(weights: tuple[float, float]) -> np.ndarray:
    """[3, 3]: R, G, B of Y in 0..1 and Cb, Cr in -0.5..0.5."""
    red, blue = weights
    from_cb, from_cr = 2 * (1 - blue), 2 * (1 - red)
    green = 1 - red - blue
    return np.array([[1, 0, from_cr], [1, -from_cb * blue / green, -from_cr * red / green], [1, from_cb, 0]])


def _fingerprint(images: ImagePipeline) -> str:
    """8 hex digits of what this host's JPEG decoder makes of a picture, which GPUs and drivers round differently."""
    noise = np.frombuffer(hashlib.shake_128(b"jpeg").digest(16 * 24 * 3), np.uint8).reshape(16, 24, 3)
    file = BytesIO()
    Image.fromarray(noise).resize((96, 64)).save(file, "JPEG", quality=90)
    return hashlib.sha256(np.ascontiguousarray(images(file.getvalue()))).hexdigest()[:8]
