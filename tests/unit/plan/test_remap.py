"""Whatever was trained on and however data change then, every sample of the new data is used once in each epoch, counting what epochs in
progress had used of it before, and the ledger proves it."""

from collections import Counter
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.errors import LedgerError, PlanError
from megatron_keye.plan.blend import CYCLE
from megatron_keye.plan.blocks import shuffled
from megatron_keye.plan.changed_data import Changes, changes, used_samples
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.cursor import Cursor, ResumeState
from megatron_keye.plan.digest import ledger_digest
from megatron_keye.plan.ledger import CHAIN_START, Rules, SegmentLine, StepLine, chained, line_text, parse_line, position_runs, value_runs
from megatron_keye.plan.ledger_proof import RunFiles, prove
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.mixture import Source, fresh_mixture
from megatron_keye.plan.remap import NO_REMAP, Remap, RemappedOrder, due_samples, nothing_due
from megatron_keye.plan.windows import Membership

WEIGHTS = (CYCLE - CYCLE // 4, CYCLE // 4)
COST = CostModel(1, 1, 1, 1, 1)
ONE = Lookahead()


def costs(samples, cost):
    return 1 + samples * samples * samples


def records(name, count):
    return [(f"{name}{number}", number) for number in range(count)]


class SimulatedRun:
    """A run of two sets of (id, checksum) that may change, as its ledger shows it. `used` says how often each sample was used, by
    (number of the set, epoch)."""

    def __init__(self, first, second):
        self.sets, self.files, self.lines, self.used, self.rules = [first, second], {}, [], {}, None
        self.num_complete, self.weights = [0, 0], WEIGHTS
        self.state = ResumeState(Cursor(), self.wanted())

    def wanted(self):
        """What a start with the sets as they are now would have."""
        sources = [Source(f"set{n}", sha256(repr(keys).encode()).hexdigest(), len(keys), 3) for n, keys in enumerate(self.sets)]
        return fresh_mixture(sources, self.weights, seed=3, blocks_per_window=2)

    def due(self, remap):
        return self.files[remap.sha256]

    def add(self, line):
        self.lines.append(chained(line, self.lines[-1].chain if self.lines else CHAIN_START))

    def start(self, batch, lookahead):
        self.state = self.state.going_on(self.wanted())
        cursor = self.state.cursor
        rules = Rules(mixture=self.state.mixture, global_batch_samples=batch, lookahead=lookahead, plan_version=1)
        if self.rules is None or self.rules.since(cursor.progress.base) != rules:
            self.rules = rules
            after = self.lines[-1].chain if self.lines else CHAIN_START
            digest, position = cursor.ledger.hex(), cursor.position
            self.add(SegmentLine(step=cursor.step, position=position, digest=digest, after=after, rules=rules, chain=CHAIN_START))

    def steps(self, count, batch=4, lookahead=ONE):
        self.start(batch, lookahead)
        mixture = self.state.mixture
        order = mixture.order(self.due)
        membership, ends = Membership(order, costs), np.cumsum([0, *map(len, self.sets)])
        for _ in range(count):
            cursor = self.state.cursor
            progress = cursor.progress.under(batch, lookahead)
            positions = membership.positions(progress)
            samples = order(positions)
            sources, epochs = mixture.sources_and_epochs(order, positions)
            keys = [self.sets[source][sample - ends[source]] for source, sample in zip(sources, samples, strict=True)]
            for key, source, epoch in zip(keys, sources.tolist(), epochs.tolist(), strict=True):
                self.used.setdefault((source, epoch), Counter())[key] += 1
            digest, after = ledger_digest(cursor.ledger, samples.tolist()), progress.after_step()
            self.add(StepLine(
                step=cursor.step, positions=position_runs(positions.tolist()), epochs=value_runs(epochs.tolist()),
                samples=tuple(samples.tolist()), ids=tuple(name for name, _ in keys), crc32=tuple(crc32 for _, crc32 in keys),
                sources={"all": batch}, skipped=(), updated=True, digest=digest.hex(), chain=CHAIN_START,
            ))  # fmt: skip
            self.state = replace(self.state, cursor=Cursor(cursor.step + 1, after.position, digest, after.stretches))
        return self

    def proved(self):
        return prove([RunFiles("run", [parse_line(line_text(line).encode()) for line in self.lines], (), self.due)])

    def change(self, *sets):
        """Stop, remap to `sets`, as the command does it, and check what was complete before."""
        standings = self.proved().standings()
        self.check_complete(standings)
        if list(sets) == self.sets:
            return self
        epochs = [standing.epochs_in_progress(s) for standing, s in zip(standings, self.state.mixture.sources, strict=True)]
        used = used_samples(self.lines, self.due, epochs)
        old, self.sets = self.sets, list(sets)
        wanted, sources = self.wanted(), list(self.state.mixture.sources)
        for number, keys in enumerate(sets):
            if keys != old[number] or standings[number].is_open:
                due, counts = due_samples(wanted.whole_epochs(number), epochs[number], keys, used[number].by_epoch)
                name = sha256(due.tobytes()).hexdigest()
                self.files[name] = due
                sources[number] = replace(wanted.sources[number], remap=Remap(name, epochs[number].start, counts))
        self.state = ResumeState.from_json(self.state.remapped(sources, standings).to_json())
        return self

    def check_complete(self, standings):
        """No epoch had a sample twice, and every one that was completed since the data last changed had every sample of the set."""
        for number, standing in enumerate(standings):
            first = standing.epochs_in_progress(self.state.mixture.sources[number]).start
            for epoch in range(self.num_complete[number], first):
                assert self.used[number, epoch] >= Counter(self.sets[number]), "none was left out"
            self.num_complete[number] = first
        assert all(count == 1 for used in self.used.values() for count in used.values()), "none was used twice"


def changed(keys, removed, edited, added, name, generation):
    """The set without some samples, with other checksums of some, with new ones, and numbered anew."""
    kept = [(key, crc32 + 1000 * generation if number in edited else crc32) for number, (key, crc32) in enumerate(keys)]
    kept = [key for number, key in enumerate(kept) if number not in removed]
    new = kept + [(f"{name}, generation {generation}, {number}", number) for number in range(added)]
    return new[::-1] or keys


lookaheads = st.builds(Lookahead, batches=st.integers(1, 5), canonical_replicas=st.integers(1, 4), cost=st.just(COST))
numbers = st.sets(st.integers(0, 16), max_size=6)
weights = st.sampled_from([WEIGHTS, WEIGHTS[::-1], (CYCLE, 0)])
edits = st.none() | st.tuples(numbers, numbers, st.integers(0, 9))
stages = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7), lookaheads, weights, edits, edits), min_size=1, max_size=4)


@settings(max_examples=20)
@given(stages, st.integers(1, 16), st.integers(1, 16))
def test_every_sample_is_used_once_an_epoch_however_data_change(stages, num_first, num_second):
    run = SimulatedRun(records("a", num_first), records("b", num_second)).steps(0)
    for generation, (steps, batch, lookahead, run.weights, *both) in enumerate(stages, start=1):
        run.steps(steps, batch, lookahead)
        run.change(*(
            keys if edit is None else changed(keys, *edit, name, generation) for keys, edit, name in zip(run.sets, both, "ab", strict=True)
        ))  # fmt: skip
    run.weights = WEIGHTS
    run.steps(32, 16)
    run.check_complete(run.proved().standings())
    assert min(run.num_complete) > 0


def small_run(steps=3):
    return SimulatedRun(records("a", 12), records("b", 6)).steps(steps)


def test_a_source_that_did_not_change_goes_on_where_it_was():
    run, straight = small_run(), small_run().steps(20)
    run.change(run.sets[0][1:], run.sets[1])
    assert run.state.mixture.sources[1].remap == NO_REMAP
    run.steps(20)
    taken = [[name for line in r.lines[1:] if isinstance(line, StepLine) for name in line.ids if name[0] == "b"] for r in (run, straight)]
    shorter = min(map(len, taken))
    assert shorter > 15 and taken[0][:shorter] == taken[1][:shorter]


def test_a_window_that_is_given_up_twice_before_a_step_took_of_a_source_loses_nothing():
    """What is due of the second set is the same both times, and so is its remap: it begins again all the same."""
    run = SimulatedRun(records("a", 12), records("b", 4))
    while run.steps(1, 1).lines[-1].ids[0][0] != "b":
        pass
    run.change(records("a", 12), records("b", 4)[::-1])
    assert run.state.mixture.sources[1].remap.counts == (3,)
    ahead = Lookahead(6, 1, 200, COST)
    while not run.steps(1, 1, ahead).proved().standings()[1].is_open:
        pass
    before = run.state.mixture.sources[1]
    assert run.proved().standings()[1].first_left == 0
    run.change(records("a", 11), run.sets[1])
    assert run.state.mixture.sources[1] == before and run.state.mixture.stages[-1].starts == (0, 0)
    run.steps(40)
    run.check_complete(run.proved().standings())


def test_samples_due_come_in_the_order_of_their_epoch():
    """What an epoch of the new set would read side by side is still read side by side."""
    order, keys = shuffled(10, seed=4), records("a", 10)
    used = {2: Counter({("a3", 3): 1, ("a8", 8): 1, ("gone", 1): 1}), 3: Counter({("a3", 3): 1})}
    due, counts = due_samples(order, range(2, 4), keys, used)
    whole = order(np.arange(20, 40)).tolist()
    assert counts == (8, 9)
    assert due.tolist() == [s for s in whole[:10] if s not in (3, 8)] + [s for s in whole[10:] if s != 3]


def test_a_record_that_a_set_holds_twice_is_due_as_often_as_it_was_not_used():
    keys = [("a", 1), ("a", 1), ("b", 2)]
    due, counts = due_samples(shuffled(3, 0), range(1), keys, {0: Counter({("a", 1): 1})})
    assert (sorted(due.tolist()), counts) == ([1, 2], (2,))


def test_the_state_stays_small_and_is_read_back():
    run = SimulatedRun(records("a", 5000), records("b", 900)).steps(7, batch=64, lookahead=Lookahead(4, 2, 200, COST))
    run.change(records("a", 4990), run.sets[1])
    assert [len(source.remap.counts) for source in run.state.mixture.sources] == [1, 1], "both had samples in the open window"
    assert len(run.state.to_json()) < 800
    assert run.state.cursor.stretches == ()
    assert run.state.mixture.stages[0].position == run.state.cursor.position == 448


def test_lines_of_data_that_never_changed_are_as_they_were_before_there_were_remaps():
    run = small_run()
    assert "remap" not in "".join(map(line_text, run.lines))
    run.change(run.sets[0][1:], run.sets[1]).steps(1)
    assert line_text(run.lines[place_of_remap(run)]).count('"remap"') == 1


def test_how_data_changed_is_counted():
    run = small_run()
    (used, _) = used_samples(run.lines, run.due, [range(1), range(0)])
    first, second, *kept = sorted(used.by_epoch[0])
    assert kept
    new = [(first[0], 99), *kept, ("new", 1)]
    _, counts = due_samples(shuffled(len(new), 0), range(1), new, used.by_epoch)
    assert second[0] in used.checksums
    assert changes(used, new, counts) == Changes(unchanged=len(kept), edited=1, removed=1, new=1, used=len(kept))


def test_a_sample_edited_twice_is_compared_with_what_it_was_last():
    run = small_run(5)
    edited = [(name, crc32 + 100) for name, crc32 in run.sets[0]]
    run.change(edited, run.sets[1]).steps(5)
    (used, _) = used_samples(run.lines, run.due, [range(0), range(0)])
    found = changes(used, edited, ())
    assert (found.edited, found.removed) == (0, 0) and found.unchanged > 0


def place_of_remap(run):
    return max(number for number, line in enumerate(run.lines) if isinstance(line, SegmentLine))


def tampered(run, **fields):
    """The run's proof fails when the remap of its first source is another one; what it says."""
    number = place_of_remap(run)
    line = run.lines[number]
    source, *others = line.rules.mixture.sources
    source = replace(source, remap=replace(source.remap, **fields))
    mixture = replace(line.rules.mixture, sources=(source, *others))
    line = line.model_copy(update={"rules": line.rules.model_copy(update={"mixture": mixture})})
    with pytest.raises(LedgerError) as caught:
        prove([RunFiles("run", [*run.lines[:number], chained(line, run.lines[number - 1].chain)], (), run.due)])
    return str(caught.value)


def test_a_ledger_proves_no_remap_that_leaves_samples_out_or_repeats_them():
    run = small_run()
    run.change([*run.sets[0], ("new", 0)], run.sets[1]).steps(1)
    (count,) = run.state.mixture.sources[0].remap.counts
    used = 13 - count
    assert used > 2
    run.files |= {"1" * 64: np.arange(count - 1), "2" * 64: np.zeros(count, np.int64), "3" * 64: 1 + np.arange(count) * 12 // (count - 1)}
    assert f"{count - 1} of 13 samples of source set0 are due in epoch 0, and it has used {used}" in tampered(
        run, sha256="1" * 64, counts=(count - 1,)
    )
    assert "14 of 13 samples" in tampered(run, counts=(14,))
    assert "begins with what is due from epoch 1 on and is whole from 2 on, expected 0 and 1" in tampered(run, first_epoch=1)
    assert "is whole from 0 on, expected 0 and 1" in tampered(run, counts=())
    assert "does not hold different samples of the 13" in tampered(run, sha256="2" * 64)
    assert "does not hold different samples of the 13" in tampered(run, sha256="3" * 64)


def test_a_ledger_proves_no_remap_that_forgets_an_open_window():
    run = SimulatedRun(records("a", 12), records("b", 12)).steps(1, 4, Lookahead(4, 2, 200, COST))
    assert all(standing.is_open for standing in run.proved().standings())
    run.change(run.sets[0][1:], run.sets[1])
    sources = (run.state.mixture.sources[0], run.wanted().sources[1])
    run.state = replace(run.state, mixture=replace(run.state.mixture, sources=sources))
    run.start(4, ONE)
    with pytest.raises(LedgerError, match="data changed while a window had samples of source set1 left, and they are not made due again"):
        run.proved()


def test_without_its_file_a_remapped_order_says_what_is_missing():
    run = small_run()
    run.change(run.sets[0][1:], run.sets[1])
    with pytest.raises(PlanError, match="The samples due of remap .* are not at hand; they lie in the run directory"):
        run.state.mixture.order(nothing_due)
    run.steps(1)
    with pytest.raises(LedgerError, match="its mixture gives no order: The samples due"):
        prove([RunFiles("run", run.lines, ())])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(sha256="zz", counts=(1,)), "names its samples by 'zz'"),
        (dict(counts=(1,)), "names its samples by ''"),
        (dict(first_epoch=-1), "first epoch -1"),
        (dict(sha256="0" * 64, counts=(-1,)), r"counts \(-1,\)"),
        (dict(sha256="0" * 64, counts=(1.0,)), r"counts \(1.0,\)"),
    ],
)
def test_what_is_no_remap_is_refused(fields, said):
    with pytest.raises(PlanError, match=said):
        Remap(**fields)


def test_an_order_needs_all_that_is_due():
    with pytest.raises(PlanError, match="has 2 samples due, expected 3"):
        RemappedOrder(Remap("0" * 64, 0, (3,)), np.arange(2), shuffled(4, 0))
