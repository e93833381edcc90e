"""Ledgers written here step by step, whole and then damaged: a proof finds what was done to them and names it."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.errors import LedgerError
from megatron_keye.plan.blend import CYCLE
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.digest import LEDGER_START, ledger_digest
from megatron_keye.plan.ledger import (
    CHAIN_START,
    Rules,
    SegmentLine,
    Skipped,
    StepLine,
    chained,
    line_text,
    parse_line,
    position_runs,
    value_runs,
)
from megatron_keye.plan.ledger_proof import RunFiles, SavedPoint, TakenPositions, first_difference, prove
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.mixture import Mixture, Source, Stage, continued, fresh_mixture
from megatron_keye.plan.windows import Membership

N, SEED = 10, 3
COST = CostModel(1, 1, 1, 1, 1)
WEB, VQA = Source("web", "f1", N, 3), Source("vqa", "f2", 7, 2)
MIXTURE = fresh_mixture([WEB], (CYCLE,), SEED, blocks_per_window=2)
RULES = Rules(mixture=MIXTURE, global_batch_samples=4, lookahead=Lookahead(), plan_version=1)
"""Epochs end in mid-step."""


START = LEDGER_START.hex()


class Writer:
    """Writes a run as training does, from the planner's own positions. `saved` holds a checkpoint after every step."""

    def __init__(self, step=0, position=0, digest=START, after=CHAIN_START):
        self.cursor = Cursor(step, position, bytes.fromhex(digest))
        self.lines, self.saved, self.chain = [], [], after

    def add(self, line):
        self.lines.append(chained(line, self.chain))
        self.chain = self.lines[-1].chain

    def segment(self, rules):
        self.rules = rules
        cursor = self.cursor
        blank = {"digest": cursor.ledger.hex(), "after": self.chain, "chain": CHAIN_START}
        self.add(SegmentLine(step=cursor.step, position=cursor.position, rules=rules, **blank))
        return self

    def steps(self, count):
        for _ in range(count):
            rules = self.rules
            progress = self.cursor.progress.under(rules.global_batch_samples, rules.lookahead)
            positions = Membership(rules.mixture.order(), costs).positions(progress).tolist()
            self.step(positions, progress.after_step())
        return self

    def step(self, positions, after):
        samples, epochs = samples_and_epochs(self.rules.mixture, positions)
        digest = ledger_digest(self.cursor.ledger, samples)
        facts = {
            "positions": position_runs(positions),
            "epochs": value_runs(epochs),
            "samples": tuple(samples),
            "ids": tuple(f"s{sample}" for sample in samples),
            "crc32": tuple(sample * 7 for sample in samples),
            "sources": {"web": len(samples)},
        }
        self.add(StepLine(step=self.cursor.step, **facts, skipped=(), updated=True, digest=digest.hex(), chain=CHAIN_START))
        self.cursor = Cursor(self.cursor.step + 1, after.position, digest, after.stretches)
        self.saved.append(SavedPoint(f"step_{self.cursor.step}", self.cursor.step, digest.hex(), self.chain))

    def files(self, name="run", saved=()):
        return RunFiles(name, self.lines, saved)


def samples_and_epochs(mixture, positions):
    order, positions = mixture.order(), np.array(positions, np.int64)
    return order(positions).tolist(), mixture.epochs(order, positions).tolist()


def costs(samples, cost):
    return 1 + samples * samples * samples


def rechained(lines, after=CHAIN_START):
    """The lines with chains made anew: what a program with a fault in it would have written."""
    writer = Writer(after=after)
    for line in lines:
        writer.add(line)
    return writer.lines


def changed(lines, number, **fields):
    return [line.model_copy(update=fields) if index == number else line for index, line in enumerate(lines)]


def problem(lines, saved=()):
    with pytest.raises(LedgerError) as caught:
        prove([RunFiles("run", lines, saved)])
    return str(caught.value)


@pytest.fixture
def whole():
    return Writer().segment(RULES).steps(6)


def test_a_whole_ledger_is_proved_with_its_checkpoints(whole):
    proof = prove([whole.files(saved=whole.saved)])
    assert (proof.steps, proof.num_samples, proof.segments, proof.epochs) == (6, 24, 1, 3)
    assert proof.taken.base == 24 and not proof.open_positions
    assert proof.agreeing == whole.saved


def test_lines_survive_writing_and_reading(whole):
    skipped = (Skipped(sample=1, id="sä", source="web", reason='cut "off"\n'),)
    for line in changed(whole.lines, 3, skipped=skipped):
        text = line_text(line)
        assert text.count("\n") == 1
        assert parse_line(text.encode()) == line
        assert line_text(parse_line(text.encode())) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "EOF"), (b"\0\0", "JSON"), (b"[1]", "dictionary|object"), (b'{"kind": "step"', "EOF"), (b'{"step": 1}', "kind"),
        (b'{"kind": "step", "step": -1}', "step.step"), (b'{"kind": "segment", "step": "1"}', "segment.step"),
    ],
)  # fmt: skip
def test_what_is_no_line_is_refused(text, said):
    with pytest.raises(LedgerError, match=f"not a line of a ledger: .*({said})"):
        parse_line(text)


def test_an_unknown_field_is_refused(whole):
    fields = json.loads(line_text(whole.lines[1])) | {"extra": 1}
    with pytest.raises(LedgerError, match="extra"):
        parse_line(json.dumps(fields).encode())


def test_a_skipped_position_is_found(whole):
    writer = Writer().segment(RULES).steps(2)
    progress = writer.cursor.progress.under(4, Lookahead())
    writer.step([9, 10, 11, 12], progress.after_step())
    said = "run, line 4, step 2: it takes position 12 while position 8 is left out, expected only positions below 12"
    assert problem(writer.lines) == said


def test_a_repeated_position_is_found():
    writer = Writer().segment(RULES).steps(2)
    writer.step([7, 8, 9, 10], writer.cursor.progress.under(4, Lookahead()).after_step())
    assert problem(writer.lines) == "run, line 4, step 2: it takes position 7, which was taken before"


@pytest.mark.parametrize("fields", [{"ids": ("s1", "s2", "s3", "x")}, {"crc32": (1, 2, 3, 4)}, {"updated": False}])
def test_an_edited_field_breaks_the_chain(whole, fields):
    edited = changed(whole.lines, 2, **fields)
    assert problem(edited).startswith("run, line 3, step 1: its chain is ")
    assert "step_2 is" in problem(rechained(edited), whole.saved), "with the chain made anew, a checkpoint tells"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"samples": (0, 1, 2, 3)}, "slot 0 of its samples is 0, the order gives"),
        ({"epochs": ((1, 4),)}, "slot 0 of its epochs is 1, its positions give 0"),
        ({"ids": ("a",)}, "it has 1 ids, expected the global batch of 4"),
        ({"sources": {"web": 3}}, "it has 3 sources, expected the global batch of 4"),
        ({"digest": "0" * 64}, "its digest is 000000000000..., its samples and the step before give"),
        ({"skipped": (Skipped(sample=99, id="x", source="web", reason="r"),)}, "it skips x, which is not one of its samples"),
    ],
)
def test_fields_that_contradict_each_other_are_found_whatever_the_chain(whole, fields, said):
    assert said in problem(rechained(changed(whole.lines, 2, **fields)))


def test_lines_in_another_order_are_found(whole):
    lines = whole.lines
    swapped = [*lines[:2], lines[3], lines[2], *lines[4:]]
    assert "it is about step 2, expected step 1: lines are missing, repeated or out of order" in problem(swapped)
    assert "expected step 1" in problem(rechained([line for line in lines if line.step != 1]))
    assert "it is about step 1, expected step 2" in problem(rechained([*lines[:3], lines[2], *lines[3:]]))


def test_a_last_line_lost_after_a_checkpoint_is_found(whole):
    said = problem(whole.lines[:-1], whole.saved)
    assert said == "run ends after 5 steps, but checkpoint step_6 holds 6: lines were lost"
    assert prove([RunFiles("run", whole.lines[:-1], whole.saved[:-1])]).steps == 5


@pytest.mark.parametrize("name", ["digest", "chain"])
def test_a_checkpoint_of_other_samples_is_found(whole, name):
    other = replace(whole.saved[3], **{name: "ab" * 32})
    assert "checkpoint step_4 is abababababab...: they are not of one run" in problem(whole.lines, [other])


def test_nothing_is_proved_of_no_lines_or_without_a_segment(whole):
    assert problem([]) == "run has no whole line, expected a segment line and those of its steps"
    assert "no segment line stands before it" in problem(rechained(whole.lines[1:]))


AHEAD = RULES.model_copy(update={"lookahead": Lookahead(batches=3, canonical_replicas=2, cost=COST)})


@pytest.mark.parametrize("steps", range(1, 8))
def test_open_windows_leave_positions_and_they_are_listed(steps):
    writer = Writer().segment(AHEAD).steps(steps)
    opened = -(-steps // 3) * 12
    assert prove([writer.files()]).open_positions == sorted(set(range(opened)) - positions_of(writer.lines))


def positions_of(lines):
    return {position for line in lines if isinstance(line, StepLine) for position in line.slot_positions}


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(1, 6)), min_size=1, max_size=4))
def test_any_change_of_batch_and_lookahead_is_a_new_segment_of_a_whole_ledger(parts):
    writer = Writer()
    for steps, batches, batch in parts:
        lookahead = Lookahead(batches=batches, cost=COST)
        writer.segment(RULES.model_copy(update={"global_batch_samples": batch, "lookahead": lookahead})).steps(steps)
    proof = prove([writer.files(saved=writer.saved)])
    assert proof.num_samples == sum(steps * batch for steps, _, batch in parts)
    taken = positions_of(writer.lines)
    assert len(taken) == proof.num_samples
    assert taken.isdisjoint(proof.open_positions)
    assert taken | set(proof.open_positions) == set(range(len(taken) + len(proof.open_positions)))


def test_a_window_that_loses_a_position_for_good_is_found():
    writer = Writer().segment(AHEAD).steps(3)
    lost = writer.lines[2].positions[0][0]
    positions = [p for p in writer.lines[2].slot_positions if p != lost] + [12]
    fields = {"positions": position_runs(positions), "samples": tuple(samples_and_epochs(MIXTURE, positions)[0])}
    said = problem(rechained(changed(writer.lines, 2, **fields)))
    assert "it takes position 12 while position" in said and said.endswith("expected only positions below 12")


def test_a_run_that_goes_on_elsewhere_is_one_run(whole):
    point = whole.saved[3]
    second = Writer(4, 16, point.digest, point.chain).segment(RULES).steps(5)
    runs = [whole.files("one", whole.saved), second.files("two", [point, *second.saved])]
    proof = prove(runs)
    assert (proof.steps, proof.num_samples, proof.segments) == (9, 36, 2)
    assert [saved.steps for saved in proof.agreeing] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9], "not what the first run did beyond step 4"
    with pytest.raises(LedgerError, match="two begins at step 4, expected step 0: name the run before it first"):
        prove(runs[1:])
    short = RunFiles("one", whole.lines[:4], ())
    with pytest.raises(LedgerError, match="two begins at step 4, expected step 3"):
        prove([short, runs[1]])
    with pytest.raises(LedgerError, match="two, line 1, step 4: its after is"):
        prove([runs[0], Writer(4, 16, point.digest, "ab" * 32).segment(RULES).steps(1).files("two")])


def test_a_segment_that_does_not_go_on_is_found(whole):
    for fields, said in (({"position": 9}, "its position is 9"), ({"digest": "ab" * 32}, "its digest is abab")):
        segment = Writer(6, 24, whole.saved[-1].digest, whole.chain).segment(RULES).lines[0].model_copy(update=fields)
        assert said in problem(rechained([*whole.lines, segment]))


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        (replace(MIXTURE, seed=4), "does not go on with the one before: seed is 4, but was 3"),
        (replace(MIXTURE, sources=(replace(WEB, fingerprint="f9"),)), "source web has fingerprint f9, but had f1"),
        (replace(MIXTURE, stages=(Stage(0, (CYCLE,), (5,)),)), "the stages of its mixture are"),
        (Mixture(SEED, 2, (WEB, VQA), (MIXTURE.stages[0], Stage(20, (CYCLE // 2, CYCLE // 2), (20, 0)))), "the stages of its mixture are"),
        (Mixture(SEED, 2, (WEB, VQA), (MIXTURE.stages[0], Stage(24, (CYCLE // 2, CYCLE // 2), (23, 0)))), "the stages of its mixture are"),
    ],
)
def test_an_order_that_does_not_go_on_is_found(whole, mixture, said):
    """Another seed, other data, and sources that go on from another place than they had reached."""
    assert said in problem(whole.segment(RULES.model_copy(update={"mixture": mixture})).lines)


@pytest.mark.parametrize("rules", [RULES, AHEAD], ids=["one batch", "lookahead"])
def test_a_changed_mixture_goes_on_and_every_sample_comes_once_an_epoch(rules):
    writer = Writer().segment(rules).steps(4)
    for weights in ((CYCLE // 2, CYCLE // 2), (CYCLE // 4, CYCLE * 3 // 4)):
        wanted = fresh_mixture([WEB, VQA], weights, SEED, blocks_per_window=2)
        progress = writer.cursor.progress
        mixture = continued(writer.rules.mixture, wanted, progress.frontier).since(progress.base)
        writer.segment(rules.model_copy(update={"mixture": mixture})).steps(5)
    proof = prove([writer.files(saved=writer.saved)])
    assert (proof.segments, proof.steps) == (3, 14)
    taken = Counter()
    for line in writer.lines:
        if isinstance(line, StepLine):
            taken.update(zip(line.samples, line.slot_epochs, strict=True))
    assert len(taken) == 56
    assert set(taken.values()) == {1}, "no sample twice in one epoch of its source"


@given(st.permutations(range(30)))
def test_taken_positions_are_a_set(positions):
    taken, seen = TakenPositions(), set()
    for position in positions:
        assert taken.add([position]) is None
        seen.add(position)
        assert taken.end == max(seen) + 1
        assert taken.missing(30) == [p for p in range(30) if p not in seen]
        assert taken.add([position]) == position
    assert (taken.base, taken.ahead) == (30, set())


@given(st.lists(st.integers(0, 9)))
def test_runs_give_their_values_back(values):
    assert [v + i for v, count in position_runs(values) for i in range(count)] == values
    assert [v for v, count in value_runs(values) for _ in range(count)] == values
    assert all(a != b for (a, _), (b, _) in zip(value_runs(values), value_runs(values)[1:], strict=False))


def test_the_first_difference_is_named_with_step_slot_and_both_sides(whole):
    lines = whole.lines
    assert first_difference(lines, Writer().segment(RULES).steps(6).lines) is None
    other = changed(lines, 3, ids=(*lines[3].ids[:2], "x", lines[3].ids[3]))
    found = first_difference(lines, other)
    assert (found.step, found.slot, found.name, found.first, found.second) == (2, 2, "id", lines[3].ids[2], "x")
    assert first_difference(lines, lines[:-1]).step == 5
    assert first_difference(lines[:-1], lines).first == "missing"
    skipped = (Skipped(sample=lines[1].samples[0], id="s9", source="web", reason="r"),)
    found = first_difference(lines, changed(lines, 1, skipped=skipped))
    assert (found.step, found.slot, found.name, found.first, found.second) == (0, None, "skipped", "none", "s9")
    assert first_difference(lines, changed(lines, 1, updated=False)).name == "updated"
    larger = Writer().segment(RULES.model_copy(update={"global_batch_samples": 5})).steps(2)
    assert (first_difference(lines, larger.lines).slot, first_difference(lines, larger.lines).first) == (4, "missing")
