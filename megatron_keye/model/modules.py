"""Which module of the model a canonical tensor belongs to."""

from megatron_keye.config.schema import Module

PREFIXES: dict[str, Module] = {
    "visual.": "vision",
    "mlp_AR.": "projector",
    "model.embed_tokens.": "embedding",
    "model.": "decoder",
    "lm_head.": "decoder",
}
MODULES = tuple(dict.fromkeys(PREFIXES.values()))
"""In the order in which a sample goes through them."""


def module_of(name: str) -> Module | None:
    """None where no canonical tensor has such a name."""
    return next((module for prefix, module in PREFIXES.items() if name.startswith(prefix)), None)
