"""The canonical names of all weights, which are those of the released Hugging Face folders, and where each lies in Megatron.

One table serves fresh initialisation, comparison of layouts, checkpoints, import and export. A Megatron parameter holds one
or several `Piece`s: rectangular parts of canonical tensors, given as views of the parameter, so that reading is
`piece.view.reshape(piece.shape)` and writing is `piece.view.copy_(...)`.

The ViT and projector carry canonical names in their own state dict and are never split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_keye.config.schema import DecoderConfig

if TYPE_CHECKING:
    # Names are also wanted where nothing is built, which should not need Megatron-core.
    from megatron_keye.model.decoder import KeyeDecoder

ROWS, COLUMNS, WHOLE, QKV, GATE_UP = "rows", "columns", "whole", "qkv", "gate_up"

LAYER_TABLE = {
    "input_layernorm.weight": (WHOLE, ("input_layernorm",)),
    "self_attention.linear_qkv.layer_norm_weight": (WHOLE, ("input_layernorm",)),
    "self_attention.linear_qkv.weight": (QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "self_attention.q_layernorm.weight": (WHOLE, ("self_attn.q_norm",)),
    "self_attention.k_layernorm.weight": (WHOLE, ("self_attn.k_norm",)),
    "self_attention.linear_proj.weight": (COLUMNS, ("self_attn.o_proj",)),
    "pre_mlp_layernorm.weight": (WHOLE, ("post_attention_layernorm",)),
    "mlp.linear_fc1.layer_norm_weight": (WHOLE, ("post_attention_layernorm",)),
    "mlp.linear_fc1.weight": (GATE_UP, ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.linear_fc2.weight": (COLUMNS, ("mlp.down_proj",)),
}
"""Megatron's name within a layer -> how TP splits it, and the canonical names within a layer (Transformer Engine's fused
norms included)."""

OUTER_TABLE = {
    "embedding.word_embeddings.weight": (ROWS, "model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": (WHOLE, "model.norm.weight"),
    "output_layer.weight": (ROWS, "lm_head.weight"),
}


@dataclass(frozen=True)
class Piece:
    """The part of canonical tensor `name` (of `full_shape`) that starts at `offset` and has `shape`."""

    name: str
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    view: Tensor
    """Elements of the parameter, in the order of the piece, possibly with more dimensions."""

    def index(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def read(self) -> Tensor:
        return self.view.reshape(self.shape)

    def write(self, full: Tensor) -> None:
        """Copy this piece out of the whole canonical tensor."""
        self.view.copy_(full[self.index()].reshape(self.view.shape))


def decoder_pieces(
    chunk: "KeyeDecoder", tensors: dict[str, Tensor], config: DecoderConfig, tp_size: int, tp_rank: int
) -> Iterator[Piece]:
    """Pieces held by `tensors`, which are shaped and named like parameters of `chunk` (weights, gradients, ...)."""
    for name, tensor in tensors.items():
        if name in OUTER_TABLE:
            split, canonical = OUTER_TABLE[name]
            yield _outer_piece(split, canonical, tensor, config, tp_size, tp_rank)
            continue
        layer, inner = name.removeprefix("decoder.layers.").split(".", 1)
        split, canonical = LAYER_TABLE[inner]
        prefix = f"model.layers.{chunk.first_layer + int(layer)}."
        yield from _layer_pieces(split, [f"{prefix}{c}.weight" for c in canonical], tensor, config, tp_size, tp_rank)


def _outer_piece(split: str, name: str, tensor: Tensor, config: DecoderConfig, tp_size: int, tp_rank: int) -> Piece:
    """Vocabulary rows are padded to a multiple of TP; padded rows belong to no piece."""
    if split == WHOLE:
        return _whole(name, tensor)
    start = tp_rank * tensor.shape[0]
    real = tensor[: max(0, min(tensor.shape[0], config.vocab_size - start))]
    return Piece(name, (config.vocab_size, *tensor.shape[1:]), (start, 0), tuple(real.shape), real)


def _layer_pieces(split: str, names: list[str], tensor: Tensor, config: DecoderConfig, tp_size: int, tp_rank: int):
    if split == WHOLE:
        yield _whole(names[0], tensor)
    elif split == COLUMNS:
        rows, columns = tensor.shape
        yield Piece(names[0], (rows, columns * tp_size), (0, tp_rank * columns), (rows, columns), tensor)
    elif split == GATE_UP:
        for name, half in zip(names, tensor.chunk(2), strict=True):
            yield _row_piece(name, half, half.shape[0], tp_size, tp_rank)
    elif split == QKV:
        per_group = config.num_heads // config.num_kv_groups
        grouped = tensor.unflatten(0, (-1, per_group + 2, config.head_dim))
        parts = (grouped[:, :per_group], grouped[:, per_group : per_group + 1], grouped[:, per_group + 1 :])
        for name, part in zip(names, parts, strict=True):
            yield _row_piece(name, part, part.shape[0] * part.shape[1] * part.shape[2], tp_size, tp_rank)


def _row_piece(name: str, view: Tensor, rows: int, tp_size: int, tp_rank: int) -> Piece:
    columns = view.shape[-1]
    return Piece(name, (rows * tp_size, columns), (tp_rank * rows, 0), (rows, columns), view)


def _whole(name: str, tensor: Tensor) -> Piece:
    shape = tuple(tensor.shape)
    return Piece(name, shape, (0,) * len(shape), shape, tensor)


def encoder_pieces(tensors: dict[str, Tensor]) -> Iterator[Piece]:
    """The ViT's and projector's tensors, whole and under their own names."""
    for name, tensor in tensors.items():
        yield _whole(name, tensor)


@torch.no_grad()
def local_parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by name, detached, for reading and writing in place."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}
