"""Shards at URLs are read in aligned chunks: the bytes are those of the file, and neighbours cost no request."""

from itertools import pairwise

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.chunks import ChunkGrid, stretches
from megatron_keye.data.remote_store import RemoteStore
from megatron_keye.data.shards import Span
from megatron_keye.errors import DataError
from megatron_keye.plan.blocks import BlockOrder, shuffled
from tests.unit.data.http_server import serving

CHUNK_BYTES = 100
FILE_BYTES = 1050
BLOB = np.random.default_rng(0).bytes(FILE_BYTES)
NAME = "a.tar"

SPANS = st.integers(0, FILE_BYTES).flatmap(lambda offset: st.builds(Span, st.just(offset), st.integers(0, FILE_BYTES - offset)))


def bytes_of(span):
    return BLOB[span.offset : span.offset + span.num_bytes]


def store_at(url, cache, cache_bytes=1 << 20, chunk_bytes=CHUNK_BYTES, file_bytes=FILE_BYTES):
    storage = StorageConfig(
        cache=str(cache), cache_bytes=cache_bytes, chunk_bytes=chunk_bytes, attempts=2, first_pause_s=0.01, timeout_s=2.0
    )
    store = RemoteStore(url, storage)
    store.check_lengths({NAME: file_bytes}, "index")
    return store


@pytest.fixture
def served(tmp_path):
    """(URL, faults) of a server of BLOB."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(BLOB)
    with serving(folder) as (url, faults):
        yield url, faults


@pytest.fixture(scope="module")
def memory_url():
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/chunks/{NAME}", BLOB)
    yield "memory://chunks"
    fs.rm("/chunks", recursive=True)


def first_bytes(faults):
    return [first for _, _, first in faults.ranged()]


@given(span=SPANS, chunk_bytes=st.integers(1, FILE_BYTES + 10))
def test_the_chunks_of_a_span_hold_it_and_no_more(span, chunk_bytes):
    grid = ChunkGrid(FILE_BYTES, chunk_bytes)
    touched = grid.touched(span)
    if not span.num_bytes:
        return
    whole = grid.stretch(touched)
    end = whole.offset + whole.num_bytes
    assert whole.offset <= span.offset < whole.offset + chunk_bytes
    assert end - chunk_bytes < span.offset + span.num_bytes <= end <= FILE_BYTES
    assert grid.joined(span, grid.divided(touched, bytes_of(whole))) == bytes_of(span)


@given(chunks=st.sets(st.integers(0, 40)))
def test_stretches_are_the_fewest_ranges_of_the_same_numbers(chunks):
    found = stretches(sorted(chunks))
    assert [chunk for stretch in found for chunk in stretch] == sorted(chunks)
    assert all(before.stop < after.start for before, after in pairwise(found))


@settings(max_examples=40)
@given(spans=st.lists(SPANS, max_size=6), chunk_bytes=st.integers(1, 600), cache_bytes=st.integers(0, 1500))
def test_any_spans_are_those_of_the_file_whatever_the_cache_keeps(memory_url, tmp_path_factory, spans, chunk_bytes, cache_bytes):
    store = store_at(memory_url, tmp_path_factory.mktemp("cache"), cache_bytes, chunk_bytes)
    assert [store.read(NAME, span) for span in spans] == [bytes_of(span) for span in spans]


@pytest.mark.parametrize(
    ("span", "begin", "num_bytes"),
    [
        (Span(0, 100), 0, 100),
        (Span(120, 10), 100, 100),
        (Span(199, 2), 100, 200),
        (Span(250, 400), 200, 500),
        (Span(1049, 1), 1000, 50),
        (Span(0, FILE_BYTES), 0, FILE_BYTES),
    ],
    ids=["one chunk", "in a chunk", "over an edge", "many chunks", "last chunk", "whole shard"],
)
def test_a_span_is_one_request_for_its_chunks(served, tmp_path, span, begin, num_bytes):
    url, faults = served
    store = store_at(url, tmp_path / "cache")
    faults.requests.clear()
    assert store.read(NAME, span) == bytes_of(span)
    assert first_bytes(faults) == [begin]
    assert store.bytes_read() == num_bytes
    for beside in (Span(begin, 1), Span(begin + num_bytes - 1, 1), span):
        assert store.read(NAME, beside) == bytes_of(beside)
    assert len(faults.requests) == 1
    assert store.bytes_read() == num_bytes


def test_only_missing_chunks_are_asked_for_each_run_of_them_once(served, tmp_path):
    url, faults = served
    store = store_at(url, tmp_path / "cache")
    store.read(NAME, Span(420, 10))
    faults.requests.clear()
    assert store.read(NAME, Span(150, 700)) == BLOB[150:850]
    assert first_bytes(faults) == [100, 500]
    assert store.bytes_read() == 800


def test_a_cache_smaller_than_a_span_returns_its_bytes(served, tmp_path):
    url, faults = served
    store = store_at(url, tmp_path / "cache", cache_bytes=250)
    faults.requests.clear()
    for _ in range(2):
        assert store.read(NAME, Span(50, 900)) == BLOB[50:950]
    assert len(faults.requests) > 1  # it could not keep them all


def test_without_a_cache_a_span_is_read_alone(served, tmp_path):
    url, _ = served
    store = store_at(url, tmp_path / "cache", cache_bytes=0)
    assert store.read(NAME, Span(120, 10)) == BLOB[120:130]
    assert store.bytes_read() == 10


def test_a_span_beyond_the_file_is_refused_without_a_request(served, tmp_path):
    url, faults = served
    store = store_at(url, tmp_path / "cache")
    faults.requests.clear()
    with pytest.raises(DataError, match="expected 100 bytes at offset 1000, found an end at 1050; index the set again"):
        store.read(NAME, Span(1000, 100))
    assert not faults.requests


def test_chunks_of_a_shard_that_was_indexed_anew_are_not_those_of_before(served, tmp_path):
    url, _ = served
    folder = tmp_path / "served"
    for blob in (BLOB, bytes(reversed(BLOB))):
        (folder / NAME).write_bytes(blob)
        (folder / "index").mkdir(exist_ok=True)
        (folder / "index" / "index.json").write_bytes(blob[:20])
        store = store_at(url, tmp_path / "cache")
        store.folder_here("index", ["index.json"], lambda path: None)
        assert store.read(NAME, Span(120, 10)) == blob[120:130]


def test_the_block_order_makes_several_times_fewer_requests_than_a_full_shuffle(tmp_path):
    """1000 records of 10 bytes in 100 chunks; the cache has room for one window, which touches up to 6."""
    blob = np.random.default_rng(1).bytes(10_000)
    (tmp_path / NAME).write_bytes(blob)
    counts = []
    with serving(tmp_path) as (url, faults):
        for number, order in enumerate((BlockOrder(1000, block_samples=20, blocks_per_window=2, seed=0), shuffled(1000, seed=0))):
            store = store_at(url, tmp_path / f"cache {number}", cache_bytes=900, file_bytes=len(blob))
            faults.requests.clear()
            for sample in order(np.arange(1000)).tolist():
                assert store.read(NAME, Span(10 * sample, 10)) == blob[10 * sample : 10 * sample + 10]
            counts.append(len(faults.requests))
    blocks, full_shuffle = counts
    assert 100 <= blocks < full_shuffle / 4
