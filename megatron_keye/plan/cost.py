"""What samples cost: integer floating-point operations (FLOPs), so that every host computes the same plan bit for bit."""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_keye.config.schema import DecoderConfig, ModelConfig
from megatron_keye.contract.media import MERGE, PATCH_VALUES, PatchGrid, SampleShape


class SampleCost(NamedTuple):
    """Cost of one sample, apart for the decoder and for the ViT with projector: the two are balanced apart."""

    decoder: int
    vision: int


@dataclass(frozen=True, slots=True)
class CostModel:
    """FLOPs of one step, forward and backward, per unit of work. A multiplication with addition counts as two.

    A pair is one query attending to one key: n(n + 1) / 2 of them in a causal document of n tokens, n * n in a segment
    of n patches. Only ratios matter to the planner, so measured times (`timing.py`) may stand in for FLOPs, then with a cost of
    each document and segment as well.
    """

    decoder_token: int
    decoder_pair: int
    vision_patch: int
    vision_pair: int
    projector_token: int
    decoder_document: int = 0
    vision_segment: int = 0

    def decoder_cost(self, num_tokens: int) -> int:
        """Cost in the decoder of one document of this length."""
        return self.decoder_token * num_tokens + self.decoder_pair * (num_tokens * (num_tokens + 1) // 2) + self.decoder_document

    def vision_cost(self, grid: PatchGrid) -> int:
        """Cost in the ViT and projector of one attention segment."""
        patches = grid.num_patches
        linear = patches * self.vision_patch + grid.num_tokens * self.projector_token
        return linear + patches * patches * self.vision_pair + self.vision_segment

    def sample_cost(self, shape: SampleShape, padded_tokens: int | None = None) -> SampleCost:
        """Cost of one sample; `padded_tokens` is its length in a row where that is already known."""
        num_tokens = shape.num_tokens if padded_tokens is None else padded_tokens
        return SampleCost(self.decoder_cost(num_tokens), sum(self.vision_cost(s.grid) for s in shape.segments))


def cost_model(model: ModelConfig) -> CostModel:
    """Costs from shapes alone: matrix products, no norms or activations. Frozen parts and recomputation are counted.

    A backward pass costs one forward pass for the gradient of the weights and one for that of the inputs; for attention,
    which has no weights, two forward passes.
    """
    vision, frozen = model.vision, set(model.freeze)
    trains_vision, trains_projector = "vision" not in frozen, "projector" not in frozen
    vision_layers = vision.num_layers * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size)
    patch_embedding = PATCH_VALUES * vision.hidden_size
    vision_passes = 3 + vision.recompute if trains_vision else 1

    merged = MERGE * MERGE * vision.hidden_size
    projector = merged * merged + merged * model.decoder.hidden_size

    decoder_passes, attention_passes, head_passes = _decoder_passes(model)
    layers, head, pair = _decoder_products(model.decoder)
    return CostModel(
        decoder_token=2 * (decoder_passes * layers + head_passes * head),
        decoder_pair=2 * attention_passes * pair,
        # Pixels need no gradient, so the patch embedding has no input gradient.
        vision_patch=2 * (vision_passes * vision_layers + (1 + trains_vision) * patch_embedding),
        vision_pair=2 * vision_passes * vision.num_layers * 2 * vision.hidden_size,
        projector_token=2 * (1 + trains_projector + (trains_projector or trains_vision)) * projector,
    )


def _decoder_products(decoder: DecoderConfig) -> tuple[int, int, int]:
    """Multiplications forward: of all layers per token, of the output layer per token, of attention per pair."""
    query = decoder.num_heads * decoder.head_dim
    key_value = 2 * decoder.num_kv_groups * decoder.head_dim
    layer = decoder.hidden_size * (2 * query + key_value + 3 * decoder.ffn_hidden_size)
    return decoder.num_layers * layer, decoder.hidden_size * decoder.vocab_size, decoder.num_layers * 2 * query


def _decoder_passes(model: ModelConfig) -> tuple[int, int, int]:
    """Forward passes' worth of work in one step: of the layers, of attention, of the output layer."""
    frozen = set(model.freeze)
    trains = "decoder" not in frozen
    has_backward = trains or not {"vision", "projector", "embedding"} <= frozen
    recompute = model.decoder.recompute if has_backward else "none"
    linear = 1 + trains + has_backward
    return linear + (recompute == "full"), 1 + 2 * has_backward + (recompute != "none"), linear
