"""`moe-engine resume`."""

from pathlib import Path

import click

from ..run.folder import old_folder
from .follow import follow


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the summary as JSON on standard output, and nothing else there."
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of a plugin that fails.")
def resume(run: Path, as_json: bool, quiet: bool, debug: bool) -> int:
    """Go on with a run that was stopped or killed, from its newest checkpoint.

    It ends with the same weights and the same metrics.jsonl as if it had never stopped (same machine and
    versions). A damaged checkpoint is named, and the one before it is used; if none is left, the run begins
    anew and overwrites its records. Of a finished run only the last evaluation and the reports are made again.
    """
    config, settings = old_folder(run)
    from ..run.training import Training

    return follow(Training(config, settings, run, resumed=True), as_json, quiet, debug)
