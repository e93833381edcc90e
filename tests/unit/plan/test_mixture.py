"""A mixture that changes on the way uses every sample of a source once an epoch all the same, and its few numbers say everything."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.errors import PlanError
from megatron_keye.plan.blend import CYCLE
from megatron_keye.plan.mixture import Source, Stage, continued, fresh_mixture

TEXT, IMAGES, VIDEO = Source("text", "t", 300, 50), Source("images", "i", 700, 40), Source("video", "v", 45, 10)
EVEN = (CYCLE // 2, CYCLE // 2)


def weights_of(*parts):
    whole = [part * CYCLE // sum(parts) for part in parts]
    whole[0] += CYCLE - sum(whole)
    return tuple(whole)


changes = st.lists(st.tuples(st.integers(0, 3000), st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any)), max_size=4)


@settings(deadline=None, max_examples=50)
@given(changes)
def test_a_source_is_gone_through_once_an_epoch_whatever_its_weight_does(changes):
    mixture, frontier = fresh_mixture([TEXT, IMAGES], EVEN, 7, 2), 0
    for more, parts in changes:
        frontier += more
        mixture = mixture.with_weights(weights_of(*parts), frontier)
    positions = np.arange(frontier + 2000)
    samples, epochs = mixture.order()(positions), mixture.epochs(mixture.order(), positions)
    for source, first in ((TEXT, 0), (IMAGES, 300)):
        own = (samples >= first) & (samples < first + source.num_samples)
        for epoch in range(int(epochs[own].max(initial=-1))):
            assert sorted(samples[own & (epochs == epoch)].tolist()) == list(range(first, first + source.num_samples))


@settings(deadline=None, max_examples=50)
@given(changes, st.integers(0, 9000))
def test_earlier_stages_can_be_forgotten(changes, position):
    mixture, frontier = fresh_mixture([TEXT, IMAGES], EVEN, 7, 2), 0
    for more, parts in changes:
        frontier += more
        mixture = mixture.with_weights(weights_of(*parts), frontier)
    later = position + np.arange(500)
    short = mixture.since(position)
    assert short.order()(later).tolist() == mixture.order()(later).tolist()
    assert short.epochs(short.order(), later).tolist() == mixture.epochs(mixture.order(), later).tolist()
    assert sum(stage.position <= position for stage in short.stages) == 1


def test_a_change_leaves_all_positions_before_it_as_they_were():
    before = fresh_mixture([TEXT, IMAGES], EVEN, 7, 2)
    after = continued(before, fresh_mixture([TEXT, IMAGES, VIDEO], weights_of(0, 1, 1), 7, 2), 777)
    assert after.order()(np.arange(777)).tolist() == before.order()(np.arange(777)).tolist()
    sources, places = after.order().places(np.arange(777, 2000))
    assert set(sources.tolist()) == {1, 2}
    assert places[sources == 2].tolist() == list(range(int((sources == 2).sum())))
    assert places[sources == 1][0] == before.order().places(np.arange(777))[1][before.order().places(np.arange(777))[0] == 1][-1] + 1


def test_the_same_mixture_opens_no_stage():
    mixture = fresh_mixture([TEXT, IMAGES], EVEN, 7, 2)
    assert continued(mixture, fresh_mixture([TEXT, IMAGES], EVEN, 7, 2), 5) == mixture
    assert continued(mixture, fresh_mixture([TEXT, IMAGES], weights_of(1, 3), 7, 2), 0).stages == (Stage(0, weights_of(1, 3), (0, 0)),)


@pytest.mark.parametrize(
    ("wanted", "problems"),
    [
        (fresh_mixture([TEXT, IMAGES], EVEN, 8, 2), ["set train.seed back"]),
        (fresh_mixture([TEXT, IMAGES], EVEN, 7, 3), ["set data.order.blocks_per_window back"]),
        (fresh_mixture([IMAGES, TEXT], EVEN, 7, 2), [r"the sources are \['images', 'text'\], but were \['text', 'images'\]"]),
        (fresh_mixture([TEXT], (CYCLE,), 7, 2), ["with repeats 0"]),
        (fresh_mixture([TEXT, replace(IMAGES, fingerprint="x")], EVEN, 9, 2), ["set train.seed back", "source images has fingerprint x"]),
        (fresh_mixture([TEXT, replace(IMAGES, block_samples=9)], EVEN, 7, 2), ["set data.order.block_bytes back"]),
    ],
)
def test_what_would_change_earlier_positions_is_refused_all_at_once(wanted, problems):
    for problem in problems:
        with pytest.raises(PlanError, match=problem):
            continued(fresh_mixture([TEXT, IMAGES], EVEN, 7, 2), wanted, 100)


def test_positions_before_the_first_stage_are_an_error():
    mixture = replace(fresh_mixture([TEXT], (CYCLE,), 7, 2), stages=(Stage(5, (CYCLE,), (2,)),))
    with pytest.raises(PlanError, match="Position 4 is before"):
        mixture.order()(np.array([4, 7]))
