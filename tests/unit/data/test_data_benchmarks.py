"""What the data benchmarks rest on: every pipeline makes the same tensors, and what is computed there is right."""

import numpy as np
import pytest
import webdataset

from benchmarks import shard_sets
from benchmarks.loader_work import SampleWork
from benchmarks.step_balance import PLANS, draw, place
from benchmarks.tiny_set import make_tiny_set, tiny_config
from megatron_keye.config.load import load_config
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.train.placement import plan_settings


@pytest.fixture(scope="module")
def mixed_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"NUM_CLIPS": 1, "CLIP_S": 1, "CLIP_HEIGHT": 112, "CLIP_WIDTH": 168}.items():
            patch.setattr(shard_sets, name, value)
        shard_sets.make_set(folder, "mixed", 5)
    return folder


def opened(config):
    tokenizer = load_tokenizer(config.data.tokenizer, shard_sets.VARIANT)
    return open_samples(config.data.train, tokenizer, shard_sets.VARIANT, config.data)


@pytest.mark.parametrize("with_index", [True, False])
def test_others_make_the_tensors_that_our_loader_makes(mixed_set, with_index):
    config = shard_sets.config_for(mixed_set)
    dataset, work = opened(config), SampleWork(config.data, with_index)
    shards = sorted(map(str, (mixed_set / "shards").glob("*.tar")))
    samples = list(webdataset.DataPipeline(webdataset.SimpleShardList(shards), webdataset.tarfile_to_samples()))
    assert len(samples) == len(dataset) == 5
    for number, sample in enumerate(samples):
        made, tokens, pixels = work(sample), dataset.tokens(number), dataset.pixels(number)
        assert made["token_ids"].tolist() == tokens.token_ids.tolist()
        assert made["supervised"].tolist() == tokens.supervised.tolist()
        assert len(made["patches"]) == sum(map(len, pixels))
        assert not pixels or np.array_equal(made["patches"].numpy(), np.concatenate(pixels))


def test_records_of_a_tiny_set_are_as_its_index_promises(tmp_path):
    make_tiny_set(tmp_path, 120)
    dataset = opened(tiny_config(tmp_path))
    for number in (0, 9, 119):
        assert dataset.record(number).id == str(number)
        assert len(dataset.tokens(number).token_ids) == dataset.shape(number).num_tokens


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_places_each_sample_once_in_rows_that_hold_it(plan):
    config = load_config("debug", ("data.seq_length_tokens=1024",))
    shapes = draw(40, np.random.default_rng(1))
    replicas = place(plan, shapes, plan_settings(config, 2))
    rows = [row for replica in replicas for row in replica.rows]
    assert sorted(document.sample for row in rows for document in row.documents) == list(range(40))
    assert max(row.num_tokens for row in rows) <= 1024
    assert len({len(replica.rows) for replica in replicas}) == 1
