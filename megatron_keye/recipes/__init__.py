"""The settings files that ship with the package, found by name."""

from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files(__name__)))


def recipe_names() -> tuple[str, ...]:
    """Names of all shipped recipes, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def recipe_path(name: str) -> Path:
    """Where the recipe of that name is, or would be: the caller asks `recipe_names` what exists."""
    return _FOLDER / f"{name}.yaml"
