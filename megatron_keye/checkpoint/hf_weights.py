"""Weights in Hugging Face folders: safetensors files, whole or in shards with an index. Never pickle."""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_keye.config.json_file import read_json_object
from megatron_keye.errors import CheckpointError
from megatron_keye.model.names import Piece

WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REMEDY = "copy the folder again"


class HfTensors:
    """The tensors of a folder by name. Files are opened when first needed; reading a part of a tensor reads no more than that."""

    def __init__(self, folder: Path):
        """Raises CheckpointError where the folder has no safetensors weights, or its index is damaged."""
        self.folder = folder
        self._open_files: dict[str, safe_open] = {}
        self._file_of = self._locate()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor. Raises CheckpointError for a file that is missing, damaged, or without a tensor of the index."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """The part `index` of a tensor, in the type it is stored in."""
        return self._slice(name)[index]

    def _locate(self) -> dict[str, str]:
        """File name by tensor name. The index decides where there is one."""
        path = self.folder / INDEX_FILE
        if path.is_file():
            places = read_json_object(path).get("weight_map")
            if not isinstance(places, dict) or any(Path(str(file)).name != file for file in places.values()):
                raise CheckpointError(f"{path} has no weight_map of tensor names to file names in its folder; {REMEDY}")
            return places
        if (self.folder / WHOLE_FILE).is_file():
            return dict.fromkeys(self._file(WHOLE_FILE).keys(), WHOLE_FILE)
        raise CheckpointError(
            f"{self.folder} has neither {INDEX_FILE} nor {WHOLE_FILE}; weights in other formats are not read: convert them"
        )

    def _slice(self, name: str):
        file = self._file_of[name]
        try:
            return self._file(file).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file} does not hold {name}, which the index says it does ({error}); {REMEDY}") from error

    def _file(self, name: str):
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / name} cannot be read as safetensors ({error}); {REMEDY}") from error
        return self._open_files[name]


@torch.no_grad()
def load_hf_weights(folder: Path, pieces: Iterable[Piece]) -> None:
    """Fill `pieces`, which together are of every tensor of the model, converting to their type.

    Raises CheckpointError, before anything is written, with every tensor that is missing, unexpected or of another shape.
    """
    tensors, pieces = HfTensors(folder), list(pieces)
    problems = _problems(tensors, {piece.name: piece.full_shape for piece in pieces})
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the weights of this model:\n" + "\n".join(f"  - {p}" for p in problems)
            + "\nUse the config.json that belongs to these weights."
        )  # fmt: skip
    for piece in pieces:
        if piece.view.numel():
            piece.view.copy_(tensors.read(piece.name, piece.index()).reshape(piece.view.shape))


def save_hf_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write `tensors` under their names, in order: one file where `max_shard_bytes` hold them, else shards and an index.

    A tensor above `max_shard_bytes` gets a shard of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    free_bytes = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > free_bytes and shards[-1]:
            shards.append({})
            free_bytes = max_shard_bytes
        shards[-1][name] = tensor.detach().contiguous()
        free_bytes -= tensor.nbytes
    files = [WHOLE_FILE] if len(shards) == 1 else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _problems(tensors: HfTensors, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    missing = [f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name not in tensors.names]
    unexpected = [f"{name} {list(tensors.shapes[name])} is not of this model" for name in sorted(tensors.names - set(wanted))]
    other_shape = [
        f"{name} is {list(tensors.shapes[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors.names and tensors.shapes[name] != shape
    ]
    return missing + unexpected + other_shape
