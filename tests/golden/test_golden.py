"""Resolved recipes and the numbers of the model, frozen: a change shows up as a diff of these files in review."""

import json

import pytest

from megatron_keye.recipes import recipe_names
from tests.golden.refresh import FOLDER, LOSS_RECIPES, LOSSES, proof_losses, resolved_settings

REMEDY = "where this change is meant, run `python tests/golden/refresh.py` and review the diff"


@pytest.mark.parametrize("recipe", recipe_names())
def test_resolved_settings(recipe):
    assert resolved_settings(recipe) == (FOLDER / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8"), REMEDY


@pytest.mark.parametrize("recipe", LOSS_RECIPES)
def test_losses(recipe):
    """float64 on one process; other CPUs may round differently, hence 1e-9."""
    expected = json.loads(LOSSES.read_text(encoding="utf-8"))[recipe]
    assert proof_losses(recipe) == {name: pytest.approx(values, rel=1e-9) for name, values in expected.items()}, REMEDY
