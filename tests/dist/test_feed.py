"""The data path between processes: who reads, what arrives where, and that a failure anywhere ends all ranks at once."""

import sys
import time

import numpy as np
import pytest
import torch.distributed as dist

from megatron_keye.data import dataset as dataset_module
from megatron_keye.data.loader import ReplicaLoader
from megatron_keye.data.sources import ThreadSource
from megatron_keye.data.transport import CollectiveTransport
from megatron_keye.errors import DataError
from megatron_keye.plan.context_split import local_tokens
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.digest import PLAN_COLUMNS
from megatron_keye.train.consensus import agree, failing_together, raise_together
from megatron_keye.train.feed import Feed, count_supervised
from megatron_keye.train.loop import Training
from megatron_keye.train.placement import Planner
from megatron_keye.train.run_dir import RunDir
from tests.tiny import on_ranks, runtime_here, with_layout

PAD = 0
LIMIT_S = 10.0
NUM_STEPS = 3


def forbid_reading(event, arguments):
    """An audit hook: this process opens no shard."""
    if event == "open" and str(arguments[0]).endswith(".tar"):
        raise AssertionError(f"opened {arguments[0]}")


def forbid_decoding(*args):
    raise AssertionError("decoded a medium")


def make_loader(dataset, threads):
    return ReplicaLoader(ThreadSource(dataset, threads, dataset.bytes_read), pad_id=PAD, skip_bad=False)


def make_feed(config, tiny, runtime, dataset=None):
    dataset = dataset or tiny.dataset(config)
    loader = make_loader(dataset, threads=2) if runtime.groups.is_leader else None
    planner = Planner(config, runtime.groups.grid.dp)
    transport = CollectiveTransport(runtime.groups.replica, runtime.device)
    return Feed(config, runtime.groups, planner.over(dataset.plan_data), loader, transport, Cursor(), runtime.device)


def rank_steps(config, tiny):
    """What this rank got in the first steps, as numpy; only leaders may open shards and decode."""
    runtime = runtime_here(config)
    groups = runtime.groups
    if not groups.is_leader:
        sys.addaudithook(forbid_reading)
        dataset_module.load_patches = forbid_decoding
    feed = make_feed(config, tiny, runtime)
    place = {axis: groups.coordinate(axis) for axis in ("tp", "cp", "pp", "dp")} | {"replica_rank": groups.replica_rank}
    steps = []
    for _ in range(NUM_STEPS):
        fed = feed.next_step()
        microbatches = [tuple(None if t is None else t.numpy() for t in (m.token_ids, m.labels, m.weights)) for m in fed.batch.microbatches]
        patches = [r.patches.numpy() for r in fed.batch.rounds]
        steps.append((fed.plan.members, tuple(fed.plan.replicas), microbatches, patches, fed.batch.num_supervised))
    feed.close()
    return place, steps


def expected_row(row, dataset):
    """Token ids of a row, and its labels where there is one to learn, from the samples themselves."""
    ids, labels = np.full(row.num_tokens, PAD), np.full(row.num_tokens, -1)
    for document in row.documents:
        sample = dataset.tokens(document.sample)
        ids[document.start : document.start + len(sample.token_ids)] = sample.token_ids
        for at in np.flatnonzero(sample.supervised):
            labels[document.start + at - 1] = sample.token_ids[at]
    return ids, labels


def check_rank(config, dataset, place, step):
    _, replicas, microbatches, rounds, supervised = step
    replica = replicas[place["dp"]]
    is_first, is_last = place["pp"] == 0, place["pp"] == config.parallel.pp - 1
    for row, (token_ids, labels, weights) in zip(replica.rows, microbatches, strict=True):
        expected_ids, expected_labels = expected_row(row, dataset)
        mine = local_tokens(row.cu_seqlens, config.parallel.cp, place["cp"])
        assert (token_ids is not None, labels is not None, weights is not None) == (is_first, is_last, is_last)
        if is_first:
            np.testing.assert_array_equal(token_ids, expected_ids[None, mine])
        if is_last:
            np.testing.assert_array_equal(np.where(weights > 0, labels, -1), expected_labels[mine])
            assert set(np.unique(weights)) <= {0, 1}
    for number, patches in enumerate(rounds):
        own = [task for task in replica.tasks if (task.encoder, task.round) == (place["replica_rank"], number)]
        segments = [dataset.pixels(replica.rows[t.microbatch].documents[t.document].sample)[t.segment] for t in own]
        np.testing.assert_array_equal(patches, np.concatenate([np.zeros((0, 588), np.uint8), *segments]))
    every_row = [row for share in replicas for row in share.rows]
    assert supervised == sum(int((expected_row(row, dataset)[1] >= 0).sum()) for row in every_row)


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "cp2", "dp2", "pp4", "tp2dp2"])
def test_every_rank_gets_its_part_and_only_leaders_read(tiny, layout):
    config = tiny.config("data.global_batch_samples=6", "encode.patches_per_round=80")
    dataset = tiny.dataset(config)
    ranks = on_ranks(layout, config, rank_steps, tiny)
    in_layout = with_layout(config, layout)
    for place, steps in ranks:
        for step in steps:
            check_rank(in_layout, dataset, place, step)
    taken = [[members for members, *_ in steps] for _, steps in ranks]
    planner, cursor = Planner(config, 1), Cursor()
    for number in range(NUM_STEPS):
        plan, cursor = planner.over(dataset.plan_data)(cursor)
        assert {members[number] for members in taken} == {plan.members}


def train_with_leaders_reading_alone(config, path):
    runtime = runtime_here(config)
    if not runtime.groups.is_leader:
        sys.addaudithook(forbid_reading)
        dataset_module.load_patches = forbid_decoding
    run_dir = RunDir(path)
    run_dir.create()
    Training(config, run_dir, runtime).run()


def test_a_whole_run_with_validation_reads_on_leaders_alone(tiny, tmp_path):
    on_ranks("tp2dp2", tiny.config("train.steps=2", "train.valid_every_steps=1"), train_with_leaders_reading_alone, tmp_path)
    assert RunDir(tmp_path).is_done


def test_the_sample_set_has_several_rounds_and_ranks_without_pictures(tiny):
    """Else the test above would show little."""
    config = tiny.config("data.global_batch_samples=6", "encode.patches_per_round=80")
    plan, _ = Planner(config, 1).over(tiny.dataset(config).plan_data)(Cursor())
    assert plan.replicas[0].num_rounds > 1
    one = tiny.config("data.global_batch_samples=1")
    planner, cursor, tasks = Planner(one, 1), Cursor(), []
    for _ in range(6):
        plan, cursor = planner.over(tiny.dataset(one).plan_data)(cursor)
        tasks.append(len(plan.replicas[0].tasks))
    assert 0 in tasks


def outcome(function):
    """How it ended: (name of the error, exit code, message, seconds)."""
    began_s = time.monotonic()
    try:
        function()
    except Exception as error:
        return type(error).__name__, getattr(error, "exit_code", None), str(error), time.monotonic() - began_s
    return None


def failing_steps(config, tiny, failing_rank, error):
    """Steps on a set of which one sample of the second step cannot be decoded on `failing_rank`."""
    runtime = runtime_here(config)
    dataset = tiny.dataset(config)
    plan, cursor = Planner(config, runtime.groups.grid.dp).over(dataset.plan_data)(Cursor())
    plan, _ = Planner(config, runtime.groups.grid.dp).over(dataset.plan_data)(cursor)
    bad = {document.sample for row in plan.replicas[runtime.groups.coordinate("dp")].rows for document in row.documents}
    pixels = dataset.pixels

    def failing_pixels(sample):
        if sample in bad and runtime.groups.rank == failing_rank:
            raise error
        return pixels(sample)

    dataset.pixels = failing_pixels
    feed = make_feed(config, tiny, runtime, dataset)
    feed.next_step()
    ended = outcome(feed.next_step)
    feed.close()
    return ended


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(DataError("p7 is cut off"), 65, "p7 is cut off"), (ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug")],
)
def test_a_failure_on_one_leader_ends_all_ranks_with_its_words(tiny, error, code, words):
    config = tiny.config("data.global_batch_samples=8")
    ends = on_ranks("tp2dp2", config, failing_steps, tiny, 2, error)
    assert ends[2][0] == type(error).__name__
    for rank in (0, 1, 3):
        name, exit_code, message, _ = ends[rank]
        assert (name, exit_code, message) == ("PeerError", code, f"rank 2 failed: {words}")
    assert all(seconds < LIMIT_S for *_, seconds in ends)


def mismatching_steps(config, tiny):
    """Rank 1 has other settings than it should."""
    runtime = runtime_here(config)
    seed = runtime.groups.rank
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    feed = make_feed(other, tiny, runtime)
    ended = outcome(feed.next_step)
    feed.close()
    return ended


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp4"])
def test_ranks_that_plan_differently_all_end(tiny, layout):
    ends = on_ranks(layout, tiny.config(), mismatching_steps, tiny)
    # Each is compared with rank 0; of those that differ, the lowest speaks.
    assert ends[1][0] == "PlanError"
    assert {name for number, (name, *_) in enumerate(ends) if number != 1} <= {"PeerError", "PlanError"}
    assert all(code == 65 and "the ranks derived different step plans: sample " in message for _, code, message, _ in ends)


def slow_close(config, tiny):
    """How long closing takes while a leader decodes a step of slow samples."""
    runtime = runtime_here(config)
    dataset = tiny.dataset(config)
    pixels = dataset.pixels

    def slow_pixels(sample):
        time.sleep(0.5)
        return pixels(sample)

    dataset.pixels = slow_pixels
    feed = make_feed(config, tiny, runtime, dataset)
    time.sleep(0.2)
    began_s = time.monotonic()
    feed.close()
    return time.monotonic() - began_s


def test_closing_waits_for_no_more_than_the_samples_at_hand(tiny):
    """24 samples at 2 threads would take 6 s."""
    (seconds,) = on_ranks("one", tiny.config("data.global_batch_samples=24"), slow_close, tiny)
    assert seconds < 2.0


def raise_own(config, messages):
    """Each rank fails with its message, or not at all."""
    runtime = runtime_here(config)
    message = messages[dist.get_rank()]
    failure = None if message is None else DataError(message)
    return outcome(lambda: raise_together(failure, runtime.groups.world, runtime.device))


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ((None, None), (None, None)),
        ((None, "x"), ("PeerError", "DataError")),
        (("x", "x"), ("DataError", "PeerError")),
        (("x", "y"), ("DataError", "DataError")),
        (("ü" * 5000, None), ("DataError", "PeerError")),
    ],
)
def test_every_different_failure_is_raised_once(tiny, messages, names):
    ends = on_ranks("dp2", tiny.config(), raise_own, messages)
    assert tuple(end and end[0] for end in ends) == names
    for end, message in zip(ends, messages, strict=True):
        if end is not None and end[0] == "DataError":
            assert end[2] == message


def fail_in_a_phase(config):
    runtime = runtime_here(config)

    def phase():
        with failing_together(runtime.groups.world, runtime.device):
            if runtime.groups.rank == 1:
                raise OSError("disk full")

    return outcome(phase)


def test_whatever_fails_in_a_phase_without_collectives_fails_everywhere(tiny):
    first, second = on_ranks("dp2", tiny.config(), fail_in_a_phase)
    assert first[:3] == ("PeerError", 1, "rank 1 failed: OSError: disk full")
    assert second[0] == "OSError"


def test_the_count_of_supervised_tokens_leaves_out_first_tokens(tiny):
    """A document's first token is nobody's label, wherever it stands in the row."""
    config = tiny.config("data.global_batch_samples=24")
    dataset = tiny.dataset(config)
    plan, _ = Planner(config, 1).over(dataset.plan_data)(Cursor())
    loader = make_loader(dataset, threads=1)
    data = loader.load(plan.replicas[0])
    loader.close()
    assert count_supervised(plan.replicas[0], data) == sum(int(dataset.tokens(sample).supervised[1:].sum()) for sample in plan.members)


def agree_with_one_number_changed(config, rank, slot, column):
    """A plan of three samples, in which `rank` has another number than the others."""
    runtime = runtime_here(config)
    table = np.arange(3 * len(PLAN_COLUMNS)).reshape(3, -1)
    table[slot, column] += 100 * (runtime.groups.rank == rank)
    return outcome(lambda: agree(table, (1,), None, runtime.groups.world, runtime.device))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_with_different_plans_stop_and_name_the_first_difference(tiny, rank):
    column = PLAN_COLUMNS.index("replica")
    first, second = on_ranks("dp2", tiny.config(), agree_with_one_number_changed, rank, 1, column)
    number = len(PLAN_COLUMNS) + column
    here, there = (number, number + 100) if rank == 0 else (number + 100, number)
    assert (second[0], first[0]) == ("PlanError", "PeerError")
    assert f"sample 1 of the step has replica {here} here and {there} there (rank 0)" in second[2]
    assert second[2] in first[2]
