"""Layouts change nothing: the trainer's own step in float64 on gloo, each against one process. And mistakes do not go unnoticed."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from megatron_keye.config.load import load_config
from megatron_keye.config.schema import ParallelConfig
from megatron_keye.model import norm, packed
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.plan import route
from megatron_keye.train import build
from megatron_keye.train.layouts import Layout, parse_layout
from megatron_keye.train.verify import EXACT, compare, prepare_rank, proof_config, trace_layout, trace_rank


def settings(recipe="debug", *overrides):
    return proof_config(load_config(recipe, overrides), "fp64")


@pytest.fixture(scope="session")
def one_process():
    """The one-process run with given settings, once per session."""
    return cache(lambda config: trace_layout(config, parse_layout("one")))


@pytest.fixture
def assert_exact(one_process):
    """Runs a layout, by name or as a Layout, and compares it; the reference's settings may be others. Returns the trace."""

    def check(layout, config, reference_config=None):
        layout = parse_layout(layout) if isinstance(layout, str) else layout
        trace = trace_layout(config, layout)
        difference = compare(trace, one_process(reference_config or config))
        assert EXACT.holds(difference), f"{layout.name}: {difference}"
        return trace

    return check


@pytest.mark.parametrize("layout", ["tp2", "tp2sp", "cp2", "pp2vp2", "tp2cp2sp", "cp2pp2", "dp2recompute", "pp2reencode"])
def test_layout_equals_one_process(layout, assert_exact):
    assert_exact(layout, settings())


@pytest.mark.parametrize("layout", ["cp2", "tp2"])
def test_preview_equals_one_process(layout, assert_exact):
    """Whole clips as attention segments, time in the positions, another projector."""
    assert_exact(layout, settings("debug_preview"))


def test_uneven_stages_equal_one_process(assert_exact):
    parallel = ParallelConfig(pp=2, layers_per_stage=(3, 1))
    assert_exact(Layout("pp2 with 3 and 1 layers", parallel, num_replicas=1, recompute=False, reencode=False), settings())


def test_overlapped_communication_equals_one_process(assert_exact):
    assert_exact("pp2dp2", settings("debug", "train.overlap_grad_reduce=true", "train.overlap_param_gather=true"), settings())


PLACEMENTS = [("stage0", "cp2pp2"), ("stage0_replicated", "tp2"), ("stage0_replicated", "tp2sp"), ("stage0_replicated", "cp2pp2")]


@pytest.mark.parametrize(("placement", "layout"), PLACEMENTS)
def test_placements_of_the_encoder_equal_one_process(placement, layout, assert_exact):
    assert_exact(layout, settings("debug", f"encode.placement={placement}"), settings())


def test_frozen_vision_and_projector(assert_exact):
    trace = assert_exact("pp2", settings("debug", "model.freeze=[vision, projector]"))
    assert not [name for name in trace.gradients[0] if not name.startswith(("model.", "lm_head."))]


def test_the_first_stage_trains_with_everything_before_it_frozen(assert_exact):
    """Full recompute without an input that needs a gradient would leave it untrained, on one process as on two."""
    config = settings("debug", "model.freeze=[vision, projector, embedding]")
    trace = assert_exact("pp2recompute", config)
    assert "model.embed_tokens.weight" not in trace.gradients[0]
    assert trace.gradients[0]["model.layers.0.mlp.up_proj.weight"].abs().max() > 1e-6


def test_a_projector_that_trains_alone(assert_exact):
    """The alignment stage: no decoder DDP, yet gradients must come through the decoder."""
    trace = assert_exact("tp2", settings("debug", "model.freeze=[vision, embedding, decoder]"))
    assert {name.split(".")[0] for name in trace.gradients[0]} == {"mlp_AR"}


def delete_a_delivery():
    original = route._all_deliveries

    def without_the_first(*args):
        deliveries = original(*args)
        return deliveries.where(np.arange(len(deliveries.row)) > 0)

    route._all_deliveries = without_the_first


def return_gradients_from_every_rank():
    original = route._all_deliveries

    def all_return(*args):
        deliveries = original(*args)
        return replace(deliveries, returns=np.ones_like(deliveries.returns))

    route._all_deliveries = all_return


def leave_norms_unmarked():
    original = norm.RMSNorm.__init__

    def unmarked(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    norm.RMSNorm.__init__ = unmarked


def slice_positions_by_row():
    packed.local_tokens = lambda boundaries, cp_size, rank: np.split(np.arange(boundaries[-1]), cp_size)[rank]


def set_in_megatron_config(**values):
    original = build.megatron_config

    def changed(*args):
        config = original(*args)
        for name, value in values.items():
            assert hasattr(config, name)
            setattr(config, name, value)
        return config

    build.megatron_config = changed


MISTAKES = {
    "a deleted route entry": ("cp2", delete_a_delivery),
    "the gradient returned by two TP ranks": ("tp2", return_gradients_from_every_rank),
    "norms without the sequence_parallel mark": ("tp2sp", leave_norms_unmarked),
    "positions sliced by row": ("cp2", slice_positions_by_row),
    "q and k norms that Megatron does not know of": ("tp2", lambda: set_in_megatron_config(qk_layernorm=False)),
    "weights without the tensor_model_parallel mark": ("tp2", lambda: set_in_megatron_config(perform_initialization=False)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name, one_process):
    """Each is made inside the started ranks alone, without an error there; only the comparison tells."""
    layout, make_mistake = MISTAKES[name]
    layout = parse_layout(layout)

    def prepare():
        prepare_rank(float64=True)
        make_mistake()

    trace = run_ranks(layout.world_size, trace_rank, layout.apply(settings()), False, prepare=prepare)[0]
    difference = compare(trace, one_process(settings()))
    assert not EXACT.holds(difference)
    assert max(difference.loss, difference.grad_norm, *difference.gradients.values()) > 1e-4
    assert all(torch.isfinite(gradient).all() for gradient in trace.gradients[0].values())
