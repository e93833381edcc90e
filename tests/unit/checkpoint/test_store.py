"""A save is whole or absent, the newest good checkpoint is found, and a wrong one is refused with everything said at once."""

import resource
import shutil
import signal
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.checkpoint.load import load_checkpoint, load_latest, load_weights
from megatron_keye.checkpoint.state import TrainingState
from megatron_keye.checkpoint.store import Keep, checkpoints, find_damage, latest, latest_good, save_checkpoint
from megatron_keye.errors import CheckpointError
from megatron_keye.model.names import encoder_pieces
from tests.unit.checkpoint.states import IDENTITY, all_equal, make_state, names, run_record, values


@pytest.fixture
def state() -> TrainingState:
    return make_state(seed=1)


@pytest.fixture
def other_state() -> TrainingState:
    return make_state(seed=2)


def test_what_is_loaded_is_what_was_saved(tmp_path, state, other_state):
    path = save_checkpoint(tmp_path / "run", state, run_record(7), IDENTITY, keep=Keep(2))
    assert path == tmp_path / "run" / "step_00000007"
    assert not all_equal(values(state), values(other_state))
    loaded = load_checkpoint(path, other_state, IDENTITY)
    assert all_equal(values(state), values(other_state))
    assert loaded.run == run_record(7)


def test_weights_alone(tmp_path, state):
    path = save_checkpoint(tmp_path, state, run_record(7), IDENTITY, keep=Keep(1))
    a, b = torch.zeros(5, 3, 2, dtype=torch.float64), torch.zeros(9)
    assert load_weights(path, encoder_pieces({"visual.a.weight": a, "mlp_AR.norm.bias": b})) == run_record(7)
    assert all_equal([a.float(), b.bfloat16()], values(state))


def test_only_the_newest_are_kept(tmp_path, state):
    for step in (1, 2, 30, 100000000):
        save_checkpoint(tmp_path, state, run_record(step), IDENTITY, keep=Keep(2))
    assert names(tmp_path) == ["step_00000030", "step_100000000"]
    assert latest(tmp_path).name == "step_100000000"


def test_saving_a_step_again_replaces_it(tmp_path, state, other_state):
    save_checkpoint(tmp_path, state, run_record(6), IDENTITY, keep=Keep(2))
    save_checkpoint(tmp_path, state, run_record(7), IDENTITY, keep=Keep(2))
    save_checkpoint(tmp_path, state, run_record(7), IDENTITY, keep=Keep(2))
    path = save_checkpoint(tmp_path, other_state, run_record(7), IDENTITY, keep=Keep(2))
    assert names(tmp_path) == ["step_00000006", "step_00000007_2"]
    load_checkpoint(path, state, IDENTITY)
    assert all_equal(values(state), values(other_state))


def test_going_back_never_costs_the_new_checkpoint(tmp_path, state):
    for step in (100, 200):
        save_checkpoint(tmp_path, state, run_record(step), IDENTITY, keep=Keep(2))
    flip_a_byte(tmp_path / "step_00000200")
    save_checkpoint(tmp_path, state, run_record(150), IDENTITY, keep=Keep(1))
    assert names(tmp_path) == ["step_00000150", "step_00000200"]
    assert latest_good(tmp_path)[0].name == "step_00000150"
    save_checkpoint(tmp_path, state, run_record(200), IDENTITY, keep=Keep(1))
    assert names(tmp_path) == ["step_00000200_1"]


@pytest.mark.parametrize("place", ["write_tensors", "write_text", "merge", "flush_folder"])
def test_a_save_that_fails_leaves_the_old_checkpoint_alone(tmp_path, state, place):
    save_checkpoint(tmp_path, state, run_record(1), IDENTITY, keep=Keep(1))
    with (
        patch(f"megatron_keye.checkpoint.store.{place}", side_effect=OSError(28, "No space left on device")),
        pytest.raises(CheckpointError, match="No space left"),
    ):
        save_checkpoint(tmp_path, state, run_record(2), IDENTITY, keep=Keep(1))
    assert names(tmp_path) == ["step_00000001"]
    assert find_damage(tmp_path / "step_00000001") == []


@pytest.mark.parametrize("place", ["write_tensors", "write_text", "flush_folder", "Path.rename", "_remove", "shutil.rmtree"])
def test_a_crash_during_a_save_leaves_a_good_checkpoint(tmp_path, state, place):
    """A crash is an exception that nothing handles: whatever is on the disk at that moment stays."""

    class Crash(BaseException):
        pass

    save_checkpoint(tmp_path, state, run_record(1), IDENTITY, keep=Keep(1))
    with patch(f"megatron_keye.checkpoint.store.{place}", side_effect=Crash), pytest.raises(Crash):
        save_checkpoint(tmp_path, state, run_record(2), IDENTITY, keep=Keep(1))
    for path in checkpoints(tmp_path):
        assert find_damage(path) == []
    assert latest_good(tmp_path)[0] is not None
    save_checkpoint(tmp_path, state, run_record(3), IDENTITY, keep=Keep(1))
    assert names(tmp_path) == ["step_00000003"], "what the crash left behind is removed"


def test_a_file_that_may_not_grow_is_an_error_and_not_a_checkpoint(tmp_path, state):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save_checkpoint(tmp_path, state, run_record(2), IDENTITY, keep=Keep(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []


def flip_a_byte(path):
    data = bytearray((path / "rank_00000.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "rank_00000.safetensors").write_bytes(data)


DAMAGE = {
    "flipped": flip_a_byte,
    "truncated": lambda path: (path / "rank_00000.safetensors").write_bytes(b"123"),
    "no shard": lambda path: (path / "rank_00000.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "empty manifest": lambda path: (path / "manifest.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, state, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, state, run_record(step), IDENTITY, keep=Keep(2))
    damage(tmp_path / "step_00000002")
    target = make_state(seed=3)
    before = values(target)
    with pytest.raises(CheckpointError, match="step_00000002/(rank_00000.safetensors|manifest.json)"):
        load_checkpoint(tmp_path / "step_00000002", target, IDENTITY)
    assert all_equal(values(target), before), "nothing is loaded by half"
    loaded = load_latest(tmp_path, target, IDENTITY)
    assert loaded.run.step == 1
    assert len(loaded.passed_over) == 1
    assert "step_00000002" in loaded.passed_over[0]
    damage(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match="Every checkpoint"):
        load_latest(tmp_path, target, IDENTITY)


def test_checkpoints_of_some_steps_are_kept_for_good(tmp_path, state):
    for step in range(1, 9):
        save_checkpoint(tmp_path, state, run_record(step), IDENTITY, Keep(2, every_steps=3))
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "6", "7", "8"]


@given(st.sets(st.integers(1, 60)), st.integers(1, 5), st.integers(0, 7))
def test_the_newest_and_the_multiples_stay(steps, newest, every_steps):
    *older, latest_step = sorted(steps | {61})
    removed = {older[number] for number in Keep(newest, every_steps).superseded(older)}
    wanted = {*older, latest_step} - removed
    multiples = {step for step in older if every_steps and step % every_steps == 0}
    assert wanted == set(sorted({*older, latest_step})[-newest:]) | multiples


def test_nothing_to_resume_from(tmp_path, state):
    assert load_latest(tmp_path / "absent", state, IDENTITY) is None
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="not a folder"):
        load_checkpoint(tmp_path / "absent", state, IDENTITY)


def test_another_model_is_refused_with_every_difference(tmp_path, state):
    path = save_checkpoint(tmp_path, state, run_record(1), IDENTITY, keep=Keep(1))
    target = make_state(seed=3)
    before = values(target)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, target, {**IDENTITY, "decoder.num_layers": 8, "tokenizer": "xyz"})
    assert "decoder.num_layers is 8 here, 4 in the checkpoint" in str(error.value)
    assert "tokenizer is 'xyz' here" in str(error.value)
    assert all_equal(values(target), before)


def test_tensors_of_other_names_and_shapes_are_refused(tmp_path, state):
    path = save_checkpoint(tmp_path, state, run_record(1), IDENTITY, keep=Keep(1))
    with pytest.raises(CheckpointError) as error:
        load_weights(path, encoder_pieces({"visual.b": torch.zeros(2), "visual.a.weight": torch.zeros(5, 6)}))
    assert "visual.b is not in the checkpoint" in str(error.value)
    assert "visual.a.weight is [5, 6] here, [5, 3, 2] in the checkpoint" in str(error.value)


def test_a_copied_checkpoint_is_as_good(tmp_path, state, other_state):
    path = save_checkpoint(tmp_path, state, run_record(1), IDENTITY, keep=Keep(1))
    shutil.copytree(path, tmp_path / "elsewhere")
    load_checkpoint(tmp_path / "elsewhere", other_state, IDENTITY)
    assert all_equal(values(state), values(other_state))
