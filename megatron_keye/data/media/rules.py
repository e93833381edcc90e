"""The numbers of video sampling and sizing: which preset, which variant, which overrides; and the clips that they can be applied to."""

import math
from dataclasses import dataclass, replace

from megatron_keye.config.schema import Variant, VideoConfig
from megatron_keye.errors import DataError, SettingsError


@dataclass(frozen=True, slots=True)
class VideoRules:
    """How a video is sampled and sized. One token is 28x28 pixels.

    A frame less similar than `min_frame_similarity` to the latest slow frame is slow, else fast; similarity is the
    share of its blocks whose cosine exceeds `block_similarity`. A fast frame gets `fast_token_ratio` of a slow
    frame's tokens. Preview knows no fast frames and uses none of these three.
    """

    fps: float
    min_frame_tokens: int
    max_frame_tokens: int
    total_tokens: int
    min_frame_similarity: float
    block_similarity: float = 0.7
    fast_token_ratio: float = 0.3
    max_frames: int | None = None


_RELEASED = VideoRules(fps=2.0, min_frame_tokens=48, max_frame_tokens=768, total_tokens=65_536, min_frame_similarity=0.9)
_PRESETS = {
    "released": _RELEASED,  # keye-vl-utils 1.5.2
    "report": replace(_RELEASED, total_tokens=75_000, min_frame_similarity=0.95),  # arXiv 2509.01563, section 2
}
# keye-vl-utils 1.0.0: 90 % of 128,000 tokens for the whole clip.
_PREVIEW = VideoRules(fps=2.0, min_frame_tokens=128, max_frame_tokens=768, total_tokens=115_200, min_frame_similarity=0.0, max_frames=768)


def video_rules(config: VideoConfig, variant: Variant) -> VideoRules:
    """The preset's numbers with the fields set in `config` in their place.

    Raises SettingsError for numbers that contradict each other, and for settings that Preview cannot honour.
    """
    base = _PREVIEW if variant == "keye_vl_preview" else _PRESETS[config.preset]
    overrides = {
        "min_frame_tokens": config.min_frame_tokens,
        "max_frame_tokens": config.max_frame_tokens,
        "total_tokens": config.total_tokens,
        "min_frame_similarity": config.min_frame_similarity,
        "max_frames": config.max_frames,
    }
    rules = replace(base, fps=config.fps, **{name: value for name, value in overrides.items() if value is not None})
    problems = _contradictions(rules)
    if variant == "keye_vl_preview":
        problems += _meaningless_for_preview(config)
    if problems:
        raise SettingsError(problems)
    return rules


def check_clip(total_frames: int, video_fps: float) -> None:
    """Raises DataError for a clip without frames or without a usable frame rate."""
    if total_frames < 1 or not (math.isfinite(video_fps) and video_fps > 0):
        raise DataError(f"found a clip of {total_frames} frames at {video_fps} frames per second; expected one or more, at a rate above 0")


def _contradictions(rules: VideoRules) -> list[str]:
    problems = []
    if rules.fps <= 0:
        problems.append(f"video.fps is {rules.fps}; expected a positive number of frames per second")
    if not rules.min_frame_tokens <= rules.max_frame_tokens <= rules.total_tokens:
        problems.append(
            f"video.min_frame_tokens {rules.min_frame_tokens}, max_frame_tokens {rules.max_frame_tokens} and total_tokens "
            f"{rules.total_tokens} must not decrease in this order; raise the later or lower the earlier"
        )
    return problems


def _meaningless_for_preview(config: VideoConfig) -> list[str]:
    problems = []
    if config.preset != "released":
        problems.append(f"video.preset is {config.preset!r}, which describes Keye-VL-1.5; keye_vl_preview has only 'released'")
    if config.min_frame_similarity is not None:
        problems.append("video.min_frame_similarity is set, but keye_vl_preview has no fast frames; remove it")
    return problems
