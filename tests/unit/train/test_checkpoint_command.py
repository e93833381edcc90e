"""`keye checkpoint` on a run's checkpoints: whole, torn, changed, and without a manifest."""

import shutil

import pytest

from megatron_keye.train import cli
from tests.unit.checkpoint.hf_folder import write_hf_folder
from tests.unit.train.saved_run import save_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with a whole checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder / "run", write_hf_folder(folder / "hf", "keye_vl_1_5"), "keye_vl_1_5")
    return folder / "run"


@pytest.fixture
def run_dir(saved, tmp_path, monkeypatch):
    """A copy, where the checkpoint of step 9 has one byte changed, that of step 10 is cut off, and that of step 11 has no manifest."""
    monkeypatch.setenv("COLUMNS", "250")
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    for step in (9, 10, 11):
        shutil.copytree(folder / "step_00000007", folder / f"step_{step:08d}")
    changed = folder / "step_00000009/rank_00000.safetensors"
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    (folder / "step_00000010/rank_00000.safetensors").write_bytes(b"1")
    (folder / "step_00000011/manifest.json").unlink()
    return tmp_path / "run"


def keye(capsys, *arguments):
    """Exit code and lines printed."""
    code = cli.main(["checkpoint", *map(str, arguments)])
    return code, capsys.readouterr().out.splitlines()


def test_list_says_what_sizes_and_manifests_say(run_dir, capsys):
    code, lines = keye(capsys, "list", run_dir)
    assert code == 0
    rows = {name: next(line for line in lines if name in line) for name in ("step_00000007", "step_00000010", "step_00000011")}
    assert "tp1, 1 rank" in rows["step_00000007"] and "all there" in rows["step_00000007"]
    assert "has 1 bytes" in rows["step_00000010"]
    assert "cannot read" in rows["step_00000011"]


def test_verify_finds_every_damage(run_dir, capsys):
    code, lines = keye(capsys, "verify", run_dir)
    assert code == 1
    folder = run_dir / "checkpoints"
    assert [line for line in lines if line.endswith("whole")] == [f"{folder}/step_00000007: whole"]
    assert [line for line in lines if line.endswith("damaged")] == [f"{folder}/step_{step:08d}: damaged" for step in (9, 10, 11)]
    assert "its bytes have changed" in "\n".join(lines)
    assert keye(capsys, "verify", folder / "step_00000007") == (0, [f"{folder}/step_00000007: whole"])


def test_show_says_what_a_checkpoint_is(saved, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    code, lines = keye(capsys, "show", saved, "--tensors")
    assert code == 0
    text = "\n".join(lines)
    for part in ("model variant", "keye_vl_1_5", "no optimizer state", "projector", "vision", "decoder"):
        assert part in text
    assert "model.norm.weight  weight  F32  [64]  256" in lines


def test_a_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 65
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_damaged_manifest_cannot_be_shown(run_dir, capsys):
    assert cli.main(["checkpoint", "show", str(run_dir)]) == 65
    assert f"cannot read {run_dir}/checkpoints/step_00000011/manifest.json" in capsys.readouterr().err
