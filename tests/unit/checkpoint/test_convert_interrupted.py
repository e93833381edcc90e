"""Conversions that are killed, run out of disk, meet each other, or find something in their place."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_keye.checkpoint.manifest import read_manifest
from megatron_keye.checkpoint.store import find_damage
from tests.unit.checkpoint.converting import leftovers, refused, run, write_released
from tests.unit.checkpoint.hf_folder import write_hf_folder
from tests.unit.train.forked import in_a_fork

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def source(tmp_path):
    return write_released(tmp_path / "hf", "keye_vl_1_5")


def test_a_disk_that_runs_full(source, tmp_path):
    code = in_a_fork(_convert_with_small_files, source, tmp_path / "out")
    assert code == 65
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_output_exists(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    arguments = ("hf-to-megatron", "--input", source, "--output", out)
    assert "out exists; choose another output, or replace it with --force" in refused(capsys, *arguments)
    assert (out / "mine").read_text() == "precious"
    assert run(*arguments, "--force") == 0
    assert not (out / "mine").exists() and find_damage(out) == [] and not leftovers(tmp_path)
    assert run(*arguments, "--dry-run", "--force") == 0
    assert find_damage(out) == []
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in refused(capsys, "hf-to-megatron", "--input", source, "--output", file, "--force")


def _convert_with_small_files(source, out) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    return run("hf-to-megatron", "--input", source, "--output", out)


KILLED = """
import os, signal, sys
from data_tools import convert
from megatron_keye.checkpoint import checkpoint_tensors

def write(*args):
    print("writing", flush=True)
    signal.pause()

checkpoint_tensors.merge = write
convert.main(sys.argv[1:])
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_conversion_looks_like_none(tmp_path, by):
    """Stopped when all tensors are written and only the manifest is missing."""
    source, out = write_hf_folder(tmp_path / "hf", "keye_vl_1_5"), tmp_path / "out"
    arguments = ["hf-to-megatron", "--input", str(source), "--output", str(out)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"writing\n"
    (hidden,) = leftovers(tmp_path)
    assert not out.exists() and not (tmp_path / hidden / "manifest.json").exists()
    process.send_signal(by)
    assert process.wait(timeout=30) != 0
    assert leftovers(tmp_path) == ([hidden] if by == signal.SIGKILL else [])
    assert run(*arguments) == 0
    assert not leftovers(tmp_path) and read_manifest(out)


def test_two_conversions_to_one_place_do_not_touch_each_other(tmp_path):
    source, out = write_hf_folder(tmp_path / "hf", "keye_vl_1_5"), tmp_path / "out"
    arguments = ["hf-to-megatron", "--input", str(source), "--output", str(out)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"writing\n"
        assert run(*arguments) == 0
        assert len(leftovers(tmp_path)) == 1, "the one that is still at work"
        assert find_damage(out) == []
    finally:
        process.kill()
        process.wait()
