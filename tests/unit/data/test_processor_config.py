"""preprocessor_config.json: limits that are taken, and settings that are refused."""

import json

import pytest

from megatron_keye.data.media.resize import PREVIEW_PROCESSOR, PixelLimits
from megatron_keye.data.processor_config import read_media_rules
from megatron_keye.errors import CheckpointError

RELEASED = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "max_pixels": 1003520, "merge_size": 2, "min_pixels": 3136, "patch_size": 14, "resample": 3,
    "rescale_factor": 0.00392156862745098, "temporal_patch_size": 1, "image_processor_type": "SiglipImageProcessor",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def write(**changes):
        settings = {name: value for name, value in (RELEASED | changes).items() if value is not None}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


def test_limits_of_preview_are_those_of_its_second_resize(folder):
    assert read_media_rules(folder(), "keye_vl_preview").processor == PREVIEW_PROCESSOR
    rules = read_media_rules(folder(min_pixels=5000, max_pixels=90000), "keye_vl_preview")
    assert rules.processor == PixelLimits(5000, 90000)
    assert (rules.image_min_tokens, rules.image_max_tokens) == (4, 20480)


@pytest.mark.parametrize(("pixels", "tokens"), [((3136, 1003520), (4, 1280)), ((784, 784 * 30000), (4, 20480)), ((5000, 90000), (7, 114))])
def test_limits_of_1_5_are_whole_tokens_within_the_released(folder, pixels, tokens):
    rules = read_media_rules(folder(min_pixels=pixels[0], max_pixels=pixels[1]), "keye_vl_1_5")
    assert (rules.image_min_tokens, rules.image_max_tokens) == tokens


def test_newer_files_name_edges(folder):
    size = {"shortest_edge": 3136, "longest_edge": 78400}
    assert read_media_rules(folder(min_pixels=None, max_pixels=None, size=size), "keye_vl_1_5").image_max_tokens == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.48, 0.46, 0.41]}, "image_mean is"),
        ({"image_std": None}, "image_std is not given"),
        ({"patch_size": 16, "merge_size": 1}, "(?s)patch_size is 16.*merge_size is 1"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"max_pixels": None}, "max_pixels is None"),
        ({"max_pixels": 100, "min_pixels": 10}, "expected whole numbers"),
    ],
)
def test_other_pictures_are_refused(folder, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_media_rules(folder(**changes), "keye_vl_1_5")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*preprocessor_config.json"):
        read_media_rules(tmp_path, "keye_vl_1_5")
