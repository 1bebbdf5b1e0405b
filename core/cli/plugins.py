"""`moe-engine plugins`: the installed plugins, the options of one, and the broken ones."""

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import attrs
import click

from ..contract.hookspecs import HOOKS
from ..contract.options import Option, options_of
from ..contract.traits import EFFECTS, ROUTER_TRAITS, acts_on_tokens, provided_by, traits_of
from ..errors import UsageError
from ..registry.discovery import KINDS, Found, find, load, pick
from ..registry.manager import broken
from .flags import json_flag
from .output import echo, echo_json
from .plugin_lines import summary_of

WIDTH = 80
BUILT_IN = "moe-engine"  # the distribution that the list need not name
HEADINGS = {
    "router": "routers: choose the experts of each token",
    "bias": "biases: shift the routing scores to balance the load",
    "loss": "losses: auxiliary terms of the training loss",
    "growth": "growth: add and remove experts during training",
    "initializer": "initializers: make the weights of new experts",
    "metric": "metrics: measure routing",
    "report": "reports: write files about a finished run",
    "task": "tasks: data, model and score (--task NAME)",
    "experts": "experts: the expert networks of a layer",
    "family": "families: how to read and adopt an architecture of transformers",
}


@click.command(short_help="List installed plugins, or show one plugin's options.")
@click.argument("name", required=False)
@click.option("--check", is_flag=True, help="Import every plugin and report the broken ones.")
@json_flag("the list")
def plugins(name: str | None, check: bool, as_json: bool) -> int:
    """List installed plugins, or show the documentation and options of NAME.

    The list imports no plugin, so a broken one cannot break it. --check imports
    them all; the exit code is 1 if one is broken.
    """
    installed = find()
    if name is not None and check:
        raise UsageError(f"--check looks at all plugins; remove '{name}'", code="check-with-name")
    if name is not None:
        found = pick(name, installed)
        _show(found, load(found), as_json)
        return 0
    kinds = {kind: place for place, kind in enumerate(KINDS.values())}
    listed = [found for same_name in installed.values() for found in same_name]
    listed.sort(key=lambda found: (kinds.get(found.kind, len(kinds)), found.kind, found.name))
    errors = broken() if check else {}
    if as_json:
        extra = [{"error": errors[found.name]} if check else {} for found in listed]
        rows = [
            {**_row(found), "summary": summary_of(found), **more} for found, more in zip(listed, extra, strict=True)
        ]
        echo_json(rows, 2)
    else:
        _list(listed)
        if check:
            _report(listed, errors)
    return 1 if any(errors.values()) else 0


def _row(found: Found) -> dict[str, Any]:
    return {"name": found.name, "kind": found.kind, "distribution": found.distribution, "version": found.version}


# -- the list --------------------------------------------------------------------------------------


def _list(listed: list[Found]) -> None:
    """Print a heading for each kind, and a line of at most `WIDTH` columns for each plugin."""
    width = max((len(found.name) for found in listed), default=0)
    kind = None
    for found in listed:
        if found.kind != kind:
            kind = found.kind
            echo(HEADINGS.get(kind, kind))
        origin = "" if found.distribution == BUILT_IN else f" [{found.distribution} {found.version}]"
        room = max(WIDTH - len(f"  {found.name:{width}}  {origin}"), 20)
        echo(f"  {found.name:{width}}  {textwrap.shorten(summary_of(found), room, placeholder='...')}{origin}")
    echo("`moe-engine plugins NAME` shows a plugin's documentation and options")


def _report(listed: list[Found], errors: dict[str, str | None]) -> None:
    """Print what is wrong with each broken plugin, and how many are fine."""
    messages = [message for found in listed if (message := errors[found.name])]
    for message in dict.fromkeys(messages):
        echo(f"broken: {' '.join(message.split())}")
    echo(f"{len(listed) - len(messages)} of {len(listed)} plugins are fine")


# -- one plugin ------------------------------------------------------------------------------------


def _show(found: Found, cls: type, as_json: bool) -> None:
    """Print all that a plugin says about itself."""
    options = list(options_of(cls).values())
    hooks = [name for name in HOOKS if hasattr(cls, name)]
    text = inspect.getdoc(cls) or ""
    if as_json:
        parts = {"help": text, "hooks": hooks, "traits": attrs.asdict(traits_of(cls))}
        echo_json({**_row(found), **parts, "options": [_fields(option) for option in options]}, 2)
        return
    echo(f"{found.name}: {found.kind} ({found.distribution} {found.version})\n")
    echo("\n".join(_wrapped(text)))
    echo("\n" + _fold(f"Hooks: {', '.join(hooks)}"))
    if traits := list(_traits(cls, hooks)):
        echo("\n".join(["\nTraits:", *(_fold(line, "  ") for line in traits)]))
    if not options:
        echo("\nOptions: none")
        return
    echo(f"\nOptions (--set {found.name}.OPTION=VALUE):")
    for option in options:
        echo(_fold(f"{option.name}: {_values(option)}  [default: {_default(option.default)}]", "  "))
        echo(_fold(option.help, "      "))


def _wrapped(text: str) -> Iterator[str]:
    """A docstring in lines of at most `WIDTH` columns; indented lines and lists keep their line breaks."""
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield ""
        lines = paragraph.splitlines()
        as_written = any(line.startswith((" ", "- ", "|")) for line in lines)
        for line in lines if as_written else [" ".join(lines)]:
            indent = line[: len(line) - len(line.lstrip())]
            yield _fold(line.strip(), indent)


def _fold(line: str, indent: str = "") -> str:
    return textwrap.fill(
        line,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  " * (indent == "  "),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _traits(cls: type, hooks: list[str]) -> Iterator[str]:
    """The traits of a plugin that it, or its kind, has."""
    traits = traits_of(cls)
    if "moe_router" in hooks:
        yield from (f"provides {name}: {ROUTER_TRAITS[name]}" for name in provided_by(cls))
    yield from (f"requires {name}: {ROUTER_TRAITS[name]}" for name in traits.requires)
    yield from (f"effect {name}: {EFFECTS[name]}" for name in traits.effects)
    if traits.balanced is not None:
        yield f"balanced: {traits.balanced:g} at perfect balance"
    if traits.orphans:
        yield "orphans: asks for new experts without a parent"
    if acts_on_tokens(hooks):
        own = "per rank: works on each rank's tokens alone"
        yield own if traits.per_rank else "global: with several ranks, as one process with all tokens"


def _fields(option: Option) -> dict[str, Any]:
    limits = {"min": option.min, "max": option.max, "choices": option.choices and list(option.choices)}
    given = {key: value for key, value in limits.items() if value is not None}
    return {**given, "name": option.name, "type": option.type, "default": option.default, "help": option.help}


def _values(option: Option) -> str:
    """The values that an option takes, in words."""
    if option.choices is not None:
        return " | ".join(map(str, option.choices))
    if option.min is not None and option.max is not None:
        return f"{option.type}, {option.min} to {option.max}"
    if option.min is not None:
        return f"{option.type}, at least {option.min}"
    return option.type if option.max is None else f"{option.type}, at most {option.max}"


def _default(value: Any) -> str:
    """A default as --set takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
