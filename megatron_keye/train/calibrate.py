"""Measure a run's own modules in its own layout, and fit the time model of `plan/timing.py` to what was measured.

Rounds over all designed steps: the first warms up, the others count, so that a drift of the machine's speed reaches all alike. A
time is the median over rounds.
"""

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch
import torch.distributed as dist

import megatron_keye
from megatron_keye.config.schema import RunConfig
from megatron_keye.plan.cost import cost_model
from megatron_keye.plan.timing import NO_TIME, PARTS, Fit, Work, fit, pipeline_rows, row_work, vision_work
from megatron_keye.plan.types import ReplicaPlan
from megatron_keye.train.batch import StepBatch
from megatron_keye.train.build import build_model
from megatron_keye.train.calibration import Calibration, Machine, PartCoefficients, Parts, PartTimes, timed_settings
from megatron_keye.train.calibration_design import DesignedStep, designed_replica
from megatron_keye.train.runtime import Runtime
from megatron_keye.train.step import TrainStep
from megatron_keye.train.synthetic import synthetic_batch
from megatron_keye.train.timing import Clock

ROUNDS = 8
"""At most, the first of which warms up."""
FEWEST_ROUNDS = 2


@dataclass(frozen=True)
class Measurement:
    """Median seconds of one part of a designed step, and the work that took them."""

    step: str
    part: str
    work: Work
    seconds: float


def measure(
    config: RunConfig, runtime: Runtime, steps: Sequence[DesignedStep], budget_s: float, report: Callable[[int], None],
    clock: Clock = time.perf_counter,
) -> list[Measurement]:  # fmt: skip
    """All measurements of all ranks, on every rank; each must call it. Begins no round that would end after `budget_s` by rank 0's
    clock, except for the first counted one. Steps have different names. `report` is told after each step how many were run, and
    `clock` times the parts."""
    began_s, round_s, done = time.perf_counter(), 0.0, 0
    bench = _Bench(config, runtime, clock)
    for number in range(ROUNDS):
        round_began_s = time.perf_counter()
        if number >= FEWEST_ROUNDS and _said_by_rank_0(round_began_s - began_s + round_s > budget_s, runtime):
            break
        for step in steps:
            bench.run(step)
            done += 1
            report(done)
        round_s = time.perf_counter() - round_began_s
    gathered: list = [None] * runtime.groups.world.size()
    dist.all_gather_object(gathered, bench.measurements(), group=runtime.groups.world)
    return [measurement for part in gathered for measurement in part]


@dataclass(frozen=True)
class BenchPlace:
    """What a rank's measurements depend on besides its times: its place in its replica, and the pipeline."""

    replica_rank: int
    stages: int
    chunks: int
    trains_encoder: bool


def rank_measurements(name: str, replica: ReplicaPlan, rounds: Sequence[dict[str, float]], place: BenchPlace) -> list[Measurement]:
    """Of one designed step on one rank, from the seconds of each part in every round: of the ViT where the rank encoded anything, of the
    decoder, per row, on the leader."""
    seconds = {part: float(np.median([parts[part] for parts in rounds[1:]])) for part in PARTS}
    found = []
    encoded = vision_work(replica, place.replica_rank)
    if encoded.items:
        passes = ("vision_forward", "vision_backward") if place.trains_encoder else ("vision_forward",)
        found += [Measurement(name, part, encoded, seconds[part]) for part in passes]
    if place.replica_rank == 0:
        rows = pipeline_rows(len(replica.rows), place.stages, place.chunks)
        found += [Measurement(name, part, row_work(replica.rows[0]), seconds[part] / rows) for part in ("decoder", "decoder_forward")]
    return found


class _Bench:
    """Runs designed steps on this rank and keeps their times."""

    def __init__(self, config: RunConfig, runtime: Runtime, clock: Clock):
        self._config, self._runtime = config, runtime
        self._cost = cost_model(config.model)
        self._model = build_model(config, runtime.groups, runtime.device)
        self._step = TrainStep(self._model, None, clock)
        self._replicas: dict[str, ReplicaPlan] = {}
        self._laps: dict[str, list[dict[str, float]]] = defaultdict(list)

    def run(self, step: DesignedStep) -> None:
        replica = designed_replica(step.samples, self._config, self._cost)
        self._replicas[step.name] = replica
        batch = self._batch(replica)
        world, timer = self._runtime.groups.world, self._step.timer
        dist.barrier(group=world)
        timer.start()
        self._step.evaluate(batch)
        timer.lap("decoder")
        evaluated = timer.laps()
        dist.barrier(group=world)
        self._step.accumulate(batch)
        laps = timer.laps()
        self._laps[step.name].append({
            "vision_forward": laps.get("encode", 0.0),
            "vision_backward": laps.get("encode_backward", 0.0),
            "decoder": laps["decoder"],
            "decoder_forward": evaluated["decoder"],
        })  # fmt: skip

    def measurements(self) -> list[Measurement]:
        groups, parallel = self._runtime.groups, self._config.parallel
        place = BenchPlace(groups.replica_rank, parallel.pp, parallel.vp, trains_encoder=self._model.encoder_ddp is not None)
        return [m for name, replica in self._replicas.items() for m in rank_measurements(name, replica, self._laps[name], place)]

    def _batch(self, replica: ReplicaPlan) -> StepBatch:
        groups = self._runtime.groups
        return synthetic_batch(0, (replica,) * groups.grid.dp, self._config, groups, self._runtime.device)


def _said_by_rank_0(answer: bool, runtime: Runtime) -> bool:
    said = torch.tensor(int(answer), device=runtime.device)
    dist.broadcast(said, src=0, group=runtime.groups.world)
    return bool(said)


def calibration_of(measurements: Sequence[Measurement], config: RunConfig, runtime: Runtime) -> Calibration:
    """What the measurements say. Raises PlanError where some part was not measured."""
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu"
    return Calibration(
        version=megatron_keye.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=Machine(host=platform.node(), device=device, processes=runtime.groups.world.size()),
        settings=timed_settings(config),
        parts=Parts(**{part: _part_times([m for m in measurements if m.part == part]) for part in PARTS}),
    )


def _part_times(measurements: Sequence[Measurement]) -> PartTimes:
    """Of a part that never ran, such as the backward pass of a frozen ViT, all coefficients are 0."""
    found = Fit(NO_TIME, np.zeros(1))
    if measurements:
        found = fit([m.work for m in measurements], [m.seconds for m in measurements])
    coefficients = found.coefficients
    return PartTimes(
        coefficients=PartCoefficients(
            token_ps=coefficients.token_ps, pair_ps=coefficients.pair_ps, item_ps=coefficients.item_ps, sequence_ps=coefficients.sequence_ps
        ),
        error_p95=round(float(np.percentile(found.errors, 95)), 4),
        error_max=round(float(found.errors.max()), 4),
        measurements=tuple((*m.work, m.seconds) for m in measurements),
    )
