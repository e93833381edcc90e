"""The dry run: its parameter counts are those of models that were built, and its plan is the first one of the run."""

import pytest

from megatron_keye.config.load import load_config
from megatron_keye.errors import SettingsError
from megatron_keye.plan.cursor import Cursor
from megatron_keye.train.build import build_model
from megatron_keye.train.dry_run import describe, encoder_parameters, stage_parameters, total_parameters
from megatron_keye.train.placement import Planner
from tests.tiny import on_ranks, runtime_here, with_layout


def built_sizes(config):
    """Parameters of this rank: (pipeline rank, of the decoder, of the encoder)."""
    runtime = runtime_here(config)
    model = build_model(config, runtime.groups, runtime.device)
    decoder = sum(parameter.numel() for chunk in model.chunks for parameter in chunk.parameters())
    return runtime.groups.coordinate("pp"), decoder, sum(parameter.numel() for parameter in model.encoder.parameters())


@pytest.mark.parametrize("variant", ["keye_vl_1_5", "keye_vl_preview"])
@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "pp2vp2", "tp2pp2", "cp2", "tp4"])
def test_counts_are_those_of_built_models(tiny, layout, variant):
    """With a vocabulary that no layout divides."""
    config = tiny.config(f"model.variant={variant}", "model.decoder.vocab_size=1021")
    for pp_rank, decoder, encoder in on_ranks(layout, config, built_sizes):
        assert decoder == stage_parameters(with_layout(config, layout), pp_rank)
        assert encoder == encoder_parameters(config.model)
    if layout == "one":
        assert total_parameters(config.model) == decoder + encoder


def test_the_released_model_has_its_published_size():
    assert total_parameters(load_config("keye_vl_preview_8b").model) == 8_696_828_736


def test_uneven_stages_are_counted_as_they_are(tiny):
    config = tiny.config("parallel.pp=2", "parallel.layers_per_stage=[3,1]")
    even = tiny.config("parallel.pp=2")
    counts = [stage_parameters(config, stage) for stage in (0, 1)]
    assert sum(counts) == sum(stage_parameters(even, stage) for stage in (0, 1))
    assert counts[0] - stage_parameters(even, 0) == stage_parameters(even, 1) - counts[1] > 0


def test_the_text_tells_settings_layout_sizes_and_plan(tiny):
    config = tiny.config("parallel.tp=2")
    text = describe(config, 4)
    assert "seq_length_tokens: 512" in text
    assert "layout: 4 processes = tp 2 x cp 1 x pp 1 x dp 2" in text
    assert f"parameters: {total_parameters(config.model):,} in all" in text
    assert "data: 24 samples in" in text
    plan, _ = Planner(config, 2).over(tiny.dataset(config).plan_data)(Cursor())
    for number, replica in enumerate(plan.replicas):
        lengths = [row.num_tokens for row in replica.rows]
        samples = sum(len(row.documents) for row in replica.rows)
        assert f"replica {number}: {samples} samples in {len(lengths)} rows of {lengths} tokens" in text
        assert f"{len(replica.tasks)} attention segments in {replica.num_rounds} rounds" in text


def test_without_data_the_rest_is_told(tiny):
    text = describe(tiny.config("data.train=/nowhere"), 1)
    assert "parameters:" in text
    assert "first step: cannot be planned here: no data set at /nowhere" in text


def test_settings_that_do_not_fit_the_processes_are_refused(tiny):
    with pytest.raises(SettingsError, match="start a multiple of 2 processes"):
        describe(tiny.config("parallel.tp=2"), 3)
