"""A record from a file gives the tokens and pixels that the same record gives through shards, index and data set."""

import json

import numpy as np
import pytest

from megatron_keye.config.schema import DataConfig
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.direct import encode_record
from megatron_keye.data.items import media_rules
from megatron_keye.data.record import parse_record
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import DataError

CONFIG = DataConfig(train="", tokenizer="", seq_length_tokens=8192, global_batch_samples=1)


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
def test_equals_the_data_set(corpus, indexed, tokenizer_folder, variant):
    tokenizer = load_tokenizer(tokenizer_folder, variant)
    dataset = Dataset.open(indexed[variant], tokenizer, variant, CONFIG)
    rules = media_rules(CONFIG.image, CONFIG.video, variant)
    for sample, line in list(enumerate(corpus.read_text().splitlines()))[:20]:
        tokens, patches = encode_record(parse_record(json.loads(line), "x"), corpus.parent, tokenizer, rules, "x")
        np.testing.assert_array_equal(tokens.token_ids, dataset.tokens(sample).token_ids)
        np.testing.assert_array_equal(tokens.supervised, dataset.tokens(sample).supervised)
        for own, stored in zip(patches, dataset.pixels(sample), strict=True):
            np.testing.assert_array_equal(own, stored)


def test_a_bad_medium_is_named(tmp_path, tokenizer):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    record = parse_record({"id": "r", "document": [{"type": "video", "video": "a.mp4"}]}, "in.jsonl:4")
    rules = media_rules(CONFIG.image, CONFIG.video, "keye_vl_1_5")
    with pytest.raises(DataError, match="in.jsonl:4, record r, video 0: cannot decode a video"):
        encode_record(record, tmp_path, tokenizer, rules, "in.jsonl:4")
