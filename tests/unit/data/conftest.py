"""A small byte-level tokenizer with the special tokens of both variants, as a Hugging Face folder, and a data set made with it."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_keye.config.schema import VideoConfig
from megatron_keye.contract.tokens import COMMON_NAMES, FRAME_NAMES
from megatron_keye.data.indexing import index_folder, save_index
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.data.writing import plan_shards, write_shards
from tests.unit.data.corpus import write_corpus

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = ["system\nYou are a helpful assistant.\n\n", "user\nHow many red squares?", "assistant\nThree: 1, 2, 3.\n\n\nDone  \n"]


def write_tokenizer(folder) -> None:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    names = [*COMMON_NAMES.values(), *FRAME_NAMES.values()]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder, "keye_vl_1_5")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The JSONL file of a set of 60 records."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 60)


@pytest.fixture(scope="session")
def indexed(corpus, tokenizer_folder, tmp_path_factory):
    """A folder of shards with an index, per variant."""
    folders = {}
    for variant in ("keye_vl_1_5", "keye_vl_preview"):
        folder = tmp_path_factory.mktemp("shards") / variant
        write_shards(corpus, folder, plan_shards(corpus, shard_bytes=40_000))
        save_index(folder, tokenizer_folder, variant, VideoConfig(), index_folder(folder, tokenizer_folder, variant, VideoConfig()))
        folders[variant] = folder
    return folders
