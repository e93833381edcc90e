"""Runs that save in the background, killed while they write, against one that stops for every save."""

import os
import signal
import threading
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_keye.checkpoint import store
from megatron_keye.checkpoint.background import BackgroundSave
from megatron_keye.checkpoint.host_copies import HostCopies
from megatron_keye.checkpoint.load import load_checkpoint
from megatron_keye.checkpoint.manifest import RunRecord
from megatron_keye.checkpoint.store import Keep, checkpoints, find_damage, save_checkpoint
from megatron_keye.errors import CheckpointError
from megatron_keye.parallel.launch import WorkerError, run_ranks
from megatron_keye.plan.ledger_proof import prove
from megatron_keye.train.ledger import run_files
from megatron_keye.train.run_dir import RunDir
from tests.dist.test_checkpoint import PeakMemory, frozen_state, private_bytes
from tests.tiny import losses, train

SETTINGS = ("train.steps=7", "train.save_every_steps=2", "train.keep_checkpoints=2")
SHARD_BYTES = 128 << 20


def steps_saved(path):
    return [int(folder.name.removeprefix("step_")) for folder in checkpoints(RunDir(path).checkpoints)]


def block_writes_of_step_4_and_die(training, phase, finished):
    """The files of the second save are never written; both ranks are killed two steps later."""
    if (phase, finished) == ("save", 4) and not training.history.is_saving:
        patch.object(store, "write_tensors", lambda *_: threading.Event().wait()).start()
    if (phase, finished) == ("step", 5):
        assert training.history.is_writing
        assert steps_saved(training.run_dir.path) == [2]
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_last_whole_checkpoint(tiny, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    expected = train("dp2", tiny.config(*SETTINGS), straight)
    config = tiny.config(*SETTINGS, "train.async_save=true", "train.keep_every_steps=4")
    with pytest.raises(WorkerError):
        train("dp2", config, killed, block_writes_of_step_4_and_die)
    assert steps_saved(killed) == [2]
    weights = train("dp2", config, killed)
    assert steps_saved(straight) == [6, 7]
    assert steps_saved(killed) == [4, 6, 7], "multiples of 4 are kept"
    assert [find_damage(path) for path in checkpoints(RunDir(killed).checkpoints)] == [[], [], []]
    assert losses(killed) == losses(straight)
    assert RunDir(killed).ledger.read_text() == RunDir(straight).ledger.read_text()
    assert prove([run_files(killed)]).steps == 7
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def stop_at_3(training, phase, finished):
    if (phase, finished) == ("step", 3):
        (training.run_dir.path / "STOP").touch()


def test_stop_waits_for_the_checkpoint_and_the_clock_asks_for_some(tiny, tmp_path):
    """Every step is overdue by a clock of a microsecond."""
    config = tiny.config(
        *SETTINGS, "train.async_save=true", "train.save_every_steps=100", "train.save_every_s=1e-6", "train.keep_checkpoints=9"
    )
    train("dp2", config, tmp_path, stop_at_3)
    assert steps_saved(tmp_path) == [1, 2, 3, 4]
    assert not list(RunDir(tmp_path).checkpoints.glob(".*"))


def fail_on_rank_1(folder):
    state = frozen_state(1000)
    save_checkpoint(folder, state, RunRecord(1, "", "", "", {}), {}, Keep(1))
    if dist.get_rank() == 1:
        patch.object(store, "write_tensors", side_effect=OSError(28, "No space left on device")).start()
    saving = BackgroundSave(folder, state, RunRecord(2, "", "", "", {}), {}, Keep(1), HostCopies())
    with pytest.raises(CheckpointError) as error:
        saving.finish()
    return str(error.value)


def test_one_rank_that_cannot_write_is_an_error_on_all(tmp_path):
    for message in run_ranks(2, fail_on_rank_1, tmp_path, prepare=lambda: None, timeout_s=30):
        assert "rank 1: OSError: [Errno 28] No space left on device" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def measure_memory(folder):
    """Peak memory of two saves in the background beyond what the state itself takes, as a part of the rank's own shard."""
    state = frozen_state(2 * SHARD_BYTES // 4)
    before = private_bytes()
    with PeakMemory() as memory:
        copies = HostCopies()
        for step in (1, 2):
            path = BackgroundSave(folder, state, RunRecord(step, "", "", "", {}), {}, Keep(1), copies).finish()
    load_checkpoint(path, state, {})
    return (memory.peak - before) / SHARD_BYTES


def test_saves_in_the_background_need_one_copy_of_the_shard(tmp_path):
    for peak in run_ranks(2, measure_memory, tmp_path, prepare=lambda: None):
        assert 0.9 < peak < 1.5
