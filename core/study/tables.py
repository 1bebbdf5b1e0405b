"""Tables of results, for the terminal and both pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..pages.blocks import Table
from ..run.forms import FORMATS, Format, fixed
from .grid import FINISHED, REFUSED

SCOPES = {"tail": "stream", "after_growth": "after growth"}
LEGEND = (
    "Ours: mean over the seeds ± half of the 95 % interval (Student's t), on data not trained on; "
    "stream: over the last tenth of the training steps. Published rows are quoted."
)
TONES = {"passed": 0, "failed": 2}


def format_of(quantity: str) -> Format:
    """A quantity's format, with its scope and fold in the title."""
    scope, _, rest = quantity.partition(".")
    scoped = scope in SCOPES or (scope[:4] in ("step", "eval") and scope[4:].isdigit())
    name, _, fold = (rest if scoped else quantity).partition(":")
    found = FORMATS.get(name, Format(name))
    words = [SCOPES.get(scope, f"step {scope[4:]}") if scoped else "", found.title, f"({fold})" if fold else ""]
    return found._replace(title=" ".join(word for word in words if word))


def tables_of(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """(title, table) of each part, published rows first; columns without a number are left out."""
    tables = []
    for part in results["parts"]:
        rows = [row for row in results["rows"] if row["part"] == part["name"]]
        published = [row for row in results["published"] if row["part"] == part["name"]]
        columns = {name: _column(name, rows) for name in part["columns"]}
        titles = ["", *(shown.title for shown in columns.values()), "verdicts"]
        lines = [[f"published: {row['name']}", *_cells(row, columns), "-"] for row in published]
        lines += [[row["variant"], *_cells(row, columns), _verdicts(row)] for row in rows]
        tables.append((part["title"], Table(titles, lines, (0, len(titles) - 1)).filled))
    return tables


def _column(quantity: str, rows: Sequence[Mapping[str, Any]]) -> Format:
    """A column's format; FLOPs of small layers are shown in thousands, because they would look alike in millions."""
    usual = format_of(quantity)
    means = [row["numbers"][quantity]["mean"] for row in rows if quantity in row["numbers"]]
    if usual.title.startswith("MFLOPs") and means and max(means) < 1e5:
        return Format(usual.title.replace("MFLOPs", "kFLOPs"), 1e-3, 1)
    return usual


def _cells(row: Mapping[str, Any], columns: Mapping[str, Format]) -> list[str]:
    return [cell(row["numbers"].get(name), shown) for name, shown in columns.items()]


def cell(number: Mapping[str, Any] | float | None, shown: Format) -> str:
    """ "mean ± half" of a measured number, a published value as it is, "-" where there is neither."""
    if number is None:
        return "-"
    parts = [number["mean"], number["half"]] if isinstance(number, Mapping) else [number]
    return " ± ".join(fixed(shown.factor * part, shown.digits) for part in parts if part is not None)


def _verdicts(row: Mapping[str, Any]) -> str:
    """How often each verdict was given, and the status of a row without a run."""
    words = [f"{verdict} {count}/{len(row['seeds'])}" for verdict, count in row["verdicts"].items()]
    return ", ".join(words if row["status"] == FINISHED else [*words, row["status"]]) or "-"


def criteria_table(results: Mapping[str, Any]) -> Table:
    """Each claim, its verdict, and the worst variant with its value."""
    lines = [
        [
            criterion["claim"],
            criterion["verdict"],
            "-" if criterion["value"] is None else f"{criterion['value']:.4g}",
            criterion["limit"],
            criterion["variant"] or "-",
        ]
        for criterion in results["criteria"]
    ]
    return Table(("claim", "verdict", "worst", "limit", "variant"), lines, (0, 1, 3, 4), tones=TONES)


def legend_of(results: Mapping[str, Any]) -> str:
    """The legend of the tables."""
    return str(results.get("legend", LEGEND))


def remarks(results: Mapping[str, Any]) -> list[str]:
    """A sentence for each row that lacks a run, with the reason."""
    return [_remark(row) for row in results["rows"] if row["reason"]]


def _remark(row: Mapping[str, Any]) -> str:
    name = ", ".join(filter(None, (row["part"], row["variant"])))
    if row["status"] == FINISHED:
        return f"{name}: only {len(row['seeds'])} seeds finished: {row['reason']}"
    return f"{name} {'was refused' if row['status'] == REFUSED else 'failed'}: {row['reason']}"
