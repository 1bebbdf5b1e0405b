"""`moe-engine compare`: finished runs in one table and one figure."""

from pathlib import Path
from typing import Any

import click

from ..contract.run import Run
from ..run.folder import number_of, read_run
from .figures import check_figure, write_figure
from .flags import json_flag, wide_flag
from .output import echo, echo_json

COLUMNS = (
    *("accuracy", "perplexity", "loss", "verdict", "cv", "maxvio"),
    *("active", "entropy", "dropped", "steps", "seconds"),
)
# what every run has but the table leaves out; any other metric, such as a plugin's, gets a column
STANDARD = {
    *COLUMNS,
    *("name", "experts", "top_k", "load", "cv2", "gini", "max_min"),
    *("mutual_information", "router_gradient", "rows", "slots"),
}


@click.command(short_help="Compare finished runs in one table and one figure.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("compare.png"),
    show_default=True,
    help="Figure of the runs' curves: .png, .svg or .pdf.",
)
@wide_flag
@json_flag("the table")
def compare(runs: tuple[Path, ...], out: Path, wide: bool, as_json: bool) -> None:
    """Compare finished runs: one table, and one figure with all their curves.

    Metrics are those of the test set; a metric of layers is averaged over the
    layers.
    """
    finished = [read_run(folder) for folder in runs]
    rows = [row(run) for run in finished]
    extra = sorted({name for run in finished for layer in run.summary["layers"] for name in layer} - STANDARD)
    for line, run in zip(rows, finished, strict=True):
        line.update({name: number_of(run.summary, name) for name in extra if not name.startswith("effect.")})
    check_figure(out)
    from ..run.figures import overlaid

    write_figure(out, overlaid(finished), "--out")
    if as_json:
        echo_json(rows, 2)
        return
    from ..run.forms import heading, shown
    from .tables import table

    columns = [name for name in [*rows[0]][2:] if any(row[name] is not None for row in rows)]
    table(
        ["run", "plugins", *map(heading, columns)],
        [[row["run"], row["plugins"], *(shown(column, row[column]) for column in columns)] for row in rows],
        keys=2,
        wide=wide,
    )
    echo(f"figure: {out}")


def row(run: Run) -> dict[str, Any]:
    """One run's line: the metrics of its summary, those of layers averaged."""
    return {"run": run.name, "plugins": run.typed, **{name: number_of(run.summary, name) for name in COLUMNS}}
