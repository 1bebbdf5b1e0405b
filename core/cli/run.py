"""`moe-engine run`."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RunError
from ..manager import Plugins, find
from ..options import Settings, parse_settings
from ..runs import dump, flag_names, merged, read_config, write_atomically

if TYPE_CHECKING:
    from ..training import Training

Command = Callable[..., Any]
HELP = {name: option.help for name, option in flag_names().items()}
SHOWN = {name: option.default for name, option in flag_names().items()}
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def _names(_: Any, __: Any, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def _flag(name: str, kind: Any = str, **more: Any) -> Callable[[Command], Command]:
    default = SHOWN[name]
    shown = "" if default in (None, ()) else f"  [default: {default}]"
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

    The folder gets config.toml, metrics.jsonl, summary.json, model.safetensors, plots and report.html.
    Ctrl-C ends the run after the current step and saves the weights.
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

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # same seed, same bits on a GPU; must precede CUDA
    from ..training import Training

    return _follow(Training(run_config, own, out), as_json, quiet, debug)


def _follow(training: "Training", as_json: bool, quiet: bool, debug: bool) -> int:
    """Run it under a progress display; answer the exit code."""
    from ..training import Stopped
    from .progress import Progress

    got: list[int] = []

    def stop(number: int, _: Any) -> None:
        got.append(number)
        training.stop = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        with Progress(training, quiet) as progress:
            training.listener = progress.show
            finished = training.run()
    except Stopped:
        click.echo(f"moe-engine: stopped at step {training.step}; the weights are in {training.folder}", err=True)
        return STOPS[signal.Signals(got[0])]
    except (Exception, SystemExit) as error:
        culprit = training.engine.plugins.culprit(error)
        if culprit is None:
            raise
        raise _blame(training, culprit, error, debug) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if as_json:
        click.echo(dump(finished.summary))
    else:
        progress.finish(finished)
    return 0


def _blame(training: "Training", culprit: str, error: BaseException, debug: bool) -> RunError:
    text = "".join(traceback.format_exception(error))
    if debug:
        sys.stderr.write(text)
    log = training.folder / "run.log"
    write_atomically(log, text.encode())
    failure = f"{culprit} failed at step {training.step}: {type(error).__name__}: {error}"
    return RunError(f"{failure} (traceback in {log}, or use --debug)")
