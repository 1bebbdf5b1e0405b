"""What `routing-stats` says, in tables and sentences, and its page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from ..errors import listed
from ..pages.blocks import Block, Heat, Note, Page, Section, Table, fact, sentence
from ..run.forms import heading, shown
from .count_columns import TOP_K
from .count_series import Series

METRICS = ("cv", "cv2", "gini", "entropy", "max_min", "maxvio", "active")
SIZES = ("experts", "top_k", "tokens", "total", "dropped")  # numbers of a row that are not metrics
EXPERT_NUMBERS = ("sum", "mean", "minimum", "maximum", "range")
SHOWN = 8  # series per verdict, experts among the busiest, and heatmaps next to each other
MOST_LABELS = 20  # columns of labels in a table; --json has all of them
MOST_ROWS = 400  # of a heatmap

Row = Mapping[str, Any]
Report = Mapping[str, Any]


@attrs.frozen
class Numbers:
    """A table, and how many of its columns name a row."""

    title: str
    table: Table
    keys: int


@attrs.frozen
class Told:
    """What is shown of a report. unstable: why there is no table of stability, if it was asked for.

    findings: as a page shows them, with `lines`: the series that are least even, and why.
    """

    tables: Sequence[Numbers]
    unstable: str
    findings: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


def told_of(report: Report, series: Sequence[Series]) -> Told:
    """The tables and sentences, for the terminal and the page. report: as --json prints it."""
    titles = titles_of(series)
    unstable = "per_expert" in report and not report["stability"]
    return Told(
        [*_tables(report)],
        "the rows give no stability: each layer has one row, or one step" if unstable else "",
        _findings(report["rows"], titles),
        [*_notes(report, series)],
    )


def titles_of(series: Sequence[Series]) -> list[str]:
    """The name of each series: the file and labels in which they differ."""
    several_files = len({counts.file for counts in series}) > 1
    alike = _alike(series)
    return [(f"{counts.file}: " if several_files else "") + counts.title(alike) for counts in series]


def _alike(series: Sequence[Series]) -> set[str]:
    """The labels that all series have in common."""
    names = dict.fromkeys(name for counts in series for name in counts.labels)
    labels = {name: {counts.labels.get(name) for counts in series} for name in names}
    return {name for name, values in labels.items() if len(values) == 1}


# -- tables ----------------------------------------------------------------------------------------


def _tables(report: Report) -> Iterator[Numbers]:
    rows, changed = report["rows"], report["changes"]
    extra = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    columns = ["experts", *METRICS, *sorted(extra - {*METRICS, *SIZES})]
    judged = [row["verdict"] for row in rows if row.get("verdict")]
    verdicts = [(row.get("verdict") or {}).get("name", "-") for row in rows]
    tones = {one["name"]: one["severity"] for one in judged}
    yield _numbers("Balance", rows, columns, "verdict", verdicts, tones)
    if changed:
        ends = [_moved(change["moved"]) for change in changed]
        columns = ["against", "total_variation", "correlation", "cv_change"]
        yield _numbers("Splits against each other", changed, columns, "moved most", ends)
    if "per_expert" in report:
        yield _experts(report["per_expert"])
        if report["stability"]:
            ends = [_most(row) for row in report["stability"]]
            columns = ["rows", "moved", "by_chance", "cv_rows"]
            yield _numbers("Stability", report["stability"], columns, "moved most; busiest experts", ends)


def _numbers(
    title: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    last: str,
    ends: Sequence[str],
    tones: Mapping[str, int] | None = None,
) -> Numbers:
    """The labels of each row, its metrics, and a last column in words."""
    labels = [name for name in dict.fromkeys(name for row in rows for name in row["labels"]) if name not in TOP_K]
    labels = labels[:MOST_LABELS]
    keys = [*(["file"] if len({row["file"] for row in rows}) > 1 else []), "layer", "split"]
    numbers = [*keys, "top_k", *columns]
    values = [[*(row["labels"].get(name) for name in labels), *(row.get(name) for name in numbers)] for row in rows]
    lines = [[shown(name, value) for name, value in zip([*labels, *numbers], line, strict=True)] for line in values]
    heads = [*labels, *({"top_k": "K"}.get(name) or heading(name) for name in numbers), last]
    body = [[*line, end] for line, end in zip(lines, ends, strict=True)]
    named = len(labels) + len(keys)
    words = [*range(named), *(at for at, name in enumerate(heads) if name == "against"), len(heads) - 1]
    return Numbers(title, Table(heads, body, words, tones=tones or {}), named)


def _experts(per_expert: Sequence[Row]) -> Numbers:
    """A line for each expert of a layer."""
    lines: list[dict[str, Any]] = []
    several = [row for row in per_expert if row["number"] > 1]  # the numbers of a single row are its counts
    for row in several or per_expert:
        for expert, numbers in enumerate(zip(*(row[name] for name in EXPERT_NUMBERS), strict=True)):
            lines.append({**row, "expert": expert, **dict(zip(EXPERT_NUMBERS, map(_exact, numbers), strict=True))})
    ends = [f"{line['number']} {line['over']}" if several else "1 row" for line in lines]
    return _numbers("Experts", lines, ["expert", *EXPERT_NUMBERS], "over", ends)


def _exact(value: float) -> float | str:
    """A count with all its digits, and a large mean with one decimal; other numbers are shortened."""
    return f"{value:.0f}" if value.is_integer() else f"{value:.1f}" if value >= 100 else value


def _most(row: Row) -> str:
    """The largest move of a series, and its experts that are most often among the busiest."""
    often = sorted(enumerate(row["busiest"]), key=lambda pair: -pair[1])[: row["busy"]]
    most = row["moved_most"]
    where = f"{most['total_variation']:.2%} from {most['from']} to {most['to']}"
    return f"{where}; {', '.join(f'{expert} ({part:.0%})' for expert, part in often[:SHOWN])}"


def _moved(most: Row) -> str:
    return f"expert {most['expert']}: {most['from']:.2%} to {most['to']:.2%}"


# -- sentences -------------------------------------------------------------------------------------


def _findings(rows: Sequence[Row], titles: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics' findings, the most severe first, each with the series that have it, the least even first."""
    groups: dict[tuple[int, str, str], list[tuple[float, str, str]]] = {}
    for row, title in zip(rows, titles, strict=True):
        for finding in row.values():
            if isinstance(finding, dict) and "severity" in finding:
                key = (-finding["severity"], finding["name"], finding["advice"])
                groups.setdefault(key, []).append((-(row.get("cv") or 0), title, finding["why"]))
    return [
        {
            **{"severity": -severity, "name": name, "advice": advice, "of": len(rows)},
            "lines": [(title, why) for _, title, why in sorted(lines)],
        }
        for (severity, name, advice), lines in sorted(groups.items())
    ]


def finding_lines(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The findings as lines of a terminal."""
    for one in findings:
        lines = one["lines"]
        yield f"{one['name']}, {len(lines)} of {one['of']}" + (f": {one['advice']}" if one["advice"] else "")
        yield from (f"  {title}: {why}" for title, why in lines[:SHOWN])
        if len(lines) > SHOWN:
            yield f"  and {len(lines) - SHOWN} more, which are more even"


def _notes(report: Report, series: Sequence[Series]) -> Iterator[str]:
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


def _sources(series: Sequence[Series]) -> Iterator[str]:
    """Where counts come from; in one line if it is the same for a whole file."""
    by_file: dict[str, list[Series]] = {}
    for counts in series:
        by_file.setdefault(counts.file, []).append(counts)
    for file, of_file in by_file.items():
        if of_file[0].source is not None and len({counts.source for counts in of_file}) == 1:
            yield f"{file}: {of_file[0].source}"
            continue
        yield from (f"{file}, {one.title()}: {one.source}" for one in of_file if one.source is not None)


# -- the page --------------------------------------------------------------------------------------


def stats_page(report: Report, series: Sequence[Series], told: Told) -> Page:
    """The page of a report. told: what the terminal shows."""
    worst = told.findings[0] if told.findings else None
    notes = [*([told.unstable] if told.unstable else []), *told.notes]
    sizes = sorted({len(one.count_E) for one in series})
    found = [
        {**one, "why": one["lines"][0][1], "where": _where(one["lines"], one["of"])}
        for one in told.findings
        if one["severity"] or one is worst
    ]
    loads, over_time = [*_loads(series)], [*_over_time(series)] if "per_expert" in report else []
    return Page(
        about=f"routing of {listed(dict.fromkeys(one.file for one in series))}",
        verdict=worst["name"] if worst else "no verdict",
        severity=worst["severity"] if worst else None,
        findings=found,
        facts=[
            fact(len({one.layer for one in series}), "layer"),
            (" or ".join(map(str, (sizes[0], sizes[-1])[: len(sizes)])), "experts"),
            fact(len({one.split for one in series}), "split"),
        ],
        notes=[sentence(note) for note in notes],
        sections=[
            Section("Load of each expert", loads, "Over an even share of its row."),
            *(Section(one.title, [one.table], folded=len(one.table.rows) > MOST_ROWS) for one in told.tables),
            *([Section("Loads from row to row", over_time, "Over an even share.")] if over_time else []),
        ],
    )


def _where(lines: Sequence[tuple[str, str]], rows: int) -> str:
    """The series that a finding is about, the least even first."""
    first, others = lines[0][0], len(lines) - 1
    if rows == 1:
        return ""
    return f"{first} and {others} more of {rows}" if others else f"{first} alone of {rows}"


def _loads(series: Sequence[Series]) -> Iterator[Block]:
    """A heatmap of layers by experts for each split; of all series, where they differ in more or have one layer."""
    several_files, alike = len({one.file for one in series}) > 1, _alike(series)
    groups: dict[str, list[Series]] = {}
    for one in series:
        labels = [label for name, label in one.labels.items() if name not in alike]
        groups.setdefault(", ".join([*([one.file] if several_files else []), *labels, one.split]), []).append(one)
    if len(groups) <= SHOWN and all(len(members) > 1 for members in groups.values()):
        for name, members in groups.items():
            yield Heat(name or "load", [one.layer for one in members], [("", [*map(_relative, members)])])
        return
    shown_rows = series[:MOST_ROWS]
    yield Heat("all series", titles_of(series)[:MOST_ROWS], [("", [*map(_relative, shown_rows)])], row="")
    if len(series) > MOST_ROWS:
        yield Note(f"The first {MOST_ROWS} of {len(series)} series; --json has all.")


def _relative(series: Series) -> list[float]:
    return [float(share) * len(series.count_E) for share in series.share_E]


def _over_time(series: Sequence[Series]) -> Iterator[Heat]:
    """Each expert's load in each row of a series."""
    for one, title in zip(series, titles_of(series), strict=True):
        if len(one.count_PE) > 1 and one.count_PE.shape[1]:
            total_P = one.count_PE.sum(1).clip(min=1e-300)
            load_EP = (one.count_PE / total_P[:, None]).T * one.count_PE.shape[1]
            names = [str(expert) for expert in range(len(load_EP))]
            yield Heat(title, names, [("", load_EP.tolist())], one.points, "expert", "row")
