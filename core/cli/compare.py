"""`moe-engine compare`: runs side by side."""

import json
from pathlib import Path
from typing import Any

import click

from ..contract.run import Run
from ..run.folder import number_of, read_run
from .pictures import check_picture, write_picture

COLUMNS = (
    "accuracy",
    "perplexity",
    "loss",
    "verdict",
    "cv",
    "maxvio",
    "active",
    "entropy",
    "dropped",
    "steps",
    "seconds",
)
# what every run has and the table leaves out; any other number, as a metric of yours, gets a column
USUAL = {
    *COLUMNS,
    *(
        "name",
        "experts",
        "top_k",
        "load",
        "cv2",
        "gini",
        "max_min",
        "mutual_information",
        "router_gradient",
        "rows",
        "slots",
    ),
}


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("compare.png"),
    help="File of the overlaid plots.  [default: compare.png]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Set finished runs side by side: a table, and one picture with their curves laid over each other.

    All numbers are of the test set; those of layers are averaged over the layers.
    """
    read = [read_run(folder) for folder in runs]
    rows = [row(run) for run in read]
    more = sorted({name for run in read for layer in run.summary["layers"] for name in layer} - USUAL)
    for line, run in zip(rows, read, strict=True):
        line.update({name: number_of(run.summary, name) for name in more if not name.startswith("effect.")})
    check_picture(out)
    from ..run.figures import overlaid

    write_picture(out, overlaid(read), "--out")
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from .progress import cell, table

    shown = [name for name in [*rows[0]][2:] if any(one[name] is not None for one in rows)]
    table(
        ["run", "plugins", *shown],
        [[one["run"], one["plugins"], *(cell(one[column]) for column in shown)] for one in rows],
    )
    click.echo(f"picture: {out}")


def row(run: Run) -> dict[str, Any]:
    """One run's line: its summary's numbers, those of layers averaged."""
    return {"run": run.name, "plugins": run.typed, **{name: number_of(run.summary, name) for name in COLUMNS}}
