"""Why an attempt ended, and what to do about it. Pure functions: what was observed goes in, a decision comes out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

SETTINGS, NUMBERS, GIVEN_UP, CANCELLED = 65, 66, 93, 143
"""Exit codes of a job that is not to be tried again as it is."""

Cause = Literal[
    "done",  # the last step is saved
    "stopped",  # somebody put a STOP file there
    "cancelled",  # scancel
    "requeued",  # scontrol requeue, or preemption that requeues: SLURM starts the job again by itself
    "time_limit",  # the supervisor asked the run to stop in time
    "preempted",  # the ranks were told to end by a signal
    "disk_full",  # a save or another write found no room
    "settings",  # exit code 65
    "numbers",  # exit code 66
    "hang",  # no progress: ended by its own watchdog or by the supervisor's
    "lost_node",  # a node does not answer
    "bad_node",  # a node answers, and failed preflight
    "crash",  # anything else
    "vanished",  # the supervisor itself was lost, with its host
]
Fate = Literal["running", "requeued", "cancelled", "timed_out"]
"""What SLURM does with the job meanwhile."""
OWN_FAULTS = ("crash", "hang", "disk_full")
"""What may be the program's or the data's fault, so that it would come again."""
NO_ROOM = ("No space left on device", "Disk quota exceeded")
"""In the error of a rank. Others may make room, so that it is worth another try."""
NO_FAULT = ("requeued", "vanished", "lost_node", "bad_node")
"""What happens to a run, and says nothing about it."""


@dataclass(frozen=True)
class Failure:
    """A rank that did not end well. `exit_code` -n is signal n; `error` is the last line it wrote."""

    rank: int
    node: str
    exit_code: int
    time_s: float
    error: str = ""
    log: str = ""


@dataclass(frozen=True)
class Observed:
    """What there is to see when an attempt is over. SLURM's and srun's exit codes are not in it: srun ended with 0 after a node crash."""

    is_done: bool
    fate: Fate
    asked: Literal["", "time_limit", "preempted"] = ""
    """What the supervisor asked the run to stop for."""
    exit_codes: dict[str, int] = field(default_factory=dict)
    """Of the launcher on each node that lived to report one."""
    nodes: tuple[str, ...] = ()
    """That took part."""
    failures: tuple[Failure, ...] = ()
    """Earliest first."""
    stalled: bool = False
    stop_requested: bool = False
    """A STOP file that is not the supervisor's."""
    lost_nodes: tuple[str, ...] = ()
    bad_nodes: tuple[str, ...] = ()


def cause_of(seen: Observed) -> Cause:
    """The first of these that holds: what makes another attempt pointless comes before what makes it necessary."""
    codes = (*seen.exit_codes.values(), *(failure.exit_code for failure in seen.failures))
    told_to_end = set(seen.nodes) <= set(seen.exit_codes) and set(codes) <= {0, CANCELLED}
    rules: tuple[tuple[Cause, bool], ...] = (
        ("done", seen.is_done),
        ("cancelled", seen.fate == "cancelled"),
        ("requeued", seen.fate == "requeued"),
        ("disk_full", any(text in failure.error for failure in seen.failures for text in NO_ROOM)),
        ("settings", SETTINGS in codes),
        ("numbers", NUMBERS in codes),
        ("stopped", seen.stop_requested),
        ("time_limit", seen.fate == "timed_out"),
        (seen.asked or "preempted", bool(seen.asked)),
        ("lost_node", bool(seen.lost_nodes)),
        ("bad_node", bool(seen.bad_nodes)),
        ("hang", seen.stalled),
        ("preempted", bool(seen.nodes) and told_to_end),
    )
    return next((cause for cause, holds in rules if holds), "crash")


@dataclass(frozen=True)
class Ending:
    """One finished attempt, as the decision about the next needs it."""

    cause: Cause
    first_step: int
    """Steps in the checkpoint that it started from."""
    saved_step: int
    """Steps in the newest checkpoint when it ended."""
    last_step: int
    """The step that the run had reached."""
    error: str = ""
    """What the first rank to fail said last."""
    culprit: str = ""
    """The node of that rank, or of the rank that hung."""
    lost_nodes: tuple[str, ...] = ()
    bad_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """Limits of what is tried without a person. Counted over all jobs of a run."""

    node_counts: tuple[int, ...]
    """With how many nodes the run may go on, preferred ones first."""
    max_failures: int = 20
    """Attempts that ended by themselves, in all."""
    max_without_progress: int = 4
    """Attempts one after the other that saved nothing new."""
    max_starts_without_progress: int = 10
    """The same, those included that their nodes ended: bad nodes, lost ones, and what brings nodes down."""
    max_same_error: int = 3
    """Attempts one after the other with the same error at the same step."""
    max_blames: int = 2
    """Crashes and hangs that began on the same node, before it is left out."""
    backoff_s: float = 10.0
    """Before the second attempt without progress; doubled for each one more."""
    max_backoff_s: float = 600.0
    min_time_left_s: float = 120.0
    """With less left of the job's time, the job is requeued rather than restarted in place."""


@dataclass(frozen=True)
class Action:
    """What to do. `nodes` are for restart; `exclude` is for resubmit."""

    kind: Literal["finish", "restart", "requeue", "resubmit", "stop"]
    reason: str
    exit_code: int = 0
    delay_s: float = 0.0
    nodes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def decide(history: Sequence[Ending], allocated: Sequence[str], time_left_s: float, policy: Policy) -> Action:
    """What to do after the last attempt in `history` (oldest first, at least one); `allocated` are the job's nodes."""
    ending = history[-1]
    final = _if_final(ending) or if_hopeless(history, allocated, policy)
    if final is not None:
        return final
    delay_s = _backoff_s(history, policy)
    bad = {node for earlier in history for node in earlier.bad_nodes}
    exclude = tuple(sorted(bad | blamed_nodes(history, policy)))
    if ending.cause in ("time_limit", "preempted") or time_left_s < policy.min_time_left_s + delay_s:
        return _in_another_job(f"{ending.cause}: the next job goes on from step {ending.saved_step}", exclude, delay_s)
    healthy = [node for node in allocated if node not in exclude and node not in ending.lost_nodes]
    nodes = choose_nodes(healthy, policy.node_counts)
    if nodes:
        reason = f"{ending.cause}: again in this job from step {ending.saved_step}, on {len(nodes)} node(s)"
        return Action("restart", reason, delay_s=delay_s, nodes=nodes)
    return _in_another_job(f"{ending.cause}: {len(healthy)} node(s) are left, too few", exclude, delay_s)


def choose_nodes(healthy: Sequence[str], node_counts: Sequence[int]) -> tuple[str, ...]:
    """The nodes to run on: the first of the preferred counts that can be had, else none."""
    count = next((count for count in node_counts if count <= len(healthy)), 0)
    return tuple(healthy[:count])


def blamed_nodes(history: Sequence[Ending], policy: Policy) -> set[str]:
    """Nodes on which too many crashes and hangs began while other nodes were in use."""
    blames = [ending.culprit for ending in history if ending.cause in ("crash", "hang") and ending.culprit]
    return {node for node in blames if blames.count(node) >= policy.max_blames and max(policy.node_counts) > 1}


def _in_another_job(reason: str, exclude: tuple[str, ...], delay_s: float) -> Action:
    """SLURM itself sees that a lost node does not answer; that a node is bad only we know, and a queued job cannot learn it."""
    return Action("resubmit" if exclude else "requeue", reason, delay_s=delay_s, exclude=exclude)


def _if_final(ending: Ending) -> Action | None:
    match ending.cause:
        case "done":
            return Action("finish", f"complete after {ending.saved_step} steps")
        case "stopped":
            return Action("finish", f"stopped on request after {ending.saved_step} steps; the same command goes on from there")
        case "requeued":
            return Action("finish", "SLURM starts this job again")
        case "cancelled":
            return Action("finish", f"cancelled with {ending.saved_step} steps saved; the same command goes on from there", CANCELLED)
        case "settings":
            return Action("stop", f"settings or data must change first: {ending.error}", SETTINGS)
        case "numbers":
            return Action("stop", f"the numbers went wrong: {ending.error}", NUMBERS)
    return None


def if_hopeless(history: Sequence[Ending], allocated: Sequence[str], policy: Policy) -> Action | None:
    """To stop with a diagnosis, where another attempt would only burn the queue; None where it may help."""
    ending = history[-1]
    if ending.cause == "bad_node" and set(allocated) <= set(ending.bad_nodes):
        return Action("stop", f"preflight failed on every node: {ending.error}", GIVEN_UP)
    faults = [e for e in history if e.cause in OWN_FAULTS]
    latest = faults[-policy.max_same_error :]
    if ending.cause in OWN_FAULTS and len(latest) == policy.max_same_error and len({(e.last_step, _alike(e.error)) for e in latest}) == 1:
        return Action("stop", f"{len(latest)} attempts ended in step {ending.last_step} with the same error: {ending.error}", GIVEN_UP)
    if len(faults) >= policy.max_failures:
        return Action("stop", f"{len(faults)} attempts failed, the most that are tried; the last error: {ending.error}", GIVEN_UP)
    for limit, ignored in ((policy.max_without_progress, NO_FAULT), (policy.max_starts_without_progress, ("requeued",))):
        if _without_progress(history, ignored) >= limit:
            last = f"the last ended by {ending.cause}: {ending.error}"
            return Action("stop", f"{limit} attempts in a row saved nothing after step {ending.saved_step}; {last}", GIVEN_UP)
    return None


def _alike(error: str) -> str:
    """The same for errors that differ in ports, addresses or times only."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", error)


def _without_progress(history: Sequence[Ending], ignored: Sequence[Cause]) -> int:
    """Attempts at the end of `history` that saved nothing new, not counting those with an ignored cause."""
    counted = [ending for ending in history if ending.cause not in ignored]
    return sum(1 for _ in takewhile(lambda ending: ending.saved_step <= ending.first_step, reversed(counted)))


def _backoff_s(history: Sequence[Ending], policy: Policy) -> float:
    """None after an attempt that made progress, or that others ended; then doubling."""
    repeats = _without_progress(history, NO_FAULT)
    if not repeats or history[-1].cause not in OWN_FAULTS:
        return 0.0
    return min(policy.backoff_s * 2 ** (repeats - 1), policy.max_backoff_s)
