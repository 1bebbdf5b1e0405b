"""Pages to look at: one design for every command, in one file that opens offline.

    from moe_engine.pages import Heat, Page, Section, html_of

A page is made of sections, and those of blocks; `html_of` writes it. Importing this package loads no torch.
"""

from .blocks import Card, Cards, Chart, Code, Heat, Mark, Note, Page, Picture, Section, Table, Words
from .page import html_of
from .pictures import png

__all__ = [
    "Card",
    "Cards",
    "Chart",
    "Code",
    "Heat",
    "Mark",
    "Note",
    "Page",
    "Picture",
    "Section",
    "Table",
    "Words",
    "html_of",
    "png",
]
