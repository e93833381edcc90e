"""The batch shell's place in a training job: one attempt after the other, and what is to be done between them."""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from megatron_keye.errors import KeyeError
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise import slurm
from megatron_keye.train.supervise.attempt import Allocation, Asked, Result, RunningAttempt, free_port
from megatron_keye.train.supervise.checks import check_nodes
from megatron_keye.train.supervise.decide import Action, Ending, Observed, cause_of, choose_nodes, decide, if_hopeless
from megatron_keye.train.supervise.diagnosis import write_diagnosis
from megatron_keye.train.supervise.evidence import Evidence, saved_step
from megatron_keye.train.supervise.journal import Attempt, Journal
from megatron_keye.train.supervise.servers import IoServers

RETRY_PAUSES_S = (5.0, 30.0, 60.0, 120.0)
Answer = TypeVar("Answer")


class Supervisor:
    """One start of a job."""

    def __init__(self, allocation: Allocation):
        self._allocation = allocation
        self._job, self._job_id = allocation.job, allocation.job_id
        self._run_dir = RunDir(self._job.run_dir)
        self._journal = Journal(self._run_dir.path)
        self._asked = Asked()
        self._io_servers = IoServers(self._job)
        self._lost: set[str] = set()
        """Nodes of this job that once did not answer."""

    def run(self) -> int:
        """Attempts until the run is over for this job. Returns the job's exit code."""
        signal.signal(signal.SIGUSR1, lambda *_: self._asked.ask("time_limit"))
        signal.signal(signal.SIGTERM, lambda *_: self._asked.ask("preempted"))
        self._run_dir.answer("STOP")  # meant for an earlier start
        self._close_vanished()
        if (hopeless := self._if_hopeless()) is not None:
            return self._leave(*hopeless)
        nodes = choose_nodes(self._allocation.nodes, self._job.policy.node_counts)
        checked = self._job.preflight == "off"
        while not self._run_dir.is_done:
            number = self._begin(nodes)
            self._io_servers.start()
            result = (None if checked else self._preflight()) or RunningAttempt(self._allocation, number, nodes, self._asked).run()
            checked = True
            ending, action = self._next(result.ending)
            self._journal.ended(number, time.time(), ending, action)
            self._say(f"{action.kind}: {action.reason}")
            if action.kind != "restart":
                return self._leave(action, replace(result, ending=ending))
            nodes = action.nodes
        self._say(f"{self._run_dir.path} is complete")
        return 0

    def _if_hopeless(self) -> tuple[Action, Result] | None:
        """What earlier starts say that no supervisor lived to decide."""
        endings = self._journal.endings()
        action = if_hopeless(endings, self._allocation.nodes, self._job.policy) if endings else None
        if action is None or self._run_dir.is_done:
            return None
        self._say(f"{action.kind}: {action.reason}")
        return action, Result(endings[-1])

    def _preflight(self) -> Result | None:
        """An attempt that ended before it began, when nodes are not fit; None when they are."""
        findings = check_nodes(self._job, self._allocation.nodes, free_port(int(self._job_id)))
        for note in findings.notes:
            self._say(note)
        if not findings.problems and not findings.lost_nodes:
            self._say(f"preflight: all {len(self._allocation.nodes)} nodes are fit")
            return None
        saved = saved_step(self._run_dir)
        cause = "bad_node" if findings.problems else "lost_node"
        error = findings.text or f"no answer from {', '.join(findings.lost_nodes)}"
        self._say(f"preflight: {error}")
        return Result(Ending(cause, saved, saved, saved, error, "", findings.lost_nodes, tuple(findings.problems)))

    def _begin(self, nodes: Sequence[str]) -> int:
        """Write down that an attempt begins; its number."""
        number = max((attempt.number for attempt in self._journal.attempts()), default=0) + 1
        first_step = saved_step(self._run_dir)
        self._journal.began(Attempt(number, self._job_id, tuple(nodes), time.time(), first_step))
        self._say(f"attempt {number} on {', '.join(nodes)}, from step {first_step}")
        return number

    def _next(self, ending: Ending) -> tuple[Ending, Action]:
        """The decision; a pause before a restart is part of it, since the job may be told to end meanwhile."""
        action = self._decide(ending)
        if action.kind == "restart" and action.delay_s:
            self._say(f"{action.reason}, in {action.delay_s:.0f} s")
            self._pause(action.delay_s)
            if self._asked.to_stop:
                seen = Observed(self._run_dir.is_done, self._allocation.fate(), self._asked.to_stop)
                ending = replace(ending, cause=cause_of(seen))
                action = self._decide(ending)
        return ending, action

    def _decide(self, ending: Ending) -> Action:
        self._lost.update(ending.lost_nodes)
        nodes = [node for node in self._allocation.nodes if node not in self._lost] + self._returned(ending)
        return decide([*self._journal.endings(), ending], nodes, self._allocation.time_left_s(), self._job.policy)

    def _returned(self, ending: Ending) -> list[str]:
        """Nodes that were lost before and answer again, so that a run that shrank grows. Not those that SLURM took from the job."""
        lost = sorted(self._lost.difference(ending.lost_nodes))
        return [] if self._asked.to_stop else slurm.answering(lost, self._job.root, self._job.run_dir)

    def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and not self._asked.to_stop:
            time.sleep(0.2)

    def _leave(self, action: Action, result: Result) -> int:
        """End this job: with a diagnosis, or with the run in the queue again."""
        match action.kind:
            case "stop":
                path = write_diagnosis(self._run_dir, result, action, self._journal)
                self._say(f"diagnosis in {path}")
            case "requeue":
                self._requeue()
            case "resubmit":
                self._resubmit(action.exclude)
        return action.exit_code

    def _requeue(self) -> None:
        try:
            self._insist(lambda: slurm.requeue(self._job_id))
        except KeyeError as error:
            self._say(f"{error}; submitting a new job instead")
            self._resubmit(())

    def _resubmit(self, exclude: Sequence[str]) -> None:
        try:
            job_id = self._insist(lambda: slurm.submit(self._job, exclude))
        except KeyeError as error:
            if not exclude:
                raise
            # Too few other nodes: better to wait for these to be repaired than to wait for ever.
            self._say(f"{error}; going on with {', '.join(exclude)}")
            slurm.requeue(self._job_id)
            return
        slurm.redirect_dependents(self._job_id, job_id)
        self._say(f"job {job_id} goes on, without {', '.join(exclude) or 'leaving out any node'}")

    def _insist(self, call: Callable[[], Answer]) -> Answer:
        """The answer of a SLURM command, which is not there while slurmctld is restarted. Raises the last KeyeError, and at once the one
        that stays as it is: before a time limit there are only minutes to requeue in."""
        for pause_s in RETRY_PAUSES_S:
            try:
                return call()
            except KeyeError as error:
                if slurm.TOO_FEW_NODES in str(error):
                    raise
                self._say(f"{error}; again in {pause_s:.0f} s")
                time.sleep(pause_s)
        return call()

    def _close_vanished(self) -> None:
        """An attempt without an ending lost its host, and with it its supervisor."""
        for attempt in self._journal.attempts():
            if attempt.ending is None:
                last_step = Evidence(self._run_dir, attempt.number).last_step()
                ending = Ending("vanished", attempt.first_step, saved_step(self._run_dir), last_step)
                action = Action("requeue", "the host of the supervisor was lost, or killed it")
                self._journal.ended(attempt.number, time.time(), ending, action)

    def _say(self, message: str) -> None:
        print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor {self._job_id}] {message}", flush=True)
