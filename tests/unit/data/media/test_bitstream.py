"""What packets say of their pictures, against FFmpeg's own reading of the same bits."""

from collections import defaultdict
from io import BytesIO

import av
import av.logging
import pytest
from av.bitstream import BitStreamFilterContext
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.data.media.bitstream import UNKNOWN, PictureFacts, facts_reader

AV1 = {"codec": "libsvtav1", "preset": "10", "g": "20"}
AV1_CLIPS = {
    "pyramid": AV1,
    "in Matroska": {**AV1, "container": "matroska"},
    "screen content": {**AV1, "svtav1-params": "scm=1"},
    "low delay": {"codec": "libsvtav1", "preset": "8", "g": "40", "svtav1-params": "pred-struct=1:hierarchical-levels=3"},
    "10 bits": {**AV1, "pix_fmt": "yuv420p10le"},
}


def traced(blob: bytes) -> list[tuple[bytes, dict[str, list[int]]]]:
    """Packets, and the header fields that FFmpeg reads in each, by name."""
    before, packets = av.logging.get_level(), []
    av.logging.set_level(av.logging.INFO)
    try:
        with av.open(BytesIO(blob)) as container:
            trace = BitStreamFilterContext("trace_headers", container.streams.video[0])
            for packet in (packet for packet in container.demux(video=0) if packet.size):
                data, fields = bytes(packet), defaultdict(list)
                with av.logging.Capture() as lines:
                    trace.filter(packet)
                for words in (line.split() for _, _, line in lines):
                    if len(words) > 3 and words[-2] == "=":
                        fields[words[1]].append(int(words[-1]))
                packets.append((data, fields))
    finally:
        av.logging.set_level(before)
    return packets


def header_of(blob: bytes) -> bytes:
    with av.open(BytesIO(blob)) as container:
        return bytes(container.streams.video[0].codec_context.extradata or b"")


@pytest.mark.parametrize("name", AV1_CLIPS)
def test_av1_frames_that_fill_no_slot_are_referred_to_by_none(name, encode_clip):
    blob = encode_clip(num_frames=60, **AV1_CLIPS[name])
    read_facts, found = facts_reader("av1", header_of(blob)), []
    for data, fields in traced(blob):
        facts = read_facts(data)
        is_key = 0 in fields["frame_type"]
        refreshes = any(fields["refresh_frame_flags"]) or is_key or 1 in fields["show_existing_frame"]
        assert facts == PictureFacts(is_clean_start=is_key, is_reference=refreshes)
        found.append(facts.is_reference)
    assert len(found) == 60
    assert not all(found), "there must be frames to which none refers, or this test shows nothing"


def test_vp9_key_frames_are_clean(encode_clip):
    packets = traced(encode_clip(num_frames=30, container="webm", codec="libvpx-vp9", g="10", **{"cpu-used": "8"}))
    facts = [facts_reader("vp9", b"")(data) for data, _ in packets]
    assert [fact.is_clean_start for fact in facts] == [fields["frame_type"][0] == 0 for _, fields in packets]
    assert sum(fact.is_clean_start for fact in facts) == 3


@given(st.sampled_from(["h264", "hevc", "vp9", "av1", "mpeg4"]), st.sampled_from([b"", b"\1" + bytes(30)]), st.binary(max_size=200))
def test_damaged_packets_are_read_without_an_error(codec, header, data):
    assert isinstance(facts_reader(codec, header)(data), PictureFacts)
    assert facts_reader(codec, header)(b"") == UNKNOWN


def test_parameter_sets_are_not_left_out_with_their_picture():
    picture, parameters = b"\0\0\0\1\x01\x9a\0", b"\0\0\0\1\x68\xce\0"
    assert not facts_reader("h264", b"")(picture).is_reference
    assert facts_reader("h264", b"")(parameters + picture).is_reference
