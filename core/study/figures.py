"""A study's pictures, as its file asks for them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..contract.run import Run
from ..run.figures import STYLE, draw_classes, draw_usage, figure_bytes, lives, series
from .grid import FINISHED, Record
from .results import title_of
from .spec import Picture, Study

Rows = Sequence[Mapping[str, Any]]
MANY = 12  # panels in a picture


def pictures_of(study: Study, results: Mapping[str, Any], records: Sequence[Record]) -> dict[str, bytes]:
    """PNG files by name. What has no numbers is left out."""
    drawn = {}
    for one in study.picture:
        rows = [row for row in results["rows"] if _named(row, one) and row["seeds"]]
        with mpl.rc_context(STYLE):
            figure = KINDS[one.kind](one, rows, records) if rows else None
        if figure is not None:
            figure.suptitle(one.title, fontsize=11)
            drawn[f"{one.name}.png"] = figure_bytes(figure, "png")
    return drawn


def _named(row: Mapping[str, Any], one: Picture) -> bool:
    place = {"part": row["part"], **row["at"]}
    return all(place.get(axis) in choices for axis, choices in one.where.items())


def _labels(rows: Rows) -> list[str]:
    """Each row by the choices in which the rows differ."""
    places = [{"part": row["part"], **row["at"]} for row in rows]
    axes = [axis for axis in places[0] if len({place.get(axis) for place in places}) > 1]
    return [
        ", ".join(place.get(axis, "") for axis in axes) or row["variant"]
        for place, row in zip(places, rows, strict=True)
    ]


def _numbers(one: Picture, rows: Rows, _: Sequence[Record]) -> Figure:
    """A panel a quantity, a line a row: every seed, their mean and its 95 % interval."""
    figure = Figure(figsize=(3.2 + 3.0 * len(one.quantities), 1.1 + 0.24 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(one.quantities), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, one.quantities, strict=True):
        title, factor, _digits = title_of(name)
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


def _against(one: Picture, rows: Rows, _: Sequence[Record]) -> Figure | None:
    """A panel a quantity over the choices of axis x, a line for each combination of the others."""
    rows = [row for row in rows if one.x in row["at"]]
    if not rows:
        return None
    figure = Figure(figsize=(1.8 + 4.0 * len(one.quantities), 4), layout="constrained")
    panels = figure.subplots(1, len(one.quantities), squeeze=False)[0]
    places = list(dict.fromkeys(row["at"][one.x] for row in rows))
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row, label in zip(rows, _labels([{**row, "at": {**row["at"], one.x: ""}} for row in rows]), strict=True):
        kinds.setdefault(label, []).append(row)
    for axes, name in zip(panels, one.quantities, strict=True):
        title, factor, _digits = title_of(name)
        for turn, (label, own) in enumerate(kinds.items()):
            aside = 0.06 * (turn - (len(kinds) - 1) / 2)  # intervals of equal means would hide each other
            found = [
                (places.index(row["at"][one.x]) + aside, number) for row in own if (number := row["numbers"].get(name))
            ]
            middle = [factor * number["mean"] for _, number in found]
            halves = [factor * (number["half"] or 0) for _, number in found]
            axes.errorbar(
                [at for at, _ in found], middle, yerr=halves, marker="o", markersize=4, capsize=2.5, label=label
            )
        axes.set_title(title, fontsize=9.5)
        axes.set_xticks(range(len(places)), places)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    return figure


def _usage(one: Picture, rows: Rows, records: Sequence[Record]) -> Figure | None:
    """A panel a row: bars of each expert's share of the first seed's test load, in falling order; a line is even."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        loads = series(run, "eval", "load", layer)[1]
        if loads:
            share = np.sort(np.array(loads[-1], dtype=float))[::-1]
            axes.bar(range(len(share)), 100 * share, color="C0")
            axes.axhline(100 / len(share), color="C3", linewidth=0.9, linestyle="--")
            axes.set(xlabel="expert, by share", ylabel="load %", ylim=(0, None))
            axes.xaxis.get_major_locator().set_params(integer=True)

    return _panels(rows, records, draw, height=2.1)


def _over_time(one: Picture, rows: Rows, records: Sequence[Record]) -> Figure | None:
    """A panel a row: the heatmap of the load of each expert over the first seed's run; 1 is an even share."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        loads, born, dead = lives(run, layer)
        if not loads:
            return None
        experts = 1 + max([one for _, load in loads for one in load] + [*born, *dead])
        image = draw_usage(axes, loads, born, {}, experts, top=4.0)
        axes.tick_params(axis="y", labelsize=6)
        return image

    return _panels(rows, records, draw, height=2.6)


def _classes(one: Picture, rows: Rows, records: Sequence[Record]) -> Figure | None:
    """A panel a row: which share of a class's assignments each expert got, test set of the first seed's run."""

    def draw(axes: Any, run: Run, layer: str) -> Any:
        tables = series(run, "eval", "class_expert", layer)[1]
        return draw_classes(axes, tables[-1]) if tables else None

    return _panels(rows, records, draw, height=2.8)


def _panels(
    rows: Rows, records: Sequence[Record], draw: Callable[[Any, Run, str], Any], height: float
) -> Figure | None:
    """A grid of panels, one for each row and layer."""
    runs = [(label, run) for label, row in zip(_labels(rows), rows, strict=True) if (run := _first_run(row, records))]
    wanted = [(label, run, layer["name"]) for label, run in runs for layer in run.summary["layers"]][:MANY]
    if not wanted:
        return None
    columns = min(3, len(wanted))
    lines = -(-len(wanted) // columns)
    figure = Figure(figsize=(3.8 * columns, 0.4 + height * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(wanted) :]:
        axes.set_visible(False)
    image = None
    for axes, (label, run, layer) in zip(panels.flat, wanted, strict=False):
        several = len(run.summary["layers"]) > 1
        axes.set_title(f"{label}, {layer}" if several else label, fontsize=9)
        image = draw(axes, run, layer) or image
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.6)
    return figure


def _first_run(row: Mapping[str, Any], records: Sequence[Record]) -> Run | None:
    """The run of a row's first seed, from its record."""
    name = f"{row['part']}: {row['variant']}"
    own = [record for record in records if record["variant"] == name and record["status"] == FINISHED]
    return Run(Path(name), own[0]["summary"], own[0]["records"], {"run": own[0]["config"]}) if own else None


KINDS: dict[str, Callable[[Picture, Rows, Sequence[Record]], Figure | None]] = {
    "numbers": _numbers,
    "against": _against,
    "usage": _usage,
    "over_time": _over_time,
    "classes": _classes,
}
