"""Codecs and containers through a server: every frame is the one that was asked for, and its bytes are those made here."""

from io import BytesIO

import av
import cv2
import numpy as np
import pytest

from megatron_keye.contract.media import PATCH_PIXELS
from megatron_keye.data.media.decoder import PYAV
from megatron_keye.data.media.video import probe
from megatron_keye.io_server.decode import decode
from tests.unit.data.media.conftest import encode_clip, frame_number  # noqa: F401
from tests.unit.io_server.serving import job_for, post

BFRAMES = {"g": "12", "bf": "3", "b_strategy": "0"}
X265 = {"codec": "libx265", "x265-params": "log-level=none:keyint=16:bframes=4"}
CLIPS = {
    "h264": BFRAMES,
    "h264_open_gop": {**BFRAMES, "x264-params": "open-gop=1"},
    "h264_10_bit": {**BFRAMES, "pix_fmt": "yuv420p10le"},
    "h264_variable_rate": {**BFRAMES, "pts": np.cumsum([1 + (k * k) % 4 for k in range(48)]).tolist()},
    "h264_rotated": {**BFRAMES, "rotation": 90},
    "mpeg_ts": {**BFRAMES, "container": "mpegts"},
    "hevc": X265,
    "hevc_open_gop": {**X265, "x265-params": X265["x265-params"] + ":open-gop=1"},
    "hevc_10_bit": {**X265, "pix_fmt": "yuv420p10le"},
    "hevc_ts": {**X265, "container": "mpegts"},
    "vp9": {"container": "webm", "codec": "libvpx-vp9", "cpu-used": "8"},
    "av1": {"codec": "libsvtav1", "preset": "10"},
    "av1_10_bit": {"codec": "libsvtav1", "preset": "10", "pix_fmt": "yuv420p10le", "container": "matroska"},
}
WANTED = (0, 1, 5, 6, 11, 13, 25, 30, 37, 40)
SLOW, FAST = (168, 280), (112, 168)


def edit_list(blob: bytes, num_frames: int) -> bytes:
    """The same packets, with an edit list that leaves out the first frames."""
    file = BytesIO()
    with av.open(BytesIO(blob)) as source, av.open(file, "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        ticks = int(num_frames / 30 / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
                target.mux(packet)
    return file.getvalue()


def as_frame(patches: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] of the patches of one frame."""
    blocks = patches.reshape(height // PATCH_PIXELS, width // PATCH_PIXELS, 3, PATCH_PIXELS, PATCH_PIXELS)
    return blocks.transpose(0, 3, 1, 4, 2).reshape(height, width, 3)


def check(server, path, blob, read_number, first_shown=0, is_upright=True):
    """Ask for frames of `blob`, whose numbers begin with `first_shown`."""
    path.write_bytes(blob)
    info = probe(blob)
    fast = tuple(number % 2 == 1 for number in range(len(WANTED)))
    sizes = (SLOW, FAST) if is_upright else (SLOW[::-1], FAST[::-1])
    job = job_for(path, height=info.height, width=info.width, sizes=sizes, frames=WANTED, fast=fast, decoder_id=server.front._decoder_id)
    status, _, body = post(server.url, job)
    assert status == 200, body
    assert body == b"".join(patches.tobytes() for patches in decode(PYAV, job, blob))
    segments = np.split(np.frombuffer(body, np.uint8).reshape(-1, 588), np.cumsum(job.segments)[:-1])
    shown = []
    for patches, is_fast in zip(segments, fast, strict=True):
        frame = as_frame(patches, *sizes[is_fast])
        upright = frame if is_upright else np.rot90(frame, -1)
        shown.append(read_number(cv2.resize(np.ascontiguousarray(upright), (160, 96))))
    assert shown == [number + first_shown for number in WANTED]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_from_a_server_are_those_asked_for_and_those_made_here(name, encode_clip, frame_number, real, tmp_path):  # noqa: F811
    codec = CLIPS[name].get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot encode with {codec}")
    check(real, tmp_path / "clip", encode_clip(**CLIPS[name]), frame_number, is_upright=name != "h264_rotated")


def test_an_edit_list_holds_there_too(encode_clip, frame_number, real, tmp_path):  # noqa: F811
    check(real, tmp_path / "clip", edit_list(encode_clip(**BFRAMES), 5), frame_number, first_shown=5)
