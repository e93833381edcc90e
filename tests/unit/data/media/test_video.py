"""Every decoded frame is the one that was asked for, or an error names what was found."""

from io import BytesIO
from itertools import product
from pathlib import Path
from threading import Thread

import av
import cv2
import numpy as np
import pytest

from megatron_keye.data.media.video import DECODER_ID, VideoInfo, decode_frames, iter_frames, probe
from megatron_keye.errors import DataError

BFRAMES = {"g": "12", "bf": "3", "b_strategy": "0"}
VARIABLE_TIMES = np.cumsum([1 + (k * k) % 4 for k in range(48)]).tolist()
CLIPS = {
    "h264_mp4": {**BFRAMES},
    "h264_pyramid": {"g": "24", "bf": "7", "b-pyramid": "normal"},
    "h264_open_gop": {**BFRAMES, "x264-params": "open-gop=1"},
    "h264_no_bframes": {"g": "12", "bf": "0"},
    "h264_variable_rate": {**BFRAMES, "pts": VARIABLE_TIMES},
    "h264_ts": {**BFRAMES, "container": "mpegts"},
    "h264_mkv": {**BFRAMES, "container": "matroska"},
    "h264_flv": {**BFRAMES, "container": "flv"},
    "hevc_mp4": {"codec": "libx265", "x265-params": "log-level=none:keyint=16:bframes=4"},
    "vp9_webm": {"container": "webm", "codec": "libvpx-vp9", "cpu-used": "8"},
    "vp8_webm": {"container": "webm", "codec": "libvpx", "cpu-used": "8"},
    "equal_timestamps": {"container": "matroska", "rate": 5000, "g": "12", "bf": "0"},  # Matroska counts milliseconds
    "mpeg4_avi": {"container": "avi", "codec": "mpeg4", "bf": "2"},
    "mpeg2_ts": {"container": "mpegts", "codec": "mpeg2video", "bf": "2"},
}


def _decode_all(blob: bytes) -> np.ndarray:
    with av.open(BytesIO(blob)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _remux(blob: bytes, path: Path, container: str, shift: int = 0, drop: int = 0, **options: str) -> bytes:
    """The same packets in another container, without the first `drop`, `shift` frames earlier. Written to `path`."""
    with av.open(BytesIO(blob)) as source, av.open(str(path), "w", format=container, options=options) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        ticks = int(shift / 30 / stream.time_base)
        packets = [packet for packet in source.demux(stream) if packet.size]
        for packet in packets[drop:]:
            packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
            target.mux(packet)
    return path.read_bytes()


@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_is_the_one_asked_for(name, encode_clip, frame_number):
    blob = encode_clip(**CLIPS[name])
    everything = _decode_all(blob)
    info = probe(blob)
    assert info.num_frames == len(everything) == 48
    for wanted in ([0], [47], [0, 1, 2, 3], [1, 13, 25, 37], [5, 6, 11, 12, 30, 46], list(range(48))):
        frames = decode_frames(blob, wanted)
        assert [frame_number(frame) for frame in frames] == wanted
        assert np.array_equal(frames, everything[wanted]), "skipping frames must not change the others"


def test_any_order_and_repeats(h264_clip, frame_number):
    wanted = [30, 2, 2, 47, 0]
    assert [frame_number(frame) for frame in decode_frames(h264_clip, wanted)] == wanted
    with pytest.raises(ValueError, match="expected increasing"):
        next(iter_frames(h264_clip, wanted))
    assert list(iter_frames(h264_clip, [])) == []


def test_frames_are_yielded_one_at_a_time(h264_clip, frame_number):
    frames = iter_frames(h264_clip, range(48))
    assert [frame_number(next(frames)) for _ in range(3)] == [0, 1, 2]
    frames.close()


@pytest.mark.parametrize("wanted", [[48], [3, 200], [-1, 3]])
def test_frames_the_clip_does_not_have_are_refused(h264_clip, wanted):
    with pytest.raises(DataError, match="found a clip of 48 frames"):
        decode_frames(h264_clip, wanted)


def test_probe_measures_the_clip(encode_clip):
    assert probe(encode_clip(**BFRAMES)) == VideoInfo(num_frames=48, fps=30.0, height=96, width=160, duration_s=pytest.approx(1.6))
    variable = probe(encode_clip(**BFRAMES, pts=VARIABLE_TIMES, container="matroska"))
    assert variable.fps == pytest.approx(20.0)
    assert variable.duration_s == pytest.approx(2.4)
    assert probe(encode_clip(num_frames=1, **BFRAMES)).num_frames == 1
    assert av.__version__ in DECODER_ID


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_applied_as_opencv_does(encode_clip, tmp_path, rotation):
    blob = encode_clip(num_frames=4, rotation=rotation, **BFRAMES)
    (tmp_path / "clip.mp4").write_bytes(blob)
    _, expected = cv2.VideoCapture(str(tmp_path / "clip.mp4")).read()
    (frame,) = decode_frames(blob, [0])
    assert frame.shape == ((160, 96, 3) if rotation % 180 else (96, 160, 3))
    assert frame.shape[:2] == (probe(blob).height, probe(blob).width)
    assert np.array_equal(frame, expected[..., ::-1])
    print(f"parity video_rotation_{rotation} max_diff={np.abs(frame.astype(int) - expected[..., ::-1]).max()}")


def test_an_edit_list_cuts_the_frames_a_player_does_not_show(h264_clip, tmp_path, frame_number):
    blob = _remux(h264_clip, tmp_path / "clip.mp4", "mp4", shift=5, avoid_negative_ts="disabled")
    capture, shown = cv2.VideoCapture(str(tmp_path / "clip.mp4")), []
    while (read := capture.read())[0]:
        shown.append(frame_number(read[1][..., ::-1]))
    assert shown == list(range(5, 48))
    assert [frame_number(frame) for frame in decode_frames(blob, range(probe(blob).num_frames))] == shown


def test_hidden_frames_are_not_counted(encode_clip, frame_number):
    clip, file = BytesIO(encode_clip(**CLIPS["vp8_webm"])), BytesIO()
    with av.open(clip) as source, av.open(file, "w", "webm") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in source.demux(stream) if p.size):
            data = bytearray(bytes(packet))
            data[0] &= ~0x10 if number in (10, 30) else 0xFF  # RFC 6386, section 9.1: the bit that shows a frame
            edited = av.Packet(bytes(data))
            edited.pts, edited.dts, edited.time_base, edited.is_keyframe = packet.pts, packet.dts, packet.time_base, packet.is_keyframe
            edited.stream = copy
            target.mux(edited)
    blob = file.getvalue()
    assert probe(blob).num_frames == 46
    shown = [number for number in range(48) if number not in (10, 30)]
    assert [frame_number(frame) for frame in decode_frames(blob, range(46))] == shown


@pytest.mark.parametrize("container", ["mpegts", "mp4"])
@pytest.mark.parametrize(("drop", "first"), [(3, 12), (13, 24)])
def test_a_clip_that_starts_amid_a_group_of_pictures(h264_clip, tmp_path, frame_number, container, drop, first):
    blob = _remux(h264_clip, tmp_path / "clip", container, drop=drop)
    shown = [frame_number(frame) for frame in decode_frames(blob, range(probe(blob).num_frames))]
    assert shown == list(range(first, 48))


@pytest.mark.parametrize(
    ("container", "options"),
    [("mp4", {}), ("mp4", {"movflags": "faststart"}), ("mp4", {"movflags": "frag_keyframe+empty_moov"}), ("matroska", {})],
)
def test_truncated_files_are_refused(h264_clip, tmp_path, container, options):
    blob = _remux(h264_clip, tmp_path / "clip", container, **options)
    assert probe(blob).num_frames == 48
    for share in (0.01, 0.1, 0.3, 0.5, 0.8, 0.95):
        with pytest.raises(DataError, match=r"cannot decode a video: found .*\d+ bytes"):
            probe(blob[: int(len(blob) * share)])


def test_a_stream_without_a_length_never_gives_wrong_frames(h264_clip, tmp_path, frame_number):
    # MPEG-TS does not say how long it is: a cut one is shorter, and its last frames may have a gap, as for a player.
    blob = _remux(h264_clip, tmp_path / "clip", "mpegts")
    for share in (0.1, 0.3, 0.5, 0.8, 0.95):
        cut = blob[: int(len(blob) * share)]
        try:
            shown = [frame_number(frame) for frame in decode_frames(cut, range(probe(cut).num_frames))]
        except DataError:
            continue
        assert shown == sorted(set(shown))
        assert len(shown) < 48


def test_a_stream_with_a_lost_packet_is_refused(encode_clip):
    blob = encode_clip(**BFRAMES, container="mpegts")
    start = 20 * 188  # amid a frame's packets, whose counter then has a gap
    with pytest.raises(DataError, match="found an MPEG-TS file of .* with damaged packets"):
        probe(blob[:start] + blob[start + 188 :])


@pytest.mark.parametrize(
    ("blob", "found"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><title>404</title>" * 20, "an HTML page of 660 bytes"),
        (bytes(1000), r"1000 bytes starting with b'\\x00"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "a PNG file"),
    ],
)
def test_what_is_no_video_is_named(blob, found):
    for read in (probe, lambda data: decode_frames(data, [0])):
        with pytest.raises(DataError, match=f"found {found}"):
            read(blob)


@pytest.mark.parametrize("kind", ["ffconcat", "hls"])
def test_a_playlist_cannot_open_another_file(h264_clip, tmp_path, monkeypatch, kind):
    (tmp_path / "secret.mp4").write_bytes(h264_clip)
    monkeypatch.chdir(tmp_path)
    playlist = {
        "ffconcat": b"ffconcat version 1.0\nfile secret.mp4\n",
        "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    }[kind]
    if kind == "ffconcat":
        with av.open(BytesIO(playlist)) as opened:
            assert opened.streams.video, "the attack must work without our options, or this test shows nothing"
    with pytest.raises(DataError, match=f"{kind}.* playlist" if kind == "ffconcat" else "HLS playlist"):
        probe(playlist)


def test_sound_without_pictures_is_refused():
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    with pytest.raises(DataError, match="without a video stream"):
        probe(file.getvalue())


@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska"])
def test_flipped_bits_raise_nothing_but_data_errors(h264_clip, tmp_path, container):
    blob = _remux(h264_clip, tmp_path / "clip", container)
    rng = np.random.default_rng(0)
    outcomes = []
    for _, region in product(range(40), (len(blob) // 8, len(blob))):
        damaged = np.frombuffer(blob, dtype=np.uint8).copy()
        damaged[rng.integers(region, size=3)] ^= np.uint8(1) << rng.integers(8, size=3, dtype=np.uint8)
        try:
            decode_frames(damaged.tobytes(), range(min(probe(damaged.tobytes()).num_frames, 48)))
            outcomes.append("decoded")
        except DataError:
            outcomes.append("refused")
    assert set(outcomes) == {"decoded", "refused"}


def test_clips_are_decoded_in_parallel(h264_clip, frame_number):
    found: dict[int, list[int]] = {}

    def work(start: int) -> None:
        found[start] = [frame_number(frame) for frame in decode_frames(h264_clip, range(start, 48, 4))]

    threads = [Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: list(range(start, 48, 4)) for start in range(4)}
