"""From settings to what the planner asks for: the one place that says which ranks encode and how many rows a schedule wants."""

from megatron_keye.config.schema import RunConfig
from megatron_keye.parallel.grid import RankGrid
from megatron_keye.plan.cost import cost_model
from megatron_keye.plan.step import PlanSettings


def rank_grid(config: RunConfig, num_replicas: int) -> RankGrid:
    parallel = config.parallel
    return RankGrid(tp=parallel.tp, cp=parallel.cp, pp=parallel.pp, dp=num_replicas)


def encoder_ranks(config: RunConfig) -> tuple[int, ...]:
    """Places within a replica of the ranks that share its images."""
    grid = rank_grid(config, 1)
    return {
        "all_ranks": tuple(range(grid.replica_size)),
        "stage0": grid.stage_ranks(0),
        "stage0_replicated": (0,),
    }[config.encode.placement]


def plan_settings(config: RunConfig, num_replicas: int) -> PlanSettings:
    return PlanSettings(
        seed=config.train.seed,
        global_batch_samples=config.data.global_batch_samples,
        seq_length_tokens=config.data.seq_length_tokens,
        pad_multiple_tokens=config.data.pad_multiple_tokens,
        patches_per_round=config.encode.patches_per_round,
        num_replicas=num_replicas,
        encoders=encoder_ranks(config),
        microbatch_multiple=config.parallel.pp if config.parallel.vp > 1 else 1,
        cost=cost_model(config.model),
    )
