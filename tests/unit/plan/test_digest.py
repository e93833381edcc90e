"""Equal plans have equal digests; a change of any number in a plan changes it."""

from dataclasses import fields, is_dataclass, replace

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.plan.digest import LEDGER_START, ledger_digest, plan_digest
from megatron_keye.plan.types import Document, EncodeTask, ReplicaPlan, Row, StepPlan


def small_plan():
    """Two replicas, an empty row, a document without segments, a clip and frames."""
    clip = SampleShape(90, (Segment(PatchGrid(4, 4, 6), 3, 0.5), Segment(PatchGrid(1, 2, 2), 9)))
    text = SampleShape(10)
    rows = (Row((Document(7, clip, 0, 128), Document(3, text, 128, 64)), 192), Row((), 64))
    tasks = (EncodeTask(0, 0, 1, 0, 0), EncodeTask(0, 0, 0, 2, 1))
    return StepPlan(5, (7, 3, 1), (ReplicaPlan(rows, tasks, 2), ReplicaPlan((Row((Document(1, text, 0, 64),), 64), Row((), 64)), (), 0)))


def variants(value):
    """Every value that differs from this one in one number, or in one element more or less, anywhere inside it."""
    if is_dataclass(value):
        for field in fields(value):
            for other in variants(getattr(value, field.name)):
                yield replace(value, **{field.name: other})
    elif isinstance(value, tuple):
        for i, element in enumerate(value):
            yield value[:i] + value[i + 1 :]
            yield value[: i + 1] + value[i:]
            for other in variants(element):
                yield (*value[:i], other, *value[i + 1 :])
    else:
        yield value + 1
        yield value - 1


def test_any_change_changes_the_plan_digest():
    plans = {small_plan(), *variants(small_plan())}
    assert len(plans) > 100
    assert len({plan_digest(plan) for plan in plans}) == len(plans)


def test_order_of_members_matters():
    plan = small_plan()
    assert plan_digest(replace(plan, members=(3, 7, 1))) != plan_digest(plan)


def test_digest_is_the_same_in_every_process_and_version():
    """A change breaks runs whose ranks were started from different versions: intended, but not by accident."""
    assert plan_digest(small_plan()).hex() == "64c2b3ba98f2bf1b72403d1a95ef51c241eafe15a0605ea9f4bf8e9c4f477314"
    assert ledger_digest(LEDGER_START, (7, 3, 1)).hex() == "7cceac64065234911a101e65d01a045e2df9efe7d40ce513ccaa325a4245225a"


def test_ledger_is_a_chain_over_steps_in_order():
    def chain(*steps):
        digest = LEDGER_START
        for members in steps:
            digest = ledger_digest(digest, members)
        return digest

    histories = [((1, 2), (3, 4)), ((3, 4), (1, 2)), ((1, 2), (4, 3)), ((1, 2, 3, 4),), ((1,), (2, 3, 4)), ((1, 2),), ()]
    assert len({chain(*history) for history in histories}) == len(histories)
    assert chain((1, 2), (3, 4)) == chain((1, 2), (3, 4))
