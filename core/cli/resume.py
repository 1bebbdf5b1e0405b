"""`moe-engine resume`: continue a run."""

from pathlib import Path

import click

from ..run.folder import old_folder
from .flags import debug_flag, json_flag, quiet_flag
from .follow import follow


@click.command(short_help="Continue a run that was stopped or killed.")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@json_flag("the summary")
@quiet_flag
@debug_flag
def resume(run: Path, as_json: bool, quiet: bool, debug: bool) -> int:
    """Continue a run that was stopped or killed, from its newest checkpoint.

    On the same machine and versions, the final weights and metrics.jsonl are
    bit-identical to those of an uninterrupted run. A damaged checkpoint is
    reported, and the one before it is used; if none is left, the run starts
    over. A finished run repeats only its last evaluation and its reports.
    """
    config, settings = old_folder(run)
    from ..run.training import Training

    return follow(Training(config, settings, run, resumed=True), as_json, quiet, debug)
