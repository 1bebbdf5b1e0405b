"""The flags that commands which train have in common."""

from collections.abc import Callable
from typing import Any

import click

from ..run.config import flag_names

Command = Callable[..., Any]
HELP = {name: option.help for name, option in flag_names().items()}
SHOWN = {name: option.default for name, option in flag_names().items()}


def names(_: Any, __: Any, value: str | None) -> tuple[str, ...] | None:
    """The words between a flag's commas."""
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def flag(name: str, kind: Any = str, **more: Any) -> Callable[[Command], Command]:
    """The flag of an option of `RunConfig`, with its help and default."""
    default = SHOWN[name]
    shown = "" if default in (None, ()) or default is False else f"  [default: {default}]"
    return click.option(
        "--" + name.replace("_", "-"),
        name,
        type=kind,
        help=HELP[name][0].upper() + HELP[name][1:] + "." + shown,
        **more,
    )


def settings_flag(command: Command) -> Command:
    """--set, any number of times."""
    what = "Set an option of a plugin; may be repeated."
    return click.option("--set", "settings", multiple=True, metavar="PLUGIN.OPTION=VALUE", help=what)(command)
