"""Resume state survives JSON, refuses damage, and refuses a run that would go on with other samples."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.errors import CheckpointError
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.cursor import Cursor, ResumeState, RunIdentity, check_resumable
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.windows import Stretch

STATE = ResumeState(Cursor(12, 768, bytes(range(32))), RunIdentity(seed=3, dataset_fingerprint="ab12", global_batch_samples=64))
COST = CostModel(1, 2, 3, 4, 5)
STRETCHES = (Stretch(3, 64, Lookahead(8, 512, 200, COST)), Stretch(1, 32, Lookahead()))
naturals = st.integers(0, 2**60)
stretches = st.builds(
    Stretch,
    st.integers(1, 20),
    st.integers(1, 2**20),
    st.builds(Lookahead, st.integers(1, 64), st.integers(1, 2**20), st.integers(100, 1000), st.builds(CostModel, *[naturals] * 5)),
)
states = st.builds(
    ResumeState,
    st.builds(
        Cursor,
        naturals,
        st.integers(2**30, 2**60),
        st.binary(min_size=32, max_size=32),
        st.lists(stretches, max_size=3).map(tuple),
    ),
    st.builds(RunIdentity, st.integers(), st.text(), naturals, naturals),
)


@given(states)
def test_json_there_and_back(state):
    assert ResumeState.from_json(state.to_json()) == state
    assert "\n" not in state.to_json()


def test_the_stored_form_is_pinned():
    """Checkpoints hold it: a change must still read this."""
    assert json.loads(STATE.to_json()) == {
        "step": 12,
        "position": 768,
        "ledger": bytes(range(32)).hex(),
        "seed": 3,
        "dataset_fingerprint": "ab12",
        "global_batch_samples": 64,
        "plan_version": 1,
    }


def test_an_open_window_is_stored_in_a_few_hundred_bytes():
    state = replace(STATE, cursor=replace(STATE.cursor, stretches=STRETCHES))
    assert json.loads(state.to_json())["stretches"] == [[3, 64, 8, 512, 200, [1, 2, 3, 4, 5, 0, 0]], [1, 32, 1, 1, 200, None]]
    assert len(state.to_json()) < 500
    assert state.cursor.progress.base == 768 - 3 * 64 - 32


def test_costs_from_before_documents_and_segments_had_their_own_are_read():
    stored = json.loads(STATE.to_json()) | {"stretches": [[3, 64, 8, 512, 200, [1, 2, 3, 4, 5]]]}
    assert ResumeState.from_json(json.dumps(stored)).cursor.stretches == STRETCHES[:1]


@pytest.mark.parametrize(
    "stretches",
    [
        5,
        [5],
        [[3, 64, 8, 512, 200]],
        [[3, 64, 8, 512, 200, None]],
        [[3, 64, 8, 512, 200, [1, 2]]],
        [[3, 64, 8, 512, 200, [1, 2, 3, 4, "5"]]],
        [[0, 64, 1, 1, 200, None]],
        [[1, 64, 1, 1, 50, None]],
        [[1.0, 64, 1, 1, 200, None]],
        [[13, 64, 1, 1, 200, None]],
    ],
)
def test_damaged_stretches_are_named(stretches):
    stored = json.loads(STATE.to_json()) | {"stretches": stretches}
    with pytest.raises(CheckpointError, match="stretches"):
        ResumeState.from_json(json.dumps(stored))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}"])
def test_what_is_not_a_resume_state_is_refused(text):
    with pytest.raises(CheckpointError, match="use an earlier one"):
        ResumeState.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("step", 1.0),
        ("step", True),
        ("position", -5),
        ("position", "768"),
        ("ledger", "00"),
        ("ledger", "zz" * 32),
        ("seed", None),
        ("dataset_fingerprint", 5),
    ],
)
def test_a_damaged_field_is_named(name, value):
    stored = json.loads(STATE.to_json()) | {name: value}
    with pytest.raises(CheckpointError, match=name):
        ResumeState.from_json(json.dumps(stored))


@pytest.mark.parametrize("edit", [lambda d: d.pop("seed"), lambda d: d.update(extra=1)])
def test_missing_and_unknown_fields_are_refused(edit):
    stored = json.loads(STATE.to_json())
    edit(stored)
    with pytest.raises(CheckpointError, match="was expected"):
        ResumeState.from_json(json.dumps(stored))


def test_the_same_run_is_resumable():
    check_resumable(STATE, replace(STATE.run))


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"seed": 4}, "train.seed back to 3"),
        ({"dataset_fingerprint": "cd34"}, "data.train"),
        ({"global_batch_samples": 32}, "data.global_batch_samples back to 64"),
        ({"plan_version": 99}, "version of megatron_keye"),
    ],
)
def test_each_difference_is_named_with_its_remedy(change, remedy):
    with pytest.raises(CheckpointError, match=remedy) as caught:
        check_resumable(STATE, replace(STATE.run, **change))
    (name, value), before = next(iter(change.items())), getattr(STATE.run, next(iter(change)))
    assert f"{name} is {value!r}, but the checkpoint's is {before!r}" in str(caught.value)
    assert str(caught.value).count("  - ") == 1


def test_all_differences_are_named_at_once():
    with pytest.raises(CheckpointError) as caught:
        check_resumable(STATE, RunIdentity(1, "x", 1, 0))
    assert str(caught.value).count("  - ") == 4
