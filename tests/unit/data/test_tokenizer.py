import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import SettingsError

TEXTS = ["plain  text\n\n", "<|im_start|>user\nhi<|im_end|>\n", "naïve 東京 🙂 12.5", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers_and_decodes_back(tokenizer, tokenizer_folder, text):
    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, local_files_only=True)
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_with_starts(text)[0] == ids


def test_starts_are_in_characters(tokenizer):
    text = "é<|im_end|>x"
    ids, starts = tokenizer.encode_with_starts(text)
    assert starts[ids.index(tokenizer.specials.im_end)] == 1
    assert starts[-1] == len(text) - 1


def test_vocab_size_covers_every_id(tokenizer):
    assert tokenizer.vocab_size == max(tokenizer.encode(t)[0] for t in ("<|fast_end|>", "<|endoftext|>")) + 1


def test_fingerprint_follows_the_files(tokenizer, tokenizer_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer_folder, copy)
    assert load_tokenizer(copy, "keye_vl_1_5").fingerprint == tokenizer.fingerprint
    (copy / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(copy, "keye_vl_1_5").fingerprint != tokenizer.fingerprint


def with_listed_token(source, folder, token_id: int):
    shutil.copytree(source, folder)
    entry = {str(token_id): {"content": "<|polygon_start|>", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entry}))
    return folder


def test_tokens_that_only_the_configuration_lists_are_added(tokenizer, tokenizer_folder, tmp_path):
    folder = with_listed_token(tokenizer_folder, tmp_path / "listed", tokenizer.vocab_size)
    extended = load_tokenizer(folder, "keye_vl_1_5")
    assert extended.encode("<|polygon_start|>") == [tokenizer.vocab_size]
    assert extended.vocab_size == tokenizer.vocab_size + 1


def test_truncation_and_padding_of_the_file_are_off(tokenizer, tokenizer_folder, tmp_path):
    library = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=200)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "a text of more than four tokens"
    assert load_tokenizer(tmp_path, "keye_vl_1_5").encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer in"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "not a readable tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("["), "not a JSON object"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "not a JSON object"),
    ],
)
def test_a_damaged_folder_is_named(tokenizer_folder, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(tokenizer_folder, folder)
    damage(folder)
    with pytest.raises(SettingsError, match=message) as error:
        load_tokenizer(folder, "keye_vl_1_5")
    assert str(folder) in str(error.value)


def test_contradicting_files_are_refused(tokenizer, tokenizer_folder, tmp_path):
    folder = with_listed_token(tokenizer_folder, tmp_path / "wrong", tokenizer.vocab_size + 5)
    with pytest.raises(SettingsError, match="of different tokenizers"):
        load_tokenizer(folder, "keye_vl_1_5")
