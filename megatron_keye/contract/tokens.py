"""Special tokens, found by name: the ids of released Keye-VL-1.5 tokenizers are not published, so no id is written down."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_keye.config.schema import Variant
from megatron_keye.errors import SettingsError

COMMON_NAMES = {
    "endoftext": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
}
"""Field of `SpecialTokens` -> its name in the vocabulary, for tokens that both variants use."""
FRAME_NAMES = {"frame": "<|frame|>", "fast_start": "<|fast_start|>", "fast_end": "<|fast_end|>"}
"""The same for tokens that mark the frames of a Keye-VL-1.5 video."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that structure a sample. The last three are None in Keye-VL-8B-Preview, which has no frame marks."""

    endoftext: int
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int
    frame: int | None = None
    fast_start: int | None = None
    fast_end: int | None = None

    @classmethod
    def from_vocab(cls, vocab: Mapping[str, int], variant: Variant) -> "SpecialTokens":
        """Look every name up in `vocab` (token -> id). Raises SettingsError listing all names that are missing."""
        names = COMMON_NAMES | (FRAME_NAMES if variant == "keye_vl_1_5" else {})
        missing = [name for name in names.values() if name not in vocab]
        if missing:
            raise SettingsError(
                f"the tokenizer has {len(vocab)} tokens but not {', '.join(missing)}, which {variant} needs; "
                f"use the tokenizer of a {variant} model, or add these as special tokens"
            )
        return cls(**{field: vocab[name] for field, name in names.items()})

    @property
    def placeholders(self) -> tuple[int, int]:
        """The ids whose decoder positions are filled with visual rows."""
        return self.image_pad, self.video_pad
