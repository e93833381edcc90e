"""Resume state survives JSON, refuses damage, and refuses a run that would go on with other samples."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.errors import CheckpointError
from megatron_keye.plan.blend import CYCLE
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.cursor import Cursor, ResumeState
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.mixture import Mixture, Source, Stage, fresh_mixture
from megatron_keye.plan.windows import Stretch

CAPTIONS, CLIPS = Source("captions", "ab12", 5000, 70), Source("clips", "cd34", 900, 3)
MIXTURE = Mixture(3, 16, (CAPTIONS, CLIPS), (Stage(500, (CYCLE - 99, 99), (460, 40)),))
STATE = ResumeState(Cursor(12, 768, bytes(range(32))), MIXTURE)
COST = CostModel(1, 2, 3, 4, 5)
STRETCHES = (Stretch(3, 64, Lookahead(8, 512, 200, COST)), Stretch(1, 32, Lookahead()))
naturals = st.integers(0, 2**60)
stretches = st.builds(
    Stretch,
    st.integers(1, 20),
    st.integers(1, 2**20),
    st.builds(Lookahead, st.integers(1, 64), st.integers(1, 2**20), st.integers(100, 1000), st.builds(CostModel, *[naturals] * 5)),
)
sources = st.builds(Source, st.text(), st.text(), st.integers(1, 2**40), st.integers(1, 2**40))


@st.composite
def mixtures(draw):
    own = draw(st.lists(sources, min_size=1, max_size=3))
    shares = [draw(st.integers(0, CYCLE // 3)) for _ in own[1:]]
    positions = sorted(draw(st.sets(st.integers(0, 2**20), min_size=1, max_size=3)))
    stages = tuple(Stage(position, (CYCLE - sum(shares), *shares), tuple(draw(naturals) for _ in own)) for position in positions)
    return Mixture(draw(st.integers()), draw(st.integers(1, 100)), tuple(own), stages)


states = st.builds(
    ResumeState,
    st.builds(
        Cursor,
        naturals,
        st.integers(2**30, 2**60),
        st.binary(min_size=32, max_size=32),
        st.lists(stretches, max_size=3).map(tuple),
    ),
    mixtures(),
    naturals,
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
        "blocks_per_window": 16,
        "sources": [["captions", "ab12", 5000, 70], ["clips", "cd34", 900, 3]],
        "stages": [[500, [16285, 99], [460, 40]]],
        "plan_version": 2,
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
        ("blocks_per_window", "x"),
        ("sources", [["captions", "ab12", 5000]]),
        ("sources", [["captions", "ab12", 0, 1], ["clips", "cd34", 900, 3]]),
        ("sources", [["captions", "ab12", 5000.0, 1], ["clips", "cd34", 900, 3]]),
        ("sources", []),
        ("stages", []),
        ("stages", [[640, [16285, 98], [600, 40]]]),
        ("stages", [[-640, [16285, 99], [600, 40]]]),
        ("stages", [[640, [16285, 99]]]),
        ("stages", [[769, [16285, 99], [600, 40]]]),
    ],
)
def test_a_damaged_field_is_named(name, value):
    stored = json.loads(STATE.to_json()) | {name: value}
    with pytest.raises(CheckpointError, match=f"{name}.* use an earlier one"):
        ResumeState.from_json(json.dumps(stored))


@pytest.mark.parametrize("edit", [lambda d: d.pop("seed"), lambda d: d.update(extra=1)])
def test_missing_and_unknown_fields_are_refused(edit):
    stored = json.loads(STATE.to_json())
    edit(stored)
    with pytest.raises(CheckpointError, match="was expected"):
        ResumeState.from_json(json.dumps(stored))


def wanted(sources=(CAPTIONS, CLIPS), weights=(CYCLE - 99, 99), seed=3, blocks_per_window=16):
    return fresh_mixture(sources, weights, seed, blocks_per_window)


def test_the_same_run_goes_on_as_it_was():
    assert STATE.going_on(wanted()) == STATE


def test_other_weights_open_a_stage_after_the_open_window():
    open_window = replace(STATE, cursor=replace(STATE.cursor, stretches=(Stretch(3, 64, Lookahead(4, 1, 200, COST)),)))
    after = open_window.going_on(wanted(weights=(0, CYCLE))).mixture
    assert [stage.position for stage in after.stages] == [500, 768 + 64]
    assert after.stages[-1].weights == (0, CYCLE)
    assert sum(after.stages[-1].starts) == 500 + (768 + 64 - 500)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"seed": 4}, "set train.seed back"),
        ({"sources": (replace(CAPTIONS, fingerprint="ef56"), CLIPS)}, "source captions has fingerprint ef56, but had ab12"),
        ({"blocks_per_window": 9}, "set data.order.blocks_per_window back"),
    ],
)
def test_each_difference_is_named_with_its_remedy(change, remedy):
    with pytest.raises(CheckpointError, match=f"Cannot resume at step 12.*\n  - .*{remedy}.*\nOr start a new run") as caught:
        STATE.going_on(wanted(**change))
    assert str(caught.value).count("  - ") == 1


def test_all_differences_are_named_at_once():
    with pytest.raises(CheckpointError, match="use the version of megatron_keye that wrote it") as caught:
        replace(STATE, plan_version=99).going_on(wanted(seed=1, blocks_per_window=1, sources=(CLIPS, CAPTIONS)))
    assert str(caught.value).count("  - ") == 4
