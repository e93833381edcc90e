"""The steps that are measured fit the run's limits and tell all four kinds of work apart."""

import numpy as np
import pytest

from megatron_keye.config.load import load_config
from megatron_keye.plan.cost import cost_model
from megatron_keye.plan.timing import row_work, vision_work
from megatron_keye.recipes import recipe_names
from megatron_keye.train.calibration_design import designed_replica, designed_steps
from megatron_keye.train.placement import encoder_ranks


def replicas(config):
    return [designed_replica(step.samples, config, cost_model(config.model)) for step in designed_steps(config)]


def independent_columns(works) -> int:
    features = np.array(works, float)
    return np.linalg.matrix_rank(features / features.max(axis=0), tol=1e-3)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_coefficient_can_be_told_from_the_others(recipe):
    config = load_config(recipe)
    plans = replicas(config)
    assert independent_columns([row_work(plan.rows[0]) for plan in plans]) == 4
    works = [vision_work(plan, encoder) for plan in plans for encoder in encoder_ranks(config)]
    assert independent_columns([work for work in works if work.items]) == 4


@pytest.mark.parametrize("recipe", recipe_names())
def test_rows_are_within_the_limits_of_the_run(recipe):
    config = load_config(recipe)
    for plan in replicas(config):
        assert plan.rows[0].num_tokens <= config.data.seq_length_tokens
        assert all(doc.padded_tokens % config.data.pad_multiple_tokens == 0 for doc in plan.rows[0].documents)
        for document in plan.rows[0].documents:
            gaps = sum(segment.gap_tokens for segment in document.shape.segments)
            assert document.shape.num_visual_tokens + gaps <= document.shape.num_tokens <= document.padded_tokens
            if len(document.shape.segments) == 1 and document.shape.segments[0].grid.t == 1:
                assert document.shape.num_visual_tokens <= config.data.image.max_tokens


@pytest.mark.parametrize(("layout", "rows", "encoders"), [((), 1, 1), (("parallel.pp=2", "parallel.tp=2"), 2, 4)])
def test_each_pipeline_stage_gets_a_row_and_each_rank_its_share_of_images(layout, rows, encoders):
    config = load_config("debug", layout)
    plans = replicas(config)
    assert {len(plan.rows) for plan in plans} == {rows}
    assert max(len({task.encoder for task in plan.tasks}) for plan in plans) == encoders


@pytest.mark.parametrize("tokens", [64, 100, 200])
def test_short_rows_are_measured_as_well(tokens):
    config = load_config("debug", [f"data.seq_length_tokens={tokens // 32 * 32}"])
    assert designed_steps(config)
