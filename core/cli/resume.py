"""`moe-engine resume`: continue a run."""

from pathlib import Path

import attrs
import click

from ..parallel.launch import joined
from ..run.folder import old_folder
from .flags import debug_flag, json_flag, quiet_flag
from .follow import follow


@click.command(short_help="Continue a run that was stopped or killed.")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--no-plugin", "dropped", metavar="NAMES", help="Leave out metrics or reports from here on.")
@json_flag("the summary")
@quiet_flag
@debug_flag
def resume(run: Path, dropped: str | None, as_json: bool, quiet: bool, debug: bool) -> int:
    """Continue a run that was stopped or killed, from its newest checkpoint.

    On the same machine and versions, the final weights and metrics.jsonl are
    bit-identical to those of an uninterrupted run. A damaged checkpoint is
    reported, and the one before it is used; if none is left, the run starts
    over. A finished run repeats only its last evaluation and its reports.

    --no-plugin drops plugins that only watch: a metric that fails, or a report
    that is no longer installed.
    """
    names = [name.strip() for name in (dropped or "").split(",") if name.strip()]
    config, settings = old_folder(run, names)
    with joined(config.device) as device:
        from ..run.training import Training

        config = attrs.evolve(config, device=device)
        return follow(Training(config, settings, run, resumed=True, dropped=tuple(names)), as_json, quiet, debug)
