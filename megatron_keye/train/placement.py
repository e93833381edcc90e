"""From settings to what the planner asks for: the one place that says which ranks encode and how many rows a schedule wants."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_keye.config.schema import RunConfig
from megatron_keye.contract.media import PATCH_VALUES, SampleShape
from megatron_keye.parallel.grid import RankGrid
from megatron_keye.plan.assignment import Barrier
from megatron_keye.plan.cost import cost_model
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.order import Order
from megatron_keye.plan.step import (
    PlanData,
    PlanSettings,
    PredictedLoads,
    StepPlanner,
    place_members,
    predicted_loads,
    replicate_tasks,
)
from megatron_keye.plan.timing import PS_PER_S, TimeModel
from megatron_keye.plan.types import ReplicaPlan, Replicas, StepPlan

PlanAt = Callable[[Cursor], tuple[StepPlan, Cursor]]
"""From a cursor to the plan of its step and the cursor after it."""


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


def barrier(config: RunConfig) -> Barrier:
    """Where ranks wait for each other. Replicas meet once a step, when gradients are reduced; the stages of a pipeline meet after every
    microbatch, so that its rows should be alike."""
    return "microbatch" if config.parallel.pp > 1 else "step"


def plan_settings(config: RunConfig, num_replicas: int, times: TimeModel | None = None) -> PlanSettings:
    """The planner's view of a run. Placement goes by measured `times` where there are any; membership always by FLOPs of the model."""
    flops = cost_model(config.model)
    ahead, encoders = config.data.lookahead, encoder_ranks(config)
    return PlanSettings(
        seed=config.train.seed,
        global_batch_samples=config.data.global_batch_samples,
        seq_length_tokens=config.data.seq_length_tokens,
        pad_multiple_tokens=config.data.pad_multiple_tokens,
        patches_per_round=config.encode.patches_per_round,
        num_replicas=num_replicas,
        encoders=encoders,
        microbatch_multiple=config.parallel.pp if config.parallel.vp > 1 else 1,
        barrier=barrier(config),
        replica_patches=config.data.prefetch_bytes // PATCH_VALUES,
        cost=flops if times is None else times.cost_model(len(encoders)),
        lookahead=Lookahead(ahead.batches, ahead.canonical_replicas, ahead.growth_percent, flops),
    )


class Planner:
    """The planner with a run's settings filled in."""

    def __init__(self, config: RunConfig, num_replicas: int, times: TimeModel | None = None):
        self._settings, self._times, self._parallel = plan_settings(config, num_replicas, times), times, config.parallel
        self._replicate_over = encoder_copies(config)
        self.encoders = self._replicate_over or self._settings.encoders
        """Places within a replica of the ranks that encode, as `loads` lists them."""

    def over(self, data: PlanData, order: Order | None = None) -> PlanAt:
        """A function from a cursor to the plan of its step and the cursor after it; all samples shuffled where no `order` is given."""
        steps = StepPlanner(data, self._settings, order)

        def plan_at(cursor: Cursor) -> tuple[StepPlan, Cursor]:
            plan, after = steps.plan(cursor)
            return replace(plan, replicas=self._replicated(plan.replicas)), after

        return plan_at

    def place(self, members: Sequence[int], shapes: Sequence[SampleShape]) -> Replicas:
        """Placement alone, of given samples, whose shapes come in the same order."""
        return self._replicated(place_members(members, shapes, self._settings))

    def loads(self, replicas: Sequence[ReplicaPlan]) -> PredictedLoads:
        """What the cost model says of replicas planned here, over the ranks that encode in them."""
        return predicted_loads(replicas, replace(self._settings, encoders=self.encoders))

    def predicted_s(self, share: ReplicaPlan, replica_rank: int) -> tuple[float, float]:
        """Seconds of the ViT on a rank of this replica, and of the replica's decoder; 0 where times were not measured."""
        if self._times is None:
            return 0.0, 0.0
        decoder_ps = self._times.decode_ps(share, self._parallel.pp, self._parallel.vp)
        return self._times.encode_ps(share, replica_rank) / PS_PER_S, decoder_ps / PS_PER_S

    def _replicated(self, replicas: Replicas) -> Replicas:
        return replicas.mapped(lambda replica: replicate_tasks(replica, self._replicate_over)) if self._replicate_over else replicas


def encoder_copies(config: RunConfig) -> tuple[int, ...]:
    """Ranks that each encode everything, in the placement that only benchmarks use; none otherwise."""
    return rank_grid(config, 1).stage_ranks(0) if config.encode.placement == "stage0_replicated" else ()
