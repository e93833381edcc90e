"""One start of the ranks, from srun to what it left behind."""

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise import slurm
from megatron_keye.train.supervise.decide import Ending, Failure, Fate, Observed, cause_of
from megatron_keye.train.supervise.evidence import Evidence, saved_step
from megatron_keye.train.supervise.heartbeats import StallWatch, parse_beat
from megatron_keye.train.supervise.job import Job

POLL_S = 0.5
LOOKS_PER_LIMIT = 10
"""Heartbeats of thousands of ranks are read from a shared file system: no more often than the limit asks for."""
END_STEP_S = 20.0
"""For SLURM to end a step that it was told to kill."""
FIRST_PORT, NUM_PORTS = 20000, 10000
"""Below the range that the kernel gives to outgoing connections."""


@dataclass
class Asked:
    """What signals, or the clock, have asked this job for. The run is then to stop at its next step."""

    to_stop: Literal["", "time_limit", "preempted"] = ""

    def ask(self, what: Literal["time_limit", "preempted"]) -> None:
        self.to_stop = self.to_stop or what


@dataclass(frozen=True)
class Allocation:
    """A start of a SLURM job, and what it was given."""

    job: Job
    job_id: str
    restarts: int
    nodes: tuple[str, ...]
    end_time_s: float
    """In seconds since the epoch."""

    def fate(self) -> Fate:
        return slurm.fate_of(slurm.show_job(self.job_id), self.restarts, self.end_time_s)

    def time_left_s(self) -> float:
        return self.end_time_s - time.time()


def this_allocation(job: Job, environment: Mapping[str, str]) -> Allocation:
    """That of the job which this process is the batch shell of. Raises KeyeError."""
    job_id, restarts = environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0"))
    nodes = tuple(slurm.hostnames(environment["SLURM_JOB_NODELIST"]))
    return Allocation(job, job_id, restarts, nodes, slurm.end_time_s(slurm.show_job(job_id)))


@dataclass(frozen=True)
class Result:
    ending: Ending
    failures: tuple[Failure, ...] = ()


@dataclass
class RunningAttempt:
    """`run` blocks until the ranks have ended, by themselves or by force."""

    allocation: Allocation
    number: int
    nodes: Sequence[str]
    asked: Asked
    job: Job = field(init=False)
    evidence: Evidence = field(init=False)
    run_dir: RunDir = field(init=False)

    def __post_init__(self):
        self.job = self.allocation.job
        self.run_dir = RunDir(self.job.run_dir)
        self.evidence = Evidence(self.run_dir, self.number)

    def run(self) -> Result:
        first_step = saved_step(self.run_dir)
        self.evidence.prepare(self.nodes)
        environment = {**os.environ, **self._environment()}
        with subprocess.Popen(slurm.srun_command(self.job, self.nodes), env=environment, stdin=subprocess.DEVNULL) as step:
            stalled = self._watch(step)
            if stalled:
                slurm.end_step(self.allocation.job_id, slurm.TRAIN_STEP)
                _end(step)
        return self._result(first_step, stalled)

    def _environment(self) -> dict[str, str]:
        """What launch/node.sh needs to know."""
        return {
            "KEYE_RUN_DIR": self.job.run_dir,
            "KEYE_ATTEMPT_DIR": str(self.evidence.folder),
            "KEYE_NODES": str(len(self.nodes)),
            "KEYE_PROCESSES_PER_NODE": str(self.job.gpus_per_node),
            "KEYE_SHUTDOWN_TIMEOUT_S": str(self.job.shutdown_timeout_s),
            "KEYE_PYTHON": self.job.python,
            "MASTER_ADDR": self.nodes[0],
            "MASTER_PORT": str(free_port(int(self.allocation.job_id) * 37 + self.number)),
        }

    def _watch(self, step: subprocess.Popen) -> list[str]:
        """Until the step is over, or ranks (returned by name) have made no progress for too long."""
        watch = StallWatch(self.job.hang_s, self.job.slow_phase_s, time.monotonic())
        next_look_s = 0.0
        while step.poll() is None:
            if self.allocation.time_left_s() < self.job.lead_s:
                # SLURM's signal should have come; it may also have been lost.
                self.asked.ask("time_limit")
            if self.asked.to_stop:
                # Again and again: a run that is just starting takes a STOP file for one that an earlier start was meant to see.
                (self.run_dir.path / "STOP").touch()
            if (now_s := time.monotonic()) >= next_look_s:
                next_look_s = now_s + self.job.hang_s / LOOKS_PER_LIMIT
                if stalled := watch.look(self.evidence.heartbeats(), now_s):
                    return stalled
            time.sleep(POLL_S)
        return []

    def _result(self, first_step: int, stalled: list[str]) -> Result:
        failures = self.evidence.failures()
        stalled = self.evidence.collect_stacks() or stalled
        seen = self._observe(failures, bool(stalled))
        if self.asked.to_stop:
            self.run_dir.answer("STOP")
        if stalled:
            error = f"no progress: {', '.join(stalled)}"
        else:
            error = failures[0].error if failures else self.evidence.launcher_error()
        culprit = self._culprit(failures, stalled)
        saved, reached = saved_step(self.run_dir), self.evidence.last_step()
        return Result(Ending(cause_of(seen), first_step, saved, reached, error, culprit, seen.lost_nodes), failures)

    def _observe(self, failures: tuple[Failure, ...], stalled: bool) -> Observed:
        exit_codes = self.evidence.exit_codes()
        fate = self.allocation.fate()
        went_well = self.run_dir.is_done or (set(self.nodes) <= set(exit_codes) and not any(exit_codes.values()))
        lost: tuple[str, ...] = ()
        if fate == "running" and not went_well:
            answering = slurm.answering(self.nodes, self.job.root, self.job.run_dir)
            lost = tuple(node for node in self.nodes if node not in answering)
        return Observed(
            is_done=self.run_dir.is_done,
            fate=fate,
            asked=self.asked.to_stop,
            exit_codes=exit_codes,
            nodes=tuple(self.nodes),
            failures=failures,
            stalled=stalled,
            stop_requested=not self.asked.to_stop and self.run_dir.is_asked("STOP"),
            lost_nodes=lost,
        )

    def _culprit(self, failures: tuple[Failure, ...], stalled: list[str]) -> str:
        """The node of the first rank to fail, or of the one rank that hung before the others did; empty when that cannot be said."""
        if failures and not stalled:
            return failures[0].node
        beats = {rank: beat.step for rank, text in self.evidence.heartbeats().items() if (beat := parse_beat(text)) is not None}
        behind = [rank for rank, step in beats.items() if step == min(beats.values())]
        if not stalled or len(behind) != 1 or len(beats) == 1:
            return ""
        return self.nodes[int(behind[0].removeprefix("rank")) // self.job.gpus_per_node]


def free_port(seed: int) -> int:
    """A port that nobody on this host listens on; another one for another `seed`."""
    for i in range(NUM_PORTS):
        port = FIRST_PORT + (seed + i) % NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    return FIRST_PORT + seed % NUM_PORTS


def _end(step: subprocess.Popen) -> None:
    """SLURM cannot end a step on a node that does not answer; srun would wait for it."""
    try:
        step.wait(END_STEP_S)
    except subprocess.TimeoutExpired:
        step.kill()
