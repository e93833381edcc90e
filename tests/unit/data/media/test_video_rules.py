import pytest

from megatron_keye.config.schema import VideoConfig
from megatron_keye.data.media.rules import VideoRules, video_rules
from megatron_keye.errors import SettingsError


def test_presets_equal_the_oracle_and_the_report(oracle):
    released = video_rules(VideoConfig(), "keye_vl_1_5")
    assert released == VideoRules(
        fps=oracle.FPS,
        min_frame_tokens=oracle.VIDEO_MIN_TOKENS,
        max_frame_tokens=oracle.VIDEO_MAX_TOKENS,
        total_tokens=oracle.VIDEO_TOTAL_PIXELS // 28**2,
        min_frame_similarity=oracle.MIN_FRAME_SIMILARITY,
        fast_token_ratio=oracle.FAST_TOKEN_RATIO,
    )
    report = video_rules(VideoConfig(preset="report"), "keye_vl_1_5")
    assert (report.total_tokens, report.min_frame_similarity) == (75_000, 0.95)


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
@pytest.mark.parametrize(
    ("name", "value"), [("fps", 1.0), ("min_frame_tokens", 16), ("max_frame_tokens", 300), ("total_tokens", 9000), ("max_frames", 7)]
)
def test_a_field_that_is_set_wins(variant, name, value):
    default, rules = video_rules(VideoConfig(), variant), video_rules(VideoConfig(**{name: value}), variant)
    changed = {field for field in VideoRules.__slots__ if getattr(default, field) != getattr(rules, field)}
    assert changed == {name}
    assert getattr(rules, name) == value


def test_similarity_can_be_set_for_1_5_only():
    config = VideoConfig(min_frame_similarity=0.8)
    assert video_rules(config, "keye_vl_1_5").min_frame_similarity == 0.8
    with pytest.raises(SettingsError, match="no fast frames"):
        video_rules(config, "keye_vl_preview")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VideoConfig(fps=0), "video.fps is 0.0; expected a positive number"),
        (VideoConfig(min_frame_tokens=800), "min_frame_tokens 800, max_frame_tokens 768 and total_tokens 65536"),
        (VideoConfig(total_tokens=500), "max_frame_tokens 768 and total_tokens 500"),
    ],
)
def test_contradictions_are_named(config, message):
    with pytest.raises(SettingsError, match=message):
        video_rules(config, "keye_vl_1_5")


def test_every_problem_is_reported_at_once():
    with pytest.raises(SettingsError) as caught:
        video_rules(VideoConfig(preset="report", fps=-1, min_frame_tokens=800), "keye_vl_preview")
    assert len(caught.value.problems) == 3
