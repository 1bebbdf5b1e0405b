"""The figures that a study's file defines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import attrs
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..contract.run import Run
from ..run.figures import INK, STYLE, draw_classes, draw_usage, figure_bytes
from ..run.recorded import lives, series
from .grid import FINISHED, Record
from .spec import FigureSpec, Study, full_name, matches
from .tables import format_of

Row = Mapping[str, Any]
Rows = Sequence[Row]
MOST_PANELS = 12
GROUPED = 12  # rows above which those that share their first choices are grouped
LETTERS = 11  # of a title, per inch of a figure
WRAPPED = 40  # letters of a name on one line
PUBLISHED = {"marker": "D", "color": "C3", "markersize": 4.5, "fillstyle": "none", "linestyle": "none"}


@attrs.frozen
class Drawn:
    """What a figure draws besides its rows. published: rows. lines: those whose means are lines across."""

    records: Sequence[Record]
    published: Rows
    lines: Rows


def figures_of(study: Study, results: Mapping[str, Any], records: Sequence[Record]) -> dict[str, bytes]:
    """PNG files by name. Figures without data are left out; without records, those that draw runs."""
    files = {}
    for spec in study.figure:
        rows = [row for row in results["rows"] if matches(row, spec.where) and row["seeds"]]
        published = [row for row in results["published"] if _concerns(row, spec.where)]
        lines = [row for row in results["rows"] if spec.lines and matches(row, spec.lines) and row["seeds"]]
        with mpl.rc_context(STYLE):
            figure = KINDS[spec.kind](spec, rows, Drawn(records, published, lines)) if rows else None
        if figure is not None:
            figure.suptitle(fill(spec.title, int(LETTERS * figure.get_figwidth())), fontsize=11)
            files[f"{spec.name}.png"] = figure_bytes(figure, "png")
    return files


def _concerns(row: Row, where: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a published row belongs to these rows: in its part, and on each axis on which it has a place."""
    place = {"part": row["part"], **row["at"]}
    return all(place[axis] in choices for axis, choices in where.items() if axis in place)


def _labels(rows: Rows) -> list[str]:
    """Each row by the choices in which the rows differ."""
    return [", ".join(words) or row["variant"] for words, row in zip(_words(rows), rows, strict=True)]


def _words(rows: Rows) -> list[list[str]]:
    """Each row's choices on the axes on which the rows differ."""
    places = [{"part": row["part"], **row["at"]} for row in rows]
    axes = [axis for axis in places[0] if len({place.get(axis) for place in places}) > 1]
    return [[place[axis] for axis in axes if place.get(axis)] for place in places]


def _lines(rows: Rows, published: Rows) -> Iterator[tuple[str, Row | None]]:
    """(name, row) of each line of a figure, from the top; without a row, it is the title of those that follow."""
    if published:
        yield "published", None
        yield from ((str(row["name"]), row) for row in published)
    group = "measured" if published else ""
    if len(rows) <= GROUPED:
        if group:
            yield group, None
        yield from zip(_labels(rows), rows, strict=True)
        return
    last = ""
    for words, row in zip(_words(rows), rows, strict=True):
        first = ", ".join(words[:-1])
        if first and first != last:
            yield first, None
        last = first
        yield (words[-1] if words else row["variant"]), row


def _numbers(spec: FigureSpec, rows: Rows, drawn: Drawn) -> Figure:
    """A panel for each quantity, a line for each row: every seed, their mean and its 95 % interval."""
    published = [row for row in drawn.published if any(name in row["numbers"] for name in spec.quantities)]
    lines = [(fill(name, WRAPPED), row) for name, row in _lines(rows, published)]
    sizes = np.array([1 + 0.7 * name.count("\n") for name, _ in lines])
    heights = np.cumsum([0.0, *((sizes[1:] + sizes[:-1]) / 2)])
    size = (3.2 + 3.0 * len(spec.quantities), 1.1 + 0.24 * (float(heights[-1]) + 1))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(spec.quantities), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, spec.quantities, strict=True):
        title, factor, _digits = format_of(name)
        axes.set_title(title, fontsize=9.5)
        axes.locator_params(axis="x", nbins=5)
        for row in drawn.lines:
            if number := row["numbers"].get(name):
                axes.axvline(factor * number["mean"], color=INK, linewidth=0.8, linestyle="--", zorder=0)
        for height, (_, one) in zip(heights, lines, strict=True):
            if number := (one or {"numbers": {}})["numbers"].get(name):
                _draw_number(axes, number, factor, float(height))
    panels[0].set_yticks(heights, [name for name, _ in lines], fontsize=8)
    for label, (_, titled) in zip(panels[0].get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if titled is None else "normal")
    panels[0].set_ylim(float(heights[-1]) + 0.6, -0.6)
    return figure


def _draw_number(axes: Any, number: Mapping[str, Any] | float, factor: float, height: float) -> None:
    """A published value, or the seeds of a measured one with their mean and interval."""
    if not isinstance(number, Mapping):
        axes.plot([factor * number], [height], **PUBLISHED)
        return
    values = [factor * value for value in number["values"] if value is not None]
    axes.scatter(values, [height] * len(values), s=10, color="C0", alpha=0.45)
    half = factor * (number["half"] or 0)
    axes.errorbar(factor * number["mean"], height, xerr=half, fmt="o", color="C0", markersize=4, capsize=2.5)


def _against(spec: FigureSpec, rows: Rows, drawn: Drawn) -> Figure | None:
    """A panel for each quantity over the choices of axis x, a line for each combination of the other axes."""
    rows = [row for row in rows if spec.x in row["at"]]
    if not rows:
        return None
    figure = Figure(figsize=(1.8 + 4.0 * len(spec.quantities), 4), layout="constrained")
    panels = figure.subplots(1, len(spec.quantities), squeeze=False)[0]
    places = list(dict.fromkeys(row["at"][spec.x] for row in rows))
    lines: dict[str, list[Row]] = {}
    for row, label in zip(rows, _labels([{**row, "at": {**row["at"], spec.x: ""}} for row in rows]), strict=True):
        lines.setdefault(label, []).append(row)
    for axes, name in zip(panels, spec.quantities, strict=True):
        form = format_of(name)
        for number, (label, members) in enumerate(lines.items()):
            shift = 0.06 * (number - (len(lines) - 1) / 2)  # intervals of equal means would hide each other
            points = [
                (places.index(row["at"][spec.x]) + shift, row["numbers"][name])
                for row in members
                if row["numbers"].get(name)
            ]
            _draw_line(axes, points, form.factor, label)
        _draw_references(axes, spec.x, name, places, drawn)
        axes.set_title(form.title, fontsize=9.5)
        axes.set(xlabel=spec.x)
        axes.set_xticks(range(len(places)), places)
    named = {label: one for axes in panels for one, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = min(max(int(1.4 * LETTERS * figure.get_figwidth() / (8 + max(map(len, named)))), 1), 3)
    figure.set_figheight(3.6 + 0.2 * -(-len(named) // columns))
    figure.legend([*named.values()], [*named], fontsize=8, ncols=columns, loc="outside lower center")
    return figure


def _draw_references(axes: Any, x: str, name: str, places: Sequence[str], drawn: Drawn) -> None:
    """The published points, and a line across for each row that is a reference."""
    names = [", ".join(f"{axis}: {choice}" for axis, choice in row["at"].items()) for row in drawn.lines]
    for row, label, dashes in zip(drawn.lines, names, cycle(("--", ":", "-.")), strict=False):
        if number := row["numbers"].get(name):
            mean = format_of(name).factor * number["mean"]
            axes.axhline(mean, color=INK, linewidth=1, linestyle=dashes, zorder=0, label=label)
    points = [row for row in drawn.published if row["at"].get(x) in places and name in row["numbers"]]
    if points:
        heights = [format_of(name).factor * row["numbers"][name] for row in points]
        axes.plot([places.index(row["at"][x]) for row in points], heights, label="published", **PUBLISHED)


def _draw_line(axes: Any, points: Sequence[tuple[float, Mapping[str, Any]]], factor: float, label: str) -> None:
    """Means with their 95 % intervals at (x, number of a row)."""
    means = [factor * number["mean"] for _, number in points]
    halves = [factor * (number["half"] or 0) for _, number in points]
    axes.errorbar([x for x, _ in points], means, yerr=halves, marker="o", markersize=4, capsize=2.5, label=label)


def _usage(spec: FigureSpec, rows: Rows, drawn: Drawn) -> Figure | None:
    """A panel for each row: each expert's share of the first seed's test load, sorted; a line marks an even share."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        loads = series(run, "eval", "load", layer)[1]
        if loads:
            share = np.sort(np.array(loads[-1], dtype=float))[::-1]
            axes.bar(range(len(share)), 100 * share, color="C0")
            axes.axhline(100 / len(share), color="C3", linewidth=0.9, linestyle="--")
            axes.set(xlabel="expert, by share", ylabel="load %")
            axes.xaxis.get_major_locator().set_params(integer=True)

    return _panels(rows, drawn.records, draw, height=2.1, sharey=True)


def _over_time(spec: FigureSpec, rows: Rows, drawn: Drawn) -> Figure | None:
    """A panel for each row: heatmap of each expert's load over the first seed's run; 1 is an even share."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        loads, born, dead = lives(run, layer)
        if not loads:
            return None
        experts = 1 + max([expert for _, load in loads for expert in load] + [*born, *dead])
        image = draw_usage(axes, loads, born, {}, experts, top=4.0)
        axes.tick_params(axis="y", labelsize=6)
        return image

    return _panels(rows, drawn.records, draw, height=2.6, scale="load over an even share", top=4.0)


def _classes(spec: FigureSpec, rows: Rows, drawn: Drawn) -> Figure | None:
    """A panel for each row: each expert's share of a class's assignments, on the test set of the first seed's run."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        tables = series(run, "eval", "class_expert", layer)[1]
        return draw_classes(axes, tables[-1]) if tables else None

    return _panels(rows, drawn.records, draw, height=2.8, scale="share of a class")


def _panels(
    rows: Rows,
    records: Sequence[Record],
    draw: Callable[[Any, Run, str], Any],
    height: float,
    scale: str = "",
    top: float = 0.0,
    sharey: bool = False,
) -> Figure | None:
    """A grid of panels, one for each row and layer.

    scale, top: what the colours of all images are, and where they end; 0: at the largest number.
    """
    runs = [(label, run) for label, row in zip(_labels(rows), rows, strict=True) if (run := _first_run(row, records))]
    every = [(label, run, layer["name"]) for label, run in runs for layer in run.summary["layers"]]
    shown = every[:MOST_PANELS]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.8 * columns, 0.4 + height * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=sharey)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    images = []
    for axes, (label, run, layer) in zip(panels.flat, shown, strict=False):
        many_layers = len(run.summary["layers"]) > 1
        axes.set_title(fill(f"{label}, {layer}" if many_layers else label, int(3.8 * LETTERS)), fontsize=9)
        images.append(draw(axes, run, layer))
    if sharey:  # only now: a limit that is set ends the search for one that fits all
        panels[0, 0].set_ylim(bottom=0)
    images = [image for image in images if image is not None]
    if images:
        largest = max(float(np.nanmax(image.get_array())) for image in images)
        for image in images:
            image.set_clim(0, top or largest)
        extend = "max" if largest > (top or largest) else "neither"
        figure.colorbar(images[-1], ax=panels, shrink=0.6, label=scale, extend=extend)
    if len(every) > len(shown):
        figure.supxlabel(f"the first {len(shown)} of {len(every)} layers", fontsize=8)
    return figure


def _first_run(row: Row, records: Sequence[Record]) -> Run | None:
    """The run of a row's first seed, from its record."""
    name = full_name(row["part"], row["variant"])
    for record in records:
        if record["variant"] == name and record["status"] == FINISHED:
            return Run(Path(name), record["summary"], record["records"], {"run": record["config"]})
    return None


KINDS: dict[str, Callable[[FigureSpec, Rows, Drawn], Figure | None]] = {
    "numbers": _numbers,
    "against": _against,
    "usage": _usage,
    "over_time": _over_time,
    "classes": _classes,
}
