"""`moe-engine routing-stats`: balance metrics of routing counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..contract.options import parse_settings
from ..errors import UsageError, listed
from ..registry.discovery import find, pick
from ..registry.manager import Plugins
from .figures import check_figure, write_figure, write_page
from .flags import html_flag, json_flag, names, settings_flag, wide_flag
from .output import echo, echo_json

if TYPE_CHECKING:
    from ..analysis.count_series import Series
    from ..analysis.stats_page import Told


@click.command("routing-stats", short_help="Compute balance metrics from routing counts.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="INTEGER",
    help="Experts per token, where no column gives it.  [default: 1]",
)
@click.option(
    "--experts",
    type=click.IntRange(1, 100_000),
    metavar="INTEGER",
    help="Number of experts, where each row counts one expert.",
)
@click.option("--split", default="split", show_default=True, metavar="COLUMN", help="Column whose values are compared.")
@click.option("--sum", "over", metavar="A,B,...", callback=names, help="Columns to sum over.")
@click.option(
    "--per-expert",
    is_flag=True,
    help="Add each expert's sum, mean, minimum, maximum and range, and how far the load moves from row to row.",
)
@click.option("--plugins", "chosen", metavar="A,B,...", callback=names, help="Further metric plugins.")
@settings_flag
@click.option("--figure", type=click.Path(path_type=Path), help="Write a heatmap here: .png, .svg or .pdf.")
@html_flag
@wide_flag
@json_flag("the report")
def routing_stats(
    files: tuple[Path, ...],
    top_k: int | None,
    experts: int | None,
    split: str,
    over: tuple[str, ...] | None,
    per_expert: bool,
    chosen: tuple[str, ...] | None,
    settings: tuple[str, ...],
    figure: Path | None,
    html: Path | None,
    wide: bool,
    as_json: bool,
) -> None:
    """Compute balance metrics and a verdict from routing counts.

    \b
    Analyse the counts of each expert, by layer and split:
        moe-engine routing-stats counts.csv --top-k 3
    Compare the domains of published counts, or sum over them:
        moe-engine routing-stats olmoe.csv --split domain --figure olmoe.png
        moe-engine routing-stats olmoe.csv --sum domain
    Add each expert's numbers, and how far the load moves from step to step:
        moe-engine routing-stats steps.csv --per-expert
    Compare training with test in a finished run:
        moe-engine routing-stats runs/A

    FILE is CSV, JSON or JSONL, - for standard input, a run's folder, or a trace
    of `inspect`, whose labels are compared. A row has the columns layer, split
    and expert0, expert1, ... (or e0, e1, ...), or layer, split, expert and
    count; layer_id, expert_counts and other usual names are known. Counts may
    be shares. The columns tokens and choices_per_token are used if present.

    Every other column that all experts of a layer share is a label. Rows with
    the same labels, layer and split are added up, as they are over step, epoch
    and batch. What looks like ids or probabilities is refused, and totals that
    contradict each other are reported. The thresholds of the verdict are
    options of a metric; see `moe-engine plugins health`.
    """
    if figure is not None:
        check_figure(figure)
    metrics, options = _metrics(chosen or ()), parse_settings(settings)
    # read before plugins are loaded, and torch with them: a bad file is refused at once
    series, notes = _read(files, [name.lower() for name in over or ()], split.lower(), experts, top_k, per_expert)
    plugins = Plugins(metrics, settings=options)

    from ..analysis.routing_stats import by_expert, changes, contradictions, row_of, stability
    from ..analysis.stats_page import stats_page, titles_of, told_of

    answered = [row_of(plugins, counts) for counts in series]
    rows = [row for row, _ in answered]
    report = {
        "rows": rows,
        "changes": changes(series, rows),
        "warnings": contradictions([counts for counts in series if counts.source is None]),
        "unanswered": sorted({name for _, unanswered in answered for name in unanswered}),
        "notes": notes,
    }
    if per_expert:
        report |= {"per_expert": by_expert(series), "stability": stability(series)}
    if figure is not None:
        from ..run.figures import shares

        drawn = shares([counts.count_E.tolist() for counts in series], titles_of(series))
        write_figure(figure, drawn, "--figure")
    told = told_of(report, series)
    if html is not None:
        write_page(html, stats_page(report, series, told))
    if as_json:
        echo_json(report, 2)
    else:
        _show(told, wide)
        for what, path in (("figure", figure), ("page", html)):
            if path is not None:
                echo(f"{what}: {path}")


def _metrics(chosen: Sequence[str]) -> Sequence[str]:
    installed = find()
    for name in chosen:
        if (found := pick(name, installed)).kind != "metric":
            sentence = f"--plugins takes metrics, but '{name}' is a {found.kind}"
            raise UsageError(sentence, code="not-a-metric")
    return chosen


def _read(
    files: Sequence[Path],
    over: Sequence[str],
    split: str,
    experts: int | None,
    top_k: int | None,
    each_row: bool,
) -> tuple[list["Series"], list[str]]:
    """The series of all files, and notes on how they were read."""
    from ..analysis.count_files import is_trace
    from ..analysis.counts import read_counts

    series: list[Series] = []
    notes: list[str] = []
    known: set[str] = set()
    for file in files:
        if file.is_dir() or is_trace(file):
            from ..analysis.routing_stats import of_run, of_trace

            series += of_run(file) if file.is_dir() else of_trace(file)
            continue
        in_file, header = read_counts(file, over, split, experts, each_row)
        series += in_file
        notes += header.notes
        known |= header.names
    if absent := [name for name in {*over, split} - known - {"split"} if name]:
        sentence = f"no file has a column {listed(sorted(absent))}; there is {listed(sorted(known)) or 'none'}"
        raise UsageError(sentence, code="unknown-column")
    for counts in series:
        counts.top_k = counts.top_k or top_k
        if counts.top_k and counts.top_k > len(counts.count_E):
            where = f"{counts.file} has {len(counts.count_E)} experts in {counts.title()}"
            raise UsageError(f"--top-k is {counts.top_k}, but {where}", code="top-k-above-experts")
    return series, notes


def _show(told: "Told", wide: bool) -> None:
    from ..analysis.stats_page import finding_lines
    from .tables import print_line, table

    for at, one in enumerate(told.tables):
        if at:
            print_line("")
        last = one.table.columns[-1]
        first = ("K", "cv", "active", last, "entropy", "maxvio")
        table(one.table.columns, one.table.rows, keys=one.keys, wide=wide, first=first)
    for line in (*filter(None, [told.unstable]), *finding_lines(told.findings), *told.notes):
        print_line(line)
