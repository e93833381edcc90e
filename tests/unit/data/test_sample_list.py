"""Lists of samples against the data set that the same file becomes, and what they refuse."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from megatron_keye.config.schema import DataConfig, ImageConfig, VideoConfig
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.items import media_rules
from megatron_keye.data.sample_list import count_lines, read_sample_list
from megatron_keye.data.tokenize import tokenize
from megatron_keye.errors import DataError

ENOUGH_TOKENS = 100_000


@pytest.fixture
def read(tokenizer):
    """Reads a file with the rules of a variant and our own template."""

    def read_file(path, variant="keye_vl_1_5", limit_tokens=ENOUGH_TOKENS, **options):
        rules = media_rules(ImageConfig(), VideoConfig(), variant)
        return read_sample_list(path, partial(tokenize, tokenizer=tokenizer, variant=variant), rules, limit_tokens, **options)

    return read_file


@pytest.fixture
def written(tmp_path):
    """Writes lines (records or text) beside one picture."""

    def write(*lines):
        Image.new("RGB", (56, 84), (200, 30, 30)).save(tmp_path / "red.png")
        path = tmp_path / "input.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def chat(record_id="a", image=None, text="What is it?"):
    media = [] if image is None else [{"type": "image", "image": image}]
    user = {"role": "user", "content": [*media, {"type": "text", "text": text}]}
    return {"id": record_id, "messages": [user, {"role": "assistant", "content": "Three."}]}


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
def test_samples_equal_those_of_the_indexed_set(read, corpus, indexed, tokenizer, variant):
    ticks = []
    samples = read(corpus, variant, on_sample=lambda: ticks.append(1))
    data = DataConfig(
        train="", tokenizer="", seq_length_tokens=ENOUGH_TOKENS, pad_multiple_tokens=2, global_batch_samples=1
    )  # fmt: skip
    dataset = Dataset.open(indexed[variant], tokenizer, variant, data)
    assert len(samples) == len(dataset) == len(ticks) == count_lines(corpus)
    for sample in range(len(samples)):
        assert samples.sample_id(sample) == dataset.sample_id(sample)
        assert samples.shape(sample) == dataset.shape(sample)
        ours, theirs = samples.tokens(sample), dataset.tokens(sample)
        assert np.array_equal(ours.token_ids, theirs.token_ids) and np.array_equal(ours.supervised, theirs.supervised)
    for sample in range(0, len(samples), 7):
        pairs = zip(samples.pixels(sample), dataset.pixels(sample), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_every_bad_line_is_named(read, written):
    path = written(chat("good"), "{", chat("missing", "none.png"), {"id": "x"}, "", chat("late", "input.jsonl"))
    with pytest.raises(DataError) as error:
        read(path)
    text = str(error.value)
    assert "4 of 5 samples cannot be used" in text
    for part in (":2: found text that is not JSON", ":3, record missing", "none.png", ":4", ":6, record late, image 0: cannot decode"):
        assert part in text
    assert "record good" not in text


def test_long_samples_are_refused_whole(read, written):
    path = written(chat("a", "red.png"))
    num_tokens = read(path).shape(0).num_tokens
    assert read(path, limit_tokens=num_tokens).shape(0).num_tokens == num_tokens
    with pytest.raises(DataError, match=rf"input.jsonl:1, record a: found {num_tokens} tokens, 6 of them visual, expected at most"):
        read(path, limit_tokens=num_tokens - 1)


def test_media_that_vanish_or_change_are_named(read, written):
    path = written(chat("a", "red.png"))
    samples = read(path)
    Image.new("RGB", (300, 84)).save(path.parent / "red.png")
    with pytest.raises(DataError, match=r"input.jsonl:1, record a: the bytes of red.png do not have their sha256"):
        samples.pixels(0)
    (path.parent / "red.png").unlink()
    with pytest.raises(DataError, match=r"input.jsonl:1, record a.*cannot read .*red.png"):
        samples.pixels(0)


def test_files_without_records(read, written, tmp_path):
    with pytest.raises(DataError, match="has no record"):
        read(written())
    with pytest.raises(DataError, match=r"cannot read .*absent.jsonl"):
        read(tmp_path / "absent.jsonl")
