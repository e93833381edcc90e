"""Our resizes give the bytes of the installed Pillow (bicubic) and of the installed torch (bilinear), whatever the sizes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_keye.data.media import image, resample
from megatron_keye.data.media.passes import resize_height, resize_width
from megatron_keye.data.media.weights import pillow_bicubic_weights, torch_bilinear_weights

pytest.importorskip("numba")
SIDES = st.integers(1, 300)
SIZES = st.one_of(
    st.tuples(SIDES, SIDES, SIDES, SIDES),
    st.tuples(SIDES, SIDES, SIDES).map(lambda s: (s[0], s[1], s[0], s[2])),
    st.tuples(SIDES, SIDES, SIDES).map(lambda s: (s[0], s[1], s[2], s[1])),
    st.tuples(SIDES, SIDES, st.integers(1, 12)).map(lambda s: (s[0] * s[2], s[1] * s[2], s[0], s[1])),
    st.tuples(SIDES, SIDES, st.integers(1, 6)).map(lambda s: (s[0], s[1], s[0] * s[2], s[1] * s[2])),
    st.tuples(st.integers(1, 8), st.integers(1, 5000), st.integers(1, 60), st.integers(1, 5000)),
    st.tuples(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 5000), st.integers(1, 60)),
)
"""(height, width, new height, new width): any, of one axis, by whole factors, elongated."""
CLIPS = [
    (480, 852, 448, 812),
    (480, 852, 252, 448),
    (720, 1280, 392, 700),
    (720, 1280, 560, 1008),
    (1080, 1920, 252, 448),
    (1920, 1080, 616, 336),
    (360, 640, 364, 644),
    (144, 256, 168, 280),
    (2160, 3840, 588, 1036),
    (90, 160, 140, 252),
    (300, 40000, 28, 3724),
]
WITHOUT_AVX2 = """
import numpy as np, torch
from tests.unit.data.media.test_resample import CLIPS, by_torch, noise, resample
pairs = [(noise(height, width), size) for height, width, *size in CLIPS]
print(torch.backends.cpu.get_cpu_capability(), all(np.array_equal(resample.resize_bilinear(*pair), by_torch(*pair)) for pair in pairs))
"""


def pillow(pixels, size):
    return np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def by_torch(pixels, size):
    frame = torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(frame, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def noise(height, width, seed=0):
    """Extremes of black and white, where rounding and overshoot have most to do, beside values in between."""
    pixels = np.random.default_rng(seed).integers(-200, 456, (height, width, 3)).clip(0, 255)
    return pixels.astype(np.uint8)


def checkerboard(height, width, seed=0):
    squares = np.indices((height, width)).sum(axis=0) % 2
    return np.repeat((squares * 255).astype(np.uint8)[..., None], 3, axis=2)


CONTENTS = st.sampled_from(
    [noise, checkerboard, lambda h, w, seed: np.zeros((h, w, 3), np.uint8), lambda h, w, seed: np.full((h, w, 3), 255, np.uint8)]
)


@settings(deadline=None, max_examples=150)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 9))
@example(1, 1, 300, 300, 0)
@example(300, 1, 1, 300, 0)
@example(129, 300, 129, 28, 0)
@example(300, 200, 28, 200, 0)
@example(240, 160, 100, 160, 0)
def test_bytes_are_those_of_pillow(height, width, new_height, new_width, seed):
    pixels = noise(height, width, seed)
    assert np.array_equal(resample._bicubic(pixels, (new_height, new_width)), pillow(pixels, (new_height, new_width)))


@settings(deadline=None, max_examples=400)
@given(SIZES, CONTENTS, st.integers(0, 9))
@example((1, 1, 300, 300), noise, 0)
@example((1, 65536, 1, 28), noise, 0)
@example((40000, 2, 28, 28), noise, 0)
@example((9, 40000, 9, 280), noise, 0)
@example((129, 300, 129, 300), noise, 0)
def test_bytes_are_those_of_torch(sizes, content, seed):
    height, width, *size = sizes
    pixels = content(height, width, seed)
    assert np.array_equal(resample.resize_bilinear(pixels, size), by_torch(pixels, size))


@pytest.mark.parametrize(("height", "width", "new_height", "new_width"), CLIPS)
def test_frames_of_clips_are_those_of_torch(height, width, new_height, new_width):
    pixels, size = noise(height, width), (new_height, new_width)
    found, expected = resample.resize_bilinear(pixels, size), by_torch(pixels, size)
    assert np.array_equal(found, expected)
    assert found.flags.c_contiguous
    print(f"parity torch_bilinear_{height}x{width}_to_{new_height}x{new_width} max_diff={np.abs(found.astype(int) - expected).max()}")


def test_torch_gives_the_same_bytes_on_a_cpu_without_avx2():
    """Its other kernel, which differs for pictures one pixel wide alone; frames are 28 pixels wide at least."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_AVX2], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["DEFAULT", "True"]


def test_rows_come_first_in_torch():
    pixels, (height, width) = noise(480, 640), (476, 644)
    by_rows, by_columns = torch_bilinear_weights(640, width), torch_bilinear_weights(480, height)
    columns_first = resize_width(resize_height(pixels, by_columns), by_rows)
    assert np.array_equal(resize_height(resize_width(pixels, by_rows), by_columns), by_torch(pixels, (height, width)))
    assert not np.array_equal(columns_first, by_torch(pixels, (height, width)))


@pytest.mark.parametrize("size", [(28, 28), (476, 644), (1148, 868), (3000, 84), (56, 2016)])
def test_large_pictures(size):
    pixels = noise(1500, 1100)
    assert np.array_equal(resample.resize_bicubic(pixels, size), pillow(pixels, size))


def test_columns_come_first_where_pillow_has_them_first():
    """480 x 640 to 476 x 644: since Pillow 13 by columns and then rows, before the other way round, which gives other bytes."""
    pixels, (height, width) = noise(480, 640), (476, 644)
    by_rows, by_columns = pillow_bicubic_weights(640, width), pillow_bicubic_weights(480, height)
    rows_first = resize_height(resize_width(pixels, by_rows), by_columns)
    columns_first = resize_width(resize_height(pixels, by_columns), by_rows)
    assert not np.array_equal(rows_first, columns_first)
    assert np.array_equal(columns_first if resample._TALL_FIRST else rows_first, pillow(pixels, (height, width)))


def test_small_pictures_and_hosts_without_numba_take_the_libraries(monkeypatch):
    monkeypatch.setattr(resample, "_bicubic", None)
    small, large = noise(90, 120), noise(300, 300)
    assert np.array_equal(resample.resize_bicubic(small, (56, 84)), pillow(small, (56, 84)))
    monkeypatch.setattr(resample, "has_numba", lambda: False)
    monkeypatch.setattr(resample, "_bilinear", None)
    assert np.array_equal(resample.resize_bicubic(large, (56, 84)), pillow(large, (56, 84)))
    assert np.array_equal(resample.resize_bilinear(large, (56, 84)), by_torch(large, (56, 84)))


def test_images_pass_through_every_size():
    pixels = noise(700, 500)
    assert np.array_equal(image.resize_image(pixels, ((560, 392), (280, 196))), pillow(pillow(pixels, (560, 392)), (280, 196)))
