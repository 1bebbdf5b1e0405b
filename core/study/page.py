"""Pages of results: Markdown, and one self-contained HTML file."""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from .tables import criteria_table, legend_of, remarks, tables_of


def markdown_of(results: Mapping[str, Any], figures: Iterable[str] = ()) -> str:
    """The page as Markdown. figures: names of PNG files in the same folder."""
    parts = [f"# {results['title']}", results["question"]]
    parts += [f"Source: {results['source']}"] if results["source"] else []
    if results["notes"]:
        parts += ["What is wrong with the publication:", "\n".join(f"- {note}" for note in results["notes"])]
    if results["criteria"]:
        parts += ["## Criteria", _markdown_table(*criteria_table(results))]
    for title, columns, lines in tables_of(results):
        parts += [f"## {title}" if title else "", _markdown_table(columns, lines)]
    parts += [legend_of(results), "\n".join(f"- {remark}" for remark in remarks(results))]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Text in the first and the last column, numbers between."""
    rule = ["---", *["---:"] * (len(columns) - 2), "---"]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (columns, rule, *lines))


def html_of(results: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """The page as HTML, which opens offline. figures: PNG files by name."""
    embedded = [(name.removesuffix(".png"), b64encode(content).decode()) for name, content in figures.items()]
    page = Environment(loader=PackageLoader("moe_engine.study", ""), autoescape=True).get_template("study.html.jinja")
    columns, criteria = criteria_table(results)
    return page.render(
        results=results,
        columns=columns,
        criteria=criteria,
        tables=tables_of(results),
        figures=embedded,
        legend=legend_of(results),
        remarks=remarks(results),
    )
