import pytest

from megatron_keye.contract.tokens import COMMON_NAMES, FRAME_NAMES, SpecialTokens
from megatron_keye.errors import SettingsError

PREVIEW_IDS = {  # the released Keye-VL-8B-Preview vocabulary
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


def test_preview_needs_no_frame_tokens():
    tokens = SpecialTokens.from_vocab(PREVIEW_IDS, "keye_vl_preview")
    assert (tokens.im_start, tokens.im_end, tokens.placeholders) == (151644, 151645, (151655, 151656))
    assert tokens.frame is None
    assert tokens.fast_start is None
    assert tokens.fast_end is None


def test_1_5_finds_frame_tokens_by_name_wherever_they_are():
    vocab = PREVIEW_IDS | {"<|fast_end|>": 7, "<|frame|>": 9, "<|fast_start|>": 8}
    tokens = SpecialTokens.from_vocab(vocab, "keye_vl_1_5")
    assert (tokens.frame, tokens.fast_start, tokens.fast_end) == (9, 8, 7)


def test_every_missing_name_is_listed():
    with pytest.raises(SettingsError) as error:
        SpecialTokens.from_vocab(PREVIEW_IDS, "keye_vl_1_5")
    assert all(name in str(error.value) for name in FRAME_NAMES.values())
    with pytest.raises(SettingsError) as error:
        SpecialTokens.from_vocab({"a": 0}, "keye_vl_preview")
    assert all(name in str(error.value) for name in COMMON_NAMES.values())
