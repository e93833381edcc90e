"""Every setting by its dotted name, with type and description: what `keye config --explain` prints."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_keye.config.schema import RunConfig

_LIMITS = {
    Gt: lambda limit: f"> {limit.gt}",
    Ge: lambda limit: f">= {limit.ge}",
    Lt: lambda limit: f"< {limit.lt}",
    Le: lambda limit: f"<= {limit.le}",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: `kind` is its type in words (`int > 0`), `description` is empty where the name says it all."""

    name: str
    kind: str
    description: str


def all_settings(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[Setting]:
    """Every setting below `section`, in the order of the schema, named with `prefix` before it."""
    found: list[Setting] = []
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            found += all_settings(field.annotation, f"{prefix}{name}.")
        else:
            found.append(Setting(f"{prefix}{name}", _kind(field), field.description or ""))
    return found


def all_names() -> list[str]:
    """Dotted names of every setting and of every section."""
    names = {setting.name for setting in all_settings()}
    sections = {name[:at] for name in names for at, character in enumerate(name) if character == "."}
    return sorted(names | sections)


def value_of(config: BaseModel, name: str) -> Any:
    """The value of the setting with that dotted name."""
    return reduce(getattr, name.split("."), config)


def explain(config: BaseModel) -> str:
    """Text with one paragraph per setting: name, value, type, description."""
    lines = []
    for setting in all_settings(type(config)):
        lines.append(f"{setting.name} = {value_of(config, setting.name)}  ({setting.kind})")
        lines += [f"    {line}" for line in setting.description.splitlines()]
    return "\n".join(lines) + "\n"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kind(field: FieldInfo) -> str:
    return _with_limits(_type_words(field.annotation), field.metadata)


def _with_limits(words: str, metadata: Iterable[Any]) -> str:
    """`int` and Gt(0) make `int > 0`. Inside a tuple or union, pydantic leaves the limits wrapped in a FieldInfo."""
    flat = [limit for item in metadata for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]
    limits = ", ".join(_LIMITS[type(limit)](limit) for limit in flat)
    return f"{words} {limits}" if limits else words


def _type_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is Annotated:
        return _with_limits(_type_words(arguments[0]), arguments[1:])
    if origin in (Union, UnionType):
        return " or ".join(_type_words(argument) for argument in arguments)
    if origin is tuple:
        return "[" + ", ".join("..." if argument is Ellipsis else _type_words(argument) for argument in arguments) + "]"
    return "none" if annotation is type(None) else annotation.__name__
