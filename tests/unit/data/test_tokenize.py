"""Rendering and tokenizing against transformers: an equivalent chat template, tokenized as one string."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_keye.contract.media import PatchGrid
from megatron_keye.data.record import parse_record
from megatron_keye.data.tokenize import ItemLayout, tokenize
from megatron_keye.errors import DataError

SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
PART = (
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
)
TEMPLATE = (
    SYSTEM + "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% set content %}{% if message.content is string %}{{ message.content }}"
    f"{{% else %}}{{% for part in message.content %}}{PART}{{% endfor %}}{{% endif %}}{{% endset %}}"
    "{% if message.role == 'assistant' %}{% generation %}{{ content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)

texts = st.text("ab é\n\t0.7 東🙂", max_size=12)
images = st.just({"type": "image", "image": "x.png"})
videos = st.just({"type": "video", "video": "x.mp4"})
contents = st.one_of(texts, st.lists(st.one_of(st.builds(lambda t: {"type": "text", "text": t}, texts), images, videos), max_size=4))
grids = st.builds(lambda h, w: PatchGrid(1, 2 * h, 2 * w), st.integers(1, 3), st.integers(1, 3))


@st.composite
def chats(draw) -> dict:
    roles = draw(st.sampled_from([[], ["system"]])) + draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5))
    return {"id": "c", "messages": [{"role": role, "content": draw(contents)} for role in roles]}


def draw_layout(draw, kind: str, variant: str) -> ItemLayout:
    if kind == "image":
        return ItemLayout("image", (draw(grids),))
    if variant == "keye_vl_preview":
        return ItemLayout("video", (PatchGrid(draw(st.integers(1, 4)), 2, 4),), ticks_per_frame=1.0)
    frames = draw(st.lists(grids, min_size=1, max_size=4))
    fast = tuple(draw(st.booleans()) for _ in frames)
    return ItemLayout("video", tuple(frames), fast, tuple(np.float32(0.35 * i).item() for i in range(len(frames))))


def expanded(layout: ItemLayout, variant: str) -> str:
    """What the released processors put between vision start and end, written out."""
    if layout.kind == "image":
        return "<|image_pad|>" * layout.grids[0].num_tokens
    if variant == "keye_vl_preview":
        return "<|video_pad|>" * layout.grids[0].num_tokens
    frames = []
    for grid, fast, seconds in zip(layout.grids, layout.fast, layout.timestamps_s, strict=True):
        pads = "<|video_pad|>" * grid.num_tokens
        frames.append(f"<|frame|>{seconds:.1f}" + (f"<|fast_start|>{pads}<|fast_end|>" if fast else pads))
    return "".join(frames)


@pytest.fixture(scope="session")
def reference(tokenizer_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, local_files_only=True, chat_template=TEMPLATE)


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_chats_equal_the_rendered_template_tokenized_as_a_whole(data, variant, tokenizer, reference):
    raw = data.draw(chats())
    record = parse_record(raw, "x")
    layouts = [draw_layout(data.draw, media.kind, variant) for media in record.media]
    sample = tokenize(record, layouts, tokenizer, variant)

    following = iter(layouts)
    rendered = reference.apply_chat_template(raw["messages"], tokenize=False)
    rendered = re.sub(r"<\|(?:image|video)_pad\|>", lambda _: expanded(next(following), variant), rendered)
    assert sample.token_ids.dtype == np.int32
    assert sample.token_ids.tolist() == reference.encode(rendered, add_special_tokens=False)

    is_visual = np.isin(sample.token_ids, tokenizer.specials.placeholders)
    expected = np.zeros(len(is_visual), dtype=bool)
    for start, segment in zip(sample.shape.visual_starts(), sample.shape.segments, strict=True):
        expected[start : start + segment.grid.num_tokens] = True
    np.testing.assert_array_equal(is_visual, expected)
    assert [s.grid for s in sample.shape.segments] == [grid for layout in layouts for grid in layout.grids]
    assert sample.shape.num_tokens == len(sample.token_ids)
    assert not sample.supervised[is_visual].any()


@settings(max_examples=80, deadline=None)
@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab é0.7 東🙂\n").map(lambda t: "x" + t)), min_size=1))
def test_supervision_equals_the_generation_mask_of_transformers(turns, tokenizer, reference):
    # An answer that starts with space could share a token with the turn's header, which the mask then counts as an answer.
    messages = [{"role": role, "content": text} for role, text in turns]
    masked = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    sample = tokenize(parse_record({"id": "c", "messages": messages}, "x"), [], tokenizer, "keye_vl_1_5")
    assert sample.token_ids.tolist() == masked["input_ids"]
    assert sample.supervised.astype(int).tolist() == masked["assistant_masks"]


def test_an_answer_with_media_is_supervised_around_them(tokenizer):
    picture = {"type": "image", "image": "x.png"}
    answer = [{"type": "text", "text": "a"}, picture, {"type": "text", "text": "b"}]
    record = parse_record({"id": "c", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}, "x")
    sample = tokenize(record, [ItemLayout("image", (PatchGrid(1, 2, 2),))], tokenizer, "keye_vl_1_5")
    assert tokenizer.decode(sample.token_ids[sample.supervised].tolist()) == "ab<|im_end|>"


def test_a_document_learns_its_text_and_its_end_but_no_media(tokenizer):
    parts = [{"type": "text", "text": "ab"}, {"type": "video", "video": "v"}, {"type": "text", "text": " 7"}]
    video = ItemLayout("video", (PatchGrid(1, 2, 2), PatchGrid(1, 2, 2)), (False, True), (0.0, 12.5))
    sample = tokenize(parse_record({"id": 1, "document": parts}, "x"), [video], tokenizer, "keye_vl_1_5")
    first = tokenizer.encode("ab")[:1]
    assert tokenizer.decode(first + sample.token_ids[sample.supervised].tolist()) == "ab 7<|endoftext|>"
    whole = "ab<|vision_start|><|frame|>0.0<|video_pad|><|frame|>12.5<|fast_start|><|video_pad|><|fast_end|><|vision_end|> 7<|endoftext|>"
    assert tokenizer.decode(sample.token_ids.tolist()) == whole


def test_the_first_token_is_never_a_target(tokenizer):
    sample = tokenize(parse_record({"id": 1, "document": "ab"}, "x"), [], tokenizer, "keye_vl_1_5")
    assert sample.supervised.tolist() == [False] + [True] * (len(sample.token_ids) - 1)


def test_times_are_rounded_from_float32():
    # 0.15 is above the middle in float32 and below it in float64.
    assert f"{np.float32(0.15).item():.1f}" == "0.2"
    assert f"{0.15:.1f}" == "0.1"


def test_truncation_keeps_ids_flags_and_segments_together(tokenizer):
    parts = [{"type": "image", "image": "x"}, {"type": "text", "text": "a long enough text"}]
    record = parse_record({"id": 1, "document": parts}, "x")
    sample = tokenize(record, [ItemLayout("image", (PatchGrid(1, 2, 2),))], tokenizer, "keye_vl_1_5")
    cut = sample.truncated(6)
    assert cut.token_ids.tolist() == sample.token_ids[:6].tolist()
    assert cut.supervised.tolist() == sample.supervised[:6].tolist()
    assert (cut.shape.num_tokens, cut.shape.segments) == (6, sample.shape.segments)


@pytest.mark.parametrize("text", ["<|image_pad|>", "see <|vision_start|><|video_pad|><|vision_end|>"])
def test_placeholders_without_media_are_refused(text, tokenizer):
    record = parse_record({"id": "r9", "messages": [{"role": "user", "content": text}]}, "x")
    with pytest.raises(DataError, match="record r9: a text holds a visual placeholder"):
        tokenize(record, [], tokenizer, "keye_vl_1_5")
