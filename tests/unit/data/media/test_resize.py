"""Target sizes against keye-vl-utils 1.5.2, and transformers' PaddleOCR-VL, whose image processor descends from Preview's."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import smart_resize as paddle_smart_resize

from megatron_keye.data.media.resize import (
    PREVIEW_PROCESSOR,
    TOKEN_AREA,
    PixelLimits,
    image_size,
    preview_processor_size,
    resize_steps,
    smart_resize,
)
from megatron_keye.errors import DataError

SIDES = st.integers(1, 9000)


@settings(max_examples=500, deadline=None)
@given(height=SIDES, width=SIDES, min_pixels=st.integers(1, 2_000_000), max_pixels=st.integers(784, 16_056_320))
@example(height=42, width=70, min_pixels=3136, max_pixels=16_056_320)  # ties round to even
@example(height=10, width=2000, min_pixels=3136, max_pixels=16_056_320)
def test_smart_resize_equals_the_oracle(oracle, height, width, min_pixels, max_pixels):
    try:
        expected = oracle.smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    except ValueError:
        with pytest.raises(DataError, match="aspect ratio of at most 200"):
            smart_resize(height, width, min_pixels, max_pixels)
    else:
        assert smart_resize(height, width, min_pixels, max_pixels) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1080, 1920), (1092, 1932)), ((4000, 6000), (3248, 4900)), ((300, 17), (308, 28)), ((10, 2000), (28, 1988))],
)
def test_1_5_sizes_of_known_images(shape, expected):
    assert resize_steps(*shape, "keye_vl_1_5", 4, 20480) == (expected,)


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, max_tokens=st.integers(256, 2000))
def test_preview_processor_equals_transformers(height, width, max_tokens):
    limits = PixelLimits(4 * TOKEN_AREA, max_tokens * TOKEN_AREA)
    try:
        expected = paddle_smart_resize(height, width, 28, limits.min_pixels, limits.max_pixels)
    except ValueError:
        with pytest.raises(DataError, match="aspect ratio of at most 200"):
            preview_processor_size(height, width, limits)
        return
    assert preview_processor_size(height, width, limits) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1080, 1920), (728, 1316)),
        ((480, 640), (476, 644)),
        ((20, 20), (56, 56)),
        ((4000, 6000), (812, 1204)),
        ((300, 17), (504, 28)),
        ((10, 1999), (28, 5600)),
    ],
)
def test_preview_processor_sizes_of_known_images(shape, expected):
    assert preview_processor_size(*shape) == expected


def test_a_side_shrunk_to_nothing_is_refused():
    with pytest.raises(DataError, match="no size of at most 3136 pixels"):
        preview_processor_size(60, 9000, PixelLimits(784, 3136))


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ((1080, 1920), ((1092, 1932), (728, 1316))),
        ((4000, 6000), ((2912, 4368), (812, 1204))),
        ((480, 640), ((476, 644),)),
        ((300, 17), ((308, 28),)),
        ((20, 20), ((56, 56),)),
    ],
)
def test_preview_resizes_twice_where_its_processor_differs(shape, steps):
    assert resize_steps(*shape, "keye_vl_preview", 4, 20480) == steps
    assert image_size(*shape, "keye_vl_preview", 4, 20480) == steps[-1]


def test_preview_processor_limits_are_settable():
    wide = PixelLimits(PREVIEW_PROCESSOR.min_pixels, 16384 * TOKEN_AREA)
    assert resize_steps(1080, 1920, "keye_vl_preview", 4, 20480, processor=wide) == ((1092, 1932),)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({}, (1092, 1932)),
        ({"max_pixels": 256 * TOKEN_AREA}, (336, 588)),
        ({"max_pixels": 30000 * TOKEN_AREA}, (1092, 1932)),
        ({"min_pixels": 4000 * TOKEN_AREA}, (1344, 2380)),
        ({"min_pixels": 512 * TOKEN_AREA, "max_pixels": 256 * TOKEN_AREA}, (336, 588)),
        ({"resized_height": 100, "resized_width": 300, "max_pixels": 784}, (112, 308)),
    ],
)
def test_a_message_part_narrows_the_limits(item, expected):
    assert image_size(1080, 1920, "keye_vl_1_5", 4, 20480, **item) == expected


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
@pytest.mark.parametrize("item", [{}, {"min_pixels": 512 * TOKEN_AREA}, {"resized_height": 2000, "resized_width": 3000}])
@pytest.mark.parametrize("shape", [(60, 60), (300, 200), (1080, 1920)])
def test_the_maximum_of_the_run_wins(variant, item, shape):
    height, width = image_size(*shape, variant, 4, 64, **item)
    assert height * width <= 64 * TOKEN_AREA


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(20, 700),
    width=st.integers(20, 700),
    item=st.fixed_dictionaries(
        {}, optional={"min_pixels": st.integers(4 * TOKEN_AREA, 200_000), "max_pixels": st.integers(200_000, 900_000)}
    )
    | st.fixed_dictionaries({"resized_height": st.integers(20, 700), "resized_width": st.integers(20, 700)}),
)
def test_1_5_image_size_equals_the_oracle(oracle, height, width, item):
    picture = oracle.fetch_image({"image": Image.new("RGB", (width, height)), **item})
    assert image_size(height, width, "keye_vl_1_5", 4, 20480, **item) == (picture.height, picture.width)


@pytest.mark.parametrize("item", [{"resized_height": 28}, {"resized_width": 28}])
def test_half_a_requested_size_is_refused(item):
    with pytest.raises(DataError, match="expected both or neither"):
        image_size(100, 100, "keye_vl_1_5", 4, 20480, **item)


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
@pytest.mark.parametrize(("shape", "message"), [((0, 10), "expected both sides >= 1"), ((10, 2001), "aspect ratio of at most 200")])
def test_impossible_shapes_are_refused(variant, shape, message):
    with pytest.raises(DataError, match=message):
        image_size(*shape, variant, 4, 20480)
