"""Settings from recipes, files and overrides, and each way in which they can be wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.config.explain import all_settings
from megatron_keye.config.load import dump_config, load_config
from megatron_keye.errors import SettingsError
from megatron_keye.recipes import recipe_names, recipe_path


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(source: str, overrides: list[str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_config(source, overrides)
    return caught.value.problems


@pytest.mark.parametrize("name", recipe_names())
def test_dump_and_load_give_the_same_settings(name, tmp_path):
    config = load_config(name)
    assert load_config(write(tmp_path / "dumped.yaml", dump_config(config))) == config


def test_a_file_is_merged_over_its_base_and_overrides_come_last(tmp_path):
    write(tmp_path / "middle.yaml", "base: debug\ntrain: {steps: 7, seed: 1}\nmodel: {freeze: [vision]}\n")
    top = write(tmp_path / "top.yaml", "base: middle.yaml\ntrain: {seed: 2}\n")
    config = load_config(top, ["optimizer.lr=1e-4", "model.freeze=[projector]", "parallel={tp: 2, cp: 2}"])
    debug = load_config("debug")
    assert (config.train.steps, config.train.seed) == (7, 2)
    assert config.optimizer.lr == 1e-4
    assert config.model.freeze == ("projector",)
    assert (config.parallel.tp, config.parallel.cp) == (2, 2)
    assert config.model.decoder == debug.model.decoder
    assert config.data == debug.data


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2E+2", 200.0), (".5e1", 5.0), ("3", 3.0), ("0.25", 0.25), ("-1e-3", -1e-3), ("8e6", 8e6)]
)
def test_numbers_are_read_as_yaml_1_2_writes_them(text, value):
    assert load_config("debug", [f"optimizer.lr={text}"]).optimizer.lr == value


@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    train=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    stages=st.none() | st.lists(st.integers(0, 99), min_size=1).map(tuple),
)
def test_any_values_survive_a_round_trip(tmp_path_factory, steps, lr, train, stages):
    debug = load_config("debug")
    config = debug.model_copy(
        update={
            "train": debug.train.model_copy(update={"steps": steps}),
            "optimizer": debug.optimizer.model_copy(update={"lr": lr}),
            "data": debug.data.model_copy(update={"train": train}),
            "parallel": debug.parallel.model_copy(update={"layers_per_stage": stages}),
        }
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    assert load_config(write(path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.setps=3", "train.steps"),
        ("lr=1", "optimizer.lr"),
        ("optimiser.lr=1", "optimizer"),
        ("model.vsion.hidden_size=3", "model.vision"),
        ("model.decoder.num_head=3", "model.decoder.num_heads"),
        ("data.seq_length=3", "data.seq_length_tokens"),
        ("tp=2", "parallel.tp"),
    ],
)
def test_an_unknown_name_gets_the_nearest_valid_one(override, nearest):
    (problem,) = problems_of("debug", [override])
    assert problem.startswith("unknown setting ")
    assert f"from --set {override}" in problem
    assert problem.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", ["train.steps", 'found "many"', "expected a valid integer"]),
        ("train.steps=1.0", ["found 1.0", "valid integer"]),
        ("train.steps=true", ["found true", "valid integer"]),
        ("train.steps=0", ["found 0", "greater than 0"]),
        ("train.steps=2020-01-01", ['found "2020-01-01"', "valid integer"]),
        ("train.precision=fp8", ['found "fp8"', "'bf16', 'fp32' or 'fp64'"]),
        ("model.freeze=[visn]", ["model.freeze[0]", 'found "visn"', "'vision'"]),
        ("model.decoder.mrope_section=[1, 2]", ["model.decoder.mrope_section[2] is missing", "[int > 0, int > 0, int > 0]"]),
        ("model.decoder.mrope_section=3", ["found 3", "expected a list"]),
        ("train=3", ["train: found 3", "expected a section of settings"]),
        ("data.video.min_frame_similarity=2", ["less than or equal to 1"]),
        ("model.vision.recompute=1", ["found 1", "valid boolean"]),
    ],
)
def test_a_wrong_value_says_found_expected_and_origin(override, words):
    (problem,) = problems_of("debug", [override])
    assert f"(from --set {override})" in problem
    for word in words:
        assert word in problem


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", ""])
def test_an_override_needs_a_name_and_a_value(override):
    (problem,) = problems_of("debug", [override])
    assert "expected NAME=VALUE" in problem


def test_an_override_that_is_not_yaml():
    (problem,) = problems_of("debug", ["model.freeze=["])
    assert problem.startswith("--set model.freeze=[: the value is not YAML")


def test_every_problem_is_reported_at_once_with_its_file(tmp_path):
    path = write(tmp_path / "mine.yaml", "base: debug\ntrain: {steps: x}\ndata: {tokeniser: y}\n")
    problems = problems_of(path, ["optimizer.lr=z", "w"])
    assert len(problems) == 4
    assert sum(f"(from {path})" in problem for problem in problems) == 2
    with pytest.raises(SettingsError, match="4 problems in the settings"):
        load_config(path, ["optimizer.lr=z", "w"])


def test_missing_settings_are_named_with_their_type(tmp_path):
    tree = yaml.safe_load(dump_config(load_config("debug")))
    del tree["data"]["train"]
    path = write(tmp_path / "incomplete.yaml", yaml.safe_dump(tree))
    assert problems_of(path, []) == [f"data.train is missing (str): add it to {path} or pass --set data.train=VALUE"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("debgu", "did you mean debug"),
        ("zzzzzz", "give one of them or the path of a YAML file"),
        ("no/such/file.yaml", "no settings file no/such/file.yaml"),
        ("missing.yaml", "no settings file missing.yaml"),
    ],
)
def test_an_unknown_source_names_what_exists(source, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load_config(source)
    assert "keye_vl_1_5_8b" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found None at the top"),
        ("- 1\n", "at the top, expected sections"),
        ("train: [\n", "cannot be read as YAML"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "'train' is given twice"),
        ("train: {[1]: 2}\n", "cannot be read as YAML"),
        ("base: [debug]\n", "expected the name of a recipe or a path"),
        ("base: mine.yaml\n", "based on each other in a circle"),
        ("base: gone.yaml\n", "no settings file"),
        ("train: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    (problem,) = problems_of(write(tmp_path / "mine.yaml", text), [])
    assert message in problem
    assert "mine.yaml" in problem or "gone.yaml" in problem


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (problem,) = problems_of(str(tmp_path / "binary.yaml"), [])
    assert "cannot be read as YAML" in problem


def test_every_recipe_is_described_in_its_first_line():
    for name in recipe_names():
        assert recipe_path(name).read_text(encoding="utf-8").startswith("# ")


def test_every_setting_has_a_known_kind():
    kinds = {setting.name: setting.kind for setting in all_settings()}
    assert kinds["parallel.layers_per_stage"] == "[int >= 0, ...] or none"
    assert kinds["data.video.min_frame_similarity"] == "float >= 0.0, <= 1.0 or none"
    assert kinds["train.precision"] == "bf16 | fp32 | fp64"
    assert kinds["model.decoder.mrope_section"] == "[int > 0, int > 0, int > 0]"


def test_loading_settings_needs_no_torch():
    code = "import sys, megatron_keye.config.load, megatron_keye.config.derive; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
