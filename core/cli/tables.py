"""What commands print for people: lines folded at words, and tables that fit the terminal."""

import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from ..errors import listed, visible
from .output import folded, standard_output

GAP = 2  # columns between two columns of a table
FOLDED = 30  # the least width to which a table's last column is folded
NUMBERS = 36  # columns that names leave to numbers
PIECES = re.compile(r"\s+|[^\s,/]*[,/]?")  # a text may be folded at spaces, and after a comma or slash


def print_on(console: Console, line: str) -> None:
    """Print plain text: folded at words on a terminal, and one whole line in a file, for grep."""
    line = visible(line)
    lines = folded(line, console.width) if console.is_terminal else [line]
    console.print(Text("\n".join(lines)), highlight=False, soft_wrap=True)


def print_line(line: str) -> None:
    """Print plain text on standard output: folded at words on a terminal, whole in a file."""
    with standard_output() as stream:
        print_on(Console(file=stream, highlight=False, markup=False, emoji=False), line)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    keys: int = 1,
    wide: bool = True,
    first: Sequence[str] = (),
) -> None:
    """Print a table on standard output.

    The first `keys` columns name the rows. Where the terminal is too narrow for all others, those in `first` are kept
    before the rest, and a line tells which are left out; with `wide` they follow in further tables instead. In a file
    there is one table with one line per row, for grep.
    """
    columns, rows = list(map(visible, columns)), [list(map(visible, row)) for row in rows]
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    with standard_output() as stream:
        console = Console(file=stream, highlight=False, markup=False, emoji=False)
        width = console.width if console.is_terminal else 10**6
        words = [max(len(word) for row in [columns, *rows] for word in PIECES.findall(row[at])) for at in range(keys)]
        widths[:keys] = narrowed(widths[:keys], words, width)
        order = [index for name in first for index in range(keys, len(columns)) if columns[index] == name]
        parts = blocks(widths, keys, width) if wide else [chosen(widths, keys, width, order)]
        lines = [*_lines(columns, rows, widths, parts, width)]
        console.print(Text("\n".join(lines)), highlight=False, soft_wrap=True)
    if left := [name for index, name in enumerate(columns) if not any(index in part for part in parts)]:
        print_line(f"not shown for lack of room: {listed(left)} (--wide shows all)")


def blocks(widths: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """The columns of each table that fits `width`: the keys, and as many of the others as there is room for.

    The last column, which may hold a sentence, is folded instead of being put into a separate table.
    """
    widths = [*widths[:-1], min(widths[-1], FOLDED)]
    named = [*range(min(keys, len(widths)))]
    found: list[list[int]] = []
    room = 0
    for index in range(len(named), len(widths)):
        if not found or widths[index] + GAP > room:
            found.append([*named])
            room = width - sum(widths[key] + GAP for key in named) + GAP
        found[-1].append(index)
        room -= widths[index] + GAP
    return found or [named]


def chosen(widths: Sequence[int], keys: int, width: int, first: Sequence[int]) -> list[int]:
    """The columns of one table that fits `width`: the keys, those of `first`, and of the others as many as fit."""
    widths = [*widths[:-1], min(widths[-1], FOLDED)]
    kept = [*range(min(keys, len(widths)))]
    room = width - sum(widths[key] + GAP for key in kept) + GAP
    for index in dict.fromkeys([*first, *range(len(kept), len(widths))]):
        if widths[index] + GAP <= room:
            kept.append(index)
            room -= widths[index] + GAP
    return sorted(kept)


def narrowed(widths: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """The widths of the columns that name rows: the widest are folded until they leave `NUMBERS` columns to numbers.

    least: the longest word of each, below which it is not folded unless it takes more than half of the terminal.
    """
    found = [*widths]
    while sum(found) + GAP * len(found) > width - NUMBERS:
        foldable = [at for at, size in enumerate(found) if size > min(least[at], width // 2)]
        if not foldable:
            break
        found[max(foldable, key=lambda at: found[at])] -= 1
    return found


def _lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    parts: Sequence[Sequence[int]],
    width: int,
) -> Iterator[str]:
    """The lines of one table for each part of the columns."""
    numeric = [all(row[index][:1] in "-+.0123456789" for row in rows) for index in range(len(columns))]
    numeric[:1] = [False]
    for number, part in enumerate(parts):
        if number:
            yield ""
        *before, last = part
        room = max(width - sum(widths[index] + GAP for index in before), 1)
        sizes = {**{index: widths[index] for index in before}, last: min(widths[last], room)}
        for row in [columns, *rows]:
            cells = {index: fitted(row[index], sizes[index]) for index in part}
            for at in range(max(map(len, cells.values()))):
                words = {index: cell[at] if at < len(cell) else "" for index, cell in cells.items()}
                aligned = [
                    word.rjust(sizes[index]) if numeric[index] else word.ljust(sizes[index])
                    for index, word in words.items()
                ]
                yield (" " * GAP).join(aligned).rstrip()


def fitted(text: str, width: int) -> list[str]:
    """A cell in lines of at most `width` columns. A name without a place to fold it loses its middle."""
    lines = [""]
    for piece in PIECES.findall(text):
        word = piece
        if len(piece.strip()) > width:
            word = f"{piece[: width - width // 2 - 1]}\u2026{piece[len(piece) - width // 2 :]}"
        if len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word if lines[-1] or not word.isspace() else ""
    return [line.rstrip() for line in lines]
