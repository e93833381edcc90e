"""New Keye-VL folders from small Qwen3 and SigLIP folders that transformers wrote."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from data_tools import convert
from megatron_keye.checkpoint.fresh import NOISE
from megatron_keye.checkpoint.fresh_tokenizer import keye_tokens
from megatron_keye.checkpoint.hf_config import read_hf_config
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.model.tensors import canonical_shapes
from megatron_keye.train.model_source import find_model
from tests.unit.checkpoint.hf_folder import TEXT_TEMPLATE
from tests.unit.data.conftest import write_tokenizer

VISION = dict(hidden_size=144, num_hidden_layers=2, num_attention_heads=2, intermediate_size=200, image_size=384, patch_size=14)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
PROJECTOR = "mlp_AR.linear_1.weight"
QWEN3_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def write_llm(folder, num_rows=None, tied=False):
    """Qwen3 in bfloat16 with a tokenizer that has no frame or grounding tokens; returns (folder, number of its ids)."""
    write_tokenizer(folder)
    plain = json.loads((folder / "tokenizer.json").read_text())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in QWEN3_TOKENS]
    for number, token in enumerate(plain["added_tokens"]):
        token["id"] = len(plain["model"]["vocab"]) + number
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEXT_TEMPLATE}))
    num_ids = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values()) + 1
    torch.manual_seed(3)
    config = Qwen3Config(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=96,
        vocab_size=num_rows or num_ids + 40, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        max_position_embeddings=2048,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).bfloat16()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.linspace(-1, 1, 64))
    model.save_pretrained(folder)
    return folder, num_ids


def write_vision(folder, whole=False):
    torch.manual_seed(4)
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)) if whole else SiglipVisionModel(SiglipVisionConfig(**VISION))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return *write_llm(folder / "llm"), write_vision(folder / "vision")


def make(llm, vision, output, variant="1_5", *options):
    arguments = ["new", "--llm", llm, "--vision", vision, "--variant", variant, "--output", output, *options]
    return convert.main([str(argument) for argument in arguments])


def weights_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("variant", "name"), [("1_5", "keye_vl_1_5"), ("preview", "keye_vl_preview")])
def test_every_tensor_is_where_it_belongs(sources, tmp_path, variant, name):
    llm, num_ids, vision = sources
    assert make(llm, vision, tmp_path / "new", variant) == 0
    model, found = read_hf_config(tmp_path / "new"), weights_of(tmp_path / "new")
    assert (model.variant, model.decoder.rope_base, model.decoder.mrope_section) == (name, 5e5, (4, 6, 6))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == canonical_shapes(model)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for old, tensor in weights_of(vision).items():
        assert torch.equal(found.pop(f"visual.vision_model.{old}"), tensor.bfloat16()), old
    expected = weights_of(llm)
    num_tokens = load_tokenizer(tmp_path / "new", name).vocab_size
    for table in (EMBEDDING, OUTPUT):
        old, new = expected.pop(table), found.pop(table)
        assert torch.equal(new[:num_ids], old[:num_ids]) and torch.equal(new[num_tokens:], old[num_tokens:])
        drawn = (new[num_ids:num_tokens].double() - old[:num_ids].double().mean(0)) / old[:num_ids].double().std(0)
        assert 0.5 * NOISE < drawn.std() < 2 * NOISE and drawn.mean().abs() < NOISE
        assert len(new[num_ids:num_tokens].unique(dim=0)) == num_tokens - num_ids >= 9
    for old, tensor in expected.items():
        assert torch.equal(found.pop(old), tensor), old
    assert all(name.startswith("mlp_AR.") or "packing" in name for name in found) and len(found) == 7
    assert (found["mlp_AR.pre_norm.weight"] == 1).all() and (found["mlp_AR.linear_1.bias"] == 0).all()
    assert found[PROJECTOR].float().std().item() == pytest.approx(0.02, rel=0.05)


def test_the_folder_is_a_model_that_scores_and_trains_on(sources, tmp_path):
    """Everything that a released folder has: templates, generation and preprocessor settings, ids as transformers gives them."""
    llm, num_ids, vision = sources
    assert make(llm, vision, tmp_path / "new") == 0
    source = find_model(tmp_path / "new")
    assert source.max_tokens == 2048 and source.tokenizer.specials.frame >= num_ids
    generation = json.loads((tmp_path / "new/generation_config.json").read_text())
    assert generation["eos_token_id"] == [source.tokenizer.specials.im_end, source.tokenizer.specials.endoftext]
    theirs, base = AutoTokenizer.from_pretrained(tmp_path / "new", local_files_only=True), load_tokenizer_of(llm)
    text = "<|frame|>0.5<|fast_start|>How many red<|box_start|>[[1, 2]]<|box_end|>"
    assert source.tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert theirs.convert_tokens_to_ids("<|fast_end|>") == source.tokenizer.specials.fast_end
    assert "<|box_start|>" in theirs.decode(source.tokenizer.encode(text), skip_special_tokens=True)
    assert "<|frame|>" not in theirs.decode(source.tokenizer.encode(text), skip_special_tokens=True)
    assert source.tokenizer.encode("How many red squares?") == base.encode("How many red squares?").ids
    assert "<|image_pad|>" in json.loads((tmp_path / "new/chat_template.json").read_text())["chat_template"]


def load_tokenizer_of(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_seed_decides(sources, tmp_path):
    llm, _, vision = sources
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert make(llm, vision, tmp_path / name, "1_5", "--seed", seed) == 0
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    differing = {name for name in a if not torch.equal(a[name], c[name])}
    assert {EMBEDDING, OUTPUT, PROJECTOR} <= differing and not any(name.startswith("model.layers") for name in differing)


def test_one_table_for_both_ends_and_a_whole_siglip(tmp_path):
    """Tables without free rows grow; Qwen3's shared table becomes two; SigLIP's text tower is left out."""
    llm, num_ids = write_llm(tmp_path / "llm", tied=True)
    vision = write_vision(tmp_path / "vision", whole=True)
    assert make(llm, vision, tmp_path / "new") == 0
    found, old = weights_of(tmp_path / "new"), weights_of(llm)
    assert OUTPUT not in old
    assert torch.equal(found[OUTPUT][:num_ids], old[EMBEDDING][:num_ids])
    assert torch.equal(found[EMBEDDING][:num_ids], old[EMBEDDING][:num_ids])
    assert not json.loads((tmp_path / "new/config.json").read_text())["tie_word_embeddings"]


def test_tables_grow_where_the_tokenizer_does(tmp_path):
    llm, num_ids = write_llm(tmp_path / "llm")
    small, _ = write_llm(tmp_path / "small", num_rows=num_ids)
    vision = write_vision(tmp_path / "vision")
    assert make(small, vision, tmp_path / "new") == 0
    num_rows = read_hf_config(tmp_path / "new").decoder.vocab_size
    assert num_rows % 64 == 0 and num_rows > num_ids
    assert weights_of(tmp_path / "new")[EMBEDDING].float().std(0).gt(0).all()
    assert make(llm, vision, tmp_path / "roomy") == 0
    assert read_hf_config(tmp_path / "roomy").decoder.vocab_size == num_ids + 40


def test_new_tokens_are_those_that_demo_and_release_have():
    names = {token.content: token.special for token in keye_tokens("keye_vl_1_5")}
    preview = {token.content for token in keye_tokens("keye_vl_preview")}
    assert set(names) - preview == {"<|polygon_start|>", "<|polygon_end|>", "<|frame|>", "<|fast_start|>", "<|fast_end|>"}
    assert {name for name, special in names.items() if special} == {
        *QWEN3_TOKENS,
        "<|vision_pad|>",
        "<|frame|>",
        "<|fast_start|>",
        "<|fast_end|>",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda llm, vision: (vision, vision), "is of model type 'siglip_vision_model', expected qwen3"),
        (lambda llm, vision: (llm, llm), "is of model type 'qwen3', expected siglip or siglip_vision_model"),
    ],
)
def test_other_models_are_refused(sources, tmp_path, capsys, change, message):
    llm, _, vision = sources
    assert make(*change(llm, vision), tmp_path / "new") == 65
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_incomplete_folders_name_every_tensor(tmp_path, capsys):
    llm, _ = write_llm(tmp_path / "llm")
    vision = write_vision(tmp_path / "vision")
    weights = weights_of(llm)
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llm / "model.safetensors")
    tower = weights_of(vision)
    del tower["head.probe"]
    save_file(tower, vision / "model.safetensors")
    assert make(llm, vision, tmp_path / "new") == 65
    message = capsys.readouterr().err
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "visual.vision_model.head.probe"):
        assert f"{name} [" in message and "is missing" in message
    (llm / "config.json").write_text(json.dumps(json.loads((llm / "config.json").read_text()) | {"attention_bias": True}))
    assert make(llm, vision, tmp_path / "new") == 65
    assert "attention_bias is True" in capsys.readouterr().err
