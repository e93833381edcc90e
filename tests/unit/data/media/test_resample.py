"""Our bicubic kernel gives the bytes of the installed Pillow, whatever the sizes."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_keye.data.media import image, resample

pytest.importorskip("numba")
SIDES = st.integers(1, 300)


def pillow(pixels, size):
    return np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def noise(height, width, seed=0):
    """Extremes of black and white, where rounding and overshoot have most to do, beside values in between."""
    pixels = np.random.default_rng(seed).integers(-200, 456, (height, width, 3)).clip(0, 255)
    return pixels.astype(np.uint8)


@settings(deadline=None, max_examples=150)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 9))
@example(1, 1, 300, 300, 0)
@example(300, 1, 1, 300, 0)
@example(129, 300, 129, 28, 0)
@example(300, 200, 28, 200, 0)
@example(240, 160, 100, 160, 0)
def test_bytes_are_those_of_pillow(height, width, new_height, new_width, seed):
    pixels = noise(height, width, seed)
    assert np.array_equal(resample._resize(pixels, (new_height, new_width)), pillow(pixels, (new_height, new_width)))


@pytest.mark.parametrize("size", [(28, 28), (476, 644), (1148, 868), (3000, 84), (56, 2016)])
def test_large_pictures(size):
    pixels = noise(1500, 1100)
    assert np.array_equal(resample.resize_bicubic(pixels, size), pillow(pixels, size))


def test_columns_come_first_where_pillow_has_them_first():
    """480 x 640 to 476 x 644: since Pillow 13 by columns and then rows, before the other way round, which gives other bytes."""
    pixels, (height, width) = noise(480, 640), (476, 644)
    rows_first = resample._resize_columns(resample._resize_rows(pixels, width), height)
    columns_first = resample._resize_rows(resample._resize_columns(pixels, height), width)
    assert not np.array_equal(rows_first, columns_first)
    assert np.array_equal(columns_first if resample._TALL_FIRST else rows_first, pillow(pixels, (height, width)))


def test_small_pictures_and_hosts_without_numba_take_pillow(monkeypatch):
    monkeypatch.setattr(resample, "_resize", None)
    small, large = noise(90, 120), noise(300, 300)
    assert np.array_equal(resample.resize_bicubic(small, (56, 84)), pillow(small, (56, 84)))
    monkeypatch.setattr(resample, "has_numba", lambda: False)
    assert np.array_equal(resample.resize_bicubic(large, (56, 84)), pillow(large, (56, 84)))


def test_images_pass_through_every_size():
    pixels = noise(700, 500)
    assert np.array_equal(image.resize_image(pixels, ((560, 392), (280, 196))), pillow(pillow(pixels, (560, 392)), (280, 196)))
