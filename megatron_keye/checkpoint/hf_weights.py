"""Weights in Hugging Face folders: safetensors files, whole or in shards with an index. Never pickle."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_keye.checkpoint.collective import together
from megatron_keye.checkpoint.files import OnBytes, TensorFile, TensorSpec, write_stream, write_text
from megatron_keye.checkpoint.tensors import TensorSource, divide, require_shapes, row_blocks, total_bytes
from megatron_keye.config.json_file import read_json_object
from megatron_keye.errors import CheckpointError
from megatron_keye.model.names import Piece

WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REMEDY = "copy the folder again"


class HfTensors:
    """The tensors of a folder by name, as a `TensorSource`. Files are opened when first needed; reading a part reads no more than that."""

    def __init__(self, folder: Path):
        """Raises CheckpointError where the folder has no safetensors weights, or its index is damaged."""
        self.folder = folder
        self._open_files: dict[str, TensorFile] = {}
        self._file_of = self._locate()

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Raises CheckpointError with every file that is missing or damaged and every tensor that only the index or only a file has."""
        problems: dict[str, None] = {}
        specs = {}
        for name in self._file_of:
            try:
                specs[name] = self._holder(name).spec(name)
            except CheckpointError as error:
                problems[str(error)] = None
        for file, opened in self._open_files.items():
            extra = [name for name in opened.names() if name not in self._file_of]
            problems |= {f"{self.folder / file} holds {name}, which {INDEX_FILE} does not name; {REMEDY}": None for name in extra}
        if problems:
            raise CheckpointError("\n".join(problems))
        return specs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    @property
    def files(self) -> list[Path]:
        """Files that hold tensors."""
        return [self.folder / file for file in dict.fromkeys(self._file_of.values())]

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """The part `index` of a tensor, in the type it is stored in: a view of the file."""
        return self._holder(name).tensor(name)[index]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._holder(name).rows(name, start, stop)

    def _locate(self) -> dict[str, str]:
        """File name by tensor name. The index decides where there is one."""
        path = self.folder / INDEX_FILE
        if path.is_file():
            places = read_json_object(path).get("weight_map")
            if not isinstance(places, dict) or any(Path(str(file)).name != file for file in places.values()):
                raise CheckpointError(f"{path} has no weight_map of tensor names to file names in its folder; {REMEDY}")
            return places
        if (self.folder / WHOLE_FILE).is_file():
            return dict.fromkeys(self._file(WHOLE_FILE).names(), WHOLE_FILE)
        raise CheckpointError(
            f"{self.folder} has neither {INDEX_FILE} nor {WHOLE_FILE}; weights in other formats are not read: convert them"
        )

    def _holder(self, name: str) -> TensorFile:
        file = self._file(self._file_of[name])
        if name not in file.names():
            raise CheckpointError(f"{self.folder / self._file_of[name]} does not hold {name}, which the index says it does; {REMEDY}")
        return file

    def _file(self, name: str) -> TensorFile:
        if name not in self._open_files:
            self._open_files[name] = TensorFile(self.folder / name)
        return self._open_files[name]


@torch.no_grad()
def load_hf_weights(
    folder: Path,
    pieces: Iterable[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    world: ProcessGroup | None = None,
    counts: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill this rank's `pieces` of a model with the tensors `shapes`, converting to their type. All ranks of `world` must call it.

    Raises CheckpointError on all ranks, before anything is written, with every tensor that is missing, unexpected or of another shape;
    tensors of the folder that do not count, by name, may be anything.
    """
    tensors = together(world, lambda: _checked(folder, shapes, counts))
    together(world, lambda: _fill(tensors, pieces))


def write_hf_weights(folder: Path, source: TensorSource, max_shard_bytes: int, on_bytes: OnBytes = lambda num_bytes: None) -> None:
    """Stream the tensors of `source` into `folder`, in order: one file where `max_shard_bytes` hold them, else shards and an index.

    A tensor above `max_shard_bytes` gets a shard of its own. Host memory used: one chunk.
    """
    shards = divide(source.specs, max_shard_bytes)
    files = [WHOLE_FILE] if len(shards) == 1 else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        chunks = partial(row_blocks, source)
        write_stream(folder / file, shard, chunks, on_block=lambda block: on_bytes(len(block)), metadata={"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total_bytes(source.specs)}, "weight_map": places}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _checked(folder: Path, shapes: Mapping[str, tuple[int, ...]], counts: Callable[[str], bool]) -> HfTensors:
    tensors = HfTensors(folder)
    require_shapes(folder, {name: spec for name, spec in tensors.specs.items() if counts(name)}, shapes)
    return tensors


def _fill(tensors: HfTensors, pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        if piece.view.numel():
            piece.view.copy_(tensors.read(piece.name, piece.index()).reshape(piece.view.shape))
