"""Worker processes: the same samples as without them, and what it costs when one dies, hangs, bloats or finds bad data."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_keye.config.load import load_config
from megatron_keye.config.schema import LoaderConfig
from megatron_keye.data.loader import ReplicaLoader
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.sources import ThreadSource
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.data.workers import DecodeWorkers, SampleSet, WorkerSource
from megatron_keye.errors import DataError, KeyeError, SettingsError, UnreachableError
from megatron_keye.plan.compiled import has_numba
from megatron_keye.plan.types import Document, EncodeTask, ReplicaPlan, Row
from tests.unit.data.fake_decode_worker import BYTES_PER_SAMPLE, fake_pixels, fake_shape, fake_tokens

FAKE = (sys.executable, "-m", "tests.unit.data.fake_decode_worker")
DEADLINE_S = 3.0


def fake_set(folder, behaviour, fingerprint="fake"):
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return SampleSet(str(folder), "keye_vl_1_5", load_config("debug").data, fingerprint)


@contextmanager
def fake_pool(folder, behaviour, workers=1, deadline_s=DEADLINE_S, fingerprint="fake"):
    settings = LoaderConfig(workers=workers, worker_memory_bytes=256 << 20, worker_deadline_s=deadline_s)
    pool = DecodeWorkers([fake_set(folder, behaviour, fingerprint)], settings, command=FAKE)
    try:
        yield pool
    finally:
        pool.close()


def fake_source(pool):
    return WorkerSource(pool, 0, lambda sample: f"id{sample}")


def assert_is_sample(loaded, sample):
    tokens, pixels = fake_tokens(sample), fake_pixels(sample)
    assert loaded.tokens.shape == tokens.shape
    assert loaded.tokens.token_ids.dtype == np.int32 and np.array_equal(loaded.tokens.token_ids, tokens.token_ids)
    assert loaded.tokens.supervised.dtype == bool and np.array_equal(loaded.tokens.supervised, tokens.supervised)
    assert len(loaded.patches) == len(pixels)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.patches, pixels, strict=True))


def read(source, sample):
    return source.read(sample, fake_shape(sample))


@pytest.mark.parametrize("deed", ["kill", "stop", "bloat", "exit"])
def test_a_worker_that_is_lost_costs_one_retry_and_nothing_else(tmp_path, deed):
    with fake_pool(tmp_path, {"4": [deed]}) as pool:
        source, first_pid = fake_source(pool), pool.workers[0].pid
        for sample in (1, 4, 5):
            assert_is_sample(read(source, sample), sample)
        assert source.counts().worker_failures == 1
        assert source.counts().samples == 3
        assert pool.workers[0].pid != first_pid


REASONS = {
    "kill": "was ended by SIGKILL",
    "hang": r"took more than 1 s \(data.loader.worker_deadline_s\)",
    "bloat": r"ran out of memory \(data.loader.worker_memory_bytes\)",
    "exit": "ended with code 3",
}


@pytest.mark.parametrize("deed", REASONS)
def test_the_second_time_the_sample_is_to_blame(tmp_path, deed):
    with fake_pool(tmp_path, {"4": [deed, deed]}, deadline_s=1.0) as pool:
        source = fake_source(pool)
        with pytest.raises(DataError, match=f"record id4: two decode workers in turn failed on it: one {REASONS[deed]}"):
            read(source, 4)
        assert_is_sample(read(source, 2), 2)


def read_group(source, samples):
    return source.read_group([(sample, fake_shape(sample)) for sample in samples])


def test_a_group_is_read_as_its_samples_are_alone(tmp_path):
    with fake_pool(tmp_path, {"6": ["data"]}) as pool:
        source = fake_source(pool)
        results = read_group(source, [3, 6, 1, 5, 9])
        for sample, result in zip([3, 6, 1, 5, 9], results, strict=True):
            if sample == 6:
                assert isinstance(result, DataError) and str(result) == "the picture is cut off"
            else:
                assert_is_sample(result, sample)
        assert (source.counts().samples, source.counts().bytes_read) == (5, 5 * BYTES_PER_SAMPLE)


@pytest.mark.parametrize("deed", ["kill", "bloat"])
def test_a_worker_lost_over_a_group_blames_only_the_sample_that_does_it_again(tmp_path, deed):
    with fake_pool(tmp_path, {"6": [deed] * 3, "9": [deed]}) as pool:
        first, second, third, fourth = read_group(fake_source(pool), [3, 6, 9, 12])
        assert isinstance(second, DataError) and "record id6: two decode workers in turn failed on it" in str(second)
        for sample, result in ((3, first), (9, third), (12, fourth)):
            assert_is_sample(result, sample)


@pytest.mark.parametrize("word", ["unreachable", "bug"])
def test_what_is_wrong_with_more_than_a_sample_ends_the_group(tmp_path, word):
    with fake_pool(tmp_path, {"6": [word]}) as pool, pytest.raises(KeyeError, match="does not answer|a bug"):
        read_group(fake_source(pool), [3, 6])


def plan_of(samples):
    rows = tuple(Row((Document(s, fake_shape(s), 0, 16),), 16) for s in samples)
    tasks = tuple(EncodeTask(r, 0, n, 0, 0) for r, s in enumerate(samples) for n in range(len(fake_shape(s).segments)))
    return ReplicaPlan(rows, tasks, 1)


def load(source, samples, skip_bad=False):
    loader = ReplicaLoader(source, pad_id=9, skip_bad=skip_bad)
    try:
        return loader.load(plan_of(samples)), loader.counts
    finally:
        loader.close()


def assert_same_data(data, expected):
    for row, other in zip(data.rows, expected.rows, strict=True):
        assert np.array_equal(row.token_ids, other.token_ids)
        assert np.array_equal(row.supervised, other.supervised)
    assert data.patches.keys() == expected.patches.keys()
    for place, patches in data.patches.items():
        assert all(np.array_equal(a, b) for a, b in zip(patches, expected.patches[place], strict=True))


class Good:
    tokens, pixels = staticmethod(fake_tokens), staticmethod(fake_pixels)


@pytest.mark.parametrize("workers", [1, 3])
def test_neither_the_number_of_workers_nor_the_order_of_replies_changes_the_result(tmp_path, workers):
    samples = [7, 2, 9, 4, 0, 5]
    expected, _ = load(ThreadSource(Good(), 2), samples)
    with fake_pool(tmp_path, {"7": ["slow"], "9": ["slow"], "4": ["kill"]}, workers) as pool:
        data, counts = load(fake_source(pool), samples)
    assert_same_data(data, expected)
    assert (counts.samples, counts.worker_failures) == (len(samples), 1)
    assert data.bytes_read == counts.bytes_read == len(samples) * BYTES_PER_SAMPLE
    assert data.num_bytes == expected.num_bytes > 0


def test_what_a_worker_finds_is_raised_here_as_what_it_was(tmp_path):
    with fake_pool(tmp_path, {"1": ["data"], "2": ["unreachable"], "3": ["bug"]}) as pool:
        source = fake_source(pool)
        with pytest.raises(DataError, match="the picture is cut off"):
            read(source, 1)
        with pytest.raises(UnreachableError, match="the store does not answer"):
            read(source, 2)
        with pytest.raises(KeyeError, match="ZeroDivisionError: a bug") as caught:
            read(source, 3)
        assert type(caught.value) is KeyeError
        assert source.counts().worker_failures == 0


def test_a_sample_that_kills_workers_can_be_skipped(tmp_path):
    with fake_pool(tmp_path, {"4": ["kill", "kill"]}, workers=2) as pool:
        data, _ = load(fake_source(pool), [4, 1], skip_bad=True)
    assert [(s.sample, s.sample_id) for s in data.skipped] == [(4, "id4")]
    assert "was ended by SIGKILL" in data.skipped[0].reason
    assert data.rows[0].token_ids.tolist() == [9] * 16
    assert data.rows[1].token_ids[0] == 1000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_lost_between_samples_are_replaced(tmp_path, number):
    with fake_pool(tmp_path, {}, workers=2) as pool:
        source = fake_source(pool)
        load(source, [1, 2, 3, 4])
        for worker in pool.workers:
            os.kill(worker.pid, number)
        again = fake_source(pool)
        assert_is_sample(read(again, 5), 5)


def test_closing_does_not_wait_for_a_worker_that_hangs(tmp_path):
    with fake_pool(tmp_path, {"1": ["hang"]}, deadline_s=600.0) as pool:
        loader = ReplicaLoader(fake_source(pool), pad_id=9, skip_bad=False)
        reading = loader._pool.submit(loader._source.read, 1, fake_shape(1))
        while not (tmp_path / "tries1").exists():
            time.sleep(0.02)
        began_s = time.monotonic()
        loader.close()
        assert time.monotonic() - began_s < 10
        with pytest.raises(KeyeError, match="closed"):
            reading.result()
        # The pool goes on for others.
        assert_is_sample(read(fake_source(pool), 2), 2)


def test_a_program_that_does_not_start_is_said_to_and_blames_no_sample(tmp_path):
    pool = DecodeWorkers([fake_set(tmp_path, {})], LoaderConfig(workers=1), command=(sys.executable, "-c", "raise SystemExit(4)"))
    with pytest.raises(KeyeError, match="ended with code 4 before it was ready") as caught:
        read(fake_source(pool), 1)
    assert not isinstance(caught.value, DataError)
    pool.close()


def test_a_worker_that_finds_other_data_is_refused(tmp_path):
    with fake_pool(tmp_path, {}, fingerprint="another") as pool, pytest.raises(SettingsError, match="other data than the run began with"):
        read(fake_source(pool), 1)


PARENT = """
import sys, time
from pathlib import Path
from tests.unit.data.test_workers import fake_pool, fake_source, read
with fake_pool(Path(sys.argv[1]), {"1": [sys.argv[2]]}, workers=2, deadline_s=600.0) as pool:
    print(*(worker.pid for worker in pool.workers), flush=True)
    read(fake_source(pool), 1)
"""


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("deed", ["hang", "stop"])
def test_workers_end_with_their_parent_whatever_they_do(tmp_path, deed):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), deed], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    while not (tmp_path / "tries1").exists():
        time.sleep(0.02)
    assert all(is_alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    until_s = time.monotonic() + 5
    while any(is_alive(pid) for pid in pids) and time.monotonic() < until_s:
        time.sleep(0.02)
    assert not any(is_alive(pid) for pid in pids)


def test_a_worker_is_bound_to_its_parent_before_it_imports_what_takes_seconds():
    code = "import sys, megatron_keye.data.decode_worker; print(sorted({'torch', 'cv2', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
def test_real_workers_read_what_threads_read(indexed, tokenizer_folder, variant):
    given = load_config("debug").data
    config = given.model_copy(update={"tokenizer": str(tokenizer_folder), "seq_length_tokens": 8192})
    dataset = open_samples(str(indexed[variant]), load_tokenizer(tokenizer_folder, variant), variant, config)
    pool = DecodeWorkers([SampleSet(str(indexed[variant]), variant, config, dataset.fingerprint)], LoaderConfig(workers=1))
    here, there = ThreadSource(dataset, 2, dataset.bytes_read), WorkerSource(pool, 0, dataset.sample_id)
    samples = range(0, len(dataset), 3)
    assert {"image", "video"} <= {layout.kind for sample in samples for layout in dataset.layouts(sample)}
    for sample in samples:
        a, b = here.read(sample, dataset.shape(sample)), there.read(sample, dataset.shape(sample))
        assert np.array_equal(a.tokens.token_ids, b.tokens.token_ids)
        assert np.array_equal(a.tokens.supervised, b.tokens.supervised)
        assert all(np.array_equal(p, q) for p, q in zip(a.patches, b.patches, strict=True))
    assert here.counts() == there.counts()
    assert here.counts().bytes_read > 0
    has_loaded_torch = "libtorch" in Path(f"/proc/{pool.workers[0].pid}/maps").read_text()
    assert has_loaded_torch == (variant == "keye_vl_preview" or not has_numba()), "Preview's clips need it, others where numba is missing"
    pool.close()
