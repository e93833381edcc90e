"""Packets that are left out: never one that a wanted frame refers to, as rules for such references are written in the standards."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.data.media.groups import PacketHeader, needed_packets
from megatron_keye.data.media.video import _timeline, decode_frames
from tests.unit.data.media.test_video import _decode_all

CLIPS = {
    "h264": {"g": "10", "bf": "3", "b_strategy": "0"},
    "h264 in Matroska": {"g": "10", "bf": "3", "b_strategy": "0", "container": "matroska"},
    "h264 in a transport stream": {"g": "10", "bf": "3", "b_strategy": "0", "container": "mpegts"},
    "h264, open groups": {"g": "10", "bf": "3", "b_strategy": "0", "x264-params": "open-gop=1"},
    "h264, repaired bit by bit": {"g": "10", "bf": "2", "x264-params": "intra-refresh=1"},
    "hevc, open groups": {"codec": "libx265", "x265-params": "log-level=none:keyint=10:min-keyint=10:bframes=4:open-gop=1:scenecut=0"},
    "hevc, closed groups": {"codec": "libx265", "x265-params": "log-level=none:keyint=10:bframes=4:open-gop=0"},
    "hevc, pyramid": {"codec": "libx265", "x265-params": "log-level=none:keyint=24:bframes=8:b-adapt=0:b-pyramid=1:rd=1"},
}


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_decoding_everything(name, encode_clip, frame_number):
    blob = encode_clip(num_frames=60, **CLIPS[name])
    everything = _decode_all(blob)
    rng = random.Random(name)
    choices = [sorted(rng.sample(range(60), rng.choice((1, 2, 3, 5)))) for _ in range(25)]
    for wanted in [*choices, *([number] for number in range(60)), [9, 11, 29, 31, 49, 51], [0, 59]]:
        frames = decode_frames(blob, wanted)
        assert [frame_number(frame) for frame in frames] == wanted
        assert np.array_equal(frames, everything[wanted])


@pytest.mark.parametrize("name", ["h264", "h264 in Matroska", "h264, open groups", "hevc, open groups", "hevc, closed groups"])
def test_far_frames_cost_only_their_own_groups(name, encode_clip):
    timeline = _timeline(encode_clip(num_frames=60, **CLIPS[name]))
    needed = sum(needed_packets(timeline.packets, {timeline.pts[3], timeline.pts[43]}))
    assert needed <= 16 if name != "h264, open groups" else needed > 40  # which no file tells from groups that are repaired bit by bit


def packets_of(groups: list[tuple[int, int, bool]]) -> list[PacketHeader]:
    """Of (leading frames, further frames, clean) groups, in the order of decoding: the first frame, leading ones, others."""
    packets, shown = [], 0
    for leading, others, is_clean in groups:
        order = [shown + leading, *range(shown, shown + leading), *range(shown + leading + 1, shown + leading + 1 + others)]
        packets += [PacketHeader(pts, 1, n == 0, False, n == 0 and is_clean) for n, pts in enumerate(order)]
        shown += leading + 1 + others
    return packets


def referred_to(packets: list[PacketHeader], place: int) -> set[int]:
    """All that a packet may refer to, by the rules: its group up to it without leading frames, unless it is one; then the group before."""
    start = max((n for n in range(place + 1) if packets[n].is_clean_start), default=0)
    is_leading = packets[start].is_clean_start and packets[place].pts < packets[start].pts
    own = {n for n in range(start, place + 1) if is_leading or not packets[start].is_clean_start or packets[n].pts >= packets[start].pts}
    return own | (referred_to(packets, start - 1) if is_leading and start else set())


groups = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=500)
@given(groups, st.data())
def test_all_that_wanted_frames_refer_to_is_needed(groups, data):
    packets = packets_of(groups)
    wanted = data.draw(st.sets(st.sampled_from([packet.pts for packet in packets])))
    needed = {place for place, is_needed in enumerate(needed_packets(packets, wanted)) if is_needed}
    for place, packet in enumerate(packets):
        if packet.pts in wanted:
            assert referred_to(packets, place) <= needed
    # After what was left out comes a group's first frame, or a frame that refers to none of it.
    for place in needed - {0}:
        if place - 1 not in needed and not packets[place].is_clean_start:
            assert referred_to(packets, place) <= needed


def test_what_no_wanted_frame_refers_to_is_left_out():
    closed = packets_of([(0, 3, True), (0, 3, True), (0, 3, True)])
    assert needed_packets(closed, {5}) == [False] * 4 + [True] * 2 + [False] * 6
    open_groups = packets_of([(0, 3, True), (2, 3, True), (2, 3, True)])
    assert [place for place, needed in enumerate(needed_packets(open_groups, {7})) if needed] == [4, 7]
    assert [place for place, needed in enumerate(needed_packets(open_groups, {4})) if needed] == [0, 1, 2, 3, 4, 5]
    unclean = packets_of([(0, 3, False), (0, 3, False)])
    assert needed_packets(unclean, {5}) == [True] * 6 + [False] * 2
