"""The demo tokenizer: any text comes back, every special token is one id, words of the demo are one token."""

import json

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_tools.demo.pictures import COLOURS, SHAPES
from data_tools.demo.tokenizer import CONTROL_TOKENS, TEXT_TOKENS, VOCAB_SIZE, write_tokenizer

KEYE_TOKENS = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>
<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call>
<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>
<|point_start|> <|point_end|> <|ocr_text_start|> <|ocr_text_end|> <|clip_time_start|> <|clip_time_end|>
<|frame|> <|fast_start|> <|fast_end|> <|polygon_start|> <|polygon_end|>
""".split()
"""Written out on purpose: the names of the released tokenizer and those that Keye-VL-1.5 adds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(text=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_has_exactly_the_vocabulary_of_the_recipe(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))


@pytest.mark.parametrize("name", KEYE_TOKENS)
def test_special_token_is_one_id_anywhere(tokenizer, name):
    assert name in CONTROL_TOKENS + TEXT_TOKENS
    assert tokenizer.encode(f"red{name} 12").tokens.count(name) == 1


def test_answers_keep_grounding_tokens(tokenizer):
    text = "<|box_start|>[[100, 200, 300, 400]]<|box_end|>"
    assert tokenizer.decode(tokenizer.encode(text + "<|im_end|>").ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("word", [*COLOURS, *SHAPES, "left", "right", "up", "down", "1", "5"])
def test_short_answers_are_one_token(tokenizer, word):
    assert len(tokenizer.encode(word).ids) == 1


def test_training_again_gives_the_same_files(folder, tmp_path):
    write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_loads_as_a_hugging_face_folder_with_its_template(folder):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    content = [{"type": "video", "video": "a.mp4"}, {"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Which?"}]
    messages = [{"role": "user", "content": content}]
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<|endoftext|>" and len(loaded) == VOCAB_SIZE


def test_template_keeps_a_given_system_message(folder):
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "red"}]
    assert jinja2.Template(template).render(messages=messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
