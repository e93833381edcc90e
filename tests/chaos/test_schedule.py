"""The schedule is a function of its seed, and what it draws can be carried out; and the command line."""

from collections import Counter

import pytest

from megatron_keye.train.layouts import parse_layout
from tests.chaos.__main__ import main
from tests.chaos.board import MAX_RANKS
from tests.chaos.schedule import AIMED, FATAL, HARMLESS, LAYOUTS, schedule

LIVES = schedule(0, 2000)


def test_a_seed_gives_the_same_lives_and_a_shorter_schedule_is_the_beginning_of_a_longer():
    assert schedule(7, 50) == schedule(7, 50)
    assert schedule(7, 20) == schedule(7, 50)[:20]
    assert schedule(8, 20) != schedule(7, 20)


def test_only_the_last_disturbance_of_a_life_is_fatal():
    for life in LIVES:
        *before, last = [disturbance.kind for disturbance in life.disturbances]
        assert last in FATAL
        assert set(before) <= set(HARMLESS)


def test_workers_are_disturbed_only_where_there_are_some():
    for life in LIVES:
        assert life.workers or not any(disturbance.kind.endswith("worker") for disturbance in life.disturbances)


def test_a_life_that_fills_the_disk_has_no_workers():
    filling = [life for life in LIVES if life.fills_disk]
    assert filling
    assert not any(life.workers for life in filling)


def test_moments_are_uniform_over_the_life_or_lie_in_a_phase():
    moments = [disturbance.moment for life in LIVES for disturbance in life.disturbances]
    tenths = Counter(int(10 * moment.fraction) for moment in moments if moment.phase is None)
    assert sorted(tenths) == list(range(10))
    mean = tenths.total() / 10
    # The spread of a count is the root of its mean; this is five of them.
    assert all(abs(count - mean) < 5 * mean**0.5 for count in tenths.values())
    assert {moment.phase for moment in moments} == {None, *AIMED}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_drawn_and_has_a_place_on_the_board(layout):
    assert any(life.layout == layout for life in LIVES)
    assert parse_layout(layout).world_size <= MAX_RANKS


def test_half_of_the_lives_save_in_the_background():
    assert 0.45 < sum(life.async_save for life in LIVES) / len(LIVES) < 0.55


def test_layouts_can_be_narrowed():
    assert {life.layout for life in schedule(0, 30, ["dp2"])} == {"dp2"}


def test_the_command_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "python -m tests.chaos --fault frontier" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "words"), [("two", "Layout 'two': cannot read 'two'"), ("dp16", "dp16 has 16 ranks, expected at most 8")])
def test_a_layout_that_cannot_run_is_refused(capsys, name, words):
    with pytest.raises(SystemExit) as end:
        main(["--layouts", name])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
