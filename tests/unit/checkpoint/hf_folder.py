"""Small released-style Hugging Face folders, with tensors named and shaped by transformers' own modules and the published list."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRVisionConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionTransformer

from megatron_keye.checkpoint.hf_config import make_hf_config
from megatron_keye.checkpoint.hf_weights import write_hf_weights
from megatron_keye.checkpoint.tensors import MemoryTensors
from megatron_keye.config.schema import DecoderConfig, ModelConfig, VisionConfig
from megatron_keye.model.init import proof_tensor
from tests.unit.data.conftest import write_tokenizer

MAX_POSITIONS = 4096
PREPROCESSOR = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "max_pixels": 1003520, "merge_size": 2, "min_pixels": 3136, "patch_size": 14, "resample": 3,
    "rescale_factor": 0.00392156862745098, "temporal_patch_size": 1,
}  # fmt: skip
CHAT_TEMPLATE = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] %}
{%- if 'image' in part or part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'video' in part %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEXT_TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
"""Of the tokenizer alone: no default system turn, no media."""


def small_model(variant: str) -> ModelConfig:
    """As small as heads of 72 and three rotary sections allow."""
    vision = VisionConfig(hidden_size=144, num_layers=2, num_heads=2, ffn_hidden_size=200, carried_position_rows=8)
    decoder = DecoderConfig(
        num_layers=2, hidden_size=64, num_heads=4, num_kv_groups=2, head_dim=32, ffn_hidden_size=96, vocab_size=416,
        norm_eps=1e-5, rope_base=8e6, mrope_section=(4, 6, 6),
    )  # fmt: skip
    return ModelConfig(variant=variant, vision=vision, decoder=decoder)


def qwen3(model: ModelConfig) -> Qwen3ForCausalLM:
    decoder = model.decoder
    return Qwen3ForCausalLM(
        Qwen3Config(
            num_hidden_layers=decoder.num_layers, hidden_size=decoder.hidden_size, num_attention_heads=decoder.num_heads,
            num_key_value_heads=decoder.num_kv_groups, head_dim=decoder.head_dim, intermediate_size=decoder.ffn_hidden_size,
            vocab_size=decoder.vocab_size, rms_norm_eps=decoder.norm_eps, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_base},
        )
    ).float().eval()  # fmt: skip


def paddleocr_vision(model: ModelConfig) -> PaddleOCRVisionTransformer:
    vision = model.vision
    settings = PaddleOCRVisionConfig(
        hidden_size=vision.hidden_size, intermediate_size=vision.ffn_hidden_size, num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
    )  # fmt: skip
    settings._attn_implementation = "eager"
    return PaddleOCRVisionTransformer(settings).float().eval()


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released folder: those that transformers' modules have, the projector, and what is only carried."""
    width, ffn = model.vision.hidden_size, model.vision.ffn_hidden_size
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in qwen3(model).state_dict().items()}
        vision = paddleocr_vision(model).state_dict()
    shapes |= {f"visual.vision_model.{name}": tuple(tensor.shape) for name, tensor in vision.items()}
    merged, norm = 4 * width, width if model.variant == "keye_vl_preview" else 4 * width
    shapes |= {f"mlp_AR.pre_norm.{kind}": (norm,) for kind in ("weight", "bias")}
    shapes |= {"mlp_AR.linear_1.weight": (merged, merged), "mlp_AR.linear_1.bias": (merged,)}
    shapes |= {"mlp_AR.linear_2.weight": (model.decoder.hidden_size, merged), "mlp_AR.linear_2.bias": (model.decoder.hidden_size,)}
    head = {
        "probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width), "attention.out_proj.bias": (width,), "layernorm.weight": (width,),
        "layernorm.bias": (width,), "mlp.fc1.weight": (ffn, width), "mlp.fc1.bias": (ffn,), "mlp.fc2.weight": (width, ffn),
        "mlp.fc2.bias": (width,),
    }  # fmt: skip
    shapes |= {f"visual.vision_model.head.{name}": shape for name, shape in head.items()}
    shapes["visual.vision_model.embeddings.packing_position_embedding.weight"] = (model.vision.carried_position_rows, width)
    return shapes


def tensors_of(model: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: proof_tensor(name, shape, 0.1, seed=5) for name, shape in tensor_shapes(model).items()}


def save_hf_weights(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    """In place of what may be there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_hf_weights(folder, MemoryTensors(tensors), max_shard_bytes)


def write_hf_folder(folder: Path, variant: str, max_shard_bytes: int = 1 << 20) -> Path:
    """A whole folder: config, weights, tokenizer, both templates, preprocessor."""
    model = small_model(variant)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|vision_pad|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEXT_TEMPLATE}
    files = {
        "config.json": make_hf_config(model, tokenizer.get_vocab(), MAX_POSITIONS),
        "tokenizer_config.json": tokenizer_config,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "preprocessor_config.json": PREPROCESSOR,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    save_hf_weights(folder, tensors_of(model), max_shard_bytes)
    return folder
