"""`moe-engine compare`: finished runs in one table and one figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract.run import Run
from ..run.folder import number_of, read_run
from .figures import check_figure, write_figure, write_page
from .flags import html_flag, json_flag, wide_flag
from .output import echo, echo_json

if TYPE_CHECKING:
    from ..pages.blocks import Table

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
@html_flag
@wide_flag
@json_flag("the table")
def compare(runs: tuple[Path, ...], out: Path, html: Path | None, wide: bool, as_json: bool) -> None:
    """Compare finished runs: one table, and one figure with all their curves.

    \b
    See them over each other, and point at a line for its number:
        moe-engine compare runs/A runs/B --html runs.html

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
    shown_rows = table_of(finished, rows)
    if html is not None:
        from ..run.compared_page import compared_page

        write_page(html, compared_page(finished, shown_rows))
    if as_json:
        echo_json(rows, 2)
        return
    from .tables import table

    table(shown_rows.columns, shown_rows.rows, keys=2, wide=wide)
    echo(f"figure: {out}")
    if html is not None:
        echo(f"page: {html}")


def row(run: Run) -> dict[str, Any]:
    """One run's line: the metrics of its summary, those of layers averaged."""
    return {"run": run.name, "plugins": run.typed, **{name: number_of(run.summary, name) for name in COLUMNS}}


def table_of(runs: Sequence[Run], rows: Sequence[dict[str, Any]]) -> "Table":
    """The rows as they are shown, without metrics that no run has."""
    from ..pages.blocks import Table
    from ..run.compared_page import verdict_tones
    from ..run.forms import heading, shown

    columns = [name for name in [*rows[0]][2:] if any(row[name] is not None for row in rows)]
    words = (0, 1, *(at for at, name in enumerate(columns, 2) if name == "verdict"))
    lines = [[row["run"], row["plugins"], *(shown(column, row[column]) for column in columns)] for row in rows]
    return Table(["run", "plugins", *map(heading, columns)], lines, words, tones=verdict_tones(runs))
