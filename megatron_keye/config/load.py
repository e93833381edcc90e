"""YAML in, typed settings out, with every problem reported at once.

A source is a recipe name or a YAML file; `base: NAME` in it names another one that it is merged over; dotted overrides
(`train.steps=10`) come last. Each value remembers where it came from, so that an error can say so.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_keye.config.explain import all_names, all_settings
from megatron_keye.config.schema import RunConfig
from megatron_keye.config.strict_yaml import parse_yaml
from megatron_keye.errors import SettingsError
from megatron_keye.recipes import recipe_names, recipe_path

Tree = dict[str, Any]
Origins = dict[str, str]
"""Dotted name of a value -> where it was written."""
_PLAIN_WORDS = {"tuple_type": "a list", "model_type": "a section of settings"}
"""What pydantic's error types expect, where its own words speak of JSON."""


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings that `source` (a recipe name or the path of a YAML file) and `overrides` (`a.b=VALUE`, VALUE in YAML) describe.

    Raises:
        SettingsError: a file cannot be read, or settings are unknown, missing or of a wrong type; lists all of them.
    """
    tree: Tree = {}
    origins: Origins = {}
    for path, layer in reversed(_read_with_bases(_find(source, Path()))):
        _merge(tree, layer, origins, str(path))
    problems = []
    for override in overrides:
        try:
            _merge(tree, _parse_override(override), origins, f"--set {override}")
        except SettingsError as error:
            problems += error.problems
    try:
        config = RunConfig.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        problems += [_describe(problem, origins, source) for problem in error.errors()]
    if problems:
        raise SettingsError(problems)
    return config


def dump_config(config: RunConfig) -> str:
    """YAML text with every setting, defaults included; `load_config` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _find(source: str, folder: Path) -> Path:
    """The file behind a recipe name, or behind a path relative to `folder`."""
    if source in recipe_names():
        return recipe_path(source)
    path = folder / source
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in source:
        raise SettingsError(f"no settings file {path}: expected an existing YAML file or one of the recipes {', '.join(recipe_names())}")
    near = get_close_matches(source, recipe_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else "give one of them or the path of a YAML file"
    raise SettingsError(f"no recipe is called {source!r}: expected one of {', '.join(recipe_names())}; {hint}")


def _read_with_bases(path: Path) -> list[tuple[Path, Tree]]:
    """The file and its bases, from `path` to the one without a base."""
    layers: list[tuple[Path, Tree]] = []
    while True:
        tree = _read(path)
        base = tree.pop("base", None)
        layers.append((path, tree))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise SettingsError(f"{path}: base is {base!r}: expected the name of a recipe or a path relative to this file")
        path = _find(base, path.parent)
        if path.resolve() in [seen.resolve() for seen, _ in layers]:
            chain = " -> ".join(str(p) for p in [*(seen for seen, _ in layers), path])
            raise SettingsError(f"settings files are based on each other in a circle: {chain}; remove one `base:` line")


def _read(path: Path) -> Tree:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: found {tree!r} at the top, expected sections such as `train:` with settings below them")
    return tree


def _parse_override(override: str) -> Tree:
    """`a.b=1` as {"a": {"b": 1}}."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise SettingsError(f"--set {override}: expected NAME=VALUE with a dotted name, for example --set train.steps=10")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
    for part in reversed(parts):
        value = {part: value}
    return value


def _merge(tree: Tree, layer: Mapping[str, Any], origins: Origins, origin: str, prefix: str = "") -> None:
    """Lays `layer` over `tree` in place: sections are merged, any other value replaces what was there."""
    for key, value in layer.items():
        name = f"{prefix}{key}"
        origins[name] = origin
        if isinstance(value, dict):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            _merge(tree[key], value, origins, origin, f"{name}.")
        else:
            tree[key] = value


def _describe(problem: Mapping[str, Any], origins: Origins, source: str) -> str:
    """One line for one of pydantic's errors: name, found, expected, where it was written or what to do."""
    parts = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    indices = [part for part in problem["loc"] if isinstance(part, int)]
    name = ".".join(parts)
    origin = origins.get(name, source)
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name} (from {origin}): did you mean {_nearest(name)}?"
    if problem["type"] == "missing" and not indices:
        return f"{name} is missing{_expected_kind(name)}: add it to {source} or pass --set {name}=VALUE"
    place = name + "".join(f"[{index}]" for index in indices)
    if problem["type"] == "missing":
        return f"{place} is missing (from {origin}): expected a list{_expected_kind(name)}"
    found = json.dumps(problem["input"])
    expected = _PLAIN_WORDS.get(problem["type"], problem["msg"].removeprefix("Input should be "))
    return f"{place}: found {found} (from {origin}), expected {expected}"


def _expected_kind(name: str) -> str:
    kinds = {setting.name: setting.kind for setting in all_settings()}
    return f" ({kinds[name]})" if name in kinds else ""


def _nearest(name: str) -> str:
    """The valid dotted name most like `name`. The last part counts twice: `lr` means optimizer.lr, `train.setps` train.steps."""

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, name, candidate).ratio()
        return whole + SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()

    return max(all_names(), key=likeness)
