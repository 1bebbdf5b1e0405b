"""`moe-engine run`."""

from pathlib import Path
from typing import Any

import click

from ..contract.options import Settings, parse_settings
from ..registry.discovery import find
from ..registry.manager import Plugins
from ..run.config import merge_options, read_config
from .flags import flag, names, settings_flag
from .follow import follow


@click.command()
@flag("plugins", metavar="A,B,...", callback=names)
@flag("no_plugin", metavar="A,B,...", callback=names)
@flag("task")
@flag("experts", int)
@flag("top_k", int)
@flag("capacity", float)
@flag("allow_no_gradient", None, is_flag=True, default=None)
@flag("epochs", int)
@flag("steps", int)
@flag("batch_size", int)
@flag("lr", float)
@flag("lr_schedule")
@flag("weight_decay", float)
@flag("seed", int)
@flag("device")
@flag("precision")
@flag("bf16_matmul")
@flag("data_dir", metavar="FOLDER")
@flag("eval_every", int)
@flag("log_every", int)
@flag("checkpoint_every", int)
@flag("record_routing", None, is_flag=True, default=None)
@settings_flag
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
    run_config = merge_options(file_flags, flags)
    if any(flags[name] is not None for name in ("plugins", "no_plugin", "task")):
        # the file's options of plugins that a flag took away are not meant for this run
        active = Plugins(run_config.plugins, run_config.no_plugin, task=run_config.task).active
        gone = find().keys() - active.keys()
        file_settings = {name: table for name, table in file_settings.items() if name not in gone}
    own: Settings = {name: dict(table) for name, table in file_settings.items()}
    for plugin, table in parse_settings(settings).items():
        own.setdefault(plugin, {}).update(table)

    from ..run.training import Training

    return follow(Training(run_config, own, out), as_json, quiet, debug)
