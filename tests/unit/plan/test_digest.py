"""Equal plans have equal digests; a change of any number in a plan changes it, and is named."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.digest import LEDGER_START, PLAN_COLUMNS, first_difference, ledger_digest, plan_table, table_digest
from megatron_keye.plan.step import PlanData, PlanSettings, StepPlanner

COST = CostModel(decoder_token=1000, decoder_pair=3, vision_patch=400, vision_pair=2, projector_token=50)
SETTINGS = PlanSettings(1, 4, 512, 8, 256, 2, (0, 1), 1, COST)
SHAPES = [SampleShape(40 + 30 * n, (Segment(PatchGrid(1, 2, 2 * n + 2), 3),)) for n in range(6)]


def small_table(**changes):
    return plan_table(StepPlanner(PlanData.of(SHAPES), replace(SETTINGS, **changes)).plan(Cursor())[0])


@pytest.mark.parametrize("barrier", ["step", "phase", "microbatch"])
def test_any_change_changes_the_digest_and_is_named(barrier):
    table = small_table(barrier=barrier)
    digests = {table_digest(table)}
    for slot in range(len(table)):
        for column, name in enumerate(PLAN_COLUMNS):
            other = table.copy()
            other[slot, column] += 1
            digests.add(table_digest(other))
            assert first_difference(table, other) == (
                f"sample {slot} of the step has {name} {table[slot, column]} here and {table[slot, column] + 1} there"
            )
    digests.add(table_digest(table[:-1]))
    assert first_difference(table, table[:-1]) == "the step has 4 samples here and 3 there"
    assert first_difference(table, table.copy()) is None
    assert len(digests) == table.size + 2


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"seed": 2}, "number"),
        ({"cost": replace(COST, vision_pair=3)}, "vision cost"),
        ({"num_replicas": 1}, "replica"),
        ({"barrier": "microbatch"}, "row"),
        ({"microbatch_multiple": 3}, "rows of a replica"),
        ({"pad_multiple_tokens": 64}, "tokens"),
    ],
)
def test_ranks_with_other_settings_are_found(change, column):
    (changed,) = np.nonzero((small_table() != small_table(**change)).any(axis=0))
    assert column in [PLAN_COLUMNS[number] for number in changed]


def test_digests_are_the_same_in_every_process_and_version():
    """A change breaks runs whose ranks were started from different versions: intended, but not by accident."""
    numbers = np.arange(20, dtype=np.int64).reshape(2, 10)
    assert table_digest(numbers).hex() == "93aedb1d0e0613c1d555ad0e7835763c9a40f3068f1efe39205cd18914d138be"
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
