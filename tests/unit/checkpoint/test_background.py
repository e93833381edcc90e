"""A save in the background holds the state as it was when it began, and is whole or absent like any other."""

import threading
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from megatron_keye.checkpoint import store
from megatron_keye.checkpoint.background import BackgroundSave
from megatron_keye.checkpoint.host_copies import HostCopies
from megatron_keye.checkpoint.load import load_checkpoint
from megatron_keye.checkpoint.state import saved_parts
from megatron_keye.checkpoint.store import Keep, checkpoints, find_damage, save_checkpoint
from megatron_keye.errors import CheckpointError
from tests.unit.checkpoint.states import IDENTITY, all_equal, make_state, names, run_record, values

DISK_FULL = OSError(28, "No space left on device")


def begin(folder, state, step=2):
    return BackgroundSave(folder, state, run_record(step), IDENTITY, Keep(1), HostCopies())


@contextmanager
def held_back():
    """Writing waits until the event is set."""
    event = threading.Event()

    def write_tensors(*args):
        assert event.wait(timeout=30)
        return original(*args)

    original = store.write_tensors
    with patch("megatron_keye.checkpoint.store.write_tensors", write_tensors):
        yield event
        event.set()


def test_it_holds_the_state_as_it_was(tmp_path):
    state, expected = make_state(seed=1), values(make_state(seed=1))
    with held_back() as go_on:
        saving = begin(tmp_path, state)
        with torch.no_grad():
            for local in state.parameters:
                local.parameter.zero_()
        assert saving.is_writing
        assert checkpoints(tmp_path) == []
        go_on.set()
        path = saving.finish()
    assert not saving.is_writing
    assert path.name == "step_00000002"
    target = make_state(seed=2)
    load_checkpoint(path, target, IDENTITY)
    assert all_equal(values(target), expected)


def test_saves_one_after_another_share_their_memory(tmp_path):
    """Each holds the state of its own time."""
    copies = HostCopies()
    for step in (1, 2):
        saved = make_state(seed=step)
        path = BackgroundSave(tmp_path, saved, run_record(step), IDENTITY, Keep(2), copies).finish()
        target = make_state(seed=9)
        load_checkpoint(path, target, IDENTITY)
        assert all_equal(values(target), values(saved))


def test_copies_lie_in_one_block_that_is_kept():
    copies = HostCopies()
    first, second = (copies.make(saved_parts(make_state(seed=seed))) for seed in (1, 2))
    assert [part.data.data_ptr() for part in first] == [part.data.data_ptr() for part in second]
    assert len({part.data.untyped_storage().data_ptr() for part in first}) == 1
    assert all_equal([part.data for part in second], [part.data for part in saved_parts(make_state(seed=2))])


def test_the_old_checkpoint_stays_until_the_new_one_is_there(tmp_path):
    state = make_state(seed=1)
    save_checkpoint(tmp_path, state, run_record(1), IDENTITY, Keep(1))
    with held_back() as go_on:
        saving = begin(tmp_path, state)
        assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
        go_on.set()
        saving.finish()
    assert names(tmp_path) == ["step_00000002"]


@pytest.mark.parametrize("place", ["store.write_tensors", "host_copies._new_block", "store.write_text", "store.merge"])
def test_a_failure_is_said_by_finish_and_leaves_the_old_checkpoint(tmp_path, place):
    """Of writing, of copying (no memory), or of the commit."""
    state = make_state(seed=1)
    save_checkpoint(tmp_path, state, run_record(1), IDENTITY, Keep(1))
    with patch(f"megatron_keye.checkpoint.{place}", side_effect=DISK_FULL):
        saving = begin(tmp_path, state)
        with pytest.raises(CheckpointError, match="Step 2 could not be saved.*\n.*No space left"):
            saving.finish()
    assert names(tmp_path) == ["step_00000001"]
    assert find_damage(tmp_path / "step_00000001") == []


def test_a_save_that_was_given_up_is_cleared_away_by_the_next(tmp_path):
    with patch("megatron_keye.checkpoint.store.write_tensors", lambda *_: threading.Event().wait()):
        begin(tmp_path, make_state(seed=1))
        assert names(tmp_path) == [".step_00000002.incomplete"]
    begin(tmp_path, make_state(seed=1), step=4).finish()
    assert names(tmp_path) == ["step_00000004"]
