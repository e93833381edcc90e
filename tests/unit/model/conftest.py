"""Small models with weights that leave nothing at its default, and the comparison with another implementation."""

import pytest
import torch

from megatron_keye.config.schema import DecoderConfig, ModelConfig, VisionConfig


@pytest.fixture
def vision_model_config():
    """Settings of a narrow model that keeps the released head dimension of 72; keywords override those of the ViT."""

    def build(variant="keye_vl_1_5", **vision) -> ModelConfig:
        sizes = dict(hidden_size=144, num_layers=3, num_heads=2, ffn_hidden_size=200, carried_position_rows=8)
        decoder = DecoderConfig(
            num_layers=1,
            hidden_size=40,
            num_heads=2,
            num_kv_groups=1,
            head_dim=20,
            ffn_hidden_size=8,
            vocab_size=16,
            mrope_section=(2, 4, 4),
        )
        return ModelConfig(variant=variant, vision=VisionConfig(**(sizes | vision)), decoder=decoder)

    return build


@pytest.fixture
def randomize():
    """Gives every parameter, norms and biases included, random values that keep activations near one; float32 numbers in any dtype."""

    def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in module.modules():
                for parameter in part.parameters(recurse=False):
                    noise = torch.randn(parameter.shape, generator=generator)
                    if isinstance(part, torch.nn.LayerNorm):
                        noise = 0.3 * noise + (parameter is part.weight)
                    elif isinstance(part, torch.nn.Embedding) or parameter.dim() == 1:
                        noise = 0.5 * noise
                    else:
                        noise = 1.5 * noise / parameter[0].numel() ** 0.5
                    parameter.copy_(noise)
        return module

    return fill


@pytest.fixture
def parity(record_property):
    """Asserts max|a - b| / max|b| within the tolerance and reports it, in the log and on the terminal with -s."""

    def check(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
        assert ours.shape == theirs.shape and theirs.abs().max() > 0
        max_rel = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        record_property(f"parity {name}", max_rel)
        print(f"parity {name} max_rel={max_rel:.1e}")
        assert max_rel <= tolerance, f"{name}: {max_rel:.1e} is over {tolerance:.0e}"

    return check
