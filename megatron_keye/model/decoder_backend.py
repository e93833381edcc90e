"""The choice of the modules that decoder layers are made of."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_keye.errors import SettingsError
from megatron_keye.model.decoder import torch_layer_spec
from megatron_keye.model.norm import RMSNorm


def decoder_backend(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], ModuleSpec], type]:
    """Layer spec and final norm of backend `name` ("auto", "torch" or "te").

    "auto" is Transformer Engine on a GPU that has it, in bfloat16, else torch. Raises SettingsError where "te" cannot run.
    """
    obstacles = []
    if device.type != "cuda":
        obstacles.append(f"the model is on {device.type}, not on cuda")
    if find_spec("transformer_engine") is None:
        obstacles.append("transformer-engine is not installed (pip install -e .[gpu])")
    if dtype == torch.float64:
        obstacles.append("Transformer Engine does not compute in float64")
    if name == "te" and obstacles:
        raise SettingsError(f"kernels.decoder is te, but {', '.join(obstacles)}; use auto or torch")
    if name == "torch" or obstacles or (name == "auto" and dtype != torch.bfloat16):
        return torch_layer_spec, RMSNorm

    from megatron_keye.model.decoder_te import TE_NORM, te_layer_spec  # here, as its imports want Transformer Engine

    return te_layer_spec, TE_NORM
