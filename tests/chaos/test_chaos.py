"""Runs that are killed, stopped and starved of disk, against ones that were left alone; see `docs/chaos.md`."""

import os
import signal
import subprocess
import sys

import pytest

from tests.chaos.board import Board
from tests.chaos.campaign import run_campaign
from tests.chaos.faults import ArrivalOrderTraining, FrontierTraining
from tests.chaos.life import ChaosError, processes
from tests.chaos.scene import REFERENCE_LAYOUT, STEPS, set_scene
from tests.chaos.schedule import Disturbance, Life, Moment, schedule

SEED = 3


@pytest.fixture(scope="module")
def board():
    return Board()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, board):
    return set_scene(tmp_path_factory.mktemp("mixed"), board)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, board):
    return set_scene(tmp_path_factory.mktemp("alone"), board, mixed=False)


def killed_in(phase, after_steps, layout=REFERENCE_LAYOUT, **life):
    """A life whose main rank is killed as soon as it is in `phase` after so many steps."""
    return Life(layout, disturbances=(Disturbance("kill_rank", Moment(0.0, phase, after_steps)),), **life)


def quiet(number, report):
    pass


def test_random_violence_leaves_no_trace(mixed, board, tmp_path):
    """Six random lives. A failure names the one that it followed on."""
    report = run_campaign(mixed, schedule(SEED, 6), tmp_path, board, quiet)
    assert report.kills and report.num_restarts


def test_restarts_at_the_beginning_a_window_edge_and_an_epoch_end_and_three_in_a_row(alone, board, tmp_path):
    """Bit for bit, since the layout stays the same. Windows have 3 steps, the epoch 12, and every second step is saved."""
    lives = [killed_in("setup", 0), killed_in("encode", 1), killed_in("decoder", 1, prefetch_steps=0)]
    lives += [killed_in("decoder", 7), killed_in("load", 7, prefetch_steps=3), killed_in("optimizer", 1), killed_in("save", 2)]
    lives.append(killed_in("rename", 2))
    report = run_campaign(alone, lives, tmp_path, board, quiet)
    assert len(report.kills) == len(lives)
    # The last one may have come after the rename.
    assert report.restarts in ([[0, 0, 0, 6, 12, 12, 12, last]] for last in (12, STEPS))
    assert report.most_in_a_row >= 3
    assert alone.epoch_starts == {12}
    assert report.worst_loss_difference == 0.0


def test_kills_while_a_checkpoint_is_written_in_the_background(mixed, board, tmp_path):
    """A save of every second step is under way when the step after it runs: the first is lost, and then the second but not the first."""
    lives = [killed_in("encode", after_steps, async_save=True) for after_steps in (2, 4)]
    report = run_campaign(mixed, lives, tmp_path, board, quiet)
    assert report.kills_while_writing == 2
    assert report.restarts == [[0, 2]]


@pytest.mark.parametrize("room_bytes", [0, 64 << 10])
def test_a_full_disk_ends_the_run_with_a_clear_error_and_it_goes_on_when_there_is_room(mixed, board, tmp_path, room_bytes):
    full = Disturbance("fill_disk", Moment(0.0, "load", 2), room_bytes=room_bytes)
    report = run_campaign(mixed, [Life(REFERENCE_LAYOUT, disturbances=(full,))], tmp_path, board, quiet)
    assert len(report.strikes) == report.num_restarts == 1


def test_state_that_is_taken_where_the_loader_has_come_to_is_found(mixed, board, tmp_path):
    with pytest.raises(ChaosError, match=r"run000, after 2 lives .* step 2, slot 0: the id is .*, that of the undisturbed run "):
        run_campaign(mixed, [killed_in("decoder", 3)], tmp_path, board, quiet, FrontierTraining)


def test_batches_that_are_filled_in_the_order_of_arrival_are_found(mixed, board, tmp_path):
    with pytest.raises(ChaosError, match=r"step \d+: the place of sample \w+ held other tokens or pixels"):
        run_campaign(mixed, [killed_in("decoder", 3, "one")], tmp_path, board, quiet, ArrivalOrderTraining)


def test_processes_are_seen_until_they_have_ended():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        (seen,) = [process for process in processes() if process.pid == child.pid]
        assert seen.parent == os.getpid()
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert child.pid not in [process.pid for process in processes()]
