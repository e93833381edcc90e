"""A run whose data change while it is stopped: refused, then remapped, and every sample used once an epoch all the same."""

import json
import shutil
from collections import Counter

import pytest

from megatron_keye.errors import KeyeError, LedgerError
from megatron_keye.plan.ledger import StepLine
from megatron_keye.plan.ledger_proof import prove
from megatron_keye.train import cli
from megatron_keye.train.ledger import read_ledger, run_files
from megatron_keye.train.loop import Training
from megatron_keye.train.run_dir import RunDir
from tests.tiny import on_ranks, runtime_here, tiny_record, train, write_part

EDITED, DROPPED = 7, 9


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="module")
def changed(tiny, tmp_path_factory):
    """The tiny set with one sample dropped, one edited and two added, numbered the other way round."""
    folder = tmp_path_factory.mktemp("changed")
    for name in ("media", "tokenizer"):
        (folder / name).symlink_to(tiny.folder / name)
    records = {number: tiny_record(number) for number in reversed(range(26)) if number != DROPPED}
    records[EDITED] = tiny_record(EDITED + 30) | {"id": f"t{EDITED}"}
    return write_part(folder, "train", list(records.values()))


@pytest.fixture(scope="module")
def stopped_after_3(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("stopped")
    train("dp2", tiny.config("train.steps=3", "data.lookahead.batches=2"), path)
    (path / "DONE").unlink()
    return path


@pytest.fixture
def stopped(stopped_after_3, tmp_path):
    """A copy of a run that ended after 3 steps of 4 of its 24 samples, in the middle of a lookahead window."""
    shutil.copytree(stopped_after_3, tmp_path / "run")
    return tmp_path / "run"


def with_data(tiny, changed, *overrides):
    return tiny.config(f"data.train={changed}", "train.steps=16", *overrides)


def keye(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return code, " ".join(printed.out.split()), printed.err


def refusal(config, path):
    """The error that a start ends with, on the main rank."""
    return on_ranks("dp2", config, _refused, path)[0]


def _refused(config, path):
    try:
        Training(config, RunDir(path), runtime_here(config)).run()
    except KeyeError as error:
        return str(error)


def used(path):
    """How often each (id, checksum) was used, by epoch."""
    epochs = {}
    for line in read_ledger(RunDir(path).ledger):
        if isinstance(line, StepLine):
            for epoch, key in zip(line.slot_epochs, zip(line.ids, line.crc32, strict=True), strict=True):
                epochs.setdefault(epoch, Counter())[key] += 1
    return epochs


def content(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "heartbeats" not in file.parts}


def test_changed_data_is_refused_then_remapped_and_every_sample_is_used_once(tiny, changed, stopped, capsys):
    config = with_data(tiny, changed)
    assert "let `keye remap` say what of the new data is still due" in refusal(config, stopped)
    before = content(stopped)
    code, out, _ = keye(capsys, "remap", stopped, "--data", changed, "--dry-run")
    assert (code, content(stopped)) == (0, before)
    assert keye(capsys, "remap", stopped, "--data", changed)[0] == 0
    assert {path for path in content(stopped) if path not in before} == set((stopped / "remaps").iterdir()) | {stopped / "lock"}
    assert "nothing was written" in out

    train("tp2sp", with_data(tiny, changed, "train.steps=7", "data.global_batch_samples=3"), stopped)
    (stopped / "DONE").unlink()
    train("dp2", config, stopped)
    steps = [line for line in read_ledger(RunDir(stopped).ledger) if isinstance(line, StepLine)][:3]
    assert sorted(position for line in steps for position in line.slot_positions) != list(range(12)), "a window was open"
    proof = prove([run_files(stopped)])
    assert (proof.steps, proof.num_samples, proof.segments) == (16, 3 * 4 + 4 * 3 + 9 * 4, 3)
    assert keye(capsys, "ledger", "verify", stopped)[0] == 0

    dataset = tiny.dataset(config)
    new = {(dataset.sample_id(number), dataset.record_crc32(number)) for number in range(len(dataset))}
    first, second, *_ = (epochs[epoch] for epochs in [used(stopped)] for epoch in sorted(epochs))
    assert all(count == 1 for count in first.values()) and first.keys() >= new
    assert second.keys() == new and set(second.values()) == {1}
    early = {sample for line in steps for sample in zip(line.ids, line.crc32, strict=True)}
    gone = {name for name, _ in early - new}
    assert gone == {f"t{EDITED}", f"t{DROPPED}"}, "both were used before"
    # Before and now; unchanged, edited, removed and never used; the epoch in progress; used in it, still due.
    assert "│ all │ 24 │ 25 │ 10 │ 1 │ 1 │ 14 │ 0 │ 10 │ 15 │" in out


def test_a_remap_whose_files_are_missing_or_damaged_is_named(tiny, changed, stopped, capsys):
    assert keye(capsys, "remap", stopped, "--data", changed)[0] == 0
    config = with_data(tiny, changed, "train.steps=4")
    (samples,) = (stopped / "remaps").glob("*.npy")
    (state,) = (stopped / "remaps").glob("*.json")
    whole, text = samples.read_bytes(), state.read_text()
    samples.write_bytes(whole[:-1] + b"\x7f")
    assert f"{samples} is damaged" in refusal(config, stopped)
    samples.unlink()
    assert f"{samples} cannot be read (No such file or directory); restore it from a copy" in refusal(config, stopped)
    samples.write_bytes(whole)
    state.write_text(text[:50])
    assert f"{state} is damaged" in refusal(config, stopped)
    state.write_text(text)
    train("dp2", config, stopped)
    samples.unlink()
    with pytest.raises(LedgerError, match=f"{samples.name} cannot be read"):
        prove([run_files(stopped)])


def test_an_interrupted_remap_leaves_the_run_as_it_was(tiny, changed, stopped, capsys, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    before = content(stopped)
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            cli.main(["remap", str(stopped), "--data", str(changed)])
    assert all(content(stopped)[path] == data for path, data in before.items())
    assert "let `keye remap` say" in refusal(with_data(tiny, changed), stopped)
    assert keye(capsys, "remap", stopped, "--data", changed)[0] == 0
    train("dp2", with_data(tiny, changed, "train.steps=4"), stopped)


def test_what_cannot_be_remapped_says_why(tiny, changed, stopped, tmp_path, capsys):
    assert "there is nothing to remap" in keye(capsys, "remap", stopped)[2]
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(json.dumps({"sources": [{"name": "other", "path": str(changed)}]}))
    assert "the sources are ['other'], but those of" in keye(capsys, "remap", stopped, "--data", mixture)[2]
    assert "set train.seed back" in keye(capsys, "remap", stopped, "--data", changed, "--set", "train.seed=99")[2]
    with RunDir(stopped).locked():
        assert "another start of the run" in keye(capsys, "remap", stopped, "--data", changed)[2]
    ledger = RunDir(stopped).ledger
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    assert (
        "does not prove what was used, and no remap can be made without: it ends after 2 steps"
        in keye(capsys, "remap", stopped, "--data", changed)[2]
    )
    assert not (stopped / "remaps").exists()
    shutil.rmtree(stopped / "checkpoints")
    assert "holds no good checkpoint" in keye(capsys, "remap", stopped, "--data", changed)[2]
