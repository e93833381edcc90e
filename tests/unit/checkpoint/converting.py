"""What the tests of `data_tools/convert.py` share: a folder as released, the command line, what the library reads."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data_tools import convert
from tests.unit.checkpoint.hf_folder import save_hf_weights, small_model, tensors_of, write_hf_folder

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
