"""Chats rendered by a folder's own template: against transformers, against our own template, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_keye.config.schema import Variant
from megatron_keye.data.chat_template import ChatTemplate, find_chat_template
from megatron_keye.data.record import parse_record
from megatron_keye.data.rendered import TemplateTokenizer
from megatron_keye.data.tokenize import tokenize
from megatron_keye.errors import CheckpointError, DataError
from tests.unit.data.test_tokenize import chats, draw_layout

SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
PART = (
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
)  # fmt: skip
CONTENT = (
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}" + PART + "{% endfor %}{% endif %}"
)  # fmt: skip
KEYE = SYSTEM + "{% for message in messages %}<|im_start|>{{ message.role }}\n" + CONTENT + "<|im_end|>{{ '\\n' }}{% endfor %}"
"""The template of the training data, as Jinja."""
OTHER = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content.split('=')[-1] | trim }}{% endif %}<|im_end|>{{ eos_token }}{% endfor %}"
)
"""One that changes texts and uses special tokens by name."""


def chat(*turns):
    return parse_record({"id": "c", "messages": [{"role": role, "content": content} for role, content in turns]}, "x")


@pytest.fixture
def by_template(tokenizer, tmp_path):
    def make(text, variant: Variant = "keye_vl_1_5", **special_tokens):
        return TemplateTokenizer(ChatTemplate(tmp_path / "chat_template.jinja", text, special_tokens), tokenizer, variant)

    return make


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_our_template_in_jinja_gives_our_tokens(data, variant, tokenizer, tmp_path_factory):
    record = parse_record(data.draw(chats()), "x")
    layouts = [draw_layout(data.draw, media.kind, variant) for media in record.media]
    template = ChatTemplate(tmp_path_factory.getbasetemp() / "t.jinja", KEYE)
    found = TemplateTokenizer(template, tokenizer, variant).tokenize(record, layouts)
    expected = tokenize(record, layouts, tokenizer, variant)
    assert np.array_equal(found.token_ids, expected.token_ids)
    assert np.array_equal(found.supervised, expected.supervised)
    assert found.shape == expected.shape


def test_another_template_gives_the_tokens_of_transformers(by_template, tokenizer, tokenizer_folder):
    specials = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, local_files_only=True, chat_template=OTHER, **specials)
    turns = (("user", "How many = red squares"), ("assistant", "maybe=Three  "), ("user", "and 7.5?"), ("assistant", "Done"))
    sample = by_template(OTHER, **specials).tokenize(chat(*turns), [])
    messages = [{"role": role, "content": content} for role, content in turns]
    assert sample.token_ids.tolist() == reference.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(sample.token_ids[sample.supervised].tolist()) == "Three<|im_end|>Done<|im_end|>"


def test_documents_need_no_template(by_template, tokenizer):
    record = parse_record({"id": "d", "document": "red blue"}, "x")
    sample = by_template("{{ nonsense }}").tokenize(record, [])
    assert np.array_equal(sample.token_ids, tokenize(record, [], tokenizer, "keye_vl_1_5").token_ids)


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", DataError, "refuses the conversation: roles must alternate"),
        ("{% for %}", CheckpointError, "cannot be rendered"),
        ("{{ messages.__class__.__mro__ }}", CheckpointError, r"cannot be rendered \(SecurityError"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", DataError, "writes 0 assistant turns for a conversation with 1"),
    ],
)
def test_templates_that_cannot_be_used(by_template, template, error, message):
    with pytest.raises(error, match=message):
        by_template(template).tokenize(chat(("user", "hi"), ("assistant", "ho")), [])


def test_templates_without_media_are_refused(by_template, tmp_path):
    (tmp_path / "x.png").touch()
    record = chat(("user", [{"type": "image", "image": "x.png"}]), ("assistant", "ho"))
    layout = draw_layout(lambda strategy: strategy.example(), "image", "keye_vl_1_5")
    without = KEYE.replace("<|vision_start|><|{{ part.type }}_pad|><|vision_end|>", "")
    with pytest.raises(DataError, match="writes 0 media placeholders for a conversation with 1"):
        by_template(without).tokenize(record, [layout])
    for broken in (KEYE.replace("<|vision_end|>", ""), KEYE.replace("{{ part.type }}_pad", "video_pad")):
        with pytest.raises(DataError, match="does not write the images"):
            by_template(broken).tokenize(record, [layout])


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"])
def test_texts_cannot_play_the_template(by_template, token):
    with pytest.raises(DataError, match="only the chat template may write"):
        by_template(KEYE).tokenize(chat(("user", f"hi {token}assistant\n"), ("assistant", "ho")), [])


def test_the_processors_template_comes_first(tmp_path):
    assert find_chat_template(tmp_path) is None
    config = {"eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_chat_template(tmp_path) is None
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "of the tokenizer"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    found = find_chat_template(tmp_path)
    assert (found.text, found.special_tokens) == ("of the tokenizer", {"eos_token": "<|im_end|>"})
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert find_chat_template(tmp_path).text == "of the processor"
    (tmp_path / "chat_template.jinja").write_text("of the newer processor")
    assert find_chat_template(tmp_path).text == "of the newer processor"


def test_damaged_template_files(tmp_path):
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"chat_template.json has no chat template"):
        find_chat_template(tmp_path)
