"""Tables of means over seeds: cells, verdicts, Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def spread(number: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    """The words "mean ± half" of a number of a row, times a factor; "-" where there is none."""
    if number is None:
        return "-"
    half = "" if number["half"] is None else f" ± {factor * number['half']:,.{digits}f}"
    return f"{factor * number['mean']:,.{digits}f}{half}"


def verdicts(row: Mapping[str, Any]) -> str:
    """How often each verdict came, and what became of a row that has no run."""
    words = [f"{verdict} {count}/{len(row['seeds'])}" for verdict, count in row["verdicts"].items()]
    return ", ".join(words if row["status"] == "finished" else [*words, row["status"]]) or "-"


def remarks(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each row of which a run is missing: why."""
    return [_remark(row) for row in rows if row["reason"]]


def _remark(row: Mapping[str, Any]) -> str:
    name = ", ".join(row[key] for key in ("part", "variant") if key in row)
    if row["status"] == "finished":
        return f"{name}: only {len(row['seeds'])} seeds finished: {row['reason']}"
    return f"{name} {'was refused' if row['status'] == 'refused' else 'failed'}: {row['reason']}"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as Markdown: words in the first and the last column, numbers between."""
    bars = ["---", *["---:"] * (len(columns) - 2), "---"]
    return "\n".join(f"| {' | '.join(one.replace('|', '/') for one in cells)} |" for cells in (columns, bars, *lines))
