"""Which folder each module comes from, and what is drawn."""

from pathlib import Path

import pytest
import torch

from megatron_keye.model.init import initial_tensor
from megatron_keye.model.modules import module_of
from megatron_keye.model.tensors import canonical_shapes
from megatron_keye.train.initial_weights import drawing
from megatron_keye.train.weight_origins import sources
from tests.unit.checkpoint.hf_folder import small_model

EXAMPLES = [
    (None, {}, {}),
    ("a", {}, {"a": ("vision", "projector", "embedding", "decoder")}),
    ("a", {"projector": "fresh"}, {"a": ("vision", "embedding", "decoder")}),
    ("a", {"vision": "b", "decoder": "b"}, {"b": ("vision", "decoder"), "a": ("projector", "embedding")}),
    (None, {"vision": "b"}, {"b": ("vision",)}),
    ("a", dict.fromkeys(("vision", "projector", "embedding", "decoder"), "fresh"), {}),
]


@pytest.mark.parametrize(("init_from", "parts", "expected"), EXAMPLES)
def test_every_module_has_its_source_or_is_drawn(init_from, parts, expected):
    model = small_model("keye_vl_1_5")
    model = type(model).model_validate({**model.model_dump(), "init_from": init_from, "init_parts": parts})
    found = sources(model)
    assert found == {Path(path): modules for path, modules in expected.items()}
    loaded = {module for modules in found.values() for module in modules}
    draw = drawing(model)
    for name, shape in canonical_shapes(model).items():
        drawn = draw(name, shape, 0.1, 3)
        nothing = torch.zeros(shape)
        assert torch.equal(drawn, nothing if module_of(name) in loaded else initial_tensor(name, shape, 0.1, 3)), name


@pytest.mark.parametrize("variant", ["keye_vl_preview", "keye_vl_1_5"])
def test_every_canonical_tensor_is_of_a_module(variant):
    found = {name: module_of(name) for name in canonical_shapes(small_model(variant))}
    assert set(found.values()) == {"vision", "projector", "embedding", "decoder"}
    assert (found["model.embed_tokens.weight"], found["lm_head.weight"], found["model.norm.weight"]) == ("embedding", "decoder", "decoder")
    assert module_of("other.weight") is None
