"""Hugging Face folder -> checkpoint -> Hugging Face folder, read with the safetensors library alone; and what is refused."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from data_tools import convert
from megatron_keye.checkpoint.manifest import read_manifest
from megatron_keye.checkpoint.store import find_damage
from megatron_keye.data.tokenizer import load_tokenizer
from tests.unit.checkpoint.hf_folder import save_hf_weights, small_model, tensors_of, write_hf_folder
from tests.unit.train.forked import in_a_fork
from tests.unit.train.saved_run import save_run

ROOT = Path(__file__).resolve().parents[3]
VARIANTS = ("keye_vl_preview", "keye_vl_1_5")
UNUSED = "visual.vision_model.embeddings.packing_position_embedding.weight"
TRAINED = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def mixed_tensors(variant):
    """Types as no released folder mixes them, and bit patterns that a detour through another type would lose."""
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(small_model(variant)).items()}
    tensors["visual.vision_model.head.probe"] = tensors["visual.vision_model.head.probe"].double()
    tensors[UNUSED] = tensors[UNUSED].half()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    tensors["model.norm.weight"][:4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40]).bfloat16()
    return tensors


def write_released(folder: Path, variant: str, max_shard_bytes: int = 200_000) -> Path:
    """With remote code, a licence, and settings in config.json that this trainer knows nothing of."""
    write_hf_folder(folder, variant)
    save_hf_weights(folder, mixed_tensors(variant), max_shard_bytes)
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_keye.Keye"}, "extra": [1, {"a": None}]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modeling_keye.py", "generation_config.json", "LICENSE", "vocab.json"):
        (folder / name).write_text(f'{{"{name}": "é"}}\n', encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"weights of another kind")
    return folder


def library_read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, by the safetensors library; the index, where there is one, must say the truth."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for name, file in index["weight_map"].items():
            with safe_open(folder / file, "pt") as opened:
                assert name in opened.keys()
        assert set(index["weight_map"]) == set(tensors)
    return tensors


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def run(*arguments) -> int:
    return convert.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The message of a command that ends with exit code 65."""
    assert run(*arguments) == 65
    return capsys.readouterr().err


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_back_gives_the_same_folder(variant, tmp_path, capsys):
    source, checkpoint, back = write_released(tmp_path / "hf", variant), tmp_path / "checkpoint", tmp_path / "back"
    assert run("hf-to-megatron", "--input", source, "--output", checkpoint) == 0
    assert find_damage(checkpoint) == []
    assert run("megatron-to-hf", "--input", checkpoint, "--output", back, "--max-shard-size", "700KB") == 0
    assert_same_bits(library_read(back), mixed_tensors(variant))
    assert max(path.stat().st_size for path in back.glob("model-*")) < 720_000
    carried = {path.name for path in source.iterdir() if "safetensors" not in path.name and path.suffix != ".bin"}
    assert {path.name for path in back.iterdir() if "safetensors" not in path.name} == carried
    for name in carried:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    capsys.readouterr()
    assert run("verify", source, back) == 0 and run("verify", checkpoint, source) == 0
    assert "equal in every bit" in capsys.readouterr().out
    assert not leftovers(tmp_path)


def test_a_type_and_one_file(tmp_path):
    source, checkpoint, back = write_released(tmp_path / "hf", "keye_vl_1_5"), tmp_path / "checkpoint", tmp_path / "back"
    assert run("hf-to-megatron", "--input", source, "--output", checkpoint) == 0
    assert run("megatron-to-hf", "--input", checkpoint, "--output", back, "--dtype", "float16", "--template", source) == 0
    assert not (back / INDEX).exists()
    assert_same_bits(library_read(back), {name: tensor.half() for name, tensor in mixed_tensors("keye_vl_1_5").items()})
    config, original = json.loads((back / "config.json").read_text()), json.loads((source / "config.json").read_text())
    assert config == original | {"torch_dtype": "float16"} and config["extra"] == [1, {"a": None}]


def test_a_training_checkpoint_brings_its_tokenizer(tmp_path):
    """Without a folder that it was started from, everything else is as released."""
    tokenizer = write_hf_folder(tmp_path / "tokenizer", "keye_vl_1_5")
    checkpoint = save_run(tmp_path / "run", tokenizer, "keye_vl_1_5")
    assert run("megatron-to-hf", "--input", tmp_path / "run", "--output", tmp_path / "hf") == 0
    assert_same_bits(library_read(tmp_path / "hf"), tensors_of(small_model("keye_vl_1_5")))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["KeyeVL1_5ForConditionalGeneration"], "KeyeVL1_5")
    assert (config["rope_theta"], config["torch_dtype"], config["max_position_embeddings"]) == (8e6, "float32", 768)
    assert config["image_token_id"] == load_tokenizer(tokenizer, "keye_vl_1_5").specials.image_pad
    assert (tmp_path / "hf/chat_template.json").read_bytes() == (tokenizer / "chat_template.json").read_bytes()
    again = tmp_path / "bf16"
    assert run("megatron-to-hf", "--input", checkpoint, "--output", again, "--dtype", "bfloat16", "--template", tokenizer) == 0
    assert_same_bits(library_read(again), {name: tensor.bfloat16() for name, tensor in tensors_of(small_model("keye_vl_1_5")).items()})


def test_a_template_of_another_model_is_refused(tmp_path, capsys):
    tokenizer, other = write_hf_folder(tmp_path / "tokenizer", "keye_vl_1_5"), write_hf_folder(tmp_path / "other", "keye_vl_1_5")
    checkpoint = save_run(tmp_path / "run", tokenizer, "keye_vl_1_5")
    arguments = ("megatron-to-hf", "--input", checkpoint, "--output", tmp_path / "hf")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["KeyeForConditionalGeneration"]}))
    assert "names keye_vl_preview" in refused(capsys, *arguments, "--template", other)
    (other / "tokenizer_config.json").write_text("{}")
    assert "has another tokenizer" in refused(capsys, *arguments, "--template", other)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    assert "no longer in" in refused(capsys, *arguments)


def test_what_the_trained_model_has_otherwise_is_written_into_config_json(tmp_path):
    """A longer context with another rotary base, as after annealing."""
    tokenizer = write_hf_folder(tmp_path / "tokenizer", "keye_vl_1_5")
    config = json.loads((tokenizer / "config.json").read_text())
    changes = {"rope_theta": 1e6, "max_position_embeddings": 512, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6}
    (tokenizer / "config.json").write_text(json.dumps(config | changes | {"auto_map": {"AutoConfig": "x.Y"}}))
    save_run(tmp_path / "run", tokenizer, "keye_vl_1_5")
    assert run("megatron-to-hf", "--input", tmp_path / "run", "--output", tmp_path / "hf", "--template", tokenizer) == 0
    trained = {"rope_theta": 8e6, "max_position_embeddings": 768, "torch_dtype": "float32", "rms_norm_eps": 1e-5}
    assert json.loads((tmp_path / "hf/config.json").read_text()) == config | {"auto_map": {"AutoConfig": "x.Y"}} | trained


def test_tokenizer_and_template_give_the_ids_that_transformers_gives(tmp_path):
    source, back = write_released(tmp_path / "hf", "keye_vl_1_5"), tmp_path / "back"
    (source / "vocab.json").unlink()
    assert run("hf-to-megatron", "--input", source, "--output", tmp_path / "checkpoint") == 0
    assert run("megatron-to-hf", "--input", tmp_path / "checkpoint", "--output", back) == 0
    theirs, ours = AutoTokenizer.from_pretrained(back, local_files_only=True), load_tokenizer(back, "keye_vl_1_5")
    template = json.loads((back / "chat_template.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "How many red squares? é\n\n"}, {"role": "assistant", "content": "Three"}]
    text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text.startswith("<|im_start|>system\n")
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


class TestVerify:
    @pytest.fixture
    def folders(self, tmp_path):
        tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3), "c": torch.ones(2), "d": torch.zeros(2)}
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("{}")
        save_file(tensors, tmp_path / "one/model.safetensors")

        def other(**changes):
            changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
            save_file(changed, tmp_path / "two/model.safetensors")
            return tmp_path / "one", tmp_path / "two"

        return other

    def test_every_kind_of_difference_is_named(self, folders, capsys):
        moved = torch.arange(6.0).reshape(2, 3)
        moved[1, 2] += 0.25
        moved[0, 0] -= 0.125
        first, second = folders(a=moved, b=torch.ones(3, dtype=torch.float16), c=torch.ones(1, 2), d=None, e=torch.ones(1))
        assert run("verify", first, second) == 1
        assert capsys.readouterr().out.splitlines() == [
            "a F32 [2, 3] differs in 2 elements; largest difference 2.500e-01",
            "b is F32 [3] in the first, F16 [3] in the second; largest difference 0.000e+00",
            "c is F32 [2] in the first, F32 [1, 2] in the second",
            "d F32 [2] is only in the first",
            "e F32 [1] is only in the second",
            "5 of 4 tensors differ",
        ]

    @pytest.mark.parametrize(("value", "largest"), [(-0.0, "0.000e+00"), (float("nan"), "inf"), (float("inf"), "inf")])
    def test_bits_count_and_no_number_is_infinitely_far(self, folders, capsys, value, largest):
        assert run("verify", *folders(d=torch.tensor([0.0, value]))) == 1
        assert f"d F32 [2] differs in 1 elements; largest difference {largest}" in capsys.readouterr().out

    def test_equal_folders(self, folders, capsys):
        assert run("verify", *folders()) == 0
        assert "4 tensors, equal in every bit" in capsys.readouterr().out


def test_inspect_says_what_it_is(tmp_path, capsys):
    source = write_hf_folder(tmp_path / "hf", "keye_vl_preview")
    assert run("hf-to-megatron", "--input", source, "--output", tmp_path / "checkpoint") == 0
    save_run(tmp_path / "run", source, "keye_vl_preview")
    capsys.readouterr()
    texts = {}
    for name in ("hf", "checkpoint", "run"):
        assert run("inspect", tmp_path / name) == 0
        texts[name] = capsys.readouterr().out
    for text in texts.values():
        assert "variant    keye_vl_preview" in text and "F32" in text
        assert len({line for t in texts.values() for line in t.splitlines() if line.startswith("parameters")}) == 1
    assert "Hugging Face folder" in texts["hf"] and "converted checkpoint, without" in texts["checkpoint"]
    assert "training checkpoint of step 7, without optimizer state" in texts["run"]


class TestBadInput:
    @pytest.fixture
    def source(self, tmp_path):
        return write_released(tmp_path / "hf", "keye_vl_1_5")

    @pytest.fixture
    def convert_it(self, source, tmp_path, capsys):
        def convert_it() -> str:
            message = refused(capsys, "hf-to-megatron", "--input", source, "--output", tmp_path / "out")
            assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
            return message

        return convert_it

    def test_missing_and_truncated_shards_are_all_named(self, source, convert_it):
        shards = sorted(source.glob("model-*.safetensors"))
        shards[0].unlink()
        shards[1].write_bytes(shards[1].read_bytes()[:-8])
        shards[2].write_bytes(shards[2].read_bytes()[:20])
        message = convert_it()
        for shard in shards[:3]:
            assert message.count(f"{shard.name} cannot be read as safetensors") == 1
        assert "the file is cut off" in message and "No such file" in message

    def test_index_and_files_that_disagree(self, source, convert_it):
        index = json.loads((source / INDEX).read_text())
        lost = index["weight_map"].pop("model.norm.weight")
        index["weight_map"]["model.ghost.weight"] = lost
        (source / INDEX).write_text(json.dumps(index))
        message = convert_it()
        assert f"{lost} does not hold model.ghost.weight" in message
        assert f"{lost} holds model.norm.weight, which {INDEX} does not name" in message

    def test_unknown_missing_and_misshapen_tensors(self, source, convert_it):
        tensors = mixed_tensors("keye_vl_1_5")
        del tensors["model.norm.weight"], tensors[TRAINED]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        save_hf_weights(source, tensors, 1 << 30)
        message = convert_it()
        for part in (
            "model.norm.weight [64] is missing", f"{TRAINED} [96, 64] is missing", "lm_head.weight is [415, 64], expected [416, 64]",
            "model.layers.7.mlp.up_proj.weight [2] is not of this model",
        ):  # fmt: skip
            assert part in message

    def test_types_that_are_not_weights(self, source, convert_it):
        save_hf_weights(source, mixed_tensors("keye_vl_1_5"), 1 << 30)
        tensors = load_file(source / "model.safetensors") | {TRAINED: torch.zeros(96, 64, dtype=torch.int8)}
        save_file(tensors, source / "model.safetensors")
        assert f"{TRAINED} has the type I8, expected one of F64" in convert_it()

    def test_unknown_architecture_and_the_other_variant(self, source, convert_it):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"architectures": ["LlavaForConditionalGeneration"]}))
        assert "is no Keye-VL folder" in convert_it()
        (source / "config.json").write_text(json.dumps(config | {"architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye"}))
        assert "names keye_vl_preview, whose mlp_AR.pre_norm.weight is [144], but the weights have [576]" in convert_it()

    def test_no_tokenizer(self, source, convert_it):
        (source / "tokenizer.json").unlink()
        assert "no tokenizer in" in convert_it()

    def test_a_disk_that_is_too_small(self, convert_it, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
        assert "0.0 GB free, and 0.1 GB are needed" in convert_it()

    def test_a_disk_that_runs_full(self, source, tmp_path):
        code = in_a_fork(_convert_with_small_files, source, tmp_path / "out")
        assert code == 65
        assert not (tmp_path / "out").exists() and not leftovers(tmp_path)

    def test_output_exists(self, source, tmp_path, capsys):
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

    def test_not_even_a_model(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        assert "holds no model" in refused(capsys, "inspect", tmp_path / "empty")
        message = refused(capsys, "megatron-to-hf", "--input", tmp_path / "empty", "--output", tmp_path / "out")
        assert "neither a checkpoint" in message

    @pytest.mark.parametrize("position", [100_000, -1])
    def test_a_damaged_checkpoint_gives_nothing(self, source, tmp_path, capsys, position):
        checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
        assert run("hf-to-megatron", "--input", source, "--output", checkpoint) == 0
        (file,) = checkpoint.glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(content)
        assert "its bytes have changed" in refused(capsys, "megatron-to-hf", "--input", checkpoint, "--output", out)
        assert not out.exists() and not leftovers(tmp_path)


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


def test_memory_does_not_grow_with_the_model(tmp_path):
    """After a small conversion, one of 128 MB takes no more anonymous memory than a few blocks: less than one of its tables."""
    rows = 250_000
    source, small = write_hf_folder(tmp_path / "hf", "keye_vl_1_5"), write_hf_folder(tmp_path / "small", "keye_vl_1_5")
    tensors = tensors_of(small_model("keye_vl_1_5"))
    tensors |= {name: torch.randn(rows, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_hf_weights(source, tensors, 1 << 30)
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": rows}
    (source / "config.json").write_text(json.dumps(config))
    script = [sys.executable, "-c", MEASURED, str(small), str(source), str(tmp_path)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    taken_bytes = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("megatron-to-hf ", "hf-to-megatron ")))
    assert set(taken_bytes) == {"hf-to-megatron", "megatron-to-hf"}
    assert max(map(int, taken_bytes.values())) < 40e6, f"{taken_bytes} for tables of 64 MB"


MEASURED = """
import sys, threading, time
from pathlib import Path
from data_tools import convert

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def run(command, source, output):
    assert convert.main([command, "--input", str(source), "--output", str(output)]) == 0

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

small, large, folder = map(Path, sys.argv[1:])
run("hf-to-megatron", small, folder / "small_checkpoint")
run("megatron-to-hf", folder / "small_checkpoint", folder / "small_back")
for command, source, output in (("hf-to-megatron", large, "checkpoint"), ("megatron-to-hf", folder / "checkpoint", "back")):
    peak, done = 0, False
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    run(command, source, folder / output)
    done = True
    thread.join()
    print(command, peak - before)
"""
