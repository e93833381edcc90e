"""Which packets of a clip a decoder needs for some of its frames: those of a group of pictures after the last wanted one are left out,
and whole groups in which no frame is wanted. The frames that are decoded are the same."""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple


class PacketHeader(NamedTuple):
    """What a file says of a packet, in the order of decoding; its data is not kept."""

    pts: int | None
    duration: int
    is_keyframe: bool
    is_discard: bool
    is_clean_start: bool
    """Neither this packet nor what is shown after it refers to anything before it."""


def needed_packets(packets: Sequence[PacketHeader], wanted_pts: Collection[int]) -> list[bool]:
    """For each packet, all of which have a `pts`, whether the frames at `wanted_pts` need it.

    A decoder must be emptied before a packet that is needed, begins a group, and follows one that is not.
    """
    needed = [False] * len(packets)
    starts = [0] + [place for place, packet in enumerate(packets) if packet.is_clean_start and place]
    before_is_needed = False  # by the group that was looked at before, which is the next one in the file
    for start, stop in reversed(list(pairwise([*starts, len(packets)]))):
        last = stop - 1 if before_is_needed else max((n for n in range(start, stop) if packets[n].pts in wanted_pts), default=-1)
        # Shown before the group's first frame: these refer to the group before as well, and nothing else of this group refers to them.
        leading = {n for n in range(start + 1, stop) if packets[start].is_clean_start and packets[n].pts < packets[start].pts}
        before_is_needed = last in leading or any(packets[n].pts in wanted_pts for n in leading)
        for n in range(start, last + 1):
            needed[n] = before_is_needed or n not in leading
    return needed


_PICTURE_TYPES = {"h264": range(1, 6), "hevc": range(32)}
"""NAL unit types of pictures."""
_CLEAN_TYPES = {"h264": range(5, 6), "hevc": range(16, 22)}
"""IDR of H.264, where a container's key frame may be one that repairs the picture bit by bit; IRAP of HEVC."""


def is_clean_start(codec: str, codec_header: bytes, data: bytes) -> bool:
    """Whether a packet of an MP4 or Matroska file is a picture before which a decoder needs nothing. False where that is not known.

    `codec_header` is the stream's (avcC or hvcC), which says how many bytes the length of each NAL unit takes.
    """
    if codec not in _CLEAN_TYPES or not codec_header.startswith(b"\1"):
        return False
    at_size_byte = 4 if codec == "h264" else 21
    size_bytes = (codec_header[at_size_byte] & 3) + 1 if len(codec_header) > at_size_byte else 4
    place = 0
    while place + size_bytes < len(data):
        header = data[place + size_bytes]
        kind = header & 31 if codec == "h264" else header >> 1 & 63
        if kind in _PICTURE_TYPES[codec]:
            return kind in _CLEAN_TYPES[codec]
        place += size_bytes + int.from_bytes(data[place : place + size_bytes], "big")
    return False
