"""A plugin's options: attrs fields, set by `--set plugin.option=value` or TOML.

Conversions are strict: the word "false" is not True, 1.7 is not a whole number, nan is not a number.
"""

import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import cattrs

from ..errors import UsageError, nearest

Settings = dict[str, dict[str, Any]]  # plugin name -> option name -> value as given

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def option(
    default: Any,
    *,
    help: str,
    min: float | None = None,
    max: float | None = None,
    choices: Iterable[Any] | None = None,
) -> Any:
    """One option of a plugin: an attrs field with a default, a help text and limits.

    `min` and `max` are inclusive; `choices` lists every allowed value. An option of type `X | None` also
    accepts the word "none", to which no limits apply.
    """
    checks: list[Any] = []
    if min is not None:
        checks.append(attrs.validators.ge(min))
    if max is not None:
        checks.append(attrs.validators.le(max))
    if choices is not None:
        checks.append(attrs.validators.in_(tuple(choices)))
    limits = {"help": help, "min": min, "max": max, "choices": None if choices is None else tuple(choices)}
    return attrs.field(
        default=default, validator=attrs.validators.optional(checks) if checks else None, kw_only=True, metadata=limits
    )


@attrs.frozen
class Option:
    """One option, for `moe-engine plugins NAME` and the documentation."""

    name: str
    type: str
    default: Any
    help: str
    min: float | None
    max: float | None
    choices: tuple[Any, ...] | None


def options_of(cls: type) -> dict[str, Option]:
    """The options of a plugin class by name, in the order of the source."""
    return {
        field.name: Option(field.name, _type_name(field.type), field.default, **field.metadata)
        for field in _fields(cls)
    }


def values_of(plugin: Any) -> dict[str, Any]:
    """The values of a plugin's options, by name."""
    return {field.name: getattr(plugin, field.name) for field in _fields(type(plugin))}


def parse_settings(given: Iterable[str] | Settings) -> Settings:
    """`plugin.option=value` texts as nested dicts, where the last of two equal names wins; nested dicts as they are."""
    settings: Settings = {}
    if isinstance(given, Mapping):
        return dict(given)
    for text in given:
        left, equals, value = text.partition("=")
        plugin, dot, name = left.strip().partition(".")
        if not (equals and dot and plugin and name):
            raise UsageError(f"setting '{text}' is not of the form plugin.option=value", code="bad-setting")
        settings.setdefault(plugin, {})[name] = value.strip()
    return settings


def build(cls: type, title: str, given: Mapping[str, Any]) -> Any:
    """The plugin `cls` with the options `given`; `title` ("bias 'saturation'") begins every error."""
    return _checked(title, lambda: cls(**_structured(cls, title, given)))


def changed(plugin: Any, title: str, given: Mapping[str, Any]) -> Any:
    """A copy of a plugin with some options changed, for the settings of one layer."""
    return _checked(title, lambda: attrs.evolve(plugin, **_structured(type(plugin), title, given)))


def _checked(title: str, make: Any) -> Any:
    try:
        return make()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{title}: {str(error.args[0]) if error.args else error}", code="bad-option") from error


def _structured(cls: type, title: str, given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        fields = {field.name: field for field in _fields(cls)}
    except UsageError as error:
        raise UsageError(f"{title}: {error}", code="bad-option-type") from error
    values = {}
    for name, value in given.items():
        if name not in fields:
            raise UsageError(f"{title} has no option '{name}'; {nearest(name, fields)}", code="unknown-option")
        kind = fields[name].type
        try:
            values[name] = None if _optional(kind) and _is_none(value) else _convert(value, kind)
        except (ValueError, TypeError, OverflowError, cattrs.errors.StructureHandlerNotFoundError) as error:
            message = f"{title}: option '{name}' is {_type_name(kind)}; {value!r} is not"
            raise UsageError(message, code="bad-option") from error
    return values


def _fields(cls: type) -> list[Any]:
    try:
        attrs.resolve_types(cls)
    except Exception as error:
        raise UsageError(f"the type of an option can't be read: {error}", code="bad-option-type") from error
    return [field for field in attrs.fields(cls) if "help" in field.metadata]


def _members(kind: Any) -> tuple[Any, ...]:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _optional(kind: Any) -> bool:
    return type(None) in _members(kind)


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() == "none")


def _convert(value: Any, kind: Any) -> Any:
    plain = [member for member in _members(kind) if member is not type(None)]
    return _converter.structure(value, plain[0] if len(plain) == 1 else kind)


_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a word",
    "tuple[str, ...]": "a list of words",
    "tuple[int, ...]": "a list of whole numbers",
}


def _type_name(kind: Any) -> str:
    """A type in words."""
    names = ["none" if member is type(None) else _name(member) for member in _members(kind)]
    return " or ".join(_WORDS.get(name, name) for name in names)


def _name(kind: Any) -> str:
    return str(kind) if typing.get_origin(kind) else getattr(kind, "__name__", str(kind))


def _bool(value: Any, _: Any) -> bool:
    word = str(value).strip().lower()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise ValueError(value)


def _int(value: Any, _: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(value)
    return int(value)


def _float(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _str(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _words(value: Any, _: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise ValueError(value)
    return tuple(value)


def _numbers(value: Any, _: Any) -> tuple[int, ...]:
    """A list of whole numbers, or a text with commas between them, as --set gives it."""
    if isinstance(value, int | str):
        value = [word for word in str(value).split(",") if word.strip()]
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return tuple(_int(number, None) for number in value)


_converter = cattrs.Converter(detailed_validation=False)
for _kind, _hook in ((bool, _bool), (int, _int), (float, _float), (str, _str)):
    _converter.register_structure_hook(_kind, _hook)
_converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _words)
_converter.register_structure_hook_func(lambda kind: kind == tuple[int, ...], _numbers)
