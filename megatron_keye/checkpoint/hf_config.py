"""config.json of released Keye-VL folders: decoder settings at the top level, the ViT's in `vision_config`.

Names and values are those of the released Keye-VL-8B-Preview; Keye-VL-1.5 differs in architecture and model type. Which of the two
a folder is must agree with its weights, whose projector norm is as wide as a patch's features or as a merged token's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_keye.checkpoint.hf_weights import HfTensors
from megatron_keye.config.json_file import read_json_object
from megatron_keye.config.schema import DecoderConfig, ModelConfig, Variant, VisionConfig
from megatron_keye.contract.media import MERGE
from megatron_keye.errors import CheckpointError

CONFIG_FILE = "config.json"
CLASSES: dict[Variant, tuple[str, str]] = {
    "keye_vl_preview": ("KeyeForConditionalGeneration", "Keye"),
    "keye_vl_1_5": ("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5"),
}
"""Architecture and model type of each variant."""
DECODER_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "patch_size": "patch_size",
}
FIXED = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "use_sliding_window": False}
VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "spatial_merge_size": MERGE, "attention_dropout": 0.0}
"""Settings that must be these where a folder gives them, because the model is built on them."""
ROPE_TYPES = ("mrope", "default")
RELEASED_IMAGE_SIZE = 384
TOKEN_FIELDS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
VISION = "vision_config."
NORM = "mlp_AR.pre_norm.weight"
CARRIED = "visual.vision_model.embeddings.packing_position_embedding.weight"


def read_hf_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json and weights describe. Raises CheckpointError as `model_of_hf_config` does."""
    path = folder / CONFIG_FILE
    raw = read_json_object(path)
    return model_of_hf_config(raw, path, HfTensors(folder).shapes)


def model_of_hf_config(raw: dict[str, Any], path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The model that a config.json, read from `path`, and the shapes of its weights describe.

    Raises CheckpointError for a missing or damaged file, settings that this model does not have, and weights of another
    variant than the one named.
    """
    variant = _variant(raw, path)
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(f"{path} has no vision_config; expected the flat form of released Keye-VL folders")
    problems = [
        *(f"{name} is missing" for name in DECODER_FIELDS.values() if name not in raw),
        *(f"vision_config.{name} is missing" for name in VISION_FIELDS.values() if name not in vision),
        *_fixed_problems(raw, FIXED, ""),
        *_fixed_problems(vision, VISION_FIXED, "vision_config."),
        *_rope_problems(raw),
    ]
    if problems:
        raise CheckpointError(f"{path} does not describe a Keye-VL model as released:\n" + "\n".join(f"  - {p}" for p in problems))
    try:
        model = ModelConfig(variant=variant, vision=_vision(vision, shapes), decoder=_decoder(raw))
    except (ValidationError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} has impossible settings; restore it from where it was copied: {error}") from error
    _require_variant(path, model, shapes)
    return model


def read_max_positions(folder: Path) -> int:
    """Most tokens of a sample that the model is meant for. Raises CheckpointError where config.json does not say."""
    found = read_json_object(folder / CONFIG_FILE).get("max_position_embeddings")
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(f"{folder / CONFIG_FILE}: max_position_embeddings is {found!r}, expected a number of tokens")
    return found


def make_hf_config(model: ModelConfig, vocab: Mapping[str, int], max_position_embeddings: int) -> dict[str, Any]:
    """config.json of `model` as released folders have it; `vocab` gives the ids of special tokens, and may lack unused ones.

    What `read_hf_config` reads from it and the weights is `model` again, but for settings of training alone.
    """
    decoder = model.decoder
    values = _hf_values(model)
    vision = {name.removeprefix(VISION): value for name, value in values.items() if name.startswith(VISION)}
    return {
        **{name: value for name, value in values.items() if not name.startswith(VISION)},
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": decoder.rope_base,
        "rope_scaling": {"type": "mrope", "mrope_section": list(decoder.mrope_section)},
        **FIXED,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "max_window_layers": decoder.num_layers,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **{name: vocab[token] for name, token in TOKEN_FIELDS.items() if token in vocab},
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            "num_channels": 3,
            "hidden_act": VISION_FIXED["hidden_act"],
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
    }


def update_hf_config(raw: dict[str, Any], read: ModelConfig, model: ModelConfig) -> dict[str, Any]:
    """The config.json `raw`, from which `read` was read, with what `model` has otherwise. Everything else stays as it is."""
    decoder = model.decoder
    old, new = _hf_values(read), _hf_values(model)
    changes: dict[str, Any] = {name: new[name] for name in new if new[name] != old[name]}
    vision_changes = {name.removeprefix(VISION): changes.pop(name) for name in list(changes) if name.startswith(VISION)}
    if vision_changes:
        changes["vision_config"] = raw["vision_config"] | vision_changes
    if (decoder.rope_base, decoder.mrope_section) != (read.decoder.rope_base, read.decoder.mrope_section):
        section = {"mrope_section": list(decoder.mrope_section)}
        if "rope_parameters" in raw:
            changes["rope_parameters"] = raw["rope_parameters"] | section | {"rope_theta": decoder.rope_base}
        else:
            changes |= {"rope_theta": decoder.rope_base, "rope_scaling": {"type": "mrope"} | (raw.get("rope_scaling") or {}) | section}
    return raw | changes


def _hf_values(model: ModelConfig) -> dict[str, Any]:
    """Settings by their name in config.json, but for those of the decoder's rotary embedding."""
    decoder, vision = model.decoder, model.vision
    return {
        "architectures": [CLASSES[model.variant][0]],
        "model_type": CLASSES[model.variant][1],
        **{name: getattr(decoder, field) for field, name in DECODER_FIELDS.items()},
        "head_dim": decoder.head_dim,
        **{f"{VISION}{name}": getattr(vision, field) for field, name in VISION_FIELDS.items()},
        f"{VISION}image_size": _image_size(vision),
        f"{VISION}layer_norm_eps": vision.norm_eps,
        f"{VISION}rope_theta": vision.rope_base,
    }


def _variant(raw: dict[str, Any], path: Path) -> Variant:
    architectures = raw.get("architectures") or []
    for variant, (architecture, model_type) in CLASSES.items():
        if architecture in architectures or (not architectures and raw.get("model_type") == model_type):
            return variant
    raise CheckpointError(
        f"{path} names the architectures {architectures} and the model type {raw.get('model_type')!r}; expected one of "
        f"{', '.join(architecture for architecture, _ in CLASSES.values())}: this is no Keye-VL folder"
    )


def _decoder(raw: dict[str, Any]) -> DecoderConfig:
    rope = rope_settings(raw)
    fields = {field: raw[name] for field, name in DECODER_FIELDS.items()}
    # A folder without head_dim means equal shares of the hidden size, as in the released code.
    head_dim = raw["head_dim"] if "head_dim" in raw else raw["hidden_size"] // raw["num_attention_heads"]
    if "rope_theta" in rope:
        fields["rope_base"] = rope["rope_theta"]
    if "mrope_section" in rope:
        fields["mrope_section"] = tuple(rope["mrope_section"])
    return DecoderConfig(**fields, head_dim=head_dim)


def _vision(raw: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> VisionConfig:
    fields = {field: raw[name] for field, name in VISION_FIELDS.items()}
    optional = {"norm_eps": raw.get("layer_norm_eps"), "rope_base": raw.get("rope_theta")}
    fields |= {field: value for field, value in optional.items() if value is not None}
    fields["position_table_side"] = raw.get("image_size", RELEASED_IMAGE_SIZE) // raw["patch_size"]
    if CARRIED in shapes:
        fields["carried_position_rows"] = shapes[CARRIED][0]
    return VisionConfig(**fields)


def rope_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: `rope_theta` and `rope_scaling` as released, or `rope_parameters` as transformers 5 writes them."""
    base = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    return base | (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})


def _rope_problems(raw: dict[str, Any]) -> list[str]:
    rope = rope_settings(raw)
    found = [rope[name] for name in ("type", "rope_type") if name in rope and rope[name] not in ROPE_TYPES]
    problems = [f"the rotary embedding is of type {name!r}; this model has {' or '.join(ROPE_TYPES)}" for name in found]
    if rope.get("mrope_interleaved"):
        problems.append("the rotary embedding is interleaved (mrope_interleaved); this model's is in chunks")
    return problems


def _fixed_problems(raw: dict[str, Any], fixed: dict[str, Any], prefix: str) -> list[str]:
    return [
        f"{prefix}{name} is {raw[name]!r}; this model has {expected!r}"
        for name, expected in fixed.items()
        if raw.get(name, expected) != expected
    ]


def _require_variant(path: Path, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    widths = {"keye_vl_preview": model.vision.hidden_size, "keye_vl_1_5": model.vision.hidden_size * MERGE * MERGE}
    expected = (widths[model.variant],)
    if NORM in shapes and shapes[NORM] != expected:
        fits = [variant for variant, width in widths.items() if shapes[NORM] == (width,)]
        raise CheckpointError(
            f"{path} names {model.variant}, whose {NORM} is {list(expected)}, but the weights have {list(shapes[NORM])}"
            + (f", which is that of {fits[0]}; correct `architectures` and `model_type`, or use the config.json of these weights"
               if fits else "; use the config.json that belongs to these weights")
        )  # fmt: skip


def _image_size(vision: VisionConfig) -> int:
    """Pixels per side that the position table is for; the released 384 is not quite 27 patches."""
    if vision.position_table_side == RELEASED_IMAGE_SIZE // vision.patch_size:
        return RELEASED_IMAGE_SIZE
    return vision.position_table_side * vision.patch_size
