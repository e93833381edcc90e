"""From settings to what the planner asks for: the one place that says which ranks encode and how many rows a schedule wants."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_keye.config.schema import RunConfig
from megatron_keye.parallel.grid import RankGrid
from megatron_keye.plan.cost import cost_model
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.step import PlanSettings, SampleShapes, place_members, plan_step, replicate_tasks
from megatron_keye.plan.types import ReplicaPlan, StepPlan


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


class Planner:
    """The planner with a run's settings filled in."""

    def __init__(self, config: RunConfig, num_replicas: int):
        self.settings = plan_settings(config, num_replicas)
        self._replicate_over = encoder_copies(config)

    def plan(self, shapes: SampleShapes, cursor: Cursor) -> tuple[StepPlan, Cursor]:
        """The plan of the step at `cursor`, and the cursor after it."""
        plan, after = plan_step(shapes, cursor, self.settings)
        return replace(plan, replicas=self._replicated(plan.replicas)), after

    def place(self, members: Sequence[int], shapes: SampleShapes) -> tuple[ReplicaPlan, ...]:
        """Placement alone, of given samples."""
        return self._replicated(place_members(members, shapes, self.settings))

    def _replicated(self, replicas: tuple[ReplicaPlan, ...]) -> tuple[ReplicaPlan, ...]:
        return tuple(replicate_tasks(r, self._replicate_over) for r in replicas) if self._replicate_over else replicas


def encoder_copies(config: RunConfig) -> tuple[int, ...]:
    """Ranks that each encode everything, in the placement that only benchmarks use; none otherwise."""
    return rank_grid(config, 1).stage_ranks(0) if config.encode.placement == "stage0_replicated" else ()
