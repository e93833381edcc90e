"""The installed NVIDIA DALI behind its decoder, on the CPU: exact frames, right colours, and what it refuses."""

from io import BytesIO

import av
import cv2
import numpy as np
import pytest

from megatron_keye.data.media.decoder import PYAV, decoder_id, open_decoder
from megatron_keye.data.media.video import probe
from megatron_keye.errors import DataError, UnsupportedError
from tests.unit.data.media.test_dali import BFRAMES, HAS_DALI, VP9, encoded
from tests.unit.io_server.serving import RunningServer, job_for, post
from tests.unit.io_server.test_codecs import edit_list

pytestmark = pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed (pip install 'megatron_keye[dali]')")
MJPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}
CLIPS = {
    "vp9_webm": VP9,
    "vp9_mp4": {**VP9, "container": "mp4"},
    "vp9_mkv": {**VP9, "container": "matroska", "g": "12"},
    "vp9_hidden_references": {"container": "webm", "codec": "libvpx-vp9", "cpu-used": "4", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "vp9_variable_rate": {**VP9, "container": "mp4", "pts": np.cumsum([1 + (k * k) % 4 for k in range(48)]).tolist()},
    "vp9_starts_late": {**VP9, "pts": [200 + k for k in range(48)]},
    "vp9_rotated": {**VP9, "container": "mp4", "rotation": 90},
    "mjpeg_avi": {**MJPEG, "container": "avi"},
    "mjpeg_mp4": MJPEG,
    "vp8": {"container": "webm", "codec": "libvpx", "cpu-used": "8"},
    "mpeg_ts": {"container": "mpegts", "codec": "mpeg2video"},
}
GPU_CLIPS = {
    "h264": BFRAMES,
    "h264_open_gop": {**BFRAMES, "x264-params": "open-gop=1"},
    "h264_mkv": {**BFRAMES, "container": "matroska"},
    "h264_ts": {**BFRAMES, "container": "mpegts"},
    "h264_rotated": {**BFRAMES, "rotation": 90},
}
LARGE_CLIPS = {
    "hevc": {"codec": "libx265", "x265-params": "log-level=none:keyint=16:bframes=4"},
    "av1": {"codec": "libsvtav1", "preset": "10"},
    "vp9": {"codec": "libvpx-vp9", "cpu-used": "8"},
}
"""At twice the size, as GPUs refuse frames of 96x160 pixels of these codecs."""
WANTED = (0, 1, 5, 9, 10, 24, 47)
MEAN_DIFFERENCE = 3.0
"""Grey levels: DALI interpolates colours, swscale repeats them, and the numbers in these frames have hard edges."""


@pytest.fixture(scope="module")
def dali():
    return open_decoder("dali")


def no_gpu(decoder):
    return "-cpu-" in decoder.name


@pytest.mark.parametrize("name", [*CLIPS, *GPU_CLIPS])
def test_every_frame_is_the_one_asked_for(name, dali, encode_clip, frame_number):
    if name in GPU_CLIPS and no_gpu(dali):
        pytest.skip("needs a GPU with a video engine")
    blob = encode_clip(**(CLIPS | GPU_CLIPS)[name])
    frames, expected = (np.stack(list(decoder.iter_frames(blob, WANTED))) for decoder in (dali, PYAV))
    assert frames.shape == expected.shape
    assert frames.dtype == np.uint8
    turned = np.rot90(frames, -1, axes=(1, 2)) if name.endswith("rotated") else frames
    assert [frame_number(np.ascontiguousarray(frame)) for frame in turned] == list(WANTED)
    difference = np.abs(frames.astype(int) - expected)
    print(f"parity dali_{name} mean_diff={difference.mean():.2f} max_diff={difference.max()}")
    assert difference.mean() < MEAN_DIFFERENCE


@pytest.mark.parametrize("name", LARGE_CLIPS)
def test_every_frame_of_a_larger_clip_is_the_one_asked_for(name, dali, encode_clip, frame_number):
    if name != "vp9" and no_gpu(dali):
        pytest.skip("needs a GPU with a video engine")
    options, file = dict(LARGE_CLIPS[name]), BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream(options.pop("codec"), rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"
        for number, small in enumerate(PYAV.iter_frames(encode_clip(**BFRAMES), range(48))):
            frame = av.VideoFrame.from_ndarray(cv2.resize(small, (320, 192)), format="rgb24")
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert [frame_number(cv2.resize(frame, (160, 96))) for frame in dali.iter_frames(file.getvalue(), WANTED)] == list(WANTED)


def test_an_edit_list_holds(dali, encode_clip, frame_number):
    blob = edit_list(encode_clip(**VP9, g="12"), 5)
    assert [frame_number(frame) for frame in dali.iter_frames(blob, range(probe(blob).num_frames))] == list(range(5, 48))


@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("matrix", [1, 5])
def test_colours_are_those_that_the_clip_says(dali, matrix, color_range):
    colors = [(200, 120, 90), (60, 140, 80), (70, 90, 180), (128, 128, 128), (250, 250, 250), (9, 9, 9)]
    file = BytesIO()
    with av.open(file, "w", format="webm") as output:
        stream = output.add_stream("libvpx-vp9", rate=30, options={"lossless": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        for number, color in enumerate(colors):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), color, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=color_range)
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    found = np.stack(list(dali.iter_frames(file.getvalue(), range(len(colors)))))
    assert np.abs(found.astype(int) - np.array(colors)[:, None, None]).max() <= 4


@pytest.mark.parametrize("options", [{}, {"quality": 40}, {"progressive": True}, {"subsampling": 0}])
def test_images_are_those_of_the_other_decoder_on_the_cpu(dali, options):
    for mode in ("RGB", "L"):
        blob = encoded("JPEG", mode, **options)
        found, expected = (decoder.read_image(blob, "keye_vl_1_5") for decoder in (dali, PYAV))
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= (0 if no_gpu(dali) else 3)


def test_a_bad_medium_spoils_none_after_it(dali, encode_clip):
    picture, clip = encoded("JPEG"), encode_clip(**VP9)
    for bad in (picture[:600], b"<html>" * 100, b"", b"ffconcat version 1.0\nfile clip.mp4\n"):
        with pytest.raises(DataError):
            dali.read_image(bad, "keye_vl_1_5")
        with pytest.raises(DataError):
            next(dali.iter_frames(bad, [0]))
        with pytest.raises(DataError):
            next(dali.iter_frames(clip[: len(clip) // 2], [0]))
        assert dali.read_image(picture, "keye_vl_1_5").shape == (60, 80, 3)
        assert len(list(dali.iter_frames(clip, WANTED))) == len(WANTED)


def test_the_library_raises_for_what_it_cannot_decode_and_goes_on_anew(dali, encode_clip):
    """As the decoder does it, without the checks before: the pipeline is of no use after an error."""
    clip = encode_clip(**{**VP9, "container": "mp4"})
    for bad in (clip[: len(clip) // 2], b"no clip"):
        with pytest.raises(RuntimeError):
            dali._videos(bad, [0])
        assert dali._videos(clip, [3]).shape == (1, 96, 160, 3)
    with pytest.raises(RuntimeError):
        dali._videos(clip, [48])


def test_h264_needs_a_gpu(dali, encode_clip):
    if not no_gpu(dali):
        pytest.skip("a GPU is here")
    with pytest.raises(UnsupportedError, match="has h264 video.*data.media.decoder=pyav"):
        next(dali.iter_frames(encode_clip(**BFRAMES), [0]))


def test_a_server_with_dali_gives_what_is_made_here_and_says_what_it_cannot(dali, encode_clip, tmp_path):
    from megatron_keye.io_server.decode import decode
    from megatron_keye.io_server.pool import worker_command

    (tmp_path / "clip").write_bytes(encode_clip(**VP9))
    (tmp_path / "picture").write_bytes(encoded("JPEG"))
    (tmp_path / "h264").write_bytes(encode_clip(**BFRAMES))
    own = decoder_id(dali)
    video = dict(height=96, width=160, sizes=((112, 168), (56, 84)), frames=WANTED, fast=(False, True) * 3 + (False,), decoder_id=own)
    server = RunningServer(tmp_path, worker_command("dali"))
    try:
        assert server.front._decoder_id == own
        for job in (job_for(tmp_path / "clip", **video), job_for(tmp_path / "picture", height=60, width=80, decoder_id=own)):
            status, _, body = post(server.url, job)
            blob = (tmp_path / job.path.rpartition("/")[2]).read_bytes()
            assert status == 200, body
            assert body == b"".join(patches.tobytes() for patches in decode(dali, job, blob))
        if no_gpu(dali):
            status, _, body = post(server.url, job_for(tmp_path / "h264", **video))
            assert status == 422
            assert b'"unsupported"' in body
    finally:
        server.close()
