"""What is done after an attempt, as tables: why it ended, and what follows."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.train.supervise.decide import (
    GIVEN_UP,
    OWN_FAULTS,
    Ending,
    Failure,
    Observed,
    Policy,
    cause_of,
    choose_nodes,
    decide,
    if_hopeless,
)

NODES = ("n1", "n2", "n3")
POLICY = Policy(node_counts=(3,), backoff_s=10.0, max_backoff_s=60.0, min_time_left_s=100.0)
PLENTY_S = 1e5
CRASHED = Failure(rank=3, node="n2", exit_code=1, time_s=1.0, error="ValueError: x")
ALL_WELL = dict.fromkeys(NODES, 0)
TOLD = dict.fromkeys(NODES, 143)


def seen(**changes) -> Observed:
    return replace(Observed(is_done=False, fate="running", nodes=NODES), **changes)


@pytest.mark.parametrize(
    ("observed", "cause"),
    [
        (seen(is_done=True), "done"),
        (seen(is_done=True, fate="cancelled", failures=(CRASHED,)), "done"),
        (seen(fate="cancelled", asked="preempted", exit_codes=TOLD), "cancelled"),
        (seen(fate="requeued", asked="preempted", exit_codes=TOLD), "requeued"),
        (seen(fate="timed_out"), "time_limit"),
        (seen(asked="time_limit", exit_codes=ALL_WELL), "time_limit"),
        (seen(asked="time_limit", failures=(CRASHED,)), "time_limit"),
        (seen(asked="preempted", stalled=True, lost_nodes=("n1",)), "preempted"),
        (seen(stalled=True, stop_requested=True), "stopped"),
        (seen(exit_codes=TOLD), "preempted"),
        (seen(exit_codes=ALL_WELL), "preempted"),
        (seen(exit_codes=ALL_WELL, stop_requested=True), "stopped"),
        (seen(failures=(CRASHED,), stop_requested=True), "stopped"),
        (seen(exit_codes={"n1": 65}), "settings"),
        (seen(exit_codes={"n1": 65}, failures=(replace(CRASHED, error="OSError: No space left on device"),)), "disk_full"),
        (seen(exit_codes={"n1": 143, "n2": 66, "n3": 143}), "numbers"),
        (seen(failures=(CRASHED,), exit_codes={"n1": 143, "n2": 1}), "crash"),
        (seen(failures=(CRASHED,), lost_nodes=("n3",)), "lost_node"),
        (seen(stalled=True, lost_nodes=("n3",)), "lost_node"),
        (seen(stalled=True, failures=(CRASHED,)), "hang"),
        (seen(bad_nodes=("n1",)), "bad_node"),
        (seen(exit_codes={"n1": 0, "n2": 0}), "crash"),  # srun may end with 0, but one node never reported
        (seen(), "crash"),
    ],
)
def test_cause(observed, cause):
    assert cause_of(observed) == cause


def ended(cause, first=0, saved=10, last=12, **details) -> Ending:
    return Ending(cause, first, saved, last, **details)


def stuck(cause="crash", last=3, **details) -> Ending:
    """An attempt that saved nothing."""
    return ended(cause, first=10, saved=10, last=last, **details)


@pytest.mark.parametrize(
    ("cause", "kind", "exit_code"),
    [
        ("done", "finish", 0),
        ("stopped", "finish", 0),
        ("requeued", "finish", 0),
        ("cancelled", "finish", 143),
        ("settings", "stop", 65),
        ("numbers", "stop", 66),
        ("time_limit", "requeue", 0),
        ("preempted", "requeue", 0),
        ("crash", "restart", 0),
        ("hang", "restart", 0),
    ],
)
def test_action_after_one_ending(cause, kind, exit_code):
    action = decide([ended(cause)], NODES, PLENTY_S, POLICY)
    assert (action.kind, action.exit_code) == (kind, exit_code)


def test_a_lost_node_leaves_too_few():
    """SLURM knows that it does not answer, so nothing is excluded."""
    action = decide([ended("lost_node", lost_nodes=("n2",))], NODES, PLENTY_S, POLICY)
    assert (action.kind, action.exclude) == ("requeue", ())


@pytest.mark.parametrize(
    ("node_counts", "lost", "kind", "nodes"),
    [
        ((3, 2), ("n2",), "restart", ("n1", "n3")),
        ((2,), ("n1",), "restart", ("n2", "n3")),  # one of them was a spare
        ((3, 2, 1), ("n1", "n3"), "restart", ("n2",)),
        ((4, 2), ("n1", "n3"), "requeue", ()),
    ],
)
def test_a_lost_node_is_left_behind_where_the_layout_allows(node_counts, lost, kind, nodes):
    policy = replace(POLICY, node_counts=node_counts)
    action = decide([ended("lost_node", lost_nodes=lost)], NODES, PLENTY_S, policy)
    assert (action.kind, action.nodes) == (kind, nodes)


def test_a_bad_node_is_left_out_of_the_next_job():
    action = decide([ended("bad_node", bad_nodes=("n2",))], NODES, PLENTY_S, POLICY)
    assert (action.kind, action.exclude) == ("resubmit", ("n2",))


def test_a_bad_node_stays_out():
    history = [ended("bad_node", bad_nodes=("n2",)), ended("time_limit")]
    action = decide(history, NODES, PLENTY_S, POLICY)
    assert (action.kind, action.exclude) == ("resubmit", ("n2",))


def test_nodes_that_are_all_bad_are_a_problem_of_the_check():
    action = decide([ended("bad_node", bad_nodes=NODES, error="disk full")], NODES, PLENTY_S, POLICY)
    assert (action.kind, action.exit_code) == ("stop", GIVEN_UP)
    assert "disk full" in action.reason


def test_a_node_on_which_attempts_begin_to_fail_is_blamed():
    history = [ended("crash", last=5, culprit="n2", error="a"), ended("lost_node"), ended("hang", last=9, culprit="n2", error="b")]
    action = decide(history, NODES, PLENTY_S, POLICY)
    assert (action.kind, action.exclude) == ("resubmit", ("n2",))
    spare = decide(history, NODES, PLENTY_S, replace(POLICY, node_counts=(2,)))
    assert (spare.kind, spare.nodes) == ("restart", ("n1", "n3"))
    assert decide(history[1:], NODES, PLENTY_S, POLICY).kind == "restart"
    alone = replace(POLICY, node_counts=(1,))
    assert decide(history, ("n2",), PLENTY_S, alone).kind == "restart", "a run on one node can only fail there"


def test_with_little_time_left_the_job_is_requeued():
    assert decide([ended("crash")], NODES, 99.0, POLICY).kind == "requeue"


def test_a_pause_must_fit_into_the_time_that_is_left():
    assert decide([stuck()], NODES, 109.0, POLICY).kind == "requeue"
    assert decide([stuck()], NODES, 111.0, POLICY).kind == "restart"


def test_the_same_error_in_the_same_step_ends_the_run():
    same = [stuck(error=f"ValueError: x at 0x7f{n}, port {n}", last=12) for n in range(3)]
    action = decide(same, NODES, PLENTY_S, POLICY)
    assert (action.kind, action.exit_code) == ("stop", GIVEN_UP)
    assert "step 12" in action.reason
    assert "ValueError: x" in action.reason
    interrupted = [same[0], ended("lost_node"), same[1], stuck("requeued"), same[2]]
    assert decide(interrupted, NODES, PLENTY_S, POLICY).kind == "stop", "what happens in between does not hide it"
    assert decide(same[:2], NODES, PLENTY_S, POLICY).kind == "restart"
    assert decide([*same[:2], stuck(error="ValueError: y", last=12)], NODES, PLENTY_S, POLICY).kind == "restart"
    assert decide([*same[:2], replace(same[0], last_step=13)], NODES, PLENTY_S, POLICY).kind == "restart"


def test_attempts_that_save_nothing_end_the_run():
    history = [stuck(last=last, error=str(last)) for last in range(11, 15)]
    assert decide(history[:3], NODES, PLENTY_S, POLICY).kind == "restart"
    assert decide(history, NODES, PLENTY_S, POLICY).kind == "stop"
    assert decide([*history[:3], ended("crash", first=10, saved=20)], NODES, PLENTY_S, POLICY).kind == "restart"
    assert decide([stuck("time_limit", last=last) for last in range(11, 15)], NODES, PLENTY_S, POLICY).kind == "stop"


def test_nodes_that_come_and_go_never_end_a_run():
    assert decide([ended("lost_node", lost_nodes=("n1",))] * 50, NODES, PLENTY_S, POLICY).kind == "requeue"
    assert decide([*[stuck("requeued")] * 50, stuck("crash")], NODES, PLENTY_S, POLICY).kind == "restart"


def test_one_bad_node_after_the_other():
    """Every start finds another one, or one that there are too few others to leave out."""
    history: list[Ending] = []
    actions = []
    for start in range(POLICY.max_starts_without_progress):
        bad = f"n{start % 4}"
        history.append(stuck("bad_node", bad_nodes=(bad,), error=f"{bad}: GPU 3 does not compute"))
        actions.append(decide(history, (bad, "n7", "n8"), PLENTY_S, POLICY))
    *tried, last = actions
    assert {action.kind for action in tried} == {"resubmit"}
    assert tried[-1].exclude == ("n0", "n1", "n2", "n3")
    assert (last.kind, last.exit_code) == ("stop", GIVEN_UP)
    assert "saved nothing after step 10; the last ended by bad_node: n1: GPU 3 does not compute" in last.reason


@pytest.mark.parametrize("cause", ["lost_node", "vanished"])
def test_a_run_that_brings_its_nodes_down(cause):
    history = [stuck(cause, lost_nodes=("n1",))] * POLICY.max_starts_without_progress
    assert if_hopeless(history[:-1], NODES, POLICY) is None
    assert if_hopeless([*history[:-1], stuck("requeued")], NODES, POLICY) is None
    assert if_hopeless(history, NODES, POLICY).kind == "stop"
    saved = [*history[:-1], ended(cause), history[-1]]
    assert if_hopeless(saved, NODES, POLICY) is None, "it is getting on"


def test_failures_are_counted():
    history = [ended("crash", first=i, saved=i + 1, last=i + 1, error=str(i)) for i in range(20)]
    assert decide(history[:19], NODES, PLENTY_S, POLICY).kind == "restart"
    assert decide(history, NODES, PLENTY_S, POLICY).kind == "stop"


def test_backoff_doubles_while_nothing_is_saved():
    policy = replace(POLICY, max_without_progress=9)
    history = [stuck(last=last, error=str(last)) for last in range(5)]
    delays = [decide(history[: n + 1], NODES, PLENTY_S, policy).delay_s for n in range(5)]
    assert delays == [10, 20, 40, 60, 60]
    assert decide([ended("crash")], NODES, PLENTY_S, policy).delay_s == 0


def test_nodes_are_chosen_in_their_order():
    assert choose_nodes(["b", "a", "c"], (4, 2)) == ("b", "a")
    assert choose_nodes(["b"], (4, 2)) == ()


endings = st.builds(
    Ending,
    cause=st.sampled_from(["crash", "hang", "lost_node", "bad_node", "time_limit", "preempted", "vanished"]),
    first_step=st.just(0),
    saved_step=st.integers(0, 1),
    last_step=st.integers(0, 2),
    error=st.sampled_from(["", "a", "b"]),
    culprit=st.sampled_from(["", *NODES]),
    lost_nodes=st.sets(st.sampled_from(NODES)).map(tuple),
    bad_nodes=st.sets(st.sampled_from(NODES)).map(tuple),
)


@given(history=st.lists(endings, min_size=1, max_size=8), time_left_s=st.floats(0, 1e6), count=st.integers(1, 3))
def test_whatever_happened(history, time_left_s, count):
    """A restart has as many nodes as allowed, none that was lost or is bad, and time left; faults do not go on for ever."""
    policy = replace(POLICY, node_counts=(count,), max_failures=5)
    action = decide(history, NODES, time_left_s, policy)
    ending = history[-1]
    if action.kind == "restart":
        assert len(action.nodes) == count
        assert not {*ending.lost_nodes, *(node for e in history for node in e.bad_nodes)} & set(action.nodes)
        assert time_left_s >= policy.min_time_left_s + action.delay_s
    if action.kind == "resubmit":
        assert action.exclude
    if sum(e.cause in OWN_FAULTS for e in history) >= policy.max_failures:
        assert action.kind == "stop"
