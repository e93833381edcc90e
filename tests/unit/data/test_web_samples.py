"""Samples whose media stay at web addresses: the same tokens and pixels as from shards, and a named error for what is not as it was."""

import json

import numpy as np
import pytest

from data_tools import index_shards, make_shards
from megatron_keye.config.load import load_config
from megatron_keye.config.schema import LoaderConfig, StorageConfig, VideoConfig
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.index import open_index
from megatron_keye.data.indexing import index_folder, save_index
from megatron_keye.data.loader import ReplicaLoader
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.places import Member, WebAddress
from megatron_keye.data.record import parse_record
from megatron_keye.data.shards import list_shards
from megatron_keye.data.sources import ThreadSource
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.data.workers import DecodeWorkers, SampleSet, WorkerSource
from megatron_keye.data.writing import plan_shards, write_shards
from megatron_keye.errors import DataError, MediumUnreachableError
from megatron_keye.plan.types import Document, EncodeTask, ReplicaPlan, Row
from tests.unit.data.corpus import png, write_corpus
from tests.unit.data.http_server import serving

VARIANTS = ("keye_vl_1_5", "keye_vl_preview")
NUM_RECORDS = 20


class WebSet:
    """Shards of records whose files are served, and of the same records with their files in the shards."""

    def __init__(self, folder, tokenizer_folder, url, faults):
        self.folder, self.url, self.faults, self.tokenizer_folder = folder, url, faults, tokenizer_folder
        source = write_corpus(folder / "served", NUM_RECORDS, seed=4)
        self.media = folder / "served" / "media"
        on_web = folder / "web.jsonl"
        on_web.write_text(source.read_text().replace('"media/', f'"{url}/media/'))
        self.storage = StorageConfig(
            cache=str(folder / "cache"), attempts=2, first_pause_s=0.01, timeout_s=5.0, private_networks=("127.0.0.0/8",)
        )
        write_shards(source, folder / "inside", plan_shards(source, 40_000))
        write_shards(on_web, folder / "web", plan_shards(on_web, 2_000, self.storage, keep_web=True))

    def index(self, name="web", variant="keye_vl_1_5", workers=1, **changes):
        made_of = (self.folder / name, self.tokenizer_folder, variant, VideoConfig())
        shards = index_folder(*made_of, workers, storage=self.storage.model_copy(update=changes))
        save_index(*made_of, shards)
        return shards

    def config(self, **changes):
        storage = self.storage.model_copy(update=changes)
        update = {"tokenizer": str(self.tokenizer_folder), "seq_length_tokens": 8192, "storage": storage}
        return load_config("debug").data.model_copy(update=update)

    def open(self, tokenizer, name="web", variant="keye_vl_1_5", **changes):
        return Dataset.open(self.folder / name, tokenizer, variant, self.config(**changes))


@pytest.fixture
def web(tmp_path, tokenizer_folder):
    with serving(tmp_path / "served") as (url, faults):
        yield WebSet(tmp_path, tokenizer_folder, url, faults)


def with_picture(dataset):
    """The first sample with one medium, a picture at a web address; and the name of its file."""
    for sample in range(len(dataset)):
        media = dataset.stored_media(sample)
        if len(media) == 1 and media[0].item.frames is None and isinstance(media[0].place, WebAddress):
            return sample, media[0].media.address.rpartition("/")[2]
    raise AssertionError("no such sample")


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_pixels_are_those_of_media_in_shards(web, tokenizer_folder, variant):
    tokenizer = load_tokenizer(tokenizer_folder, variant)
    for name in ("inside", "web"):
        web.index(name, variant)
    assert {method for method, *_ in web.faults.requests} == {"GET"}
    inside, there = (web.open(tokenizer, name, variant) for name in ("inside", "web"))
    places, kinds = set(), set()
    for sample in range(NUM_RECORDS):
        assert there.shape(sample) == inside.shape(sample)
        assert np.array_equal(there.tokens(sample).token_ids, inside.tokens(sample).token_ids)
        assert all(np.array_equal(a, b) for a, b in zip(there.pixels(sample), inside.pixels(sample), strict=True))
        places |= {type(medium.place) for medium in there.stored_media(sample)}
        kinds |= {layout.kind for layout in there.layouts(sample)}
    assert places == {Member, WebAddress}  # data URIs were written to the shards
    assert kinds == {"image", "video"}


def test_indexing_asks_for_each_medium_once_and_workers_change_nothing(web):
    web.index(workers=2)
    gets = [path for _, path, _ in web.faults.requests]
    first = open_index(web.folder / "web", web.storage)
    records = [parse_record(json.loads(line), "x") for line in (web.folder / "web.jsonl").read_text().splitlines()]
    named = [media.address for record in records for media in record.media if media.origin == "web"]
    assert sorted(gets) == sorted(address.removeprefix(web.url) for address in named)
    web.index(workers=1)
    assert open_index(web.folder / "web", web.storage).fingerprint == first.fingerprint


def test_what_cannot_be_had_when_indexing_is_a_problem_of_its_sample(web):
    (web.media / "3.png").unlink()
    shards = web.index(medium_bytes=(web.media / "1.png").stat().st_size)
    reasons = [reason for shard in shards for _, reason in shard.problems]
    assert any("3.png: found HTTP status 404" in reason for reason in reasons)
    assert any("(data.storage.medium_bytes)" in reason for reason in reasons)
    assert all(reason.startswith("shard-") for reason in reasons)


def test_a_medium_is_fetched_again_for_training_and_then_kept(web, tokenizer):
    web.index()
    dataset = web.open(tokenizer)
    sample, name = with_picture(dataset)
    web.faults.requests.clear()
    first = dataset.pixels(sample)
    assert [path for _, path, _ in web.faults.requests] == [f"/media/{name}"]
    counted = dataset.bytes_read()
    (web.media / name).unlink()
    again = web.open(tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip(first, again.pixels(sample), strict=True))
    assert again.bytes_read() < counted  # the record alone


def other_picture(path):
    height, width = np.random.default_rng(0).integers(20, 60, 2)
    path.write_bytes(png(int(height), int(width), 77))


Gone = MediumUnreachableError
BAD = {
    "gone": (lambda web, path: path.unlink(), {}, "found HTTP status 404 Not Found", DataError),
    "changed": (lambda web, path: other_picture(path), {}, "has changed since it was indexed", DataError),
    "one byte": (lambda web, path: path.write_bytes(path.read_bytes() + b"x"), {}, "has changed since it was indexed", DataError),
    "too large": (lambda web, path: None, {"medium_bytes": 10}, "has more than 10 bytes", DataError),
    "slow": (lambda web, path: setattr(web.faults, "stall_s", 1.0), {"medium_timeout_s": 0.2}, "took more than 0.2 s", Gone),
    "down": (lambda web, path: setattr(web.faults, "fail_first", 99), {}, "no whole answer in 2 tries", Gone),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_medium_that_is_not_as_it_was_is_a_bad_sample_and_never_another_picture(web, tokenizer, name):
    damage, changes, problem, kind = BAD[name]
    web.index()
    dataset = web.open(tokenizer, cache_bytes=0, **changes)
    sample, file = with_picture(dataset)
    damage(web, web.media / file)
    with pytest.raises(kind, match=rf"shard-\d+.tar:.*, record r\d+, medium 0: .*{file}:? {problem}") as caught:
        dataset.pixels(sample)
    assert caught.value.exit_code == (1 if kind is Gone else 65)
    shape = dataset.shape(sample)
    plan = ReplicaPlan((Row((Document(sample, shape, 0, 8192),), 8192),), (EncodeTask(0, 0, 0, 0, 0),), 1)
    loader = ReplicaLoader(ThreadSource(dataset, 1), pad_id=0, skip_bad=True)
    data = loader.load(plan)
    loader.close()
    assert [(skipped.sample, problem in skipped.reason) for skipped in data.skipped] == [(sample, True)]
    assert not data.patches[0, 0][0].any() and not data.rows[0].supervised.any()


def test_a_wrong_answer_is_not_kept(web, tokenizer):
    web.index()
    dataset = web.open(tokenizer)
    sample, file = with_picture(dataset)
    good = (web.media / file).read_bytes()
    other_picture(web.media / file)
    with pytest.raises(DataError, match="has changed"):
        dataset.pixels(sample)
    (web.media / file).write_bytes(good)
    assert dataset.pixels(sample)


def test_a_medium_that_was_indexed_anew_is_fetched_anew(web, tokenizer):
    web.index()
    before = web.open(tokenizer)
    sample, file = with_picture(before)
    before.pixels(sample)
    other_picture(web.media / file)
    web.index()
    after = web.open(tokenizer)
    assert [patches.shape[0] for patches in after.pixels(sample)] == [s.grid.num_patches for s in after.shape(sample).segments]
    assert after.shape(sample) != before.shape(sample)


def test_the_checksum_in_the_ledger_follows_media_at_web_addresses(web, tokenizer):
    web.index()
    before = web.open(tokenizer)
    sample, file = with_picture(before)
    other_picture(web.media / file)
    web.index()
    after = web.open(tokenizer)
    uses = [any(medium.media.address.endswith(f"/media/{file}") for medium in after.stored_media(n)) for n in range(NUM_RECORDS)]
    changed = [before.record_crc32(n) != after.record_crc32(n) for n in range(NUM_RECORDS)]
    assert changed == uses and changed[sample]
    assert before.fingerprint != after.fingerprint


def test_a_checksum_in_the_record_is_held_when_indexing(web):
    good = (web.folder / "web.jsonl").read_text().splitlines()[0]
    web.faults.redirects["/media/0.png?key=KEY"] = "/media/0.png"
    record = {"id": "a", "document": [{"type": "image", "image": f"{web.url}/media/0.png?key=KEY", "sha256": "0" * 64}]}
    (source := web.folder / "one.jsonl").write_text(json.dumps(record) + "\n" + good + "\n")
    write_shards(source, web.folder / "one", plan_shards(source, 1 << 20, web.storage, keep_web=True))
    (shard,) = web.index("one")
    ((_, reason),) = shard.problems
    assert f"{web.url}/media/0.png do not have their sha256" in reason  # without the key


def test_workers_fetch_and_say_when_a_host_is_gone(web, tokenizer):
    web.index()
    config = web.config(cache_bytes=0)
    location = str(web.folder / "web")
    dataset = open_samples(location, tokenizer, VARIANTS[0], config)
    sample, _ = with_picture(dataset)
    pool = DecodeWorkers([SampleSet(location, VARIANTS[0], config, dataset.fingerprint)], LoaderConfig(workers=1))
    source = WorkerSource(pool, 0, dataset.sample_id)
    loaded = source.read(sample, dataset.shape(sample))
    assert all(np.array_equal(a, b) for a, b in zip(loaded.patches, dataset.pixels(sample), strict=True))
    web.faults.fail_first = 2
    with pytest.raises(MediumUnreachableError, match="no whole answer in 2 tries, the last: HTTP status 503"):
        source.read(sample, dataset.shape(sample))
    pool.close()


def test_the_tools_keep_addresses_and_count_samples(web, monkeypatch, capsys):
    source, out = str(web.folder / "web.jsonl"), str(web.folder / "tooled")
    inside = ["--private-networks", "127.0.0.0/8"]
    monkeypatch.setattr("sys.argv", ["make_shards", source, out, "--keep-web", "--shard-bytes", "2000", "--workers", "1"])
    assert make_shards.main() == 0 and not web.faults.requests
    assert [path.read_bytes() for path in list_shards(web.folder / "tooled")] == [p.read_bytes() for p in list_shards(web.folder / "web")]
    tool = ["index_shards", out, "--tokenizer", str(web.tokenizer_folder), "--variant", VARIANTS[0], "--workers", "2"]
    monkeypatch.setattr("sys.argv", tool)
    assert index_shards.main() == 65
    assert "lies at 127.0.0.1, which is not public" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*tool, *inside])
    assert index_shards.main() == 0
    assert f"{NUM_RECORDS} samples" in capsys.readouterr().err
    assert len(open_index(out, web.storage)) == NUM_RECORDS
