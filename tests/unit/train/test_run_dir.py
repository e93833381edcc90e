"""The run directory: its small files are whole whenever anybody reads them."""

import errno
import json
import math
import resource
import subprocess
import sys
import time

import pytest

from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.train.run_dir import JsonLines, RunDir, write_atomically


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def lines(run):
    lines = JsonLines(run.metrics)
    for step in range(5):
        lines.append({"step": step, "loss": step / 2})
    return lines


def steps_in(lines):
    return [json.loads(line)["step"] for line in lines.path.read_text().splitlines()]


@pytest.mark.parametrize("step", [0, 3, 5, 99])
def test_lines_of_steps_that_come_again_are_dropped(lines, step):
    lines.keep_before(step)
    assert steps_in(lines) == list(range(min(step, 5)))


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0', "", "{}", "[1]", "\0\0\0\0", "7"])
def test_torn_lines_are_dropped_and_writing_goes_on(lines, torn):
    with lines.path.open("a") as file:
        file.write(torn)
    lines.keep_before(9)
    lines.append({"step": 5})
    assert steps_in(lines) == [0, 1, 2, 3, 4, 5]


def test_every_cut_of_the_file_leaves_the_whole_lines(lines):
    whole = lines.path.read_bytes()
    for length in range(len(whole) + 1):
        lines.path.write_bytes(whole[:length])
        lines.keep_before(9)
        complete = whole[:length].count(b"\n")
        # A last line that lacks nothing but its line end is whole too.
        assert steps_in(lines) in (list(range(complete)), list(range(complete + 1)))


def test_there_need_not_be_a_file(run):
    JsonLines(run.metrics).keep_before(3)
    assert not run.metrics.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_become_null(lines, value):
    lines.append({"step": 5, "grad_norm": value})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(lines.path.read_text().splitlines()[-1], parse_constant=refuse) == {"step": 5, "grad_norm": None}


def test_a_failed_write_leaves_the_old_text(run, monkeypatch):
    write_atomically(run.config, "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        write_atomically(run.config, "new")
    assert run.config.read_text() == "old"


WRITES = {
    "heartbeats/rank0": lambda run, lines: run.heartbeat(0, 1, "step"),
    "metrics.jsonl": lambda run, lines: lines.append({"step": 5}),
    "metrics.jsonl at a start": lambda run, lines: lines.keep_before(9),
    "step.json": lambda run, lines: run.note_step(5, ["a"]),
    "DONE": lambda run, lines: run.mark_done(5),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_is_named_with_the_file_and_the_remedy(run, lines, name):
    """A limit on file sizes, under which a write fails in the middle of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(KeyeError, match=rf"cannot write .*{name.split()[0]} \(File too large\): make room .* start again"):
            WRITES[name](run, lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.append({"step": 5})
    assert steps_in(lines) == list(range(6))


def test_nothing_but_the_file_itself_remains(run):
    write_atomically(run.config, "text")
    assert [path.name for path in run.path.iterdir() if path.is_file()] == ["config.yaml"]


def test_a_heartbeat_tells_step_time_and_phase(run, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1234.5)
    run.heartbeat(3, 17, "save")
    assert (run.path / "heartbeats" / "rank3").read_text() == "17 1234.500 save\n"


def test_requests_are_files_until_they_are_answered(run):
    assert not run.is_asked("STOP")
    (run.path / "STOP").touch()
    assert run.is_asked("STOP")
    run.answer("STOP")
    run.answer("STOP")
    assert not run.is_asked("STOP")


def test_done_is_remembered(run):
    assert not run.is_done
    run.mark_done(12)
    assert RunDir(run.path).is_done
    assert (run.path / "DONE").read_text() == "12\n"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"run directory .*file/run cannot be made: .*; choose another with --run-dir"):
        RunDir(tmp_path / "file" / "run").create()


def test_a_second_start_waits_for_the_first_and_then_gives_up(run):
    with run.locked():
        began_s = time.monotonic()
        with pytest.raises(KeyeError, match="another start of the run .* is alive; wait for its end, or touch .*STOP to end it") as caught:
            with RunDir(run.path).locked(wait_s=0.3):
                pass
        assert 0.3 <= time.monotonic() - began_s < 5.0
        assert caught.value.exit_code == 1, "the same command may be tried again"
    with RunDir(run.path).locked(wait_s=0.0):
        pass


def test_the_lock_ends_with_its_process(run):
    code = f"import os; from megatron_keye.train.run_dir import RunDir\nwith RunDir({str(run.path)!r}).locked(): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with run.locked(wait_s=0.0):
        pass


def test_a_file_system_without_locks_is_no_hindrance(run, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr("fcntl.flock", flock)
    with run.locked(wait_s=0.0), RunDir(run.path).locked(wait_s=0.0):
        pass
