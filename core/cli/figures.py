"""Write a figure to the file that a flag names."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check_figure(path: Path) -> None:
    """Raise UsageError for a file name whose ending is not a figure format."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"figure {path} must end in .png, .svg or .pdf", code="unknown-figure-format")


def write_figure(path: Path, figure: "Figure", flag: str) -> None:
    """Draw a figure into a file. Raises UsageError if it can't be written."""
    from ..run.figures import figure_bytes

    try:
        write_atomically(path, figure_bytes(figure, path.suffix[1:].lower()))
    except OSError as error:
        sentence = f"{path} can't be written: {error.strerror}; name another file with {flag}"
        raise UsageError(sentence, code="unwritable-file") from error
