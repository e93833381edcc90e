"""What all ranks of a step must agree on, whatever one of them meets."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

from megatron_keye.config.load import load_config
from megatron_keye.model.init import proof_tensor
from megatron_keye.parallel.groups import build_groups, prepare_megatron
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.train.build import build_model, build_optimizer
from megatron_keye.train.layouts import parse_layout
from megatron_keye.train.placement import rank_grid
from megatron_keye.train.step import TrainStep
from megatron_keye.train.synthetic import proof_shapes, synthetic_batch, synthetic_plan
from megatron_keye.train.verify import prepare_rank, proof_config

CPU = torch.device("cpu")


def on_ranks(layout, function, *args):
    """The results of function(config, num_replicas, *args) on every rank of the layout, in float64."""
    layout = parse_layout(layout)
    config = layout.apply(proof_config(load_config("debug"), "fp64"))
    return run_ranks(layout.world_size, function, config, layout.num_replicas, *args, prepare=partial(prepare_rank, True))


def build_step(config, num_replicas):
    """The training step and a batch for it."""
    groups = build_groups(rank_grid(config, num_replicas))
    prepare_megatron(groups, config.train.seed)
    model = build_model(config, groups, CPU, draw=proof_tensor)
    step = TrainStep(model, build_optimizer(model))
    replicas = synthetic_plan(proof_shapes(config.model.variant)[0], config, num_replicas)
    return step, synthetic_batch(0, replicas, config, groups, CPU)


def local_weights(model):
    return [piece.read().clone() for piece in model.pieces()]


def step_with_a_bad_gradient(config, num_replicas, module, value):
    """One step in which rank 1 alone has a bad gradient, then a good one; what happened, as this rank saw it."""
    step, batch = build_step(config, num_replicas)
    step.accumulate(batch)
    if dist.get_rank() == 1:
        part = step.model.encoder if module == "encoder" else step.model.chunks[0]
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.main_grad.flatten()[-1] = value
    before = local_weights(step.model)
    _, updated = step.update(1.0, batch.num_supervised)
    unchanged = all(map(torch.equal, before, local_weights(step.model)))
    untouched = not any(part.optimizer.state for part in step.optimizer.chained_optimizers)
    result = step.run(batch, 1.0)
    moved = not all(map(torch.equal, before, local_weights(step.model)))
    return {"updated": updated, "weights kept": unchanged, "state kept": untouched, "goes on": result.updated and moved}


@pytest.mark.parametrize(
    ("layout", "module", "value"), [("tp2", "decoder", torch.nan), ("pp2", "encoder", torch.inf), ("dp2", "decoder", -torch.inf)]
)
def test_all_ranks_skip_a_step_with_a_bad_gradient_on_one(layout, module, value):
    for seen in on_ranks(layout, step_with_a_bad_gradient, module, value):
        assert seen == {"updated": False, "weights kept": True, "state kept": True, "goes on": True}


def step_without_labels(config, num_replicas):
    """A step in which no token is supervised; its loss, whether it updated, and whether weights moved."""
    step, batch = build_step(config, num_replicas)
    for microbatch in batch.microbatches:
        if microbatch.weights is not None:
            microbatch.weights.zero_()
    before = local_weights(step.model)
    loss = step.accumulate(batch)
    _, updated = step.update(1.0, num_supervised=0)
    return loss, updated, all(map(torch.equal, before, local_weights(step.model)))


def test_a_step_without_supervised_tokens_updates_nothing():
    assert on_ranks("pp2", step_without_labels) == [(0.0, False, True)] * 2


def step_and_look_at_globals(config, num_replicas):
    """Whether Megatron's global groups exist after a step, what happens where they are asked for, and our groups that are None."""
    step, batch = build_step(config, num_replicas)
    step.run(batch, 1.0)
    groups = step.model.groups
    absent = {name for collection in (groups.decoder, groups.encoder) for name, group in vars(collection).items() if group is None}
    step.schedule = forward_backward_pipelining_without_interleaving
    try:
        step.accumulate(batch)
    except AssertionError as error:
        refusal = str(error)
    return parallel_state.model_parallel_is_initialized(), refusal, absent


def test_megatron_has_no_groups_to_fall_back_to():
    """A step passes every group: a schedule that gets none meets an error, and not the groups of somebody else."""
    for initialized, refusal, absent in on_ranks("pp2", step_and_look_at_globals):
        assert not initialized
        assert "is not initialized" in refusal
        # The embedding groups would tie embedding and output weights, which Keye does not.
        assert absent == {"embd", "pos_embd"}
