"""Packets that are left out: never one that a wanted frame refers to, as rules for such references are written in the standards."""

import random
from io import BytesIO

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.data.media.bitstream import PictureFacts
from megatron_keye.data.media.groups import PacketHeader, needed_runs
from megatron_keye.data.media.video import _read_numbering, decode_frames
from tests.unit.data.media.test_video import _decode_all

CLIPS = {
    "h264": {"g": "10", "bf": "3", "b_strategy": "0"},
    "h264 in Matroska": {"g": "10", "bf": "3", "b_strategy": "0", "container": "matroska"},
    "h264 in a transport stream": {"g": "10", "bf": "3", "b_strategy": "0", "container": "mpegts"},
    "h264, open groups": {"g": "10", "bf": "3", "b_strategy": "0", "x264-params": "open-gop=1"},
    "h264, repaired bit by bit": {"g": "10", "bf": "2", "x264-params": "intra-refresh=1"},
    "hevc, open groups": {"codec": "libx265", "x265-params": "log-level=none:keyint=10:min-keyint=10:bframes=4:open-gop=1:scenecut=0"},
    "hevc, closed groups": {"codec": "libx265", "x265-params": "log-level=none:keyint=10:bframes=4:open-gop=0"},
    "hevc, three temporal layers": {
        "codec": "libx265",
        "x265-params": "log-level=none:keyint=24:bframes=3:b-adapt=0:b-pyramid=1:temporal-layers=3",
    },
    "hevc in a transport stream": {"codec": "libx265", "x265-params": "log-level=none:keyint=10:bframes=4", "container": "mpegts"},
    "h264, interlaced": {"g": "12", "x264-params": "tff=1:interlaced=1"},
    "hevc, headers repeated": {"codec": "libx265", "x265-params": "log-level=none:repeat-headers=1:keyint=12:bframes=4"},
    "av1, film grain": {"codec": "libsvtav1", "g": "20", "preset": "8", "svtav1-params": "film-grain=20"},
    "mpeg4": {"codec": "mpeg4", "bf": "2"},
    "vp9, hidden frames": {"codec": "libvpx-vp9", "g": "30", "auto-alt-ref": "6", "lag-in-frames": "25", "container": "webm"},
    "vp9": {"codec": "libvpx-vp9", "g": "10", "cpu-used": "8", "container": "webm"},
    "av1": {"codec": "libsvtav1", "g": "20", "preset": "10"},
    "av1 in Matroska": {"codec": "libsvtav1", "g": "20", "preset": "10", "container": "matroska"},
    "hevc, pyramid": {"codec": "libx265", "x265-params": "log-level=none:keyint=24:bframes=8:b-adapt=0:b-pyramid=1:rd=1"},
}



def check_frames(blob: bytes, seed: str, read_number) -> None:
    """Choices of frames, single ones and groups, are decoded as when everything is."""
    everything = _decode_all(blob)
    rng = random.Random(seed)
    choices = [sorted(rng.sample(range(60), rng.choice((1, 2, 3, 5)))) for _ in range(25)]
    for wanted in [*choices, *([number] for number in range(60)), [9, 11, 29, 31, 49, 51], [0, 59]]:
        frames = decode_frames(blob, wanted)
        assert [read_number(frame) for frame in frames] == wanted
        assert np.array_equal(frames, everything[wanted])


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_decoding_everything(name, encode_clip, frame_number):
    check_frames(encode_clip(num_frames=60, **CLIPS[name]), name, frame_number)


def test_frames_of_higher_temporal_layers_keep_what_only_they_refer_to(encode_clip, frame_number):
    # The middle layer is called unreferenced, as it is within itself: the top one refers to it.
    stream, file = BytesIO(encode_clip(num_frames=60, **CLIPS["hevc, three temporal layers"])), BytesIO()
    with av.open(stream) as source, av.open(file, "w", "mp4") as target:
        track = source.streams.video[0]
        copy = target.add_stream_from_template(track)
        for packet in (packet for packet in source.demux(track) if packet.size):
            edited = av.Packet(with_nal_kind(bytes(packet), 3, 2))
            edited.pts, edited.dts, edited.time_base, edited.is_keyframe = packet.pts, packet.dts, packet.time_base, packet.is_keyframe
            edited.stream = copy
            target.mux(edited)
    packets = _read_numbering(file.getvalue()).packets
    assert any(not packet.facts.is_reference and packet.facts.layer == 1 for packet in packets)
    check_frames(file.getvalue(), "layers", frame_number)


def with_nal_kind(data: bytes, kind: int, new_kind: int) -> bytes:
    """An HEVC packet of an MP4 file with another type for its NAL units of one type."""
    edited, place = bytearray(data), 0
    while place < len(data):
        if data[place + 4] >> 1 & 63 == kind:
            edited[place + 4] = data[place + 4] & 0x81 | new_kind << 1
        place += 4 + int.from_bytes(data[place : place + 4], "big")
    return bytes(edited)


@pytest.mark.parametrize("name", ["h264", "h264 in Matroska", "h264, open groups", "hevc, open groups", "hevc, closed groups", "av1"])
def test_far_frames_cost_only_their_own_groups(name, encode_clip):
    numbering = _read_numbering(encode_clip(num_frames=60, **CLIPS[name]))
    needed = sum(map(len, needed_runs(numbering.packets, {numbering.pts[3], numbering.pts[43]})))
    assert needed <= 16 if name != "h264, open groups" else needed > 20  # which no file tells from groups that are repaired bit by bit


@pytest.mark.parametrize("name", [name for name in CLIPS if name.startswith(("h264", "hevc"))])
def test_frames_that_others_may_refer_to_are_those_that_ffmpeg_calls_so(name, encode_clip):
    blob = encode_clip(num_frames=60, **CLIPS[name])
    with av.open(BytesIO(blob)) as container:
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        referenced = {frame.pts for frame in container.decode(video=0)}
    assert {packet.pts for packet in _read_numbering(blob).packets if packet.facts.is_reference} == referenced


def packets_of(groups: list[tuple[int, int, bool, list[tuple[bool, int]]]]) -> list[PacketHeader]:
    """Of (leading frames, further frames, clean, kinds of all but the first) groups, in the order of decoding: the first frame, leading
    ones, others. A kind is (may be referred to, temporal layer)."""
    packets, shown = [], 0
    for leading, others, is_clean, kinds in groups:
        order = [shown + leading, *range(shown, shown + leading), *range(shown + leading + 1, shown + leading + 1 + others)]
        for n, (pts, (is_reference, layer)) in enumerate(zip(order, [(True, 0), *kinds], strict=False)):
            packets.append(PacketHeader(pts, 1, n == 0, False, PictureFacts(n == 0 and is_clean, is_reference, layer)))
        shown += leading + 1 + others
    return packets


def candidates(packets: list[PacketHeader], place: int) -> set[int]:
    """What is decoded before a packet that it may refer to by its place alone: its group without leading frames, unless it is one; then
    all that the last frame of the group before may refer to as well, and that frame."""
    start = max((n for n in range(place + 1) if packets[n].facts.is_clean_start), default=0)
    is_clean = packets[start].facts.is_clean_start
    is_leading = is_clean and packets[place].pts < packets[start].pts
    own = {n for n in range(start, place) if is_leading or not is_clean or packets[n].pts >= packets[start].pts}
    return own | (candidates(packets, start - 1) | {start - 1} if is_leading and start else set())


def referred_to(packets: list[PacketHeader], place: int) -> set[int]:
    """A packet and all that it refers to: frames of lower layers, and of its own if it is not said that none refers to them."""
    found, open_places = set(), {place}
    while open_places:
        at = open_places.pop()
        found.add(at)
        layer = packets[at].facts.layer
        refers = (n for n in candidates(packets, at) if (packets[n].facts.layer, not packets[n].facts.is_reference) <= (layer, False))
        open_places |= set(refers) - found
    return found


kinds = st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=9, max_size=9)
groups = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans(), kinds), min_size=1, max_size=6)


@settings(max_examples=500)
@given(groups, st.data())
def test_all_that_wanted_frames_refer_to_is_needed(groups, data):
    packets = packets_of(groups)
    wanted = data.draw(st.sets(st.sampled_from([packet.pts for packet in packets])))
    runs = needed_runs(packets, wanted)
    needed = [place for run in runs for place in run]
    assert needed == sorted(set(needed))
    for run in runs:
        # A decoder begins each run with nothing from before.
        for place in run:
            if packets[place].pts in wanted:
                assert referred_to(packets, place) <= set(run)
        assert run[0] == 0 or packets[run[0]].facts.is_clean_start
    assert wanted <= {packets[place].pts for place in needed}


def plain(*groups: tuple[int, int, bool]) -> list[PacketHeader]:
    """Groups whose frames may all be referred to."""
    return packets_of([(*group, [(True, 0)] * 9) for group in groups])


def test_what_no_wanted_frame_refers_to_is_left_out():
    closed = plain((0, 3, True), (0, 3, True), (0, 3, True))
    assert needed_runs(closed, {5}) == [[4, 5]]
    assert needed_runs(closed, {1, 5}) == [[0, 1], [4, 5]]
    open_groups = plain((0, 3, True), (2, 3, True), (2, 3, True))
    assert needed_runs(open_groups, {7}) == [[4, 7]]
    assert needed_runs(open_groups, {4}) == [[0, 1, 2, 3, 4, 5]]
    assert needed_runs(plain((0, 3, False), (0, 3, False)), {5}) == [[0, 1, 2, 3, 4, 5]]
    assert needed_runs(closed, set()) == []


def test_frames_to_which_none_refers_are_left_out():
    one_layer = packets_of([(0, 4, True, [(False, 0), (True, 0), (False, 0), (False, 0)])])
    assert needed_runs(one_layer, {3}) == [[0, 2, 3]]
    two_layers = packets_of([(0, 4, True, [(False, 0), (True, 0), (False, 1), (False, 1)])])
    assert needed_runs(two_layers, {4}) == [[0, 1, 2, 4]]
    assert needed_runs(two_layers, {2}) == [[0, 2]]


def test_layers_above_those_of_wanted_frames_are_left_out():
    packets = packets_of([(0, 6, True, [(True, 1), (True, 2), (True, 0), (True, 1), (True, 2), (True, 0)])])
    assert needed_runs(packets, {6}) == [[0, 3, 6]]
    assert needed_runs(packets, {1, 6}) == [[0, 1, 3, 6]]
    assert needed_runs(packets, {5}) == [[0, 1, 2, 3, 4, 5]]
