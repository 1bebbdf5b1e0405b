"""Write a figure or a page to the file that a flag names."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..pages.blocks import Page

FORMATS = (".png", ".svg", ".pdf")


def check_figure(path: Path) -> None:
    """Raise UsageError for a file name whose ending is not a figure format."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"figure {path} must end in .png, .svg or .pdf", code="unknown-figure-format")


def write_figure(path: Path, figure: "Figure", flag: str) -> None:
    """Draw a figure into a file. Raises UsageError if it can't be written."""
    from ..run.figures import figure_bytes

    write_file(path, figure_bytes(figure, path.suffix[1:].lower()), flag)


def write_page(path: Path, page: "Page") -> None:
    """Write a page where --html says. Raises UsageError if that can't be."""
    from ..pages.page import html_of

    write_file(path, html_of(page).encode(), "--html")


def write_file(path: Path, content: bytes, flag: str) -> None:
    """Write the file that a flag names. Raises UsageError if that can't be."""
    try:
        write_atomically(path, content)
    except OSError as error:
        sentence = f"{path} can't be written: {error.strerror}; name another file with {flag}"
        raise UsageError(sentence, code="unwritable-file") from error
