"""Write a page: one template, one palette, and the scripts inside."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader

from ..errors import visible
from .blocks import Page, Section

DRAWN = ("chart", "heat", "words")  # blocks that need the script


def html_of(page: Page) -> str:
    """The page as one HTML file, which opens offline and follows the reader's light or dark mode."""
    return environment().get_template("page.html.jinja").render(page=page, scripts=_scripts(page))


@cache
def environment() -> Environment:
    """The templates of pages; every text is escaped, and control characters are made visible."""
    made = Environment(loader=PackageLoader("moe_engine.pages", ""), autoescape=True, trim_blocks=True)
    made.filters["inline"] = visible
    made.filters["visible"] = lambda text: "\n".join(map(visible, str(text).split("\n")))
    return made


def _scripts(page: Page) -> list[str]:
    """The files that a page needs inside."""
    kinds = {kind for section in page.sections for kind in _kinds(section)}
    names = ["uPlot.iife.min.js"] if "chart" in kinds else []
    return [*names, "page.js"] if kinds & {*DRAWN} else []


def _kinds(block: Any) -> set[str]:
    if isinstance(block, Section):
        return {kind for inner in block.blocks for kind in _kinds(inner)}
    return {block.kind}
