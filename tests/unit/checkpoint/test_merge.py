"""Merges against numpy, one rounding against the definition of rounding, and everything that is refused."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_tools import merge
from megatron_keye.checkpoint.checkpoint_tensors import CheckpointTensors
from megatron_keye.checkpoint.merge import Merged, rounded
from megatron_keye.checkpoint.merge_recipe import Mix, Recipe, Rule, assign, read_recipe
from megatron_keye.checkpoint.store import find_damage
from megatron_keye.checkpoint.tensors import MemoryTensors
from megatron_keye.errors import SettingsError
from tests.unit.checkpoint.hf_folder import save_hf_weights, small_model, tensor_shapes, write_hf_folder
from tests.unit.train.saved_run import save_run

VARIANT = "keye_vl_1_5"
NORM = "model.norm.weight"


def run(*arguments) -> int:
    return merge.main([str(argument) for argument in arguments])


def write_recipe(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(small_model(VARIANT)).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with the models a, b and c, all float32."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        write_hf_folder(folder / name, VARIANT)
        save_hf_weights(folder / name, weights(seed), 1 << 20)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


RULES = {
    "average": ({"average": {"a": 2, "b": 1, "c": 1}}, lambda a, b, c: (2 * a + b + c) / 4),
    "thirds": ({"average": {"a": 1, "b": 1, "c": 1}}, lambda a, b, c: (a + b + c) / 3),
    "task": ({"task": {"base": "a", "add": {"b": 0.7, "c": -0.2}}}, lambda a, b, c: a + (b - a) * 7 / 10 - (c - a) / 5),
}


@pytest.mark.parametrize(("rule", "formula"), RULES.values(), ids=RULES)
def test_a_merge_is_what_numpy_computes(models, tmp_path, rule, formula):
    recipe = write_recipe(tmp_path / "r.yaml", {"models": {name: str(models / name) for name in "abc"}, "rules": [rule]})
    assert run(recipe, "--output", tmp_path / "out") == 0
    a, b, c = (weights(seed) for seed in range(3))
    found = read(tmp_path / "out")
    assert set(found) == set(a)
    for name in a:
        expected = formula(*(one[name].numpy().astype(np.float64) for one in (a, b, c))).astype(np.float32)
        # Numpy's own steps are rounded to float64, which turns a tie of float32 into none: one bit, where that happens.
        assert (np.abs(found[name].numpy() - expected) <= np.spacing(np.abs(expected))).all(), name


TINY = ({"average": {"a": 1, "b": 1e-30}}, lambda a, b, c: (a + b / 10**30) / (1 + Fraction(1, 10**30)))
"""Its integers have a hundred bits."""


@pytest.mark.parametrize(("rule", "formula"), [*RULES.values(), TINY], ids=[*RULES, "tiny"])
def test_a_merge_is_exact(rule, formula):
    """Rational numbers: the result is no farther from the exact value than half of the distance to the next float32."""
    sources = {model: MemoryTensors({NORM: weights(seed)[NORM]}) for seed, model in enumerate("abc")}
    merged = Merged(sources["a"].specs, sources, {NORM: Rule.model_validate(rule).mix()})
    found = merged.read_rows(NORM, 0, 64).flatten().numpy()
    numbers = zip(*(source.tensors[NORM].tolist() for source in sources.values()), strict=True)
    for number, exact in zip(found, (formula(*map(Fraction, triple)) for triple in numbers), strict=True):
        step = Fraction(float(np.spacing(abs(number))))
        assert abs(Fraction(float(number)) - exact) <= step / 2


def test_each_part_of_the_model_by_its_own_rule_and_back_as_a_checkpoint(models, tmp_path):
    """Relative paths; a run beside folders; the result is a checkpoint whose files are whole."""
    run_dir = tmp_path / "run"
    save_run(run_dir, models / "a", VARIANT)
    (tmp_path / "a").symlink_to(models / "a")
    rules = [
        {"tensors": ["visual.*", "mlp_AR.*"], "take": "a"},
        {"tensors": ["*.layers.1.*"], "average": {"a": 1, "run": 1}},
        {"take": "run"},
    ]
    recipe = write_recipe(tmp_path / "r.yaml", {"models": {"a": "a", "run": "run"}, "rules": rules})
    assert run(recipe, "--output", tmp_path / "native", "--format", "native") == 0
    assert find_damage(tmp_path / "native") == []
    stored = CheckpointTensors(tmp_path / "native")
    assert yaml.safe_load(stored.manifest.run.settings)["merged"]["rules"][0]["take"] == "a"
    trained = CheckpointTensors(next((run_dir / "checkpoints").iterdir()))

    def rows(source, name):
        return source.read_rows(name, 0, stored.specs[name].shape[0])

    a = MemoryTensors(weights(0))
    for name in stored.specs:
        if name.startswith(("visual.", "mlp_AR.")):
            expected = rows(a, name)
        elif ".layers.1." in name:
            expected = ((rows(a, name).double() + rows(trained, name).double()) / 2).float()
        else:
            expected = rows(trained, name)
        assert torch.equal(rows(stored, name), expected), name


ONE_MODEL = [{"take": "a"}, {"average": {"a": 3, "b": 0}}, {"task": {"base": "b", "add": {"a": 1}}}]


@pytest.mark.parametrize("rule", ONE_MODEL)
def test_one_model_with_weight_one_keeps_every_bit(rule):
    """Of numbers that are none, too, and of negative zeros; a model with weight 0 is not touched."""
    tensors = {"x": torch.tensor([float("nan"), -0.0, float("inf"), 1e-40, 3.0]).bfloat16(), "y": torch.tensor(-1.5).half()}
    tensors["x"].view(torch.int16)[0] = 0x7FA5
    a = MemoryTensors(tensors)
    b = MemoryTensors({name: torch.full_like(tensor, float("inf")) for name, tensor in tensors.items()})
    merged = Merged(a.specs, {"a": a, "b": b}, dict.fromkeys(tensors, Rule.model_validate(rule).mix()))
    for name, tensor in tensors.items():
        found = merged.read_rows(name, 0, max(1, tensor.numel()))
        assert torch.equal(found.reshape(tensor.shape).view(torch.int16), tensor.view(torch.int16))


def test_weights_cancel_as_they_are_written():
    """0.7 + 0.2 + 0.1 is 1 in decimals and less than that in binary; a base left over would turn an infinity of it into no number."""
    assert 1.0 - (0.7 + 0.2 + 0.1) != 0.0
    rule = Rule.model_validate({"task": {"base": "base", "add": {"a": 0.7, "b": 0.2, "c": 0.1}}})
    assert rule.mix() == Mix({"a": 7, "b": 2, "c": 1}, 10)


@given(st.lists(st.floats(width=64), min_size=1, max_size=20), st.sampled_from([torch.bfloat16, torch.float16]))
def test_one_rounding_gives_the_nearest_number(numbers, dtype):
    check_nearest(torch.tensor(numbers, dtype=torch.float64), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_beside_a_tie_is_rounded_to_its_own_side(dtype):
    """By way of float32, every second of these goes the wrong way."""
    ties = 1 + (2 * torch.arange(64, dtype=torch.float64) + 1) * torch.finfo(dtype).eps / 2
    values = torch.cat([ties * (1 + 2**-40), ties * (1 - 2**-40)])
    check_nearest(values, dtype)
    assert not torch.equal(values.to(dtype), rounded(values, dtype)), "then this test would show nothing"


def check_nearest(values: torch.Tensor, dtype: torch.dtype) -> None:
    found = rounded(values, dtype)
    assert found.dtype == dtype
    bits = found.view(torch.int16)
    for neighbour in ((bits + 1).view(dtype), (bits - 1).view(dtype)):
        closer = (neighbour.double() - values).abs() < (found.double() - values).abs()
        assert not (closer & found.isfinite() & neighbour.isfinite()).any()
    assert torch.equal(found.isnan(), values.isnan())
    largest = torch.finfo(dtype).max
    overflow = values.abs() >= largest * (1 + torch.finfo(dtype).eps / 4)
    assert torch.equal(found.isinf(), overflow)


def test_a_dry_run_says_what_would_be_done(models, tmp_path, capsys):
    rules = [{"tensors": ["visual.*"], "take": "a"}, {"average": {"a": 3, "b": 1}}]
    recipe = write_recipe(tmp_path / "r.yaml", {"models": {"a": str(models / "a"), "b": str(models / "b")}, "rules": rules})
    assert run(recipe, "--output", tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "visual.*: 1 a; " in said
    assert "*: 0.75 a + 0.25 b; " in said
    assert "nothing written" in said
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_replaced_only_by_force(models, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", {"models": {"a": str(models / "a")}, "rules": [{"take": "a"}]})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    assert run(recipe, "--output", tmp_path / "out") == 65
    assert "--force" in capsys.readouterr().err
    assert run(recipe, "--output", tmp_path / "out", "--force", "--dtype", "bfloat16") == 0
    found = read(tmp_path / "out")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in weights(0).items())
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "out/mine").exists()


def test_models_that_do_not_fit_are_all_named_at_once(models, tmp_path, capsys):
    write_hf_folder(tmp_path / "other", VARIANT)
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    (tmp_path / "other/tokenizer_config.json").write_text("{}")
    places = {"a": str(models / "a"), "other": "other", "absent": "nowhere"}
    recipe = write_recipe(tmp_path / "r.yaml", {"models": places, "rules": [{"average": dict.fromkeys(places, 1)}]})
    assert run(recipe, "--output", tmp_path / "out") == 65
    said = capsys.readouterr().err
    for part in ("other: decoder.rope_base is 500000.0, and 8000000.0 in a", "other: tokenizer is", "absent:", "nowhere holds no model"):
        assert part in said


def test_a_damaged_checkpoint_is_refused_and_nothing_is_left(models, tmp_path, capsys):
    checkpoint = save_run(tmp_path / "run", models / "a", VARIANT)
    file = next(checkpoint.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    recipe = write_recipe(tmp_path / "r.yaml", {"models": {"run": "run"}, "rules": [{"take": "run"}]})
    assert run(recipe, "--output", tmp_path / "out") == 65
    assert "its bytes have changed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml", "run"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("models: {a: x}\nmodels: {b: y}", ["given twice"]),
        ("models: {}\nrules: []\nmore: 1", ["models: ", "rules: ", "more: "]),
        ("models: {a: x}\nrules:\n- {average: {a: .inf}}\n- {take: 3}", ["rules.0.average.a", "rules.1.take"]),
        (
            "models: {a: x, b: y, c: z}\nlike: q\nrules:\n- {take: a, average: {b: 1}}\n- {tensors: [x]}\n- {average: {a: 0.1, d: -0.1}}",
            [
                "like: 'q'",
                "rules.0: found take and average",
                "rules.1: found nothing",
                "rules.2: 'd'",
                "sum to 0",
                "models.c: no rule",
            ],
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_every_problem(tmp_path, text, parts):
    with pytest.raises(SettingsError) as error:
        read_recipe(write_recipe(tmp_path / "r.yaml", text))
    for part in parts:
        assert part in str(error.value)


def test_rules_must_cover_every_tensor_and_be_of_use():
    rules = ({"tensors": ["a*"], "take": "m"}, {"tensors": ["ab", "x"], "take": "m"})
    recipe = Recipe.model_validate({"models": {"m": "p"}, "rules": rules})
    with pytest.raises(SettingsError) as error:
        assign(recipe, ["ab", "b"])
    assert "no rule fits b" in str(error.value)
    assert "rules.1: nothing is left for ab, x" in str(error.value)
