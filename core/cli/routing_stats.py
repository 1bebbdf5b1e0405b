"""`moe-engine routing-stats`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract.options import parse_settings
from ..errors import UsageError, listed
from ..registry.discovery import find, pick
from ..registry.manager import Plugins
from .flags import names, settings_flag
from .pictures import check_picture, write_picture

if TYPE_CHECKING:
    from ..analysis.counts import Series

NUMBERS = ("cv", "cv2", "gini", "entropy", "max_min", "maxvio", "active")
SIZES = ("experts", "top_k", "tokens", "total", "dropped")  # numbers of a row that are not measured here
SHOWN = 8  # series to a verdict


@click.command("routing-stats")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--top-k", type=click.IntRange(min=1), help="Choices a token, where no column says.  [default: 1]")
@click.option("--experts", type=click.IntRange(1, 100_000), help="Number of experts, where each row is of one.")
@click.option("--split", default="split", metavar="COLUMN", help="Column whose values are compared.  [default: split]")
@click.option("--sum", "over", metavar="A,B,...", callback=names, help="Columns to add up over.")
@click.option("--plugins", "chosen", metavar="A,B,...", callback=names, help="Further metrics.")
@settings_flag
@click.option("--picture", type=click.Path(path_type=Path), help="Draw a heatmap into this file: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, and nothing else there.")
def routing_stats(
    files: tuple[Path, ...],
    top_k: int | None,
    experts: int | None,
    split: str,
    over: tuple[str, ...] | None,
    chosen: tuple[str, ...] | None,
    settings: tuple[str, ...],
    picture: Path | None,
    as_json: bool,
) -> None:
    """Say what the metrics and the verdict are of routing counts, wherever they come from.

    \b
    Counts of each expert, by layer and split:
        moe-engine routing-stats counts.csv --top-k 3
    Published ones, one text against another, all texts added up:
        moe-engine routing-stats olmoe.csv --split domain --picture olmoe.png
        moe-engine routing-stats olmoe.csv --sum domain
    A finished run of ours, training against test:
        moe-engine routing-stats runs/A

    A FILE is CSV, JSON or JSONL, - for standard input, or a run's folder. A row has columns layer, split and
    expert0, expert1, ... (or e0, e1, ...); or layer, split, expert and count. tokens and choices_per_token are
    used where they are there. Any other column is a label: each combination of labels, layer and split is a
    line of its own, over whose rows the counts are added up, as they are over step, epoch and batch. Counts may be
    shares. Totals that contradict each other are named. The verdict's thresholds are options of a metric:
    moe-engine plugins health.
    """
    if picture is not None:
        check_picture(picture)
    plugins = Plugins(_metrics(chosen or ()), settings=parse_settings(settings))
    series = _read(files, [name.lower() for name in over or ()], split.lower(), experts, top_k)

    from ..analysis.routing_stats import changes, contradictions, row_of

    answered = [row_of(plugins, one) for one in series]
    rows = [row for row, _ in answered]
    report = {
        "rows": rows,
        "changes": changes(series, rows),
        "warnings": contradictions([one for one in series if one.source is None]),
        "unanswered": sorted({name for _, blind in answered for name in blind}),
    }
    if picture is not None:
        from ..run.figures import shares

        write_picture(picture, shares([one.count_E.tolist() for one in series], _titles(series)), "--picture")
    if as_json:
        click.echo(json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False))
    else:
        _show(report, series)
        if picture is not None:
            click.echo(f"picture: {picture}")


def _metrics(chosen: Sequence[str]) -> Sequence[str]:
    installed = find()
    for name in chosen:
        if (found := pick(name, installed)).kind != "metric":
            raise UsageError(f"'{name}' is a {found.kind}, not a metric; counts can only be measured")
    return chosen


def _read(
    files: Sequence[Path], over: Sequence[str], split: str, experts: int | None, top_k: int | None
) -> list["Series"]:
    from ..analysis.counts import read_counts

    out: list[Series] = []
    known: set[str] = set()
    for file in files:
        if file.is_dir():
            from ..analysis.routing_stats import of_run

            out += of_run(file)
            continue
        series, columns = read_counts(file, over, split, experts)
        out += series
        known |= columns
    if absent := [name for name in {*over, split} - known - {"split"} if name]:
        raise UsageError(f"no file has a column {listed(sorted(absent))}; there is {listed(sorted(known)) or 'none'}")
    for one in out:
        one.top_k = one.top_k or top_k
        if one.top_k and one.top_k > len(one.count_E):
            raise UsageError(f"--top-k is {one.top_k}, but {one.file} has {len(one.count_E)} experts in {one.title()}")
    return out


def _titles(series: Sequence["Series"]) -> list[str]:
    """What tells the series apart."""
    several = len({one.file for one in series}) > 1
    labels = {name: {one.labels.get(name) for one in series} for one in series for name in one.labels}
    alike = {name for name, values in labels.items() if len(values) == 1}
    return [(f"{one.file}: " if several else "") + one.title(alike) for one in series]


def _show(report: dict[str, Any], series: Sequence["Series"]) -> None:
    rows, changed = report["rows"], report["changes"]
    more = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    columns = ["experts", *NUMBERS, *sorted(more - {*NUMBERS, *SIZES})]
    _table(rows, columns, "verdict", [(row.get("verdict") or {}).get("name", "-") for row in rows])
    if changed:
        columns = ["against", "total_variation", "correlation", "cv_change"]
        _table(changed, columns, "moved most", [_moved(one["moved"]) for one in changed])
    for line in (*_findings(rows, _titles(series)), *_notes(report, series)):
        click.echo(line)


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str], last: str, ends: Sequence[str]) -> None:
    """Print what each row is of, its numbers, and a last column in words."""
    from ..analysis.counts import TOP_K
    from .progress import cell, table

    labels = [name for name in dict.fromkeys(name for row in rows for name in row["labels"]) if name not in TOP_K]
    own = [*(["file"] if len({row["file"] for row in rows}) > 1 else []), "layer", "split", "top_k", *columns]
    values = [[*(row["labels"].get(name) for name in labels), *(row.get(name) for name in own)] for row in rows]
    lines = [[cell(value) for value in line] for line in values]
    heads = [{"top_k": "K"}.get(name, name.replace("_", " ")) for name in own]
    table([*labels, *heads, last], [[*line, end] for line, end in zip(lines, ends, strict=True)])


def _moved(most: dict[str, Any]) -> str:
    return f"expert {most['expert']}: {most['from']:.2%} to {most['to']:.2%}"


def _findings(rows: Sequence[dict[str, Any]], titles: Sequence[str]) -> Iterator[str]:
    """What metrics say in words, the worst first; of each verdict, the least even series."""
    groups: dict[tuple[int, str, str], list[tuple[float, str]]] = {}
    for row, title in zip(rows, titles, strict=True):
        for one in row.values():
            if isinstance(one, dict) and "severity" in one:
                key = (-one["severity"], one["name"], one["advice"])
                groups.setdefault(key, []).append((-(row.get("cv") or 0), f"  {title}: {one['why']}"))
    for (_, name, advice), said in sorted(groups.items()):
        yield f"{name}, {len(said)} of {len(rows)}" + (f": {advice}" if advice else "")
        yield from (line for _, line in sorted(said)[:SHOWN])
        if len(said) > SHOWN:
            yield f"  and {len(said) - SHOWN} more, which are more even"


def _notes(report: dict[str, Any], series: Sequence["Series"]) -> Iterator[str]:
    """Where totals contradict each other, what was taken for granted, and what was not answered."""
    yield from (f"warning: {warning}" for warning in report["warnings"])
    if any(one.top_k is None for one in series):
        yield "nothing says how many experts a token chooses, so it is taken for 1; --top-k says otherwise"
    if not all(one.whole for one in series if one.source is None):
        yield "where numbers are not whole they are shares, of which none is put down to chance"
    for one in series:
        if one.source is not None:
            yield f"{one.file}, {one.title()}: {one.source}"
    if report["unanswered"]:
        yield f"{listed(report['unanswered'])} can't be told from counts alone"
