"""What a released Hugging Face folder says about pictures, in its preprocessor_config.json."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_keye.config.json_file import read_json_object
from megatron_keye.config.schema import ImageConfig, Variant, VideoConfig
from megatron_keye.contract.media import MERGE, PATCH_PIXELS
from megatron_keye.data.items import MediaRules, media_rules
from megatron_keye.data.media.resize import TOKEN_AREA, PixelLimits
from megatron_keye.errors import CheckpointError

PREPROCESSOR_FILE = "preprocessor_config.json"
PILLOW_BICUBIC = 3
FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": PILLOW_BICUBIC,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": PATCH_PIXELS,
    "merge_size": MERGE,
    "temporal_patch_size": 1,
}
"""Settings that must be these where a file gives them: the model and its patches are built on them."""
REQUIRED = ("image_mean", "image_std")
"""Those that must be given, since the released processor class takes others where they are not."""


def read_media_rules(folder: Path, variant: Variant) -> MediaRules:
    """Rules under which the folder's own preprocessor, with the variant's keye-vl-utils before it, sizes images and videos.

    Preview resizes twice, and the file's limits are those of the second time. Keye-VL-1.5 resizes an image once, within the
    limits of keye-vl-utils 1.5.2 and of the file, the latter in whole visual tokens.
    Raises CheckpointError for a missing or unreadable file, or one that asks for what the model was not built for.
    """
    limits = read_pixel_limits(folder)
    if variant == "keye_vl_preview":
        return replace(media_rules(ImageConfig(), VideoConfig(), variant), processor=limits)
    released = ImageConfig()
    image = ImageConfig(
        min_tokens=max(released.min_tokens, math.ceil(limits.min_pixels / TOKEN_AREA)),
        max_tokens=min(released.max_tokens, limits.max_pixels // TOKEN_AREA),
    )
    return media_rules(image, VideoConfig(), variant)


def read_pixel_limits(folder: Path) -> PixelLimits:
    """Least and most pixels of an image in the folder's preprocessor. Raises CheckpointError as `read_media_rules` does."""
    path = folder / PREPROCESSOR_FILE
    settings = read_json_object(path)
    problems = _problems(settings)
    size = settings.get("size") or {}
    least = settings.get("min_pixels", size.get("shortest_edge"))
    most = settings.get("max_pixels", size.get("longest_edge"))
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most and most >= TOKEN_AREA):
        problems.append(
            f"min_pixels is {least!r} and max_pixels is {most!r}; expected whole numbers, the second at least {TOKEN_AREA} "
            "and not below the first"
        )
    if problems:
        raise CheckpointError(f"{path} cannot be used:\n" + "\n".join(f"  - {p}" for p in problems))
    return PixelLimits(least, most)


def _problems(settings: dict[str, Any]) -> list[str]:
    problems = [f"{name} is not given; expected {FIXED[name]}" for name in REQUIRED if name not in settings]
    for name, expected in FIXED.items():
        if name in settings and settings[name] != expected:
            problems.append(f"{name} is {settings[name]!r}; this model is built on {expected!r}")
    factor = settings.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        problems.append(f"rescale_factor is {factor!r}; this model is built on 1 / 255")
    return problems
