"""Make flags from the options in run/config.py; the flags that several commands share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import attrs
import click

from ..errors import UsageError
from ..run.config import RunConfig, flag_names

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

OPTIONS = flag_names()
METAVARS = {"task": "NAME", "device": "NAME", "data_dir": "FOLDER"}


def names(_: Any, __: Any, value: str | None) -> tuple[str, ...] | None:
    """The words between a flag's commas."""
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def flag(name: str) -> Decorator:
    """The flag of one option of `RunConfig`, with its type, choices, help and default.

    A flag that is not given is None: `run.config.merge_options` then uses the config file's value, or the default.
    """
    option, kind, spelled = OPTIONS[name], _type(name), "--" + name.replace("_", "-")
    if kind is bool:
        return click.option(spelled, name, is_flag=True, default=None, help=option.help)
    if kind not in (int, float, str):
        return click.option(spelled, name, metavar="A,B,...", callback=names, help=option.help)
    default = f"{option.default:g}" if kind is float and option.default is not None else option.default
    shown = "" if default is None else f"  [default: {default}]"
    metavar = f"[{'|'.join(option.choices)}]" if option.choices else METAVARS.get(name)
    return click.option(spelled, name, type=kind, metavar=metavar, help=option.help + shown)


def _type(name: str) -> Any:
    """The type of an option of `RunConfig`, X for X | None."""
    kind: Any = attrs.fields_dict(RunConfig)[name].type
    members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next(member for member in members if member is not type(None))


def flags(*names: str) -> Decorator:
    """Several flags of `RunConfig`, in this order."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = flag(name)(command)
        return command

    return decorate


def json_flag(what: str) -> Decorator:
    """--json, which sends only `what` to standard output."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what} as JSON and nothing else.")


def _page(context: click.Context, option: click.Option, path: Path | None) -> Path | None:
    """Refuse a page that can't be written before the command does its work."""
    if path is not None and path.suffix.lower() != ".html":
        raise UsageError(f"page {path} must end in .html", code="unknown-page-format")
    check_target(option.opts[0], path)
    return path


def check_target(flag: str, path: Path | None) -> None:
    """Raise UsageError for a file that can't be written, if a flag names one."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        why = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise UsageError(f"{flag} {path} {why}; name a file", code="unwritable-file")


html_flag = click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", callback=_page, help="Write a page that opens offline."
)


def out_flag(what: str, default: str) -> Decorator:
    """--out, the file or folder that a command writes."""
    return click.option("--out", type=click.Path(path_type=Path), help=f"{what}  [default: {default}]")


settings_flag = click.option(
    "--set", "settings", multiple=True, metavar="PLUGIN.OPTION=VALUE", help="Set a plugin's option; repeatable."
)
quiet_flag = click.option("--quiet", is_flag=True, help="Show no progress.")
wide_flag = click.option("--wide", is_flag=True, help="Show all columns, where needed in several tables.")
debug_flag = click.option("--debug", is_flag=True, help="Show the traceback when a plugin fails.")
jobs_flag = click.option(
    "--jobs",
    type=click.IntRange(1),
    metavar="INTEGER",
    help="Runs at a time, one thread each.  [default: one per core]",
)
backend_flag = click.option(
    "--backend",
    type=click.Choice(["loky", "dask", "ray"]),
    default="loky",
    show_default=True,
    help="Where runs go: to processes of this machine, or to a cluster's workers.",
)
address_flag = click.option(
    "--address",
    metavar="HOST:PORT",
    help="The cluster's scheduler.  [default: DASK_SCHEDULER_ADDRESS or RAY_ADDRESS, else one started here]",
)


def model_and_texts(command: Command) -> Command:
    """RUN|FOLDER, and --text, for `texts_of`."""
    path = click.Path(path_type=Path)
    several: dict[str, Any] = {"multiple": True, "required": True, "metavar": "FILE..."}
    command = click.option("--text", "texts", type=path, help="Text files, in UTF-8.", **several)(command)
    command = click.argument("more", nargs=-1, type=path, metavar="")(command)
    return click.argument("folder", type=path, metavar="RUN|FOLDER")(command)


def texts_of(texts: Sequence[Path], more: Sequence[Path]) -> list[Path]:
    """The texts of `--text A B` or of `--text A --text B`."""
    if more and len(texts) > 1:
        sentence = f"{more[0]} stands alone; give all texts after one --text, or --text before each"
        raise UsageError(sentence, code="texts-mixed")
    return [*texts, *more]
