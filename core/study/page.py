"""A study as one self-contained page."""

from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader

from .results import LEGEND, bars_table, tables_of
from .tables import remarks


def html_of(results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page: the question and the bars first, then tables, pictures and remarks. It needs no network."""
    shown = [(name.removesuffix(".png"), b64encode(content).decode()) for name, content in pictures.items()]
    page = Environment(loader=PackageLoader("moe_engine.study", ""), autoescape=True).get_template("study.html.jinja")
    columns, bars = bars_table(results)
    return page.render(
        results=results,
        columns=columns,
        bars=bars,
        tables=tables_of(results),
        pictures=shown,
        legend=LEGEND,
        remarks=remarks(results["rows"]),
    )
