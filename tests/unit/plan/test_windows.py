"""Whatever the settings and however they change, every position is taken exactly once, and any progress goes on as it would have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.windows import Membership, Progress, Stretch, num_left

COST = CostModel(7, 0, 0, 0, 0)
OTHER_COST = CostModel(1, 3, 0, 0, 0)


class Identity:
    """Samples are positions."""

    num_samples = 1 << 40

    def __call__(self, positions):
        return positions


def long_tailed_costs(samples, cost):
    draws = np.random.default_rng(7).lognormal(10, 1.5, 4096).astype(np.int64)
    return draws[samples % 4096] * cost.decoder_token + cost.decoder_pair * (samples % 13)


def fresh():
    return Membership(Identity(), long_tailed_costs)


lookaheads = st.builds(
    Lookahead,
    batches=st.integers(1, 6),
    canonical_replicas=st.integers(1, 8),
    growth_percent=st.sampled_from([100, 150, 300]),
    cost=st.sampled_from([COST, OTHER_COST]),
)
phases = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9), lookaheads), min_size=1, max_size=6)
"""(steps, global batch, lookahead): the settings under which a run is started again and again."""


def run(membership, progress, steps, batch, lookahead):
    taken = []
    for _ in range(steps):
        progress = progress.under(batch, lookahead)
        taken.append(membership.positions(progress).tolist())
        progress = progress.after_step()
    return taken, progress


def until_closed(membership, progress, batch, lookahead):
    taken = []
    for _ in range(1000):
        if not progress.stretches:
            break
        members, progress = run(membership, progress, 1, batch, lookahead)
        taken += members
    return taken, progress


@settings(deadline=None, max_examples=200)
@given(phases, st.integers(0, 100))
def test_every_position_is_taken_exactly_once(phases, start):
    membership, progress, taken = fresh(), Progress(start), []
    for phase in phases:
        members, progress = run(membership, progress, *phase)
        taken += members
    assert [len(members) for members in taken] == [batch for steps, batch, _ in phases for _ in range(steps)]
    rest, progress = until_closed(membership, progress, *phases[-1][1:])
    positions = [position for members in taken + rest for position in members]
    assert sorted(positions) == list(range(start, progress.position))


@settings(deadline=None, max_examples=100)
@given(phases)
def test_any_progress_goes_on_as_it_would_have(phases):
    """Every step is planned anew from its progress alone, by one who has planned nothing before."""
    kept, progress = fresh(), Progress()
    for steps, batch, lookahead in phases:
        for _ in range(steps):
            progress = progress.under(batch, lookahead)
            assert fresh().positions(progress).tolist() == kept.positions(progress).tolist()
            progress = progress.after_step()


@settings(deadline=None)
@given(phases)
def test_members_keep_the_order_and_stay_near_it(phases):
    membership, progress = fresh(), Progress()
    for steps, batch, lookahead in phases:
        for _ in range(steps):
            progress = progress.under(batch, lookahead)
            members = membership.positions(progress).tolist()
            assert list(members) == sorted(members)
            before = progress.position + num_left(progress.stretches)
            assert max(members) < before + batch * lookahead.batches
            progress = progress.after_step()


def test_one_batch_takes_the_next_samples_and_has_no_stretches():
    membership, progress = fresh(), Progress()
    for step in range(20):
        progress = progress.under(8, Lookahead())
        assert membership.positions(progress).tolist() == list(range(8 * step, 8 * step + 8))
        progress = progress.after_step()
        assert progress == Progress(8 * step + 8)


def test_progress_is_a_few_numbers_however_long_the_run():
    lookahead = Lookahead(4, 2, 200, COST)
    _, progress = run(fresh(), Progress(), 403, 8, lookahead)
    assert progress == Progress(403 * 8, (Stretch(3, 8, lookahead),))
    _, progress = run(fresh(), progress, 1, 8, lookahead)
    assert progress == Progress(404 * 8)


def test_what_is_left_comes_first_and_in_order():
    """Half a window of 4 x 8 is open; then batches of 3 take what it left, without looking ahead."""
    membership = fresh()
    taken, progress = run(membership, Progress(), 2, 8, Lookahead(4, 4, 200, COST))
    left = sorted(set(range(32)) - {position for members in taken for position in members})
    more, progress = run(membership, progress, 6, 3, Lookahead())
    assert [position for members in more for position in members] == [*left, 32, 33]
    assert progress == Progress(34)


def test_more_left_than_a_new_window_holds():
    """16 left, windows of 2 x 3: several windows are made of what was left alone."""
    membership = fresh()
    taken, progress = run(membership, Progress(), 2, 8, Lookahead(4, 4, 200, COST))
    more, progress = run(membership, progress, 6, 3, Lookahead(2, 1, 200, OTHER_COST))
    assert sorted(position for members in taken + more for position in members) == list(range(34))
    assert progress == Progress(34)


def test_what_two_changes_left_comes_in_order():
    """16 are left of a first window; a second takes 6 of them and is left open as well; the rest comes as it lay."""
    membership = fresh()
    taken, progress = run(membership, Progress(), 2, 8, Lookahead(4, 4, 200, COST))
    more, progress = run(membership, progress, 1, 3, Lookahead(2, 1, 200, COST))
    left = sorted(set(range(32)) - {position for members in taken + more for position in members})
    last, progress = run(membership, progress, 13, 1, Lookahead())
    assert [position for members in last for position in members] == left
    assert progress == Progress(32)


@pytest.mark.parametrize("steps", range(1, 9))
def test_changing_nothing_continues_the_stretch(steps):
    lookahead = Lookahead(4, 4, 200, COST)
    undisturbed, end = run(fresh(), Progress(), 12, 8, lookahead)
    _, progress = run(fresh(), Progress(), steps, 8, lookahead)
    rest, resumed_end = run(fresh(), progress, 12 - steps, 8, Lookahead(4, 4, 200, CostModel(7, 0, 0, 0, 0)))
    assert rest == undisturbed[steps:]
    assert resumed_end == end


def test_a_window_is_divided_once():
    calls = []

    def counted(samples, cost):
        calls.append(len(samples))
        return long_tailed_costs(samples, cost)

    run(Membership(Identity(), counted), Progress(), 12, 8, Lookahead(4, 4, 200, COST))
    assert calls == [32, 32, 32]
