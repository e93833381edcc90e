"""Whole runs that load through worker processes or from a URL: the same losses and ledger as with threads from a folder."""

import os
import signal

import pytest

from megatron_keye.config.schema import StorageConfig, VideoConfig
from megatron_keye.data.indexing import index_folder, save_index
from megatron_keye.data.loader import ReplicaLoader
from megatron_keye.data.sources import ThreadSource
from megatron_keye.data.transport import CollectiveTransport
from megatron_keye.data.writing import plan_shards, write_shards
from megatron_keye.plan.cursor import Cursor
from megatron_keye.train.feed import Feed
from megatron_keye.train.placement import Planner
from megatron_keye.train.run_dir import RunDir
from tests.tiny import losses, on_ranks, read_lines, runtime_here, train
from tests.unit.data.http_server import serving


@pytest.fixture(scope="module")
def threads(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("threads")
    train("one", tiny.config(), path)
    return path


def ledger_steps(path):
    return [line for line in read_lines(RunDir(path).ledger) if "step" in line]


def assert_same_run(path, expected):
    assert losses(path) == losses(expected)
    assert ledger_steps(path) == ledger_steps(expected)


def bytes_read(path):
    return [line["bytes_read"] for line in read_lines(RunDir(path).metrics)]


def kill_a_worker(training, phase, finished):
    if phase == "step" and finished == 1:
        os.kill(training._loading.workers.workers[0].pid, signal.SIGKILL)


def test_a_run_whose_workers_are_killed_is_the_same_run(tiny, threads, tmp_path):
    config = tiny.config("data.loader.workers=2", "train.valid_every_steps=4")
    train("one", config, tmp_path, kill_a_worker)
    assert_same_run(tmp_path, threads)
    assert bytes_read(tmp_path) == bytes_read(threads)


def test_a_run_from_a_url_is_the_same_run(tiny, threads, tmp_path):
    with serving(tiny.folder) as (url, faults):
        faults.pattern = r"\.tar$"

        def fail_for_a_while(training, phase, finished):
            if phase == "step" and finished == 1:
                faults.fail_first = 5

        storage = (f"data.storage.cache={tmp_path / 'cache'}", "data.storage.first_pause_s=0.01", "data.storage.chunk_bytes=512")
        train("one", tiny.config(f"data.train={url}/train", "data.prefetch_steps=1", *storage), tmp_path / "run", fail_for_a_while)
        assert faults.fail_first == 0
    assert_same_run(tmp_path / "run", threads)


def test_a_run_with_media_at_web_addresses_is_the_same_run(tiny, threads, tmp_path):
    limits = StorageConfig(first_pause_s=0.01, private_networks=("127.0.0.0/8",))
    with serving(tiny.folder) as (url, faults):
        faults.pattern = "/media/"
        source, out = tmp_path / "web.jsonl", tmp_path / "web"
        source.write_text((tiny.folder / "train.jsonl").read_text().replace('"media/', f'"{url}/media/'))
        write_shards(source, out, plan_shards(source, 20_000, keep_web=True))
        made_of = (out, tiny.folder / "tokenizer", "keye_vl_1_5", VideoConfig())
        save_index(*made_of, index_folder(*made_of, storage=limits))
        faults.fail_first = 3
        storage = {"cache": tmp_path / "cache", "first_pause_s": 0.01, "private_networks": "[127.0.0.0/8]"}
        overrides = [f"data.storage.{name}={value}" for name, value in storage.items()]
        train("one", tiny.config(f"data.train={out}", *overrides), tmp_path / "run")
        assert faults.fail_first == 0
    assert losses(tmp_path / "run") == losses(threads)
    ids, expected = ([line["ids"] for line in ledger_steps(path) if "ids" in line] for path in (tmp_path / "run", threads))
    assert ids == expected and len(ids) == 6


def test_more_ranks_in_a_replica_read_no_more(tiny, threads, tmp_path):
    train("tp2", tiny.config(), tmp_path)
    assert bytes_read(tmp_path) == bytes_read(threads)
    assert min(bytes_read(tmp_path)) > 0
    metrics = read_lines(RunDir(tmp_path).metrics)
    pixels = [4 * line["visual_tokens"] * 588 for line in metrics]
    assert all(line["loader_bytes"] >= own for line, own in zip(metrics, pixels, strict=True))
    assert all(line["loader_bytes"] <= sum(pixels) + 100_000 for line in metrics)


class Noted(ThreadSource):
    """Writes down what is read, in order."""

    def __init__(self, samples):
        super().__init__(samples, threads=1)
        self.order = []

    def read(self, sample, shape):
        self.order.append(sample)
        return super().read(sample, shape)


def first_reads(config, tiny, steps_before):
    """Members of the first step after a resume, what was read first, and what had been read when the step came."""
    runtime, dataset = runtime_here(config), tiny.dataset(config)
    plan_at = Planner(config, 1).over(dataset.plan_data)
    cursor = Cursor()
    for _ in range(steps_before):
        _, cursor = plan_at(cursor)
    source = Noted(dataset)
    loader = ReplicaLoader(source, pad_id=0, skip_bad=False)
    transport = CollectiveTransport(runtime.groups.replica, runtime.device)
    feed = Feed(config, runtime.groups, plan_at, loader, transport, cursor, runtime.device)
    members = feed.next_step().plan.members
    feed.close()
    return sorted(members), sorted(source.order[: len(members)]), loader.counts.samples, len(source.order)


@pytest.mark.parametrize("steps_before", [0, 5])
def test_nothing_is_decoded_to_be_skipped(tiny, steps_before):
    """A run that goes on after some steps reads the samples of the next one first, as one that begins does."""
    config = tiny.config("data.lookahead.batches=4")
    ((members, first, counted, read),) = on_ranks("one", config, first_reads, tiny, steps_before)
    assert first == members
    assert counted == read <= len(members) * (1 + 1 + config.data.prefetch_steps)
