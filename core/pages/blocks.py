"""What a page is made of."""

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from ..errors import visible

T = TypeVar("T")

CELLS = 150_000  # numbers of one heatmap, over all its frames


@attrs.frozen
class Table:
    """Rows of cells as they are shown. words: the columns that hold text, which is aligned to the left.

    tones: severities from 0 to 2 of cells by their text. told: what is told on hover of columns, by their names.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    tones: Mapping[str, int] = attrs.field(factory=dict)
    told: Mapping[str, str] = attrs.field(factory=dict)
    kind = "table"

    @property
    def filled(self) -> "Table":
        """The table without the columns in which every row has "-"."""
        kept = [at for at in range(len(self.columns)) if not self.rows or any(row[at] != "-" for row in self.rows)]
        rows = [[row[at] for at in kept] for row in self.rows]
        words = [new for new, at in enumerate(kept) if at in self.words]
        return attrs.evolve(self, columns=[self.columns[at] for at in kept], rows=rows, words=words)


@attrs.frozen
class Mark:
    """Something that happened at a step, and what to say about it."""

    step: float
    text: str


@attrs.frozen
class Chart:
    """Lines over steps: {name: (steps, values)}. A click on a name in the legend hides its line.

    logarithmic: leaves out what is not positive. zero: the axis begins at 0. steps: values hold until the next step.
    """

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]
    x: str = "step"
    logarithmic: bool = False
    zero: bool = False
    stairs: bool = False
    decimals: int = 3
    marks: Sequence[Mark] = ()
    kind = "chart"

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script draws: the lines over all steps that any of them has."""
        steps = sorted({step for of_line, _ in self.lines.values() for step in of_line})
        series = []
        for name, (of_line, values) in self.lines.items():
            known = dict(zip(of_line, values, strict=True))
            series.append({"name": visible(name), "values": [self._number(known.get(step)) for step in steps]})
        marks = [{"step": mark.step, "text": visible(mark.text)} for mark in self.marks]
        shown = {"x": self.x, "steps": steps, "series": series, "marks": marks}
        flags = {"logarithmic": self.logarithmic, "zero": self.zero, "stairs": self.stairs, "decimals": self.decimals}
        return {**shown, **flags}

    def _number(self, value: float | None) -> float | None:
        if value is None or not math.isfinite(value) or (self.logarithmic and value <= 0):
            return None
        return float(f"{value:.6g}")


@attrs.frozen
class Heat:
    """Numbers in rows and columns as colours, at one or several moments, between which a slider moves.

    frames: (name of the moment, rows of numbers); rows may have unequal lengths, and None is left blank. even: the
    numbers are multiples of an even share, shown on a logarithmic scale from 1/8 to 8; else from 0 to the largest.
    """

    title: str
    rows: Sequence[str]
    frames: Sequence[tuple[str, Sequence[Sequence[float | None]]]]
    columns: Sequence[str] | None = None
    row: str = "layer"
    column: str = "expert"
    even: bool = True
    kind = "heat"

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script draws: as many of the frames, evenly spread and with the last, as a page can hold."""
        size = sum(len(row) for row in self.frames[-1][1])
        kept = spread(self.frames, CELLS // max(size, 1))
        short = [(name, [[_short(value) for value in row] for row in rows]) for name, rows in kept]
        frames = [{"name": visible(name), "rows": rows} for name, rows in short]
        width = max((len(row) for _, rows in kept for row in rows), default=0)
        columns = [*map(visible, self.columns)] if self.columns is not None else [str(at) for at in range(width)]
        words = {"row": self.row, "column": self.column, "even": self.even}
        return {"rows": [*map(visible, self.rows)], "columns": columns, "frames": frames, **words}


@attrs.frozen
class Words:
    """Text whose tokens are coloured by the expert that each was sent to first; all choices are told on hover.

    tokens: texts, an empty one between two passages; or small pictures as PNG, framed in the colour. layers: by name,
    for each token the experts that it chose, the first one first, and their gates.
    """

    title: str
    tokens: Sequence[str | bytes]
    layers: Mapping[str, Sequence[Sequence[tuple[int, float]]]]
    opened: str = ""
    kind = "words"

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script colours."""
        chosen = {
            visible(name): [[[expert, round(gate, 3)] for expert, gate in token] for token in tokens]
            for name, tokens in self.layers.items()
        }
        return {"layers": chosen, "opened": visible(self.opened or next(iter(self.layers), ""))}

    @property
    def shown(self) -> list[tuple[str, str]]:
        """(text, address of a picture) of each token, one of them empty; a line break is seen, too."""
        return [
            ("", address_of(token)) if isinstance(token, bytes) else (token.replace("\n", "\u21b5\n") or "\n\n", "")
            for token in self.tokens
        ]


@attrs.frozen
class Card:
    """What is known of one thing, such as an expert.

    expert: whose colour it has. lines: sentences. pictures: (PNG, what to say below it). tokens: (text, what is told on
    hover). contexts: (before, token, after, what is told on hover).
    """

    title: str
    expert: int
    lines: Sequence[str] = ()
    pictures: Sequence[tuple[bytes, str]] = ()
    tokens: Sequence[tuple[str, str]] = ()
    contexts: Sequence[tuple[str, str, str, str]] = ()

    @property
    def hue(self) -> int:
        """The colour that the page's script gives this expert's tokens: an angle far from those of its neighbours."""
        return round(self.expert * 137.508) % 360

    @property
    def shots(self) -> list[tuple[str, str]]:
        """(address, what to say below it) of each picture."""
        return [(address_of(content), text) for content, text in self.pictures]


@attrs.frozen
class Cards:
    """Cards next to each other, in as many columns as there is room for."""

    cards: Sequence[Card]
    kind = "cards"


@attrs.frozen
class Picture:
    """A figure as SVG or PNG, embedded."""

    title: str
    content: bytes
    kind = "picture"

    @property
    def address(self) -> str:
        """The picture as a data URI."""
        return address_of(self.content)


@attrs.frozen
class Code:
    """Text to copy."""

    text: str
    kind = "code"


@attrs.frozen
class Note:
    """A paragraph."""

    text: str
    kind = "note"


Block = Table | Chart | Heat | Words | Cards | Picture | Code | Note


@attrs.frozen
class Section:
    """Blocks under a title. folded: opened by a click. Charts and heatmaps that follow each other share rows."""

    title: str
    blocks: Sequence["Block | Section"]
    note: str = ""
    folded: bool = False
    kind = "section"


@attrs.frozen
class Page:
    """A page: what it is about, its verdict in large letters, findings, facts, sections.

    severity: 0 fine, 1 a warning, 2 bad; None: nothing is judged. findings: with name, severity, why, advice and
    layers. facts: (value, name). refresh: seconds after which an open page asks for itself again.
    """

    about: str
    verdict: str
    sections: Sequence[Section]
    severity: int | None = None
    findings: Sequence[Mapping[str, Any]] = ()
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    footer: str = ""
    refresh: int | None = None


def address_of(content: bytes) -> str:
    """SVG or PNG as a data URI."""
    mime = "image/png" if content.startswith(b"\x89PNG") else "image/svg+xml"
    return f"data:{mime};base64,{b64encode(content).decode()}"


def sentence(words: str) -> str:
    """A line of a terminal as a sentence of a page; a path or name that it begins with stays as it is."""
    begins = words.partition(" ")[0].rstrip(":,").isalpha()
    return f"{words[:1].upper() if begins else words[:1]}{words[1:]}{'' if words.endswith(('.', '?')) else '.'}"


def fact(number: int, word: str) -> tuple[str, str]:
    """A number of things as a fact of a page."""
    return f"{number:,}", word if number == 1 else f"{word}s"


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most that many of the items, but one at least: evenly spread, with the last one."""
    count = max(1, min(len(items), most))
    return [items[len(items) - 1 - round(at * (len(items) - 1) / max(count - 1, 1))] for at in reversed(range(count))]


def grouped(findings: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One finding of each name, the worst first, with all layers that have it."""
    groups: dict[str, dict[str, Any]] = {}
    for finding in findings:
        group = groups.setdefault(finding["name"], {**finding, "layers": []})
        group["layers"].append(finding["layer"])
    return list(groups.values())


def _short(value: float | None) -> float | None:
    """Three digits, which are enough for a colour and what is told on hover."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")
