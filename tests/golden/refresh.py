"""Write the golden files anew, after a change that is meant to change them: `python tests/golden/refresh.py`, then review the diff."""

import json
from pathlib import Path

from megatron_keye.config.load import dump_config, load_config
from megatron_keye.recipes import recipe_names
from megatron_keye.train.layouts import parse_layout
from megatron_keye.train.verify import proof_config, trace_layout

FOLDER = Path(__file__).parent
LOSSES = FOLDER / "losses.json"
LOSS_RECIPES = ("debug", "debug_preview")


def resolved_settings(recipe: str) -> str:
    """Every setting of a recipe, defaults included."""
    return dump_config(load_config(recipe))


def proof_losses(recipe: str) -> dict[str, list[float]]:
    """Losses and gradient norms of the proof's steps in float64 on one process."""
    trace = trace_layout(proof_config(load_config(recipe), "fp64"), parse_layout("one"))
    return {"losses": trace.losses, "grad_norms": trace.grad_norms}


def main() -> None:
    for recipe in recipe_names():
        (FOLDER / "configs" / f"{recipe}.yaml").write_text(resolved_settings(recipe), encoding="utf-8")
    LOSSES.write_text(json.dumps({recipe: proof_losses(recipe) for recipe in LOSS_RECIPES}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
