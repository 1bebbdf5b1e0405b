"""The figures that a study's file defines."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..contract.run import Run
from ..run.figures import STYLE, draw_classes, draw_usage, figure_bytes
from ..run.recorded import lives, series
from .grid import FINISHED, Record
from .spec import FigureSpec, Study, full_name, matches
from .tables import format_of

Row = Mapping[str, Any]
Rows = Sequence[Row]
MOST_PANELS = 12


def figures_of(study: Study, results: Mapping[str, Any], records: Sequence[Record]) -> dict[str, bytes]:
    """PNG files by name. Figures without data are left out."""
    files = {}
    for spec in study.figure:
        rows = [row for row in results["rows"] if matches(row, spec.where) and row["seeds"]]
        with mpl.rc_context(STYLE):
            figure = KINDS[spec.kind](spec, rows, records) if rows else None
        if figure is not None:
            figure.suptitle(spec.title, fontsize=11)
            files[f"{spec.name}.png"] = figure_bytes(figure, "png")
    return files


def _labels(rows: Rows) -> list[str]:
    """Each row by the choices in which the rows differ."""
    places = [{"part": row["part"], **row["at"]} for row in rows]
    axes = [axis for axis in places[0] if len({place.get(axis) for place in places}) > 1]
    return [
        ", ".join(place.get(axis, "") for axis in axes) or row["variant"]
        for place, row in zip(places, rows, strict=True)
    ]


def _numbers(spec: FigureSpec, rows: Rows, _: Sequence[Record]) -> Figure:
    """A panel for each quantity, a line for each row: every seed, their mean and its 95 % interval."""
    figure = Figure(figsize=(3.2 + 3.0 * len(spec.quantities), 1.1 + 0.24 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(spec.quantities), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, spec.quantities, strict=True):
        title, factor, _digits = format_of(name)
        axes.set_title(title, fontsize=9.5)
        for height, row in enumerate(rows):
            number = row["numbers"].get(name)
            if number:
                values = [factor * value for value in number["values"] if value is not None]
                axes.scatter(values, [height] * len(values), s=10, color="C0", alpha=0.45)
                half = factor * (number["half"] or 0)
                axes.errorbar(
                    factor * number["mean"], height, xerr=half, fmt="o", color="C0", markersize=4, capsize=2.5
                )
    panels[0].set_yticks(range(len(rows)), _labels(rows), fontsize=8)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _against(spec: FigureSpec, rows: Rows, _: Sequence[Record]) -> Figure | None:
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
        for number, (label, members) in enumerate(lines.items()):
            shift = 0.06 * (number - (len(lines) - 1) / 2)  # intervals of equal means would hide each other
            points = [
                (places.index(row["at"][spec.x]) + shift, row["numbers"][name])
                for row in members
                if row["numbers"].get(name)
            ]
            _draw_line(axes, points, format_of(name).factor, label)
        axes.set_title(format_of(name).title, fontsize=9.5)
        axes.set_xticks(range(len(places)), places)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    return figure


def _draw_line(axes: Any, points: Sequence[tuple[float, Mapping[str, Any]]], factor: float, label: str) -> None:
    """Means with their 95 % intervals at (x, number of a row)."""
    means = [factor * number["mean"] for _, number in points]
    halves = [factor * (number["half"] or 0) for _, number in points]
    axes.errorbar([x for x, _ in points], means, yerr=halves, marker="o", markersize=4, capsize=2.5, label=label)


def _usage(spec: FigureSpec, rows: Rows, records: Sequence[Record]) -> Figure | None:
    """A panel for each row: each expert's share of the first seed's test load, sorted; a line marks an even share."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        loads = series(run, "eval", "load", layer)[1]
        if loads:
            share = np.sort(np.array(loads[-1], dtype=float))[::-1]
            axes.bar(range(len(share)), 100 * share, color="C0")
            axes.axhline(100 / len(share), color="C3", linewidth=0.9, linestyle="--")
            axes.set(xlabel="expert, by share", ylabel="load %", ylim=(0, None))
            axes.xaxis.get_major_locator().set_params(integer=True)

    return _panels(rows, records, draw, height=2.1)


def _over_time(spec: FigureSpec, rows: Rows, records: Sequence[Record]) -> Figure | None:
    """A panel for each row: heatmap of each expert's load over the first seed's run; 1 is an even share."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        loads, born, dead = lives(run, layer)
        if not loads:
            return None
        experts = 1 + max([expert for _, load in loads for expert in load] + [*born, *dead])
        image = draw_usage(axes, loads, born, {}, experts, top=4.0)
        axes.tick_params(axis="y", labelsize=6)
        return image

    return _panels(rows, records, draw, height=2.6)


def _classes(spec: FigureSpec, rows: Rows, records: Sequence[Record]) -> Figure | None:
    """A panel for each row: each expert's share of a class's assignments, on the test set of the first seed's run."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        tables = series(run, "eval", "class_expert", layer)[1]
        return draw_classes(axes, tables[-1]) if tables else None

    return _panels(rows, records, draw, height=2.8)


def _panels(
    rows: Rows, records: Sequence[Record], draw: Callable[[Any, Run, str], Any], height: float
) -> Figure | None:
    """A grid of panels, one for each row and layer."""
    runs = [(label, run) for label, row in zip(_labels(rows), rows, strict=True) if (run := _first_run(row, records))]
    shown = [(label, run, layer["name"]) for label, run in runs for layer in run.summary["layers"]][:MOST_PANELS]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.8 * columns, 0.4 + height * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    image = None
    for axes, (label, run, layer) in zip(panels.flat, shown, strict=False):
        many_layers = len(run.summary["layers"]) > 1
        axes.set_title(f"{label}, {layer}" if many_layers else label, fontsize=9)
        image = draw(axes, run, layer) or image
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.6)
    return figure


def _first_run(row: Row, records: Sequence[Record]) -> Run | None:
    """The run of a row's first seed, from its record."""
    name = full_name(row["part"], row["variant"])
    for record in records:
        if record["variant"] == name and record["status"] == FINISHED:
            return Run(Path(name), record["summary"], record["records"], {"run": record["config"]})
    return None


KINDS: dict[str, Callable[[FigureSpec, Rows, Sequence[Record]], Figure | None]] = {
    "numbers": _numbers,
    "against": _against,
    "usage": _usage,
    "over_time": _over_time,
    "classes": _classes,
}
