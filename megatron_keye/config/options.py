"""Settings of one section as command-line options, for tools that need a few of them and no whole configuration."""

import argparse
from collections.abc import Iterable
from typing import TypeVar, get_origin

from pydantic import ValidationError

from megatron_keye.config.schema import Section
from megatron_keye.errors import SettingsError

Settings = TypeVar("Settings", bound=Section)


def add_options(parser: argparse._ActionsContainer, section: type[Section], names: Iterable[str]) -> None:
    """Give `parser` an option for each of these settings; one for several values may be given several times."""
    for name in names:
        field = section.model_fields[name]
        action = "append" if get_origin(field.annotation) is tuple else "store"
        parser.add_argument(_option(name), action=action, help=(field.description or "").replace("%", "%%"))


def read_options(arguments: argparse.Namespace, section: type[Settings], names: Iterable[str]) -> Settings:
    """The section with what was given. Raises SettingsError with every problem."""
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        return section(**given)
    except ValidationError as error:
        raise SettingsError([f"{_option(p['loc'][0])} {p['input']}: {p['msg']}" for p in error.errors()]) from error


def _option(name: str | int) -> str:
    return f"--{str(name).replace('_', '-')}"
