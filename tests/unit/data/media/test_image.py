"""Image pixels against keye-vl-utils 1.5.2 (1.5) and against Pillow's own operations (Preview)."""

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_keye.data.media.image import FORMATS, image_dimensions, read_image, resize_image
from megatron_keye.data.media.resize import resize_steps
from megatron_keye.errors import DataError


def _picture(mode: str = "RGB", height: int = 150, width: int = 211) -> Image.Image:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / 20.0
    channels = [127 + 100 * np.sin(x * (c + 1) + y) + rng.normal(0, 8, x.shape) for c in range(4)]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8), "RGBA").convert(mode)


def _encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind):
    blob = _encoded(_picture(), kind)
    assert image_dimensions(blob) == (150, 211)
    pixels = read_image(blob, "keye_vl_1_5")
    assert pixels.dtype == np.uint8
    assert pixels.shape == (150, 211, 3)
    assert np.array_equal(pixels, np.array(Image.open(BytesIO(blob)).convert("RGB")))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "I;16"])
def test_1_5_pixels_equal_the_oracle(oracle, mode):
    picture = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)) if mode == "I;16" else _picture(mode)
    blob = _encoded(picture, "PNG")
    expected = np.array(oracle.fetch_image({"image": Image.open(BytesIO(blob))}))
    steps = resize_steps(*image_dimensions(blob), "keye_vl_1_5", 4, 20480)
    pixels = resize_image(read_image(blob, "keye_vl_1_5"), steps)
    assert np.array_equal(pixels, expected)
    print(f"parity image_1_5_{mode} max_diff={np.abs(pixels.astype(int) - expected).max()}")


@pytest.mark.parametrize("options", [{"quality": 90, "subsampling": 2}, {"quality": 75, "progressive": True}])
def test_1_5_jpeg_pixels_equal_the_oracle(oracle, options):
    blob = _encoded(_picture(), "JPEG", **options)
    expected = np.array(oracle.fetch_image({"image": Image.open(BytesIO(blob)), "max_pixels": 20_000}))
    steps = resize_steps(150, 211, "keye_vl_1_5", 4, 20480, max_pixels=20_000)
    assert np.array_equal(resize_image(read_image(blob, "keye_vl_1_5"), steps), expected)


def _pillow_rgb(blob: bytes) -> np.ndarray:
    return np.array(Image.open(BytesIO(blob)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (8, 16), (17, 33), (150, 211)])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": kind} for kind in range(3)] + [{"progressive": True}, {"keep_rgb": True}, {"restart_marker_blocks": 1}],
    ids=lambda options: "-".join(options),
)
def test_jpeg_files_have_the_pixels_of_pillow(mode, size, options):
    blob = _encoded(_picture(mode if mode != "CMYK" else "RGB", *size).convert(mode), "JPEG", quality=85, **options)
    assert np.array_equal(read_image(blob, "keye_vl_1_5"), _pillow_rgb(blob))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_jpeg_files_are_what_pillow_makes_of_them(data):
    blob = bytearray(_encoded(_picture(height=64, width=48), "JPEG", quality=60))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(2, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = bytes(blob[: data.draw(st.integers(100, len(blob)))])
    try:
        expected = _pillow_rgb(blob)
    except Exception:
        expected = None
    try:
        pixels = read_image(blob, "keye_vl_1_5")
    except DataError:
        pixels = None
    assert (pixels is None) == (expected is None)
    assert pixels is None or np.array_equal(pixels, expected)


def test_preview_lays_transparent_pictures_on_white():
    clear = Image.new("RGBA", (40, 30), (10, 20, 30, 0))
    half = Image.new("RGBA", (40, 30), (0, 0, 0, 128))
    assert (read_image(_encoded(clear, "PNG"), "keye_vl_preview") == 255).all()
    assert (read_image(_encoded(clear, "PNG"), "keye_vl_1_5") == (10, 20, 30)).all()
    assert (read_image(_encoded(half, "PNG"), "keye_vl_preview") == 127).all()


def test_preview_resizes_through_the_intermediate_size():
    picture = _picture(height=1080, width=1920)
    steps = resize_steps(1080, 1920, "keye_vl_preview", 4, 20480)
    assert steps == ((1092, 1932), (728, 1316))
    expected = np.array(picture.resize((1932, 1092), Image.Resampling.BICUBIC).resize((1316, 728), Image.Resampling.BICUBIC))
    pixels = resize_image(np.array(picture), steps)
    assert np.array_equal(pixels, expected)
    assert not np.array_equal(pixels, resize_image(np.array(picture), steps[-1:]))


def test_orientation_tags_are_ignored_as_released():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image_dimensions(_encoded(_picture(), "JPEG", exif=exif)) == (150, 211)
    assert read_image(_encoded(_picture(), "JPEG", exif=exif), "keye_vl_1_5").shape == (150, 211, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_files_are_refused(kind, share):
    blob = _encoded(_picture(), kind)
    with pytest.raises(DataError, match=f"cannot decode an image: found .*{int(len(blob) * share)} bytes"):
        read_image(blob[: int(len(blob) * share)], "keye_vl_1_5")


@pytest.mark.parametrize(
    ("blob", "found"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><title>404</title>", "an HTML page of 33 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file"),
        (bytes(100), r"100 bytes starting with b'\\x00"),
    ],
)
def test_what_is_no_image_is_named(blob, found):
    for read in (image_dimensions, lambda data: read_image(data, "keye_vl_preview")):
        with pytest.raises(DataError, match=found):
            read(blob)


def test_an_oversized_picture_is_refused():
    header = bytearray(_encoded(Image.new("1", (64, 64)), "BMP"))
    header[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(DataError, match="DecompressionBombError"):
        image_dimensions(bytes(header))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged TIFF tags
def test_flipped_bits_raise_nothing_but_data_errors():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF"):
        blob = _encoded(_picture(height=60, width=80), kind)
        for _ in range(40):
            damaged = np.frombuffer(blob, dtype=np.uint8).copy()
            damaged[rng.integers(len(damaged), size=3)] ^= np.uint8(1) << rng.integers(8, size=3, dtype=np.uint8)
            try:
                assert read_image(damaged.tobytes(), "keye_vl_1_5").ndim == 3
            except DataError:
                continue
