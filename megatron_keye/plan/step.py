"""One step plan from one cursor: membership first, which no layout can change, then placement, which only a layout can."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_keye.contract.media import SampleShape
from megatron_keye.errors import PlanError
from megatron_keye.plan.assignment import Assignment, AssignmentRules, Barrier, StepCosts, assign_samples
from megatron_keye.plan.balance import imbalance, place_segments
from megatron_keye.plan.blocks import shuffled
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.digest import ledger_digest
from megatron_keye.plan.lookahead import ONE_BATCH, Lookahead
from megatron_keye.plan.order import Order
from megatron_keye.plan.pack import Item, pack_rows, round_up, rows_of
from megatron_keye.plan.spread import NO_LIMIT
from megatron_keye.plan.table import SampleTable
from megatron_keye.plan.types import EncodeTask, ReplicaPlan, Replicas, Row, StepPlan
from megatron_keye.plan.windows import Membership


class SampleShapes(Protocol):
    """The shape of each sample by number: what a replica's plan is made of."""

    def __getitem__(self, sample: int) -> SampleShape: ...


@dataclass(frozen=True, slots=True)
class PlanData:
    """What planning knows of a dataset, from its index alone: a table for what concerns all samples of a step, and shapes for what
    concerns those of one replica."""

    table: SampleTable
    shapes: SampleShapes

    @classmethod
    def of(cls, shapes: Sequence[SampleShape]) -> "PlanData":
        """Of samples whose shapes are at hand."""
        return cls(SampleTable.of(shapes), shapes)


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a step plan depends on besides the cursor and the data.

    The first two and `lookahead` decide which samples a step holds; all others only where they go.
    """

    seed: int
    global_batch_samples: int
    seq_length_tokens: int
    pad_multiple_tokens: int
    patches_per_round: int
    num_replicas: int
    encoders: tuple[int, ...]
    """Replica-local ranks that share a replica's attention segments. To have several ranks each encode all of them,
    plan with one encoder and apply `replicate_tasks`."""
    microbatch_multiple: int
    """The number of microbatches is rounded up to this (interleaved schedules need a multiple of the stages)."""
    cost: CostModel
    lookahead: Lookahead = ONE_BATCH
    """How many batches are planned together. Decides which samples a step holds, as the seed and the batch do."""
    barrier: Barrier = "step"
    """Where replicas wait for each other; see `assignment.py`."""
    replica_patches: int = NO_LIMIT
    """The pixels that a replica has memory for in a step, in patches: kept where samples can be placed so."""
    speeds: tuple[tuple[int, ...], ...] = ()
    """How fast ranks are, per mille of the usual, by replica and place in it; () for all alike. A replica's decoder is as fast as
    its slowest rank."""

    def __post_init__(self) -> None:
        sizes = ("global_batch_samples", "pad_multiple_tokens", "patches_per_round", "num_replicas", "microbatch_multiple")
        problems = [f"{name} is {getattr(self, name)}, expected at least 1" for name in sizes if getattr(self, name) < 1]
        if self.seq_length_tokens < self.pad_multiple_tokens:
            problems.append(
                f"seq_length_tokens is {self.seq_length_tokens}, expected at least pad_multiple_tokens = {self.pad_multiple_tokens}"
            )
        if not self.encoders or len(set(self.encoders)) != len(self.encoders):
            problems.append(f"encoders are {self.encoders}, expected at least one rank and none twice")
        if self.speeds and (len(self.speeds) != self.num_replicas or min(map(min, self.speeds)) < 1):
            problems.append(f"speeds are {self.speeds}, expected those of {self.num_replicas} replicas, each at least 1 per mille")
        if problems:
            raise PlanError("No step can be planned with these settings: " + "; ".join(problems) + ".")


class StepPlanner:
    """Plans steps of one dataset. Keeps the windows in use; the plan of a cursor does not depend on what was planned before."""

    def __init__(self, data: PlanData, settings: PlanSettings, order: Order | None = None):
        """`order` is one of the whole dataset shuffled where none is given. Raises PlanError for a dataset without samples."""
        self._data, self._settings = data, settings
        self._order = shuffled(len(data.table), settings.seed) if order is None else order
        self._membership = Membership(self._order, data.table.window_costs)

    def plan(self, cursor: Cursor) -> tuple[StepPlan, Cursor]:
        """The plan of step `cursor.step` and the cursor after it. Raises PlanError when a sample does not fit a row."""
        settings = self._settings
        progress = cursor.progress.under(settings.global_batch_samples, settings.lookahead)
        positions = self._membership.positions(progress)
        samples = self._order(positions)
        members = tuple(samples.tolist())
        costs, assignment = assigned(samples, self._data.table, settings)
        replicas = replica_plans(members, self._data.shapes, assignment, settings)
        plan = StepPlan(cursor.step, tuple(positions.tolist()), members, costs, assignment, replicas)
        after = progress.after_step()
        return plan, Cursor(cursor.step + 1, after.position, ledger_digest(cursor.ledger, members), after.stretches)


def assigned(samples: np.ndarray, table: SampleTable, settings: PlanSettings) -> tuple[StepCosts, Assignment]:
    """What a step's `samples` int64 [n] cost, and the replica and microbatch of each: worked out for all of them by every rank.

    Raises PlanError when a sample does not fit a row.
    """
    costs = table.step_costs(samples, settings.cost, settings.pad_multiple_tokens, settings.seq_length_tokens)
    return costs, assign_samples(costs, assignment_rules(settings))


def replica_plans(members: Sequence[int], shapes: SampleShapes, assignment: Assignment, settings: PlanSettings) -> Replicas:
    """One plan per replica, all with the same number of rows, each worked out when it is asked for."""
    return Replicas(settings.num_replicas, lambda replica: replica_plan(members, shapes, assignment, replica, settings))


def place_members(members: Sequence[int], shapes: Sequence[SampleShape], settings: PlanSettings) -> Replicas:
    """Placement alone, of given samples, whose shapes come in the same order. Raises PlanError when one does not fit a row."""
    _, assignment = assigned(np.arange(len(members)), SampleTable.of(shapes), settings)
    return replica_plans(members, dict(zip(members, shapes, strict=True)), assignment, settings)


def replica_plan(
    members: Sequence[int], shapes: SampleShapes, assignment: Assignment, replica: int, settings: PlanSettings
) -> ReplicaPlan:
    """One replica's plan: the only part of placement that looks at samples one by one, and at nobody else's."""
    slots = np.flatnonzero(assignment.replica == replica).tolist()
    own = [_item(slot, members[slot], shapes[members[slot]], settings) for slot in slots]
    if assignment.row is None:
        rows = pack_rows(own, assignment.num_rows, settings.seq_length_tokens, settings.pad_multiple_tokens)
    else:
        rows = rows_of(own, assignment.row[slots].tolist(), assignment.num_rows, settings.pad_multiple_tokens)
    speeds = [settings.speeds[replica][rank] for rank in settings.encoders] if settings.speeds else None
    tasks = place_segments(rows, settings.encoders, settings.patches_per_round, settings.cost, speeds)
    return ReplicaPlan(rows, tasks, num_rounds=1 + max((task.round for task in tasks), default=-1))


def assignment_rules(settings: PlanSettings) -> AssignmentRules:
    """What of the settings concerns the choice of replicas and microbatches."""
    return AssignmentRules(
        num_replicas=settings.num_replicas,
        seq_length_tokens=settings.seq_length_tokens,
        microbatch_multiple=settings.microbatch_multiple,
        barrier=settings.barrier,
        speeds=tuple(min(speeds) for speeds in settings.speeds),
        replica_patches=settings.replica_patches,
    )


def replicate_tasks(replica: ReplicaPlan, encoders: Sequence[int]) -> ReplicaPlan:
    """The plan in which each of `encoders` encodes everything that a single one did. Only benchmarks want this."""
    planned = {task.encoder for task in replica.tasks}
    if len(planned) > 1:
        raise PlanError(f"Tasks are shared by encoders {sorted(planned)}; plan with a single encoder to have each rank encode all of them.")
    tasks = tuple(replace(task, encoder=encoder) for encoder in sorted(encoders) for task in replica.tasks)
    return replace(replica, tasks=tasks)


@dataclass(frozen=True, slots=True)
class PredictedLoads:
    """FLOPs of one step: `decoder[replica]`, and `vision[replica][i]` of the i-th rank of the plan's encoders."""

    decoder: tuple[int, ...]
    vision: tuple[tuple[int, ...], ...]

    @property
    def decoder_imbalance(self) -> float:
        """max / mean over replicas."""
        return imbalance(self.decoder)

    @property
    def vision_imbalance(self) -> float:
        """max / mean over the encoder ranks of all replicas."""
        return imbalance([load for replica in self.vision for load in replica])


def predicted_loads(replicas: Sequence[ReplicaPlan], settings: PlanSettings) -> PredictedLoads:
    """What the cost model says of these replicas' plans; padding counts. `settings.encoders` are the ranks that encode in them."""
    decoder = tuple(sum(_row_cost(row, settings.cost) for row in replica.rows) for replica in replicas)
    return PredictedLoads(decoder, tuple(_encoder_loads(replica, settings) for replica in replicas))


def _item(slot: int, sample: int, shape: SampleShape, settings: PlanSettings) -> Item:
    padded_tokens = round_up(shape.num_tokens, settings.pad_multiple_tokens)
    cost = settings.cost.sample_cost(shape, padded_tokens)
    return Item(slot, sample, shape, padded_tokens, cost.decoder, cost.vision)


def _row_cost(row: Row, cost: CostModel) -> int:
    lengths = [document.padded_tokens for document in row.documents] or [row.num_tokens]
    return sum(cost.decoder_cost(length) for length in lengths)


def _encoder_loads(replica: ReplicaPlan, settings: PlanSettings) -> tuple[int, ...]:
    loads = dict.fromkeys(settings.encoders, 0)
    for task in replica.tasks:
        loads[task.encoder] += _task_cost(task, replica, settings.cost)
    return tuple(loads.values())


def _task_cost(task: EncodeTask, replica: ReplicaPlan, cost: CostModel) -> int:
    document = replica.rows[task.microbatch].documents[task.document]
    return cost.vision_cost(document.shape.segments[task.segment].grid)
