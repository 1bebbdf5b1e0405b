"""Cells of a file of counts: numbers as spreadsheets and other tools write them, and labels."""

import math
import re
from typing import Any


def parsed(cell: str, delimiter: str) -> float:
    """A number as spreadsheets write it: 1,234 or 1 234 in thousands, 12.5%, 12,5 where a comma separates nothing.

    nan for anything else, and for 1,234 in a file of semicolons, where it may be a fraction, too.
    """
    text, scale = cell.strip(), 1.0
    if text.endswith("%"):
        text, scale = text[:-1].rstrip(), 100.0
    if re.fullmatch(r"[0-9]{1,3}(?:[ '\u00a0\u202f\u2019][0-9]{3})+", text):
        text = re.sub(r"[^0-9]", "", text)
    elif re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", text):
        text = "" if delimiter == ";" and text.count(",") == 1 and "." not in text else text.replace(",", "")
    elif re.fullmatch(r"[0-9]{1,3}(?:\.[0-9]{3}){2,}(?:,[0-9]+)?", text):
        text = text.replace(".", "").replace(",", ".")
    elif delimiter != "," and re.fullmatch(r"[0-9]+,[0-9]+", text):
        text = text.replace(",", ".")
    return math.nan if "_" in text else to_float(text) / scale


def to_float(value: Any) -> float:
    """A number; nan if it is not one."""
    try:
        return float(value)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf


def label_text(cell: Any) -> str:
    """A label as text; pandas writes whole numbers as 3.0 in a column with gaps."""
    text = str(cell).strip()
    return text[:-2] if re.fullmatch(r"[0-9]+\.0", text) else text


def hashable(cell: Any) -> Any:
    """A cell that a dict can hold: itself, or its text."""
    return cell if type(cell) in (str, int, float) else str(cell)


def has_letter(cell: str) -> bool:
    """Whether a text has a letter, so that it can't be a number."""
    return any(map(str.isalpha, cell))


def quoted(cell: Any) -> str:
    """The beginning of a cell, for an error message."""
    return f"'{str(cell).strip()[:40]}'"
