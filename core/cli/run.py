"""`moe-engine run`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..manager import Plugins, find
from ..options import Settings, parse_settings
from ..runs import flag_names, merged, read_config
from .follow import follow

Command = Callable[..., Any]
HELP = {name: option.help for name, option in flag_names().items()}
SHOWN = {name: option.default for name, option in flag_names().items()}


def _names(_: Any, __: Any, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def _flag(name: str, kind: Any = str, **more: Any) -> Callable[[Command], Command]:
    default = SHOWN[name]
    shown = "" if default in (None, ()) or default is False else f"  [default: {default}]"
    flag = "--" + name.replace("_", "-")
    return click.option(flag, name, type=kind, help=HELP[name][0].upper() + HELP[name][1:] + "." + shown, **more)


@click.command()
@_flag("plugins", metavar="A,B,...", callback=_names)
@_flag("no_plugin", metavar="A,B,...", callback=_names)
@_flag("task")
@_flag("experts", int)
@_flag("top_k", int)
@_flag("capacity", float)
@_flag("epochs", int)
@_flag("batch_size", int)
@_flag("lr", float)
@_flag("seed", int)
@_flag("device")
@_flag("data_dir", metavar="FOLDER")
@_flag("log_every", int)
@_flag("checkpoint_every", int)
@_flag("record_routing", None, is_flag=True, default=None)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="PLUGIN.OPTION=VALUE",
    help="Set an option of a plugin; may be repeated.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Take flags and options from a TOML file; flags and --set override it.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/TASK-TIME]")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the summary as JSON on standard output, and nothing else there."
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of a plugin that fails.")
def run(
    settings: tuple[str, ...],
    config: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> int:
    """Train a Mixture-of-Experts model, watch its balance, and write a report.

    \b
    Balanced by a bias and a loss, on the embedded digits:
        moe-engine run --plugins saturation,switch_aux
    On MNIST, with a stronger loss:
        moe-engine run --plugins switch_aux --set switch_aux.weight=0.1 --task mnist --data-dir data
    The same run again, with another seed:
        moe-engine run --config runs/digits-.../config.toml --seed 1

    The folder gets config.toml, metrics.jsonl, checkpoints, summary.json, model.safetensors, plots and
    report.html. Ctrl-C ends the run after the current step; `moe-engine resume RUN` goes on with it.
    """
    file_flags, file_settings = read_config(config)
    run_config = merged(file_flags, flags)
    if any(flags[name] is not None for name in ("plugins", "no_plugin", "task")):
        # the file's options of plugins that a flag took away are not meant for this run
        active = Plugins(run_config.plugins, run_config.no_plugin, task=run_config.task).active
        gone = find().keys() - active.keys()
        file_settings = {name: table for name, table in file_settings.items() if name not in gone}
    own: Settings = {name: dict(table) for name, table in file_settings.items()}
    for plugin, table in parse_settings(settings).items():
        own.setdefault(plugin, {}).update(table)

    from ..training import Training

    return follow(Training(run_config, own, out), as_json, quiet, debug)
