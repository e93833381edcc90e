"""Budgets of bytes: each step is held against them before it is decoded, and the error names the setting."""

import pytest

from megatron_keye.config.load import load_config
from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.errors import SettingsError
from megatron_keye.train.feed import check_budgets
from megatron_keye.train.placement import Planner

TOKENS = 12
PIXELS = TOKENS * 4 * 588
SHAPES = [SampleShape(40), SampleShape(60, (Segment(PatchGrid(1, 6, 8), 5),))]
"""A text, and a text with one picture of 12 visual tokens."""


def plan_of(config, num_replicas=1):
    return Planner(config, num_replicas).place((0, 1), SHAPES)


def settings(*overrides):
    return load_config("debug", overrides)


def test_a_step_within_its_budgets_passes():
    config = settings(f"data.prefetch_bytes={PIXELS}", f"encode.slab_bytes={TOKENS * 128 * 4}")
    check_budgets(plan_of(config)[0], "step 7, replica 0", config)


def test_pixels_beyond_their_budget_name_it():
    config = settings(f"data.prefetch_bytes={PIXELS - 1}")
    message = rf"step 7, replica 0: its pixels take {PIXELS:,} bytes, and data.prefetch_bytes is {PIXELS - 1:,}; raise that budget"
    with pytest.raises(SettingsError, match=message):
        check_budgets(plan_of(config)[0], "step 7, replica 0", config)


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16", 2), ("fp32", 4), ("fp64", 8)])
def test_embeddings_beyond_their_budget_name_it(precision, bytes_each):
    slab = TOKENS * 128 * bytes_each
    config = settings(f"encode.slab_bytes={slab - 1}", f"train.precision={precision}")
    with pytest.raises(SettingsError, match=rf"take about {slab:,} bytes, and encode.slab_bytes is {slab - 1:,}; raise that budget"):
        check_budgets(plan_of(config)[0], "step 7, replica 0", config)


def test_context_parallel_ranks_share_the_embeddings():
    config = settings(f"encode.slab_bytes={TOKENS * 128 * 4 // 2}", "parallel.cp=2")
    check_budgets(plan_of(config)[0], "step 7, replica 0", config)


def test_the_replica_that_exceeds_a_budget_is_named():
    config = settings("data.prefetch_bytes=1")
    with_picture, without = sorted(plan_of(config, num_replicas=2), key=lambda replica: not replica.tasks)
    check_budgets(without, "step 7, replica 0", config)
    with pytest.raises(SettingsError, match="^step 7, replica 1: "):
        check_budgets(with_picture, "step 7, replica 1", config)
