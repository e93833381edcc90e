"""Whole runs on samples of an unusual kind: text alone, nothing to learn, pictures that cannot be read."""

from itertools import pairwise

import pytest

from megatron_keye.data.mixture import ONLY_SOURCE
from megatron_keye.train.run_dir import RunDir
from tests.tiny import (
    HookedTraining,
    ask,
    image_part,
    no_hook,
    on_ranks,
    planned,
    read_lines,
    run_as,
    steps_of,
    tiny_record,
    train,
    write_part,
)  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny):
    """A set of texts alone, one of them without an answer to learn."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "tokenizer").symlink_to(tiny.folder / "tokenizer")
    question = {"id": "question", "messages": [{"role": "user", "content": "is anybody there?"}]}
    return write_part(folder, "train", [tiny_record(2), tiny_record(8), question, tiny_record(14)])


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_steps_of_text_alone_train_and_a_step_without_answers_commits(tiny, texts, tmp_path, layout):
    """With one sample a step a replica has none, and one step has nothing to learn from: no weight moves, the cursor does."""
    config = tiny.config(f"data.train={texts}", "data.global_batch_samples=1", "train.steps=4", "optimizer.warmup_steps=0")

    def hook(training, phase, finished):
        if phase == "step" and training.runtime.is_main:
            weight = next(training.model.chunks[0].parameters())
            with (tmp_path / "sums").open("a") as file:
                file.write(f"{weight.double().sum().item()!r}\n")

    train(layout, config, tmp_path / "run", hook)
    metrics, ledger = read_lines(RunDir(tmp_path / "run").metrics), steps_of(tmp_path / "run")
    (empty,) = [line["step"] for line in metrics if line["supervised_tokens"] == 0]
    assert [line.updated for line in ledger] == [step != empty for step in range(4)]
    assert metrics[empty]["loss"] == 0.0
    assert {line["visual_tokens"] for line in metrics} == {0}
    assert sorted(line.samples for line in ledger) == [(0,), (1,), (2,), (3,)]
    sums = [float(line) for line in (tmp_path / "sums").read_text().splitlines()]
    assert [a == b for a, b in pairwise(sums)] == [step == empty for step in range(3)]


def spoil_pictures(shard, count):
    """Changes one byte of each of the first `count` PNG pictures of a tar."""
    data = bytearray(shard.read_bytes())
    at = -1
    for _ in range(count):
        at = data.index(b"\x89PNG", at + 1)
        data[at + 60] ^= 0xFF
    shard.write_bytes(data)


@pytest.fixture
def spoiled(tmp_path, tiny):
    """A set of 8 pictures of which 3 are damaged after indexing."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    (folder / "tokenizer").symlink_to(tiny.folder / "tokenizer")
    (folder / "media").symlink_to(tiny.folder / "media")
    messages = [{"role": "user", "content": [image_part(0)]}, {"role": "assistant", "content": "yes"}]
    records = [{"id": f"p{number}", "messages": messages} for number in range(8)]
    out = write_part(folder, "train", records)
    spoil_pictures(next(iter(sorted(out.glob("*.tar")))), 3)
    return out


def test_samples_that_cannot_be_read_are_skipped_and_listed_wherever_they_were(tiny, spoiled, tmp_path, capfd):
    """Those of every replica: each appears with its reason in the ledger, in the metrics and on the terminal."""
    config = tiny.config(f"data.train={spoiled}", "data.global_batch_samples=8", "data.bad_sample=skip", "train.steps=1")
    train("dp2", config, tmp_path / "run")
    (line,) = steps_of(tmp_path / "run")
    assert [skipped.sample for skipped in line.skipped] == [sample for sample in line.samples if sample < 3], "in the order of slots"
    assert sorted(skipped.id for skipped in line.skipped) == ["p0", "p1", "p2"]
    assert all("do not match their sha256" in skipped.reason for skipped in line.skipped)
    assert read_lines(RunDir(tmp_path / "run").metrics)[0]["skipped_samples"] == 3
    assert "step 1: left out p1: " in capfd.readouterr().err


def test_too_many_skipped_samples_end_the_run_on_all_ranks_whatever_restarts_lie_between(tiny, spoiled, tmp_path):
    """One sample a step, three of eight bad, two allowed: counts go on from the ledger at every start."""
    budget = ("data.bad_sample=skip", "data.bad_sample_budget.max_count=2", "data.bad_sample_budget.max_fraction=0.0")
    config = tiny.config(f"data.train={spoiled}", "data.global_batch_samples=1", "train.steps=8", "train.save_every_steps=1", *budget)
    path = tmp_path / "run"
    plans = planned(tiny.dataset(config), config, 8)
    second, third = [plan.step for plan in plans if plan.members[0] < 3][1:]
    assert on_ranks("dp2", config, run_as, HookedTraining, path, ask("STOP", second)) == [None, None]
    (path / "STOP").unlink()
    first, other = on_ranks("dp2", config, run_as, HookedTraining, path, no_hook)
    assert first[:2] == ("DataError", 65)
    assert (
        f"3 of {third + 1} samples of source '{ONLY_SOURCE}' could not be read, and data.bad_sample_budget allows 2, or 0 % of them"
        in first[2]
    )
    assert "do not match their sha256" in first[2] and "repair the data" in first[2]
    assert other[:2] == ("PeerError", 65)
    assert len(steps_of(path)) == third + 1
