"""Blends keep their weights and every source's own order; weights reach the token shares that were asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.errors import PlanError
from megatron_keye.plan.blend import (
    CYCLE,
    Blend,
    BlendedOrder,
    SourceTotals,
    token_shares,
    weights_by_repeats,
    weights_by_token_shares,
)
from megatron_keye.plan.blocks import BlockOrder


def whole_weights(parts):
    weights = [part * CYCLE // sum(parts) for part in parts]
    weights[0] += CYCLE - sum(weights)
    return weights


weight_lists = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any).map(whole_weights)


@settings(deadline=None, max_examples=30)
@given(weight_lists, st.integers(0, 3 * CYCLE), st.integers(0, 400), st.integers(0, 9))
def test_each_source_is_used_in_its_order(weights, start, count, seed):
    """The places of a source in any stretch follow one another, from where the positions before left it."""
    blend = Blend(weights, [7] * len(weights), seed)
    sources, places = blend(np.arange(start, start + count))
    before, after = blend.used(start), blend.used(start + count)
    for source in range(len(weights)):
        assert places[sources == source].tolist() == list(range(before[source], after[source]))
    assert sum(after) - sum(before) == count


@settings(deadline=None, max_examples=30)
@given(weight_lists, st.integers(0, 5))
def test_every_cycle_holds_the_weights(weights, cycle):
    sources, _ = Blend(weights, [0] * len(weights), 1)(cycle * CYCLE + np.arange(CYCLE))
    assert np.bincount(sources, minlength=len(weights)).tolist() == weights


def test_sources_are_mixed_within_a_cycle():
    sources, _ = Blend([CYCLE // 2, CYCLE // 2], [0, 0], 1)(np.arange(CYCLE))
    by_batch = sources[: CYCLE // 64 * 64].reshape(-1, 64).mean(axis=1)
    assert 0.04 < by_batch.std() < 0.08  # 0.0625 where every draw is free


@settings(deadline=None, max_examples=30)
@given(weight_lists, weight_lists, st.integers(1, 2 * CYCLE), st.integers(1, 300))
def test_a_new_mixture_goes_on_in_every_source(weights, others, change, count):
    size = max(len(weights), len(others))
    weights, others = (w + [0] * (size - len(w)) for w in (weights, others))
    old = Blend(weights, [0] * size, 1)
    new = Blend(others, old.used(change), 2)
    sources, places = new(np.arange(count))
    for source in range(size):
        expected = old.used(change)[source]
        assert places[sources == source].tolist() == list(range(expected, expected + int((sources == source).sum())))


def test_a_blended_order_uses_every_sample_of_a_source_once_an_epoch():
    orders = [BlockOrder(300, 300, 1, 1), BlockOrder(700, 50, 3, 2)]
    blend = Blend([CYCLE // 4, 3 * CYCLE // 4], [0, 0], 5)
    order = BlendedOrder(orders, [(0, blend), (500, Blend([CYCLE // 2] * 2, blend.used(500), 6))])
    assert order.num_samples == 1000
    samples = order(np.arange(2000))
    first, second = samples[samples < 300], samples[samples >= 300]
    assert sorted(first[:300].tolist()) == sorted(first[300:600].tolist()) == list(range(300))
    assert sorted(second[:700].tolist()) == list(range(300, 1000))
    assert 0.2 < (samples[:500] < 300).mean() < 0.3
    assert 0.45 < (samples[500:] < 300).mean() < 0.55


@pytest.mark.parametrize("firsts", [[], [0, 5, 5], [0, 9, 3]])
def test_stages_must_follow_one_another(firsts):
    blend = Blend([CYCLE], [0], 0)
    with pytest.raises(PlanError, match="stages"):
        BlendedOrder([BlockOrder(3, 3, 1, 0)], [(first, blend) for first in firsts])


SOURCES = [  # samples; tokens of video, image, text
    SourceTotals("web text", 50_000_000, (0, 0, 40_000_000_000)),
    SourceTotals("captions", 200_000_000, (0, 110_000_000_000, 14_000_000_000)),
    SourceTotals("documents", 8_000_000, (0, 30_000_000_000, 12_000_000_000)),
    SourceTotals("short video", 4_000_000, (20_000_000_000, 0, 800_000_000)),
    SourceTotals("long video", 300_000, (9_000_000_000, 0, 300_000_000)),
]
SHARES = (0.24, 0.50, 0.26)


def test_token_shares_of_the_long_context_stage_are_reached():
    weights = weights_by_token_shares(SOURCES, SHARES)
    assert sum(weights) == CYCLE
    assert token_shares(SOURCES, weights) == pytest.approx(SHARES, abs=0.005)


@pytest.mark.parametrize("seed", range(5))
def test_token_shares_hold_over_a_thousand_steps(seed):
    """Within 1 point, with samples whose lengths vary by a log-normal factor, 256 a step."""
    weights = weights_by_token_shares(SOURCES, SHARES)
    sources, _ = Blend(weights, [0] * len(weights), seed)(np.arange(CYCLE * 3 + 11, CYCLE * 3 + 11 + 256_000))
    mean_tokens = np.array([np.array(s.tokens) / s.num_samples for s in SOURCES])
    sigma = 1.0
    factor = np.random.default_rng(seed).lognormal(-(sigma**2) / 2, sigma, len(sources))
    tokens = (mean_tokens[sources] * factor[:, None]).sum(axis=0)
    assert tokens / tokens.sum() == pytest.approx(SHARES, abs=0.01)


def test_sources_of_one_modality_keep_their_proportions():
    sources = [SourceTotals("a", 1000, (0, 5000)), SourceTotals("b", 3000, (0, 15_000)), SourceTotals("c", 500, (9000, 0))]
    weights = weights_by_token_shares(sources, (0.5, 0.5))
    assert weights[1] / weights[0] == pytest.approx(3, rel=0.001)
    doubled = weights_by_token_shares(sources, (0.5, 0.5), repeats=(2, 1, 1))
    assert doubled[1] / doubled[0] == pytest.approx(1.5, rel=0.001)


@settings(deadline=None)
@given(st.data())
def test_any_reachable_shares_are_reached(data):
    """Shares of arbitrary weights are asked for: they can be reached, since these weights do."""
    size = data.draw(st.integers(2, 5))
    sources = [
        SourceTotals(str(i), 1000, tuple(data.draw(st.tuples(*[st.integers(0, 10_000)] * 3).filter(any)))) for i in range(size)
    ]
    parts = data.draw(st.lists(st.integers(5, 50), min_size=size, max_size=size))
    wanted = token_shares(sources, whole_weights(parts))
    assert token_shares(sources, weights_by_token_shares(sources, wanted)) == pytest.approx(wanted, abs=0.005)


def test_repeats_set_the_weights():
    sources = [SourceTotals("a", 3000, (1,)), SourceTotals("b", 1000, (1,))]
    assert weights_by_repeats(sources, (1, 1)) == (3 * CYCLE // 4, CYCLE // 4)
    assert weights_by_repeats(sources, (1, 3)) == (CYCLE // 2, CYCLE // 2)
    assert weights_by_repeats(sources, (1, 0)) == (CYCLE, 0)


@pytest.mark.parametrize("shares", [(0.9, 0.1, 0.0), (0.0, 0.0, 1.1), (-0.5, 0.5, 1.0)])
def test_shares_out_of_reach_are_refused(shares):
    """Every source with images has text, so there is no way without any."""
    with pytest.raises(PlanError, match="shares"):
        weights_by_token_shares(SOURCES[1:], shares)


@pytest.mark.parametrize(("samples", "repeats"), [((0, 5), (1, 1)), ((5, 5), (0, 0)), ((5, 5), (-1, 2))])
def test_zero_weights_and_empty_sources_are_refused(samples, repeats):
    sources = [SourceTotals(str(i), n, (1,)) for i, n in enumerate(samples)]
    if samples[0]:
        with pytest.raises(PlanError, match="Weights"):
            weights_by_repeats(sources, repeats)
    else:
        assert weights_by_repeats(sources, repeats) == (0, CYCLE)


@pytest.mark.parametrize("weights", [(CYCLE - 1,), (CYCLE + 1, -1), (CYCLE // 2, CYCLE // 2)])
def test_weights_that_are_no_cycle_are_refused(weights):
    with pytest.raises(PlanError, match="sum to"):
        Blend(weights, [0], 0)
