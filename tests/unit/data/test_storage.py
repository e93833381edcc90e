"""Data sets at URLs: the same samples as in a folder, whatever the network does, and plain words where they cannot be had."""

import shutil
import subprocess
import sys
import time
from functools import partial

import fsspec
import numpy as np
import pytest

from megatron_keye.config.load import load_config
from megatron_keye.config.schema import LoaderConfig, StorageConfig
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.index import TABLES, open_index
from megatron_keye.data.locations import open_store
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.shards import Span
from megatron_keye.data.sources import ThreadSource
from megatron_keye.data.workers import DecodeWorkers, SampleSet, WorkerSource
from megatron_keye.errors import DataError, SettingsError, UnreachableError
from tests.unit.data.http_server import serving

VARIANT = "keye_vl_1_5"


def storage(tmp_path, **changes):
    return StorageConfig(**{"cache": str(tmp_path / "cache"), "attempts": 4, "first_pause_s": 0.01, "timeout_s": 2.0, **changes})


def data_config(tmp_path, tokenizer_folder, **changes):
    given = load_config("debug").data
    changed = {"tokenizer": str(tokenizer_folder), "seq_length_tokens": 8192, "storage": storage(tmp_path, **changes)}
    return given.model_copy(update=changed)


@pytest.fixture
def copy(indexed, tmp_path):
    """A folder with the set in `set`, to change."""
    shutil.copytree(indexed[VARIANT], tmp_path / "served" / "set")
    return tmp_path / "served"


@pytest.fixture
def server(copy):
    with serving(copy) as (url, faults):
        yield f"{url}/set", faults


@pytest.fixture
def memory(indexed):
    """The set in the memory file system of this process."""
    fs = fsspec.filesystem("memory")
    fs.put(str(indexed[VARIANT]), "/set", recursive=True)
    yield "memory://set", fs
    fs.rm("/set", recursive=True)


def assert_same_samples(there, here):
    assert there.fingerprint == here.fingerprint
    for sample in range(0, len(here), 4):
        assert np.array_equal(there.tokens(sample).token_ids, here.tokens(sample).token_ids)
        assert all(np.array_equal(a, b) for a, b in zip(there.pixels(sample), here.pixels(sample), strict=True))


@pytest.mark.parametrize("latency_s", [0.0, 0.02])
def test_samples_over_http_are_those_of_the_folder(server, indexed, tokenizer, tokenizer_folder, tmp_path, latency_s):
    url, faults = server
    faults.latency_s = latency_s
    config = data_config(tmp_path, tokenizer_folder)
    there, here = (Dataset.open(place, tokenizer, VARIANT, config) for place in (url, indexed[VARIANT]))
    before = there.bytes_read()
    assert_same_samples(there, here)
    assert 0 < there.bytes_read() - before <= sum(path.stat().st_size for path in indexed[VARIANT].glob("*.tar"))
    tars = [request for request in faults.requests if request[1].endswith(".tar")]
    assert tars and all(first is not None for _, _, first in tars)
    assert len(set(tars)) == len(tars)  # a record is read for tokens and for pixels: the second time, it is cached


def test_samples_of_a_memory_file_system_are_those_of_the_folder(memory, indexed, tokenizer, tokenizer_folder, tmp_path):
    url, _ = memory
    config = data_config(tmp_path, tokenizer_folder, cache_bytes=0)
    assert_same_samples(*(Dataset.open(place, tokenizer, VARIANT, config) for place in (url, indexed[VARIANT])))


def test_the_second_opening_fetches_no_table_and_the_second_epoch_no_shard(server, tokenizer, tokenizer_folder, tmp_path):
    url, faults = server
    config = data_config(tmp_path, tokenizer_folder)
    first = Dataset.open(url, tokenizer, VARIANT, config)
    pixels = [first.pixels(sample) for sample in range(6)]
    faults.requests.clear()
    again = Dataset.open(url, tokenizer, VARIANT, config)
    assert all(np.array_equal(a, b) for sample in range(6) for a, b in zip(again.pixels(sample), pixels[sample], strict=True))
    assert [path for _, path, _ in faults.requests] == ["/set/index/index.json"]
    assert again.bytes_read() == 0


def test_an_index_that_was_made_anew_is_fetched_anew(server, copy, tmp_path):
    url, faults = server
    open_index(url, storage(tmp_path))
    meta = copy / "set" / "index" / "index.json"
    meta.write_text(meta.read_text() + "\n")
    faults.requests.clear()
    open_index(url, storage(tmp_path))
    assert sum(path.endswith(".npy") for _, path, _ in faults.requests) > 0


@pytest.mark.parametrize("status", [500, 503, 429])
def test_failures_that_pass_are_waited_for(server, tmp_path, status):
    url, faults = server
    faults.fail_first, faults.status = 3, status
    index = open_index(url, storage(tmp_path))
    faults.fail_first = 3
    index.store.read(index.shard(0), index.record_span(0))
    assert faults.fail_first == 0


def test_failures_that_last_blame_the_network_and_not_the_data(server, tmp_path):
    url, faults = server
    index = open_index(url, storage(tmp_path))
    faults.fail_first = 4
    with pytest.raises(UnreachableError, match=r"/set/shard-000000.tar, \d+ bytes at offset \d+: no answer in 4 tries.*HTTP status 503"):
        index.store.read(index.shard(0), index.record_span(0))
    assert not issubclass(UnreachableError, DataError)


def test_a_server_that_is_gone_is_unreachable(tmp_path):
    with pytest.raises(UnreachableError, match="no answer in 4 tries"):
        open_index("http://127.0.0.1:9/set", storage(tmp_path))


def test_a_server_that_stops_answering_is_given_up(server, tmp_path):
    url, faults = server
    index = open_index(url, storage(tmp_path, timeout_s=0.2, attempts=2))
    faults.latency_s = 1.0
    with pytest.raises(UnreachableError, match="no answer in 2 tries"):
        index.store.read(index.shard(0), index.record_span(0))


def test_a_body_that_breaks_off_is_asked_for_again(server, tmp_path):
    url, faults = server
    index = open_index(url, storage(tmp_path))
    expected = index.store.read(index.shard(0), index.record_span(0))
    faults.truncate, faults.requests = True, []
    fresh = open_store(url, storage(tmp_path, cache_bytes=0))
    with pytest.raises(UnreachableError):
        fresh.read(index.shard(0), index.record_span(0))
    assert len(faults.requests) == 4
    faults.truncate = False
    assert fresh.read(index.shard(0), index.record_span(0)) == expected


@pytest.mark.parametrize(("fault", "found"), [("short_bytes", "found {less} bytes"), ("ignore_ranges", "found {whole} bytes")])
def test_a_wrong_length_is_named(server, copy, tmp_path, fault, found):
    url, faults = server
    index = open_index(url, storage(tmp_path, cache_bytes=0))
    shard, span = index.shard(0), index.record_span(0)
    setattr(faults, fault, 3)
    numbers = {"less": span.num_bytes - 3, "whole": (copy / "set" / shard).stat().st_size}
    with pytest.raises(DataError, match=f"{span.num_bytes} bytes at offset {span.offset}: {found.format(**numbers)} each of 4 times"):
        index.store.read(shard, span)


def test_access_denied_is_not_tried_again(server, tmp_path):
    url, faults = server
    index = open_index(url, storage(tmp_path))
    faults.fail_first, faults.status = 1, 403
    with pytest.raises(DataError, match="HTTP status 403"):
        index.store.read(index.shard(0), index.record_span(0))


def break_shard(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-512])
    else:
        path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("how", ["missing", "truncated", "longer"])
def test_a_shard_that_is_not_as_it_was_indexed_is_found_at_the_start(server, memory, copy, tmp_path, how):
    url, _ = server
    shard = sorted((copy / "set").glob("*.tar"))[1]
    break_shard(shard, how)
    memory_url, fs = memory
    fs.rm(f"/set/{shard.name}")
    if shard.exists():
        fs.put(str(shard), f"/set/{shard.name}")
    for place in (url, memory_url):
        problem = "is missing; expected a data set" if how == "missing" else "does not have the .*index_shards.py FOLDER again"
        with pytest.raises(DataError, match=f"{place}/{shard.name} {problem}"):
            open_index(place, storage(tmp_path))
        # Nothing says that it was checked.
        with pytest.raises(DataError):
            open_index(place, storage(tmp_path))


def test_a_shard_that_is_cut_later_is_found_when_it_is_read(server, copy, tmp_path):
    url, _ = server
    index = open_index(url, storage(tmp_path))
    path = copy / "set" / index.shard(0)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="each of 4 times: it is truncated"):
        index.store.read(index.shard(0), Span(10_000, 100))


def test_a_url_without_an_index_says_what_was_expected(server, copy, tmp_path):
    url, _ = server
    shutil.rmtree(copy / "set" / "index")
    with pytest.raises(DataError, match=f"{url}/index/index.json is missing; expected a data set with its index at {url}: make shards"):
        open_index(url, storage(tmp_path))


def test_a_table_of_another_index_is_refused_and_not_kept(server, copy, tmp_path):
    url, _ = server
    table = copy / "set" / "index" / "gaps.npy"
    good, gaps = table.read_bytes(), np.load(table)
    np.save(table, gaps + 1)
    for _ in range(2):
        with pytest.raises(DataError, match="gaps.npy does not have the checksum"):
            open_index(url, storage(tmp_path))
    table.write_bytes(good)
    open_index(url, storage(tmp_path))


@pytest.mark.parametrize(("url", "problem"), [("nosuch://bucket/set", "Protocol not known"), ("oss://bucket/set", "Install ossfs")])
def test_a_url_that_nothing_can_read_is_a_setting_to_change(tmp_path, url, problem):
    with pytest.raises(SettingsError, match=problem):
        open_index(url, storage(tmp_path))


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="data.storage.cache"):
        open_index("memory://set", storage(tmp_path, cache=str(tmp_path / "file" / "cache")))


OPEN = """
import sys
from tests.unit.data.test_storage import StorageConfig, open_index
open_index(sys.argv[1], StorageConfig(cache=sys.argv[2]))
"""


def test_processes_of_one_machine_fetch_the_index_once(server, tmp_path):
    url, faults = server
    faults.gate.clear()
    processes = [subprocess.Popen([sys.executable, "-c", OPEN, url, str(tmp_path / "cache")]) for _ in range(3)]
    while sum(path.endswith("index.json") for _, path, _ in faults.requests) < 3:
        time.sleep(0.02)
    time.sleep(0.2)  # all of them want the tables now
    faults.gate.set()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    tables = [path for method, path, _ in faults.requests if path.endswith(".npy") and method == "GET"]
    assert len(tables) == len(set(tables)) == len(TABLES)


def test_workers_read_from_a_url_and_say_when_it_is_gone(server, tokenizer, tokenizer_folder, tmp_path):
    url, faults = server
    config = data_config(tmp_path, tokenizer_folder, cache_bytes=0, attempts=2)
    dataset = open_samples(url, tokenizer, VARIANT, config)
    pool = DecodeWorkers([SampleSet(url, VARIANT, config, dataset.fingerprint)], LoaderConfig(workers=1))
    here, there = ThreadSource(dataset, 1, dataset.bytes_read), WorkerSource(pool, 0, dataset.sample_id)
    read = partial(there.read, 0, dataset.shape(0))
    before = here.counts().bytes_read
    assert np.array_equal(read().tokens.token_ids, here.read(0, dataset.shape(0)).tokens.token_ids)
    assert there.counts().bytes_read == here.counts().bytes_read - before > 0
    faults.fail_first = 2
    with pytest.raises(UnreachableError, match="no answer in 2 tries"):
        read()
    read()
    pool.close()
