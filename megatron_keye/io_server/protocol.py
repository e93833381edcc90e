"""What client and server say to each other. A request is one image or video; the answer is its patches as raw bytes."""

import hashlib
import json
import re
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_keye.config.schema import Variant
from megatron_keye.contract.media import PATCH_PIXELS, PATCH_VALUES, TOKEN_PIXELS
from megatron_keye.errors import KeyeError

DECODE_PATH = "/v1/decode"
HEALTH_PATH = "/healthz"
METRICS_PATH = "/metrics"
RESULT_HEADER = "x-keye-result"
"""Header of an answer: JSON with `decoder_id`, `xxh3_64` of the body in hex, and `segments`, the patches of each attention segment."""

MAX_REQUEST_BYTES = 1 << 18
MAX_FRAMES = 8192
MAX_SIDE_PIXELS = 1 << 16

ErrorCode = Literal[
    "bad_request", "not_found", "denied", "forbidden_path", "missing", "wrong_decoder", "too_large", "corrupt", "unsupported", "oom",
    "worker_crashed", "decode_timeout", "busy", "draining", "worker_lost", "internal",
]  # fmt: skip
STATUS: dict[ErrorCode, int] = {
    "bad_request": 400,
    "denied": 403,
    "forbidden_path": 403,
    "not_found": 404,
    "missing": 404,
    "wrong_decoder": 409,
    "too_large": 413,
    "corrupt": 422,
    "unsupported": 422,
    "oom": 422,
    "worker_crashed": 422,
    "internal": 500,
    "busy": 503,
    "draining": 503,
    "worker_lost": 503,
    "decode_timeout": 504,
}
"""HTTP status of every error; the code itself is in the JSON body, {"error": code, "message": text}."""


class Refused(KeyeError):
    """A request that gets an error for an answer."""

    def __init__(self, code: ErrorCode, message: str, retry_after_s: int | None = None):
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s

    def to_json(self) -> bytes:
        return json.dumps({"error": self.code, "message": str(self)}).encode()


Side = Annotated[int, Field(gt=0, le=MAX_SIDE_PIXELS)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
FrameNumber = Annotated[int, Field(ge=0, lt=1 << 31)]


class DecodeJob(BaseModel):
    """One image or video: where its bytes are, and all that its pixels depend on, so that equal jobs have equal answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    """Absolute path of a shard or a media file, as the server sees it, or its URL."""
    offset: Count
    num_bytes: Annotated[int, Field(gt=0, lt=1 << 62)]
    """The bytes of `path` that are the medium."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    variant: Variant
    height: Side
    width: Side
    """Size of the stored pixels."""
    sizes: Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1, max_length=2)]
    """As in `data.items.Resolved`."""
    frames: Annotated[tuple[FrameNumber, ...], Field(min_length=1, max_length=MAX_FRAMES)] | None
    """Frames of a video; None for an image."""
    fast: Annotated[tuple[bool, ...], Field(max_length=MAX_FRAMES)] = ()
    """For Keye-VL-1.5, whether each frame is a fast one."""
    decoder_id: Annotated[str, Field(max_length=200)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(side % TOKEN_PIXELS for size in self.sizes for side in size):
            raise ValueError(f"sizes are not multiples of {TOKEN_PIXELS} pixels")
        if self.frames is not None and any(b <= a for a, b in pairwise(self.frames)):
            raise ValueError("frames do not increase")
        if len(self.fast) != (len(self.frames) if self._is_slow_fast else 0):
            raise ValueError("expected one entry of fast per frame of a Keye-VL-1.5 video, else none")
        if self._is_slow_fast and len(self.sizes) != 2:
            raise ValueError("expected the sizes of slow and of fast frames")
        return self

    @property
    def _is_slow_fast(self) -> bool:
        return self.frames is not None and self.variant == "keye_vl_1_5"

    @property
    def segments(self) -> tuple[int, ...]:
        """Patches of each attention segment."""
        if self._is_slow_fast:
            return tuple(_num_patches(self.sizes[is_fast]) for is_fast in self.fast)
        return ((1 if self.frames is None else len(self.frames)) * _num_patches(self.sizes[-1]),)

    @property
    def result_bytes(self) -> int:
        return sum(self.segments) * PATCH_VALUES

    @property
    def key(self) -> bytes:
        """32 bytes that differ wherever the answer may. The path is part of them: an answer is only for who may ask for its file."""
        return hashlib.sha256(self.model_dump_json().encode()).digest()


def parse_job(text: bytes) -> DecodeJob:
    """Raises Refused (bad_request) for anything that is not exactly a job."""
    try:
        return DecodeJob.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "request"
        raise Refused("bad_request", f"{place}: {first['msg']}; {error.error_count()} problems in all") from error


def is_server_url(text: str) -> bool:
    """Whether it is http://HOST:PORT, and nothing more."""
    found = re.fullmatch(r"http://[^/\s]+:(\d{1,5})", text)
    return found is not None and int(found[1]) < 1 << 16


def _num_patches(size: tuple[int, int]) -> int:
    height, width = size
    return (height // PATCH_PIXELS) * (width // PATCH_PIXELS)
