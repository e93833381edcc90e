"""What a packet says of its picture in its first bits: can decoding begin with it, and may other pictures refer to it?

Sections read: ITU-T H.264 7.3.1 and 7.4.1 (nal_ref_idc), ITU-T H.265 7.3.1.2 and table 7-1, VP9 6.2, AV1 5.3, 5.5 and 5.9.2. What is not
known for sure is said to be needed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

_HEADER_BYTES = 128
"""More than what is read of a header takes."""


class PictureFacts(NamedTuple):
    is_clean_start: bool
    """Neither this picture nor what is shown after it refers to anything before it."""
    is_reference: bool
    """Others may refer to it. If not, those of a higher `layer` may all the same."""
    layer: int = 0
    """Temporal sub-layer; pictures never refer to higher ones."""


UNKNOWN = PictureFacts(is_clean_start=False, is_reference=True)
ReadFacts = Callable[[bytes], PictureFacts]
"""Facts about a packet by its data."""


def facts_reader(codec: str, codec_header: bytes) -> ReadFacts:
    """For the packets of one stream, in their order. `codec` is FFmpeg's name of the format, `codec_header` the stream's extradata."""
    if codec in _NAL_RULES:
        return partial(_nal_facts, _NAL_RULES[codec], _length_bytes(codec, codec_header))
    if codec == "vp9":
        return _vp9_facts
    return _Av1Reader() if codec == "av1" else lambda data: UNKNOWN


class _NalUnit(NamedTuple):
    """`is_plain`: nothing is lost with it but its picture."""

    is_picture: bool
    is_plain: bool
    is_clean_start: bool = False
    is_reference: bool = False
    layer: int = 0


def _nal_facts(read_header: Callable[[bytes], _NalUnit], length_bytes: int, data: bytes) -> PictureFacts:
    units = [read_header(header) for header in _nal_headers(data, length_bytes)]
    pictures = [unit for unit in units if unit.is_picture]
    if not pictures:
        return UNKNOWN
    is_reference = any(unit.is_reference or not unit.is_plain for unit in units)
    return PictureFacts(pictures[0].is_clean_start, is_reference, max(unit.layer for unit in pictures))


def _h264_unit(header: bytes) -> _NalUnit:
    """Clean are IDR pictures alone: what a container calls a key frame may be one that repairs the picture bit by bit."""
    kind = header[0] & 31
    is_picture = 1 <= kind <= 5
    is_plain = is_picture or kind in (6, 9, 12)  # supplemental information, delimiter, filler
    return _NalUnit(is_picture, is_plain, kind == 5, is_picture and bool(header[0] & 0x60))


def _hevc_unit(header: bytes) -> _NalUnit:
    """Clean are all IRAP pictures. Of other views and scalability layers than the base FFmpeg decodes none."""
    kind, layer_id = header[0] >> 1 & 63, (header[0] & 1) << 5 | header[1] >> 3
    is_picture = kind < 32 and layer_id == 0
    is_plain = is_picture or layer_id > 0 or kind in (35, 38, 39, 40) or kind > 40  # delimiter, filler, supplemental information, private
    is_reference = is_picture and (kind >= 16 or kind % 2 == 1)
    return _NalUnit(is_picture, is_plain, is_picture and 16 <= kind <= 21, is_reference, (header[1] & 7) - 1 if is_picture else 0)


_NAL_RULES = {"h264": _h264_unit, "hevc": _hevc_unit}


def _length_bytes(codec: str, codec_header: bytes) -> int:
    """Bytes of the length before each NAL unit, as avcC and hvcC headers have it; 0 where units begin with start codes (Annex B)."""
    at = {"h264": 4, "hevc": 21}[codec]
    return (codec_header[at] & 3) + 1 if codec_header.startswith(b"\1") and len(codec_header) > at else 0


def _nal_headers(data: bytes, length_bytes: int) -> Iterator[bytes]:
    """The first two bytes of each NAL unit."""
    if length_bytes:
        place = 0
        while place + length_bytes + 2 <= len(data):
            start = place + length_bytes
            yield data[start : start + 2]
            place = start + int.from_bytes(data[place:start], "big")
        return
    place = data.find(b"\0\0\1")
    while 0 <= place < len(data) - 4:
        yield data[place + 3 : place + 5]
        place = data.find(b"\0\0\1", place + 3)


class _Bits:
    """Reads bits from the front of `data`, at most `_HEADER_BYTES`; behind its end there are only zeros."""

    def __init__(self, data: bytes):
        self._value, self._left = int.from_bytes(data[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0"), "big"), 8 * _HEADER_BYTES

    def read(self, count: int) -> int:
        self._left = max(self._left - count, 0)
        return self._value >> self._left & (1 << count) - 1


def _vp9_facts(data: bytes) -> PictureFacts:
    """Clean are key frames, which fill all slots for references. Others may leave entropy contexts to later ones, even unreferenced."""
    bits = _Bits(data)
    if bits.read(2) != 2:
        return UNKNOWN
    profile = bits.read(1) | bits.read(1) << 1
    if profile == 3:
        bits.read(1)
    shows_existing, is_inter = bits.read(1), bits.read(1)
    return PictureFacts(is_clean_start=not shows_existing and not is_inter, is_reference=True)


_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6
_KEY_FRAME, _INTER_FRAME, _SWITCH_FRAME = 0, 1, 3
_SELECT = 2


class _Av1Sequence(NamedTuple):
    """What a sequence header says about the reading of frame headers. `is_read` is False where it has what is not read here."""

    is_read: bool
    screen_content_tools: int = 0
    integer_mv: int = 0
    frame_id_bits: int = 0
    order_hint_bits: int = 0


class _Av1Reader:
    """Keeps the sequence header, which comes with key frames."""

    def __init__(self):
        self._sequence = _Av1Sequence(is_read=False)

    def __call__(self, data: bytes) -> PictureFacts:
        has_sequence, frames = False, []
        for kind, payload in _obus(data):
            if kind == _SEQUENCE_HEADER:
                self._sequence, has_sequence = _read_sequence(_Bits(payload)), True
            elif kind in (_FRAME_HEADER, _FRAME):
                frames.append(_frame_facts(_Bits(payload), self._sequence))
        if not frames:
            return UNKNOWN
        return PictureFacts(has_sequence and frames[0].is_clean_start, has_sequence or any(frame.is_reference for frame in frames))


def _obus(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and first bytes of each open bitstream unit."""
    place = 0
    while place < len(data):
        header, place = data[place], place + 1 + (data[place] >> 2 & 1)
        size = len(data) - place
        if header & 2:  # it has a size, in groups of seven bits
            groups = []
            while place < len(data):
                groups.append(data[place] & 127)
                place += 1
                if not data[place - 1] & 128:
                    break
            size = sum(group << 7 * n for n, group in enumerate(groups))
        yield header >> 3 & 15, data[place : place + min(size, _HEADER_BYTES)]
        place += size


def _read_sequence(bits: _Bits) -> _Av1Sequence:
    bits.read(3 + 1)
    if bits.read(1) or bits.read(1):  # a single picture's short header; timing, which may come with more fields of every frame
        return _Av1Sequence(is_read=False)
    has_delays = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if has_delays and bits.read(1):
            bits.read(4)
    side_bits = bits.read(4) + bits.read(4) + 2
    bits.read(side_bits)
    frame_id_bits = bits.read(4) + 2 + bits.read(3) + 1 if bits.read(1) else 0
    bits.read(3 + 4)
    has_order_hints = bits.read(1)
    if has_order_hints:
        bits.read(2)
    tools = _SELECT if bits.read(1) else bits.read(1)
    integer_mv = _SELECT if not tools or bits.read(1) else bits.read(1)
    return _Av1Sequence(True, tools, integer_mv, frame_id_bits, bits.read(3) + 1 if has_order_hints else 0)


def _frame_facts(bits: _Bits, sequence: _Av1Sequence) -> PictureFacts:
    """By `refresh_frame_flags`: slots for references hold all that a frame leaves to later ones, entropy contexts too."""
    if bits.read(1):  # shows a frame that was decoded before; if that is a key frame, slots change
        return UNKNOWN
    kind, is_shown = bits.read(2), bits.read(1)
    if kind in (_KEY_FRAME, _SWITCH_FRAME) or not sequence.is_read:
        return PictureFacts(is_clean_start=kind == _KEY_FRAME and bool(is_shown), is_reference=True)
    if not is_shown:
        bits.read(1)
    is_resilient = bits.read(1)
    bits.read(1)
    uses_tools = bits.read(1) if sequence.screen_content_tools == _SELECT else sequence.screen_content_tools
    if uses_tools and sequence.integer_mv == _SELECT:
        bits.read(1)
    bits.read(sequence.frame_id_bits + 1 + sequence.order_hint_bits)
    if kind == _INTER_FRAME and not is_resilient:  # names the frame whose entropy contexts it begins with
        bits.read(3)
    return PictureFacts(is_clean_start=False, is_reference=bits.read(8) != 0)
