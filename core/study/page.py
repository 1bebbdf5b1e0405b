"""Pages of results: Markdown, and what one self-contained HTML file shows."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..pages.blocks import Note, Page, Picture, Section, Table, fact
from .tables import cell, criteria_table, format_of, legend_of, remarks, tables_of

PASSED = "passed"
MOST_ROWS = 40  # of a table that is not folded


def markdown_of(results: Mapping[str, Any], figures: Iterable[str] = ()) -> str:
    """The page as Markdown. figures: names of PNG files in the same folder."""
    parts = [f"# {results['title']}", results["question"]]
    parts += [f"Source: {results['source']}"] if results["source"] else []
    if results["notes"]:
        parts += ["What is wrong with the publication:", "\n".join(f"- {note}" for note in results["notes"])]
    if results["criteria"]:
        parts += ["## Criteria", _markdown_table(criteria_table(results))]
    for title, table in tables_of(results):
        parts += [f"## {title}" if title else "", _markdown_table(table)]
    parts += [legend_of(results), "\n".join(f"- {remark}" for remark in remarks(results))]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    """Text to the left, numbers to the right."""
    rule = ["---" if at in table.words else "---:" for at in range(len(table.columns))]
    lines = (table.columns, rule, *table.rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)


def study_page(results: Mapping[str, Any], figures: Mapping[str, bytes]) -> Page:
    """The page of a study. figures: PNG files by name."""
    criteria = results["criteria"]
    failed = [one for one in criteria if one["verdict"] != PASSED]
    judged = f"{len(criteria) - len(failed)} of {len(criteria)} criteria passed"
    runs = sum(len(row["seeds"]) for row in results["rows"])
    return Page(
        about=results["title"],
        verdict=judged if criteria else "criteria are not judged",
        severity=(2 if failed else 0) if criteria else None,
        findings=[_failed(one) for one in failed],
        facts=[fact(len(results["rows"]), "variant"), fact(runs, "run")],
        notes=[results["question"], *([f"Source: {results['source']}"] if results["source"] else [])],
        sections=[section for section in _sections(results, figures) if section.blocks],
        footer=_footer(results),
    )


def _failed(criterion: Mapping[str, Any]) -> dict[str, Any]:
    value = "without a value" if criterion["value"] is None else f"{criterion['value']:.4g}"
    where = f" ({criterion['variant']})" if criterion["variant"] else ""
    why = f"{criterion['claim']}: {value}{where}, wanted: {criterion['limit']}"
    return {"name": criterion["verdict"], "severity": 2, "why": why, "advice": ""}


def _sections(results: Mapping[str, Any], figures: Mapping[str, bytes]) -> Iterator[Section]:
    pictures = [Picture(name.removesuffix(".png").replace("_", " "), content) for name, content in figures.items()]
    yield Section("Figures", pictures)
    if results["criteria"]:
        yield Section("Criteria", [criteria_table(results)])
    yield Section("What is wrong with the publication", [Note(note) for note in results["notes"]])
    for at, (title, table) in enumerate(tables_of(results)):
        legend = "" if at else legend_of(results)
        yield Section(title or "Results", [table], legend, folded=len(table.rows) > MOST_ROWS)
    yield Section("Missing runs", [Note(remark) for remark in remarks(results)])


def comparison_page(comparison: Mapping[str, Any], figure: bytes) -> Page:
    """The page of a comparison of plugins. figure: as SVG."""
    seeds = len(comparison["seeds"])
    picture = Picture(f"Each seed, the mean{' and its 95 % interval' if seeds > 1 else ''}", figure)
    tables = [Section("Results", [table], legend_of(comparison)) for _, table in tables_of(comparison)]
    missing = [Note(remark) for remark in remarks(comparison)]
    return Page(
        about=comparison["title"],
        verdict=_best(comparison),
        facts=[fact(len(comparison["rows"]), "variant"), fact(seeds, "seed"), (comparison["task"], "task")],
        sections=[
            Section("Variants", [picture]),
            *tables,
            *([Section("Missing runs", missing)] if missing else []),
        ],
        footer=_footer(comparison),
    )


def _best(comparison: Mapping[str, Any]) -> str:
    """The plugin with the best mean, next to the dense model."""
    quality = comparison["quality"]
    known = [row for row in comparison["rows"] if quality in row["numbers"]]
    plugins = [row for row in known if row["kind"] != "dense"]
    if not plugins:
        return "no plugin could be compared"
    sign = -1 if quality == "accuracy" else 1
    best = min(plugins, key=lambda row: sign * row["numbers"][quality]["mean"])
    dense = next((f"; dense: {_number(row, quality)}" for row in known if row["kind"] == "dense"), "")
    return f"{best['variant']}: best {quality}, {_number(best, quality)}{dense}"


def _number(row: Mapping[str, Any], quality: str) -> str:
    form = format_of(quality)
    return cell(row["numbers"][quality], form) + (" %" if form.title.endswith("%") else "")


def _footer(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())
