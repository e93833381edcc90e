"""Keye's special tokens added to the tokenizer of a language model."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from megatron_keye.checkpoint.hf_files import TEMPLATE_FILE, HfFiles, json_text
from megatron_keye.config.json_file import read_json_object
from megatron_keye.config.schema import Variant
from megatron_keye.data.chat_template import CHAT_TEMPLATE
from megatron_keye.data.tokenizer import load_tokenizer_file

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CARRIED = ("vocab.json", "merges.txt", "LICENSE")
"""Files of the language model that stay true when tokens are added."""
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>")
GROUNDING = ("object_ref", "box", "quad", "point", "ocr_text", "clip_time")
FRAMES = ("<|frame|>", "<|fast_start|>", "<|fast_end|>")


@dataclass(frozen=True)
class GrownTokenizer:
    """A tokenizer with tokens added, its files, and how many ids it has and had."""

    files: HfFiles
    vocab: dict[str, int]
    num_ids: int
    num_old_ids: int


def keye_tokens(variant: Variant) -> list[AddedToken]:
    """Tokens of the variant in the order in which absent ones are added. Only those that structure a sample are special."""
    is_1_5 = variant == "keye_vl_1_5"
    pairs = [f"<|{name}_{end}|>" for name in (*GROUNDING, *(("polygon",) if is_1_5 else ())) for end in ("start", "end")]
    control = [*CONTROL, "<|video_pad|>"]
    frames = FRAMES if is_1_5 else ()
    return [
        *(AddedToken(name, special=True, normalized=False) for name in control),
        *(AddedToken(name, special=False, normalized=False) for name in pairs),
        *(AddedToken(name, special=True, normalized=False) for name in frames),
    ]


def add_keye_tokens(folder: Path, variant: Variant) -> GrownTokenizer:
    """The tokenizer of `folder` with the tokens of `variant` that it lacks, and the multimodal chat template.

    Raises SettingsError where there is no tokenizer or it is damaged.
    """
    tokenizer = load_tokenizer_file(folder)
    num_old_ids = _num_ids(tokenizer)
    for token in keye_tokens(variant):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
    path = folder / TOKENIZER_CONFIG
    config = read_json_object(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    config["added_tokens_decoder"] = {
        str(number): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip
    written = {
        TOKENIZER_FILE: tokenizer.to_str(pretty=True),
        TOKENIZER_CONFIG: json_text(config),
        TEMPLATE_FILE: json_text({"chat_template": CHAT_TEMPLATE}),
    }
    copied = {name: folder / name for name in CARRIED if (folder / name).is_file()}
    return GrownTokenizer(HfFiles(copied, written), tokenizer.get_vocab(with_added_tokens=True), _num_ids(tokenizer), num_old_ids)


def _num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
