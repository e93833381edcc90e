"""Fresh weights that do not depend on the layout: every canonical tensor is drawn whole, from a seed of its own."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_keye.model.names import Piece


def initial_tensor(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """float32 initial value of canonical tensor `name`: norms start at one, biases at zero, everything else is normal."""
    if name.endswith(".bias") or name.endswith("_bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    return std * _normal(name, shape, seed)


def proof_tensor(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Like `initial_tensor`, but with norms and biases spread out too: weights for which no two things are alike."""
    noise = _normal(name, shape, seed)
    if name.endswith("bias"):
        return 0.1 * noise
    return 1.0 + 0.1 * noise if "norm" in name else std * noise


def no_tensor(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Zeros that take no memory, in place of weights that come from elsewhere."""
    return torch.zeros(()).expand(shape)


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def fill(pieces: Iterable[Piece], std: float, seed: int, draw=initial_tensor) -> None:
    """Write every piece's part of its canonical tensor."""
    for piece in pieces:
        piece.write(draw(piece.name, piece.full_shape, std, seed))
