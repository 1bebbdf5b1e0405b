"""`moe-engine routing-stats`: balance metrics of routing counts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract.options import parse_settings
from ..errors import UsageError, listed
from ..registry.discovery import find, pick
from ..registry.manager import Plugins
from .figures import check_figure, write_figure
from .flags import json_flag, names, settings_flag, wide_flag
from .output import echo, echo_json

if TYPE_CHECKING:
    from ..analysis.count_series import Series

METRICS = ("cv", "cv2", "gini", "entropy", "max_min", "maxvio", "active")
SIZES = ("experts", "top_k", "tokens", "total", "dropped")  # numbers of a row that are not metrics
EXPERT_NUMBERS = ("sum", "mean", "minimum", "maximum", "range")
SHOWN = 8  # series per verdict, and experts among the busiest
MOST_LABELS = 20  # columns of labels in a table; --json has all of them


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

        drawn = shares([counts.count_E.tolist() for counts in series], _titles(series))
        write_figure(figure, drawn, "--figure")
    if as_json:
        echo_json(report, 2)
    else:
        _show(report, series, wide)
        if figure is not None:
            echo(f"figure: {figure}")


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


def _titles(series: Sequence["Series"]) -> list[str]:
    """The name of each series: the file and labels in which they differ."""
    several_files = len({counts.file for counts in series}) > 1
    names = dict.fromkeys(name for counts in series for name in counts.labels)
    labels = {name: {counts.labels.get(name) for counts in series} for name in names}
    alike = {name for name, values in labels.items() if len(values) == 1}
    return [(f"{counts.file}: " if several_files else "") + counts.title(alike) for counts in series]


def _show(report: dict[str, Any], series: Sequence["Series"], wide: bool) -> None:
    from .tables import print_line

    rows, changed = report["rows"], report["changes"]
    extra = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    columns = ["experts", *METRICS, *sorted(extra - {*METRICS, *SIZES})]
    verdicts = [(row.get("verdict") or {}).get("name", "-") for row in rows]
    _table(rows, columns, "verdict", verdicts, wide)
    if changed:
        print_line("")
        columns = ["against", "total_variation", "correlation", "cv_change"]
        _table(changed, columns, "moved most", [_moved(change["moved"]) for change in changed], wide)
    if "per_expert" in report:
        _show_experts(report, wide)
    for line in (*_findings(rows, _titles(series)), *_notes(report, series)):
        print_line(line)


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str], last: str, ends: Sequence[str], wide: bool) -> None:
    """Print the labels of each row, its metrics, and a last column in words."""
    from ..analysis.count_columns import TOP_K
    from ..run.forms import heading, shown
    from .tables import table

    labels = [name for name in dict.fromkeys(name for row in rows for name in row["labels"]) if name not in TOP_K]
    labels = labels[:MOST_LABELS]
    keys = [*(["file"] if len({row["file"] for row in rows}) > 1 else []), "layer", "split"]
    numbers = [*keys, "top_k", *columns]
    values = [[*(row["labels"].get(name) for name in labels), *(row.get(name) for name in numbers)] for row in rows]
    lines = [[shown(name, value) for name, value in zip([*labels, *numbers], line, strict=True)] for line in values]
    heads = [{"top_k": "K"}.get(name) or heading(name) for name in numbers]
    body = [[*line, end] for line, end in zip(lines, ends, strict=True)]
    table(
        [*labels, *heads, last],
        body,
        keys=len(labels) + len(keys),
        wide=wide,
        first=("K", "cv", "active", last, "entropy", "maxvio"),
    )


def _show_experts(report: dict[str, Any], wide: bool) -> None:
    """Print a line for each expert of a layer, and how stable the rows are."""
    from .tables import print_line

    columns = ["expert", *EXPERT_NUMBERS]
    lines: list[dict[str, Any]] = []
    several = [row for row in report["per_expert"] if row["number"] > 1]  # the numbers of a single row are its counts
    for row in several or report["per_expert"]:
        for expert, numbers in enumerate(zip(*(row[name] for name in EXPERT_NUMBERS), strict=True)):
            lines.append({**row, "expert": expert, **dict(zip(EXPERT_NUMBERS, map(_exact, numbers), strict=True))})
    print_line("")
    _table(lines, columns, "over", [f"{line['number']} {line['over']}" if several else "1 row" for line in lines], wide)
    if not report["stability"]:
        print_line("the rows give no stability: each layer has one row, or one step")
        return
    print_line("")
    ends = [_most(row) for row in report["stability"]]
    _table(report["stability"], ["rows", "moved", "by_chance", "cv_rows"], "moved most; busiest experts", ends, wide)


def _exact(value: float) -> float | str:
    """A count with all its digits, and a large mean with one decimal; other numbers are shortened."""
    return f"{value:.0f}" if value.is_integer() else f"{value:.1f}" if value >= 100 else value


def _most(row: dict[str, Any]) -> str:
    """The largest move of a series, and its experts that are most often among the busiest."""
    often = sorted(enumerate(row["busiest"]), key=lambda pair: -pair[1])[: row["busy"]]
    most = row["moved_most"]
    where = f"{most['total_variation']:.2%} from {most['from']} to {most['to']}"
    return f"{where}; {', '.join(f'{expert} ({part:.0%})' for expert, part in often[:SHOWN])}"


def _moved(most: dict[str, Any]) -> str:
    return f"expert {most['expert']}: {most['from']:.2%} to {most['to']:.2%}"


def _findings(rows: Sequence[dict[str, Any]], titles: Sequence[str]) -> Iterator[str]:
    """The metrics' findings in words, the most severe first; of each verdict, the least even series."""
    groups: dict[tuple[int, str, str], list[tuple[float, str]]] = {}
    for row, title in zip(rows, titles, strict=True):
        for finding in row.values():
            if isinstance(finding, dict) and "severity" in finding:
                key = (-finding["severity"], finding["name"], finding["advice"])
                groups.setdefault(key, []).append((-(row.get("cv") or 0), f"  {title}: {finding['why']}"))
    for (_, name, advice), lines in sorted(groups.items()):
        yield f"{name}, {len(lines)} of {len(rows)}" + (f": {advice}" if advice else "")
        yield from (line for _, line in sorted(lines)[:SHOWN])
        if len(lines) > SHOWN:
            yield f"  and {len(lines) - SHOWN} more, which are more even"


def _notes(report: dict[str, Any], series: Sequence["Series"]) -> Iterator[str]:
    """Notes: contradictions, assumptions, sources, and metrics that counts cannot provide."""
    yield from (f"warning: {warning}" for warning in report["warnings"])
    if any(counts.top_k is None for counts in series):
        yield "top_k is not given; assuming 1 (set it with --top-k)"
    if not all(counts.whole for counts in series if counts.source is None):
        yield "counts that are not whole numbers are taken as shares, without sampling noise"
    yield from _sources(series)
    yield from report["notes"]
    if report["unanswered"]:
        yield f"counts alone do not give {listed(report['unanswered'])}"


def _sources(series: Sequence["Series"]) -> Iterator[str]:
    """Where counts come from; in one line if it is the same for a whole file."""
    by_file: dict[str, list[Series]] = {}
    for counts in series:
        by_file.setdefault(counts.file, []).append(counts)
    for file, of_file in by_file.items():
        if of_file[0].source is not None and len({counts.source for counts in of_file}) == 1:
            yield f"{file}: {of_file[0].source}"
            continue
        yield from (f"{file}, {one.title()}: {one.source}" for one in of_file if one.source is not None)
