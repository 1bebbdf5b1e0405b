"""Writing a picture where a flag says."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(path: Path) -> None:
    """Raise UsageError for a name that no picture can have."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"the picture's name {path} must end in .png, .svg or .pdf")


def write_picture(path: Path, figure: "Figure", flag: str) -> None:
    """Draw a figure into a file. Raises UsageError if it can't be written."""
    from ..run.figures import figure_bytes

    try:
        write_atomically(path, figure_bytes(figure, path.suffix[1:].lower()))
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}; name another file with {flag}") from error
