"""What is found in the folders that an attempt leaves behind."""

import json

import pytest

from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise.evidence import Evidence, error_of, saved_step, tail


@pytest.fixture
def evidence(tmp_path) -> Evidence:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    evidence = Evidence(run_dir, 3)
    evidence.prepare(["n1", "n2"])
    return evidence


def report(evidence: Evidence, node: str, exit_code: int, *failures: dict) -> None:
    (evidence.folder / "nodes" / f"{node}.json").write_text(json.dumps({"exit_code": exit_code, "failures": failures}))


def failure(rank: int, local_rank: int, exit_code: int, time_s: float) -> dict:
    return {"rank": rank, "local_rank": local_rank, "exit_code": exit_code, "time_s": time_s}


def write_log(evidence: Evidence, node: str, local_rank: int, text: str) -> None:
    folder = evidence.folder / "ranks" / node / "none_x" / "attempt_0" / str(local_rank)
    folder.mkdir(parents=True)
    (folder / "stderr.log").write_text(text)


def test_the_first_failure_comes_first_and_ranks_that_were_taken_down_do_not_count(evidence):
    report(evidence, "n1", 1, failure(0, 0, -15, 1.0), failure(1, 1, 1, 9.0))
    report(evidence, "n2", 137, failure(2, 0, -9, 8.0))
    write_log(evidence, "n1", 1, "step 3\nTraceback ...\nValueError: bad\n")
    first, second = evidence.failures()
    assert (first.rank, first.node, first.error) == (2, "n2", "ended by SIGKILL")
    assert (second.rank, second.node, second.error) == (1, "n1", "ValueError: bad")
    assert evidence.exit_codes() == {"n1": 1, "n2": 137}


def test_a_report_that_was_cut_off_is_no_report(evidence):
    (evidence.folder / "nodes" / "n1.json").write_text('{"exit_code": 1, "fail')
    assert evidence.exit_codes() == {}
    assert evidence.failures() == ()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Traceback\n  File x\ntorch.OutOfMemoryError: 2 GiB\n[W] destroy_process_group was not called\n", "torch.OutOfMemoryError: 2 GiB"),
        ("keye [rank 1]: error: no sample is called x\n", "keye [rank 1]: error: no sample is called x"),
        ("something\n\nelse\n\n", "else"),
        ("", "exit code 7"),
    ],
)
def test_the_line_that_names_the_error(tmp_path, text, error):
    (tmp_path / "log").write_text(text)
    assert error_of(7, tmp_path / "log") == error


def test_a_launcher_that_dies_has_a_log_of_its_own(evidence):
    assert evidence.launcher_error() == ""
    for node, text in (("n1", "ranks that did not end well: 1\n"), ("n2", "Traceback\nImportError: libx.so\n")):
        (evidence.folder / "ranks" / node).mkdir()
        (evidence.folder / "ranks" / node / "launcher.log").write_text(text)
    assert evidence.launcher_error() == "ImportError: libx.so"


def test_the_end_of_a_large_file(tmp_path):
    (tmp_path / "log").write_text("x" * 100_000 + "\nlast but one\nlast\n")
    assert tail(tmp_path / "log", 2) == ["last but one", "last"]
    assert tail(tmp_path / "none", 2) == []


def test_only_whole_checkpoints_count(tmp_path):
    run_dir = RunDir(tmp_path)
    assert saved_step(run_dir) == 0
    for name in ("step_00000020", "step_00000100_1"):
        (run_dir.checkpoints / name).mkdir(parents=True)
        (run_dir.checkpoints / name / "manifest.json").touch()
    (run_dir.checkpoints / ".step_00000120.incomplete").mkdir()
    assert saved_step(run_dir) == 100


def test_stacks_move_into_the_attempt(evidence, tmp_path):
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/rank0").write_text("")
    (tmp_path / "stacks/rank1").write_text("Timeout (0:01:00)!\nThread 0x1\n")
    assert evidence.collect_stacks() == ["rank1"]
    assert (evidence.folder / "stacks/rank1").exists()
    assert evidence.collect_stacks() == []


def test_secrets_are_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    monkeypatch.setenv("NCCL_DEBUG", "shown")
    run_dir = RunDir(tmp_path)
    run_dir.create()
    run_dir.heartbeat(4, 17, "step")
    evidence = Evidence(run_dir, 1)
    assert evidence.last_step() == 17
    evidence.prepare(["n1"])
    text = (evidence.folder / "environment").read_text()
    assert "NCCL_DEBUG=shown" in text
    assert "hidden" not in text
    assert evidence.heartbeats() == {}, "those of an earlier attempt"
