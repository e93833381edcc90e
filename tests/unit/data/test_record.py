import pytest

from megatron_keye.data.record import Media, parse_record, record_to_json
from megatron_keye.errors import DataError

RED, BLUE = {"type": "image", "image": "red.png"}, {"type": "image", "image": "blue.png", "max_pixels": 784}


def chat(*content, **fields) -> dict:
    return {"id": "r1", "messages": [{"role": "user", "content": list(content)}], **fields}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def parts(raw: dict) -> list:
    record = parse_record(raw, "data.jsonl:3")
    return [p if isinstance(p, str) else (p.kind, p.address) for p in record.messages[0].parts or record.document]


def test_media_stand_where_their_parts_stand():
    assert parts(chat(text("a"), RED, text("b"), BLUE)) == ["a", ("image", "red.png"), "b", ("image", "blue.png")]


@pytest.mark.parametrize("mark", ["<image>", "<|vision_start|><|image_pad|><|vision_end|>"])
def test_media_fill_placeholders_of_their_message(mark):
    raw = chat(RED, BLUE, text(f"first {mark} second {mark}"))
    assert parts(raw) == ["first ", ("image", "red.png"), " second ", ("image", "blue.png")]


def test_listed_media_fill_placeholders_of_the_record():
    raw = {"id": 1, "messages": [{"role": "user", "content": "<image><video>what?"}], "images": ["a.png"], "videos": ["b.mp4"]}
    assert parts(raw) == [("image", "a.png"), ("video", "b.mp4"), "what?"]


def test_a_placeholder_without_any_media_is_text():
    assert parts(chat(text("the SVG tag <image>"))) == ["the SVG tag <image>"]


def test_sources_and_options():
    inline, member = "data:image/png;base64,AAAA", {"type": "image", "member": "0.png", "sha256": "ab"}
    record = parse_record(chat({"type": "image", "image": inline}, member, {"type": "video", "video": "file:///v.mp4", "fps": 1}), "x")
    assert record.media == (
        Media("image", "inline", inline),
        Media("image", "member", "0.png", sha256="ab"),
        Media("video", "file", "/v.mp4", {"fps": 1}),
    )


@pytest.mark.parametrize(
    "raw",
    [
        chat(text("a"), BLUE, task="count", source="demo", answer="3", license="free"),
        {"id": 7, "document": [text("a"), RED, text("b")]},
        {"id": 7, "document": "only text"},
        {"id": 8, "messages": [{"role": "user", "content": "<image>x"}], "images": ["a.png"]},
        chat({"type": "image", "member": "0.png", "sha256": "ab", "resized_height": 56, "resized_width": 28}),
    ],
)
def test_the_one_form_reads_back_as_the_same_record(raw):
    record = parse_record(raw, "x")
    assert parse_record(record_to_json(record), "y") == record


def test_unread_fields_are_carried():
    assert record_to_json(parse_record(chat(text("a"), license="free"), "x"))["license"] == "free"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "found a JSON list"),
        ({"messages": []}, "found id None"),
        ({"id": "a", "mesages": []}, "did you mean 'messages'"),
        ({"id": "a", "messages": [], "document": ""}, "both messages and document"),
        ({"id": "a", "messages": []}, "at least one message"),
        ({"id": "a", "messages": [{"role": "user"}]}, "expected an object with role and content"),
        ({"id": "a", "messages": [{"role": "bot", "content": ""}]}, "found role 'bot'"),
        ({"id": "a", "messages": [{"role": "user", "content": 3}]}, "content of type int"),
        ({"id": "a", "document": ""}, "empty document"),
        (chat({"type": "audio", "audio": "a.wav"}), "found part type 'audio'"),
        (chat("bare"), "found part type 'bare'"),
        (chat({"type": "text"}), "found text None"),
        (chat({"type": "image"}), "found image None"),
        (chat({"type": "video", "video": ["a.png"]}), "expected a path, a web address or a data URI"),
        (chat(RED | {"max_pixel": 3}), "did you mean 'max_pixels'"),
        (chat(RED | {"max_pixels": -1}), "expected a positive number"),
        (chat(RED | {"max_pixels": "9"}), "expected a positive number"),
        (chat(RED | {"resized_height": 28}), "only one of resized_height"),
        (chat(text("a"), task=3), "found task 3"),
        (chat(RED, RED, text("<image>")), "1 more image"),
        (chat(RED, text("<image><image>")), "more image placeholders than images"),
        (chat(RED, text("<image>"), images=["a.png"]), "use parts or lists"),
        (chat(text("no place"), images=["a.png"]), "1 more image"),
        (chat(text("<image>"), images="a.png"), "images of type str"),
    ],
)
def test_a_bad_record_is_named_with_place_and_finding(raw, message):
    with pytest.raises(DataError) as error:
        parse_record(raw, "data.jsonl:3")
    assert message in str(error.value)
    assert "data.jsonl:3" in str(error.value)
