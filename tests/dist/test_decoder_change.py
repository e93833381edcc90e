"""A run whose checkpoint was made with another decoder: refused with both ids, and a warning where the settings allow it."""

from dataclasses import replace

from megatron_keye.checkpoint.manifest import MANIFEST, read_manifest
from megatron_keye.data.media.decoder import PYAV, decoder_id
from megatron_keye.train.decoders import DECODER
from megatron_keye.train.run_dir import RunDir
from tests.tiny import HookedTraining, losses, no_hook, on_ranks, run_as, steps_of, train

OTHER = "dali-2.4.0-gpu"
ALLOWED = "data.media.allow_mixed_decoders=true"


def stored(path):
    """The manifest of a run's newest checkpoint, and its folder."""
    folder = sorted(RunDir(path).checkpoints.iterdir())[-1]
    return folder, read_manifest(folder)


def test_a_run_goes_on_with_its_own_decoder_alone(tiny, tmp_path, capfd):
    path, own = tmp_path / "run", decoder_id(PYAV)
    train("dp2", tiny.config("train.steps=2"), path)
    (path / "DONE").unlink()
    folder, manifest = stored(path)
    assert manifest.run.versions[DECODER] == own
    other = replace(manifest, run=replace(manifest.run, versions=manifest.run.versions | {DECODER: OTHER}))
    (folder / MANIFEST).write_text(other.to_json())

    endings = on_ranks("dp2", tiny.config("train.steps=4"), run_as, HookedTraining, path, no_hook)
    assert {code for _, code, _ in endings} == {65}
    assert ["SettingsError", "PeerError"] == [name for name, _, _ in endings], "said once"
    for _, _, message in endings:
        assert OTHER in message and own in message and ALLOWED in message
    assert len(steps_of(path)) == 2, "nothing was trained on"

    capfd.readouterr()
    train("dp2", tiny.config("train.steps=4", ALLOWED), path)
    assert f"WARNING: decoded with {own} from here on, with {OTHER} before" in capfd.readouterr().err
    assert sorted(losses(path)) == [0, 1, 2, 3]
    assert stored(path)[1].run.versions[DECODER] == own
    (path / "DONE").unlink()
    train("dp2", tiny.config("train.steps=6"), path)
    assert "WARNING: decoded" not in capfd.readouterr().err, "from then on it is the run's own"
