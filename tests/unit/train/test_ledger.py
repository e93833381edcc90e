"""The ledger file: what is written, what every start keeps of it, and what `keye ledger` says of it."""

import errno
import os
from collections import Counter
from types import SimpleNamespace

import pytest

from megatron_keye.errors import KeyeError, LedgerError
from megatron_keye.plan.blend import CYCLE
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.digest import ledger_digest
from megatron_keye.plan.ledger import CHAIN_START, Rules, SegmentLine, Skipped, StepLine, line_text
from megatron_keye.plan.ledger_proof import RunFiles, prove
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.mixture import Source, fresh_mixture
from megatron_keye.plan.windows import Membership
from megatron_keye.train import cli
from megatron_keye.train.ledger import LedgerWriter, left_out, read_ledger
from megatron_keye.train.run_dir import RunDir

N = 10


class Samples:
    """Ten samples of two sources."""

    def sample_id(self, sample):
        return f"id{sample}"

    def record_crc32(self, sample):
        return sample + 1

    def source(self, sample):
        return "web" if sample < 7 else "vqa"


def rules(batch=4):
    mixture = fresh_mixture([Source("web", "f1", N, 3)], (CYCLE,), 3, blocks_per_window=2)
    return Rules(mixture=mixture, global_batch_samples=batch, lookahead=Lookahead(), plan_version=1)


class Run:
    """A run in a directory, started as often as one likes; `checkpoints` has cursor and chain after each number of steps."""

    def __init__(self, path):
        self.dir = RunDir(path)
        self.dir.create()
        self.checkpoints = {0: (Cursor(), CHAIN_START)}

    def start(self, at, batch=4):
        cursor, chain = self.checkpoints[at]
        self.writer, self.cursor = LedgerWriter(self.dir.ledger, Samples(), rules(batch), cursor, chain), cursor
        return self

    def steps(self, count, batch=4, skipped=()):
        for _ in range(count):
            progress = self.cursor.progress.under(batch, Lookahead())
            order = rules().mixture.order()
            positions = Membership(order, None).positions(progress)
            members = tuple(order(positions).tolist())
            plan = SimpleNamespace(step=self.cursor.step, positions=tuple(positions.tolist()), members=members)
            digest = ledger_digest(self.cursor.ledger, members)
            self.cursor = Cursor(plan.step + 1, progress.after_step().position, digest)
            self.writer.step(plan, self.cursor, left_out(plan, skipped, Samples()), updated=True)
            self.checkpoints[self.cursor.step] = (self.cursor, self.writer.chain)
        return self

    @property
    def text(self):
        return self.dir.ledger.read_text()

    def lines(self):
        return list(read_ledger(self.dir.ledger))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run").start(0).steps(6)


def proved(run):
    return prove([RunFiles("run", run.lines(), ())])


def test_a_run_is_a_segment_and_its_steps(run):
    segment, first, *_ = run.lines()
    assert (segment.rules, segment.position, segment.after) == (rules(), 0, CHAIN_START)
    assert first.ids == tuple(f"id{sample}" for sample in first.samples)
    assert first.crc32 == tuple(sample + 1 for sample in first.samples)
    assert sum(first.sources.values()) == 4
    assert proved(run).num_samples == 24


@pytest.mark.parametrize("at", range(7))
def test_every_restart_writes_the_ledger_of_an_undisturbed_run(run, at):
    whole = run.text
    run.start(at)
    assert [line.step for line in run.lines() if isinstance(line, StepLine)] == list(range(at))
    assert run.steps(6 - at).text == whole


@pytest.mark.parametrize("at", range(6))
def test_what_is_torn_is_dropped(run, at):
    """Killed while any byte of the line after the checkpoint was written."""
    whole = run.text.splitlines(keepends=True)
    kept, torn = "".join(whole[: at + 1]), whole[at + 1]
    for length in (1, len(torn) // 2, len(torn) - 1, len(torn)):
        run.dir.ledger.write_text(kept + torn[:length])
        assert [line.step for line in run.lines()][-1] == (at if length == len(torn) else max(0, at - 1))
        assert run.start(at).steps(6 - at).text == "".join(whole)


def test_new_rules_open_a_segment_and_old_ones_stay(run):
    before = run.text
    run.start(6, batch=5).steps(2, batch=5)
    assert run.text.startswith(before)
    assert [line.step for line in run.lines() if isinstance(line, SegmentLine)] == [0, 6]
    proof = proved(run)
    assert (proof.steps, proof.num_samples, proof.segments) == (8, 34, 2)
    changed = run.text
    run.start(7, batch=5)
    assert run.steps(1, batch=5).text == changed, "the same rules again"
    run.start(6)
    assert run.text == before, "the segment had no step in the checkpoint"


def test_stages_that_are_over_do_not_open_a_segment(tmp_path):
    """A resume state forgets the stages before its cursor, which changes nothing about what is to come."""
    path = tmp_path / "ledger.jsonl"
    sources = [Source("web", "f1", N, 3), Source("vqa", "f2", N, 3)]
    mixture = fresh_mixture(sources, (CYCLE // 2, CYCLE // 2), 3, 2).with_weights((CYCLE // 4, CYCLE * 3 // 4), 8)
    both = rules().model_copy(update={"mixture": mixture})
    writer = LedgerWriter(path, Samples(), both, Cursor(), CHAIN_START)
    cursor = Cursor()
    for step in range(3):
        cursor = Cursor(step + 1, 4 * step + 4, ledger_digest(cursor.ledger, (step,)))
        plan = SimpleNamespace(step=step, positions=tuple(range(4 * step, 4 * step + 4)), members=(step,))
        writer.step(plan, cursor, [], updated=True)
    before = path.read_text()
    assert both.since(12) != both
    LedgerWriter(path, Samples(), both.since(12), cursor, writer.chain)
    assert path.read_text() == before


def lost_line(text):
    return "".join(text.splitlines(keepends=True)[:-2])


def damaged_line(text):
    return text.replace('"kind":"step"', '"kind":"st\0p"', 1)


@pytest.mark.parametrize("damage", [lost_line, damaged_line, lambda text: "{}\n"])
def test_a_ledger_that_does_not_lead_to_the_checkpoint_is_left_as_it_is(run, damage):
    run.dir.ledger.write_text(damage(run.text))
    before = run.text
    with pytest.raises(LedgerError, match=r"ledger\.jsonl does not lead to the checkpoint after 6 steps: lines were lost or changed"):
        run.start(6)
    assert run.text == before


def test_lines_are_on_disk_after_a_flush_or_it_says_why(run, monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")))
    run.writer.flush()
    assert flushed == [str(run.dir.ledger), str(run.dir.path)]

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LedgerError, match=r"ledger\.jsonl cannot be written to disk \(No space left on device\): make room"):
        run.writer.flush()


def test_a_line_that_cannot_be_written_ends_the_run_with_the_reason(run, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    with pytest.raises(KeyeError, match=r"cannot write .*ledger\.jsonl \(No space left on device\): make room"):
        run.steps(1)


def test_without_a_ledger_a_new_one_goes_on_from_the_checkpoint(run):
    first = run.lines()
    run.dir.ledger.unlink()
    assert run.start(4).writer.continues_elsewhere
    run.steps(3)
    assert [line.step for line in run.lines()] == [4, 4, 5, 6]
    assert prove([RunFiles("first", first, ()), RunFiles("second", run.lines(), ())]).steps == 7


def test_counts_by_source_go_on_at_every_start(tmp_path):
    skipped = [SimpleNamespace(sample=2, reason="cut off"), SimpleNamespace(sample=8, reason="gone")]
    run = Run(tmp_path).start(0).steps(5, skipped=skipped)
    assert {(s.sample, s.id, s.source) for line in run.lines()[1:] for s in line.skipped} == {(2, "id2", "web"), (8, "id8", "vqa")}
    for at in (5, 3):
        counts = run.start(at).writer.counts
        samples = [sample for line in run.lines() if isinstance(line, StepLine) for sample in line.samples]
        assert counts.taken == Counter(map(Samples().source, samples)) and counts.taken.total() == 4 * at
        assert counts.bad == {"web": samples.count(2), "vqa": samples.count(8)}


def test_left_out_samples_are_named_by_slot_whichever_rank_met_them():
    plan = SimpleNamespace(members=(5, 2, 9, 2))
    skipped = [SimpleNamespace(sample=9, reason="b"), SimpleNamespace(sample=2, reason="a"), SimpleNamespace(sample=2, reason="a")]
    found = left_out(plan, skipped, Samples())
    assert found == left_out(plan, reversed(skipped), Samples())
    assert found[1] == Skipped(sample=9, id="id9", source="vqa", reason="b")
    assert [s.sample for s in found] == [2, 9, 2]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def keye(capsys, *arguments):
    code = cli.main(["ledger", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, " ".join(printed.out.split()), printed.err


def test_verify_says_what_was_proved(run, capsys):
    code, out, _ = keye(capsys, "verify", run.dir.path)
    assert code == 0
    for said in ("steps │ 6, the last 6 in no checkpoint yet", "24, each position of the order once", "open positions │ none"):
        assert said in out


def test_verify_names_the_first_problem_and_its_place(run, capsys):
    lines = run.lines()
    run.dir.ledger.write_text("".join(map(line_text, [*lines[:3], *lines[4:]])))
    code, _, err = keye(capsys, "verify", run.dir.path)
    assert code == 65
    assert "ledger.jsonl, line 4, step 3: it is about step 3, expected step 2: lines are missing" in err


def test_verify_needs_a_ledger(tmp_path, capsys):
    assert keye(capsys, "verify", tmp_path)[0] == 65
    RunDir(tmp_path).ledger.write_text('{"torn')
    code, _, err = keye(capsys, "verify", tmp_path)
    assert (code, "has no whole line" in err) == (65, True)


def test_show_lists_a_step_with_what_is_known(run, capsys):
    code, out, _ = keye(capsys, "show", run.dir.path, "--step", 2)
    assert code == 0
    line = run.lines()[3]
    assert "step 2: 4 samples" in out and "source, task and tokens are not known" in out
    for position, sample in zip(line.slot_positions, line.samples, strict=True):
        assert f"│ {position} │ {position // N} │ {sample} │ id{sample} │ {sample + 1:08x} │" in out
    code, _, err = keye(capsys, "show", run.dir.path, "--step", 6)
    assert (code, "has no step 6; expected one below 6" in err) == (65, True)


def test_diff_names_step_and_slot_and_both_sides(run, tmp_path, capsys):
    other = Run(tmp_path / "other").start(0).steps(6)
    assert keye(capsys, "diff", run.dir.path, other.dir.path)[:2] == (0, "the same samples in the same order, step for step")
    line = run.lines()[2]
    other.dir.ledger.write_text(run.text.replace(f'"{line.ids[1]}"', '"other"'))
    code, out, _ = keye(capsys, "diff", run.dir.path, other.dir.path)
    found = next(other for other in run.lines()[1:] if line.ids[1] in other.ids)
    assert code == 1
    assert f"first difference: step {found.step}, slot {found.ids.index(line.ids[1])}" in out
    assert line.ids[1] in out and "other" in out


@pytest.mark.parametrize("arguments", [(), ("prove",), ("verify",), ("show", "x")])
def test_a_wrong_command_line_is_explained(arguments, capsys):
    code, _, err = keye(capsys, *arguments)
    assert code == 65
    assert "--help` shows what is accepted" in err


@pytest.mark.parametrize("action", ["verify", "show", "diff"])
def test_every_action_teaches(action, capsys):
    with pytest.raises(SystemExit):
        cli.main(["ledger", action, "--help"])
    assert f"  keye ledger {action} runs/" in capsys.readouterr().out
