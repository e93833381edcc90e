import json
from dataclasses import replace

import pytest

from megatron_keye.checkpoint.files import FileRecord
from megatron_keye.checkpoint.manifest import MANIFEST, PartRecord, RunRecord, identity_problems, merge, read_manifest
from megatron_keye.errors import CheckpointError

RUN = RunRecord(3, '{"x": "ü"}', "a: 1\n", "ff", {"torch": "2.13"})
FILES = [FileRecord("rank_00000.safetensors", 10, "aa"), FileRecord("rank_00001.safetensors", 20, "bb")]
PART = PartRecord("weight/w", (4, 3), "F32", 6, 3)


def test_what_is_read_is_what_was_written(tmp_path):
    manifest = merge(RUN, {"variant": "v", "eps": 1e-6}, [(FILES[0], [PART]), (FILES[1], [PART])])
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert read_manifest(tmp_path) == manifest
    assert manifest.tensors["weight/w"].files == (0, 1)
    assert manifest.steps == {"w": 3}


@pytest.mark.parametrize(
    "second",
    [
        [],
        [replace(PART, numel=5)],
        [PART, PART],
        [replace(PART, shape=(3, 4))],
        [replace(PART, dtype="BF16")],
        [replace(PART, step=4)],
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused(second):
    with pytest.raises(CheckpointError, match="weight/w"):
        merge(RUN, {}, [(FILES[0], [PART]), (FILES[1], second)])


def edited(edit):
    def apply(path):
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: path.write_text(path.read_text()[:-20]), "not JSON"),
        (lambda path: path.write_text("[]"), "expected an object"),
        (lambda path: path.write_text("{}"), "checksum"),
        (edited(lambda content: content["steps"].update(w=4)), "checksum"),
        (edited(lambda content: content.pop("sha256")), "checksum"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, damage, said):
    (tmp_path / MANIFEST).write_text(merge(RUN, {}, [(FILES[0], [PART, PART])]).to_json())
    read_manifest(tmp_path)
    damage(tmp_path / MANIFEST)
    with pytest.raises(CheckpointError, match=said) as error:
        read_manifest(tmp_path)
    assert str(tmp_path / MANIFEST) in str(error.value)


def test_a_file_outside_of_the_folder_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text(merge(RUN, {}, [(replace(FILES[0], name="../x"), [PART, PART])]).to_json())
    with pytest.raises(CheckpointError, match="outside"):
        read_manifest(tmp_path)


def test_every_difference_of_the_model_is_said():
    problems = identity_problems({"variant": "a", "layers": 4, "same": 1}, {"variant": "b", "heads": 8, "same": 1})
    assert len(problems) == 3
    assert any("layers is 'absent' here, 4 in the checkpoint" in problem for problem in problems)
