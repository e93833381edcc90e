"""What the DALI decoder does around the library, whose place a backend of the test's own takes."""

import subprocess
import sys
from importlib.util import find_spec
from io import BytesIO

import av
import numpy as np
import pytest
from PIL import Image

from megatron_keye.data.media.dali import DaliDecoder
from megatron_keye.data.media.decoder import PYAV, decoder_id, open_decoder
from megatron_keye.data.media.image import read_image
from megatron_keye.data.media.video import decode_frames
from megatron_keye.errors import DataError, SettingsError, UnsupportedError
from tests.unit.io_server.test_codecs import edit_list

HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
VP9 = {"container": "webm", "codec": "libvpx-vp9", "cpu-used": "8"}
BFRAMES = {"g": "12", "bf": "3", "b_strategy": "0"}
WANTED = (0, 1, 5, 13, 30, 47)


class FakeBackend:
    """Decodes as DALI does: every clip as BT.601, frames as they are stored, and a pipeline that failed fails for ever."""

    name = "fake-1.0"

    def __init__(self, has_gpu=True, fails=()):
        self.has_gpu = has_gpu
        self.fails = list(fails)
        """For the next calls, whether they fail."""
        self.opened = 0
        self.asked = []
        """Frames of each call for a clip."""

    def open_images(self):
        return self._pipeline(lambda blob: read_image(blob, "keye_vl_1_5"))

    def open_videos(self):
        return self._pipeline(self._frames)

    def _pipeline(self, decode):
        self.opened += 1
        is_valid = True

        def run(*medium):
            nonlocal is_valid
            if not is_valid:
                raise RuntimeError("Current pipeline object is no longer valid.")
            is_valid = False
            if self.fails and self.fails.pop(0):
                raise RuntimeError("Critical error in pipeline:\nencountered:\n\nNVDEC is tired\nC++ context: x")
            pixels = decode(*medium)
            is_valid = True
            return pixels

        return run

    def _frames(self, blob, indices):
        self.asked.append(tuple(indices))
        frames = []
        with av.open(BytesIO(blob)) as container:
            for frame in container.decode(video=0):
                if frame.is_corrupt:
                    raise RuntimeError("Assert on a frame failed")
                frame.colorspace = 5
                frames.append(frame.to_ndarray(format="rgb24"))
        return np.stack(frames)[list(indices)]


def encoded(image_format, mode="RGB", **options):
    ramp = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], -1)).convert(mode).save(file, image_format, **options)
    return file.getvalue()


def tagged(matrix, colors):
    """A lossless clip of flat frames, whose YCbCr values follow a conversion and say so."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=30, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = matrix
        for number, color in enumerate(colors):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), color, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix)
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def stack(decoder, blob, indices):
    return np.stack(list(decoder.iter_frames(blob, indices)))


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 270])
def test_frames_are_those_of_the_other_decoder(encode_clip, rotation, has_gpu):
    clip = BFRAMES if has_gpu else {**VP9, "container": "mp4"}
    blob, backend = encode_clip(**clip, rotation=rotation), FakeBackend(has_gpu)
    assert np.array_equal(stack(DaliDecoder(backend), blob, WANTED), decode_frames(blob, WANTED))
    assert backend.asked == [WANTED]


@pytest.mark.parametrize("clip", [VP9, {"codec": "libx265"}, {"codec": "mjpeg", "pix_fmt": "yuvj420p"}])
def test_a_clip_smaller_than_a_video_engine_takes_is_left_to_pyav(encode_clip, clip):
    blob, backend = encode_clip(**clip), FakeBackend()
    assert np.array_equal(stack(DaliDecoder(backend), blob, WANTED), decode_frames(blob, WANTED))
    assert backend.asked == ([WANTED] if clip["codec"] == "mjpeg" else []), "96x160 pixels: enough for MJPEG alone"


def test_only_so_many_frames_are_held_at_once(encode_clip, frame_number):
    blob, backend = encode_clip(**BFRAMES), FakeBackend()
    frames = DaliDecoder(backend, chunk_bytes=2 * 96 * 160 * 3 + 1).iter_frames(blob, WANTED)
    assert frame_number(next(frames)) == 0
    assert backend.asked == [(0, 1)]
    assert [frame_number(frame) for frame in frames] == list(WANTED[1:])
    assert backend.asked == [(0, 1), (5, 13), (30, 47)]
    assert len(list(DaliDecoder(backend, chunk_bytes=1).iter_frames(blob, WANTED))) == len(WANTED)


@pytest.mark.parametrize("matrix", [1, 5, 7, 9])
def test_colours_are_those_that_the_clip_says(matrix):
    blob = tagged(matrix, [(200, 120, 90), (60, 140, 80), (70, 90, 180), (128, 128, 128), (250, 250, 250), (9, 9, 9)])
    ours, theirs = stack(DaliDecoder(FakeBackend()), blob, range(6)), decode_frames(blob, range(6))
    assert np.abs(ours.astype(int) - theirs).max() <= 3
    taken_for_601 = FakeBackend().open_videos()(blob, range(6))
    assert (np.abs(taken_for_601.astype(int) - theirs).max() > 5) == (matrix != 5), "what there is to correct"


ODD_CLIPS = {
    "10 bits": {**BFRAMES, "pix_fmt": "yuv420p10le"},
    "full colours": {**BFRAMES, "pix_fmt": "yuv444p"},
    "a codec DALI does not have": {"container": "mpegts", "codec": "mpeg2video"},
    "hidden frames": {"container": "webm", "codec": "libvpx", "cpu-used": "8"},
    "equal timestamps": {"container": "matroska", "rate": 5000, "g": "12", "bf": "0"},
}


@pytest.mark.parametrize("name", ODD_CLIPS)
def test_a_clip_that_is_not_plain_is_left_to_pyav(encode_clip, name):
    blob, backend = encode_clip(**ODD_CLIPS[name]), FakeBackend()
    assert np.array_equal(stack(DaliDecoder(backend), blob, WANTED), decode_frames(blob, WANTED))
    assert backend.asked == []


def test_a_clip_of_which_not_all_packets_are_shown_is_left_to_pyav(encode_clip, frame_number):
    blob, backend = edit_list(encode_clip(**BFRAMES), 5), FakeBackend()
    assert [frame_number(frame) for frame in DaliDecoder(backend).iter_frames(blob, range(43))] == list(range(5, 48))
    assert backend.asked == []


@pytest.mark.parametrize("blob", [encoded("PNG"), encoded("PNG", "RGBA"), encoded("GIF"), encoded("WEBP"), encoded("JPEG", "CMYK")])
def test_an_image_that_is_not_a_plain_jpeg_is_left_to_pillow(blob):
    backend = FakeBackend()
    decoder = DaliDecoder(backend)
    backend.fails = [True]
    for variant in ("keye_vl_1_5", "keye_vl_preview"):
        assert np.array_equal(decoder.read_image(blob, variant), read_image(blob, variant))
    assert backend.fails == [True], "the pipeline was not asked"


def test_a_gpu_that_is_missing_is_said_and_never_made_up_for(encode_clip):
    decoder = DaliDecoder(FakeBackend(has_gpu=False))
    for clip in (BFRAMES, {"codec": "libx265"}, ODD_CLIPS["10 bits"]):
        with pytest.raises(UnsupportedError, match=r"has (h264|hevc) video.*on GPUs only.*set data.media.decoder=pyav"):
            next(decoder.iter_frames(encode_clip(**clip), WANTED))
    blob = encode_clip(**VP9)
    assert np.array_equal(stack(decoder, blob, WANTED), decode_frames(blob, WANTED))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_damaged_medium_gets_the_other_decoders_error_and_spoils_none_after_it(kind, encode_clip):
    backend = FakeBackend()
    decoder = DaliDecoder(backend)
    if kind == "image":
        whole, damaged = encoded("JPEG"), encoded("JPEG")[:700]

        def decode(of, blob):
            return of.read_image(blob, "keye_vl_1_5")
    else:
        whole = encode_clip(**BFRAMES)
        damaged = whole[: len(whole) // 2] + bytes(200) + whole[len(whole) // 2 + 200 :]

        def decode(of, blob):
            return stack(of, blob, WANTED)

    expected = decode(PYAV, whole)
    assert np.array_equal(decode(decoder, whole), expected)
    with pytest.raises(DataError) as found:
        decode(decoder, damaged)
    with pytest.raises(DataError) as wanted:
        decode(PYAV, damaged)
    assert str(found.value) == str(wanted.value)
    assert np.array_equal(decode(decoder, whole), expected)


def test_a_failed_pipeline_is_opened_anew_and_used_until_the_next_error():
    backend = FakeBackend()
    decoder, blob = DaliDecoder(backend), encoded("JPEG")
    expected, before = decoder.read_image(blob, "keye_vl_1_5"), backend.opened
    backend.fails = [True]
    assert np.array_equal(decoder.read_image(blob, "keye_vl_1_5"), expected), "nothing is wrong with it: tried again"
    decoder.read_image(blob, "keye_vl_1_5")
    assert backend.opened == before + 1


def test_a_whole_medium_that_fails_twice_is_unsupported_and_not_bad(encode_clip):
    backend = FakeBackend()
    decoder = DaliDecoder(backend)
    for decode in (lambda: decoder.read_image(encoded("JPEG"), "keye_vl_1_5"), lambda: stack(decoder, encode_clip(**BFRAMES), WANTED)):
        backend.fails = [True, True]
        with pytest.raises(UnsupportedError, match="RuntimeError: NVDEC is tired.*nothing wrong: set data.media.decoder=pyav, or drop it"):
            decode()
        decode()


@pytest.mark.parametrize(("indices", "error"), [((3, 1), ValueError), ((0, 48), DataError)])
def test_indices_are_checked_as_by_the_other_decoder(encode_clip, indices, error):
    blob = encode_clip(**VP9)
    with pytest.raises(error) as wanted:
        stack(PYAV, blob, indices)
    with pytest.raises(error) as found:
        stack(DaliDecoder(FakeBackend()), blob, indices)
    assert str(found.value) == str(wanted.value)


def test_a_playlist_is_not_handed_over(tmp_path):
    backend = FakeBackend()
    with pytest.raises(DataError, match="an ffconcat playlist"):
        stack(DaliDecoder(backend), b"ffconcat version 1.0\nfile clip.mp4\n", [0])
    assert backend.asked == []


def test_the_id_names_both_libraries_and_what_comes_out():
    backend = FakeBackend()
    decoder = DaliDecoder(backend)
    assert decoder.name.startswith("fake-1.0-jpeg-")
    assert decoder.name.endswith(PYAV.name), "odd clips are left to it"
    assert decoder_id(decoder).startswith(decoder.name)
    assert len(decoder_id(decoder)) <= 200, "what a request may hold"
    backend.open_images = lambda: lambda blob: read_image(blob, "keye_vl_1_5") // 2 * 2
    assert DaliDecoder(backend).name != decoder.name, "a GPU that rounds otherwise"


@pytest.mark.skipif(HAS_DALI, reason="NVIDIA DALI is installed")
def test_where_dali_is_missing_the_error_says_what_to_install():
    assert open_decoder("pyav") is PYAV
    with pytest.raises(SettingsError, match=r"data.media.decoder is dali.*pip install 'megatron_keye\[dali\]'"):
        open_decoder("dali")
    command = (sys.executable, "-m", "megatron_keye.io_server.decode", "dali", "identify")
    program = subprocess.run(command, capture_output=True, text=True)
    assert program.returncode == SettingsError.exit_code
    assert program.stdout.startswith("data.media.decoder is dali")
