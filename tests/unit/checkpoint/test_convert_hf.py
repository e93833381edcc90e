"""Hugging Face folder -> checkpoint -> Hugging Face folder, read with the safetensors library alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_keye.checkpoint.store import find_damage
from megatron_keye.data.tokenizer import load_tokenizer
from tests.unit.checkpoint.converting import INDEX, assert_same_bits, leftovers, library_read, mixed_tensors, refused, run, write_released
from tests.unit.checkpoint.hf_folder import save_hf_weights, small_model, tensors_of, write_hf_folder
from tests.unit.train.saved_run import save_run

ROOT = Path(__file__).resolve().parents[3]

VARIANTS = ("keye_vl_preview", "keye_vl_1_5")


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
