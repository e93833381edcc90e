"""Video files to frames: exactly the frame that was asked for, or an error that says why not.

Frames are numbered in the order they are shown. A file is read twice: first only its packets, for the presentation
timestamps (PTS) that name the frames, then its frames, from the first to the last one wanted. There is no seeking, which goes
wrong in MPEG-TS: packets that no wanted frame needs are read and not decoded (`groups.py`, by what `bitstream.py` finds in them).
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from megatron_keye.data.media.bitstream import facts_reader
from megatron_keye.data.media.blobs import describe_blob
from megatron_keye.data.media.groups import PacketHeader, needed_runs
from megatron_keye.errors import DataError

DECODER_ID = f"pyav-{av.__version__}-ffmpeg-{av.ffmpeg_version_info}-rules-1"
"""Names what makes pixels from bytes. Raise the last number when frames, their numbering or their colours change."""

# A playlist named .mp4 would otherwise open other files of this machine (concat, HLS), also when handed bytes.
_SAFE_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,avi,flv", "protocol_whitelist": "none"}
# What all decoders agree on: 8 bits, colours at half the resolution.
_PLAIN_FORMATS = frozenset({"yuv420p", "yuvj420p"})
# Codecs with packets of their own for frames that are never shown.
_HIDDEN_FRAME_CODECS = frozenset({"vp8"})
_MATROSKA_MAGIC, _MATROSKA_SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
# A container's declared rate further from the measured one than this does not describe the clip.
_RATE_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """A clip as shown: `height` and `width` after rotation, `fps` the average rate in frames per second."""

    num_frames: int
    fps: float
    height: int
    width: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class StoredClip:
    """How a clip lies in its file, for decoders that know less of it. `is_plain` says that every packet is one shown frame, the first a
    key frame, of 8 bits in 4:2:0: what numbers and colours its frames have is then the same everywhere."""

    codec: str
    """FFmpeg's name of the format, whatever decodes it."""
    num_frames: int
    is_plain: bool
    height: int
    width: int
    """Of the stored frames, before `quarter_turns`."""
    quarter_turns: int
    """Counterclockwise, as np.rot90 counts, until they are upright."""
    color_matrix: int
    """Number of the conversion between YCbCr and RGB in ISO/IEC 23091-2: 1 is BT.709, 2 is not said."""


@dataclass(frozen=True, slots=True)
class _Numbering:
    """`pts` of every frame in the order shown, or None where packets do not tell: frames are then counted as decoded. `is_whole` says
    that no packet is left out of them."""

    codec: str
    pts: tuple[int, ...] | None
    is_whole: bool
    num_frames: int
    packets: tuple[PacketHeader, ...]


def probe(blob: bytes) -> VideoInfo:
    """What planning needs to know about a video file. Decodes the first frame, so that a file it accepts can be decoded.

    Raises DataError for bytes that are not a whole video file of a known format.
    """
    with _opened(blob) as (container, stream):
        numbering = _numbering(blob, container, stream)
        declared_fps, tick_s = float(stream.average_rate or 0), float(stream.time_base)
    height, width = _upright_rgb(_first_frame(blob, numbering)).shape[:2]
    num_frames = numbering.num_frames
    if numbering.pts is None:
        if declared_fps <= 0:
            raise _without(blob, "a frame rate and a time for each frame")
        return VideoInfo(num_frames, declared_fps, height, width, num_frames / declared_fps)
    first, last = numbering.pts[0], numbering.pts[-1]
    duration_s = (last - first + next(p.duration for p in numbering.packets if p.pts == last)) * tick_s
    return VideoInfo(num_frames, _frame_rate(blob, declared_fps, num_frames, duration_s), height, width, duration_s)


def inspect(blob: bytes) -> StoredClip:
    """What another decoder must be told of a clip. Errors as `probe`."""
    numbering = _read_numbering(blob)
    first = _first_frame(blob, numbering)
    is_plain = numbering.is_whole and first.format.name in _PLAIN_FORMATS
    size = (first.height, first.width)
    return StoredClip(numbering.codec, numbering.num_frames, is_plain, *size, _quarter_turns(first), int(first.colorspace))


def iter_frames(blob: bytes, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields the frames at `indices`, which must increase, as uint8 [H, W, 3] RGB, upright; one is held at a time.

    Raises ValueError for indices out of order, DataError for one the clip does not have and for a damaged file.
    """
    numbering = _read_numbering(blob)
    yield from map(_upright_rgb, _frames(blob, numbering, checked_indices(indices, numbering.num_frames)))


def checked_indices(indices: Sequence[int], num_frames: int) -> tuple[int, ...]:
    """Indices for frames of a clip of `num_frames`. Raises as `iter_frames`."""
    wanted = tuple(int(i) for i in indices)
    if any(b <= a for a, b in pairwise(wanted)):
        raise ValueError(f"found frame indices {wanted}; expected increasing ones")
    if wanted and not 0 <= wanted[0] <= wanted[-1] < num_frames:
        raise DataError(f"frames {wanted[0]} to {wanted[-1]} were asked for; found a clip of {num_frames} frames: index it again")
    return wanted


def decode_frames(blob: bytes, indices: Sequence[int]) -> np.ndarray:
    """uint8 [n, H, W, 3]: the frames at `indices`, at least one, in any order and with repeats. Errors as `iter_frames`."""
    distinct, places = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
    return np.stack(list(iter_frames(blob, distinct)))[places]


@contextmanager
def _opened(blob: bytes, **options: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream; every error of the library becomes a DataError."""
    try:
        with av.open(BytesIO(blob), options=_SAFE_OPTIONS | options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise _without(blob, "a video stream of a known codec")
            stream.codec_context.thread_count = 1  # the caller's processes share the cores; more threads only add latency jitter
            yield container, stream
    except (av.FFmpegError, MemoryError) as error:
        raise DataError(
            f"cannot decode a video: found {describe_blob(blob)} ({type(error).__name__}: {error}); expected a whole MP4, Matroska, WebM, "
            "MPEG-TS, AVI or FLV file: restore or drop it"
        ) from error


def _haste(blob: bytes) -> dict[str, str]:
    """Options that open an MP4 file without decoding its first frames, which FFmpeg does to find out what that format says by itself.
    The frame rate may then be another one where the file does not store it."""
    return {"skip_frame": "all"} if blob[4:8] == b"ftyp" else {}


def _without(blob: bytes, missing: str) -> DataError:
    return DataError(f"cannot decode a video: found {describe_blob(blob)} without {missing}; restore or drop it")


def _damaged(blob: bytes, what: str) -> DataError:
    return DataError(f"cannot decode a video: found {describe_blob(blob)} with damaged {what}; restore or drop it")


def _read_numbering(blob: bytes) -> _Numbering:
    with _opened(blob, **_haste(blob)) as (container, stream):
        return _numbering(blob, container, stream)


def _numbering(blob: bytes, container: InputContainer, stream: VideoStream) -> _Numbering:
    """Reads the packets, and decodes only where their timestamps do not name the frames."""
    _check_complete(blob, stream)
    codec, packets = stream.codec.canonical_name, _packet_headers(blob, container, stream)
    pts = [p.pts for p in packets if not p.is_discard]
    if codec in _HIDDEN_FRAME_CODECS or None in pts or len(set(pts)) != len(pts):
        with _opened(blob) as (container, stream):
            num_frames = sum(1 for _ in container.decode(stream))
        numbering = _Numbering(codec, None, False, num_frames, tuple(packets))
    else:
        # Frames shown ahead of the first key frame refer to frames that the file does not have.
        start = next((p.pts for p in packets if p.is_keyframe), None)
        shown = tuple(sorted(t for t in pts if start is None or t >= start))
        numbering = _Numbering(codec, shown, len(shown) == len(packets), len(shown), tuple(packets))
    if not numbering.num_frames:
        raise _without(blob, "a frame")
    return numbering


def _packet_headers(blob: bytes, container: InputContainer, stream: VideoStream) -> list[PacketHeader]:
    read_facts = facts_reader(stream.codec.canonical_name, bytes(stream.codec_context.extradata or b""))
    headers = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _damaged(blob, "packets")
        if packet.size:  # the last one, which flushes the decoder, is empty
            facts = read_facts(bytes(packet))
            if not packet.is_keyframe:
                facts = facts._replace(is_clean_start=False)
            headers.append(PacketHeader(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard, facts))
    return headers


def _frame_rate(blob: bytes, declared_fps: float, num_frames: int, duration_s: float) -> float:
    """The container's average rate, which is exact where the clip's is constant, unless its timestamps contradict it."""
    measured_fps = num_frames / duration_s if duration_s > 0 else declared_fps
    if measured_fps <= 0:
        raise _without(blob, "a frame rate and a duration")
    return declared_fps if abs(declared_fps / measured_fps - 1) <= _RATE_TOLERANCE else measured_fps


def _check_complete(blob: bytes, stream: VideoStream) -> None:
    """Raises DataError where the container's own index or length points behind the end of the file."""
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    end = max(end, _matroska_end(blob))
    if end > len(blob):
        raise DataError(f"cannot decode a video: found {len(blob)} bytes, but its header tells of {end}: it is truncated; restore it")


def _matroska_end(blob: bytes) -> int:
    """Offset behind a Matroska file's segment as its header has it, or 0 where it does not say or the file is another kind.

    A truncated Matroska file reads like a shorter clip otherwise.
    """
    at = blob.find(_MATROSKA_SEGMENT, 0, 4096) + len(_MATROSKA_SEGMENT)
    if not blob.startswith(_MATROSKA_MAGIC) or at < len(_MATROSKA_SEGMENT) or not blob[at]:
        return 0
    # EBML integer: as many bytes follow as the first one has leading zero bits; all value bits set means unknown.
    num_bytes = 9 - blob[at].bit_length()
    value_bits = (1 << 7 * num_bytes) - 1
    size = int.from_bytes(blob[at : at + num_bytes], "big") & value_bits
    return 0 if size == value_bits else at + num_bytes + size


def _first_frame(blob: bytes, numbering: _Numbering) -> av.VideoFrame:
    with closing(_frames(blob, numbering, (0,))) as frames:
        return next(frames)


def _frames(blob: bytes, numbering: _Numbering, wanted: tuple[int, ...]) -> Iterator[av.VideoFrame]:
    numbers = iter(wanted)
    number = next(numbers, None)
    if number is None:
        return
    for index, frame in _numbered(blob, numbering, wanted):
        if index != number:
            break
        yield frame
        number = next(numbers, None)
        if number is None:
            return
    raise _without(blob, f"frame {number} of {numbering.num_frames}")


def _numbered(blob: bytes, numbering: _Numbering, wanted: tuple[int, ...]) -> Iterator[tuple[int, av.VideoFrame]]:
    """The decoded frames among `wanted`, with their numbers. Raises DataError for a frame the decoder calls damaged."""
    names = None if numbering.pts is None else {numbering.pts[i]: i for i in wanted}
    runs = [range(len(numbering.packets))] if names is None else needed_runs(numbering.packets, names)
    wanted_numbers = frozenset(wanted)
    for count, frame in enumerate(_decoded(blob, runs)):
        # Frames that nobody wants are checked as well: others refer to them.
        if frame.is_corrupt:
            raise _damaged(blob, "frames")
        number = count if names is None else names.get(frame.pts)
        if number in wanted_numbers:
            yield number, frame


def _decoded(blob: bytes, runs: Sequence[Sequence[int]]) -> Iterator[av.VideoFrame]:
    """The frames of the packets at these places of the file, in increasing runs before each of which the decoder is empty."""
    with _opened(blob, **_haste(blob)) as (container, stream):
        packets = enumerate(packet for packet in container.demux(stream) if packet.size)
        for run in runs:
            for wanted_place in run:
                packet = next((packet for place, packet in packets if place == wanted_place), None)
                if packet is None:
                    raise _without(blob, "packets that it had before")
                yield from packet.decode()
            yield from stream.codec_context.decode(None)
            stream.codec_context.flush_buffers()


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame)))


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4
