"""Bad input of every kind ends a run on all ranks, at once, with one error that says what was found and what to do."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from megatron_keye.config.load import dump_config
from megatron_keye.errors import DataError, KeyeError
from megatron_keye.train.loop import Training
from megatron_keye.train.run_dir import RunDir
from tests.tiny import on_ranks, runtime_here, tiny_record, train, write_part
from tests.unit.data.corpus import mp4, png

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 10.0


def try_to_train(config, path):
    """How the run ended on this rank: (name of the error, exit code, message, seconds)."""
    began_s = time.monotonic()
    run_dir = RunDir(path)
    run_dir.create()
    try:
        Training(config, run_dir, runtime_here(config)).run()
    except KeyeError as error:
        return type(error).__name__, error.exit_code, str(error), time.monotonic() - began_s
    return None


def assert_all_end(ends, name, *patterns):
    """No message is said twice, each is of kind `name` and has all `patterns`; the other ranks only point to the first."""
    assert all(end is not None and end[1] == 65 and end[3] < LIMIT_S for end in ends)
    said = [end for end in ends if end[0] != "PeerError"]
    assert {end[0] for end in said} == {name}
    assert len({end[2] for end in said}) == len(said)
    for end in said:
        for pattern in patterns:
            assert re.search(pattern, end[2]), end[2]
    assert all(said[0][2][:1000] in end[2] for end in ends if end[0] == "PeerError")


@pytest.fixture
def copy(tiny, tmp_path):
    """The tiny set, to be damaged."""
    shutil.copytree(tiny.folder, tmp_path / "set")
    return tmp_path / "set"


def shards(folder):
    return sorted((folder / "train").glob("*.tar"))


def truncated_shard(folder):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-3000])


def missing_shard(folder):
    shards(folder)[0].unlink()


def missing_index(folder):
    shutil.rmtree(folder / "train" / "index")


def missing_folder(folder):
    shutil.rmtree(folder / "train")


def missing_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def damaged_picture(folder):
    """In every shard, so that whichever step meets one fails."""
    for path in shards(folder):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"\x89PNG", b"\x88PNG"))


def damaged_record(folder):
    for path in shards(folder):
        path.write_bytes(path.read_bytes().replace(b"squares", b"Squares"))


@pytest.mark.parametrize(
    ("damage", "name", "patterns"),
    [
        (truncated_shard, "DataError", [r"shard-\w+\.tar", "restore"]),
        (missing_shard, "DataError", [r"shard-\w+\.tar", "restore|index"]),
        (missing_index, "DataError", ["no index at .*/train/index", r"run data_tools/index_shards\.py"]),
        (missing_folder, "DataError", ["no data set at .*/train: no such folder", r"data_tools/make_shards\.py"]),
        (missing_tokenizer, "SettingsError", ["tokenizer"]),
        (damaged_picture, "DataError", [r"\.tar:.*, record t\d+, medium 0", "do not match their sha256", "restore the shard"]),
        (damaged_record, "DataError", [r"\.tar:.*, record t\d+: the record is not the one that was indexed", "restore the shard"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_damaged_data_ends_all_ranks(tiny, copy, tmp_path, layout, damage, name, patterns):
    damage(copy)
    config = tiny.config(f"data.train={copy / 'train'}", f"data.tokenizer={copy / 'tokenizer'}")
    assert_all_end(on_ranks(layout, config, try_to_train, tmp_path / "run"), name, *patterns)


def test_a_checkpoint_of_another_model_ends_all_ranks(tiny, tmp_path):
    train("dp2", tiny.config("train.steps=2"), tmp_path)
    (tmp_path / "DONE").unlink()
    other = tiny.config("model.decoder.ffn_hidden_size=128", "model.vision.num_layers=3")
    ends = on_ranks("dp2", other, try_to_train, tmp_path)
    assert_all_end(ends, "CheckpointError", r"step_00000002", r"decoder\.ffn_hidden_size", r"96.*128|128.*96", r"vision\.num_layers")


def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_ends_all_ranks(tiny, tmp_path, capfd):
    train("dp2", tiny.config("train.steps=4"), tmp_path)
    (tmp_path / "DONE").unlink()
    for step in (4, 2):
        file = tmp_path / "checkpoints" / f"step_{step:08d}" / "rank_00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        ends = on_ranks("dp2", tiny.config("train.steps=3", "train.save_every_steps=99"), try_to_train, tmp_path / "again" / str(step))
        assert ends == [None, None], "a run of its own is not disturbed"
        if step == 4:
            train("dp2", tiny.config("train.steps=2"), tmp_path)
            (tmp_path / "DONE").unlink()
            said = capfd.readouterr().err
            assert re.search(r"passed over a damaged checkpoint: .*step_00000004.*rank_00001", said)
    ends = on_ranks("dp2", tiny.config("train.steps=4"), try_to_train, tmp_path)
    assert_all_end(ends, "CheckpointError", "Every checkpoint in .* is damaged", "step_00000002.*rank_00001", "to start over")


def tool(name, *arguments):
    command = [sys.executable, str(ROOT / "data_tools" / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_bad_records_are_each_named_with_line_finding_and_remedy(tiny, tmp_path):
    """No messages, more images than placeholders, a missing file, no JSON: one call of the tool lists them all."""
    (tmp_path / "media").symlink_to(tiny.folder / "media")
    lines = [
        json.dumps(tiny_record(0)),
        json.dumps({"id": "a", "message": []}),
        json.dumps({"id": "b", "messages": [{"role": "user", "content": "<image> what?"}], "images": ["media/0.png", "media/1.png"]}),
        json.dumps({"id": "c", "document": [{"type": "image", "image": "media/none.png"}]}),
        "{not json",
    ]
    source = tmp_path / "input.jsonl"
    source.write_text("\n".join(lines) + "\n")
    done = tool("make_shards.py", source, tmp_path / "out")
    assert done.returncode == 65
    for number, finding in [
        (2, r"record a: found only \['id', 'message'\] \(did you mean 'messages'\?\), expected one of them"),
        (3, r"record b: found 1 more image\(s\) than image placeholders, expected one placeholder each; write <image> where each belongs"),
        (4, r"record c.*: cannot read .*none\.png: No such file.*; paths are relative to the JSONL file"),
        (5, r"found text that is not JSON"),
    ]:
        assert re.search(rf"input\.jsonl:{number}\b.*{finding}", done.stderr), done.stderr
    assert "--skip-bad" in done.stderr
    assert not (tmp_path / "out").exists()


def jpeg():
    stream = io.BytesIO()
    with Image.open(io.BytesIO(png(90, 120, 1))) as picture:
        picture.save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def cut(tiny, tmp_path):
    """A folder with a picture and a clip that end early."""
    folder = tmp_path / "cut"
    (folder / "media").mkdir(parents=True)
    (folder / "tokenizer").symlink_to(tiny.folder / "tokenizer")
    (folder / "media" / "cut.jpg").write_bytes(jpeg()[:-300])
    (folder / "media" / "cut.mp4").write_bytes(mp4(16, 56, 84, fps=8, cut=8)[:-400])
    return folder


def document(kind, path):
    return {"id": f"a {kind}", "document": [{"type": kind, kind: path}, {"type": "text", "text": "words"}]}


def test_a_truncated_clip_is_named_when_it_is_indexed(cut):
    """Its frames have to be looked at to plan."""
    with pytest.raises(DataError, match="no usable sample.*record a video, video 0: .*found an ISO media file.*restore or drop it"):
        write_part(cut, "train", [document("video", "media/cut.mp4")])


def test_a_truncated_picture_ends_all_ranks_when_it_is_decoded(tiny, cut, tmp_path):
    write_part(cut, "train", [document("image", "media/cut.jpg"), tiny_record(2)])
    config = tiny.config(f"data.train={cut / 'train'}", "data.global_batch_samples=2")
    ends = on_ranks("dp2", config, try_to_train, tmp_path / "run")
    assert_all_end(ends, "DataError", r"\.tar:.*, record a image, medium 0: .*(truncated|ends early)", "restore|drop")


@pytest.mark.parametrize(("content", "message"), [("", "has no record"), (None, "cannot read .*input.jsonl: No such file")])
def test_an_empty_or_missing_input_is_named(tmp_path, content, message):
    source = tmp_path / "input.jsonl"
    if content is not None:
        source.write_text(content)
    done = tool("make_shards.py", source, tmp_path / "out")
    assert done.returncode == 65
    assert re.search(message, done.stderr), done.stderr


def launch(*arguments):
    """launch/local.sh on two ranks: (exit code, what it printed, seconds from the first error on)."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "launch/local.sh"), "-n", "2", *map(str, arguments)]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True, cwd=ROOT
    )
    printed, first_error_s = [], None
    watchdog = time.monotonic() + 120
    try:
        for line in started.stdout:
            printed.append(line)
            if first_error_s is None and "error:" in line:
                first_error_s = time.monotonic()
            assert time.monotonic() < watchdog
        code = started.wait(timeout=30)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    # The pipe is closed only when the launcher and all its ranks have ended.
    return code, "".join(printed), time.monotonic() - first_error_s


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "unknown setting train.stepz (from --set train.stepz=3): did you mean train.steps?"),
        (["parallel.tp=3"], "2 processes cannot hold whole replicas of parallel.tp * cp * pp = 3 * 1 * 1 = 3 ranks"),
        (["parallel.tp=8"], "model.decoder.num_kv_groups = 4 is not a multiple of parallel.tp = 8"),
        (["parallel.pp=3"], "model.decoder.num_layers = 4 is not a multiple of parallel.pp * vp = 3"),
        (["parallel.cp=2", "data.pad_multiple_tokens=6"], "data.pad_multiple_tokens = 6 is not a multiple of 2 * cp * tp = 4"),
    ],
)
def test_settings_that_are_wrong_are_said_once_before_anything_starts(tmp_path, overrides, message):
    code, printed, _ = launch("debug", "--run-dir", tmp_path / "run", "--set", *overrides)
    assert code == 65
    assert printed.count(message) == 1
    assert printed.startswith("keye: error: ")
    assert not (tmp_path / "run").exists()


def test_bad_data_ends_launched_ranks_with_one_error_and_nothing_else(tiny, copy, tmp_path):
    damaged_picture(copy)
    settings = tmp_path / "settings.yaml"
    settings.write_text(dump_config(tiny.config(f"data.train={copy / 'train'}", f"data.tokenizer={copy / 'tokenizer'}")))
    code, printed, seconds = launch(settings, "--run-dir", tmp_path / "run")
    assert code == 65
    assert seconds < LIMIT_S
    errors = [line for line in printed.splitlines() if not line.startswith("starting: ")]
    assert len({line.split("error: ")[-1] for line in errors}) == len(errors) <= 2, printed
    for line in errors:
        assert re.match(r"keye \[rank \d\]: error: .*do not match their sha256 in the record: damaged; restore the shard$", line), printed
