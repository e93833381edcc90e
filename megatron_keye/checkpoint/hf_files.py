"""The files of a Hugging Face folder beside its weights: config.json, tokenizer, templates, preprocessor, remote code."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_keye.checkpoint.files import write_text
from megatron_keye.checkpoint.hf_config import CONFIG_FILE
from megatron_keye.config.schema import Variant
from megatron_keye.contract.media import MERGE, PATCH_PIXELS
from megatron_keye.contract.tokens import SpecialTokens
from megatron_keye.data.chat_template import CHAT_TEMPLATE, find_chat_template
from megatron_keye.data.processor_config import FIXED as FIXED_PREPROCESSOR
from megatron_keye.data.processor_config import PREPROCESSOR_FILE
from megatron_keye.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
GENERATION_FILE, TEMPLATE_FILE = "generation_config.json", "chat_template.json"
PIXELS_PER_TOKEN = (MERGE * PATCH_PIXELS) ** 2
MAX_IMAGE_TOKENS: dict[Variant, int] = {"keye_vl_preview": 1280, "keye_vl_1_5": 20480}
"""What the released preprocessor of each variant allows."""


@dataclass(frozen=True)
class HfFiles:
    """Files to put beside weights, by name. Texts that are written win over files that are copied."""

    copied: dict[str, Path]
    written: dict[str, str] = field(default_factory=dict)

    def write_to(self, folder: Path) -> None:
        for name, path in self.copied.items():
            if name not in self.written:
                shutil.copyfile(path, folder / name)
        for name, text in self.written.items():
            write_text(folder / name, text)


def carried_files(folder: Path) -> dict[str, Path]:
    """Every file directly in `folder` that holds no weights, by name. Raises CheckpointError where there is no config.json."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; expected a Hugging Face folder: {_hint(folder)}")
    return _files_in(folder)


def tokenizer_files(folder: Path) -> HfFiles:
    """The files of a tokenizer's folder, with the chat template of this trainer where it brings none."""
    template = {} if find_chat_template(folder) else {TEMPLATE_FILE: json_text({"chat_template": CHAT_TEMPLATE})}
    return HfFiles(_files_in(folder), template)


def released_files(variant: Variant, specials: SpecialTokens, config: dict[str, Any]) -> dict[str, str]:
    """config.json and the settings of generation and preprocessing as released models have them, as texts by file name."""
    generation = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
        "eos_token_id": [specials.im_end, specials.endoftext], "pad_token_id": specials.endoftext,
    }  # fmt: skip
    preprocessor = FIXED_PREPROCESSOR | {
        "min_pixels": 4 * PIXELS_PER_TOKEN, "max_pixels": MAX_IMAGE_TOKENS[variant] * PIXELS_PER_TOKEN, "rescale_factor": 1 / 255,
    }  # fmt: skip
    contents = {CONFIG_FILE: config, GENERATION_FILE: generation, PREPROCESSOR_FILE: preprocessor}
    return {name: json_text(content) for name, content in contents.items()}


def json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _files_in(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    return {name: path for name, path in found.items() if not name.endswith(WEIGHT_SUFFIXES)}


def _hint(folder: Path) -> str:
    return "name the folder that holds the model" if folder.is_dir() else "it is not a folder"
