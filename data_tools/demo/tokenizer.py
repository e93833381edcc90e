"""A small byte-level tokenizer with Keye's special tokens, trained on the demo set's own words.

It does not depend on the set's size or seed.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_keye.data.chat_template import CHAT_TEMPLATE

from .tasks import examples

VOCAB_SIZE = 1024
CORPUS_EXAMPLES = 3000

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|frame|>",
    "<|fast_start|>",
    "<|fast_end|>",
)
"""Tokens that structure a sample; decoders leave them out of an answer."""
GROUNDING = ("object_ref", "box", "quad", "point", "polygon", "ocr_text", "clip_time")
TEXT_TOKENS = (
    *(f"<|{name}_{end}|>" for name in GROUNDING for end in ("start", "end")),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
"""Tokens that are part of an answer."""

PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
"""Digits one by one, as in Qwen's tokenizers, then words, punctuation, line ends and other space."""

COMMON_WORDS = """
about above after again against all along also always and another answer any around ask away back because become before begin behind being
below between both bring build call can carry case change city clear close come could country course cut day did different does done down
draw each early earth eat end enough even ever every example eye face fact family far feel few find follow food form found from full gave
general get give good great group grow had half hand hard has have head hear help her here high him his home house how however idea into
just keep kind know land large later learn leave less let letter life light like line list little live long look made make man many may
mean might more morning most mother mountain move much must name near need never new next night north not nothing now number off often old
once only open order other our out over own page paper part people picture place plan plant play point possible problem question quick
rather read real right river room round run said same saw say school sea second see seem sentence set several shall should show side
simple since small some something soon sound south stand start state still stop story street study such sure take talk tell than that
their them then there these they thing think this those though thought three through time together told too took toward tree true try
turn under until upon use very voice walk want was watch water way week well went were what when where which while white whole why will
wind with without woman wood word work world would write year yet young
"""
"""Frequent English words, so that texts of other origin do not fall apart into bytes."""


def write_tokenizer(folder: Path) -> None:
    """Write `folder` as a Hugging Face tokenizer: tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train()
    tokenizer.save(str(folder / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(added.items())
        },
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(TEXT_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=True) for name in CONTROL_TOKENS]
        + [AddedToken(name, normalized=False, special=False) for name in TEXT_TOKENS]
    )
    return tokenizer


def _corpus() -> list[str]:
    """The words of the demo set. Lettering is left out, so that letters stay tokens of their own."""
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", COMMON_WORDS]
    for task, _, example in examples("train", CORPUS_EXAMPLES, seed=0):
        texts += [part for part in example.parts if isinstance(part, str)]
        if task != "read" and example.answer:
            texts.append(example.answer)
    return texts
