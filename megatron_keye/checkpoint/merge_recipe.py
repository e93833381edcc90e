"""What a merge computes: a recipe in YAML, of which `data_tools/merge.py` shows an example.

Every rule is a sum of models, each with a factor, so that is what all of this becomes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from megatron_keye.config.schema import Section
from megatron_keye.config.strict_yaml import parse_yaml
from megatron_keye.errors import SettingsError

Weight = Annotated[float, Field(allow_inf_nan=False)]
Weights = Annotated[dict[str, Weight], Field(min_length=1)]


@dataclass(frozen=True)
class Mix:
    """A tensor of the result: the sum of the models' tensors, each times its factor, divided by `divisor`.

    Integers, because those of the decimal numbers in a recipe are exact: the sum is, too, where 53 bits hold it.
    """

    factors: dict[str, int]
    """By model; none is 0."""
    divisor: int


class Task(Section):
    """Task arithmetic: what training made of `base`, weighted and added to it."""

    base: str
    add: Weights


class Rule(Section):
    """How some tensors are made: exactly one of `take`, `average` and `task`."""

    tensors: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Patterns of names, with `*`, `?` and `[...]`."""
    take: str | None = None
    average: Weights | None = None
    task: Task | None = None

    def fits(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.tensors)

    @property
    def models(self) -> set[str]:
        names = {self.take} if self.take is not None else set()
        names |= set(self.average or ())
        return names if self.task is None else names | {self.task.base, *self.task.add}

    def mix(self) -> Mix:
        """The decimal numbers count as they are written, so that weights that should cancel do."""
        weights: dict[str, Fraction] = {}
        if self.take is not None:
            weights = {self.take: Fraction(1)}
        elif self.average is not None:
            weights = _exact(self.average)
            total = sum(weights.values())
            weights = {name: weight / total for name, weight in weights.items()}
        elif self.task is not None:
            weights = _exact(self.task.add)
            weights[self.task.base] = 1 - sum(weights.values()) + weights.get(self.task.base, 0)
        divisor = lcm(*(weight.denominator for weight in weights.values()))
        return Mix({name: int(weight * divisor) for name, weight in weights.items() if weight}, divisor)


class Recipe(Section):
    """A merge."""

    models: Annotated[dict[str, str], Field(min_length=1)]
    """Paths by name."""
    like: str | None = None
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]

    @property
    def pattern_model(self) -> str:
        """Name of the model whose settings, types and other files the result has."""
        return self.like or next(iter(self.models))


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, with the paths in it made relative to where the program runs. Raises SettingsError with every problem."""
    try:
        recipe = Recipe.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"the recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        places = [".".join(map(str, problem["loc"])) or "the whole" for problem in error.errors()]
        raise SettingsError(
            [f"{path}: {place}: {problem['msg']}" for place, problem in zip(places, error.errors(), strict=True)]
        ) from error
    problems = [f"{path}: {problem}" for problem in _contradictions(recipe)]
    if problems:
        raise SettingsError(problems)
    return recipe.model_copy(update={"models": {name: str(path.parent / place) for name, place in recipe.models.items()}})


def assign(recipe: Recipe, tensor_names: Iterable[str]) -> dict[str, Rule]:
    """The rule of each tensor. Raises SettingsError with every tensor that no rule fits and every rule that no tensor is left for."""
    found = {name: next((rule for rule in recipe.rules if rule.fits(name)), None) for name in tensor_names}
    used = [rule for rule in found.values() if rule is not None]
    problems = [f"no rule fits {name}; end with a rule for all other tensors" for name, rule in found.items() if rule is None]
    problems += [
        f"rules.{number}: nothing is left for {', '.join(rule.tensors)}: no name fits, or rules before it took all that do"
        for number, rule in enumerate(recipe.rules)
        if not any(rule is other for other in used)
    ]
    if problems:
        raise SettingsError(problems)
    return {name: rule for name, rule in found.items() if rule is not None}


def _exact(weights: Mapping[str, float]) -> dict[str, Fraction]:
    return {name: Fraction(repr(weight)) for name, weight in weights.items()}


def _contradictions(recipe: Recipe) -> Iterable[str]:
    if recipe.like is not None and recipe.like not in recipe.models:
        yield f"like: {recipe.like!r} is not one of the models {', '.join(recipe.models)}"
    for number, rule in enumerate(recipe.rules):
        choices = {"take": rule.take, "average": rule.average, "task": rule.task}
        kinds = [kind for kind, choice in choices.items() if choice is not None]
        if len(kinds) != 1:
            yield f"rules.{number}: found {' and '.join(kinds) or 'nothing to do'}; expected exactly one of take, average and task"
        for name in sorted(rule.models - set(recipe.models)):
            yield f"rules.{number}: {name!r} is not one of the models {', '.join(recipe.models)}"
        if rule.average is not None and sum(_exact(rule.average).values()) == 0:
            yield f"rules.{number}: the weights sum to 0; an average divides by their sum"
    unused = set(recipe.models) - {name for rule in recipe.rules for name in rule.models} - {recipe.pattern_model}
    yield from (f"models.{name}: no rule uses it; remove it, or give it a weight" for name in sorted(unused))
